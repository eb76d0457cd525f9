"""Compares every layer with PyTorch in float32 and bfloat16, and whole trajectories.

Exit code 1 if a layer departs by more than the tolerance.
"""

import importlib.util
import json
import logging
from collections.abc import Iterator

import jax
from etils import epath
from ml_collections import ConfigDict

from sd3_jax.config import relations
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.files import write_whole
from sd3_jax.reports import parity_page as report
from sd3_jax.sampling.bundle import TEXT

log = logging.getLogger(__name__)
TOKEN = 16  # pixels: 8 of a latent, 2 latents of a patch
FLOOR = 1e-3  # of bfloat16: below this a ratio of two errors says nothing


def run(config: ConfigDict, workdir: epath.PathLike) -> int:
    """Writes workdir/compare.json and compare.html; without weights it compares small
    random models of each published kind."""
    # Found without importing: the message is the only thing that the user needs here.
    absent = [x for x in ("torch", "diffusers") if importlib.util.find_spec(x) is None]
    if absent:
        raise UserError(
            f"compare needs PyTorch, and {absent[0]} is not installed; run pip install"
            ' -e ".[torch]" in the checkout'
        )
    if jax.process_count() > 1:
        raise UserError("compare runs in one process; unset SD3_NUM_PROCESSES")
    require_sides(config)
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    # GPUs and TPUs compute float32 products in TF32 or bfloat16 passes by default,
    # which would hide differences between the two sides.
    with jax.default_matmul_precision("highest"):
        models = [measure(config, *source) for source in sources(config, workdir)]
    limits = {"float32": config.compare.tolerance, "bfloat16": config.compare.bfloat16}
    result = {"tolerance": limits, "models": models}
    first = [model["first_departure"] for model in models]
    result["passed"] = not any(first)
    write_whole(workdir / "compare.json", json.dumps(result, indent=1).encode())
    write_whole(workdir / "compare.html", report.html(result).encode())
    print(*lines(result), workdir / "compare.html", sep="\n")
    return 0 if result["passed"] else 1


def require_sides(config: ConfigDict) -> None:
    """UserError unless a picture is whole tokens of the released models."""
    for name in ("height", "width"):
        pixels = config.image[name]
        if pixels % TOKEN:
            raise UserError(
                f"config.image.{name} = {pixels}: expected a multiple of {TOKEN}, a"
                " token's side in the released models; the nearest is"
                f" {relations.multiple(pixels, TOKEN)}"
            )


def sources(config: ConfigDict, workdir: epath.Path) -> Iterator[tuple[str, str]]:
    """(path, what to call it)"""
    if config.weights:
        yield config.weights, ""
        return
    from sd3_jax.tools.parity import miniature

    for kind in miniature.KINDS:
        folder = workdir / "models" / kind
        # Kept in the workdir: a second run compares the same random models.
        if not (folder / "model_index.json").exists():
            miniature.pipeline(kind, folder).save_pretrained(folder)
        yield str(folder), f"{kind}, small and random"


def measure(config: ConfigDict, source: str, name: str) -> dict:
    # Imported here, because it needs PyTorch, which other jobs do without.
    from sd3_jax.tools.parity import component_comparison, trajectory_comparison

    settings = component_comparison.Settings(
        prompts=tuple(config.compare.prompts),
        height=config.image.height,
        width=config.image.width,
        length=config.sample.max_length,
        steps=config.sample.steps,
        scale=config.sample.cfg,
        seed=config.seed,
    )
    mesh = sharding.make_mesh(**config.mesh)
    subject = component_comparison.Subject(source, config.tokenizers, settings, mesh)
    name = name or subject.name
    rows_by_part, first = {}, None
    for part, rows in component_comparison.parts(subject):
        log.info("%s: %s, %d layers", name, part, len(rows))
        rows_by_part[part] = [plain(row) for row in rows]
    result = {"name": name, "source": source, "parts": rows_by_part}
    known = set(subject.configs)
    if {"denoiser", "vae"} <= known and known & set(TEXT):
        drift = trajectory_comparison.drift(subject)
        rows = [plain(row) for row in (*drift.rows, drift.picture)]
        rows_by_part["trajectory"] = rows
        result |= {"t": drift.t, "pictures": report.pictures(drift.pictures)}
    for part, rows in rows_by_part.items():
        # Layers are in order of computation, so the first departure is where to look.
        away = [row for row in rows if departs(config, row)]
        if away and first is None:
            first = {"part": part, **away[0]}
    return result | {"first_departure": first}


def plain(row) -> dict:
    gaps = {name: getattr(row, name)._asdict() for name in row._fields[1:]}
    return {"layer": row.layer, **gaps}


def departs(config: ConfigDict, row: dict) -> bool:
    """Whether a row exceeds the float32 limit, or PyTorch's error in bfloat16."""
    # bfloat16 is judged against PyTorch's own error: how far rounding takes a layer
    # differs from layer to layer.
    limit = config.compare.bfloat16 * row["theirs"]["relative"] + FLOOR
    wide = row["float32"]["largest"] <= config.compare.tolerance
    return not (wide and row["bfloat16"]["relative"] <= limit)


def lines(result: dict) -> list[str]:
    """The printed table: a line for each part, and the first departure."""
    text = []
    for model in result["models"]:
        text.append(model["name"])
        text.append(f"  {'':12} layers  float32  worst at{'':19} bfloat16 (PyTorch's)")
        for part, rows in model["parts"].items():
            worst = max(rows, key=lambda row: row["float32"]["largest"])
            half = max(rows, key=lambda row: row["bfloat16"]["relative"])
            text.append(
                f"  {part:12} {len(rows):6}  {worst['float32']['largest']:.1e}  "
                f"{worst['layer']:27} {half['bfloat16']['relative']:.1e}"
                f" ({half['theirs']['relative']:.1e})"
            )
        if first := model["first_departure"]:
            text.append(
                f"  departs first in {first['part']} at {first['layer']}: float32"
                f" {first['float32']['largest']:.1e}, bfloat16"
                f" {first['bfloat16']['relative']:.1e}"
            )
    limit = result["tolerance"]
    verdict = "all within" if result["passed"] else "NOT all within"
    text.append(
        f"{verdict} {limit['float32']:.0e} of a standard deviation in float32 and"
        f" {limit['bfloat16']:g} times PyTorch's own error in bfloat16"
    )
    return text
