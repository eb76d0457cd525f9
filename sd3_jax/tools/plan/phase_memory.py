"""Device memory of a sampling job by phase, for each placement of the weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from sd3_jax.tools.plan import bounds

# The component of a program that may be in eight bits.
QUANTIZED = {"text": "t5", "denoise": "denoiser"}


def with_placements(
    rows: Sequence[dict[str, Any]], weights: Sequence[float], placement: str
) -> list[dict[str, Any]]:
    """The rows of a job's programs, with the peak of each placement.

    `weights` are GiB on a device, by row. A program's own peak is that of "sequential";
    with "all" the weights of the other programs lie beside it. `peak` and `verdict`
    become those of `placement`. A row that does not fit, with "needs", stays as it is.
    """
    return [
        # A program that was not compiled for lack of memory has no peak.
        row if "needs" in row else _placed(row, sum(weights) - size, placement)
        for row, size in zip(rows, weights)
    ]


def _placed(row: dict[str, Any], beside: float, placement: str) -> dict[str, Any]:
    # Only arguments differ: with "sequential" each program's own weights are there
    # alone.
    peaks = {"all": row["peak"] + beside, "sequential": row["peak"]}
    verdict = bounds.verdict(peaks[placement], row["capacity"])
    return row | {"peaks": peaks, "peak": peaks[placement], "verdict": verdict}


def lines(rows: Sequence[dict[str, Any]], quantized: Mapping[str, str]) -> list[str]:
    """For each slice a line for each placement, and what makes room where it lacks.

    `quantized` are the kinds of eight-bit weights by component, "" for none. Rows of
    training have none.
    """
    by_slice: dict[str, list[dict]] = {}
    for row in rows:
        if row["program"] == "train":
            continue
        by_slice.setdefault(row["slice"], []).append(row)
    return [line for rows in by_slice.values() for line in _of_slice(rows, quantized)]


def _of_slice(rows: list[dict], quantized: Mapping[str, str]) -> list[str]:
    head = f"{rows[0]['slice']} memory, of {rows[0]['capacity']:g} GiB"
    text = [
        f"{head}, placement {placement}: {', '.join(_peak(x, placement) for x in rows)}"
        for placement in ("all", "sequential")
    ]
    full = [row["program"] for row in rows if _verdict(row, "sequential") != "fits"]
    if not full and any(_verdict(row, "all") != "fits" for row in rows):
        text[0] += "; set config.sample.placement=sequential"
    for program in full:
        text[1] += f"; {program}: {_remedy(program, quantized)}"
    return text


def _peak(row: dict, placement: str) -> str:
    if "needs" in row:
        return f"{row['program']} needs {row['needs'].split()[0]}"
    verdict = _verdict(row, placement)
    words = {"fits": "", "tight": " (tight)"}.get(verdict, " (does not fit)")
    return f"{row['program']} {row['peaks'][placement]:.1f}{words}"


def _verdict(row: dict, placement: str) -> str:
    if "needs" in row:
        return "exceeds"
    return bounds.verdict(row["peaks"][placement], row["capacity"])


def _remedy(program: str, quantized: Mapping[str, str]) -> str:
    component = QUANTIZED.get(program)
    if component is not None and not quantized[component]:
        return f"set config.quantize.{component}=int8"
    return "take fewer images at a time (config.sample.batch_size), or more chips"
