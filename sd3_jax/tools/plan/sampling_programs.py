"""The programs that `sample` runs with released weights, as shapes on a mesh."""

import logging
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from sd3_jax import tree
from sd3_jax.assembly import model_parts
from sd3_jax.diffusion import solvers
from sd3_jax.diffusion.guidance_methods import METHODS
from sd3_jax.distributed import sharding
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.params import lora
from sd3_jax.params import quantization as weights
from sd3_jax.sampling import autoencoder_programs, compiled
from sd3_jax.sampling.guidance_arguments import Guidance, Layers, checked
from sd3_jax.sampling.job import task_arguments
from sd3_jax.sampling.schedulers.scheduler import PUBLISHED
from sd3_jax.sampling.text.prompts import Conditioning, TextModels
from sd3_jax.tools.plan import bounds
from sd3_jax.tools.plan.aot import Case
from sd3_jax.tools.plan.slices import GB, Generation, Slice
from sd3_jax.weights import components
from sd3_jax.weights.encoder_configs import CONFIGS

log = logging.getLogger(__name__)
WORDS = 77  # CLIP's tokens, in front of T5's


def cases(
    config: ConfigDict, tpu_slice: Slice, mesh: Mesh, images: int
) -> Iterator[Case]:
    share, steering = images / tpu_slice.devices, guidance(config)
    yield text(config, mesh, images, steering.reads_uncond, share)
    yield denoise(config, tpu_slice, mesh, images, steering, share)
    yield decode(config, mesh, images, share)


def guidance(config: ConfigDict) -> Guidance:
    """The guidance of config.sample; of autoguidance's guide nothing is known."""
    s = config.sample
    skip = Layers(s.skip_layers, s.skip_scale, s.skip_start, s.skip_stop)
    options = task_arguments.guidance_options(s)
    guide = s.guidance_method == "autoguidance" or None
    return checked(config.model.depth, **options, skip=skip, guide=guide)


def forwards(steering: Guidance, times: Float[np.ndarray, " n"]) -> float:
    """Forwards of the denoiser for a velocity, the mean over the steps of times."""
    if not steering.guided:
        return 1.0
    count = float(METHODS[steering.method].forwards)
    if not steering.layers.layers:
        return count
    # One more, of the denoiser without layers, while t is in the window.
    low, high = steering.inputs(times)["skip_window"]
    return count + float(np.mean((low <= times[:-1]) & (times[:-1] <= high)))


def part(name: str, mesh: Mesh, dtype, kind: str = ""):
    component = components.COMPONENTS[name]
    module = component.build(CONFIGS[name], dtype)
    shapes = components.abstract(component, module, CONFIGS[name], mesh, dtype)
    return module, quantized(shapes, kind)


def quantized(variables: dict, kind: str) -> dict:
    if not kind:
        return variables
    return variables | {"params": weights.abstract(variables["params"], kind)}


def rows(mesh: Mesh, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=compiled.placement(shape, mesh))


def text(config: ConfigDict, mesh: Mesh, images: int, guided: bool, share: float):
    """Prompts, and as many negative ones where there is guidance."""
    dtype, count = jnp.dtype(config.model.dtype), images * (1 + guided)
    encoders = {name: part(name, mesh, dtype) for name in ("clip_l", "clip_g")}
    encoders["t5"] = part("t5", mesh, dtype, config.quantize.t5)
    lengths = {"clip_l": WORDS, "clip_g": WORDS, "t5": config.sample.max_length}
    ids = {f"ids_{k}": rows(mesh, (count, n), np.int32) for k, n in lengths.items()}
    # 2 FLOPs for each weight and token; attention is small at these lengths.
    total = sum(
        2 * count_of(variables) * lengths[name]
        for name, (_, variables) in encoders.items()
    )
    lower = lambda: compiled.encode_prompts.lower(
        TextModels(*(module for module, _ in encoders.values())),
        {name: variables for name, (_, variables) in encoders.items()},
        ids,
        clip_skip=0,
        context_dim=config.model.context_dim,
        pooled_dim=config.model.pooled_dim,
        length=config.sample.max_length,
    )
    size = sum(tree.count(variables) for _, variables in encoders.values())
    held = on_a_device([variables for _, variables in encoders.values()])
    flops = total * share * (1 + guided)
    return Case("text", lower, None, flops, share, size, weights=held)


def on_a_device(tree: Any) -> float:
    """GiB of a tree's leaves on one device."""
    sizes = [
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    ]
    return sum(sizes) / GB


def count_of(variables: dict) -> int:
    """Parameters that multiply every token: tables of embeddings are only read."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    named = [(jax.tree_util.keystr(path), x.size) for path, x in leaves]
    return sum(size for path, size in named if "embed" not in path)


def denoise(
    config: ConfigDict,
    tpu_slice: Slice,
    mesh: Mesh,
    images: int,
    steering: Guidance,
    share: float,
) -> Case:
    """The whole loop of steps, as one program.

    Autoguidance's guide is taken to be as large as the denoiser.
    """
    s, model = config.sample, model_parts.mmdit(config.model, "plan knows no other's")
    if s.cache:
        log.warning(
            'config.sample.cache = "%s": plan counts the steps without it, and no saved'
            " blocks in memory",
            s.cache,
        )
    module, variables, size = denoiser(config, model, mesh)
    h, w = config.image.height // 8, config.image.width // 8
    words, tokens = WORDS + s.max_length, h * w // module.patch**2
    solver, times = PUBLISHED.sampler(
        s.steps, tokens, **task_arguments.solver_options(s)
    )
    # Weights lie on the job's mesh, rows on that of generate().
    mesh = sharding.spread(mesh, images * (1 + steering.reads_uncond))
    sharding.require_context(module.context_attention, module.num_heads, mesh)
    steering.require_solver(solver)
    numbers = compiled.solver_inputs(solver, times) | steering.inputs(times)
    inputs = inputs_of(config, mesh, images, words, numbers)
    guide = None if steering.guide is None else module
    plan = compiled.Plan(
        module,
        solvers.same_program(solver),
        (h, w, model.channels),
        **steering._replace(guide=None).plan() | {"weak": guide},
    )
    total, compute = a_forward(
        module, variables, tpu_slice.generation, (h, w), words, config.model.context_dim
    )
    # The whole loop is one program, with several forwards a step.
    passes = solvers.passes(solver, s.steps) * forwards(steering, times)
    calls = passes * share
    seconds = {k: v * calls for k, v in compute._asdict().items()}
    weak = None if guide is None else variables

    def lower():
        with compiled.on(mesh):
            return compiled.sample.lower(plan, variables, inputs, weak_variables=weak)

    # How often the loop runs is data of the program, so it is said here.
    return Case(
        "denoise",
        lower,
        seconds,
        total * calls,
        share,
        size,
        turns=s.steps,
        weights=on_a_device((variables, weak)),
        forwards=passes,
        mesh=mesh,
    )


def a_forward(
    module: MMDiT,
    variables: dict,
    chip: Generation,
    sides: tuple[int, int],
    words: int,
    text_dim: int,
) -> tuple[float, bounds.Compute]:
    """FLOPs of one image's forward, and the seconds of its products on a chip."""
    size = dict(height=sides[0], width=sides[1], text=words)
    total = module.flops(**size, text_dim=text_dim)
    work = bounds.work_on(chip, module, **size, total=total)
    quantized_flops, rate = eight_bits(
        variables["params"], chip, work.tokens - words, words
    )
    return total, bounds.forward(
        work,
        chip,
        head=module.width // module.num_heads,
        eight_bits=quantized_flops,
        rate=rate,
    )


def denoiser(config: ConfigDict, model: MMDiT, mesh: Mesh) -> tuple[MMDiT, dict, int]:
    """The module, its variables as shapes, and its number of parameters."""
    component = components.COMPONENTS["denoiser"]
    denoiser_config = components.denoiser_config(
        model,
        sample_size=config.image.height // 8,
        context_dim=config.model.context_dim,
        pooled_dim=config.model.pooled_dim,
    )
    module = component.build(denoiser_config, model.dtype)
    module = module.clone(
        attention=model.attention, context_attention=model.context_attention
    )
    variables = components.abstract(
        component, module, denoiser_config, mesh, model.dtype
    )
    size = tree.count(variables["params"])
    weights.require_units(config.quantize.denoiser, mesh.devices.flat[0])
    return module, quantized(variables, config.quantize.denoiser), size


def inputs_of(
    config: ConfigDict, mesh: Mesh, images: int, words: int, numbers: dict
) -> compiled.Inputs:
    """The program's data as shapes; `numbers` are those of solver and guidance."""
    # Typed keys have a dtype of their own, which only jax can name.
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), images))
    dtype = jnp.dtype(config.model.dtype)
    cond = Conditioning(
        rows(mesh, (images, words, config.model.context_dim), dtype),
        rows(mesh, (images, config.model.pooled_dim), dtype),
    )
    # Only shapes and shardings: the program is lowered and never run.
    return compiled.Inputs(
        keys=rows(mesh, key.shape, key.dtype),
        cond=cond,
        uncond=cond,
        **jax.tree.map(lambda x: rows(mesh, x.shape, x.dtype), numbers),
    )


def eight_bits(
    params: dict, chip: Generation, image: int, text: int
) -> tuple[float, float]:
    """FLOPs of one image's products of eight bits, and their FLOP/s."""
    kernels = lora.kernels(params)
    dynamic = {k: x for k, x in kernels.items() if isinstance(x, weights.Dynamic)}
    if not dynamic:
        return 0.0, math.inf
    tokens = {True: image, False: text}
    flops = sum(2.0 * x.q.size * tokens["image" in k] for k, x in dynamic.items())
    int8 = isinstance(next(iter(dynamic.values())), weights.Int8)
    return flops, chip.eight_bits("s8" if int8 else "f8e4m3fn")


def decode(config: ConfigDict, mesh: Mesh, images: int, share: float):
    """Latents to images; its FLOPs are those of the program's convolutions."""
    module, variables = part("vae", mesh, jnp.dtype(config.model.dtype))
    sides = config.image.height // 8, config.image.width // 8
    latents = rows(mesh, (images, *sides, config.model.channels), np.float32)
    vae = CONFIGS["vae"]
    # Python numbers are traced, as in Bundle.decode.
    scale = dict(scaling=vae["scaling_factor"], shift=vae["shift_factor"])
    lower = lambda: autoencoder_programs.decode.lower(
        module, variables, latents, **scale
    )
    size, held = tree.count(variables), on_a_device(variables)
    return Case("decode", lower, None, 0.0, share, size, weights=held)
