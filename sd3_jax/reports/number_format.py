"""Formats numbers, dates and scores for people; a missing value is a dash."""

import math
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sd3_jax.foreign_text import shown

DASH = "–"


def finite(value: Any, otherwise: float | None = math.nan) -> float | None:
    """The value if it is a finite number: what JSON holds may be anything."""
    # Scores are read from files that other versions or people may have written.
    number = isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return float(value) if number else otherwise


def entries(scores: dict, name: str) -> list[dict]:
    """scores["scores"] or scores["prompts"], without other entries."""
    # Older or foreign files may have something else under this name.
    values = scores.get(name)
    return (
        [e for e in values if isinstance(e, dict)] if isinstance(values, list) else []
    )


def group(tree: dict, name: str) -> dict:
    """tree[name] if it is an object, else {}."""
    value = tree.get(name)
    return value if isinstance(value, dict) else {}


def has_date(row: Mapping[str, Any]) -> bool:
    """Whether a row's time, in seconds, is a date."""
    # datetime ends with the year 9999, and JSON may have any number.
    return 0 <= row["time"] < datetime.max.replace(tzinfo=UTC).timestamp() - 1


def scored_at(scores: dict) -> str:
    step, weights = scores.get("step"), shown(scores.get("weights") or "")
    at = f"step {step:,}" if isinstance(step, int) else "a step that is not recorded"
    return f"Scores at {at}" + (f", {weights} weights" if weights else "")


def score_lines(scores: dict) -> list[str]:
    """The table of scores for a terminal."""
    rows = entries(scores, "scores")
    if not rows:
        return ["No scores yet: the evaluate job writes them."]
    width = max(len(shown(row.get("name", DASH))) for row in rows)
    lines = [scored_at(scores)]
    for row in rows:
        name, number = shown(row.get("name", DASH)), score(row.get("score"))
        tail = f"{interval(row):>13}  n = {count(row.get('n'))}"
        lines.append(f"  {name:<{width}}  {number:>7}  {tail}")
    return lines


def score(value: Any) -> str:
    value = finite(value)
    # Shares in [0, 1] get three digits, FID in the tens one.
    return DASH if math.isnan(value) else f"{value:.{3 if abs(value) < 10 else 1}f}"


def interval(entry: dict) -> str:
    low, high = score(entry.get("low")), score(entry.get("high"))
    return DASH if DASH in (low, high) else f"{low} – {high}"


def count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else DASH


def plural(number: int, noun: str) -> str:
    """ "1 picture", "1,200 pictures"."""
    return f"{number:,} {noun}" + "s" * (number != 1)


# A figure and its unit


def plain(value: float) -> tuple[str, str]:
    return f"{value:.4g}", ""


def percent(value: float) -> tuple[str, str]:
    return f"{100 * value:.3g}", "%"


def rate(value: float) -> tuple[str, str]:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}", "images/s"


def milliseconds(value: float) -> tuple[str, str]:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}", "ms"


def tflops(value: float) -> tuple[str, str]:
    # Small models on a CPU do thousandths of a thousandth of a TFLOP/s.
    for size, unit in ((1, "TFLOP/s"), (1e-3, "GFLOP/s")):
        if value >= size:
            return f"{value / size:.3g}", unit
    return f"{1e6 * value:.3g}", "MFLOP/s"


def big(value: float) -> tuple[str, str]:
    for size, unit in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if value >= size:
            return f"{value / size:.3g}", unit
    return f"{value:g}", ""


def duration(seconds: float) -> tuple[str, str]:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 48:
        return f"{hours / 24:.1f}", "days"
    if hours >= 1:
        return f"{int(hours)}:{int(minutes) % 60:02}", "h"
    return (f"{minutes:.1f}", "min") if minutes >= 1 else (f"{seconds:.0f}", "s")


def date(moment: datetime) -> str:
    return f"{moment.day} {moment:%B %Y}"


def gigabytes(size: int) -> tuple[str, str]:
    """A number of bytes as a number and its unit, GB or MB."""
    return (f"{size / 1e9:,.2f}", "GB") if size >= 1e8 else (f"{size / 1e6:,.2f}", "MB")
