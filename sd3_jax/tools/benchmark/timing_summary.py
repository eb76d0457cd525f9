"""Summaries of times: medians, ratios by pairs, growth, and regressions."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """theirs / ours of each pair of turns: above 1, ours is faster."""
    # Ratios within a turn: neighbours in time share the machine's state, which the
    # ratio of two medians would mix.
    by_turn = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {**spread(by_turn), "each": by_turn}


def grown(points: Sequence[Result]) -> list[dict[str, float]]:
    """Each point's growth over the first point, in time (median over the turns) and in
    FLOPs; `relative` is their ratio, 1 if time grows as FLOPs do."""
    first = points[0]
    growth = []
    for point in points:
        time = ratios(first["turns"], point["turns"])["median"]
        flops = point["flops"] / first["flops"]
        growth.append({"time": time, "flops": flops, "relative": time / flops})
    return growth


def measured(result: Result) -> dict[str, float]:
    """The median ratio by "case, side"."""
    return {
        f"{case['name']}, {side}": ratio["median"]
        for case in result["cases"]
        for side, ratio in case.get("ratios", {}).items()
    }


def worse(now: Result, before: Result, allowed: float) -> list[str]:
    """A line for each ratio that fell by more than the share `allowed`, or that is
    missing although its case was run."""
    new, old = measured(now), measured(before)
    run = {case["name"] for case in now["cases"]}
    lines = []
    for name, was in old.items():
        if name not in new:
            if name.rpartition(", ")[0] in run:
                lines.append(f"{name}: not measured, was {was:.2f}")
        elif new[name] < (1 - allowed) * was:
            fall = 1 - new[name] / was
            lines.append(f"{name}: {new[name]:.2f}, was {was:.2f}: {fall:.0%} worse")
    return lines
