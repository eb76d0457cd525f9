"""Steps whose loss or gradient is not finite: reported, then skipped or fatal."""

import math

from sd3_jax.errors import RunFailed


class NonFinite:
    """Counts the steps without an update; make_train_step leaves the state as it was.

    `skipped` of `allowed` lie behind, those before a restart included: a run that is
    restarted again and again must not skip without end.
    """

    def __init__(self, allowed: int, skipped: int = 0, last_saved: int = 0):
        self.allowed, self.skipped, self.last_saved = allowed, skipped, last_saved
        self.last_good = last_saved  # what is saved was finite

    def is_one(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether the step made no update."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.last_good = step
            return False
        self.skipped += 1
        return True

    def words(self, step: int, loss: float, grad_norm: float, names: list[str]) -> str:
        shown = ", ".join(names[:4]) + (", …" if names[4:] else "")
        return (
            f"step {step}: loss {loss:g}, gradient norm {grad_norm:g}: the update was"
            f" skipped; last good step {self.last_good}, last saved step"
            f" {self.last_saved}; its batch: {shown}"
        )

    def stop_beyond(self, words: str) -> None:
        """RunFailed once more steps were skipped than allowed."""
        if self.skipped > self.allowed:
            raise RunFailed(
                f"{words}; {self.skipped} steps were skipped, and"
                f" config.train.skip_nonfinite = {self.allowed} allows no more"
            )
