"""A released model's sampling scheduler: its solver, and the times t that it visits."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from sd3_jax.diffusion import grids, timesteps
from sd3_jax.diffusion.checks import require
from sd3_jax.errors import UserError

CLOCK = 1000  # the networks are given 1000 t
# A solver's line of t's, if not the released models': that of its diffusers' class.
USUAL = {
    **dict.fromkeys(("dpmpp_2m_flow", "dpmpp_3m_flow", "deis_2", "deis_3"), "flow"),
    **dict.fromkeys(("dpmpp_2m_sde", "dpmpp_3m_sde"), "flow"),
    **dict.fromkeys(("unipc_2", "unipc_3"), "unipc"),
}


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """The default solver and times of a model; without arguments the published ones.

    `line` names the times before the shift. `dynamic` shifts by mu, interpolated by the
    image's tokens between `base` and `most`, each (tokens, mu). `refused` says which of
    the folder's settings is not supported, if any.
    """

    solver: str = "euler"
    line: str = "released"
    shift: float = 3.0
    dynamic: bool = False
    # base and most: the defaults of FlowMatchEulerDiscreteScheduler in diffusers.
    base: tuple[int, float] = (256, 0.5)
    most: tuple[int, float] = (4096, 1.15)
    linear: bool = False  # mu itself is the shift, not its logarithm
    terminal: float | None = None  # the last t before 0
    spacing: str = ""  # karras, exponential, beta
    refused: str = ""

    def sampler(
        self,
        steps: int,
        tokens: int,
        *,
        solver: str | None = None,
        grid: str | None = None,
        shift: float | None = None,
        mu: float | None = None,
        sigmas: Sequence[float] | np.ndarray | None = None,
    ) -> tuple[str, Float32[np.ndarray, " n"]]:
        """The solver, and the t's it visits in an image of so many tokens.

        Arguments override the scheduler's fields. A `grid` of diffusion/grids.py is
        used unchanged; `sigmas` are shifted as the scheduler's times are.
        """
        options = {"grid": grid, "shift": shift, "mu": mu, "sigmas": sigmas}
        set_options = [name for name, value in options.items() if value is not None]
        # A grid fixes all times, and mu sets the shift, as its logarithm or itself: two
        # of a pair contradict.
        for pair in ("grid", "mu"), ("grid", "sigmas"), ("shift", "mu"):
            if set(pair) <= set(set_options):
                raise UserError(f"{pair[0]} and {pair[1]} are both set; set only one")
        if self.refused and (
            solver is None or not {"grid", "sigmas"} & set(set_options)
        ):
            raise UserError(f"{self.refused}; or set both a solver and a grid")
        line = self.line
        if solver not in (None, self.solver):
            # A solver that is not the file's brings its own line of times.
            line = USUAL.get(solver, "released")
        solver = solver or self.solver
        # Named grids have a fixed shape; of the scheduler only its shift is used.
        if grid is not None:
            return solver, grids.make(
                grid, steps, self.shift if shift is None else shift
            )
        if mu is None and shift is None and self.dynamic:
            mu = grids.linear_mu(tokens, base=self.base, most=self.most)
        return solver, self._times(steps, line, shift, mu, sigmas)

    def _times(self, steps, line, shift, mu, sigmas) -> Float32[np.ndarray, " n"]:
        """In diffusers' order: the line, shifted, stretched to its end, respaced."""
        end = 1 / CLOCK
        if mu is not None:
            # e^80 is far beyond what leaves float32 steps apart.
            require(bool(abs(mu) < 80), "mu", mu, "a number between -80 and 80")
            shift = mu if self.linear else math.exp(mu)
        else:
            shift = self.shift if shift is None else shift
            end = timesteps.shift(end, shift)  # shifted twice: see grids.released
        require(bool(0 < shift < math.inf), "shift", shift, "a finite number > 0")
        if sigmas is not None:
            t = grids.custom(sigmas)
        else:
            require(steps >= 1, "steps", steps, "a whole number >= 1")
            t = LINES[line](steps, end)
        # diffusers shifts custom sigmas as well, so the caller's are shifted here.
        t = timesteps.shift(t, shift)
        if self.terminal is not None:
            t = grids.stretched(t, self.terminal)
        if line == "unipc":
            t = grids.below_one(t)
        return grids.apart(np.append(grids.SPACINGS[self.spacing](t), 0), shift)

    def non_default_settings(self) -> dict[str, Any]:
        """Fields that differ from the published models', for JSON."""
        values = {x.name: (getattr(self, x.name), x.default) for x in FIELDS}
        differing = {name: a for name, (a, b) in values.items() if a != b}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in differing.items()}


LINES = {  # of n t's before the shift, without the 0
    "released": lambda n, end: np.linspace(1, end, n),
    "flow": lambda n, end: np.linspace(1 - 1 / CLOCK, 0, n + 1)[:-1],
    "unipc": lambda n, end: np.linspace(1, 1 / CLOCK, n + 1)[:-1],
}
FIELDS = dataclasses.fields(Scheduler)
PUBLISHED = Scheduler()
