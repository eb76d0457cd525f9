"""A model folder's scheduler_config.json becomes a Scheduler.

A setting has the meaning that diffusers' class gives it, or is refused by name
(diffusers 0.42, schedulers/scheduling_*.py).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown
from sd3_jax.sampling.schedulers import multistep_schedulers
from sd3_jax.sampling.schedulers.multistep_schedulers import (
    DEIS_KEYS,
    DPM_KEYS,
    IDLE,
    UNIPC_KEYS,
)
from sd3_jax.sampling.schedulers.scheduler import CLOCK, PUBLISHED, Scheduler
from sd3_jax.sampling.schedulers.scheduler_fields import (
    CLOCK_KEY,
    END,
    SHIFT,
    SIZED,
    SPACED,
    one_of,
    sizes,
    value_text,
)
from sd3_jax.weights.config_fields import Field, flag

EULER, HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
LCM, DPM = "FlowMatchLCMScheduler", "DPMSolverMultistepScheduler"
UNIPC, DEIS = "UniPCMultistepScheduler", "DEISMultistepScheduler"
FLOW_KEYS = {
    **CLOCK_KEY,
    "shift": SHIFT,
    **SIZED,
    **SPACED,
    "invert_sigmas": flag(False),
    "shift_terminal": END,
    "time_shift_type": one_of("exponential", "linear"),
}
LCM_KEYS = FLOW_KEYS | {
    "scale_factors": Field(None, "null or numbers", lambda x: isinstance(x, list)),
    "upscale_mode": Field("bicubic", "a text", lambda x: isinstance(x, str)),
}


def read(config: Any, where: str = "the scheduler") -> Scheduler:
    """The scheduler of a scheduler_config.json, or the published one if there is none.

    UserError for a setting of the wrong type or out of range. A valid setting that is
    not supported is named in `refused`, since callers may override it.
    """
    if config is None:
        return PUBLISHED
    name, values = _checked(config, where)
    if name not in CLASSES:
        known = ", ".join(CLASSES)
        reason = (
            f"{where}: class {shown(name)} is not supported; expected one of {known}"
        )
        shifts = [float(config[k]) for k in ("flow_shift", "shift") if k in config]
        shift = shifts[0] if shifts else PUBLISHED.shift
        return dataclasses.replace(PUBLISHED, shift=shift, refused=reason)
    # `complaints` has, for each setting that is not supported, the supported values.
    scheduler, complaints = CLASSES[name].make(values)
    # The networks are conditioned on 1000 t, whatever the scheduler counts.
    if values["num_train_timesteps"] != CLOCK:
        complaints["num_train_timesteps"] = str(CLOCK)
    # The first complaint is enough: the caller mends one setting at a time.
    for key, allowed in complaints.items():
        value = value_text(values[key])
        reason = (
            f"{where}: {key} {value} of {name} is not supported; expected {allowed}"
        )
        return dataclasses.replace(scheduler, refused=reason)
    return scheduler


def unread(config: Mapping[str, Any]) -> list[str]:
    """Keys of a checked file that its class does not have; diffusers ignores them."""
    name = config.get("_class_name", EULER)
    if name not in CLASSES:
        return []
    keys = CLASSES[name].keys
    return [k for k in config if not k.startswith("_") and k not in (*keys, *IDLE)]


def _checked(config: Any, where: str) -> tuple[str, dict[str, Any]]:
    """The class's name, and all its keys with their values or defaults."""
    if not isinstance(config, Mapping):
        raise UserError(f"{where}: {value_text(config)}: expected a JSON object")
    name = config.get("_class_name", EULER)
    if not isinstance(name, str):
        raise UserError(f"{where}: _class_name {value_text(name)}: expected a text")
    values = {}
    for key, field in _keys(name).items():
        value = config.get(key, field.default)
        # null stands for the default, except where diffusers computes with the value:
        # null fails there.
        if value is None and key not in ("shift", "flow_shift", "num_train_timesteps"):
            value = field.default
        if value is not field.default and not field.accepts(value):
            raise UserError(
                f"{where}: {key} {value_text(value)}: expected {field.allowed}"
            )
        values[key] = value
    # mu lies on a line through two points; equal lengths would divide by zero.
    if values.get("use_dynamic_shifting"):
        if values["base_image_seq_len"] == values["max_image_seq_len"]:
            message = f"{where}: base_image_seq_len and max_image_seq_len are the same"
            raise UserError(
                f"{message}; use_dynamic_shifting needs two different values"
            )
    return name, values


def _keys(name: str) -> dict[str, Field]:
    """A class's keys; for an unknown class, those with one meaning in all classes."""
    return (
        CLASSES[name].keys if name in CLASSES else {"shift": SHIFT, "flow_shift": SHIFT}
    )


# --- settings of each class


def _flow(values: dict[str, Any]) -> tuple[Scheduler, dict[str, str]]:
    spaced = [name for name in SPACED if values[name]]
    complaints = {}
    # diffusers refuses two spacings as well.
    if len(spaced) > 1:
        complaints[spaced[1]] = f"false, or {spaced[0]} false"
    if values["invert_sigmas"]:
        complaints["invert_sigmas"] = "false"
    scheduler = Scheduler(
        shift=float(values["shift"]),
        **sizes(values),
        linear=values["time_shift_type"] == "linear",
        terminal=values["shift_terminal"] or None,  # 0 is none, as in diffusers
        spacing=spaced[0].split("_")[1] if spaced else "",
    )
    return scheduler, complaints


def _euler(values: dict[str, Any]) -> tuple[Scheduler, dict[str, str]]:
    scheduler, complaints = _flow(values)
    # diffusers' Euler with stochastic_sampling takes the LCM step: predict x0, then
    # noise it anew to the next t.
    if values["stochastic_sampling"]:
        scheduler = dataclasses.replace(scheduler, solver="lcm")
    return scheduler, complaints


def _heun(values: dict[str, Any]) -> tuple[Scheduler, dict[str, str]]:
    # diffusers' Heun has no dynamic shift and no spacings.
    return Scheduler(solver="heun", shift=float(values["shift"])), {}


def _lcm(values: dict[str, Any]) -> tuple[Scheduler, dict[str, str]]:
    scheduler, complaints = _flow(values)
    # Scale-wise distilled models change the size of latents between steps.
    if values["scale_factors"]:
        complaints["scale_factors"] = "null: pictures that grow from step to step"
    return dataclasses.replace(scheduler, solver="lcm"), complaints


class Class(NamedTuple):
    keys: dict[str, Field]
    make: Callable[[dict[str, Any]], tuple[Scheduler, dict[str, str]]]


CLASSES = {
    EULER: Class(FLOW_KEYS | {"stochastic_sampling": flag(False)}, _euler),
    HEUN: Class({k: FLOW_KEYS[k] for k in ("num_train_timesteps", "shift")}, _heun),
    LCM: Class(LCM_KEYS, _lcm),
    DPM: Class(DPM_KEYS, multistep_schedulers.dpm),
    UNIPC: Class(UNIPC_KEYS, multistep_schedulers.unipc),
    DEIS: Class(DEIS_KEYS, multistep_schedulers.deis),
}
