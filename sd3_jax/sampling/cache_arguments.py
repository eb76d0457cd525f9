"""A caller's step cache, checked and turned into what a program takes."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from sd3_jax.diffusion import cache_schedules
from sd3_jax.errors import UserError, nearest
from sd3_jax.foreign_text import shown
from sd3_jax.models import step_cache
from sd3_jax.sampling import argument_checks, arguments, cache_calibration, compiled
from sd3_jax.sampling.cache_calibration import Calibration
from sd3_jax.sampling.guidance_arguments import Guidance

log = logging.getLogger(__name__)


class Option(NamedTuple):
    """A number of a method: its default, which is diffusers', and its range."""

    default: float | int
    low: float | int
    high: float | int
    kind: type = float


THRESHOLD = dict(low=0.0, high=1e6)
RETENTION = dict(low=0.0, high=1.0)
# first_block_cache.py, mag_cache.py and taylorseer_cache.py of diffusers.
OPTIONS = {
    "first_block": {
        "threshold": Option(0.05, **THRESHOLD),
        "retention": Option(0.0, **RETENTION),
    },
    "magcache": {
        "threshold": Option(0.06, **THRESHOLD),
        "retention": Option(0.2, **RETENTION),
        "most_skipped": Option(3, 0, 10_000, int),
    },
    "taylorseer": {
        "interval": Option(5, 1, 10_000, int),
        "warmup": Option(3, 0, 10_000, int),
        "order": Option(1, 0, 4, int),
    },
}
# At this number no step is skipped: such a call has no cache, and the same bits.
# Checked after the numbers, so that a wrong number is an error even then.
IDLE = {"first_block": ("threshold", 0), "magcache": ("threshold", 0)}
IDLE |= {"taylorseer": ("interval", 1)}
SEVERAL = ("heun", "adaptive")  # solvers with several evaluations in a step


class StepCache(NamedTuple):
    """A method of step_cache.METHODS with its numbers, for one call."""

    method: step_cache.Method
    numbers: Mapping[str, float | int] = {}
    calibration: Calibration | None = None

    def require_fit(
        self, guidance: Guidance, solver: str, *, control: bool = False
    ) -> None:
        """UserError for what a cache cannot serve, with what it can."""
        name = f'cache "{self.method.name}"'
        if solver in SEVERAL:
            raise UserError(
                f'{name} with solver "{solver}", which evaluates several times a step;'
                " choose a solver with one, such as dpmpp_2m or unipc_2"
            )
        if guidance.guided and (guidance.layers.layers or guidance.guide is not None):
            other = "skip_layers"
            if guidance.method in ("pag", "autoguidance"):
                other = f'guidance_method "{guidance.method}"'
            raise UserError(
                f"{name} with {other}, which runs a second network in each step; choose"
                " a guidance_method of one network, such as cfg or apg"
            )
        if control:
            raise UserError(
                f"{name} with control, whose residuals belong to the blocks that a"
                " cache skips; leave out either"
            )

    def require_model(self, fingerprint: Callable[[], str]) -> None:
        """UserError if the calibration is of other weights than these."""
        # Fingerprints read all weights, so only a calibration asks for them.
        if self.calibration is not None:
            self.calibration.require_model(fingerprint())

    def schedule(self, steps: int) -> step_cache.Schedule:
        """What a program of so many steps reads, padded as its grid is."""
        # One entry more than steps, as the grid has, and so padded to its length.
        must = np.append(self.computed(steps), True).astype(np.float32)
        padded = compiled.padded(must, 1.0) > 0
        threshold = self.numbers.get("threshold", 0) if self.method.first_block else 0
        # The other methods' schedules hold all: no change has a step computed.
        return step_cache.Schedule(padded, np.float32(threshold))

    def computed(self, steps: int) -> Bool[np.ndarray, " steps"]:
        """The steps that are computed in any case."""
        numbers, method = self.numbers, self.method
        if method.measures:
            return np.ones(steps, bool)
        if method.name == "taylorseer":
            interval, warmup = int(numbers["interval"]), int(numbers["warmup"])
            return cache_schedules.every(steps, interval=interval, warmup=warmup)
        if self.calibration is None:
            first = cache_schedules.retained(steps, numbers["retention"])
            return cache_schedules.opening(steps, first)
        ratios = self.calibration.ratios
        if len(ratios) != steps:
            arguments.warn_once(
                f"the calibration has {len(ratios)} steps and the call {steps}: each"
                " step takes the ratio of the nearest"
            )
        return cache_schedules.magnitudes(
            cache_schedules.resampled(ratios, steps),
            threshold=numbers["threshold"],
            most=int(numbers["most_skipped"]),
            retention=numbers["retention"],
        )


def checked(
    depth: int,
    cache: Any = None,
    options: Any = None,
    calibration: Any = None,
) -> StepCache | None:
    """The cache of a call for a denoiser of `depth` blocks, or None without a cache.

    UserError for an unknown method, and for options that are not the method's.
    """
    if cache is None:
        unused = dict(cache_options=options, cache_calibration=calibration)
        if names := [name for name, x in unused.items() if x]:
            raise UserError(f"{' and '.join(names)} without cache; set cache")
        return None
    # Not one of METHODS, since only the job `calibrate` asks for it.
    if cache == step_cache.CALIBRATION.name:
        return StepCache(step_cache.CALIBRATION)
    argument_checks.choice("cache", cache, step_cache.METHODS)
    # With one block nothing follows the one that decides.
    if depth < 2:
        raise UserError(f'cache "{cache}": expected two blocks or more, got {depth}')
    numbers = _numbers(cache, options)
    if calibration is not None and cache != "magcache":
        raise UserError(
            f'cache_calibration with cache "{cache}": expected cache "magcache"'
        )
    name, idle = IDLE[cache]
    if numbers[name] == idle:
        return None
    method, curve = step_cache.METHODS[cache], None
    if cache == "magcache":
        curve = _curve(calibration)
    if cache == "taylorseer":
        method = method._replace(order=int(numbers["order"]))
    return StepCache(method, numbers, curve)


def log_report(record: step_cache.Record) -> None:
    """Logs how many steps were skipped. It waits for the device."""
    computed = np.asarray(record.computed)
    log.info(
        "step cache: the blocks of %d of %d steps were skipped",
        *(len(computed) - computed.sum(), len(computed)),
    )


def _curve(calibration: Any) -> Calibration:
    if calibration is None:
        raise UserError(
            'cache "magcache" without cache_calibration; make one with sd3-jax'
            " calibrate, or choose first_block or taylorseer"
        )
    if isinstance(calibration, Calibration):
        return calibration
    # A path: of a config, or of a caller who has the file alone.
    return cache_calibration.read(calibration)


def _numbers(cache: str, options: Any) -> dict[str, float | int]:
    """The method's numbers, with `options` in place of defaults."""
    if not isinstance(options, Mapping | None):
        raise UserError(
            f"cache_options {shown(repr(options))}: expected a dict such as"
            ' {"threshold": 0.1}'
        )
    allowed, options = OPTIONS[cache], dict(options or {})
    for key in options:
        if key not in allowed:
            raise UserError(
                f'cache_options "{shown(str(key))}" of cache "{cache}"'
                f"{nearest(str(key), allowed)}"
            )
    return {key: _number(key, x, options.get(key)) for key, x in allowed.items()}


def _number(key: str, option: Option, value: Any) -> float | int:
    if value is None:
        return option.default
    label = f"cache_options {key}"
    # A config's options are all floats: 3.0 is the whole number 3.
    if option.kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    check = argument_checks.whole if option.kind is int else argument_checks.number
    return check(label, value, option.low, option.high)
