"""From votes to training on the digits, by a scripted voter (votes.md).

    sd3-jax train --config=configs/quickstart.py --workdir=runs/quickstart
    python benchmarks/votes.py runs/quickstart runs/votes [FLAGS of train]

Two sources draw digits from scans; one errs more often, by drawing another digit. The
voter sees only what the page sends and reads the digits. Of a right and a wrong picture
it prefers the right one with probability 0.8. Then the votes are exported and
configs/dpo.py:digits trains on them from the run's newest checkpoint.
"""

import io
import json
import secrets
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

from sd3_jax import main, pictures
from sd3_jax.data import digits
from sd3_jax.data.digits import Digits, Scene, Thing
from sd3_jax.evaluation.digit_reader import matches
from sd3_jax.monitoring import metrics
from sd3_jax.tools.votes.preference_export import painted_pixels

SIZE = (8, 8)  # of a picture; files are enlarged by a whole factor, as by `sample`
PER_PROMPT, TRUTH, HELD_OUT = 16, 0.8, 0.2
ERRORS = {"early": 0.5, "late": 0.15}  # shares of wrong digits
SCENES = {str(scene): scene for scene in digits.scenes("single", "train")}


def draw_source(folder: Path, error: float, rng: np.random.Generator) -> None:
    """A folder as the `sample` job leaves it, of scans of digits."""
    canvas, lines = Digits(*SIZE), []
    scans = [x for x in zip(*digits.scans(held_out=False))]
    for prompt, scene in SCENES.items():
        (asked,) = scene.things
        for number in range(PER_PROMPT):
            others = [d for d in range(10) if d != asked.digit]
            digit = int(rng.choice(others)) if rng.random() < error else asked.digit
            inks = [ink for ink, label in scans if label == digit]
            shown = Scene("single", (Thing(asked.colour, digit),))
            image = canvas.compose(shown, [inks[rng.integers(len(inks))]])
            name = f"samples/{len(lines):04d}.png"
            pictures.save_png(pictures.enlarged(image), folder / name)
            line = dict(file=name, prompt=prompt, number=number, seed=0)
            line |= dict(settings=dict(zip(("height", "width"), SIZE)))
            lines.append(json.dumps(line) + "\n")
    (folder / "samples.jsonl").write_text("".join(lines))


def is_right(prompt: str, image: np.ndarray) -> bool:
    return matches(SCENES[prompt], painted_pixels(image, SIZE))


def right_pictures(folder: Path) -> np.ndarray:
    lines = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
    read = lambda line: np.asarray(Image.open(folder / line["file"]).convert("RGB"))
    return np.array([is_right(line["prompt"], read(line)) for line in lines])


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
    """The win rate of the early source that the voter's rule implies."""
    only_early, only_late = (early & ~late).sum(), (late & ~early).sum()
    wins = TRUTH * only_early + (1 - TRUTH) * only_late
    return float(wins / (only_early + only_late))


# --- all of it


def run(*argv: str) -> None:
    assert main.main(list(argv)) == 0, argv


def benchmark(base: str, workdir: str, *flags: str) -> None:
    """Vote, export, train; write WORKDIR/figures.json."""
    folder, rng = Path(workdir), np.random.default_rng(0)
    for name, error in ERRORS.items():
        draw_source(folder / name, error, rng)
    votes = folder / "votes"
    count = hold_vote(votes, ",".join(str(folder / name) for name in ERRORS))
    run("vote", "results", f"--workdir={votes}")
    export = [f"--config.vote.held_out={HELD_OUT}", "--config.vote.questions=prompt"]
    run("vote", "export", f"--workdir={votes}", *export)
    results = json.loads((votes / "results.json").read_text())
    (match,) = results["questions"]["prompt"]["matches"]
    shares = [right_pictures(folder / name) for name in ERRORS]
    figures = {
        "votes": count,
        "right": dict(zip(ERRORS, (float(x.mean()) for x in shares))),
        "expected win rate of early": expected_rate(*shares),
        "measured": match["rates"][0],
        "left": results["left"],
        "export": json.loads((votes / "preferences/export.json").read_text()),
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=1))
    records, tuned = votes / "preferences", folder / "dpo"
    run(
        *("train", "--config=configs/dpo.py:digits", f"--workdir={tuned}"),
        f"--config.tune.base={base}",
        f"--config.data.records={records}/train-*",
        f"--config.data.held_out={records}/val-*",
        *flags,
    )
    rows = list(metrics.read(tuned))
    figures["accuracy"] = {x["step"]: x["accuracy"] for x in rows if "accuracy" in x}
    (folder / "figures.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    benchmark(*sys.argv[1:])
