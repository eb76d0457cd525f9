"""Which pair a voter judges next: the one that fewest have judged."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from sd3_jax.tools.votes.ballot_box import Vote
from sd3_jax.tools.votes.picture_sources import Pair

# So that a repeat measures the judgement and not the memory.
APART = 10  # pairs between a pair and its repeat


class PairChoice:
    """Counts judgements, and chooses pairs by them.

    Of the pairs that a voter has not judged it takes those of the two sources that are
    compared least, of these those of the least judged prompt, then the least judged.
    Ties are broken by `seed` and the voter's name. A pair counts as judged by a voter
    once all `questions` are answered.

    With `again` > 0 that share of a voter's pairs is repeated, once each.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        questions: Sequence[str],
        *,
        seed: int = 0,
        again: float = 0.0,
    ):
        self.pairs, self.questions = list(pairs), tuple(questions)
        self.place = {pair.id: i for i, pair in enumerate(self.pairs)}
        self._seed, self._again = seed, again
        self._counts = np.zeros(len(self.pairs), np.int64)
        # Numbers of the two sources, and of these with the prompt, of each pair.
        self._matches = _numbered((x.first, x.second) for x in self.pairs)
        self._cells = _numbered((x.first, x.second, x.prompt) for x in self.pairs)
        # (voter, again) -> pair's id -> questions answered
        self._answers = defaultdict(lambda: defaultdict(set))
        self._broken = np.zeros(len(self.pairs), bool)
        # Without an order of their own, voters would see the same pairs first.
        self._orders: dict[str, np.ndarray] = {}

    def count(self, vote: Vote, step: int = 1) -> None:
        """Add a vote, or with step -1 remove it."""
        if vote.pair not in self.place or vote.question not in self.questions:
            return  # of an earlier configuration of the folder; results still have it
        # Sets and not numbers: a withdrawn answer is removed by its question.
        answered = self._answers[vote.voter, vote.again][vote.pair]
        (answered.add if step > 0 else answered.discard)(vote.question)
        # Repeats measure consistency and are no votes on the pair.
        if not vote.again:
            self._counts[self.place[vote.pair]] += step

    def drop(self, pair_id: str) -> None:
        """Offer a pair to nobody: one of its pictures cannot be shown."""
        self._broken[self.place[pair_id]] = True

    def judged(self, voter: str) -> int:
        """How many pairs a voter has judged, without repeats."""
        return len(self._judged(voter, 0))

    def total(self) -> int:
        return int(len(self.pairs) - self._broken.sum())

    def open_questions(self, voter: str, pair_id: str, again: int) -> tuple[str, ...]:
        answered = self._answers[voter, again].get(pair_id, ())
        return tuple(x for x in self.questions if x not in answered)

    def next(
        self, voter: str, skipped: Collection[tuple[str, int]], held: Iterable[str]
    ) -> tuple[Pair, int] | None:
        """The next (pair, again) of a voter; None at the end.

        `skipped` are those that the voter's page has, `held` the ids of pairs that
        other voters look at now.
        """
        for again in (0, 1):  # what a reload of the page interrupted
            for pair_id, answered in self._answers[voter, again].items():
                begun = 0 < len(answered) < len(self.questions)
                if begun and (pair_id, again) not in skipped and self._shows(pair_id):
                    return self.pairs[self.place[pair_id]], again
        if repeat := self._repeat(voter, skipped):
            return repeat, 1
        open_pairs = ~self._broken
        for pair_id in [*self._answers[voter, 0], *(x for x, a in skipped if not a)]:
            # An answer that was taken back leaves an empty entry.
            done = self._answers[voter, 0].get(pair_id) or (pair_id, 0) in skipped
            open_pairs[self.place[pair_id]] &= not done
        # A pair on another voter's page counts as if it were judged: otherwise all
        # voters get the same pair at the same time.
        counts = self._counts.copy()
        for pair_id, number in Counter(held).items():
            counts[self.place[pair_id]] += number * len(self.questions)
        chosen = np.flatnonzero(open_pairs)
        # From coarse to fine: each round keeps those whose group has the least votes.
        for group in (self._matches, self._cells, np.arange(len(counts))):
            if len(chosen):
                totals = np.bincount(group, weights=counts)[group[chosen]]
                chosen = chosen[totals == totals.min()]
        if not len(chosen):
            return None
        return self.pairs[chosen[np.argmin(self._order(voter)[chosen])]], 0

    def _shows(self, pair_id: str) -> bool:
        return not self._broken[self.place[pair_id]]

    def _judged(self, voter: str, again: int) -> list[str]:
        pairs = self._answers[voter, again].items()
        return [x for x, answered in pairs if len(answered) == len(self.questions)]

    def _repeat(self, voter: str, skipped) -> Pair | None:
        """A pair of the voter's to judge again, if it is time for one."""
        if not self._again:
            return None
        judged = self._judged(voter, 0)
        repeated = {x for x, a in skipped if a} | {*self._judged(voter, 1)}
        due = int(self._again * (len(judged) + sum(not a for _, a in skipped)))
        # `judged` is in order of judgement, because dicts keep the order of insertion.
        candidates = [
            x for x in judged[:-APART] if x not in repeated and self._shows(x)
        ]
        if len(repeated) >= due or not candidates:
            return None
        return self.pairs[self.place[candidates[0]]]

    def _order(self, voter: str) -> np.ndarray:
        """A rank for each pair that is random, but the voter's own."""
        if voter not in self._orders:
            rng = np.random.default_rng(_digest(self._seed, voter))
            self._orders[voter] = rng.permutation(len(self.pairs))
        return self._orders[voter]


def left_side(seed: int, voter: str, pair_id: str, again: int) -> str:
    """Which of "first" and "second" a voter sees at the left: a fair coin by hash."""
    # By hash and not drawn: a reload shows the pair as before, and `cast` knows the
    # sides.
    return ("first", "second")[_digest(seed, voter, pair_id, again) & 1]


def _numbered(keys: Iterable[tuple]) -> np.ndarray:
    numbers: dict[tuple, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def _digest(*parts) -> int:
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
