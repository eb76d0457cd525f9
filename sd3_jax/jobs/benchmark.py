"""Times sd3_jax and PyTorch with diffusers in turn, on the same shapes and weights.

Exit code 1 if the sides disagree, or if a ratio is worse than in `guard`. Each side
runs in a process of its own (tools/benchmark); this one only asks them in turn.
"""

import contextlib
import json
import logging
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
from etils import epath
from ml_collections import ConfigDict

from sd3_jax import files
from sd3_jax.distributed.lock import Lock
from sd3_jax.errors import UserError
from sd3_jax.files import write_whole
from sd3_jax.monitoring.metrics import PEAK_TFLOPS
from sd3_jax.tools.benchmark import (
    benchmark_page,
    case_selection,
    cases,
    machine,
    startup,
    timing_summary,
)
from sd3_jax.tools.benchmark.case_turns import OURS, Turns
from sd3_jax.tools.benchmark.cases import Spec
from sd3_jax.tools.benchmark.side_processes import Failed, Worker

log = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: epath.PathLike) -> int:
    """Writes workdir/benchmark.json, .md and .svg, again after each case."""
    before = guarded(config.benchmark.guard)
    if jax.distributed.is_initialized():
        raise UserError("benchmark runs in one process; unset SD3_NUM_PROCESSES")
    if files.remote(workdir):
        raise UserError(f"--workdir={workdir}: benchmark needs a local folder")
    todo = case_selection.selected_cases(config)
    case_selection.require_scaling_fits(config)
    # Two benchmarks in one workdir would time each other.
    lock = Lock(epath.Path(workdir) / ".benchmark.lock")
    lock.take()
    # SIGTERM would end this process without its finally blocks, and leave gigabytes of
    # weights behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    weights = Path(workdir, "weights")
    try:
        shutil.rmtree(weights, ignore_errors=True)  # of a run that was killed
        weights.mkdir()
        benchmark = Benchmark(config, Path(workdir), weights)
        benchmark.run(todo)
    finally:
        shutil.rmtree(weights, ignore_errors=True)
        lock.release()
    print(
        benchmark_page.table(benchmark.result), Path(workdir, "benchmark.md"), sep="\n"
    )
    wrong = [name for case in benchmark.result["cases"] for name in case["refused"]]
    lines = (
        timing_summary.worse(benchmark.result, before, config.benchmark.worse)
        if before
        else ()
    )
    print(*(f"worse than {config.benchmark.guard}: {x}" for x in lines), sep="\n")
    ours = [case["sides"].get("ours", {}) for case in benchmark.result["cases"]]
    return 1 if wrong or lines or not all("seconds" in side for side in ours) else 0


def guarded(path: str) -> dict | None:
    """The earlier result to compare with, or None; UserError if it is unreadable."""
    if not path:
        return None
    try:
        baseline = json.loads(Path(path).read_text())
        timing_summary.measured(baseline)
    except OSError as error:
        raise UserError(f"config.benchmark.guard = {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        wanted = "expected a benchmark.json that this job wrote"
        raise UserError(f"config.benchmark.guard = {path}: {wanted}") from None
    return baseline


class Benchmark:
    """Runs the cases one by one and writes the results after each."""

    def __init__(self, config: ConfigDict, workdir: Path, weights: Path):
        self.config, self.workdir, self.weights = config, workdir, weights
        bench = config.benchmark
        self.log, self.written = workdir / "workers.log", {}
        self.log.write_bytes(b"")
        self.turns = Turns(
            weights,
            self.log,
            repeats=bench.repeats,
            warmup=bench.warmup,
            pause=bench.pause,
        )
        # Without PyTorch the cases still run, ours alone.
        self.missing = {x: machine.missing(x) for x in ("matmul", *cases.KINDS)}
        self.result = {
            "about": machine.about(dtype=bench.dtype, repeats=bench.repeats),
            "missing": sorted({x for x in self.missing.values() if x}),
            "peak": None,
            "cases": [],
            "scaling": [],
            "startup": {},
        }

    def run(self, todo: list[Spec]) -> None:
        self.peak()
        for spec in todo:
            log.info("%s", spec["name"])
            self.result["cases"].append(self.case(spec))
            self.save()
        self.scaling()
        self.startup()
        self.save()

    def save(self) -> None:
        """Writes all results so far, so that a killed run keeps its finished cases."""
        text = json.dumps(self.result, indent=1)
        write_whole(self.workdir / "benchmark.json", text.encode())
        benchmark_page.write(self.result, self.workdir)

    def peak(self) -> None:
        """Measures the peak, the better side's rate of one large matrix product, and
        records which devices the sides use."""
        bench = self.config.benchmark
        spec = {
            "kind": "matmul",
            "name": f"matmul of {bench.matmul}",
            "size": bench.matmul,
            "dtype": bench.dtype,
            "seed": self.config.seed,
        }
        entry = self.case(spec, modes=("eager",))
        sides = {k: x for k, x in entry["sides"].items() if "seconds" in x}
        if "ours" not in sides:
            raise Failed(f"the product of two matrices: {entry['sides']}")
        # The minimum: a peak is what the machine can do undisturbed.
        best = min(sides, key=lambda name: sides[name]["seconds"]["min"])
        device = sides["ours"]["device"]
        self.result["peak"] = {
            "size": bench.matmul,
            "side": best,
            "tflops": entry["flops"] / sides[best]["seconds"]["min"] / 1e12,
            "published": PEAK_TFLOPS.get(device),
            "platform": sides["ours"]["platform"],
            "device": device,
            **{f"{k}_tflops": x["tflops"] for k, x in sides.items()},
        }
        # A PyTorch without CUDA beside jax on a GPU is no comparison.
        other = sides.get("eager")
        if other is not None and other["platform"] != sides["ours"]["platform"]:
            why = f"PyTorch on {other['platform']}, jax on {device}"
            self.missing = dict.fromkeys(self.missing, why)
            self.result["missing"] = [why]
        self.result["about"]["threads"] = other and other.get("threads")
        self.save()

    def case(self, spec: Spec, modes=None) -> dict:
        """Runs one case on all sides: first compares outputs, then times them."""
        absent = self.missing[spec["kind"]]
        modes = (self.config.benchmark.against if modes is None else modes) or ()
        sides = ["ours", *(() if absent else modes)]
        spec = {**spec, "weights": str(self.file(spec))}
        shown = {k: x for k, x in spec.items() if k != "weights"}
        entry = {"name": spec["name"], "kind": spec["kind"], "spec": shown}
        entry |= {"sides": {}, "gaps": {}, "refused": {}, "ratios": {}, "turns": {}}
        apart = spec["kind"] in self.config.benchmark.apart
        (self.turns.apart if apart else self.turns.beside)(spec, sides, entry)
        self.count(entry)
        return entry

    def count(self, entry: dict) -> None:
        """Medians, ratios and rates of the turns."""
        turns, peak = entry["turns"], self.result["peak"]
        sides = entry["sides"]
        entry["flops"] = sides.get("ours", {}).pop("flops", None)
        for side, seconds in turns.items():
            if not seconds or side in entry["refused"]:
                continue
            side_result = sides[side]
            side_result["seconds"] = timing_summary.spread(seconds)
            side_result["busy_cores"] = sum(side_result.pop("cpu")) / sum(seconds)
            if entry["flops"]:
                rate = entry["flops"] / side_result["seconds"]["median"] / 1e12
                side_result["tflops"] = rate
                side_result["of_peak"] = rate / peak["tflops"] if peak else None
                published = peak and peak["published"]
                side_result["mfu"] = rate / published if published else None
            if side != "ours" and turns.get("ours"):
                entry["ratios"][side] = timing_summary.ratios(turns["ours"], seconds)

    def file(self, spec: Spec) -> Path:
        """The file with a case's weights, written when first needed."""
        if spec["kind"] == "matmul":
            return self.weights / "none"
        # Cases of equal components share one file of weights.
        key = json.dumps([spec["component"], spec["dtype"], spec["config"]])
        if key not in self.written:
            path = self.weights / f"{len(self.written)}.safetensors"
            # Drawn on the CPU: a GPU's memory is for the sides.
            on_host = {"JAX_PLATFORMS": "cpu"}
            with Worker(OURS, self.log, on_host) as worker:
                worker.ask("weights", spec=spec, path=str(path))
            self.written[key] = path
        return self.written[key]

    # What is ours alone

    def scaling(self) -> None:
        """Measures how time and compilation grow with tokens and with depth."""
        scaling = self.config.benchmark.scaling
        axes = {"tokens": scaling.tokens, "depth": scaling.depths}
        for kind in scaling.kinds:
            for axis, values in axes.items():
                log.info("scaling: %s over %s", kind, axis)
                points = self.points(kind, axis, values)
                grown = timing_summary.grown(points) if points else []
                series = {"kind": kind, "axis": axis, "points": points, "growth": grown}
                self.result["scaling"].append(series)
                self.save()

    def points(self, kind: str, axis: str, values) -> list[dict]:
        """Times of all values in turn: a machine that slows down affects all points."""
        scaling = self.config.benchmark.scaling
        specs = [self.point(kind, axis, value) for value in values]
        with contextlib.ExitStack() as stack:
            workers, measured = [], []
            for value, spec in zip(values, specs):
                worker = stack.enter_context(self.turns.worker("ours"))
                flops = worker.ask("load", spec=spec)["flops"]
                # Compilation and the first call, which are reported for every size.
                first = worker.ask("first")
                worker.ask("warm", times=self.config.benchmark.warmup)
                workers.append(worker)
                measured.append({axis: value, "flops": flops, "turns": [], **first})
            for _ in range(scaling.repeats):
                for worker, point in zip(workers, measured):
                    time.sleep(self.config.benchmark.pause)
                    point["turns"].append(worker.ask("run")["seconds"])
            for worker, point in zip(workers, measured):
                point["seconds"] = timing_summary.spread(point["turns"])
                point |= worker.ask("peak")
        return measured

    def point(self, kind: str, axis: str, value: int) -> Spec:
        scaling = self.config.benchmark.scaling
        depth = value if axis == "depth" else scaling.depth
        tokens = value if axis == "tokens" else scaling.tokens[0]
        # The width of config.benchmark.scaling replaces the recipe's.
        config = self.config.copy_and_resolve_references()
        with config.unlocked():
            config.model.update(width=scaling.width, num_heads=scaling.num_heads)
        spec = case_selection.case(
            config, f"{kind} depth={depth} batch={scaling.batch}"
        )
        spec["unroll"] = scaling.unroll
        spec["height"], spec["width"] = cases.rectangle(tokens, spec["patch"])
        return spec | {"weights": str(self.file(spec))}

    def startup(self) -> None:
        times, seconds_by_name = self.config.benchmark.startup, self.result["startup"]
        for kind in (startup.imports, startup.jobs):
            for i in range(times):
                log.info("start-up, %s, %d of %d", kind.__name__, i + 1, times)
                try:
                    for name, seconds in kind(self.log):
                        seconds_by_name.setdefault(name, []).append(seconds)
                except Failed as error:
                    log.warning("start-up: %s", error)
                    seconds_by_name.setdefault("failed", []).append(str(error))
                self.save()
