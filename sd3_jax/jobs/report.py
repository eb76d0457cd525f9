"""One HTML page about a run: its scores, samples, curves and settings.

    python -m sd3_jax.main report --config=... --workdir=...

It reads metrics.jsonl, and what there is of config.json, run.json, scores.json and
samples.png: what the run did, whatever `config` says now. The page needs no other file.
"""

import json
import re
from datetime import UTC, datetime

from etils import epath
from ml_collections import ConfigDict

from configs import base
from sd3_jax import metrics
from sd3_jax.errors import UserError
from sd3_jax.report import page, sections, words
from sd3_jax.training import goodput


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Write workdir/report.html; print where, and the scores."""
    workdir = epath.Path(workdir)
    rows = metrics.read(workdir)
    if not rows:
        raise UserError(
            f"{workdir}: no {metrics.FILE} to report on; train first, or give the "
            "--workdir of a run"
        )
    settings, facts, scores = (
        _object(workdir / name) for name in ("config.json", "run.json", "scores.json")
    )
    default = base.get_config().to_dict()
    name = re.sub(r"^.*/|\.py\b", "", str(facts.get("recipe") or workdir.name))
    text = page.document(
        f"{name}: training report",
        sections.head(name, rows, settings, facts),
        sections.samples(workdir),
        sections.scores(scores),
        sections.training(rows),
        sections.validation(rows),
        sections.goodput(goodput.table(rows)),
        sections.samples_over_training(workdir, rows),
        sections.settings(settings, default, facts),
        page.element("footer", f"{workdir} · written {words.date(datetime.now(UTC))}"),
    )
    path = workdir / "report.html"
    metrics.write_whole(path, text.encode())
    print(path, *words.score_lines(scores), sep="\n")


def _object(path):
    """What a JSON file holds, or {} if there is none or it holds something else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
