"""A vote between pictures of several models: the page, its results, preferences.

    sd3-jax vote --workdir=DIR --config.vote.sources=runs/a,runs/b
    sd3-jax vote results --workdir=DIR
    sd3-jax vote export --workdir=DIR

After the human evaluation of the SD3 paper (section 5.3.2).
"""

import contextlib
import json
import logging
from typing import NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

from sd3_jax import files
from sd3_jax.data import prompt_sheet
from sd3_jax.data.prompt_sheet import PromptRow
from sd3_jax.distributed import lock, watchdog
from sd3_jax.errors import UserError
from sd3_jax.files import write_whole
from sd3_jax.foreign_text import shown
from sd3_jax.serving import extra
from sd3_jax.tools.votes import ballot_box, picture_sources, voters
from sd3_jax.tools.votes.picture_sources import Pair, Source

log = logging.getLogger(__name__)
FILE = "contest.json"  # what is compared, for `results` and `export`
RECORDS = "preferences"  # folder of `export`
LOGGED = 10  # pictures that are left out, of which the log names so many
PACKAGES = ("starlette", "uvicorn", "choix")
# The questions of the paper's human evaluation.
QUESTIONS = {
    "prompt": "Which image looks more representative to the text shown above and"
    " faithfully follows it?",
    "aesthetics": "Given the prompt, which image is of higher quality and aesthetically"
    " more pleasing?",
    "typography": "Which image more accurately shows the text specified in the"
    " description? Prefer accurate spelling; ignore other aspects.",
}


class Contest(NamedTuple):
    """What is compared: the sources, the prompts with categories, all pairs."""

    sources: list[Source]
    rows: list[PromptRow]
    pairs: list[Pair]
    problems: list[str]

    def by_name(self) -> dict[str, Source]:
        return {source.name: source for source in self.sources}


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Serve the page, or write results.json and votes.html, or preferences/."""
    if jax.process_count() > 1:
        raise UserError("vote runs in one process; unset SD3_NUM_PROCESSES")
    extra.require("vote", PACKAGES)
    watchdog.expect("votes", None)
    actions = {"serve": serve, "results": write_results, "export": export}
    actions[config.vote.do](config, epath.Path(workdir))


# --- the page


def serve(config: ConfigDict, workdir: epath.Path) -> None:
    """Answer voters until Ctrl-C or SIGTERM."""
    from sd3_jax.serving import http_server
    from sd3_jax.tools.votes import booth, vote_app, vote_server

    settings = config.vote
    contest = read_contest(config, workdir)
    # Two servers would count apart: each holds the counts of votes in memory.
    with lock.held(workdir, "vote"), contextlib.ExitStack() as stack:
        keep_contest(contest, workdir)
        box = stack.enter_context(contextlib.closing(ballot_box.BallotBox(workdir)))
        questions = {name: QUESTIONS[name] for name in settings.questions}
        options = dict(seed=config.seed, again=settings.again)
        polling = booth.Booth(contest.sources, contest.pairs, box, questions, **options)
        registered = voters.load(workdir, settings.voters)
        # Bound before the addresses are printed, as port 0 gets its number here.
        listener = http_server.bound_socket(settings.host, settings.port, "vote")
        app = vote_app.build_app(
            *(polling, registered),
            hosts=vote_server.allowed_hosts(settings.host),
            title="Which picture is better?",
        )
        announce(settings.host, listener.getsockname()[1], contest, registered)
        try:
            vote_server.serve(app, listener)
        except KeyboardInterrupt:
            note = "all votes are stored; run the same command to continue"
            raise KeyboardInterrupt(note) from None


def announce(host: str, port: int, contest: Contest, known: voters.Voters) -> None:
    """Print the addresses of the page."""
    names = ", ".join(source.name for source in contest.sources)
    print(f"{len(contest.pairs):,} pairs of {names}")
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    for name, token in known.tokens.items():
        print(f"  {name}: {address}/voter/{token}")
    print("ready at", address, flush=True)


# --- what is compared


def read_contest(config: ConfigDict, workdir: epath.Path) -> Contest:
    """The contest of the config, or that of an earlier `serve` in workdir."""
    settings = config.vote
    stored = read_stored(workdir)
    # `results` and `export` need no sources: those of `serve` are in contest.json.
    texts = list(settings.sources) or [f"{k}={v}" for k, v in stored[0].items()]
    if not texts:
        raise UserError(
            "config.vote.sources is empty; set two folders or more:"
            " --config.vote.sources=runs/a,runs/b"
        )
    rows = stored[1]
    if settings.prompts:
        path = epath.Path(settings.prompts).expanduser()
        name = f"config.vote.prompts = {path}"
        rows = prompt_sheet.read(path, name)
    elif settings.sources:
        rows = []
    sources = [
        picture_sources.read_source(name, folder, rows)
        for name, folder in picture_sources.named_folders(texts).items()
    ]
    pairs, problems = picture_sources.pairs(sources, rows)
    problems = [x for source in sources for x in source.problems] + problems
    for problem in problems[:LOGGED]:
        log.warning("left out: %s", shown(problem, 300))
    if problems:
        log.warning("%d pictures are left out or missing, see above", len(problems))
    return Contest(sources, rows, pairs, problems)


def read_stored(workdir: epath.Path) -> tuple[dict[str, str], list[PromptRow]]:
    """The sources and prompts that `serve` recorded; empty without them."""
    if not (workdir / FILE).is_file():
        return {}, []
    stored = files.read_object(workdir / FILE)
    try:
        rows = [PromptRow(*map(str, row)) for row in stored["prompts"]]
        return {str(k): str(v) for k, v in stored["sources"].items()}, rows
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{workdir / FILE}: not written by this version") from None


def keep_contest(contest: Contest, workdir: epath.Path) -> None:
    """Record the contest; UserError if a source's name stands for another folder."""
    before, _ = read_stored(workdir)
    now = {x.name: files.absolute(x.folder) for x in contest.sources}
    for name in before.keys() & now.keys():
        if before[name] != now[name]:
            raise UserError(
                f'{workdir}: its votes on "{shown(name)}" are about {before[name]}, not'
                f" {now[name]}; give the new folder another name, such as"
                f" {shown(name)}2={now[name]}, or use another workdir"
            )
    # Sources of earlier votes stay, since results are about them too.
    value = {"sources": before | now, "prompts": contest.rows}
    write_whole(workdir / FILE, json.dumps(value, indent=1).encode())


# --- results and preferences


def write_results(config: ConfigDict, workdir: epath.Path) -> None:
    """Write results.json and votes.html; print the tables."""
    from sd3_jax.tools.votes import results_page, vote_results

    votes = ballot_box.read_votes(workdir)
    contest = read_contest(config, workdir)
    results = vote_results.summary(votes, contest.rows, seed=config.seed)
    page = results_page.html(
        *(results, vote_results.verdicts(votes), contest.by_name()),
        *(QUESTIONS, contest.problems),
    )
    text = json.dumps(results | {"left_out": contest.problems}, indent=1)
    write_whole(workdir / "results.json", text.encode())
    write_whole(workdir / "votes.html", page.encode())
    for table in vote_results.tables(results):
        print(f"{table.caption}\n\n{table.markdown()}\n")
    print(*vote_results.facts(results), workdir / "votes.html", sep="\n")


def export(config: ConfigDict, workdir: epath.Path) -> None:
    """Write records of preferences and print the command that trains on them."""
    from sd3_jax.tools.votes import preference_export, vote_results

    votes = ballot_box.read_votes(workdir)
    contest = read_contest(config, workdir)
    verdicts = vote_results.verdicts(votes, config.vote.questions)
    # A lock of its own: an export may run beside the server.
    with lock.held(workdir, "vote-export"):
        exported = preference_export.write_preferences(
            *(verdicts, contest.by_name(), workdir / RECORDS),
            held_out=config.vote.held_out,
            seed=config.seed,
        )
    report = {"written": exported.written, "dropped": exported.dropped}
    report |= {"questions": list(config.vote.questions)}
    text = json.dumps(report, indent=1)
    write_whole(workdir / RECORDS / "export.json", text.encode())
    for split, count in exported.written.items():
        print(f"{count:,} pairs in {split}")
    for reason, count in exported.dropped.items():
        print(f"{count:,} pairs dropped: {reason}")
    shards = f"{workdir / RECORDS}"
    print(
        "sd3-jax train --config=configs/dpo.py --workdir=DIR \\",
        f"    --config.tune.base=BASE --config.data.records='{shards}/train-*' \\",
        f"    --config.data.held_out='{shards}/val-*'",
        sep="\n",
    )
