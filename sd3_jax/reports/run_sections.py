"""The report's sections; a sentence says which data is missing."""

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
NOTHING = html_page.Html("")
Row = dict[str, Any]


def head(name: str, rows: list[Row], settings: dict, facts: dict) -> str:
    """Title, what ran where and when, and the figures of the run."""
    model, train = settings.get("model", {}), settings.get("train", {})
    last = max(rows, key=lambda row: row["step"])
    # Every field may be missing or of another type: config.json is read as it is.
    total = f" of {train['steps']:,}" if isinstance(train.get("steps"), int) else ""
    devices = f"{facts['devices']} × " if "devices" in facts else ""
    lede = [
        model.get("name") and f"{model['name']}, depth {model.get('depth', '?')}",
        f"{last['step']:,}{total} steps",
        facts.get("device_kind") and f"{devices}{facts['device_kind']}",
        number_format.date(datetime.fromtimestamp(last["time"], UTC)),
    ]
    items, missing = _figures(rows, facts)
    return html_page.join(
        [
            html_page.element("p", "Training report", class_="eyebrow"),
            html_page.element("h1", name),
            html_page.element("p", " · ".join(filter(None, lede)), class_="lede"),
            html_page.stats(items),
            html_page.note(f"Not recorded: {', '.join(missing)}.")
            if missing
            else NOTHING,
        ]
    )


def _figures(rows, facts):
    """Label, value, unit of what was measured, and the labels of what was not."""
    # Medians: the first steps include compilation.
    middle = lambda name: _median(run_curves.series(rows, "train", name)[1])
    validation = [
        v for v in run_curves.series(rows, "val", "loss")[1] if math.isfinite(v)
    ]
    # Scores may be written days after the training.
    times = [row["time"] for row in rows if row["kind"] != "score"]
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
        ("time spent waiting for data", middle("data_wait"), number_format.percent),
        ("compute per device", middle("tflops_per_device"), number_format.tflops),
        ("model FLOPs utilization", middle("mfu"), number_format.percent),
    ]
    measured = [
        (n, *text(float(value))) for n, value, text in figures if value is not None
    ]
    return measured, [name for name, value, _ in figures if value is None]


def samples(workdir: epath.Path) -> str:
    """The contact sheet of the trained model."""
    picture = _image(workdir, "samples.png", "Samples after training", FINAL_BYTES)
    if not picture:
        return html_page.section(
            "Samples", html_page.note("There is no samples.png yet.")
        )
    return html_page.section(
        "Samples", html_page.element("figure", picture, class_="sheet")
    )


def scores(scores: dict) -> str:
    """Each score with its interval, and behind it each prompt's."""
    entries = number_format.entries(scores, "scores")
    if not entries:
        text = "There is no scores.json yet; the evaluate job writes it."
        return html_page.section("Scores", html_page.note(text))
    numbers = dict.fromkeys(("score", "95 % interval", "n"), "number")
    head = {"measure": "", "0 to 1": "bar", **numbers}
    table = [
        [
            str(entry.get("name", number_format.DASH)),
            _bar(entry),
            number_format.score(entry.get("score")),
        ]
        + [number_format.interval(entry), number_format.count(entry.get("n"))]
        for entry in entries
    ]
    return html_page.section(
        "Scores",
        html_page.note(number_format.scored_at(scores) + "."),
        html_page.table(head, table),
        _prompt_scores(number_format.entries(scores, "prompts")),
        _key_values("How they were measured", scores.get("settings")),
    )


def _prompt_scores(entries):
    if not entries:
        return ""
    # The worst prompts first: they are what a reader looks for.
    entries = sorted(
        entries, key=lambda e: (number_format.finite(e.get("score"), -1.0), str(e))
    )
    head = {"prompt": "", "split": "soft", "0 to 1": "bar"}
    head |= dict.fromkeys(("score", "n"), "number")
    table = [
        [str(entry.get("prompt", "")), str(entry.get("split", "")), _bar(entry)]
        + [number_format.score(entry.get("score")), number_format.count(entry.get("n"))]
        for entry in entries
    ]
    title = f"Every prompt, the worst first ({len(entries)})"
    return html_page.details(title, html_page.table(head, table))


def training(rows: list[Row]) -> str:
    """What every step logs."""
    curve = functools.partial(run_curves.over_steps, rows, "train")
    figures = [
        curve("Training loss", "loss"),
        curve("Gradient norm", "grad_norm", zero=True),
        curve("Learning rate", "lr", zero=True, smooth=False),
        curve("Throughput, images per second", "images_per_s", zero=True),
    ]
    return html_page.section("Training", html_page.panels(figures))


def validation(rows: list[Row]) -> str:
    """The held-out loss, over steps and over t, and scores that were measured often."""
    figures = [
        run_curves.over_steps(rows, "val", "Validation loss", "loss"),
        run_curves.by_t(rows),
    ]
    names = {name for row in rows if row["kind"] == "score" for name in row}
    for name in sorted(names):
        if (
            name not in metrics.HEAD
            and len(run_curves.series(rows, "score", name)[0]) > 1
        ):
            figures.append(run_curves.over_steps(rows, "score", f"Score: {name}", name))
    return html_page.section("Validation", html_page.panels(figures))


def goodput(kinds: list[tuple[str, float, float]]) -> str:
    """Where the time went: (kind, share, seconds) each, restarts included."""
    title = "Where the time went"
    if not kinds:
        return html_page.section(title, html_page.note("No goodput was logged."))
    head = {"kind": "", "0 to 1": "bar", "share": "number", "time": "number"}
    table = [
        [
            name,
            html_page.bar(share, 0.0, share),
            " ".join(number_format.percent(share)),
            " ".join(number_format.duration(seconds)),
        ]
        for name, share, seconds in kinds
    ]
    text = "Of the run's whole life. Lost is what a restart did again, or waited for."
    return html_page.section(title, html_page.note(text), html_page.table(head, table))


def samples_over_training(workdir: epath.Path, rows: list[Row]) -> str:
    """The grids drawn on the way, with their prompts."""
    title = "Samples over training"
    # Of a step that was sampled twice the later grid is the file that is there.
    rows = list({row["step"]: row for row in rows if row["kind"] == "samples"}.values())
    if not rows:
        return html_page.section(
            title, html_page.note("None were drawn during training.")
        )
    chosen = run_curves.evenly_spaced(rows, FRAMES)
    frames = [_frame(workdir, row, FILM_BYTES // len(chosen)) for row in chosen]
    few = f"{len(chosen)} of {len(rows)} grids. " if len(chosen) < len(rows) else ""
    lists = {tuple(_prompts(row)): row["step"] for row in chosen if _prompts(row)}
    prompts = []
    for texts, step in lists.items():
        which = "" if len(lists) == 1 else f" at step {step:,}"
        summary = f"The prompts{which}, row by row"
        prompts.append(
            html_page.details(summary, html_page.prompts(texts), open=len(texts) < 17)
        )
    text = (
        f"{few}All from the same noise. A click on a grid enlarges it, another ends it."
    )
    return html_page.section(
        title, html_page.note(text), html_page.film(frames), *prompts
    )


def settings(settings: dict, default: dict, facts: dict) -> str:
    """What the recipe changes in `default`, and behind it everything."""
    run = _key_values("Machine and software", facts)
    if not settings:
        text = "There is no config.json, so the settings are not known."
        return html_page.section("Settings", html_page.note(text), run)
    values, usual = _flat(settings), _flat(default)
    changed = [
        [name, value, usual.get(name, "")]
        for name, value in values.items()
        if value != usual.get(name)
    ]
    head = {"setting": "code", "this run": "code", "default": "code soft"}
    return html_page.section(
        "Settings",
        html_page.note("Where this run departs from configs/base.py."),
        html_page.table(head, changed),
        _key_values(f"All {len(values)} settings", settings),
        run,
    )


# --- helpers


def _frame(workdir, row, limit):
    step, path = row["step"], row.get("path", "")
    alt = f"Samples at step {step:,}: {'; '.join(_prompts(row))}"
    picture = _image(workdir, path, alt, limit)
    caption = f"step {step:,}" + ("" if picture else f": {path} is not there")
    return f"step-{step}", picture, caption


def _image(workdir, path, alt, limit):
    """The picture, or nothing: only files of the run itself are shown."""
    # The path is read from metrics.jsonl, which may come from elsewhere: it must not
    # lead out of the run's folder.
    path = PurePosixPath(str(path))
    if path.is_absolute() or ".." in path.parts:
        return NOTHING
    try:
        return html_page.image((workdir / path).read_bytes(), alt, limit=limit)
    except (OSError, ValueError, BadImage):  # ValueError: no name of a file
        return NOTHING


def _key_values(title, tree):
    if not tree:
        return ""
    table = html_page.table({"setting": "code", "value": "code"}, _flat(tree).items())
    return html_page.details(title, table)


def _flat(tree, prefix=""):
    """{"model": {"depth": 2}} as {"model.depth": "2"}; null is a dash."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            flat[prefix + key] = number_format.DASH if value is None else text
    return flat


def _prompts(row):
    prompts = row.get("prompts")
    return [str(text) for text in prompts] if isinstance(prompts, list) else []


def _bar(entry):
    ends = (number_format.finite(entry.get(k), None) for k in ("low", "high"))
    return html_page.bar(number_format.finite(entry.get("score")), *ends)


def _median(values):
    values = [value for value in values if math.isfinite(value)]
    return median(values) if values else None
