"""The voting page in Chromium: 20 pairs by keys, undo, zoom, a server that fails."""

import json
import threading
import time

import browser
import pytest
import uvicorn
from jobs.test_page_layout import BINARY, CONTRAST, PROBE, WINDOWS
from vote_folders import sample_folder

from sd3_jax.jobs.vote import QUESTIONS
from sd3_jax.serving import http_server
from sd3_jax.tools.votes import picture_sources, vote_app, voters
from sd3_jax.tools.votes.ballot_box import BallotBox, StorageFailed
from sd3_jax.tools.votes.booth import Booth

pytestmark = pytest.mark.skipif(
    BINARY is None, reason="no Chromium: apt-get install chromium, or set CHROMIUM"
)
PAIRS = 20
PROMPTS = [
    f"a fox, {i}, {'on a very long wooden table ' * (i % 7)}" for i in range(PAIRS)
]
ASKED = {name: QUESTIONS[name] for name in ("prompt", "aesthetics")}
HIDDEN = "document.getElementById('{}').hidden"
TEXT = "document.getElementById('{}').textContent"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser.running(BINARY, tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """(address, votes) of a server in a thread."""
    folder = tmp_path_factory.mktemp("votes")
    for name in "ab":
        sample_folder(folder / name, PROMPTS, side=64)
    named = picture_sources.named_folders([str(folder / name) for name in "ab"])
    sources = [picture_sources.read_source(k, x, []) for k, x in named.items()]
    pairs, _ = picture_sources.pairs(sources, [])
    box = BallotBox(folder / "votes")
    booth = Booth(sources, pairs, box, ASKED)
    app = vote_app.build_app(booth, voters.Voters({}), title="Which picture is better?")
    listener = http_server.bound_socket("127.0.0.1", 0, "vote")
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/", box
    server.should_exit = True
    thread.join()


def enter(chromium, address: str, name: str, *, width=1400, scheme="light") -> None:
    chromium.ask("Network.clearBrowserCookies")
    chromium.show(address, width=width, height=WINDOWS[width], scheme=scheme)
    chromium.wait_until(f"!{HIDDEN.format('enter')}")
    script = f"document.getElementById('name').value = {json.dumps(name)};"
    chromium.evaluate(script + "document.querySelector('#enter button').click()")
    chromium.wait_until(f"!{HIDDEN.format('ballot')}")


def press(chromium, box: BallotBox, key: str) -> None:
    """Press a key, and wait for its vote and for the page to take the next."""
    before = len(box.votes())
    state = f"{TEXT.format('step')} + {TEXT.format('prompt')}"
    shown = chromium.evaluate(state)
    chromium.press(key)
    chromium.wait_until(
        f"!busy && ({state} !== {json.dumps(shown)} || !{HIDDEN.format('over')})"
    )
    assert len(box.votes()) == before + 1


def test_twenty_pairs_by_keys(chromium, site):
    address, box = site
    enter(chromium, address, "anna")
    keys = ("1", "2", "0", "x", "ArrowLeft", "ArrowRight", "ArrowDown", "ArrowUp")
    for i in range(2 * PAIRS):
        press(chromium, box, keys[i % 8])
    assert not chromium.evaluate(HIDDEN.format("over"))
    assert chromium.evaluate(TEXT.format("count")) == f"{PAIRS} of {PAIRS}"
    votes = [vote for vote in box.votes() if vote.voter == "anna"]
    assert len({(vote.pair, vote.question) for vote in votes}) == 2 * PAIRS
    for i, vote in enumerate(votes):
        other = {"first": "second", "second": "first"}[vote.at_left]
        assert vote.winner == (vote.at_left, other, "tie", "bad")[i % 4]
    assert chromium.errors == []


def test_undo_shows_the_question_again(chromium, site):
    address, box = site
    enter(chromium, address, "ben")
    first = chromium.evaluate(TEXT.format("prompt"))
    press(chromium, box, "1")
    press(chromium, box, "2")
    count = len(box.votes())
    chromium.press("u")
    chromium.wait_until(f"{TEXT.format('status')} === 'The vote was taken back.'")
    assert chromium.evaluate(TEXT.format("prompt")) == first
    assert chromium.evaluate(TEXT.format("step")) == "2 of 2"
    assert len(box.votes()) == count - 1
    press(chromium, box, "0")
    assert box.votes()[-1].winner == "tie"


def test_a_click_enlarges_and_keys_do_not_vote_there(chromium, site):
    address, box = site
    enter(chromium, address, "cleo")
    count = len(box.votes())
    chromium.evaluate("document.querySelector('.frame').click()")
    large = "document.querySelector('#large img').src"
    left = chromium.evaluate(large)
    chromium.press("ArrowRight")
    chromium.wait_until(f"{large} !== {json.dumps(left)}")
    chromium.press("1")
    chromium.evaluate("document.getElementById('zoom').click()")
    assert not chromium.evaluate("document.getElementById('zoom').open")
    assert len(box.votes()) == count


def test_a_refused_vote_is_sent_again_until_it_is_stored(chromium, site, monkeypatch):
    address, box = site
    enter(chromium, address, "dora")
    cast, failures = box.cast, iter([1])

    def failing(vote):
        if next(failures, None):
            raise StorageFailed("database or disk is full")
        return cast(vote)

    monkeypatch.setattr(box, "cast", failing)
    before, prompt = len(box.votes()), chromium.evaluate(TEXT.format("prompt"))
    chromium.press("1")
    chromium.wait_until(f"{TEXT.format('status')}.startsWith('Not saved yet')")
    assert chromium.evaluate(TEXT.format("step")) == "1 of 2"
    assert chromium.evaluate(TEXT.format("prompt")) == prompt
    chromium.wait_until(f"{TEXT.format('step')} === '2 of 2'")
    assert len(box.votes()) == before + 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WINDOWS)
def test_a_pair_and_its_buttons_fit_one_screen(width, scheme, chromium, site, tmp_path):
    address, _ = site
    enter(chromium, address, f"w{width}{scheme}", width=width, scheme=scheme)
    time.sleep(0.2)  # the colours' transition
    seen = chromium.evaluate(PROBE)
    assert seen == dict(overflow=0, broken=[], unnamed=0, pale=[], wide=[]), CONTRAST
    bottom = "document.querySelector('.answers').getBoundingClientRect().bottom"
    assert chromium.evaluate(bottom) < WINDOWS[width]
    for side in "left", "right":
        box = f"document.querySelector('.frame[data-side={side}]')"
        size = chromium.evaluate(f"{box}.getBoundingClientRect().height")
        assert size > (500 if width == 1400 else 230)
