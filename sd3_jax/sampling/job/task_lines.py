"""The line of JSON of a task's picture, before the picture is painted."""

from collections.abc import Mapping

from sd3_jax.sampling.job import picture_lines
from sd3_jax.sampling.job.prompt_file import Task
from sd3_jax.sampling.job.prompt_lines import RELEASED


def describe(
    task: Task, facts: dict, nets: Mapping[str, str], suffix: str = "png"
) -> dict:
    """The picture's line. For released weights `seed` is the one for generate()."""
    # Facts of released weights have a fingerprint instead of a step.
    own_checkpoint = "step" in facts
    unused = RELEASED if own_checkpoint else ()
    settings = {k: v for k, v in task.settings.items() if k not in unused}
    used = [control["net"] for control in settings.get("control", ())]
    inputs = task.inputs | {path: nets[path] for path in used if path in nets}
    name = f"{task.index:04d}-{picture_lines.slug(task.caption)}.{suffix}"
    return {
        "file": f"samples/{name}",
        "prompt": task.prompt if isinstance(task.prompt, str) else list(task.prompt),
        "number": task.number,
        "seed": settings.pop("seed") + (0 if own_checkpoint else task.number),
        **facts,
        "settings": settings,
        **({"inputs": inputs} if inputs else {}),
    }
