"""One HTML page about a run: its scores, samples, curves and settings.

    python -m sd3_jax.main report --config=... --workdir=...

It reads metrics.jsonl and, if they exist, config.json, run.json, scores.json and
samples.png of the run, not the present `config`. The page needs no other file.
"""

import json
import re
from datetime import UTC, datetime

from etils import epath
from ml_collections import ConfigDict

from configs import base
from sd3_jax import files
from sd3_jax.errors import UserError
from sd3_jax.monitoring import goodput, metrics
from sd3_jax.reports import html_page, number_format, run_sections


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Write workdir/report.html; print where, and the scores."""
    workdir = epath.Path(workdir)
    rows = metrics.read(workdir)
    if not rows:
        raise UserError(
            f"{workdir}: no {metrics.FILE} to report on; train first, or set --workdir"
            " to that of a run"
        )
    # All three are optional: the page says which are missing or not understood.
    unread: list[str] = []
    settings, facts, scores = (
        _object(workdir / name, unread)
        for name in ("config.json", "run.json", "scores.json")
    )
    unread += run_sections.misread(rows, settings, facts, scores)
    # The page shows where the run's settings differ from these.
    default = base.get_config().to_dict()
    # configs/sd3_2b.py:tiny → sd3_2b:tiny
    name = re.sub(r"^.*/|\.py\b", "", str(facts.get("recipe") or workdir.name))
    head, unmeasured = run_sections.head(name, rows, settings, facts)
    sheet, sheet_caption = run_sections.sheet(workdir, rows)
    score_tables = run_sections.scores(scores)
    shares = run_sections.goodput(goodput.table(rows))
    film = run_sections.film(workdir, rows)
    if not shares:
        unmeasured.append("goodput")
    missing = run_sections.missing(
        unmeasured,
        unread,
        sheet=sheet is not None,
        scores=bool(score_tables["rows"]),
        film=bool(film["frames"]),
        settings=bool(settings),
    )
    text = html_page.render(
        "report.html",
        **head,
        sheet=sheet,
        sheet_caption=sheet_caption,
        scores=score_tables,
        training=run_sections.training(rows),
        validation=run_sections.validation(rows),
        goodput=shares,
        film=film,
        changed=run_sections.changed(settings, default),
        settings=run_sections.grouped(run_sections.flat(settings), prefix="config"),
        facts=run_sections.grouped(run_sections.flat(facts)),
        missing=missing,
        workdir=workdir,
        date=number_format.date(datetime.now(UTC)),
    )
    path = workdir / "report.html"
    files.write_whole(path, text.encode())
    print(path, *number_format.score_lines(scores), sep="\n")


def _object(path, unread):
    """The object in a JSON file, or {} if there is none; adds a line to `unread` if the
    file is something else."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
        if isinstance(value, dict):
            run_sections.flat(value)  # what is nested too deeply fails here
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        unread.append(f"{path.name} is not understood: expected a JSON object.")
        return {}
    return value
