"""What a save costs, and what its fingerprints and sums cost of it.

python benchmarks/checkpoint.py [WIDTH ...]     # several sizes of state, in turn
"""

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from sd3_jax import tree
from sd3_jax.checkpoints import integrity  # noqa: E402
from sd3_jax.checkpoints.manager import Checkpoints  # noqa: E402
from sd3_jax.distributed import sharding  # noqa: E402

TIMES = 5
V5E = 819e9  # bytes/s of a chip's memory


def state(width: int):
    """Four trees, as parameters, average and Adam's moments are: normal float32."""
    mesh = sharding.make_mesh()
    placed = NamedSharding(mesh, PartitionSpec("fsdp"))
    shapes = {
        "qkv": (width, 3, width),
        "mlp": (width, 4 * width),
        "out": (width, width),
    }
    shapes = {f"{n}{i}": s for n, s in shapes.items() for i in range(4)}

    def make(key):
        keys = iter(jax.random.split(key, 4 * len(shapes)))
        return [
            {name: jax.random.normal(next(keys), s) for name, s in shapes.items()}
            for _ in range(4)
        ]

    return jax.jit(make, out_shardings=placed)(jax.random.key(0))


def timed(function) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def measure(width: int) -> dict:
    made = jax.block_until_ready(state(width))
    size = sum(x.nbytes for x in jax.tree.leaves(made))
    print_ = lambda: tree.fingerprints(made)
    first = timed(print_)
    prints, blocks, wholes, sums, durable = [], [], [], [], []
    with tempfile.TemporaryDirectory(dir=os.environ.get("DISK")) as folder:
        policy = dict(every=1, keep=1, keep_every=None)
        with Checkpoints(folder, **policy) as checkpoints:
            for step in range(1, TIMES + 1):
                prints.append(timed(print_))
                save = lambda: checkpoints.save(step, made, {}, {})  # noqa: B023
                block = timed(save)
                blocks.append(block)
                wholes.append(block + timed(checkpoints.wait))
                path = checkpoints.directory / str(step)
                shutil.rmtree(path / integrity.FOLDER)
                sums.append(timed(lambda: integrity.write_sums(path, 0, 1)))  # noqa: B023
                durable.append(wholes[-1] + timed(os.sync))
    return {
        "MB": round(size / 1e6),
        "devices": jax.device_count(),
        "fingerprints_first_s": first,
        "fingerprints_s": median(prints),
        "sums_s": median(sums),
        "blocked_s": median(blocks),
        "save_s": median(wholes),
        "save_and_sync_s": median(durable),
        "fingerprints_of_a_save": median(p / w for p, w in zip(prints, durable)),
        "on_a_v5e_s": size / jax.device_count() / V5E,
    }


if __name__ == "__main__":
    jnp.zeros(())  # the backend's own start is no part of it
    for width in map(int, sys.argv[1:] or (256, 512, 1024)):
        row = measure(width)
        print(json.dumps({k: float(f"{v:.4g}") for k, v in row.items()}), flush=True)
