"""How long one batch of pictures takes on a slice, and how well its chips share it."""

from collections.abc import Mapping, Sequence
from typing import Any

from sd3_jax.tools.plan.bounds import FLOORS

Row = Mapping[str, Any]


def lines(rows: Sequence[Row]) -> list[str]:
    """A line for each denoising loop: milliseconds a step, and seconds a batch."""
    timed = [row for row in rows if row["program"] == "denoise" and "serial" in row]
    return [line(row, alone(row, timed)) for row in timed]


def line(row: Row, one_chip: Row | None) -> str:
    # row["batch"] is for each chip, and is a fraction where chips share a picture.
    pictures = round(row["batch"] * row["chips"])
    ms, scheduled = bound(row), row["scheduled"]
    text = (
        f"{row['slice']} {row['spelt'] or 'one device'}, {row['context_attention']}:"
        f" bound {ms / row['steps']:.4g} ms a step and {ms / 1e3:.3g} s for"
        f" {pictures} picture{'s' * (pictures > 1)}; scheduled"
        f" {scheduled / row['steps']:.4g} ms a step"
    )
    if one_chip is None:
        return text
    return (
        f"{text}; of {row['chips']} times {one_chip['slice']}:"
        f" {efficiency(row, one_chip, bound):.2f} by bound,"
        f" {efficiency(row, one_chip, lambda row: row['scheduled']):.2f} as scheduled"
    )


def bound(row: Row) -> float:
    """The longest of a row's floors, in ms."""
    return max(row[name] for name in FLOORS)


def efficiency(row: Row, one_chip: Row, time) -> float:
    """One chip's time for a picture over that of all the slice's chips together."""
    a_picture = lambda row: time(row) / row["steps"] / row["batch"]
    return a_picture(one_chip) / a_picture(row)


def alone(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row of one chip of the same generation, if the plan has it."""
    kind = row["slice"].partition("-")[0]
    of_one = (r for r in rows if r["chips"] == 1 and r["slice"].startswith(f"{kind}-"))
    return next(of_one, None) if row["chips"] > 1 else None
