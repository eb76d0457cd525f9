"""A made-up run with everything in it, and what happens as parts of it go missing."""

import itertools
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from configs import base
from sd3_jax import pictures
from sd3_jax.errors import UserError
from sd3_jax.jobs import report
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


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("quickstart")
    make_run(workdir)
    return workdir


class Checker(HTMLParser):
    """Every element is closed in order, and its id stands once."""

    VOID = {"meta", "img", "br"}

    def __init__(self):
        super().__init__()
        self.stack, self.tags, self.ids, self.text = [], [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data


def written(workdir):
    report.run(base.get_config(), str(workdir))
    page = (workdir / "report.html").read_text()
    checker = Checker()
    checker.feed(page)
    assert not checker.stack
    assert len(set(checker.ids)) == len(checker.ids)
    return page, checker


def test_the_page_is_whole_and_needs_nothing_else(workdir):
    page, checker = written(workdir)
    assert "script" not in checker.tags
    assert "default-src 'none'" in page
    links = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"base64,[^\"]*", "", links))
    used = set(re.findall(r'(?:href="|url\()#([\w-]+)', page))
    assert used <= set(checker.ids)
    assert 100_000 < len(page) < 3_000_000
    assert not list(workdir.glob("*.part"))


def test_it_shows_scores_settings_prompts_and_what_was_not_finite(workdir, capsys):
    page, checker = written(workdir)
    assert EVIL in checker.text and EVIL not in page
    for words in ("0.983", "0.953 – 1.000", "step 6,000", "ema weights", "3.21"):
        assert words in checker.text
    assert "optim.warmup" in checker.text and "Not finite: 1 of 600" in checker.text
    assert checker.text.index(PROMPTS[0]) > 0
    assert page.count("<img") == 8 and page.count("<svg") == 7
    for words in ("productive75 %8.0 min", "lost12.5 %1.3 min"):
        assert words in checker.text
    out = capsys.readouterr().out
    assert str(workdir / "report.html") in out and "single digits" in out


def test_the_worst_prompt_comes_first(workdir):
    _, checker = written(workdir)
    table = checker.text[checker.text.index("the worst first") :]
    assert table.index(PROMPTS[0]) < table.index(PROMPTS[1]) < table.index("digit 9")


def test_what_is_missing_is_said(tmp_path):
    with metrics.Metrics(tmp_path, total_steps=10) as log:
        log.write(1, "train", {"loss": float("nan")})
        log.write(2, "samples", {"path": "../../secret.png", "prompts": []})
    (tmp_path / "scores.json").write_text('{"scores": [{"score": nu')
    (tmp_path / "samples.png").write_bytes(b"no picture")
    _, checker = written(tmp_path)
    for words in (
        *("no samples.png", "no scores.json", "no config.json", "is not there"),
        "No goodput was logged",
    ):
        assert words in checker.text
    assert "No finite value of “loss”" in checker.text
    assert "Not recorded: parameters" in checker.text


def test_scores_may_be_sparse(tmp_path):
    with metrics.Metrics(tmp_path, total_steps=10) as log:
        log.write(1, "train", {"loss": 1.0})
    scores = {"scores": [{"name": "a"}, {"score": None}, {"name": "b", "score": "x"}]}
    scores |= {"prompts": [{}, {"prompt": 3}], "settings": {}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    _, checker = written(tmp_path)
    assert "a step that is not recorded" in checker.text


def test_big_pictures_are_made_smaller(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), np.uint8)
    pictures.save_png(noise, tmp_path / "samples.png")
    with metrics.Metrics(tmp_path, total_steps=10) as log:
        log.write(1, "train", {"loss": 1.0})
    page, _ = written(tmp_path)
    assert "data:image/webp" in page and len(page) < 1_000_000


def test_a_long_run_keeps_its_spike_and_its_size(tmp_path):
    with metrics.Metrics(tmp_path, total_steps=20_000):
        pass
    lines = [
        json.dumps(dict(step=i, kind="train", time=i, loss=1 + (i == 7_777), lr=1e-4))
        for i in range(20_000)
    ]
    (tmp_path / metrics.FILE).write_text("\n".join(lines))
    page, _ = written(tmp_path)
    assert len(page) < 300_000


def test_no_metrics_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no metrics.jsonl"):
        report.run(base.get_config(), str(tmp_path))
