"""What the report's sections show; templates/report.html says what is missing."""

import functools
import json
import math
from datetime import UTC, datetime
from pathlib import PurePosixPath
from statistics import median
from typing import Any

from etils import epath

from sd3_jax.data.images import BadImage
from sd3_jax.monitoring import metrics
from sd3_jax.reports import html_page, number_format, run_curves

FRAMES = 9  # sample grids shown, of however many there are
FINAL_BYTES, FILM_BYTES = 500_000, 1_100_000  # with base64 and plots below 3 MB
Row = dict[str, Any]
Groups = dict[str, list[tuple[str, str, str | None]]]


def head(
    name: str, rows: list[Row], settings: dict, facts: dict
) -> tuple[dict[str, Any], list[str]]:
    """Name, what ran where and when, and the figures of the run; and the names of the
    figures that nothing recorded."""
    model, train = (number_format.group(settings, name) for name in ("model", "train"))
    last = max(rows, key=lambda row: row["step"])
    # Every field may be missing or of another type: config.json is read as it is.
    total = f"{train['steps']:,}" if isinstance(train.get("steps"), int) else ""
    steps = number_format.plural(last["step"], "step")
    devices = f"{facts['devices']} × " if "devices" in facts else ""
    lede = [
        model.get("name") and f"{model['name']}, depth {model.get('depth', '?')}",
        f"{last['step']:,} of {total} steps" if total else steps,
        facts.get("device_kind") and f"{devices}{facts['device_kind']}",
        number_format.has_date(last)
        and number_format.date(datetime.fromtimestamp(last["time"], UTC)),
    ]
    figures, unmeasured = _figures(rows, facts)
    # What the page shows must be text: JSON may have anything here.
    lede = [str(words) for words in lede if words]
    return {"name": name, "lede": lede, "figures": figures}, unmeasured


def _figures(rows, facts):
    """Label, value, unit of what was measured, and the labels of what was not."""
    # Medians: the first steps include compilation.
    middle = lambda name: _median(run_curves.series(rows, "train", name)[1])
    validation = [
        v for v in run_curves.series(rows, "val", "loss")[1] if math.isfinite(v)
    ]
    # Scores may be written days after the training.
    times = [
        row["time"]
        for row in rows
        if row["kind"] != "score" and number_format.has_date(row)
    ]
    wall = max(times) - min(times) if len(times) > 1 else None
    figures = [
        (
            "parameters",
            number_format.finite(facts.get("parameters"), None),
            number_format.big,
        ),
        ("wall time", wall, number_format.duration),
        (
            "validation loss",
            validation[-1] if validation else None,
            number_format.plain,
        ),
        ("median throughput", middle("images_per_s"), number_format.rate),
        ("median step time", middle("step_ms"), number_format.milliseconds),
        ("waiting for data", middle("data_wait"), number_format.percent),
        ("compute per device", middle("tflops_per_device"), number_format.tflops),
        ("model FLOPs utilization", middle("mfu"), number_format.percent),
    ]
    measured = [
        (n, *text(float(value))) for n, value, text in figures if value is not None
    ]
    return measured, [name for name, value, _ in figures if value is None]


def sheet(workdir: epath.Path, rows: list[Row]) -> tuple[html_page.Picture | None, str]:
    """The contact sheet of the trained model or else its last grid, and a caption."""
    name = "samples.png"
    if picture := _picture(workdir, name, "Samples after training", FINAL_BYTES):
        return picture, "Drawn by the trained weights (samples.png)."
    grids = [row for row in rows if row["kind"] == "samples"]
    # The newest grid whose file is still there.
    for row in reversed(grids):
        if picture := _picture(workdir, row.get("path", ""), _alt(row), FINAL_BYTES):
            caption = f"The newest grid of the training run, at step {row['step']:,}."
            return picture, f"{caption} The sample job draws a larger sheet."
    return None, ""


def missing(
    unmeasured: list[str],
    unread: list[str],
    *,
    sheet: bool,
    scores: bool,
    film: bool,
    settings: bool,
) -> list[str]:
    """Lines on what the page lacks, and which job or key adds it."""
    # A damaged file is there; its own line is in `unread`.
    scores |= any(line.startswith("scores.json") for line in unread)
    settings |= any(line.startswith("config.json") for line in unread)
    lines = [
        (sheet, "No samples.png yet; the sample job writes it."),
        (scores, "No scores.json yet; the evaluate job writes it."),
        (film, "No samples were drawn during training; train.prompts names prompts."),
        (settings, "No config.json, so the settings are not known."),
        (not unmeasured, f"Not recorded: {', '.join(unmeasured)}."),
    ]
    return [*unread, *(line for there, line in lines if not there)]


def misread(rows: list[Row], settings: dict, facts: dict, scores: dict) -> list[str]:
    """Lines on the parts of a run's files that are of another type than a run writes,
    and so not shown."""
    wanted = {
        "config.json": (settings, {"model": dict, "train": dict}),
        "run.json": (facts, {"parameters": int, "recipe": str, "device_kind": str}),
        "scores.json": (scores, {"scores": list, "prompts": list, "settings": dict}),
    }
    lines = []
    for file, (value, kinds) in wanted.items():
        # What is absent is no fault; of a list, every entry must be an object.
        present = {name: value[name] for name in kinds if name in value}
        wrong = [
            name
            for name, part in present.items()
            if not isinstance(part, kinds[name])
            or isinstance(part, list)
            and len(number_format.entries(value, name)) < len(part)
        ]
        if wrong:
            lines.append(f"{file} is not understood in: {', '.join(wrong)}.")
    if undated := sum(not number_format.has_date(row) for row in rows):
        lines.append(f"{metrics.FILE} has {undated} lines whose time is not a date.")
    return lines


def scores(scores: dict) -> dict[str, Any]:
    """Rows of the scores with their intervals, and of each prompt's score."""
    rows = [
        (
            *(entry.get("name", number_format.DASH), _bar(entry)),
            *(number_format.score(entry.get("score")), number_format.interval(entry)),
            number_format.count(entry.get("n")),
        )
        for entry in number_format.entries(scores, "scores")
    ]
    # The worst prompts first: they are what a reader looks for.
    entries = sorted(
        number_format.entries(scores, "prompts"),
        key=lambda e: (number_format.finite(e.get("score"), -1.0), str(e)),
    )
    prompts = [
        (
            *(entry.get("prompt", ""), entry.get("split", ""), _bar(entry)),
            number_format.score(entry.get("score")),
            number_format.count(entry.get("n")),
        )
        for entry in entries
    ]
    settings = grouped(flat(number_format.group(scores, "settings")))
    at = number_format.scored_at(scores)
    return {"rows": rows, "prompts": prompts, "settings": settings, "at": at}


def training(rows: list[Row]) -> list[html_page.Panel]:
    """What every step logs."""
    curve = functools.partial(run_curves.over_steps, rows, "train")
    return [
        curve("Training loss", "loss"),
        curve("Gradient norm", "grad_norm", zero=True),
        curve("Learning rate", "lr", zero=True, smooth=False),
        curve("Throughput, images per second", "images_per_s", zero=True),
    ]


def validation(rows: list[Row]) -> list[html_page.Panel]:
    """The held-out loss, over steps and over t, and scores that were measured often."""
    panels = [
        run_curves.over_steps(rows, "val", "Validation loss", "loss"),
        run_curves.by_t(rows),
    ]
    names = {name for row in rows if row["kind"] == "score" for name in row}
    for name in sorted(names - {*metrics.HEAD}):
        if len(run_curves.series(rows, "score", name)[0]) > 1:
            panels.append(run_curves.over_steps(rows, "score", f"Score: {name}", name))
    return panels


def goodput(kinds: list[tuple[str, float, float]]) -> list[tuple]:
    """Rows of where the time went, of (kind, share, seconds), restarts included."""
    return [
        (
            *(name, " ".join(number_format.percent(share))),
            html_page.Bar(0, share),
            " ".join(number_format.duration(seconds)),
        )
        for name, share, seconds in kinds
    ]


def film(workdir: epath.Path, rows: list[Row]) -> dict[str, Any]:
    """The grids drawn during training, and their prompts with the step they are of."""
    # Of a step that was sampled twice the later grid is the file that is there.
    rows = list({row["step"]: row for row in rows if row["kind"] == "samples"}.values())
    chosen = run_curves.evenly_spaced(rows, FRAMES)
    frames = [_frame(workdir, row, FILM_BYTES // len(chosen)) for row in chosen]
    prompts = {tuple(_prompts(row)): row["step"] for row in chosen if _prompts(row)}
    return {"frames": frames, "drawn": len(rows), "prompts": prompts}


def changed(settings: dict, default: dict) -> Groups:
    """The settings that differ from `default`, with their defaults."""
    values, usual = flat(settings), flat(default)
    different = {k: v for k, v in values.items() if v != usual.get(k)}
    return grouped(different, usual, prefix="config")


def grouped(
    values: dict[str, str],
    defaults: dict[str, str] | None = None,
    *,
    prefix: str = "",
) -> Groups:
    """{"model.depth": "2"} as {"config.model": [("depth", "2", its default)]}."""
    groups: Groups = {}
    for name, value in values.items():
        group, _, key = name.rpartition(".")
        # All groups of "mesh.rules" and the like stay under their first name.
        group, _, inner = group.partition(".")
        title = ".".join(part for part in (prefix, group) if part)
        default = defaults.get(name, "none") if defaults else None
        key = f"{inner}.{key}" if inner else key
        groups.setdefault(title, []).append((key, value, default))
    return groups


def flat(tree: dict, prefix: str = "") -> dict[str, str]:
    """{"model": {"depth": 2}} as {"model.depth": "2"}."""
    values = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{key}.")
        else:
            # An empty text has quotation marks, so that it is no gap on the page.
            plain = value if isinstance(value, str) and value else json.dumps(value)
            values[prefix + key] = "none" if value is None else plain
    return values


# --- helpers


def _frame(workdir, row, limit):
    step, path = row["step"], row.get("path", "")
    picture = _picture(workdir, path, _alt(row), limit)
    caption = f"step {step:,}" + ("" if picture else f": {path} does not exist")
    return f"step-{step}", picture, caption


def _alt(row):
    return f"Samples at step {row['step']:,}: {'; '.join(_prompts(row))}"


def _picture(workdir, path, alt, limit):
    """The picture, or None: only files of the run itself are shown."""
    # The path is read from metrics.jsonl, which may come from elsewhere: it must not
    # lead out of the run's folder.
    path = PurePosixPath(str(path))
    if path.is_absolute() or ".." in path.parts:
        return None
    try:
        return html_page.picture((workdir / path).read_bytes(), alt, limit=limit)
    except (OSError, ValueError, BadImage):  # ValueError: no name of a file
        return None


def _prompts(row):
    prompts = row.get("prompts")
    return [str(text) for text in prompts] if isinstance(prompts, list) else []


def _bar(entry):
    ends = (number_format.finite(entry.get(k), None) for k in ("low", "high"))
    return html_page.bar(number_format.finite(entry.get("score")), *ends)


def _median(values):
    values = [value for value in values if math.isfinite(value)]
    return median(values) if values else None
