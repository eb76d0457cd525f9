"""From votes to training on the digits, by a scripted voter (votes.md).

    sd3-jax train --config=configs/quickstart.py --workdir=runs/quickstart
    python benchmarks/votes.py runs/quickstart runs/votes EARLY LATE [FLAGS]

Compares the run's checkpoints of two steps. The voter sees only what the page sends. A
digit reader judges the pictures; of a right and a wrong one the voter prefers the right
one with probability 0.8. Then it exports the votes, trains configs/dpo.py:digits from
the early checkpoint and compares again: other noise, and prompts that were held out.
"""

import io
import json
import secrets
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

from sd3_jax import main
from sd3_jax.data import digits
from sd3_jax.evaluation.digit_reader import matches
from sd3_jax.monitoring import metrics
from sd3_jax.tools.votes import picture_sources
from sd3_jax.tools.votes.preference_export import painted_pixels

TRUTH, PER_PROMPT, HELD_OUT, FRESH = 0.8, 12, 0.2, 50_000
SIZE = (8, 8)  # of a picture; files are enlarged by a whole factor
SCENES = {str(scene): scene for scene in digits.scenes("single", "train")}
DPO = "--config=configs/dpo.py:digits"


def run(*argv: str) -> None:
    assert main.main(list(argv)) == 0, argv


def is_right(prompt: str, image: np.ndarray) -> bool:
    return matches(SCENES[prompt], painted_pixels(image, SIZE))


def sample(workdir: Path, folder: Path, prompts: Path, *flags: str) -> None:
    """Sample from a run, and move the pictures to a folder of their own."""
    argv = ["sample", f"--workdir={workdir}", f"--config.sample.prompts_file={prompts}"]
    run(*argv, f"--config.sample.per_prompt={PER_PROMPT}", *flags)
    folder.mkdir(parents=True)
    for name in "samples", "samples.jsonl":
        shutil.move(workdir / name, folder / name)


def right_shares(folder: Path, chosen: set[str] | None = None) -> np.ndarray:
    """Whether each picture of a folder is right."""
    source = picture_sources.read_source(folder.name, folder, [])
    keys = [
        key for key in sorted(source.pictures) if not chosen or key.prompt in chosen
    ]
    read = lambda key: np.asarray(Image.open(source.pictures[key]).convert("RGB"))
    return np.array([is_right(key.prompt, read(key)) for key in keys])


# --- the voter


def ask(address: str, path: str, body: dict | None = None) -> bytes:
    headers = {"Cookie": "voter=script", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def vote(address: str) -> int:
    """Judge all pairs; how many votes that were."""
    rng, count = np.random.default_rng(0), 0
    look = lambda side: np.asarray(
        Image.open(io.BytesIO(ask(address, side["url"]))).convert("RGB")
    )
    while offers := json.loads(ask(address, "/api/pairs"))["pairs"]:
        pair = offers[0]
        left, right = (
            is_right(pair["prompt"], look(pair[x])) for x in ("left", "right")
        )
        answer = "tie" if left else "bad"
        if left != right:
            truthful = rng.random() < TRUTH
            answer = "left" if left == truthful else "right"
        body = dict(id=secrets.token_hex(16), pair=pair["pair"], again=0)
        ask(address, "/api/votes", body | dict(question="prompt", answer=answer))
        count += 1
    return count


def hold_vote(workdir: Path, sources: str) -> int:
    command = [sys.executable, "-m", "sd3_jax.main", "vote", f"--workdir={workdir}"]
    command += [f"--config.vote.sources={sources}", "--config.vote.questions=prompt"]
    command += ["--config.vote.port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        line = ""
        while not line.startswith("ready at "):
            line = server.stdout.readline()
        count = vote(line.split()[-1])
        server.terminate()
    return count


def expected_rate(early: np.ndarray, late: np.ndarray) -> float:
    """The win rate of the early checkpoint that the voter's rule implies."""
    only_early, only_late = (early & ~late).sum(), (late & ~early).sum()
    wins = TRUTH * only_early + (1 - TRUTH) * only_late
    return float(wins / (only_early + only_late))


def main_(base: str, workdir: str, early: str, late: str, *model: str) -> None:
    """Run everything, and write WORKDIR/figures.json."""
    folder, run_folder = Path(workdir), Path(base)
    folder.mkdir(parents=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(SCENES))
    quick = ("--config=configs/quickstart.py", *model)
    for name, step in ("early", early), ("late", late):
        sample(
            run_folder, folder / name, prompts, *quick, f"--config.sample.step={step}"
        )
    votes = folder / "votes"
    count = hold_vote(votes, f"{folder / 'early'},{folder / 'late'}")
    run("vote", "results", f"--workdir={votes}")
    flags = [f"--config.vote.held_out={HELD_OUT}", "--config.vote.questions=prompt"]
    run("vote", "export", f"--workdir={votes}", *flags)
    results = json.loads((votes / "results.json").read_text())
    (match,) = results["questions"]["prompt"]["matches"]
    shares = [right_shares(folder / name) for name in ("early", "late")]
    figures = {
        "votes": count,
        "right": dict(zip(("early", "late"), (float(x.mean()) for x in shares))),
        "expected win rate of early": expected_rate(*shares),
        "measured": match["rates"][0],
        "export": json.loads((votes / "preferences/export.json").read_text()),
    }
    # --- train, and score prompts that no preference was about, with fresh noise
    start = folder / "start"
    shutil.copytree(run_folder, start)
    for step in (start / "checkpoints").iterdir():
        if step.name.isdigit() and int(step.name) > int(early):
            shutil.rmtree(step)
    records = votes / "preferences"
    tuned = folder / "tuned"
    run(
        *("train", DPO, f"--workdir={tuned}", *model, f"--config.tune.base={start}"),
        f"--config.data.records={records}/train-*",
        f"--config.data.held_out={records}/val-*",
        *("--config.train.steps=60", "--config.train.log_every=10"),
        *("--config.data.batch_size=32", "--config.eval.examples=32"),
    )
    rows = [x for x in metrics.read(tuned) if x["kind"] == "train"]
    figures["accuracy"] = {x["step"]: x["accuracy"] for x in rows}
    fresh = f"--config.sample.seed={FRESH}"
    sample(start, folder / "before", prompts, *quick, fresh)
    sample(tuned, folder / "after", prompts, DPO, *model, fresh)
    decided = held_out_of(votes)
    for title, chosen in ("all prompts", None), ("held-out prompts", decided):
        before, after = (right_shares(folder / x, chosen) for x in ("before", "after"))
        figures[f"right, {title}"] = [float(before.mean()), float(after.mean())]
        figures[f"pictures, {title}"] = len(before)
    (folder / "figures.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))


def held_out_of(votes: Path) -> set[str]:
    """The prompts of the exported held-out split."""
    from sd3_jax.data import records, shards

    reader = shards.open_shard(str(next((votes / "preferences").glob("val-*"))))
    return {records.decode(x, "").caption for x in reader.read_all()}


if __name__ == "__main__":
    main_(*sys.argv[1:])
