"""The plan of a precompute job: its parts and settings, and resuming from plan.json."""

import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from sd3_jax.assembly import compatibility, encoder_identity, record_shapes
from sd3_jax.config import validation
from sd3_jax.data.ingest import (
    captions,
    filters,
    input_changes,
    intake,
    listing,
    prepare,
)
from sd3_jax.data.ingest.input_parts import Part
from sd3_jax.data.ingest.manifest import Manifest
from sd3_jax.data.shards import expand
from sd3_jax.errors import UserError, prefixed
from sd3_jax.files import absolute, parse_object, read_bytes, write_whole
from sd3_jax.foreign_text import shown
from sd3_jax.sampling.text.encoder import Encoder

# Keys that a record's content depends on. A job refuses to go on in a workdir whose
# records were made with other values: the set would be a mixture.
RECORD_KEYS = (
    *("seed", "ingest", "encode", "image", "text.length", "model.channels"),
    *("model.patch", "model.multipliers", "model.context_dim", "model.pooled_dim"),
    *("precompute.part", "precompute.only", "precompute.held_out"),
)


def ingest_settings(config: ConfigDict) -> prepare.Settings:
    """Parse config.ingest; UserError with the key that is wrong."""
    ingest, parsed = config.ingest, {}
    for key, parse in ("captions", captions.parse), ("filters", filters.parse):
        with prefixed(f"config.ingest.{key}"):
            parsed[key] = parse(tuple(ingest[key]))
    exclusions = {}
    for path in map(epath.Path, ingest.exclude):
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"config.ingest.exclude: {path}: {reason}") from None
        exclusions |= prepare.parse_exclusions(lines, f"config.ingest.exclude: {path}")
    return prepare.Settings(
        buckets=record_shapes.bucket_table(config),
        excluded=exclusions,
        prefix=ingest.prefix,
        uncaptioned=ingest.uncaptioned == "keep",
        held_out=config.precompute.held_out,
        rejected=ingest.rejected,
        seed=config.seed,
        **parsed,
    )


def record_settings(
    config: ConfigDict, encoder: Encoder | None, exclusions: str
) -> dict[str, Any]:
    """The settings that records depend on, with fingerprints of weights and lists."""
    values = dict(validation.leaves(config))
    settings = {
        key: x for key, x in values.items() if compatibility.within(key, RECORD_KEYS)
    }
    for key in "encode.weights", "encode.tokenizers", "ingest.exclude", "ingest.inputs":
        # Paths may differ between runs; what is behind them is compared instead, by
        # fingerprints below and the parts' listings.
        settings.pop(key)
    if encoder is None:  # for a recipe of pixels too, whatever precompute.only says
        settings["precompute.only"] = ()
    settings["excluded"] = exclusions
    settings["weights"] = encoder.bundle.fingerprint() if encoder else ""
    return json.loads(json.dumps(settings))  # tuples are lists, as in plan.json


def plan_input(
    config: ConfigDict, workdir: epath.Path, settings: prepare.Settings
) -> list[Part]:
    """Plan the input's parts; UserError if no picture would have a caption."""
    # On resume an input that is spelled otherwise, relative or through a link, goes by
    # the planned path: the names of its sources follow from it.
    begun = (workdir / "plan.json").exists()
    planned_paths = [part.path for part in read_plan(workdir)] if begun else []
    size = config.precompute.part
    parts = intake.plan_inputs(config, planned_paths=planned_paths, size=size)
    if not settings.uncaptioned and not begun:
        intake.require_captions(parts, settings.captions, prefix=settings.prefix)
    return list(map(with_absolute_path, parts))


def remaining_parts(
    config: ConfigDict,
    workdir: epath.Path,
    settings: dict,
    parts: list[Part],
    fingerprints: dict[str, str],
) -> list[int]:
    """Write plan.json, or compare with it on resume; the numbers of parts left to do.

    Removes the shards of unfinished parts, which are done again. Parts whose files are
    not as they were written count as unfinished.
    """
    path = workdir / "plan.json"
    plan = {"made_by": settings, "parts": [part._asdict() for part in parts]}
    # plan.json comes after its folders: once it is there, a job may resume.
    for name in ("parts", "records"):
        (workdir / name).mkdir(parents=True, exist_ok=True)
    if path.exists():
        # --- the same settings
        old_settings, planned_parts = load_plan(workdir)
        # A key that only one has is of another version of this code.
        differing = [
            f"{key} was {old_settings[key]}, is {settings[key]}"
            for key in sorted(old_settings.keys() & settings.keys())
            if old_settings[key] != settings[key]
        ]
        if differing:
            raise UserError(
                f"{workdir} holds records made with other settings:"
                f" {'; '.join(differing)}. Restore the old settings or use another"
                " workdir"
            )
        # --- the same inputs, wherever the links to them lie
        known_paths = {listing.resolved(part.path) for part in planned_parts}
        paths = [path for pattern in config.ingest.inputs for path in expand(pattern)]
        current_paths = set(map(listing.resolved, paths))
        if different_paths := sorted(known_paths ^ current_paths):
            first = different_paths[0]
            change = "is new" if first in current_paths else "was removed"
            raise UserError(
                f"config.ingest.inputs: {shown(first, 200)} {change};"
                f" {len(different_paths)} inputs differ from those that {workdir} was"
                " planned for. Restore them, or use another workdir for the new ones"
            )
        # --- the same files; only times may differ, which the new plan then has
        manifest = Manifest(workdir, len(planned_parts))
        damaged = manifest.damaged()
        done = manifest.done() - damaged.keys()
        if input_changes.require_same(workdir, planned_parts, parts, done):
            write_whole(path, json.dumps(plan).encode())
        manifest.forget(damaged)
    else:
        write_whole(path, json.dumps(plan).encode())
    write_whole(workdir / encoder_identity.NAME, json.dumps(fingerprints).encode())
    return Manifest(workdir, len(read_plan(workdir))).clear_unfinished()


def read_plan(workdir: epath.Path) -> list[Part]:
    """The parts of plan.json; UserError if it is damaged."""
    return load_plan(workdir)[1]


def load_plan(workdir: epath.Path) -> tuple[dict[str, Any], list[Part]]:
    """The settings and the parts of plan.json; UserError if it is damaged."""
    path = workdir / "plan.json"
    data = read_bytes(path)
    # With the parts: without the plan no one knows by which settings they were made.
    advice = f"delete it and {workdir}/parts, and start again: all parts are made again"
    try:
        plan = parse_object(path, data)
        parts = [with_absolute_path(Part(**part)) for part in plan["parts"]]
        return dict(plan["made_by"]), parts
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not a plan of precompute; {advice}") from None
    except UserError as error:
        raise UserError(f"{error}; {advice}") from None


def with_absolute_path(part: Part) -> Part:
    """The part with an absolute path: a later run may start in another folder."""
    return part._replace(path=absolute(part.path))
