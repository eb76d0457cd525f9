"""The compiled programs behind a bundle: pure functions, their modules static.

A program is compiled once for each set of shapes and cached, also on disk if
JAX_COMPILATION_CACHE_DIR is set. One line tells of each that has to be compiled.
Variables may be Adapted (params/adapters.py): weights of adapters are data.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from sd3_jax.diffusion import guidance, solvers
from sd3_jax.distributed import sharding, signals
from sd3_jax.models import step_cache
from sd3_jax.params import adapters
from sd3_jax.sampling import latents
from sd3_jax.sampling.cached_network import remembering
from sd3_jax.sampling.control import acting_nets, controlled
from sd3_jax.sampling.generate import generate_with_state
from sd3_jax.sampling.text import prompts
from sd3_jax.sampling.text.prompts import Conditioning

log = logging.getLogger(__name__)
GRID_STEPS = 1024  # grids are padded to a multiple of so many steps


@contextlib.contextmanager
def on(mesh: Mesh, *arrays: Any):
    """Sets the mesh and the rules for logical axes that the programs here need.

    If any of `arrays` is being traced, the mesh is the caller's to set.
    """
    # jax.set_mesh may not be called inside a trace, where a user's own jit sets the
    # mesh.
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arrays))
    with contextlib.nullcontext() if traced else jax.set_mesh(mesh):
        with nn.logical_axis_rules(sharding.RULES):
            yield


def place(tree: Any, mesh: Mesh, *, axis: int = 0) -> Any:
    """Host arrays onto the mesh, rows over data and fsdp where these divide them.

    `axis` is that of the rows. Every process gives the same, whole arrays.
    """

    def leaf(x):
        # Inside a caller's jit the placement is the caller's.
        if isinstance(x, jax.core.Tracer):
            return x
        return put(x, placement(getattr(x, "shape", ()), mesh, axis=axis))

    return jax.tree.map(leaf, tree)


def placement(shape: Sequence[int], mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Where `place` puts an array of this shape."""
    # A batch that the devices do not divide is replicated: jax shards evenly only.
    split = len(shape) > axis and shape[axis] % sharding.batch_shards(mesh) == 0
    spec = PartitionSpec(*[None] * axis, sharding.BATCH) if split else PartitionSpec()
    return NamedSharding(mesh, spec)


def put(x: Any, where: NamedSharding) -> Array:
    """x on its devices, also those of other processes, which have the same x."""
    if isinstance(x, Array) and not x.is_fully_addressable:
        return x  # it came from a program, and the next takes it as it lies
    if where.is_fully_addressable:
        return jax.device_put(x, where)
    # Typed keys have no numpy form, so their uint32 data is placed and wrapped again.
    if isinstance(x, Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(x), where))
    # device_put would first compare x over all processes, a collective. Here each fills
    # its own shards from its copy of the whole array.
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


@functools.partial(
    jax.jit,
    static_argnames=("models", "clip_skip", "context_dim", "pooled_dim", "length"),
)
def encode_prompts(models, variables, ids, **options) -> Conditioning:
    variables = {name: adapters.attached(x) for name, x in variables.items()}
    return prompts.encode_released(models, variables, ids, **options)


def say_compiling(program: str, images: int, height: int, width: int) -> None:
    """One line about a program for images of pixels; call it in what jax traces.

    Where INFO is not logged, the line goes to stderr, unless a user set the level of
    the logger sd3_jax.
    """
    # Python runs a jitted function's body only while jax traces it, which is once for
    # each program that has to be compiled.
    text = (
        f"compiling {program} for {images} x {height} x {width} pixels; later calls of"
        " this shape reuse the program"
    )
    # An INFO line of a library is lost in a notebook, and a call that is silent for
    # half a minute looks like one that hangs.
    unset = logging.getLogger("sd3_jax").level == logging.NOTSET
    if log.isEnabledFor(logging.INFO):
        log.info("%s", text)
    elif unset and jax.process_index() == 0:
        signals.say(text)


class Plan(NamedTuple):
    """Static arguments of a sampling program: changing one compiles another program."""

    denoiser: nn.Module
    solvers: tuple[str, ...]  # Inputs.solver chooses among several
    shape: tuple[int, int, int]
    guided: bool
    skip_layers: tuple[int, ...] = ()
    preview: Callable | None = None
    factor: int = 8  # pixels a latent, for the line about compilation
    trajectory: int | None = None  # the number of steps whose latents are returned
    method: str = "cfg"  # a key of guidance_methods.METHODS
    skipped: str = "block"  # what skip_layers leave out, one of mmdit.SKIPPED
    weak: nn.Module | None = None  # the worse denoiser of autoguidance
    previewer: nn.Module | None = None  # the autoencoder of previews
    cache: step_cache.Method | None = None


# numpy's where a caller builds the Inputs, jax's inside the program.
Scalar = Array | np.generic


class Inputs(NamedTuple):
    """Traced arguments of a sampling program; whether a field is None is static.

    With a grid (b, n) numbers are (b,), so that each row has its own (mixed_rows.py).
    """

    keys: Array | None
    cond: Conditioning
    uncond: Conditioning
    grid: Array | np.ndarray
    scale: Scalar
    interval: tuple[Scalar, Scalar]
    rescale: Scalar
    skip_scale: Scalar | None = None
    skip_window: tuple[Scalar, Scalar] | None = None
    noise: Array | None = None
    x0: Array | None = None
    mask: Array | None = None
    steps: Scalar | None = None  # of the grid; None: all
    solver: Scalar | None = None
    options: dict[str, Scalar] | None = None  # the numbers of the guidance's method
    scales: Array | np.ndarray | None = None  # of guidance, at each time of the grid
    cache: step_cache.Schedule | None = None


def solver_inputs(solver: str, grid: Float[Array | np.ndarray, " n"]) -> dict[str, Any]:
    """The fields of Inputs that say where to step and how: data of one program.

    The grid is padded, so that programs do not differ by their number of steps.
    """
    return {
        "grid": padded(grid, 0.0),
        "steps": np.int32(len(grid) - 1),
        "solver": np.int32(solvers.same_program(solver).index(solver)),
    }


def padded(
    values: Float[Array | np.ndarray, " n"], last: float | np.floating
) -> Float[np.ndarray, " m"]:
    """Values of a grid's times, padded with `last` as solver_inputs pads the grid."""
    padding = (0, -(len(values) - 1) % GRID_STEPS)
    return np.pad(np.asarray(values, np.float32), padding, constant_values=last)


@functools.partial(jax.jit, static_argnames=("plan", "nets"))
def sample(
    plan: Plan,
    variables: dict | adapters.Adapted,
    inputs: Inputs,
    nets: Sequence[nn.Module] = (),
    controls: Sequence[tuple] = (),
    weak_variables: dict | adapters.Adapted | None = None,
    previewer: tuple[dict, dict] | None = None,
) -> Array:
    """Latents (b, h, w, c). `controls` are the fields of each Control after its net.

    With plan.trajectory they are (steps + 1, b, h, w, c).
    `weak_variables` are those of plan.weak; `previewer` has the variables of
    plan.previewer and its latent_scale.
    """
    rest = nets, controls, weak_variables, previewer
    return _sampled(plan, variables, inputs, *rest)[0]


@functools.partial(jax.jit, static_argnames=("plan",))
def sample_cached(
    plan: Plan,
    variables: dict | adapters.Adapted,
    inputs: Inputs,
    previewer: tuple[dict, dict] | None = None,
) -> tuple[Array, step_cache.Record]:
    """The latents of a plan with a cache, and which steps were computed."""
    latents, state = _sampled(plan, variables, inputs, previewer=previewer)
    return latents, step_cache.Record(state.computed, state.measures)


def _sampled(
    plan: Plan,
    variables: dict | adapters.Adapted,
    inputs: Inputs,
    nets: Sequence[nn.Module] = (),
    controls: Sequence[tuple] = (),
    weak_variables: dict | adapters.Adapted | None = None,
    previewer: tuple[dict, dict] | None = None,
) -> tuple[Array, step_cache.State | None]:
    # The plan is static, so modules, solver and shapes are part of the program;
    # everything in Inputs is traced, and another seed, scale or number of steps reuses
    # it. So are the layers that are left out: the denoiser makes a constant mask of
    # them for its scanned blocks.
    sides = (side * plan.factor for side in plan.shape[:2])
    say_compiling(", ".join(plan.solvers), len(inputs.cond.pooled), *sides)

    # Outside of the solver's loop: factors are joined and weighed once.
    adapted = isinstance(variables, adapters.Adapted)
    variables = adapters.attached(variables)

    def denoiser(x, t, *cond, **kwargs):
        return plan.denoiser.apply(variables, x, t, *cond, **kwargs)

    acting = acting_nets(nets, controls, variables if adapted else None)
    solver = solvers.of_program(plan.solvers, inputs.solver)
    grid, steps = inputs.grid, inputs.steps
    if plan.trajectory is not None:
        # The number of steps is the result's shape: the grid's padding is cut off.
        solver = functools.partial(solver, trajectory=True)
        grid, steps = grid[: plan.trajectory + 1], None
    weakened = None
    if plan.skip_layers:
        worse = controlled(denoiser, (), skip=plan.skip_layers, skipped=plan.skipped)
        weakened = guidance.Weakened(worse, inputs.skip_scale, inputs.skip_window)
    network = controlled(denoiser, acting)
    if plan.cache is not None:
        cache = step_cache.Cache(plan.cache, inputs.cache)
        network = remembering(plan.denoiser, variables, cache)
    return generate_with_state(
        network,
        inputs.keys,
        inputs.cond,
        inputs.uncond,
        shape=plan.shape,
        grid=grid,
        steps=steps,
        solver=solver,
        scale=_scale(plan, inputs),
        method=plan.method if plan.guided else "cfg",
        options=inputs.options,
        interval=inputs.interval,
        rescale=inputs.rescale,
        weakened=weakened,
        weak=_weak(plan, weak_variables),
        noise=inputs.noise,
        x0=inputs.x0,
        mask=inputs.mask,
        preview=plan.preview,
        to_rgb=latents.previews(plan.previewer, previewer),
    )


def _scale(plan: Plan, inputs: Inputs) -> Any:
    # A Python 1.0 selects the path without guidance, which runs the denoiser on b rows;
    # a traced scale always doubles the batch.
    if not plan.guided:
        return 1.0
    if inputs.scales is None:
        return inputs.scale
    # Of the whole padded grid, so that the number of steps is no shape.
    return guidance.Schedule(inputs.grid, inputs.scales)


def _weak(plan: Plan, variables: dict | adapters.Adapted | None) -> Callable | None:
    """The velocity of autoguidance's worse denoiser."""
    if plan.weak is None:
        return None
    weaker = adapters.attached(variables)
    return lambda x, t, cond: plan.weak.apply(weaker, x, t, *cond)
