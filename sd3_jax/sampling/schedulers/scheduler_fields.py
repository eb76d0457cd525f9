"""Fields that several classes of scheduler_config.json have."""

import json
import math
from typing import Any

from sd3_jax.diffusion import grids
from sd3_jax.foreign_text import shown
from sd3_jax.sampling.schedulers.scheduler import CLOCK
from sd3_jax.weights.config_fields import Field, flag


def value_text(value: Any) -> str:
    """A value as in the file."""
    return shown(json.dumps(value, default=str))


def is_number(x: Any) -> bool:
    # To Python true is a number, in a file it is a mistake.
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def count(default: int) -> Field:
    whole = lambda x: isinstance(x, int) and not isinstance(x, bool)
    return Field(default, "a whole number >= 1", lambda x: whole(x) and 1 <= x <= 10**9)


def real(default: float) -> Field:
    return Field(default, "a finite number", is_number)


def one_of(*choices: str) -> Field:
    # The first choice is the default, as diffusers' classes have it.
    return Field(choices[0], f"one of {', '.join(choices)}", lambda x: x in choices)


# 1 where a file has none, which changes no t.
SHIFT = Field(1.0, "a finite number > 0", lambda x: is_number(x) and x > 0)
END = Field(None, "null or a number in [0, 1)", lambda x: is_number(x) and 0 <= x < 1)
SPACED = {f"use_{name}_sigmas": flag(False) for name in grids.SPACINGS if name}
SIZED = {
    "use_dynamic_shifting": flag(False),
    "base_shift": real(0.5),
    "max_shift": real(1.15),
    "base_image_seq_len": count(256),
    "max_image_seq_len": count(4096),
}
CLOCK_KEY = {"num_train_timesteps": count(CLOCK)}


def sizes(values: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a Scheduler for the keys SIZED."""
    return {
        "dynamic": values["use_dynamic_shifting"],
        "base": (values["base_image_seq_len"], float(values["base_shift"])),
        "most": (values["max_image_seq_len"], float(values["max_shift"])),
    }
