"""The page of a vote's results, with the pictures of the clearest losses."""

import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sd3_jax.data.images import BadImage, read_bytes
from sd3_jax.reports import html_page, number_format
from sd3_jax.tools.votes import vote_results
from sd3_jax.tools.votes.picture_sources import PictureKey, Source
from sd3_jax.tools.votes.vote_results import Verdict

log = logging.getLogger(__name__)
LOSSES = 12  # pairs of each source
LIMIT = 60_000  # bytes of a picture on the page


def html(
    results: Mapping[str, Any],
    verdicts: Sequence[Verdict],
    sources: Mapping[str, Source],
    questions: Mapping[str, str],
    problems: Sequence[str],
) -> str:
    """The page as one file. Pairs whose pictures cannot be read are left out."""
    losses = {
        name: [
            figure
            for verdict in vote_results.clearest_losses(verdicts, name, LOSSES)
            if (figure := _figure(verdict, name, sources))
        ]
        for name in results["sources"]
    }
    figures = [
        ("votes", f"{results['votes']:,}", ""),
        ("voters", f"{results['voters']:,}", ""),
        ("prompts", f"{results['prompts']:,}", ""),
        ("pairs", f"{results['pairs']:,}", ""),
    ]
    sections = []
    for question, result in results["questions"].items():
        one = dict(results) | {"questions": {question: result}}
        bars = [
            (match, [(row, _bar(row["rate"])) for row in match["rates"]])
            for match in result["matches"]
        ]
        tables = [x for x in vote_results.tables(one) if "strength" in x.head]
        sections.append((question, questions.get(question, ""), bars, tables))
    return html_page.render(
        "votes.html",
        sources=results["sources"],
        figures=figures,
        sections=sections,
        cells=vote_results.rate_cells,
        facts=list(vote_results.facts(results)),
        losses={name: rows for name, rows in losses.items() if rows},
        problems=list(problems),
        date=number_format.date(datetime.now(UTC)),
    )


def _bar(rate):
    return html_page.bar(rate["score"], rate["low"], rate["high"]) if rate else None


def _figure(verdict: Verdict, loser: str, sources: Mapping[str, Source]):
    """(lost picture, winner's picture, winner, prompt, its votes, those against it)."""
    winner = verdict.second if verdict.first == loser else verdict.first
    sides = [verdict.outcomes["first"], verdict.outcomes["second"]]
    lost, won = sides if verdict.first == loser else sides[::-1]
    pictures = []
    for name in (loser, winner):
        source, key = sources.get(name), PictureKey(verdict.prompt, verdict.number)
        if source is None or key not in source.pictures:
            return None
        try:
            # The page is one file that can be mailed: pictures are data URLs.
            data, alt = read_bytes(source.pictures[key]), f"{name}: {verdict.prompt}"
            pictures.append(html_page.picture(data, alt, limit=LIMIT))
        except BadImage as error:
            log.warning("not on the page: %s", error)
            return None
    return *pictures, winner, verdict.prompt, lost, won
