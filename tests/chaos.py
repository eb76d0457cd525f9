"""Faults, thrown at real runs: what was seen of them, and what was lost.

    make chaos        # or: python tests/chaos.py [SEED]; about six minutes

Every fault is tried some times; `detected` counts those that were told of, `recovered`
those after which the run went on to end, bit by bit, as the unbroken one (or, where
there is nothing to go on with, left every earlier checkpoint sound), and `lost` the
steps that had to be done again, all of them later than the last durable save.
"""

import contextlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ["NPROC"] = "64"  # before jax: the flips are made in this process
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import multiprocess  # noqa: E402

from sd3_jax.monitoring import metrics  # noqa: E402

WORKER = str(Path(__file__).with_name("chaos_worker.py"))
STEPS, EVERY = 24, 4
FLAGS = [
    "train", "--config=configs/sd3_2b.py:tiny", f"--config.train.steps={STEPS}",
    "--config.train.eval_every=1000", "--config.train.sample_every=1000",
    f"--config.checkpoint.every={EVERY}", "--config.checkpoint.keep=100",
]  # fmt: skip
LONGEST = 75  # seconds in which every process must end once one has


class Outcome(NamedTuple):
    fault: str
    tries: int
    detected: int
    recovered: int
    lost: int
    note: str = ""


# Runs


def start(workdir: Path, *flags: str, processes: int = 2, **env: str):
    given = {flag.partition("=")[0] for flag in flags}
    rest = [flag for flag in FLAGS if flag.partition("=")[0] not in given]
    args = [WORKER, *rest, f"--workdir={workdir}", *flags]
    return multiprocess.start(args, processes=processes, devices=1, env=env)


def ended(cluster, seconds: float = LONGEST) -> list[int]:
    """Exit codes; none may outlive the others for long."""
    end = time.monotonic() + seconds
    for process in cluster:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            texts = [multiprocess.result(p).stderr[-3000:] for p in cluster]
            codes = [p.poll() for p in cluster]
            text = "\n--\n".join(texts)
            raise AssertionError(f"{codes} after {seconds} s\n{text}") from None
    return [process.returncode for process in cluster]


def whole(workdir: Path, *flags: str, processes: int = 2) -> str:
    """Train to the end, from wherever it is; what process 0 said."""
    with start(workdir, *flags, processes=processes) as cluster:
        codes = ended(cluster, 300)
        results = [multiprocess.result(process) for process in cluster]
    assert codes == [0] * processes, results[0].stderr[-3000:]
    return results[0].stderr


def step_of(workdir: Path, since: float = 0.0) -> int:
    """The newest step that was logged, by the life that began at `since`."""
    rows = metrics.read(workdir)
    steps = [r["step"] for r in rows if r["kind"] == "train" and r["time"] >= since]
    return max(steps, default=0)


def durable(workdir: Path) -> list[int]:
    steps = (workdir / "checkpoints").glob("*/commit_success.txt")
    return sorted(int(p.parent.name) for p in steps if p.parent.name.isdecimal())


def wait_for(workdir: Path, step: int, cluster) -> None:
    began, end = time.time(), time.monotonic() + 200
    while step_of(workdir, began) < step:
        assert time.monotonic() < end, f"no step {step}"
        if any(process.poll() not in (None, 0) for process in cluster):
            texts = [multiprocess.result(p).stderr[-2000:] for p in cluster]
            raise AssertionError("\n".join(texts))
        time.sleep(0.02)


def final(workdir: Path) -> tuple:
    """Each leaf's fingerprint at the last step, and every loss on the way."""
    about = json.loads((workdir / f"checkpoints/{STEPS}/about/data.json").read_text())
    rows = [row for row in metrics.read(workdir) if row["kind"] == "train"]
    return about["fingerprints"], [(row["step"], row["loss"]) for row in rows]


# Faults; each gives an Outcome


def kills(rng: random.Random, folder: Path, unbroken: tuple, tries: int) -> Outcome:
    """SIGKILL to one process or both, or SIGTERM, at any moment of one run's life."""
    workdir, told, lost, seen = folder / "kills", 0, 0, []
    for n in range(tries):
        with start(workdir) as cluster:
            aim = durable(workdir)[-1:] or [0]
            wait_for(
                workdir, min(aim[0] + rng.randint(1, EVERY + 3), STEPS - 2), cluster
            )
            time.sleep(rng.random() / 4)
            kind = rng.choice(["kill 0", "kill 1", "kill both"])
            if n == 1:  # at least one is gentle
                kind = "term 1"
            victims = cluster if kind.endswith("both") else [cluster[int(kind[-1])]]
            for process in victims:
                sign = signal.SIGTERM if kind[:4] == "term" else signal.SIGKILL
                process.send_signal(sign)
            codes = ended(cluster)
        reached, safe = step_of(workdir), max(durable(workdir), default=0)
        expected = codes == [0, 0] if kind[:4] == "term" else 0 not in codes
        told, lost = told + expected, lost + reached - safe
        seen.append(kind)
    whole(workdir)
    same = final(workdir) == unbroken
    return Outcome("killed at random", tries, told, tries * same, lost, ", ".join(seen))


def terms(rng: random.Random, folder: Path, unbroken: tuple, tries: int) -> Outcome:
    """SIGTERM to one process, to both, and to their whole groups."""
    told, recovered, lost = 0, 0, 0
    for n in range(tries):
        workdir = folder / f"term{n}"
        with start(workdir) as cluster:
            wait_for(workdir, rng.randint(1, STEPS // 2), cluster)
            for process in cluster[n % 2 :] if n < 2 else cluster:
                os.killpg(process.pid, signal.SIGTERM)
            codes = ended(cluster)
        told += codes == [0, 0]
        lost += step_of(workdir) - durable(workdir)[-1]
        whole(workdir)
        recovered += final(workdir) == unbroken
    return Outcome("SIGTERM", tries, told, recovered, lost, "one, both, groups")


def term_alone(rng: random.Random, folder: Path) -> Outcome:
    """SIGTERM to a run of one process, which jax's service knows nothing of."""
    workdir = folder / "alone"
    args = [sys.executable, WORKER, *FLAGS, f"--workdir={workdir}"]
    root = Path(__file__).parents[1]
    env = multiprocess.environment(processes=1, devices=1)  # the same flags of XLA's
    env = {k: v for k, v in env.items() if not k.startswith("SD3_")}
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with subprocess.Popen(args, env=env, cwd=root, **quiet) as process:
        wait_for(workdir, rng.randint(1, STEPS // 2), ())
        process.terminate()
        code = process.wait(LONGEST)
    steps = durable(workdir)
    lost = step_of(workdir) - steps[-1]
    subprocess.run(args, env=env, cwd=root, check=True, **quiet)
    whole(folder / "one", processes=1)
    same = final(workdir) == final(folder / "one")
    return Outcome("SIGTERM, alone", 1, code == 0, same, lost)


def stuck(folder: Path, unbroken: tuple) -> Outcome:
    """One process stands still: it is ended, with its stacks, and so is the other."""
    workdir = folder / "stuck"
    with start(workdir, "--config.train.stuck_after=8", STUCK_AT="7") as cluster:
        wait_for(workdir, 6, cluster)
        codes = ended(cluster)
        texts = [multiprocess.result(process).stderr for process in cluster]
    stacks = "chaos_worker.py" in texts[1] and "in wrapped" in texts[1]
    told = stacks and 0 not in codes and all("stuck" in text for text in texts)
    lost = step_of(workdir) - max(durable(workdir))
    whole(workdir)
    return Outcome("stuck process", 1, told, final(workdir) == unbroken, lost)


def nan_stops(folder: Path) -> Outcome:
    workdir = folder / "nan"
    with start(workdir, processes=1, NAN_AT="6") as cluster:
        codes, (process,) = ended(cluster, 200), cluster
        text = multiprocess.result(process).stderr.splitlines()[-1]
    wanted = "step 6: loss nan", "last good step 5", "last saved step 4", "synthetic:40"
    told = codes == [1] and all(words in text for words in wanted)
    sound = durable(workdir) == [4] and finite(workdir, 4)
    return Outcome("NaN, to stop", 1, told, sound, 0, "step 4 is the newest")


def nan_is_skipped(folder: Path) -> Outcome:
    workdir = folder / "skip"
    flags = "--config.train.skip_nonfinite=1"
    with start(workdir, flags, processes=1, NAN_AT="6") as cluster:
        codes, (process,) = ended(cluster, 200), cluster
        told = "step 6: loss nan" in multiprocess.result(process).stderr
    good = codes == [0] and finite(workdir, STEPS)
    return Outcome("NaN, to skip", 1, told, good, 1, "its update is not made")


def finite(workdir: Path, step: int) -> bool:
    """Every value of a saved state; read by orbax alone."""
    import jax
    from orbax.checkpoint import v1 as ocp

    path = workdir / "checkpoints" / str(step)
    state = ocp.load_checkpointables(path, {"state": None})["state"]
    return all(bool((abs(x) < float("inf")).all()) for x in jax.tree.leaves(state))


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[tuple[Path, bool]]:
    """A tmpfs of 4 MB where one may be mounted; else a limit on the size of files."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:  # the runs that are started inherit it
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        yield folder, mounted
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(folder: Path) -> Outcome:
    """Until nothing more goes on it: the run ends, what was saved can be read."""
    with small_disk(folder / "disk") as (workdir, mounted):
        with start(workdir, "--config.checkpoint.every=1", processes=1) as cluster:
            codes, (process,) = ended(cluster, 200), cluster
            text = multiprocess.result(process).stderr.splitlines()[-1]
        told = codes == [2] and "error: saving" in text and str(workdir) in text
        steps = durable(workdir)
        lost = step_of(workdir) - max(steps, default=0)
        sound = all(finite(workdir, step) for step in steps) and (steps or not mounted)
    return Outcome(
        "disk full", 1, told, bool(sound), lost, "tmpfs" if mounted else "quota"
    )


def vanished(folder: Path) -> Outcome:
    workdir = folder / "vanished"
    with start(workdir, VANISH_AT="5") as cluster:
        codes = ended(cluster, 200)
        texts = [multiprocess.result(process).stderr for process in cluster]
    # Whichever process meets it first, in the save in flight or the next; all say so.
    said = [[x for x in text.splitlines() if "sd3-jax: error:" in x] for text in texts]
    told = all(any(f"{workdir}/checkpoints" in x for x in lines) for lines in said)
    return Outcome("folder gone", 1, told, codes == [2, 2], 0, "all say so and end")


def flips(rng: random.Random, folder: Path, tries: int) -> Outcome:
    """A bit, anywhere in the newest checkpoint."""
    from checkpoints.checkpoint_worker import files, flip

    saved, abstract = two_steps(folder / "flips")
    detected = recovered = 0
    every = files(saved / "2")
    sizes = [path.stat().st_size for path in every]
    for _ in range(tries):
        work = fresh(saved)
        (path,) = rng.choices(every, sizes)
        flip(work / path.relative_to(saved), rng.randrange(8 * path.stat().st_size))
        seen, back = falls_back(work, abstract)
        detected, recovered = detected + seen, recovered + back
    return Outcome("bit flipped", tries, detected, recovered, tries)


def damages(folder: Path) -> Outcome:
    """Every file of the newest checkpoint: cut in half, emptied, deleted."""
    from checkpoints.checkpoint_worker import damage, files

    saved, abstract = two_steps(folder / "damages")
    tries = detected = recovered = harmless = 0
    for path in files(saved / "2"):
        for how in "cut", "emptied", "deleted":
            if not path.stat().st_size and how != "deleted":
                continue
            work = fresh(saved)
            damage(work / path.relative_to(saved), how)
            seen, back = falls_back(work, abstract)
            spare = how == "deleted" and path.parent.name == "sums"
            harmless += spare
            tries, detected = tries + 1, detected + (seen or spare)
            recovered += back
    note = f"{harmless} harmless: without its sums a step's leaves are checked"
    return Outcome("file damaged", tries, detected, recovered, tries - harmless, note)


def two_steps(folder: Path):
    """A folder with two small checkpoints, and the state that they are of."""
    from checkpoints.checkpoint_worker import abstract_state, write

    saved = folder / "saved"
    return saved, write(saved, 1, 2, abstract=abstract_state(1, width=128))


def fresh(saved: Path) -> Path:
    work = saved.with_name("work")
    shutil.rmtree(work, ignore_errors=True)
    return shutil.copytree(saved, work)


def falls_back(work: Path, abstract) -> tuple[bool, bool]:
    """Whether step 2 was not taken, and whether all that was is exactly as saved."""
    from checkpoints.checkpoint_worker import POLICY, assert_bits

    from sd3_jax.checkpoints.manager import Checkpoints

    with Checkpoints(work, **POLICY) as checkpoints:
        state, data, _ = checkpoints.restore(abstract)
    try:
        assert_bits(state, abstract, seed=data["next_step"])
    except AssertionError:
        return data["next_step"] == 1, False
    return data["next_step"] == 1, True


def killed_saving(folder: Path) -> Outcome:
    """SIGKILL while the files of step 2 are being written."""
    from checkpoints.checkpoint_worker import POLICY, abstract_state, assert_bits

    from sd3_jax.checkpoints.manager import Checkpoints

    worker = Path(__file__).with_name("checkpoints") / "checkpoint_worker.py"
    detected, recovered, tries = 0, 0, 3
    for n in range(tries):
        workdir = folder / f"saving{n}"
        args = [
            Path(__file__).with_name("checkpoints") / Path(worker).name,
            "die",
            workdir,
        ]
        multiprocess.run(args, processes=1, devices=8)
        detected += any(path.name.endswith("tmp") for path in workdir.iterdir())
        with Checkpoints(workdir, **POLICY) as checkpoints:
            abstract = abstract_state(1)
            state, data, _ = checkpoints.restore(abstract)
        assert_bits(state, abstract, seed=1)
        recovered += data == {"next_step": 1}
    return Outcome("killed in a save", tries, detected, recovered, tries)


def suite(rng: random.Random, folder: Path) -> Iterator[Outcome]:
    unbroken = folder / "unbroken"
    whole(unbroken)
    result = final(unbroken)
    yield kills(rng, folder, result, 6)
    yield terms(rng, folder, result, 3)
    yield term_alone(rng, folder)
    yield killed_saving(folder)
    yield flips(rng, folder, 200)
    yield damages(folder)
    yield full_disk(folder)
    yield vanished(folder)
    yield stuck(folder, result)
    yield nan_stops(folder)
    yield nan_is_skipped(folder)


def main() -> int:
    logging.getLogger("sd3_jax").setLevel(logging.ERROR)  # what is damaged on purpose
    warnings.simplefilter("ignore")
    seed = int(sys.argv[1]) if sys.argv[1:] else random.randrange(1000)
    began, good = time.monotonic(), True
    print(f"seed {seed}; a checkpoint every {EVERY} of {STEPS} steps\n")
    head = ("fault", "tries", "detected", "recovered", "lost steps")
    print("{:18} {:>6} {:>9} {:>10} {:>11}".format(*head), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for o in suite(random.Random(seed), Path(folder)):
            row = (
                f"{o.fault:18} {o.tries:6} {o.detected:9} {o.recovered:10} {o.lost:11}"
            )
            print(f"{row}  {o.note}".rstrip(), flush=True)
            good &= o.detected == o.recovered == o.tries
    print(
        f"\n{'all held' if good else 'NOT all held'}, {time.monotonic() - began:.0f} s"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
