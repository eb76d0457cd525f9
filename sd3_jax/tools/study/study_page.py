"""A study on one HTML page, and its plots as files."""

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
from etils import epath

from sd3_jax.reports import html_page, inline_svg, number_format, plots
from sd3_jax.tools.study import study_tables as tables

FITTED = "fitted"


def html(results: Sequence[dict], workdir: epath.Path) -> str:
    ranked = tables.ranks(results)
    every = [steps for steps, _ in tables.samplers(results)]
    most = max(row["all"] for row in ranked)
    extremes = {"few": every[0], "many": every[-1]} if every[0] != every[-1] else {}
    ranks = [
        (
            *(r["variant"], f"{r['all']:.2f}", html_page.Bar(0, r["all"] / most)),
            *(f"{r[extreme]:.2f}" for extreme in extremes),
        )
        for r in ranked
    ]
    columns = [("variant", "code"), ("mean rank", "number"), ("", "bar")]
    columns += [(f"{steps} steps", "number") for steps in extremes.values()]
    # The first table is that of ranks, which the page shows with bars.
    _, *contents = tables.contents(results)
    return html_page.render(
        "study.html",
        variants=len(ranked),
        runs=len(results),
        best=ranked[0]["variant"],
        ranks=ranks,
        rank_columns=columns,
        panels=panels(results),
        tables=contents,
        workdir=workdir,
        date=number_format.date(datetime.now(UTC)),
    )


def figures(results: Sequence[dict]) -> dict[str, str]:
    """Plots by the names of their files, as in the page."""
    # Titles become names of files.
    name = lambda title: title.lower().replace(" ", "_")
    return {
        name(title): inline_svg.standalone(svg) for title, svg, _ in panels(results)
    }


def panels(results: Sequence[dict]) -> list[html_page.Panel]:
    first = tables.ranks(results)[0]["variant"]
    weights = results[0]["scores"][0]["weights"]
    _, cfg = tables.middle(results)
    drawn = [
        ("Score over steps", *over_steps(results, "score", cfg, weights, first)),
        ("FID over steps", *over_steps(results, "fid", cfg, weights, first)),
        ("Score and FID", *plane(results, weights, first)),
    ]
    # Losses of different targets share no axis.
    if tables.comparable(results):
        drawn += [
            ("Loss over FLOPs", *over_flops(results, first)),
            ("Loss by t", *by_t(results, first)),
            ("Loss and score", *against(results, weights, first)),
        ]
    return [html_page.Panel(*panel) for panel in drawn]


def over_steps(results, kind, cfg, weights, first) -> tuple[str, str]:
    lines = {}
    for name in tables.names(tables.best(results)):
        steps = [n for n, c in tables.samplers(results) if c == cfg]
        rows = [tables.scores(results, (n, cfg), weights) for n in steps]
        lines[name] = steps, [pick(x, name)[kind] for x in rows]
    label = {"score": "score", "fid": "FID"}[kind]
    drawn = plots.curves(lines, "sampling steps", label, log="x", first=first)
    return drawn, f"Guidance {cfg:g}, mean over seeds (paper, Figure 3)."


def plane(results, weights, first) -> tuple[str, str]:
    rows = tables.scores(results, tables.middle(results), weights)
    # A point for each variant: a curve of one.
    points = {r["variant"]: ([r["score"]], [r["fid"]]) for r in rows}
    steps, cfg = tables.middle(results)
    drawn = plots.curves(points, "score", "FID", joined=False, first=first)
    return drawn, f"At {steps} steps and guidance {cfg:g}: best is right and low."


def over_flops(results, first) -> tuple[str, str]:
    lines: dict[str, tuple] = dict(tables.points(results))
    caption = "Each mark is a validation, mean over seeds."
    # The law is drawn only where the variants differ in size.
    if law := tables.law(results):
        every = np.concatenate([x for x, _ in lines.values()])
        x = np.geomspace(every.min(), every.max(), 40)
        lines[FITTED] = x, law(x)
        caption = f"Fitted to the least loss: {law}."
    axes = "training FLOPs", "validation loss"
    drawn = plots.curves(lines, *axes, log="xy", first=first, unmarked=FITTED)
    return drawn, caption


def by_t(results, first) -> tuple[str, str]:
    lines = {}
    for name in tables.names(tables.best(results)):
        mine = tables.of(tables.best(results), name)
        last = [x["validation"][-1] for x in mine]
        # k[6:] is what follows "loss_t".
        times = sorted(float(k[6:]) for k in last[0] if k.startswith("loss_t"))
        lines[name] = (
            times,
            [np.mean([x.get(f"loss_t{t:g}", np.nan) for x in last]) for t in times],
        )
    drawn = plots.curves(
        lines, "t (0 is data, 1 is noise)", "validation loss", first=first
    )
    return drawn, "At the end of training."


def against(results, weights, first) -> tuple[str, str]:
    points = {}
    sampler = tables.middle(results)
    for name in tables.names(results):
        rows = tables.scored(tables.of(results, name), sampler, weights)
        points[name] = tuple(zip(*((x["loss"], s["score"]) for x, s in rows)))
    by_kind = tables.correlations(results, weights)
    words = ", ".join(f"{name} {value:+.2f}" for name, value in by_kind.items())
    drawn = plots.curves(points, "validation loss", "score", joined=False, first=first)
    return drawn, f"Every run; rank correlation of the loss with {words}."


def pick(rows: Sequence[dict], name: str) -> dict:
    return next(row for row in rows if row["variant"] == name)
