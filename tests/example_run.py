"""A made-up training run with everything in it that a report shows."""

import itertools
import json
from types import SimpleNamespace
from unittest import mock

import numpy as np

from configs import base
from sd3_jax import pictures
from sd3_jax.monitoring import metrics

EVIL = '<script>alert("1 & 2")</script> three <b>red</b> circles'
PROMPTS = [
    "a red circle left of a blue square",
    "two green discs over a yellow one",
    "the number 42 in violet",
    "a small blue circle, top right",
    EVIL,
    "an orange disc below a teal square",
]
INKS = [(214, 58, 50), (52, 142, 84), (123, 74, 196), (44, 96, 208), (9, 9, 9)]


def draw(noise, *, n=12, size=16, seed=0):
    """Discs on a light ground that come out of the noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / (size - 1)
    images = np.full((n, size, size, 3), 0.93)
    for i in range(n):
        a, b = random.uniform(0.3, 0.7, 2)
        inside = np.hypot(x - a, y - b) < random.uniform(0.18, 0.3)
        images[i][inside] = np.array(INKS[i % len(INKS)]) / 255
    images = (1 - noise) * images + noise * random.uniform(size=images.shape)
    return pictures.to_uint8(2 * images - 1)


def make_run(workdir, *, steps=6_000):
    random = np.random.default_rng(1)
    config = base.get_config()
    config.model.update(name="mmdit", depth=6, width=192, num_heads=6, pos_size=16)
    config.optim.update(lr=1e-3, warmup=300, schedule="cosine")
    config.train.update(steps=steps, log_every=10, eval_every=1_000)
    config.data.update(name="toy", batch_size=256)
    (workdir / "config.json").write_text(config.to_json_best_effort())
    facts = dict(recipe="configs/quickstart.py", parameters=3_214_608, devices=1)
    facts |= dict(device_kind="NVIDIA H200", jax="0.10.2", command="sd3-jax train …")
    (workdir / "run.json").write_text(json.dumps(facts))
    ts = (np.arange(8) + 0.5) / 8
    prompts = (PROMPTS * 2)[:12]
    ticks = itertools.count(1_790_000_000.0, 0.984)
    clock = SimpleNamespace(time=lambda: next(ticks))
    with (
        mock.patch.object(metrics, "time", clock),
        metrics.Metrics(workdir, total_steps=steps) as log,
    ):
        for step in range(10, steps + 1, 10):
            loss = 0.32 + 0.9 * np.exp(-step / 400) + 0.2 * np.exp(-step / 2500)
            row = dict(loss=loss + random.normal(0, 0.03))
            row |= dict(grad_norm=0.3 + 2 * np.exp(-step / 300) + random.gamma(2, 0.05))
            row |= dict(lr=1e-3 * min(step / 300, np.cos(1.5 * step / steps)))
            row |= dict(images_per_s=2_600 + random.normal(0, 40), step_ms=98.4)
            row |= dict(data_wait=0.012, tflops_per_device=241.0, mfu=0.244)
            if step == 2_000:
                row |= dict(loss=np.nan, grad_norm=np.inf)
            if step == 1_500:
                row |= dict(grad_norm=57.0)
            log.write(step, "train", row)
            if step % 1_000 == 0 or step == 10:
                by_t = loss * (0.55 + 3 * (ts - 0.45) ** 2)
                row = {f"loss_t{t:.4f}": v for t, v in zip(ts, by_t)}
                log.write(step, "val", dict(loss=loss - 0.01) | row)
                path = f"samples/step_{step:08}.png"
                sheet = pictures.grid(draw(np.exp(-step / 900)), captions=prompts)
                pictures.save_png(sheet, workdir / path)
                log.write(step, "samples", dict(path=path, prompts=prompts))
                shares = dict(productive=0.75, compile=0.125, lost=0.125)
                seconds = {f"{kind}_s": 640 * x for kind, x in shares.items()}
                log.write(step, "goodput", shares | seconds)
            if step % 2_000 == 0:
                row = dict(reader=0.98 - 0.4 * np.exp(-step / 1500))
                log.write(step, "score", row)
    sheet = pictures.grid(draw(0.0, n=24, seed=3), columns=8, captions=PROMPTS * 4)
    pictures.save_png(sheet, workdir / "samples.png")
    names = {
        "single digits": 0.983,
        "pairs": 0.91,
        "unseen pairs": 0.874,
        "counts": 0.75,
    }
    scores = [
        dict(name=k, score=v, n=240, low=v - 0.03, high=min(v + 0.02, 1))
        for k, v in names.items()
    ]
    scores += [dict(name="frechet distance", score=12.31, n=1024)]
    texts = [
        dict(prompt=p, score=0.7 + 0.05 * i, n=40, split="held out")
        for i, p in enumerate(PROMPTS)
    ]
    texts += [
        dict(prompt=f"the digit {i}", score=1 - 0.01 * i, n=24, split="train")
        for i in range(10)
    ]
    scores = dict(step=steps, weights="ema", scores=scores, prompts=texts)
    scores["settings"] = dict(solver="euler", steps=28, cfg=4.0, seed=0)
    (workdir / "scores.json").write_text(json.dumps(scores))
