"""A caller's guidance, checked and turned into what a program takes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sd3_jax.diffusion import grids, guidance_schedules
from sd3_jax.diffusion.guidance_methods import LIMITS, METHODS, defaults
from sd3_jax.errors import UserError, nearest, prefixed
from sd3_jax.foreign_text import shown
from sd3_jax.sampling import argument_checks, arguments, compiled
from sd3_jax.sampling.bundle import Bundle

# Perturbed attention guidance in all steps, with the scale of diffusers' pipeline.
PAG = {"layers": None, "scale": 3.0, "start": 0.0, "stop": 1.0}
EULER = ("cfg_pp",)  # methods for Euler's method alone
# What a guide's denoiser must share with the one that it guides, in diffusers' names.
SHARED = "in_channels patch_size joint_attention_dim pooled_projection_dim".split()


class Layers(NamedTuple):
    """Layers that a third velocity changes, from which guidance steers away."""

    layers: Sequence[int] | None = ()  # a tuple, once they are checked
    scale: float = 0.0
    start: float = 0.0  # share of the steps
    stop: float = 0.0
    skipped: str = "block"  # what they leave out, one of mmdit.SKIPPED


NO_LAYERS = Layers()


class Guidance(NamedTuple):
    """A method of METHODS with its numbers, for one call."""

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    method: str = "cfg"
    numbers: dict[str, np.generic] = {}
    layers: Layers = NO_LAYERS
    schedule: Any = "constant"
    guide: Any = None  # of autoguidance: a Bundle, or the parameters of a run
    guided: bool = True

    @property
    def reads_uncond(self) -> bool:
        return self.guided and METHODS[self.method].against == "uncond"

    def require_solver(self, solver: str) -> None:
        """UserError for a method that another solver needs."""
        if self.guided and self.method in EULER and solver != "euler":
            raise UserError(
                f'guidance_method "{self.method}" with solver "{solver}": expected'
                ' solver "euler", whose step the method changes'
            )
        method = METHODS[self.method]
        # These read one t for a whole batch, or the solver's grid, which adaptive does
        # not follow.
        steers = self.layers.layers or method.carries or method.reads_grid
        if self.guided and solver == "adaptive" and steers:
            raise UserError(
                f'guidance_method "{self.method}" or skip_layers with solver'
                ' "adaptive", whose images are at different times t; choose another'
                " solver, such as unipc_2"
            )

    def plan(self) -> dict[str, Any]:
        """Fields of compiled.Plan."""
        if not self.guided:
            return dict(guided=False)
        return dict(
            guided=True,
            skip_layers=self.layers.layers,
            skipped=self.layers.skipped,
            method=self.method,
            weak=None if self.guide is None else self.guide.part("denoiser"),
        )

    def weak_variables(self) -> Any:
        """Those of the guide's denoiser, with its adapters."""
        if self.guide is None:
            return None
        # One set for all rows: the guide's own, whatever sets the prompts have.
        return self.guide.adapted("denoiser", self.guide.bank.table(None, 1))

    def inputs(self, times: Float[np.ndarray, " n"]) -> dict[str, Any]:
        """Fields of compiled.Inputs, for the times of a solver."""
        low, high = self.interval
        fields = dict(
            scale=np.float32(self.scale),
            interval=(np.float32(low), np.float32(high)),
            rescale=np.float32(self.rescale),
        )
        if not self.guided:
            return fields
        if self.layers.layers:
            # Skip-layer guidance has the released code's strict bounds, which leave out
            # the first step; PAG acts in all steps by default.
            window = grids.control_window if self.method == "pag" else grids.skip_window
            fields |= dict(
                skip_scale=np.float32(self.layers.scale),
                skip_window=window(times, self.layers.start, self.layers.stop),
            )
        if not is_constant(self.schedule):
            scales = guidance_schedules.scales(self.schedule, self.scale, times)
            # Padded with the last scale: the padding's times are 0, where interp would
            # else read a scale of 0.
            fields["scales"] = compiled.padded(scales, scales[-1])
        return fields | {"options": self.numbers or None}


def checked(
    depth: int,
    *,
    scale: Any,
    interval: Any = (0.0, 1.0),
    rescale: Any = 0.0,
    method: Any = "cfg",
    options: Any = None,
    schedule: Any = "constant",
    skip: Layers = NO_LAYERS,
    negative: bool = False,
    guide: Any = None,
) -> Guidance:
    """The guidance of a denoiser of `depth` layers; UserError for what it cannot be.

    `negative` says whether there are negative prompts. Options that a call without
    guidance does not use are named in a warning.
    """
    scale = argument_checks.number("guidance", scale)
    interval = argument_checks.pair("guidance_interval", interval)
    rescale = argument_checks.number("guidance_rescale", rescale, 0, 1)
    argument_checks.choice("guidance_method", method, METHODS)
    skip = skip._replace(
        # Sorted, since equal sets are to be one program.
        layers=tuple(sorted({*argument_checks.skip_layers(skip.layers, depth)})),
        scale=argument_checks.number("skip_scale", skip.scale),
    )
    # PAG's layers are among its options, those of skip-layer guidance are arguments.
    numbers, layers = numbers_and_layers(method, options, depth, skip)
    if layers.layers and not layers.start < layers.stop:
        names = "start and stop" if method == "pag" else "skip_start and skip_stop"
        raise UserError(
            f"{names}: got {layers.start:g} and {layers.stop:g}, expected the first"
            " below the second"
        )
    schedule = _schedule(schedule)
    result = Guidance(scale, interval, rescale, method, numbers, layers, schedule)
    # By the caller's names, since these are options that a warning or an error names.
    asked = dict(negative_prompts=negative, skip_layers=bool(skip.layers))
    asked |= dict(guidance_schedule=not is_constant(schedule), guide=guide is not None)
    if not arguments.guided(scale, interval, rescale, method, **asked):
        return result._replace(guided=False)
    _require_fit(result, asked)
    return result._replace(guide=guide)


def is_constant(schedule: Any) -> bool:
    return isinstance(schedule, str) and schedule == "constant"


def require_guide(bundle: Bundle, guide: Any) -> None:
    """UserError for a guide whose denoiser reads or writes other arrays."""
    if not isinstance(guide, Bundle):
        raise UserError(f"guide {shown(repr(guide))}: expected a Bundle")
    guide.part("denoiser")
    # Depth and width may differ: a smaller network is what the paper of autoguidance
    # takes.
    theirs, ours = (x.configs["denoiser"] for x in (guide, bundle))
    wrong = [
        f"{name} {theirs.get(name)} against {ours.get(name)}"
        for name in SHARED
        if theirs.get(name) != ours.get(name)
    ]
    if wrong:
        raise UserError(
            f"guide {guide.source}: {', '.join(wrong)}; use a denoiser of the same"
            " family"
        )
    if guide.mesh != bundle.mesh:
        raise UserError("guide is on another mesh; load it with mesh=bundle.mesh")
    if guide.placement != "all":
        raise UserError('guide rests on the host; load it with placement="all"')


def options_of(text: str, key: str = "guidance_options") -> dict[str, Any]:
    """Options of a config's `key`: "eta=0, threshold=10", "layers=7 8 9, scale=2"."""
    options = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, value = (x.strip() for x in part.partition("="))
        try:
            if name == "layers":
                options[name] = tuple(map(int, value.split()))
            else:
                options[name] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise UserError(
                f'{key} "{shown(part)}": expected NAME=NUMBER, with commas between'
            )
    return options


def numbers_and_layers(
    method: str, options: Any, depth: int, skip: Layers = NO_LAYERS
) -> tuple[dict[str, np.generic], Layers]:
    """The method's numbers with `options` in place of defaults, and its layers."""
    if not isinstance(options, Mapping | None):
        raise UserError(
            f"guidance_options {shown(repr(options))}: expected a dict such as"
            ' {"eta": 0.0}'
        )
    options = dict(options or {})
    # An option of another method has no effect, so it is refused by the nearest name.
    known = PAG if method == "pag" else defaults(method)
    for key in options:
        if key not in known:
            choices = nearest(str(key), known) if known else ": it takes none"
            raise UserError(
                f'guidance_options "{shown(str(key))}" of guidance_method'
                f' "{method}"{choices}'
            )
    if method == "pag":
        return {}, _perturbed(PAG | options, depth)
    return {key: _number(key, x) for key, x in (known | options).items()}, skip


def _require_fit(guidance: Guidance, asked: Mapping[str, bool]) -> None:
    """UserError for what a method does not take; `asked` are names that are set."""
    name, row = guidance.method, METHODS[guidance.method]
    if guidance.scale > row.most:
        raise UserError(
            f"guidance {guidance.scale:g}: expected 0 to {row.most:g} with"
            f' guidance_method "{name}"; the paper takes 0.6'
        )
    weak = row.against == "weak"
    unused = {
        "guidance_rescale": name in EULER and guidance.rescale != 0,
        "guidance_schedule": name in EULER and asked["guidance_schedule"],
        "negative_prompts": weak and asked["negative_prompts"],
        "guide": asked["guide"] and not weak,
        # diffusers' guiders combine skipped layers with plain guidance alone.
        "skip_layers": name != "cfg" and asked["skip_layers"],
    }
    if names := [option for option, is_set in unused.items() if is_set]:
        raise UserError(
            f'guidance_method "{name}" does not take {", ".join(names)}: leave out'
            " either"
        )
    if weak and not asked["guide"]:
        raise UserError(
            f'guidance_method "{name}": set guide, the weights of a weaker denoiser'
        )


def _number(key: str, value: Any) -> np.generic:
    low, high = LIMITS[key]
    value = argument_checks.number(f"guidance_options {key}", value, low, high)
    return np.float32(value)


def _perturbed(options: dict[str, Any], depth: int) -> Layers:
    # The middle layer by default: the paper perturbs the middle block of a U-Net.
    layers = (depth // 2,) if options["layers"] is None else options["layers"]
    number = argument_checks.number
    with prefixed("guidance_options"):
        layers = argument_checks.skip_layers(layers, depth, "layers")
        if not layers:
            raise UserError("layers (): expected at least one")
        return Layers(
            tuple(sorted({*layers})),
            scale=number("scale", options["scale"]),
            start=number("start", options["start"], 0, 1),
            stop=number("stop", options["stop"], 0, 1),
            skipped="attention",
        )


def _schedule(value: Any) -> str | Sequence[tuple[float, float]]:
    """A schedule that guidance_schedules.scales takes."""
    try:
        if isinstance(value, str):
            return guidance_schedules.parsed(value)
        points = [(float(t), float(factor)) for t, factor in value]
        guidance_schedules.scales(points, 1.0, np.ones(1))
        return points
    except UserError:  # a ConfigError, which is a ValueError as well
        raise
    except (TypeError, ValueError):
        names = ", ".join(guidance_schedules.SCHEDULES)
        raise UserError(
            f"guidance_schedule {shown(repr(value))}: expected one of {names}, or"
            " pairs (t, factor)"
        ) from None
