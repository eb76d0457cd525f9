"""A vote in progress: the pairs that voters' pages show, and the votes they send."""

import hmac
import io
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from sd3_jax.data.images import BadImage, read_own
from sd3_jax.tools.votes.ballot_box import BallotBox, Conflict, Vote
from sd3_jax.tools.votes.pair_choice import PairChoice, left_side
from sd3_jax.tools.votes.picture_sources import Pair, Source

log = logging.getLogger(__name__)
ANSWERS = ("left", "right", "tie", "bad")
# The page draws the id, so that it can repeat a request whose answer was lost.
ID = re.compile(r"[0-9a-f]{32}")
CACHED = 32  # encoded pictures, about 1.5 MB each at 1024 x 1024
HELD = 300.0  # seconds that a pair counts as being looked at


class Refused(Exception):
    """A request that cannot be answered; `code` is for programs."""

    def __init__(self, message: str, code: str, status: int = 400):
        super().__init__(message)
        self.code, self.status = code, status


class Shown(NamedTuple):
    """A picture as a page gets it: PNG without metadata, which would name the model."""

    png: bytes
    width: int
    height: int


class Booth:
    """Hands out pairs and stores votes. Threads may share it."""

    def __init__(
        self,
        sources: Sequence[Source],
        pairs: Sequence[Pair],
        box: BallotBox,
        questions: Mapping[str, str],
        *,
        seed: int = 0,
        again: float = 0.0,
    ):
        self.questions, self._seed, self._box = dict(questions), seed, box
        self._sources = {source.name: source for source in sources}
        # Reentrant, because `offers` holds it while _load takes it.
        self._lock = threading.RLock()
        self._choice = PairChoice(pairs, [*questions], seed=seed, again=again)
        self._paths: dict[str, Any] = {}  # by the token of a picture's address
        self._cache: OrderedDict[str, Shown] = OrderedDict()
        self._held: dict[str, tuple[float, list[str]]] = {}
        # A restarted server continues with the counts of the votes on disk.
        for vote in box.votes():
            self._choice.count(vote)

    # --- what a page shows

    def offers(
        self, voter: str, skipped: Collection[tuple[str, int]], count: int
    ) -> dict:
        """At most `count` pairs beside those that the page has, and the progress."""
        with self._lock:
            place = self._choice.place
            # A page that stays open over a restart may name pairs that no longer exist.
            skipped = {(pair, again) for pair, again in skipped if pair in place}
            offers = []
            while len(offers) < count:
                chosen = self._choice.next(voter, skipped, self._others_hold(voter))
                if chosen is None:
                    break
                skipped.add((chosen[0].id, chosen[1]))
                if offer := self._offer(voter, *chosen):
                    offers.append(offer)
            # Repeats are not counted: no other voter needs them.
            first_time = [pair for pair, again in skipped if not again]
            self._held[voter] = time.monotonic(), first_time
            return {"pairs": offers} | self._progress(voter)

    def picture(self, token: str) -> bytes:
        """The PNG of a picture's address; Refused if it is none that was handed out."""
        path = self._paths.get(token)
        if path is None:
            raise Refused("no such picture", "unknown_picture", 404)
        try:
            return self._load(token, path).png
        except BadImage:
            raise Refused("the picture cannot be read", "bad_picture", 404) from None

    # --- what a page sends

    def cast(
        self, voter: str, *, id: str, pair: str, again: int, question: str, answer: str
    ) -> dict:
        """Store an answer; returns the progress once it is on disk.

        The same id with the same content is stored once. Refused if the pair or the
        question is unknown, or for a second answer; StorageFailed as BallotBox.cast.
        """
        if not isinstance(id, str) or not ID.fullmatch(id):
            raise Refused("id: expected 32 hexadecimal digits", "bad_id")
        if type(again) is not int or again not in (0, 1):
            raise Refused("again: expected 0 or 1", "bad_again")
        if not isinstance(pair, str) or pair not in self._choice.place:
            raise Refused("pair: not one of this vote", "unknown_pair", 404)
        if not isinstance(question, str) or question not in self.questions:
            raise Refused("question: not one of this vote", "unknown_question")
        if not isinstance(answer, str) or answer not in ANSWERS:
            raise Refused(f"answer: expected one of {', '.join(ANSWERS)}", "bad_answer")
        # Computed again and not read from the request: a page cannot choose its sides.
        at_left = left_side(self._seed, voter, pair, again)
        at_right = "second" if at_left == "first" else "first"
        winner = {"left": at_left, "right": at_right}.get(answer, answer)
        fields = self._choice.pairs[self._choice.place[pair]]
        about = (question, again, winner, at_left, time.time())
        # One lock for the box and the counts: two voters at once are both counted.
        with self._lock:
            vote = Vote(id, voter, pair, *fields, *about)
            try:
                stored = self._box.cast(vote)
            except Conflict as error:
                raise Refused(str(error), "already_voted", 409) from None
            if stored:
                self._choice.count(vote)
            return {"saved": True} | self._progress(voter)

    def undo(self, voter: str, vote_id: str) -> dict:
        """Take back a vote; its pair, with that question open again."""
        if not isinstance(vote_id, str) or not ID.fullmatch(vote_id):
            raise Refused("id: expected 32 hexadecimal digits", "bad_id")
        with self._lock:
            withdrawn = self._box.withdraw(voter, vote_id)
            if withdrawn is None:
                raise Refused("no such vote of this voter", "unknown_vote", 404)
            vote, counted = withdrawn
            if counted:
                self._choice.count(vote, -1)
            place = self._choice.place.get(vote.pair)
            pair = None if place is None else self._choice.pairs[place]
            offer = pair and self._offer(voter, pair, vote.again)
            return {"pair": offer} | self._progress(voter)

    # --- parts

    def _progress(self, voter: str) -> dict:
        return {
            "judged": self._choice.judged(voter),
            "total": self._choice.total(),
            "last": self._box.last_id(voter),
        }

    def _others_hold(self, voter: str) -> list[str]:
        now = time.monotonic()
        recent = {k: x for k, x in self._held.items() if now - x[0] < HELD}
        self._held = recent
        return [pair for k, x in recent.items() if k != voter for pair in x[1]]

    def _offer(self, voter: str, pair: Pair, again: int) -> dict | None:
        """A pair as JSON; None, and never again, if a picture of it is unreadable."""
        at_left = left_side(self._seed, voter, pair.id, again)
        names = [pair.first, pair.second][:: 1 if at_left == "first" else -1]
        try:
            left, right = (self._address(name, pair) for name in names)
        except BadImage as error:
            log.warning("a pair is left out: %s", error)
            self._choice.drop(pair.id)
            return None
        return {
            "pair": pair.id,
            "again": again,
            "prompt": pair.prompt,
            "questions": self._choice.open_questions(voter, pair.id, again),
            "left": left,
            "right": right,
        }

    def _address(self, name: str, pair: Pair) -> dict:
        path = self._sources[name].pictures[pair.key]
        # Keyed, as anyone could compute a plain hash of the source's name.
        text = "\0".join((name, pair.prompt, str(pair.number))).encode()
        token = hmac.digest(self._box.secret, text, "sha256").hex()[:32]
        shown = self._load(token, path)
        self._paths[token] = path
        size = {"width": shown.width, "height": shown.height}
        return {"url": f"/picture/{token}.png"} | size

    def _load(self, token: str, path) -> Shown:
        with self._lock:
            if token in self._cache:
                self._cache.move_to_end(token)
                return self._cache[token]
        # Outside of the lock: decoding takes long, and twice now and then is cheaper
        # than a queue of voters.
        pixels, _ = read_own(path)
        buffer = io.BytesIO()
        # The lowest level: a tenth larger than the default, in a fraction of the time.
        Image.fromarray(pixels).save(buffer, "png", compress_level=1)
        shown = Shown(buffer.getvalue(), pixels.shape[1], pixels.shape[0])
        with self._lock:
            self._cache[token] = shown
            while len(self._cache) > CACHED:
                self._cache.popitem(last=False)
        return shown
