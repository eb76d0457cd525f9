"""The job `vote`: its server under kills, bad requests and full disks, its commands."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import jax
import pytest
from starlette.testclient import TestClient
from vote_folders import sample_folder

from sd3_jax import main
from sd3_jax.jobs.vote import QUESTIONS
from sd3_jax.tools.votes import ballot_box, picture_sources, vote_app, voters
from sd3_jax.tools.votes.ballot_box import BallotBox
from sd3_jax.tools.votes.booth import Booth

ROOT = Path(__file__).parents[2]
PROMPTS = [f"a picture of {i}" for i in range(100)]
ASKED = {name: QUESTIONS[name] for name in ("prompt", "aesthetics")}


def folders(tmp_path: Path, count: int, side: int = 16) -> str:
    names = ("base", "tuned")
    made = [sample_folder(tmp_path / x, PROMPTS[:count], side=side) for x in names]
    return ",".join(map(str, made))


@contextlib.contextmanager
def served(workdir: Path, sources: str, *flags: str):
    """A server in a process of its own: (process, address, lines that it printed)."""
    command = [sys.executable, "-m", "sd3_jax.main", "vote", f"--workdir={workdir}"]
    command += [f"--config.vote.sources={sources}", "--config.vote.port=0", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    pipe = dict(stdout=subprocess.PIPE, text=True, env=environment)
    with subprocess.Popen(command, **pipe) as process:
        lines = []
        try:
            while not lines or not lines[-1].startswith("ready at "):
                lines.append(process.stdout.readline().strip())
                assert process.poll() is None and lines[-1], lines
            yield process, lines[-1].removeprefix("ready at "), lines
        finally:
            process.kill()


def ask(address: str, path: str, body: dict | None = None, *, cookie: str = "") -> dict:
    request = urllib.request.Request(address + path, headers={"Cookie": cookie})
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


class Voter(threading.Thread):
    """Votes until the pairs or the server end; `acknowledged` are the server's."""

    def __init__(self, name: str, address: str, acknowledged: dict, pending: dict):
        super().__init__()
        self.voter, self.address = name, address
        self.acknowledged, self.pending = acknowledged, pending

    def run(self):
        with contextlib.suppress(OSError):  # the server is killed
            if self.pending:  # without an answer so far: the same request again
                self.send(dict(self.pending))
            while offers := self.get("/api/pairs?count=1")["pairs"]:
                for question in offers[0]["questions"]:
                    number = len(self.acknowledged)
                    body = dict(pair=offers[0]["pair"], again=0, question=question)
                    answer = ("left", "right", "tie", "bad")[number % 4]
                    id = f"{self.voter}{number}".encode().hex().ljust(32, "0")
                    self.send(body | dict(id=id, answer=answer))

    def get(self, path, body=None):
        return ask(self.address, path, body, cookie=f"voter={self.voter}")

    def send(self, body):
        self.pending.update(body)
        assert self.get("/api/votes", body)["saved"]
        self.acknowledged[body["id"]] = body
        self.pending.clear()


def test_a_killed_server_has_every_vote_that_it_acknowledged(tmp_path):
    """Two voters cast 100 votes each; kill -9 comes in between."""
    sources = folders(tmp_path, 50)
    acknowledged, pending = ({"anna": {}, "ben": {}} for _ in range(2))
    for turn in range(2):
        with served(tmp_path / "votes", sources) as (process, address, _):
            crowd = [
                Voter(name, address, acknowledged[name], pending[name])
                for name in acknowledged
            ]
            for voter in crowd:
                voter.start()
            while turn == 0 and sum(map(len, acknowledged.values())) < 70:
                crowd[0].join(0.01)
            if turn == 0:
                process.kill()
            for voter in crowd:
                voter.join()
            stored = ballot_box.read_votes(tmp_path / "votes")  # as kill -9 left them
            ids = {vote.id for vote in stored}
            for name, votes in acknowledged.items():
                assert votes.keys() <= ids
                # At most the vote that was under way has no answer.
                assert sum(x.voter == name for x in stored) - len(votes) in (0, 1)
            if turn == 1:
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0
    by_pair = Counter((x.voter, x.pair, x.question) for x in stored)
    assert len(by_pair) == by_pair.total() == 200
    # Sides are shuffled; the answer at a side became the source that was there.
    assert {x.at_left for x in stored} == {"first", "second"}
    for vote in stored:
        body = acknowledged[vote.voter][vote.id]
        side = {"left": vote.at_left, "tie": "tie", "bad": "bad"}.get(body["answer"])
        other = {"first": "second", "second": "first"}[vote.at_left]
        assert vote.winner == (side or other)


# --- the application


@pytest.fixture
def client(tmp_path):
    """A client of the application, which votes as anna; `client.box` has the votes."""
    named = picture_sources.named_folders(folders(tmp_path, 3).split(","))
    sources = [picture_sources.read_source(k, x, []) for k, x in named.items()]
    pairs, _ = picture_sources.pairs(sources, [])
    box = BallotBox(tmp_path / "votes")
    booth = Booth(sources, pairs, box, ASKED)
    app = vote_app.build_app(
        booth, voters.Voters({}), hosts=("127.0.0.1", "testserver"), title="Vote"
    )
    client = TestClient(app, raise_server_exceptions=False, cookies={"voter": "anna"})
    client.box, client.sources = box, sources
    return client


def offer(client) -> dict:
    return client.get("/api/pairs").json()["pairs"][0]


def body_for(client, **changes) -> dict:
    pair = offer(client)
    body = dict(id="0" * 32, pair=pair["pair"], again=0, question="prompt")
    return body | dict(answer="left") | changes


def test_a_picture_says_nothing_about_its_source(client):
    page = offer(client)
    for side in "left", "right":
        answer = client.get(page[side]["url"])
        assert answer.headers["content-type"] == "image/png"
        assert b"tEXt" not in answer.content and b"1234" not in answer.content
    text = json.dumps(page) + client.get("/").text
    assert "base" not in text.replace("base-uri", "") and "tuned" not in text


def test_undo_opens_the_question_again_and_keeps_the_row(client):
    body = body_for(client)
    assert client.post("/api/votes", json=body).json()["last"] == body["id"]
    state = client.post("/api/undo", json={"id": body["id"]}).json()
    assert state["pair"]["questions"] == ["prompt", "aesthetics"]
    assert state["last"] is None and state["judged"] == 0 and not client.box.votes()
    # The late repeat of the first request does not vote again.
    assert client.post("/api/votes", json=body).status_code == 200
    assert not client.box.votes()
    other = client.post("/api/undo", json={"id": "f" * 32})
    assert other.status_code == 404


def test_repeated_and_second_votes(client):
    body = body_for(client)
    assert [client.post("/api/votes", json=body).status_code for _ in range(3)] == [
        200
    ] * 3
    for changes in dict(answer="right"), dict(id="1" * 32):
        answer = client.post("/api/votes", json=body | changes)
        assert (answer.status_code, answer.json()["error"]["code"]) == (
            409,
            "already_voted",
        )
    assert len(client.box.votes()) == 1


@pytest.mark.parametrize(
    "changes, status, code",
    [
        (dict(id="x"), 400, "bad_id"),
        (dict(id=7), 400, "bad_id"),
        (dict(pair="0" * 16), 404, "unknown_pair"),
        (dict(pair=["a"]), 404, "unknown_pair"),
        (dict(again=True), 400, "bad_again"),
        (dict(again=1e300), 400, "bad_again"),
        (dict(question="typography"), 400, "unknown_question"),
        (dict(question={}), 400, "unknown_question"),
        (dict(answer="base"), 400, "bad_answer"),
        (dict(answer="\ud800"), 400, "bad_answer"),
        (dict(more=1), 400, "bad_fields"),
        (dict(answer="x" * 9000), 413, "too_large"),
    ],
)
def test_a_bad_vote_is_refused_and_not_stored(client, changes, status, code):
    text = json.dumps(body_for(client, **changes))
    headers = {"Content-Type": "application/json"}
    answer = client.post("/api/votes", content=text, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert not client.box.votes()


def test_other_bad_requests(client):
    post = lambda data, kind="application/json": client.post(
        "/api/votes", content=data, headers={"Content-Type": kind}
    )
    assert post(b"{}", "text/plain").status_code == 415  # a form of another site
    for data in b"", b"{", b"[" * 4000, b'{"id": NaN}', b"\xff\xfe", b"null":
        assert post(data).status_code == 400
    assert client.get("/api/votes").status_code == 405
    assert client.get("/api/pairs?count=1000000").status_code == 400
    assert client.get("/api/pairs?skip=%00:9&skip=..").status_code == 200
    assert client.get("/picture/..%2f..%2fvotes.sqlite.png").status_code == 404
    assert client.get(f"/picture/{'0' * 32}.png").status_code == 404
    assert client.get("/nothing").json()["error"]["message"] == "Not Found"
    # A name of another site that resolves to this host.
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    client.cookies.clear()
    assert client.get("/api/pairs").status_code == 401
    for name in "", "a" * 49, "<b>", 3, None, "\x00":
        assert client.post("/api/voter", json={"name": name}).status_code == 400


def test_a_full_disk_is_503_and_the_vote_counts_once_there_is_room(client):
    connection = client.box._connection
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    # Rows of this voter fill the last page; the vote that does not fit is refused.
    voter = "v" * 48
    client.cookies.set("voter", voter)
    client.box.cast(long_vote(voter))
    body = body_for(client)
    answer = client.post("/api/votes", json=body)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "10"
    assert answer.json()["error"]["code"] == "not_stored"
    assert offer(client)["questions"] == ["prompt", "aesthetics"]
    connection.execute("PRAGMA max_page_count = 100000")
    assert client.post("/api/votes", json=body).status_code == 200
    assert [x.id for x in client.box.votes()] == ["long", body["id"]]


def long_vote(voter: str) -> ballot_box.Vote:
    """A vote that leaves no room for another in its page of 4,096 bytes."""
    fields = ("pair", "p" * 3_850, 0, "a", "b", "prompt", 0, "tie", "first", 0.0)
    return ballot_box.Vote("long", voter, *fields)


def test_a_pair_whose_picture_breaks_is_left_out(client, caplog):
    first = client.sources[0]
    key = next(iter(first.pictures))
    first.pictures[key].write_bytes(b"<svg/>")
    pairs = client.get("/api/pairs?count=4").json()
    assert len(pairs["pairs"]) == pairs["total"] == 2
    assert key.prompt not in {x["prompt"] for x in pairs["pairs"]}
    assert "a pair is left out" in caplog.text


def test_a_voter_s_link_sets_the_cookie(client):
    known = voters.Voters({"anna": "a" * 32, "ben": "b" * 32})
    named = TestClient(vote_app.build_app(booth_of(client), known, title="Vote"))
    assert named.get("/api/pairs").status_code == 401
    assert named.get("/voter/wrong").status_code == 403
    assert named.post("/api/voter", json={"name": "anna"}).status_code == 403
    answer = named.get(f"/voter/{'b' * 32}", follow_redirects=False)
    assert answer.status_code == 303 and "HttpOnly" in answer.headers["set-cookie"]
    assert 'data-voter="ben"' in named.get("/").text
    assert named.get("/api/pairs").status_code == 200


def booth_of(client) -> Booth:
    return next(
        x.app.args[0] if hasattr(x.app, "args") else x.endpoint.args[0]
        for x in client.app.routes
        if getattr(x, "path", "") == "/api/pairs"
    )


# --- commands


def vote(*words: str, workdir: Path, capsys=None) -> int:
    return main.main(["vote", *words, f"--workdir={workdir}"])


def test_results_and_export_train_dpo(tmp_path, capsys):
    """From votes to a few steps of configs/dpo.py:digits, at a tiny size."""
    sources = folders(tmp_path, 12, side=8)
    named = picture_sources.named_folders(sources.split(","))
    read = [picture_sources.read_source(k, x, []) for k, x in named.items()]
    pairs, _ = picture_sources.pairs(read, [])
    box = BallotBox(tmp_path / "votes")
    for i, pair in enumerate(pairs):
        winner = "tie" if i == 3 else "second"
        fields = (*pair, "prompt", 0, winner, "first", 0.0)
        box.cast(ballot_box.Vote(f"{i:032x}", "anna", pair.id, *fields))
    box.close()
    flag = f"--config.vote.sources={sources}"
    assert vote("results", flag, workdir=tmp_path / "votes") == 0
    assert "| all | 0.0 % | 0.0 – 25.9 | 0 | 11 | 1 | 0 |" in capsys.readouterr().out
    results = json.loads((tmp_path / "votes/results.json").read_text())
    assert results["sources"] == ["base", "tuned"] and results["left_out"] == []
    page = (tmp_path / "votes/votes.html").read_text()
    assert "Clearest losses of base" in page and page.count("data:image/") == 22
    assert vote("export", flag, workdir=tmp_path / "votes") == 0
    printed = capsys.readouterr().out
    assert "9 pairs in train\n2 pairs in val\n1 pairs dropped: ties\n" in printed
    assert main.main(tiny_run("quickstart", tmp_path / "base")) == 0
    flags = re.findall(r"--config\.data\.\w+='[^']+'", printed)
    flags = [flag.replace("'", "") for flag in flags]
    assert len(flags) == 2
    flags += [f"--config.tune.base={tmp_path / 'base'}", "--config.tune.rank=2"]
    assert main.main(tiny_run("dpo.py:digits", tmp_path / "dpo", *flags)) == 0
    rows = (tmp_path / "dpo/metrics.jsonl").read_text().split("\n")
    losses = [json.loads(x)["loss"] for x in rows if '"kind": "train"' in x]
    # The adapter starts at zero, where both pictures' implicit rewards are 0.
    assert abs(losses[0] - math.log(2)) < 1e-3


def tiny_run(recipe: str, workdir: Path, *flags: str) -> list[str]:
    """A command that trains a tiny model on 8 x 8 pixels for two steps."""
    tiny = {
        **{"model.depth": 1, "model.width": 32, "model.num_heads": 2},
        **{"model.context_dim": 16, "model.pooled_dim": 16, "model.unroll": 1},
        **{"text.width": 16, "text.depth": 1, "text.num_heads": 2},
        **{"train.steps": 2, "train.log_every": 1, "eval.examples": 2},
        **{"train.eval_every": 9, "train.sample_every": 9, "checkpoint.every": 2},
        "data.batch_size": jax.device_count(),
    }
    recipe = recipe if ".py" in recipe else f"{recipe}.py"
    head = ["train", f"--config=configs/{recipe}", f"--workdir={workdir}"]
    return [*head, *(f"--config.{k}={v}" for k, v in tiny.items()), *flags]


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["exprt"], 'unexpected argument exprt; did you mean "export"?'),
        (["export", "now"], "unexpected argument now"),
        (["export", "--config.vote.do=serve"], "remove --config.vote.do"),
        ([], "config.vote.sources is empty"),
        (["results"], "no votes.sqlite; run `sd3-jax vote` first"),
        (
            ["--config.vote.prompts=/none.tsv"],
            "config.vote.prompts = /none.tsv: no such",
        ),
        (["--config.vote.sources=/none,/nor"], "no such folder"),
        (["--config.vote.questions=beauty"], "expected some of prompt, aesthetics"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, words, complaint):
    assert vote(*words, workdir=tmp_path) == 2
    assert complaint in capsys.readouterr().err


def test_a_name_keeps_its_folder(tmp_path, capsys):
    sources = folders(tmp_path, 2)
    (tmp_path / "votes").mkdir()
    stored = {"sources": {"base": "/elsewhere"}, "prompts": []}
    (tmp_path / "votes/contest.json").write_text(json.dumps(stored))
    assert vote(f"--config.vote.sources={sources}", workdir=tmp_path / "votes") == 2
    error = capsys.readouterr().err
    assert "are about /elsewhere, not" in error and "base2=" in error


def test_a_port_in_use_is_a_mistake(tmp_path, capsys):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        flags = [f"--config.vote.sources={folders(tmp_path, 2)}"]
        flags += [f"--config.vote.port={port}"]
        assert vote(*flags, workdir=tmp_path / "votes") == 2
    assert (
        f"config.vote.port = {port}: Address already in use" in capsys.readouterr().err
    )
