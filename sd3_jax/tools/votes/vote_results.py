"""What the votes say: the content of results.json, and its tables."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from sd3_jax.data.prompt_sheet import PromptRow
from sd3_jax.reports.number_format import DASH
from sd3_jax.reports.text_table import Table
from sd3_jax.tools.votes import vote_statistics
from sd3_jax.tools.votes.ballot_box import WINNERS, Vote

ALL = "all"  # the row of all categories


class Verdict(NamedTuple):
    """The votes of all voters on one pair: how many of each outcome, over questions."""

    pair: str
    prompt: str
    number: int
    first: str
    second: str
    outcomes: Counter  # by WINNERS

    @property
    def margin(self) -> int:
        """Votes for the first less votes for the second."""
        return self.outcomes["first"] - self.outcomes["second"]


def summary(
    votes: Sequence[Vote], rows: Sequence[PromptRow], *, seed: int = 0
) -> dict[str, Any]:
    """results.json: for each question win rates, strengths and agreement.

    Repeats count in `consistency` alone. Prompts without a row have the category "".
    """
    names = sorted({name for vote in votes for name in (vote.first, vote.second)})
    questions = dict.fromkeys(vote.question for vote in votes)  # in the page's order
    first_time = [vote for vote in votes if not vote.again]
    category = {row.prompt: row.category for row in rows}
    by_question = {
        question: _question(
            [x for x in first_time if x.question == question], names, category, seed
        )
        for question in questions
    }
    return {
        "sources": names,
        # Repeats are no votes; "voters" and "pairs" are the same with and without them.
        "votes": len(first_time),
        "voters": len({vote.voter for vote in votes}),
        "prompts": len({vote.prompt for vote in votes}),
        "pairs": len({vote.pair for vote in votes}),
        "left": _rate("votes for the left side", *_sides(first_time)),
        "consistency": _consistency(votes),
        "questions": by_question,
    }


def verdicts(votes: Sequence[Vote], questions: Sequence[str] = ()) -> list[Verdict]:
    """The votes by pair, without repeats; `questions` limits them to these."""
    by_pair: dict[str, Verdict] = {}
    for vote in votes:
        if vote.again or (questions and vote.question not in questions):
            continue
        fields = (vote.pair, vote.prompt, vote.number, vote.first, vote.second)
        verdict = by_pair.setdefault(vote.pair, Verdict(*fields, Counter()))
        verdict.outcomes[vote.winner] += 1
    return list(by_pair.values())


def clearest_losses(all_verdicts: Sequence[Verdict], name: str, most: int):
    """Pairs that a source lost by most votes, the clearest first."""
    lost = lambda x: -x.margin if x.first == name else x.margin
    of_name = [x for x in all_verdicts if name in (x.first, x.second) and lost(x) > 0]
    # Of equal margins the unanimous ones, then in a fixed order.
    return sorted(of_name, key=lambda x: (-lost(x), x.outcomes.total(), x.pair))[:most]


def _question(votes, names, category: Mapping[str, str], seed: int) -> dict[str, Any]:
    by_match = defaultdict(list)
    for vote in votes:
        by_match[vote.first, vote.second].append(vote)
    # Sources are sorted in each pair (picture_sources.pairs), so (second, first) never
    # occurs.
    matches = []
    for first, second in combinations(names, 2):
        if not (match := by_match.get((first, second))):
            continue
        groups = defaultdict(list)
        for vote in match:
            groups[category.get(vote.prompt, "")].append(vote)
        # Without categories the one group would repeat the row of all.
        groups.pop("", None)
        rates = [_outcomes(k, x) for k, x in [(ALL, match), *sorted(groups.items())]]
        matches.append(dict(first=first, second=second, rates=rates))
    # Agreement over all four answers: "tie" and "bad" are values like the others.
    units = [(vote.pair, vote.winner) for vote in votes]
    alpha, count = vote_statistics.krippendorff_alpha(units)
    result: dict[str, Any] = dict(votes=len(votes), matches=matches)
    result["agreement"] = dict(krippendorff_alpha=alpha, pairs=count)
    # Of two sources the strengths say no more than the rate of wins.
    if len(names) > 2:
        result["strengths"] = _strengths(votes, names, seed)
    return result


def _outcomes(name: str, votes: Sequence[Vote]) -> dict[str, Any]:
    counts = Counter(vote.winner for vote in votes)
    outcomes = {winner: counts[winner] for winner in WINNERS}
    rate = _rate(name, counts["first"], counts["second"])
    return {"category": name} | outcomes | {"rate": rate}


def _rate(name: str, wins: int, losses: int) -> dict | None:
    rate = vote_statistics.win_rate(name, wins, losses)
    return rate and {k: x for k, x in rate.finite().items() if k != "name"}


def _strengths(votes, names, seed) -> list[dict[str, Any]]:
    outcomes = [(x.prompt, x.first, x.second, x.winner) for x in votes]
    wins = vote_statistics.win_matrix(outcomes, names)
    strengths = vote_statistics.bradley_terry(wins.sum(0))
    low, high = vote_statistics.strength_intervals(wins, seed=seed)
    rows = [
        dict(source=name, strength=float(s), low=float(a), high=float(b))
        for name, s, a, b in zip(names, strengths, low, high)
    ]
    return sorted(rows, key=lambda row: -row["strength"])


def _sides(votes: Sequence[Vote]) -> tuple[int, int]:
    decided = [vote for vote in votes if vote.winner in ("first", "second")]
    left = sum(vote.winner == vote.at_left for vote in decided)
    return left, len(decided) - left


def _consistency(votes: Sequence[Vote]) -> dict | None:
    """How often a voter gave a repeated pair the same answer."""
    key = lambda vote: (vote.voter, vote.pair, vote.question)
    before = {key(vote): vote.winner for vote in votes if not vote.again}
    # An answer of the first round that was withdrawn leaves nothing to compare with.
    repeats = [vote for vote in votes if vote.again and key(vote) in before]
    same = [before[key(vote)] == vote.winner for vote in repeats]
    return _rate("the same answer again", sum(same), len(same) - sum(same))


# --- tables


def tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """Tables of a summary, for a terminal and for the page."""
    for question, result in results["questions"].items():
        for match in result["matches"]:
            head = ("category", f"{match['first']} wins", "95 %", "wins", "losses")
            lines = [
                (x["category"], *rate_cells(x["rate"]), str(x["first"]))
                + (str(x["second"]), str(x["tie"]), str(x["bad"]))
                for x in match["rates"]
            ]
            caption = f"{question}: {match['first']} against {match['second']}"
            yield Table(caption, (*head, "ties", "both bad"), lines)
        if strengths := result.get("strengths"):
            interval = "{low:+.2f} – {high:+.2f}".format_map
            lines = [
                (x["source"], f"{x['strength']:+.2f}", interval(x)) for x in strengths
            ]
            caption = f"{question}: Bradley–Terry strengths"
            yield Table(caption, ("source", "strength", "95 %"), lines)


def rate_cells(rate: Mapping[str, float] | None) -> tuple[str, str]:
    """A rate and its interval in percent; dashes without decided votes."""
    if rate is None:
        return DASH, DASH
    return (
        f"{100 * rate['score']:.1f} %",
        f"{100 * rate['low']:.1f} – {100 * rate['high']:.1f}",
    )


def facts(results: Mapping[str, Any]) -> Iterator[str]:
    """Sentences about the voters, for a terminal and for the page."""
    for question, result in results["questions"].items():
        alpha, count = result["agreement"].values()
        if count:
            value = "undefined (equal answers)" if alpha is None else f"{alpha:.2f}"
            yield (
                f"{question}: agreement of voters (Krippendorff's alpha) {value}, on"
                f" {count:,} pairs that two or more voters judged."
            )
    for label, rate in (
        ("Decided votes for the left side", results["left"]),
        ("Repeated pairs with the same answer", results["consistency"]),
    ):
        if rate:
            share, interval = rate_cells(rate)
            yield f"{label}: {share} (95 %: {interval}, n = {rate['n']:,})."
