"""What the checkpoint tests save, and the processes they start to save it.

python tests/checkpoints/checkpoint_worker.py VERB DIRECTORY

VERB is exchange, fall_back, preempt, run_out_of_time or die.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sd3_jax import main
from sd3_jax.checkpoints import manager, restoring, step_folders
from sd3_jax.distributed import processes

FSDP = P("fsdp")
CONFIG = {"model": {"depth": 2, "width": None}, "scores": ["val_loss"]}
POLICY = dict(every=1, keep=3, keep_every=None)


@flax.struct.dataclass
class TrainState:
    step: jax.Array
    params: dict
    ema: dict
    opt_state: optax.OptState


def abstract_state(devices: int = 8, *, width: int = 16, spec=FSDP) -> TrainState:
    """Shapes, dtypes and shardings; the first `devices` devices share each array."""
    mesh = jax.make_mesh(
        (devices,), ("fsdp",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )
    kernel = jax.ShapeDtypeStruct((width, 24), jnp.float32)
    bias = jax.ShapeDtypeStruct((width,), jnp.bfloat16)
    params = {"block": {"kernel": kernel, "bias": bias}, "head": {"kernel": kernel}}
    opt_state = jax.eval_shape(optax.adamw(1e-3).init, params)  # int32 and masters
    step = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(step, params, params, opt_state)

    def place(x):
        fits = P() if x.ndim < len(spec) else spec
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, fits)
        )

    return jax.tree.map(place, state)


def host_state(abstract, seed: int):
    """Random bits, so that NaN payloads and denormals are among them."""
    rng = np.random.default_rng(seed)
    draw = lambda x: rng.bytes(x.size * x.dtype.itemsize)
    return jax.tree.map(
        lambda x: np.frombuffer(draw(x), x.dtype).reshape(x.shape), abstract
    )


def make_state(abstract, seed: int):
    place = lambda host, x: jax.make_array_from_callback(
        x.shape, x.sharding, lambda index: host[index]
    )
    return jax.tree.map(place, host_state(abstract, seed), abstract)


def assert_bits(tree, abstract, seed: int):
    """Every local shard is bitwise what `seed` makes, and lies where it should."""
    host = host_state(abstract, seed)
    assert jax.tree.structure(tree) == jax.tree.structure(abstract)
    for x, wanted, a in zip(*map(jax.tree.leaves, (tree, host, abstract)), strict=True):
        assert x.sharding == a.sharding and x.dtype == a.dtype
        for shard in x.addressable_shards:
            assert np.asarray(shard.data).tobytes() == wanted[shard.index].tobytes()


def write(directory: Path, *steps: int, abstract=None, **policy):
    """Save each step with its number as seed, and wait for each; what they are of."""
    abstract = abstract_state() if abstract is None else abstract
    with manager.Checkpoints(directory, **(POLICY | policy)) as checkpoints:
        for step in steps:
            state = make_state(abstract, step)
            checkpoints.save(step, state, {"next_step": step}, CONFIG)
            checkpoints.wait()
    return abstract


def files(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def damage(path: Path, how: str) -> None:
    """A file is deleted, emptied or cut in half."""
    if how == "deleted":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2 * (how == "cut")])


def exchange(directory: Path) -> dict:
    """Restore step 3 of one process, save step 5 of all processes."""
    with manager.Checkpoints(directory, **POLICY) as checkpoints:
        if jax.process_index() > 0:
            step_folders.complete_steps = lambda directory: [999]  # a stale file system
        latest = checkpoints.latest()
        abstract = abstract_state()
        state, data, config = checkpoints.restore(abstract)
        assert_bits(state, abstract, seed=3)
        saved = checkpoints.save(5, make_state(abstract, 5), {"next_step": 5}, config)
    ema, _ = restoring.restore_params(directory, abstract.ema, step=5)
    jax.block_until_ready(ema)
    return dict(latest=latest, data=data, config=config, saved=saved)


def fall_back(directory: Path) -> dict:
    """Step 2 is damaged: all processes go back to step 1, and one sets it aside."""
    with manager.Checkpoints(directory, **POLICY) as checkpoints:
        abstract = abstract_state()
        state, data, _ = checkpoints.restore(abstract)
        assert_bits(state, abstract, seed=1)
        saved = checkpoints.save(2, make_state(abstract, 2), {"next_step": 2}, CONFIG)
    state, data, _ = checkpoints.restore(abstract)
    assert_bits(state, abstract, seed=2)
    return dict(data=data, saved=saved)


def preempt(directory: Path) -> dict:
    """Process 1 is told to go at step 5: all save the same later step, and stop."""
    return stop_early(directory, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))


def run_out_of_time(directory: Path) -> dict:
    """Process 0 asks to stop at step 5, as train.max_hours does."""
    return stop_early(directory, 0, processes.ask_to_stop)


def stop_early(directory: Path, index: int, stop) -> dict:
    state = make_state(abstract_state(), 0)
    policy = dict(every=10**6, keep=1, keep_every=None)
    with manager.Checkpoints(directory, **policy) as checkpoints:
        for step in range(1, 1000):
            if step == 5 and jax.process_index() == index:
                stop()
            saved = checkpoints.save(step, state, {"next_step": step}, CONFIG)
            if checkpoints.reached_preemption(step):
                return dict(step=step, saved=saved)
            time.sleep(0.02)
    return dict(step=None)


def die(directory: Path):
    """Save step 1; be killed while step 2 is being written."""
    abstract = abstract_state(width=1 << 17)  # tens of ms to write
    checkpoints = manager.Checkpoints(directory, **POLICY)
    checkpoints.save(1, make_state(abstract_state(), 1), {"next_step": 1}, CONFIG)
    checkpoints.wait()
    checkpoints.save(2, make_state(abstract, 2), {"next_step": 2}, CONFIG)
    while not (directory / f"2{step_folders.TMP}").exists():
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main.join_processes()
    verb = globals()[sys.argv[1]]
    print(json.dumps(verb(Path(sys.argv[2]))))
