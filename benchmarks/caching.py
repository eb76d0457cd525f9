"""Step caches: time against the distance from the picture without a cache.

    python benchmarks/caching.py digits RUN [FLAGS of the recipe]
    python benchmarks/caching.py shape

`digits` samples a trained run of configs/quickstart.py end to end, by three thresholds
of each method, and prints time, PSNR and the share of digits that are read rightly.
`shape` times random weights in the shape of SD3.5-medium, at a sixth of its width.
Configurations take turns. Others may use the machine: CPU seconds are printed as well.
"""

import functools
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sd3_jax import main, tree
from sd3_jax.assembly import model_parts
from sd3_jax.diffusion import grids, solvers
from sd3_jax.distributed import sharding
from sd3_jax.evaluation import digit_scenes
from sd3_jax.evaluation.digit_reader import matches
from sd3_jax.models import step_cache
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.sampling import cache_calibration, compiled
from sd3_jax.sampling.job.sampler import TrainedSampler
from sd3_jax.sampling.text.prompts import Conditioning

STEPS, PICTURES, TURNS = 28, 64, 3
CACHES = (
    ("", ""),
    *(("first_block", f"threshold={x}") for x in (0.08, 0.12, 0.2)),
    *(("magcache", f"threshold={x}") for x in (0.03, 0.06, 0.12)),
    *(("taylorseer", f"interval={x}") for x in (2, 3, 4)),
)


def timed(run: Callable) -> np.ndarray:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return np.array([time.perf_counter() - wall, time.process_time() - cpu])


def speedups(runs: Sequence[Callable], turns: int) -> list[np.ndarray]:
    """Of each run against the first: medians of the ratios of their turns."""
    seconds = np.array([[timed(run) for run in runs] for _ in range(turns)])
    print("seconds of the first run, wall and CPU:", np.median(seconds, 0)[0].round(1))
    return list(np.median(seconds[:, :1] / seconds, axis=0))


def psnr(images: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """Of each picture, in dB."""
    error = np.square(images.astype(float) - usual).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 0.01))


# --- a trained run, end to end


def digits(run: str, *flags: str) -> None:
    argv = ["sample", "--config=configs/quickstart.py", f"--workdir={run}", *flags]
    config = main.parse(argv).config
    config.sample.update(steps=STEPS, batch_size=PICTURES)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    scenes = digit_scenes.sample_scenes("single", "train", PICTURES)
    records: list[step_cache.Record] = []
    with compiled.on(mesh):
        parts = model_parts.build_parts(config)
        params, _ = model_parts.trained_params(config, parts, run, mesh)
        sampler = functools.partial(samplers, config, parts, mesh, records.append)
        # Other noise than that of the pictures which are compared.
        captions = [str(scene) for scene in scenes]
        sampler("calibration")(params, captions, range(1000, 1000 + PICTURES))
        measures = [np.asarray(record.measures) for record in records]
        curve = cache_calibration.mean(tree.fingerprint(params["denoiser"]), measures)
        runs, rows, programs, usual = [], [], {}, None
        for cache, options in CACHES:
            painter = sampler(cache, options, curve)
            # Thresholds are data: a method has one program.
            painter.program = programs.setdefault(cache, painter.program)
            paint = functools.partial(painter, params, captions, range(PICTURES))
            records.clear()
            images = paint()
            usual = images if usual is None else usual
            skipped = [STEPS - int(x.computed.sum()) for x in records] or [0]
            right = np.mean([matches(*x) for x in zip(scenes, images)])
            db = psnr(images, usual)
            rows.append([cache or "none", options, skipped[0], db, right])
            runs.append(paint)
            print(*rows[-1][:3], db.mean().round(1), right, flush=True)
        ratios = speedups(runs, TURNS)
    for (cache, options, skipped, db, right), (wall, cpu) in zip(rows, ratios):
        near = f"{db.mean():.1f} | {np.percentile(db, 10):.1f}"
        start = f"| {cache} | {options} | {skipped} of {STEPS}"
        print(f"{start} | {wall:.2f} | {cpu:.2f} | {near} | {right:.3f} |")


def samplers(config, parts, mesh, report, cache, options="", curve=None):
    changed = config.copy_and_resolve_references()
    changed.sample.update(cache=cache, cache_options=options)
    if cache == "magcache":
        path = "/tmp/calibration.json"
        cache_calibration.write(path, curve)
        changed.sample.cache_calibration = path
    return TrainedSampler(changed, parts, mesh, report=report)


# --- the shape of SD3.5-medium


def shape() -> None:
    """24 blocks, 13 of them dual, of width 256: random weights, float32."""
    denoiser = MMDiT(depth=24, width=256, num_heads=4, dual_blocks=13, remat="none")
    denoiser = denoiser.clone(dtype=jnp.float32, pos_size=32, pos_base=16)
    keys = iter(jax.random.split(jax.random.key(0), 8))
    cond = Conditioning(
        jax.random.normal(next(keys), (1, 77, 512)),
        jax.random.normal(next(keys), (1, 256)),
    )
    sides = (1, 16, 16, 16)  # 128 pixels: 64 tokens of the image, and 77 of text
    arguments = jnp.zeros(sides), jnp.zeros(1), *cond
    variables = tree.unbox(jax.jit(denoiser.init)(next(keys), *arguments))
    grid = grids.released(STEPS, 3.0)
    inputs = compiled.Inputs(
        keys=jax.random.split(next(keys), 1),
        cond=cond,
        uncond=cond,
        scale=np.float32(5),
        interval=(np.float32(0), np.float32(1)),
        rescale=np.float32(0),
        **compiled.solver_inputs("euler", grid),
    )
    plan = compiled.Plan(denoiser, solvers.same_program("euler"), sides[1:], True)
    paint = functools.partial(sample_shape, variables)
    runs = [functools.partial(paint, plan, inputs)]
    names = [f"none | 0 of {STEPS}"]
    for name, method in step_cache.METHODS.items():
        for count in (2, 4):
            # Every second or fourth step is computed, whatever the random weights do.
            must = np.arange(len(inputs.grid)) % count == 0
            schedule = step_cache.Schedule(must, np.float32(1e9))
            cached = plan._replace(cache=method), inputs._replace(cache=schedule)
            names.append(f"{name} | {STEPS - must[:STEPS].sum()} of {STEPS}")
            runs.append(functools.partial(paint, *cached))
    with compiled.on(sharding.make_mesh(devices=jax.devices()[:1])):
        for run in runs:
            jax.block_until_ready(run(steps=np.int32(1)))  # compiles
        for name, (wall, cpu) in zip(names, speedups(runs, 2)):
            print(f"| {name} | {wall:.2f} | {cpu:.2f} |")


def sample_shape(variables, plan, inputs, **changes):
    program = compiled.sample if plan.cache is None else compiled.sample_cached
    return program(plan, variables, inputs._replace(**changes))


if __name__ == "__main__":
    {"digits": digits, "shape": shape}[sys.argv[1]](*sys.argv[2:])
