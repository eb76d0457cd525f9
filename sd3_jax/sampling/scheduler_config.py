"""A model folder's scheduler_config.json: the solver and the t's it asks for.

What diffusers' class of that name does with a setting is done here too, or the setting
is refused by its name (diffusers 0.42, schedulers/scheduling_*.py).
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from sd3_jax.diffusion import grids, timesteps
from sd3_jax.diffusion.checks import require
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown
from sd3_jax.weights.published_configs import Field, flag

EULER, HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
LCM, DPM = "FlowMatchLCMScheduler", "DPMSolverMultistepScheduler"
CLOCK = 1000  # the networks are given 1000 t
USUAL = {"dpmpp_2m_flow": "flow"}  # a solver's line of t's, if not the released models'


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """What is sampled with where the caller is silent; by itself the published models'.

    `line` says where the t's lie before they are shifted. `dynamic` shifts by mu, which
    the image's tokens give on the line through `base` and `most`, (tokens, mu) each.
    `refused` is why the folder's own settings are not honoured, if they are not.
    """

    solver: str = "euler"
    line: str = "released"
    shift: float = 3.0
    dynamic: bool = False
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

        What a caller gives is taken instead of the scheduler's own: a named grid of
        diffusion/grids.py as it is, `sigmas` shifted as the scheduler's are.
        """
        options = {"grid": grid, "shift": shift, "mu": mu, "sigmas": sigmas}
        set_options = [name for name, value in options.items() if value is not None]
        for pair in ("grid", "mu"), ("grid", "sigmas"), ("shift", "mu"):
            if set(pair) <= set(set_options):
                raise UserError(f"{pair[0]} and {pair[1]} are both given: wanted one")
        if self.refused and (
            solver is None or not {"grid", "sigmas"} & set(set_options)
        ):
            raise UserError(f"{self.refused}; or give both a solver and a grid")
        line = self.line
        if solver not in (None, self.solver):
            line = USUAL.get(solver, "released")
        solver = solver or self.solver
        if grid is not None:
            return solver, grids.make(
                grid, steps, self.shift if shift is None else shift
            )
        if mu is None and shift is None and self.dynamic:
            mu = grids.linear_mu(tokens, base=self.base, most=self.most)
        return solver, self._times(steps, line, shift, mu, sigmas)

    def _times(self, steps, line, shift, mu, sigmas) -> Float32[np.ndarray, " n"]:
        """In diffusers' order: the line, shifted, stretched to its end, spaced anew."""
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
        t = timesteps.shift(t, shift)
        if self.terminal is not None:
            t = grids.stretched(t, self.terminal)
        return grids.apart(np.append(grids.SPACINGS[self.spacing](t), 0), shift)

    def non_default_settings(self) -> dict[str, Any]:
        """What differs from the published models', as the JSON of a picture's line."""
        values = {x.name: (getattr(self, x.name), x.default) for x in FIELDS}
        differing = {name: a for name, (a, b) in values.items() if a != b}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in differing.items()}


LINES = {  # of n t's before the shift, without the 0
    "released": lambda n, end: np.linspace(1, end, n),
    "flow": lambda n, end: np.linspace(1 - 1 / CLOCK, 0, n + 1)[:-1],
}
FIELDS = dataclasses.fields(Scheduler)
PUBLISHED = Scheduler()


# --- The file


def _shown(value: Any) -> str:
    """As the file has it."""
    return shown(json.dumps(value, default=str))


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _count(default: int) -> Field:
    whole = lambda x: isinstance(x, int) and not isinstance(x, bool)
    return Field(default, "a whole number >= 1", lambda x: whole(x) and 1 <= x <= 10**9)


def _number(default: float) -> Field:
    return Field(default, "a finite number", _is_number)


def _text(*choices: str) -> Field:
    return Field(choices[0], f"one of {', '.join(choices)}", lambda x: x in choices)


SHIFT = Field(1.0, "a finite number > 0", lambda x: _is_number(x) and x > 0)
END = Field(None, "null or a number in [0, 1)", lambda x: _is_number(x) and 0 <= x < 1)
SPACED = {f"use_{name}_sigmas": flag(False) for name in grids.SPACINGS if name}
SIZED = {
    "use_dynamic_shifting": flag(False),
    "base_shift": _number(0.5),
    "max_shift": _number(1.15),
    "base_image_seq_len": _count(256),
    "max_image_seq_len": _count(4096),
}
FLOW_KEYS = {
    "num_train_timesteps": _count(CLOCK),
    "shift": SHIFT,
    **SIZED,
    **SPACED,
    "invert_sigmas": flag(False),
    "shift_terminal": END,
    "time_shift_type": _text("exponential", "linear"),
}
LCM_KEYS = FLOW_KEYS | {
    "scale_factors": Field(None, "null or numbers", lambda x: isinstance(x, list)),
    "upscale_mode": Field("bicubic", "a text", lambda x: isinstance(x, str)),
}
DPM_KEYS = {
    "num_train_timesteps": _count(CLOCK),
    "flow_shift": SHIFT,
    **SIZED,
    "max_shift": _number(1.16),  # the pipeline's own, where no scheduler has one
    **SPACED,
    "use_flow_sigmas": flag(False),
    "use_lu_lambdas": flag(False),
    "prediction_type": _text("epsilon", "flow_prediction", "sample", "v_prediction"),
    "algorithm_type": _text(
        *("dpmsolver++", "dpmsolver", "sde-dpmsolver", "sde-dpmsolver++", "deis")
    ),
    "solver_order": _count(2),
    "solver_type": _text("midpoint", "heun", "bh1", "bh2", "logrho"),
    "final_sigmas_type": _text("zero", "sigma_min"),
    "thresholding": flag(False),
    "time_shift_type": _text("exponential"),
}
# Settings of DPMSolverMultistep that do nothing where sigmas are those of a flow, whose
# last is 0: they are of noise in betas, or of the last steps of a third order.
IDLE = (
    *("beta_start", "beta_end", "beta_schedule", "trained_betas", "steps_offset"),
    *("dynamic_thresholding_ratio", "sample_max_value", "lower_order_final"),
    *("euler_at_final", "lambda_min_clipped", "variance_type", "timestep_spacing"),
    "rescale_betas_zero_snr",
)


def read(config: Any, where: str = "the scheduler") -> Scheduler:
    """The scheduler of a scheduler_config.json, or the published one if there is none.

    A UserError names a setting of the wrong type or out of range. One that is right
    but cannot be honoured is in `refused`, for a caller may do without it.
    """
    if config is None:
        return PUBLISHED
    name, values = _checked(config, where)
    if name not in CLASSES:
        known = ", ".join(CLASSES)
        reason = f"{where}: class {shown(name)} is not honoured: wanted one of {known}"
        shifts = [float(config[k]) for k in ("flow_shift", "shift") if k in config]
        shift = shifts[0] if shifts else PUBLISHED.shift
        return dataclasses.replace(PUBLISHED, shift=shift, refused=reason)
    scheduler, complaints = CLASSES[name].make(values)
    if values["num_train_timesteps"] != CLOCK:
        complaints["num_train_timesteps"] = str(CLOCK)
    for key, wanted in complaints.items():
        value = _shown(values[key])
        reason = f"{where}: {key} {value} of {name} is not honoured: wanted {wanted}"
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
        raise UserError(f"{where}: {_shown(config)}: wanted a JSON object")
    name = config.get("_class_name", EULER)
    if not isinstance(name, str):
        raise UserError(f"{where}: _class_name {_shown(name)}: wanted a text")
    values = {}
    for key, field in _keys(name).items():
        value = config.get(key, field.default)
        if value is None and key not in ("shift", "flow_shift", "num_train_timesteps"):
            value = field.default
        if value is not field.default and not field.accepts(value):
            raise UserError(f"{where}: {key} {_shown(value)}: wanted {field.allowed}")
        values[key] = value
    if values.get("use_dynamic_shifting"):
        if values["base_image_seq_len"] == values["max_image_seq_len"]:
            message = f"{where}: base_image_seq_len and max_image_seq_len are the same"
            raise UserError(f"{message}: wanted two, for use_dynamic_shifting")
    return name, values


def _keys(name: str) -> dict[str, Field]:
    """Of a class that is not known, those that have one meaning in all."""
    return (
        CLASSES[name].keys if name in CLASSES else {"shift": SHIFT, "flow_shift": SHIFT}
    )


def _flow(values: dict[str, Any]) -> tuple[Scheduler, dict[str, str]]:
    spaced = [name for name in SPACED if values[name]]
    complaints = {}
    if len(spaced) > 1:
        complaints[spaced[1]] = f"false, or {spaced[0]} false"
    if values["invert_sigmas"]:
        complaints["invert_sigmas"] = "false"
    scheduler = Scheduler(
        shift=float(values["shift"]),
        **_sizes(values),
        linear=values["time_shift_type"] == "linear",
        terminal=values["shift_terminal"] or None,  # 0 is none, as in diffusers
        spacing=spaced[0].split("_")[1] if spaced else "",
    )
    return scheduler, complaints


def _sizes(values: dict[str, Any]) -> dict[str, Any]:
    return {
        "dynamic": values["use_dynamic_shifting"],
        "base": (values["base_image_seq_len"], float(values["base_shift"])),
        "most": (values["max_image_seq_len"], float(values["max_shift"])),
    }


def _euler(values: dict[str, Any]) -> tuple[Scheduler, dict[str, str]]:
    scheduler, complaints = _flow(values)
    if values["stochastic_sampling"]:
        scheduler = dataclasses.replace(scheduler, solver="lcm")
    return scheduler, complaints


def _heun(values: dict[str, Any]) -> tuple[Scheduler, dict[str, str]]:
    return Scheduler(solver="heun", shift=float(values["shift"])), {}


def _lcm(values: dict[str, Any]) -> tuple[Scheduler, dict[str, str]]:
    scheduler, complaints = _flow(values)
    if values["scale_factors"]:
        complaints["scale_factors"] = "null: pictures that grow from step to step"
    return dataclasses.replace(scheduler, solver="lcm"), complaints


def _dpm(values: dict[str, Any]) -> tuple[Scheduler, dict[str, str]]:
    """Of the first order on straight lines it is Euler's method."""
    wanted = {
        "use_flow_sigmas": (True,),
        "prediction_type": ("flow_prediction",),
        "algorithm_type": ("dpmsolver++", "deis"),  # deis stands for the first there
        "solver_order": (1, 2),
        "solver_type": ("midpoint", "bh1", "bh2", "logrho"),  # the last for the first
        "final_sigmas_type": ("zero",),
        "thresholding": (False,),
        "use_lu_lambdas": (False,),
        **{name: (False,) for name in SPACED},
    }
    complaints = {
        key: " or ".join(map(_shown, choices))
        for key, choices in wanted.items()
        if values[key] not in choices
    }
    solver = "euler" if values["solver_order"] == 1 else "dpmpp_2m_flow"
    shift = float(values["flow_shift"])
    return Scheduler(solver, "flow", shift, **_sizes(values)), complaints


class Class(NamedTuple):
    keys: dict[str, Field]
    make: Callable[[dict[str, Any]], tuple[Scheduler, dict[str, str]]]


CLASSES = {
    EULER: Class(FLOW_KEYS | {"stochastic_sampling": flag(False)}, _euler),
    HEUN: Class({k: FLOW_KEYS[k] for k in ("num_train_timesteps", "shift")}, _heun),
    LCM: Class(LCM_KEYS, _lcm),
    DPM: Class(DPM_KEYS, _dpm),
}
