"""One page of each kind, filled as real runs fill it, for tests that look at pages."""

import json
import sys
from pathlib import Path

import numpy as np
from etils import epath
from example_run import PROMPTS, draw, make_run

from configs import base
from sd3_jax import pictures
from sd3_jax.data.prompt_sheet import PromptRow
from sd3_jax.data.records import Record
from sd3_jax.jobs import report
from sd3_jax.jobs.vote import QUESTIONS
from sd3_jax.monitoring import metrics
from sd3_jax.reports import html_page, parity_page
from sd3_jax.tools.benchmark import benchmark_html
from sd3_jax.tools.dedup import dedup_page
from sd3_jax.tools.explore import exploration, explore_page
from sd3_jax.tools.inspect import inspect_page
from sd3_jax.tools.study import study_page
from sd3_jax.tools.votes import picture_sources, results_page, vote_results
from sd3_jax.tools.votes.ballot_box import Vote
from sd3_jax.tools.votes.picture_sources import PictureKey, Source

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import dedup as photographs  # noqa: E402

LONG = "a photograph of " + "a very long list of things on a wooden table, " * 12


def write_report(folder: Path) -> Path:
    make_run(folder)
    report.run(base.get_config(), str(folder))
    return folder / "report.html"


def write_young_report(folder: Path) -> Path:
    """Of a run that has just begun: no pictures, no scores, no settings."""
    with metrics.Metrics(folder, total_steps=10) as log:
        log.write(1, "train", {"loss": 1.0})
    report.run(base.get_config(), str(folder))
    return folder / "report.html"


def write_samples(folder: Path) -> Path:
    settings = dict(steps=28, solver="euler", cfg=4.5, width=256, height=256)
    lines = []
    for i, image in enumerate(draw(0.0, n=11, size=64)):
        name = f"samples/{i:04}.png"
        pictures.save_png(image, folder / name)
        prompt = PROMPTS[i % 6] if i else LONG
        line = dict(file=name, prompt=prompt, seed=i, weights="5b7c19aa0e4f")
        lines.append(line | {"settings": settings})
    lines[3]["filtered"] = "nudity"
    return written(
        folder / "samples.html", html_page.render("samples.html", lines=lines)
    )


def write_one_sample(folder: Path) -> Path:
    path = write_samples(folder)
    settings = dict(steps=1, solver="euler", cfg=4.5, width=256, height=256)
    line = dict(file="samples/0001.png", prompt=PROMPTS[0], seed=1, weights="5b7c19aa")
    page = html_page.render("samples.html", lines=[line | {"settings": settings}])
    return written(path, page)


def photos(count: int) -> list[np.ndarray]:
    return photographs.crops(photographs.photographs("portrait"), count, seed=3)[0]


def write_inspection(folder: Path) -> Path:
    contacts, buckets = [], [("512x512", "9,120", 0.76, "0.412")]
    buckets += [("448x576", "2,400", 0.2, "0.408"), ("640x384", "480", 0.04, "0.401")]
    for i, image in enumerate(photos(12)):
        caption = LONG if i == 1 else "" if i == 2 else f"an officer in uniform, {i}"
        record = Record({}, f"photos/part-0007/{i:08}.jpg")
        record = record._replace(caption=caption, caption_from="synthetic" if i else "")
        record = record._replace(size=(900, 700), crop=(100, 0, 700, 700))
        name, jpeg = f"train-00000-0512x0512.arecord:{i}", inspect_page.jpeg(image)
        bucket = buckets[i % 3][0]
        contacts.append(inspect_page.Contact(name, bucket, 412_000, record, jpeg))
    figures = [
        *(("records", "12,000", ""), ("on disk", "4.94", "GB")),
        *(("per record", "0.412", "MB"), ("shards", "24", "")),
        *(("read for this page", "288", ""), ("bad", "1", "")),
    ]
    notes = ["held out: 240 of these, in 1 shard", "with a caption: 98%; synthetic 52%"]
    bad = ["/data/shards/train-00001-0512x0512.arecord:5: checksum: its bytes changed"]
    page = inspect_page.html(
        *("/data/shards/train-*-of-00024.arecord", figures, buckets, notes, bad),
        contacts,
        rendering="Images are as stored; latents are decoded by sd35_medium.",
    )
    return written(folder / "inspect.html", page)


def write_duplicates(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    alike = np.concatenate([rng.normal(0.4, 0.08, 40_000), rng.uniform(0.6, 1, 90)])
    shots = [dedup_page.shot(f"photos/{i:06}.jpg", x) for i, x in enumerate(photos(6))]
    levels = (0.999, 0.961, 0.925, 0.918, 0.86)
    pairs = list(zip(shots, shots[1:], levels))
    settings = dict(inputs=["/data/photos"], embed="hash", threshold=0.92, clusters=0)
    made = dict(pictures=12_000, removed=18, pairs=19, unreadable={"no picture": 2})
    made |= dict(settings=settings, seconds=dict(embed=31.25, search=4.0))
    page = dedup_page.html(made, alike.astype(np.float32), 0.92, pairs)
    return written(folder / "duplicates.html", page)


def write_comparison(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    error = lambda scale: dict.fromkeys(("largest", "relative", "angle"), scale)

    def rows(names):
        for name in names:
            small, half = 1e-6 * rng.lognormal(), 8e-3 * rng.lognormal()
            row = dict(float32=error(small), bfloat16=error(half), theirs=error(half))
            yield dict(layer=name, **row)

    parts = {
        "clip_l": list(
            rows(["embeddings", *(f"block {i}" for i in range(12)), "norm"])
        ),
        "denoiser": list(rows(["patches", *(f"block {i}" for i in range(24)), "head"])),
        "trajectory": list(rows([*(f"step {i}" for i in range(1, 9)), "picture"])),
    }
    images = dict(zip(("sd3_jax", "PyTorch"), draw(0.1, n=2, size=64) / 255))
    model = dict(
        name="sd35_medium, small and random", source="/runs/models/sd35_medium"
    )
    model |= dict(parts=parts, first_departure=None, t=[])
    model |= dict(pictures=parity_page.pictures(images))
    limit = dict(float32=1e-4, bfloat16=2.0)
    page = parity_page.html(dict(tolerance=limit, models=[model], passed=True))
    return written(folder / "compare.html", page)


def study_result(variant: str, seed: int, quality: float, flops: float) -> dict:
    scores = [
        dict(weights="ema", setting=f"steps={n} cfg=5", steps=n, cfg=5.0)
        | dict(score=quality - 1 / n, fid=20 * (1.1 - quality) + 10 / n, path=10.0, n=8)
        for n in (5, 25, 50)
    ]
    losses = [dict(step=s, loss=(1.4 - quality) * (1 + 10 / s)) for s in (10, 20, 40)]
    times = np.linspace(0.1, 0.9, 5)
    rows = [
        x | {f"loss_t{t:g}": x["loss"] * (1 + (t - 0.5) ** 2) for t in times}
        for x in losses
    ]
    made = dict(variant=variant, option="optim.lr=1e-3", seed=seed, scores=scores)
    made |= dict(loss=losses[-1]["loss"], validation=rows, path_of_flow="rf", step=40)
    return made | dict(parameters=int(flops / 1e6), flops=flops, best=True)


def write_study(folder: Path) -> Path:
    names = ("rf/lognorm(0.00,1.00)", "rf/mode(1.29)", "rf/cosmap", "rf/uniform")
    results = [
        study_result(name, seed, 0.9 - 0.1 * i + 0.02 * seed, 1e9 * 2**i)
        for i, name in enumerate(names)
        for seed in (0, 1)
    ]
    page = study_page.html(results, epath.Path("/runs/formulations"))
    return written(folder / "study.html", page)


def write_benchmark(folder: Path) -> Path:
    result = json.loads((ROOT / "benchmarks" / "speed_cpu.json").read_text())
    scaling = json.loads((ROOT / "benchmarks" / "scaling_cpu.json").read_text())
    result |= {"scaling": scaling["scaling"]}
    return written(folder / "benchmark.html", benchmark_html.html(result))


def write_exploration(folder: Path) -> Path:
    rng, side = np.random.default_rng(0), 24
    photograph = photos(1)[0]
    place = np.linspace(-1, 1, side)
    spot = lambda x, y: np.exp(-4 * ((place - x) ** 2 + (place[:, None] - y) ** 2))
    prompt = "an officer in uniform before a wall"
    moments = [
        exploration.Moment(
            step,
            t,
            photograph,
            np.exp(np.linspace(0, 3, 24) + rng.normal(0, 0.1, 24)),
            np.exp(np.linspace(0, 2, 23) + rng.normal(0, 0.1, 23)),
            {word: 0.02 * spot(*rng.uniform(-1, 1, 2)) for word in prompt.split()},
            dict(CLIP=rng.uniform(0.1, 0.5, 24), T5=rng.uniform(0.1, 0.4, 24)),
        )
        for step, t in ((0, 1.0), (13, 0.78), (27, 0.01))
    ]
    times = np.linspace(1, 0, 29)
    previews = exploration.previews(rng.normal(size=(29, 64, 64, 16)), times)
    facts = [("size", "1024 × 1024 pixels"), ("seed", "7"), ("solver", "euler")]
    page = explore_page.html(prompt, photograph, previews, moments, facts)
    return written(folder / "explore.html", page)


def write_votes(folder: Path) -> Path:
    """Three sources, two questions, losses with pictures."""
    sources, votes = {}, []
    names = ("base", "tuned for 4,000 steps", "tuned-8k")
    rows = [
        PromptRow(LONG if i == 1 else p, ("Animals", "Food & Beverage")[i % 2])
        for i, p in enumerate(PROMPTS[:6])
    ]
    for k, name in enumerate(names):
        shots = {}
        for i, image in enumerate(draw(0.1 * k, n=6, size=64)):
            path = folder / f"{k}-{i}.png"
            pictures.save_png(image, path)
            shots[PictureKey(rows[i].prompt, 0)] = epath.Path(path)
        sources[name] = Source(name, epath.Path(folder), shots, [])
    pairs, _ = picture_sources.pairs(list(sources.values()), rows)
    for i, pair in enumerate(pairs * 4):
        winner = ("second", "second", "first", "tie", "second", "bad")[i * 5 % 6]
        voter = ("anna", "ben", "cleo", "dora")[i // len(pairs)]
        for question in "prompt", "aesthetics":
            fields = (*pair, question, 0, winner, ("first", "second")[i % 2], 0.0)
            votes.append(Vote(f"{question}{i}", voter, pair.id, *fields))
    results = vote_results.summary(votes, rows)
    problems = [f'base: no picture 0 of "{LONG}"']
    page = results_page.html(
        results, vote_results.verdicts(votes), sources, QUESTIONS, problems
    )
    return written(folder / "votes.html", page)


def written(path: Path, page: str) -> Path:
    path.write_text(page, encoding="utf-8")
    return path


PAGES = {
    "report": write_report,
    "young report": write_young_report,
    "samples": write_samples,
    "one sample": write_one_sample,
    "inspect": write_inspection,
    "duplicates": write_duplicates,
    "compare": write_comparison,
    "explore": write_exploration,
    "study": write_study,
    "votes": write_votes,
    "benchmark": write_benchmark,
}
