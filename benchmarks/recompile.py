"""What another number of steps or another solver costs `sd3_jax.generate`.

    JAX_PLATFORMS=cpu python benchmarks/recompile.py    # minutes; prints the table

The model is the miniature of the tests (four blocks), or the folder of --weights. JAX's
cache of compiled programs is off.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax

import sd3_jax
from sd3_jax.distributed import sharding

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


def main(weights: str, side: int) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    bundle = sd3_jax.load(weights or miniature(), mesh, "float32")
    compilations = []
    listen = lambda event, *_, **__: event == COMPILED and compilations.append(event)
    jax.monitoring.register_event_duration_secs_listener(listen)
    print("| call | seconds | compilations |\n|---|---|---|")
    for name, options in CALLS:
        compilations.clear()
        start = time.perf_counter()
        images = sd3_jax.generate(
            bundle,
            "a fox",
            height=side,
            width=side,
            max_sequence_length=20,
            **options,
        )
        jax.block_until_ready(images)
        seconds = time.perf_counter() - start
        print(f"| {name} | {seconds:.2f} | {len(compilations)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", default="", help="a diffusers folder")
    parser.add_argument("--side", type=int, default=64, help="pixels")
    main(**vars(parser.parse_args()))
