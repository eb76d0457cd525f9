"""Writes a benchmark's result: benchmark.md and .html, and its ratios as .svg."""

import logging
import statistics
from collections.abc import Iterator
from pathlib import Path

from sd3_jax.files import write_whole
from sd3_jax.monitoring.metrics import short
from sd3_jax.reports.text_table import Table

log = logging.getLogger(__name__)
IDLE = 0.5  # processes that want a core, at most, on a machine that is ours
WIDE = 0.15  # by which time may grow other than FLOPs do


def write(result: dict, workdir: Path) -> None:
    write_whole(workdir / "benchmark.md", (page(result) + "\n").encode())
    # matplotlib and jinja2 may be absent beside an accelerator; the tables need none.
    try:
        from sd3_jax.reports import inline_svg
        from sd3_jax.tools.benchmark import benchmark_html
    except ImportError as error:
        log.warning("no benchmark.html and no benchmark.svg: %s", error)
        return
    drawn = benchmark_html.ratios(result)
    write_whole(workdir / "benchmark.html", benchmark_html.html(result).encode())
    if drawn:
        write_whole(workdir / "benchmark.svg", inline_svg.standalone(drawn).encode())


def page(result: dict) -> str:
    about, peak = result["about"], result["peak"]
    versions = ", ".join(f"{k} {v or '-'}" for k, v in about["versions"].items())
    parts = [
        "# sd3_jax beside PyTorch",
        f"`{about['command']}`, {about['date'][:10]}: {about['cpu']}, {about['cores']}"
        f" cores; {about['dtype']}; {versions}.",
    ]
    if peak:
        theirs = peak.get("eager_tflops")
        beside = f" ({peak['ours_tflops']:.3g} and {theirs:.3g})" if theirs else ""
        published = peak["published"]
        of = f"; published {published:g}" if published else ""
        parts.append(
            f"On {peak['device']}; peak by a product of {peak['size']} squared:"
            f" {peak['tflops']:.3g} TFLOP/s{beside}{of}."
        )
    # Other processes on the machine make every figure doubtful.
    if about["load"][0] > IDLE:
        parts.append(
            f"**The machine was not idle: load {about['load'][0]:.1f} when it began.**"
        )
    if result["missing"]:
        parts.append(f"Ours alone: {'; '.join(result['missing'])}.")
    if result["cases"]:
        parts.append(
            "Ratio: PyTorch's time over ours, pair by pair; above 1 ours is faster."
            " Median (least to most) of the turns."
        )
        parts.append(table(result))
    parts += scaling(result)
    parts += startup(result)
    return "\n\n".join(parts)


HEAD = (
    *("case", "side", "ms", "ratio", "memory, MB", "compile s", "first call s"),
    *("TFLOP/s", "of peak", "gap"),
)


def table(result: dict) -> str:
    return Table("", HEAD, list(rows(result))).markdown(right=False)


def rows(result: dict) -> Iterator[list[str]]:
    for case in result["cases"]:
        for side, side_result in case["sides"].items():
            name = case["name"] if side == "ours" else ""
            label = side if side == "ours" else f"PyTorch {side}"
            # A side without a time keeps its row, with the reason in place of numbers.
            wrong = side_result.get("failed") or case["refused"].get(side)
            if wrong:
                kind = "failed" if side_result.get("failed") else "refused"
                yield [name, label, f"{kind}: {wrong}", *[""] * 7]
                continue
            # PyTorch compiles in its first call, so its column is empty.
            compile_ = side_result.get("lower", 0) + side_result.get("compile", 0)
            ratio = case["ratios"].get(side)
            gap = case["gaps"].get(side)
            yield [
                name,
                label,
                spread(side_result["seconds"], 1e3),
                spread(ratio, 1) if ratio else "",
                f"{side_result['peak'] / 1e6:,.0f}" if "peak" in side_result else "",
                f"{compile_:.1f}" if "compile" in side_result else "",
                f"{side_result['first']:.2f}",
                f"{side_result['tflops']:.3g}",
                share(side_result),
                "" if gap is None else f"{gap:.0e}",
            ]


def spread(values: dict, times: float) -> str:
    median, low, high = (short(times * values[k]) for k in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def share(side_result: dict) -> str:
    mfu = f", MFU {side_result['mfu']:.0%}" if side_result.get("mfu") else ""
    return f"{side_result['of_peak']:.0%}{mfu}" if side_result.get("of_peak") else ""


# --- ours alone


def scaling(result: dict) -> Iterator[str]:
    for scaling_table in scaling_tables(result):
        yield f"## {scaling_table.caption}"
        yield scaling_table.markdown(right=False)


def scaling_tables(result: dict) -> Iterator[Table]:
    """A table for each kind and axis that has points."""
    for series in result["scaling"]:
        if not series["points"]:
            continue
        axis = series["axis"]
        # Time that grows as FLOPs do has a ratio of 1 at every point.
        far = max(abs(x["relative"] - 1) for x in series["growth"])
        words = "within" if far <= WIDE else "not within"
        caption = (
            f"{series['kind']} over {axis}: time against FLOPs {words} {WIDE:.0%}"
            f" ({far:.0%})"
        )
        head = (axis, "ms", "time grown", "FLOPs grown", "time / FLOPs", "compile s")
        points = [
            (
                f"{point[axis]}",
                spread(point["seconds"], 1e3),
                *(f"{grown[k]:.2f}" for k in ("time", "flops", "relative")),
                f"{point['lower'] + point['compile']:.1f}",
            )
            for point, grown in zip(series["points"], series["growth"])
        ]
        yield Table(caption, head, points)


def startup(result: dict) -> Iterator[str]:
    if startup_rows := startup_table(result):
        yield f"## {startup_rows.caption}"
        yield startup_rows.markdown(right=False)
    # A failure is shown beside the times that were measured.
    for text in result["startup"].get("failed", ()):
        yield f"Start-up failed: {text}"


def startup_table(result: dict) -> Table | None:
    times = {k: x for k, x in result["startup"].items() if k != "failed"}
    caption = "Start-up, seconds, of configs/quickstart.py:tiny"
    measured = [
        (
            name,
            f"{statistics.median(seconds):.2f}",
            f"{min(seconds):.2f} to {max(seconds):.2f}",
        )
        for name, seconds in times.items()
    ]
    return Table(caption, ("", "median", "least to most"), measured) if times else None
