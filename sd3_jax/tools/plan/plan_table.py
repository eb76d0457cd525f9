"""The rows of a plan as text: a table, where the time goes, and what bounds it."""

from sd3_jax.tools.plan import (
    aot,
    bounds,
    slices,
)

COLUMNS = {
    "slice": "slice",
    "program": "program",
    "billions": "params B",
    "spelt": "mesh",
    "remat": "remat",
    "batch": "images/chip",
    "peak": "peak GiB",
    "capacity": "of GiB",
    "verdict": "memory",
    "compute": "matmul ms",
    "serial": "serial ms",
    "hbm": "HBM ms",
    "links": "ICI ms",
    "other_slices": "DCN ms",
    "scheduled": "scheduled ms",
    "binds": "binds",
    "mfu": "bound MFU",
    "mfu_scheduled": "scheduled MFU",
    "forecast_mfu": "forecast MFU",
    "rate": "bound images/s/chip",
    "forecast_rate": "forecast images/s/chip",
}
KNOWN = list(COLUMNS).index("batch") + 1  # columns of a row that does not fit, too


def table(rows: list[dict]) -> list[str]:
    cells = [list(COLUMNS.values())]
    for row in rows:
        if "needs" in row:
            cells.append([shown(row[name]) for name in list(COLUMNS)[:KNOWN]])
            cells[-1].append(f"does not fit: needs {row['needs']} HBM")
        else:
            cells.append([shown(row[name]) for name in COLUMNS])
    # Rows that do not fit end in a sentence, which must not widen a column.
    whole = [row for row in cells if len(row) == len(COLUMNS)]
    wide = [
        max(len(row[i]) for row in (cells if i < KNOWN else whole))
        for i in range(len(COLUMNS))
    ]
    return ["  ".join(f"{cell:>{n}}" for cell, n in zip(row, wide)) for row in cells]


def details(row: dict) -> str:
    """Where a row's time goes, and the recipe's keys that a search found."""
    name = f"{row['slice']} {row['program']}"
    recipe = f"\n  {row['recipe']}" if "recipe" in row else ""
    if "needs" in row:
        return name + ": does not fit" + recipe
    total = row["scheduled"]
    shares = [
        f"{k} {v / total:.0%}" for k, v in row["shares"].items() if v > 5e-3 * total
    ]
    sent = [f"{axes} {size / 1e9:.3g} GB" for axes, size in row["sent_bytes"].items()]
    if row["sent_between_slices"]:
        sent.append(f"between slices {row['sent_between_slices'] / 1e9:.3g} GB")
    overlapped, beside = row["overlapped"], row["beside_matmuls"]
    lines = [
        f"{name}: scheduled {total:.4g} ms: {', '.join(shares)}",
        f"sends {', '.join(sent) or 'nothing'}; {overlapped:.0%} overlapped,"
        f" {beside:.0%} beside matmuls",
    ]
    if row["forwards"] is not None:
        lines.append(f"{row['forwards']:g} forwards of the denoiser for an image")
    # Loops or kernels that could not be counted make every time a lower bound.
    if row["unknown"]:
        names = ", ".join(row["unknown"][:3])
        lines.append(
            f"not counted ({len(row['unknown'])}): {names}: all times are more"
        )
    return "\n  ".join(lines) + recipe


def notes(rows: list[dict]) -> list[str]:
    """Footnotes: what the figures mean, and the compiler's version."""
    jobs = {"train" if row["program"] == "train" else "sample" for row in rows}
    reach = [shown(list(bounds.FORECAST[job])) for job in sorted(jobs)]
    lines = [
        f"bound: no run is faster. forecast: {', '.join(reach)} x bound, which"
        " published runs reach. Nothing was measured.",
        f"compiled by {aot.compiler()}: other versions make other programs",
    ]
    # gcloud calls a v5e by another name than everyone else.
    for name in dict.fromkeys(row["slice"] for row in rows):
        if (cloud := slices.cloud_name(name)).startswith(slices.LITEPOD[0]):
            lines.append(f"{name}: {cloud} to gcloud and in launch/'s ACCELERATOR_TYPE")
    if any(row.get("verdict") == "tight" for row in rows):
        lines.append(
            f"tight: more than {bounds.TIGHT:.0%} of HBM by the compiler's count"
        )
    return lines


def shown(value) -> str:
    if isinstance(value, list):
        return "-".join(dict.fromkeys(f"{x:.3g}" for x in value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
