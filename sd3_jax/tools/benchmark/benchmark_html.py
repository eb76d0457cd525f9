"""benchmark.html: ratios to PyTorch as bars, and the tables of benchmark.md."""

from typing import Any

from sd3_jax.reports import html_page, plots
from sd3_jax.reports.text_table import Table
from sd3_jax.tools.benchmark import benchmark_page


def html(result: dict[str, Any]) -> str:
    """The page of a benchmark's result, which may be that of an unfinished run."""
    about, startup = result["about"], benchmark_page.startup_table(result)
    bars = ratios(result)
    caption = "Medians on a logarithmic axis. Thin lines span the least to the most."
    return html_page.render(
        "benchmark.html",
        about=about,
        peak=result["peak"],
        figures=figures(result),
        warnings=list(warnings(result)),
        panels=[html_page.Panel("Ratio by case", bars, caption)] if bars else [],
        cases=Table("", benchmark_page.HEAD, list(rows(result)), names=2),
        scaling=list(benchmark_page.scaling_tables(result)),
        startup=[startup] if startup else [],
        settings={"": [(k, v or "–", None) for k, v in about["versions"].items()]},
    )


def ratios(result: dict[str, Any]) -> str:
    """The plot of all ratios as SVG, "" without any."""
    sides = {side for case in result["cases"] for side in case["ratios"]}
    label = "{}, {}" if len(sides) > 1 else "{}"
    bars = {
        label.format(case["name"], side): (ratio["median"], ratio["min"], ratio["max"])
        for case in result["cases"]
        for side, ratio in case["ratios"].items()
    }
    return plots.bars(bars, "times as fast as PyTorch", mark=1.0) if bars else ""


def figures(result: dict[str, Any]) -> list[tuple[str, Any, str]]:
    medians = [x["median"] for case in result["cases"] for x in case["ratios"].values()]
    shown = [("cases", len(result["cases"]), "")]
    if medians:
        faster = sum(median >= 1 for median in medians)
        shown.append(("at least as fast as PyTorch", faster, f"of {len(medians)}"))
    if result["peak"]:
        shown.append(("peak", f"{result['peak']['tflops']:.3g}", "TFLOP/s"))
    return [*shown, ("load at the start", f"{result['about']['load'][0]:.1f}", "")]


def warnings(result: dict[str, Any]):
    """Sentences on what makes the figures doubtful or is absent."""
    if result["about"]["load"][0] > benchmark_page.IDLE:
        yield "The machine was not idle when the benchmark began."
    for reason in result["missing"]:
        yield f"Only sd3_jax was measured: {reason}."
    for case in result["cases"]:
        for side, side_result in case["sides"].items():
            if reason := side_result.get("failed") or case["refused"].get(side):
                yield f"{case['name']}, {side}: {reason}"
    for reason in result["startup"].get("failed", ()):
        yield f"Start-up failed: {reason}"


def rows(result: dict[str, Any]):
    """As in benchmark.md; why a side has no figures is among the warnings."""
    for name, side, first, *others in benchmark_page.rows(result):
        wrong = first.startswith(("failed: ", "refused: "))
        side = "sd3_jax" if side == "ours" else side
        yield name, side, first.split(":")[0] if wrong else first, *others
