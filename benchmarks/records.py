"""Writer and reader of records of 1024 x 1024 pixels: records a second, and memory.

    python benchmarks/records.py              # 400 records, 0.7 GB on disk, a minute
    python benchmarks/records.py --parts      # where a record's time goes, too
    python benchmarks/records.py --shards 2000    # what Records holds of a shard

Latents 128 x 128 x 16 in bfloat16, context 154 x 4096 and pooled 2048 likewise: 1.7 MiB
a record, as the loader gives them to a training step. Each case runs in a process of
its own, so that its peak of memory is its own, and the best of three counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GOAL, MEMORY = 400, 1e9  # records a second on two cores, and bytes more
BATCH, FILES, AGAIN = 32, 4, 3
TEXTS = {"context": (154, 4096), "pooled": (2048,)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=400)
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--threads", type=int, nargs="+", default=(2, 4))
    parser.add_argument("--prefetch", type=int, default=2, help="batches")
    parser.add_argument("--folder", help="for the shards; default a temporary one")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--shards", type=int, help="tiny ones: memory of each, only")
    args = parser.parse_args()
    load = " ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"{os.cpu_count()} cores, load {load}")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.shards:
            say("shards", child("hold", folder, args.shards))
            return 0
        made = best("write", folder, args.records, args.side)
        say("writer", made)
        found = []
        for threads in args.threads:
            found.append(best("load", folder, threads, args.prefetch))
            say(f"reader, {threads} threads", found[-1])
        if args.parts:
            for name, ms in child("divide", folder).items():
                print(f"    {name:<24} {ms:6.2f} ms a record, one thread")
    rate, memory = (max(x[name] for x in found) for name in ("rate", "added"))
    met = rate >= GOAL and memory <= MEMORY
    print(f"{'met' if met else 'MISSED'}: {GOAL} records/s, {MEMORY / 1e9:g} GB more")
    return 0 if met else 1


def child(step: str, *args) -> dict:
    """What a step prints last, in a process of its own."""
    run = [sys.executable, __file__, "--step", step, *map(str, args)]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        run,
        env=os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def best(*args) -> dict:
    return max((child(*args) for _ in range(AGAIN)), key=lambda x: x["rate"])


def say(name: str, found: dict) -> None:
    print(f"{name:<20}", ", ".join(f"{k} {v:,.4g}" for k, v in found.items()))


def record(seed: int = 0, side: int = 1024):
    import ml_dtypes
    import numpy as np

    from sd3_jax.data.records import Record

    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    shapes = {"latents": (side // 8, side // 8, 16)} | TEXTS
    held = {name: normal(*x).astype(ml_dtypes.bfloat16) for name, x in shapes.items()}
    return Record(held, f"number {seed}", "a fox in the rain")


def write(folder: str, count: str, side: str) -> dict:
    """Four shards; only the writer's own time counts."""
    from sd3_jax.data.shards import Writer

    some, before = [record(seed, int(side)) for seed in range(8)], peak()
    start = time.perf_counter()
    for file in range(FILES):
        with Writer(Path(folder) / f"{file}.arecord") as shard:
            for i in range(int(count) // FILES):
                shard.write(some[i % 8])
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in Path(folder).glob("*.arecord"))
    written = int(count) // FILES * FILES
    return dict(
        rate=written / seconds, MB_s=size / 1e6 / seconds, added=peak() - before
    )


def load(folder: str, threads: str, prefetch: str) -> dict:
    """Batches as training takes them: an epoch, after a batch to start with."""
    from sd3_jax.data.dataset import Records
    from sd3_jax.data.loader import Loader

    before = peak()
    records = Records([f"{folder}/*.arecord"], batch_size=BATCH)
    loader = Loader(
        records,
        batch_size=BATCH,
        rows=slice(0, BATCH),
        threads=int(threads),
        prefetch=int(prefetch),
    )
    # What is read ahead before the clock starts is as much as there is when it stops.
    batches = max(1, len(records) // BATCH)
    next(loader)
    start, busy = time.perf_counter(), time.process_time()
    sizes = [sum(x.nbytes for x in next(loader).values()) for _ in range(batches)]
    seconds = time.perf_counter() - start
    busy, count = time.process_time() - busy, batches * BATCH
    return dict(
        rate=count / seconds,
        cpu_ms=1e3 * busy / count,
        MB_s=sum(sizes) / 1e6 / seconds,
        batch_MB=sizes[-1] / 1e6,
        added=peak() - before,
    )


def divide(folder: str) -> dict:
    """Milliseconds of a record's parts, one after the other, in one thread."""
    import zlib

    import numpy as np
    import safetensors

    from sd3_jax.data import malloc, records, shards
    from sd3_jax.data.float_bits import finite

    malloc.keep_freed()
    path = f"{folder}/0.arecord"
    reader = shards.open_shard(path)
    count = min(64, reader.num_records())
    each = [reader.read([i])[0] for i in range(count)]
    decoded = records.decode(each[0], path)
    held = list(decoded.tensors.values())
    into = [np.empty((count, *x.shape), x.dtype) for x in held]

    def copy(row):
        for whole, x in zip(into, held):
            whole[row] = x

    cases = {
        "read": lambda i: reader.read([i]),
        "decode": lambda i: records.decode(each[i], path),
        "  its safetensors": lambda i: safetensors.deserialize(each[i]),
        "  its crc32": lambda i: zlib.crc32(each[i]),
        "  its look for nan": lambda i: [finite(x) for x in held],
        "copy to the batch": copy,
    }
    times = {}
    for name, run in cases.items():
        rounds = []
        for _ in range(AGAIN):
            start = time.perf_counter()
            for i in range(count):
                run(i)
            rounds.append(1e3 * (time.perf_counter() - start) / count)
        times[name] = min(rounds)
    return times


def hold(folder: str, count: str) -> dict:
    """Bytes and milliseconds a shard, of Records over so many."""
    import gc
    import shutil
    import tracemalloc

    import numpy as np

    from sd3_jax.data.dataset import Records
    from sd3_jax.data.records import Record
    from sd3_jax.data.shards import Writer

    first = Path(folder) / f"train-{0:05}-0512x0768.arecord"
    with Writer(first) as shard:
        for i in range(4):
            x = np.zeros((4, 6, 16), np.float16)
            shard.write(Record({"latents": x}, f"number {i}", "a fox"))
    for i in range(1, int(count)):
        shutil.copy(first, Path(folder) / f"train-{i:05}-0512x0768.arecord")
    pattern = f"{folder}/*.arecord"
    before, start = resident(), time.perf_counter()
    found = Records([pattern])
    seconds, after = time.perf_counter() - start, resident()
    del found
    gc.collect()
    tracemalloc.start()
    found = Records([pattern])  # noqa: F841, for its memory
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    number = int(count)
    return dict(
        shards=number,
        bytes_each=held / number,
        resident_each=(after - before) / number,
        ms_each=1e3 * seconds / number,
    )


def peak() -> int:
    return status("VmHWM")


def resident() -> int:
    return status("VmRSS")


def status(name: str) -> int:
    """Bytes, from /proc; of Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (x for x in lines if x.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


STEPS = {"write": write, "load": load, "divide": divide, "hold": hold}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        print(json.dumps(STEPS[sys.argv[2]](*sys.argv[3:])))
        sys.exit(0)
    sys.exit(main())
