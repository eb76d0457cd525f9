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
from sd3_jax.models import vae
from sd3_jax.params import adapters
from sd3_jax.sampling import prompts, tiling
from sd3_jax.sampling.control import Control, controlled
from sd3_jax.sampling.generate import generate
from sd3_jax.sampling.prompts import Conditioning

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


def place(tree: Any, mesh: Mesh) -> Any:
    """Host arrays onto the mesh, rows over data and fsdp where these divide them.

    Every process gives the same, whole arrays.
    """

    def leaf(x):
        # Inside a caller's jit the placement is the caller's.
        if isinstance(x, jax.core.Tracer):
            return x
        return put(x, placement(getattr(x, "shape", ()), mesh))

    return jax.tree.map(leaf, tree)


def placement(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Where `place` puts an array of this shape."""
    # A batch that the devices do not divide is replicated: jax shards evenly only.
    split = len(shape) > 0 and shape[0] % sharding.batch_shards(mesh) == 0
    spec = PartitionSpec(sharding.BATCH) if split else PartitionSpec()
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


@functools.partial(jax.jit, static_argnames=("denoiser", "skip"))
def velocity(denoiser, variables, x, t, context, pooled, *, skip=()) -> Array:
    variables = adapters.attached(variables)
    return denoiser.apply(variables, x, t, context, pooled, skip=skip)


@functools.partial(jax.jit, static_argnames=("module", "tile"))
def encode_image(
    module, variables, images, key, *, scaling, shift, tile: int | None = None
) -> Array:
    """Images in [0, 1] to latents: a draw with `key`, else the mean."""
    # `tile` is static, because it decides the shapes of all slices.
    run = _by_tiles(module, variables, "encode", tile)
    # (b, H, W, 3) → (b, H/8, W/8, 2c): mean and log-variance
    moments = run(2 * images - 1)
    if key is None:
        z = vae.posterior(moments)[0]
    else:
        # A key for each row makes a row's draw independent of the batch that it is in.
        z = (jax.vmap(vae.sample) if key.ndim else vae.sample)(key, moments)
    return vae.to_latents(z, scaling=scaling, shift=shift)


@functools.partial(jax.jit, static_argnames=("module", "tile"))
def decode(
    module, variables, latents, *, scaling, shift, tile: int | None = None
) -> Array:
    """Latents to images in [0, 1]."""
    sides = (side * _factor(module) for side in latents.shape[1:3])
    say_compiling("the decoder", len(latents), *sides)
    # `scaling` and `shift` are traced numbers, so models that differ in them share a
    # program.
    z = vae.from_latents(latents, scaling=scaling, shift=shift)
    # (b, h, w, c) → (b, 8h, 8w, 3)
    images = _by_tiles(module, variables, "decode", tile)(z)
    return jnp.clip(images / 2 + 0.5, 0, 1)


def _by_tiles(module, variables, method, tile):
    """The autoencoder's method, whole where tile is None."""
    run = functools.partial(module.apply, variables, method=method)
    if tile is None:
        return run
    by_tiles = getattr(tiling, method)
    return functools.partial(by_tiles, run, tile=tile, factor=_factor(module))


def _factor(module) -> int:
    """Pixels a latent: every level but the first halves the sides."""
    return 2 ** (len(module.channels) - 1)


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


# numpy's where a caller builds the Inputs, jax's inside the program.
Scalar = Array | np.generic


class Inputs(NamedTuple):
    """Traced arguments of a sampling program; whether a field is None is static."""

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


def solver_inputs(solver: str, grid: Float[Array | np.ndarray, " n"]) -> dict[str, Any]:
    """The fields of Inputs that say where to step and how: data of one program.

    The grid is padded, so that programs do not differ by their number of steps.
    """
    steps = len(grid) - 1
    padding = -steps % GRID_STEPS
    return {
        "grid": np.pad(np.asarray(grid, np.float32), (0, padding)),
        "steps": np.int32(steps),
        "solver": np.int32(solvers.same_program(solver).index(solver)),
    }


def solver_function(names: Sequence[str], number: Scalar | None) -> Callable:
    """The solver names[number] of those that share a program; it may be traced."""
    if len(names) == 1:
        return solvers.SOLVERS[names[0]]
    return functools.partial(solvers.one_evaluation, solver=number)


@functools.partial(jax.jit, static_argnames=("plan", "nets"))
def sample(
    plan: Plan,
    variables: dict | adapters.Adapted,
    inputs: Inputs,
    nets: Sequence[nn.Module] = (),
    controls: Sequence[tuple] = (),
) -> Array:
    """Latents (b, h, w, c). `controls` are the fields of each Control after its net."""

    # The plan is static, so modules, solver and shapes are part of the program;
    # everything in Inputs is traced, and another seed, scale or number of steps reuses
    # it.
    sides = (side * plan.factor for side in plan.shape[:2])
    say_compiling(", ".join(plan.solvers), len(inputs.cond.pooled), *sides)

    # Outside of the solver's loop: factors are joined and weighed once.
    adapted = isinstance(variables, adapters.Adapted)
    variables = adapters.attached(variables)

    def denoiser(x, t, *cond, **kwargs):
        return plan.denoiser.apply(variables, x, t, *cond, **kwargs)

    # The nets are static and their arrays traced, so they arrive as two arguments.
    acting = [Control(net, *rest) for net, rest in zip(nets, controls)]
    if adapted:
        acting = [_lent(control, variables) for control in acting]
    skip = None
    # Which layers are left out is static: the denoiser makes a constant mask of it for
    # its scanned blocks.
    if plan.skip_layers:
        skipping = controlled(denoiser, (), skip=plan.skip_layers)
        skip = guidance.Skip(skipping, inputs.skip_scale, inputs.skip_window)
    return generate(
        controlled(denoiser, acting),
        inputs.keys,
        inputs.cond,
        inputs.uncond,
        shape=plan.shape,
        grid=inputs.grid,
        steps=inputs.steps,
        solver=solver_function(plan.solvers, inputs.solver),
        # A Python 1.0 selects the path without guidance, which runs the denoiser on b
        # rows; a traced scale always doubles the batch.
        scale=inputs.scale if plan.guided else 1.0,
        interval=inputs.interval,
        rescale=inputs.rescale,
        skip=skip,
        noise=inputs.noise,
        x0=inputs.x0,
        mask=inputs.mask,
        preview=plan.preview,
    )


def _lent(control: Control, variables: dict) -> Control:
    """A net that borrows the denoiser's embedding of patches, with its adapters."""
    if not control.net.borrowed:
        return control
    lent = {"patch_embed": variables["params"]["patch_embed"]}
    params = control.variables["params"] | lent
    return control._replace(variables=control.variables | {"params": params})
