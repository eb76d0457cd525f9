"""What another number of steps or another solver costs `sd3_jax.generate`.

    JAX_PLATFORMS=cpu python benchmarks/recompile.py    # minutes; prints the table
    JAX_PLATFORMS=cpu python benchmarks/recompile.py --adapters

The model is the miniature of the tests (four blocks), or the folder of --weights. JAX's
cache of compiled programs is off.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import sd3_jax
from sd3_jax.distributed import sharding
from sd3_jax.params import lora
from sd3_jax.params.adapters import Adapter, Factors
from sd3_jax.sampling.adapters.adapter_bank import Bank
from sd3_jax.sampling.bundle import Bundle

COMPILED = "/jax/core/compile/backend_compile_duration"
CALLS = (
    ("first call", {}),
    ("the same", {}),
    ("the same", {}),
    ("27 steps", dict(steps=27)),
    ("30 steps", dict(steps=30)),
    ("28 custom sigmas", dict(sigmas=[1 - i / 30 for i in range(28)])),
    ("dpmpp_2m", dict(solver="dpmpp_2m")),
    ("dpmpp_2m_flow", dict(solver="dpmpp_2m_flow")),
    ("heun, first call", dict(solver="heun")),
    ("heun, 27 steps", dict(solver="heun", steps=27)),
    ("one image more", dict(images_per_prompt=2)),
)


def miniature() -> str:
    # Imported here: --weights needs no PyTorch.
    from sd3_jax.tools.parity.miniature import pipeline

    folder = tempfile.mkdtemp()
    scratch = Path(tempfile.mkdtemp())
    pipeline("sd35_medium", scratch).save_pretrained(folder)
    return folder


def paint(bundle: Bundle, side: int, **options) -> float:
    """Seconds of a call of generate."""
    start = time.perf_counter()
    sides = dict(height=side, width=side, max_sequence_length=20)
    images = sd3_jax.generate(bundle, "a fox", **sides, **options)
    jax.block_until_ready(images)
    return time.perf_counter() - start


def main(weights: str, side: int, adapters: bool, pairs: int) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    bundle = sd3_jax.load(weights or miniature(), mesh, "float32")
    compilations = []
    listen = lambda event, *_, **__: event == COMPILED and compilations.append(event)
    jax.monitoring.register_event_duration_secs_listener(listen)
    if adapters:
        return compare_weights(bundle, side, pairs, compilations)
    print("| call | seconds | compilations |\n|---|---|---|")
    for name, options in CALLS:
        compilations.clear()
        seconds = paint(bundle, side, **options)
        print(f"| {name} | {seconds:.2f} | {len(compilations)} |", flush=True)


def random_lora(bundle: Bundle, rank: int, seed: int) -> Adapter:
    """Factors of all linear maps of the denoiser."""
    params = bundle.variables["denoiser"]["params"]
    tree = lora.init(jax.random.key(seed), params, rank=rank)
    draw = np.random.default_rng(seed).standard_normal
    up = lambda x: (0.02 * draw(x.shape)).astype(np.float32)
    pairs = lora.modules(tree, "a")
    changes = {(*at, "kernel"): Factors(x["a"], up(x["b"])) for at, x in pairs}
    return {"denoiser": changes}


def compare_weights(bundle: Bundle, side: int, pairs: int, compilations: list) -> None:
    """Seconds of calls with another weight and of unchanged ones, by turns."""
    plain = dataclasses.replace(bundle, bank=Bank())  # the same weights
    for i, name in enumerate(("style", "light")):
        bundle.load_adapter(random_lora(bundle, 16, i), name, 0.5)
    draw = np.random.default_rng(0).random
    weights = lambda: {"style": draw(), "light": draw()}
    calls = {
        "without adapters": lambda: paint(plain, side),
        "another weight": lambda: [bundle.set_adapters(weights()), paint(bundle, side)],
        "unchanged": lambda: paint(bundle, side),
        "another set a prompt": lambda: paint(bundle, side, adapters=[weights()]),
    }
    seconds, counts = {name: [] for name in calls}, dict.fromkeys(calls, 0)
    for turn in range(pairs + 1):
        for name, call in calls.items():
            compilations.clear()
            start = time.perf_counter()
            call()
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - start)
                counts[name] += len(compilations)
    print("| call | median seconds | compilations |\n|---|---|---|")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"| {name} | {median:.3f} | {counts[name]} |")
    ratio = medians["another weight"] / medians["unchanged"]
    print(f"another weight / unchanged: {ratio:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", default="", help="a diffusers folder")
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--adapters", action="store_true", help="weights of adapters")
    parser.add_argument("--pairs", type=int, default=15, help="calls of each kind")
    main(**vars(parser.parse_args()))
