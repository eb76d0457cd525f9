"""Peak resident memory of loading a random SD3-medium, 2 B parameters, and its speed.

    python benchmarks/load_memory.py              # 4 GB in fp16, two loads, minutes
    python benchmarks/load_memory.py --depth 2    # seconds

A process of its own writes the file, as the published single file is laid out, and one
a dtype loads it onto eight virtual CPU devices; past the bound the exit code is 1.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PREFIX = "model.diffusion_model."
DTYPES = "float32", "bfloat16"
BOUND = "2.2 x file + 1 GB"
DEVICES = 8
# GB, seconds, and GB of the file a second; user and system are those of the load.
COLUMNS = "import", "maxrss", "VmHWM", "load s", "user s", "system s", "GB/s"
HEAD = " ".join([" " * 8, *(f"{name:>8}" for name in COLUMNS)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="for the file; default a temporary one")
    parser.add_argument("--depth", type=int, default=24, help="layers, at least 2")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=DTYPES)
    args = parser.parse_args()
    if args.folder:
        os.makedirs(args.folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "sd3_medium.safetensors"
        seconds = child("write", path, args.depth)["seconds"]
        size = path.stat().st_size
        print(f"{size / 1e9:.2f} GB written in {seconds:.0f} s, depth {args.depth}")
        print(HEAD)
        bound, most = 2.2 * size + 1e9, []
        for dtype in args.dtype:
            got = child("load", path, dtype)
            most += [got["maxrss"], got["hwm"]]
            gigabytes = [got[name] / 1e9 for name in ("import", "maxrss", "hwm")]
            times = [got[name] for name in ("seconds", "user", "system")]
            speed = size / 1e9 / got["seconds"]
            cells = [f"{x:8.2f}" for x in (*gigabytes, *times, speed)]
            print(f"{dtype:8}", *cells)
    met = max(most) <= bound
    print(f"{'within' if met else 'PAST'} the bound, {BOUND} = {bound / 1e9:.2f} GB")
    return 0 if met else 1


def child(step: str, *args) -> dict:
    """What a step prints last, in a process of its own: one's peak is for life."""
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "NPROC": "64",  # XLA's threads: several for each device
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, __file__, step, *map(str, args)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write(path: str, depth: str) -> dict:
    """The file, tensor by tensor: one pseudo-random block, rolled and repeated."""
    import numpy as np

    from sd3_jax.weights import safetensors

    block = np.random.default_rng(0).normal(0, 0.02, 1_000_003).astype(np.float16)
    roll = lambda i, shape: np.resize(np.roll(block, 7919 * i), shape)
    entries = {
        PREFIX + piece.key: safetensors.Entry(
            np.dtype(np.float16),
            piece.file_shape,
            lambda i=i, shape=piece.file_shape: roll(i, shape),
        )
        for i, piece in enumerate(pieces(int(depth)))
    }
    start = time.perf_counter()
    safetensors.write_file(path, entries)
    return {"seconds": time.perf_counter() - start}


def pieces(depth: int) -> list:
    """Every tensor that an original file of SD3-medium has."""
    from sd3_jax.distributed import sharding
    from sd3_jax.weights import components, key_mapping

    config = {
        "num_layers": depth,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "caption_projection_dim": 1536,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    }
    component = components.COMPONENTS["denoiser"]
    model = component.build(config, "float32")
    mesh = sharding.make_mesh()
    shapes = components.abstract(component, model, config, mesh, "float32")
    return key_mapping.pieces(shapes, component.table(model), "original")


def load(path: str, dtype: str) -> dict:
    import jax

    import sd3_jax
    from sd3_jax.distributed import sharding

    mesh = sharding.make_mesh(fsdp=DEVICES)
    imported, before, start = peaks()[0], os.times(), time.perf_counter()
    bundle = sd3_jax.load(path, mesh=mesh, dtype=dtype)
    jax.block_until_ready(bundle.variables)
    seconds, after, (maxrss, hwm) = time.perf_counter() - start, os.times(), peaks()
    verify(path, bundle.variables["denoiser"], dtype)
    return {
        "import": imported,
        "maxrss": maxrss,
        "hwm": hwm,
        "seconds": seconds,
        "user": after.user - before.user,
        "system": after.system - before.system,
    }


def peaks() -> tuple[int, int]:
    """Peak resident bytes so far, as getrusage and as /proc say."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * usage, 1024 * int(status)


def verify(path: str, variables: dict, dtype: str) -> None:
    """Two leaves are what the file says, read by the library that defines it."""
    import numpy as np
    import safetensors

    blocks = variables["params"]["blocks"]["image"]["attn"]["to_qkv"]["kernel"]
    layer = len(blocks) // 2
    qkv = f"joint_blocks.{layer}.x_block.attn.qkv.weight"
    with safetensors.safe_open(path, "numpy") as file:
        wanted = {key: file.get_tensor(PREFIX + key) for key in ("pos_embed", qkv)}
    ours = np.asarray(blocks[layer])
    theirs = wanted[qkv].T.reshape(ours.shape).astype(dtype)
    np.testing.assert_array_equal(ours, theirs)
    table = variables["buffers"]["pos_embed"]
    np.testing.assert_array_equal(table, wanted["pos_embed"].astype(dtype))


if __name__ == "__main__":
    steps = {"write": write, "load": load}
    if sys.argv[1:2] and sys.argv[1] in steps:
        print(json.dumps(steps[sys.argv[1]](*sys.argv[2:])))
    else:
        sys.exit(main())
