"""A made-up run with everything in it, and what happens as parts of it go missing."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from example_run import EVIL, PROMPTS, make_run

from configs import base
from sd3_jax import pictures
from sd3_jax.errors import UserError
from sd3_jax.jobs import report
from sd3_jax.monitoring import metrics


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
    assert "Not finite: 1 of 600" in checker.text
    assert "As logged" not in checker.text
    assert checker.text.index(PROMPTS[0]) > 0
    assert page.count("<img") == 8 and page.count("<svg") == 7
    for words in ("productive75 %8.0 min", "lost12.5 %1.3 min"):
        assert words in checker.text
    out = capsys.readouterr().out
    assert str(workdir / "report.html") in out and "single digits" in out


def test_settings_that_differ_come_first_by_group(workdir):
    _, checker = written(workdir)
    words = re.sub(r"\s+", " ", checker.text)
    assert (
        "config.optim lr 0.001 default 0.0001 schedule cosine default constant" in words
    )
    # All others are folded below: how many there are grows with the schema.
    folded = re.search(r"2\d\d settings", words)
    assert words.index("warmup 300 default 1000") < folded.start()
    assert 'config seed 0 weights "" tokenizers ""' in words


def test_without_a_contact_sheet_the_newest_grid_stands_first(tmp_path):
    with metrics.Metrics(tmp_path, total_steps=10) as log:
        log.write(1, "train", {"loss": 1.0})
        for step in (1, 2, 3):
            path = f"samples/{step}.png"
            log.write(step, "samples", {"path": path, "prompts": ["a"]})
            if step < 3:
                pictures.save_png(np.zeros((8, 8, 3), np.uint8), tmp_path / path)
    page, checker = written(tmp_path)
    assert "The newest grid of the training run, at step 2." in checker.text
    assert "no samples.png" not in checker.text and page.count("<img") == 3


def test_the_worst_prompt_comes_first(workdir):
    _, checker = written(workdir)
    table = checker.text[checker.text.index("lowest score first") :]
    assert table.index(PROMPTS[0]) < table.index(PROMPTS[1]) < table.index("digit 9")


def test_what_is_missing_is_said(tmp_path):
    with metrics.Metrics(tmp_path, total_steps=10) as log:
        log.write(1, "train", {"loss": float("nan")})
        log.write(2, "samples", {"path": "../../secret.png", "prompts": []})
    (tmp_path / "scores.json").write_text('{"scores": [{"score": nu')
    (tmp_path / "samples.png").write_bytes(b"no picture")
    _, checker = written(tmp_path)
    for words in (
        *("No samples.png", "scores.json is not understood", "No config.json"),
        "does not exist",
        "model FLOPs utilization, goodput.",
    ):
        assert words in checker.text
    assert "Training loss: no finite value of “loss”" in checker.text
    assert checker.text.index("Training loss") < checker.text.index("No samples.png")
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


def log_line(workdir, **values):
    line = dict(step=1, kind="train", time=1.7e9, loss=1.0) | values
    (workdir / metrics.FILE).write_text(json.dumps(line))


@pytest.mark.parametrize(
    "file, text, words",
    [
        (
            "config.json",
            '{"model":null,"train":[1]}',
            "config.json is not understood in",
        ),
        ("config.json", "[1]", "config.json is not understood: expected a JSON object"),
        ("config.json", '{"a":' * 800 + "1" + "}" * 800, ""),
        ("run.json", '{"recipe":3,"device_kind":[1]}', "run.json is not understood in"),
        ("run.json", '{"parameters":1' + "0" * 400 + "}", ""),
        (
            "scores.json",
            '{"scores":null,"prompts":5,"settings":3}',
            "scores.json is not understood in: scores, prompts, settings",
        ),
        ("scores.json", '{"scores":[{"name":"\\ud800","score":1}, 2]}', "in: scores"),
    ],
)
def test_a_file_of_other_types_is_named_and_left_out(file, text, words, tmp_path):
    log_line(tmp_path)
    (tmp_path / file).write_text(text)
    _, checker = written(tmp_path)
    assert words in checker.text and "Training loss" in checker.text


def test_values_that_no_axis_or_date_can_hold_are_left_out(tmp_path, capfdbinary):
    rows = [
        dict(step=1, kind="train", time=1e300, loss=1e308, lr=10**400),
        dict(step=2, kind="train", time=1e300, loss=-1e308),
        dict(step=3, kind="val", time=10**400, **{"loss_t0.1": 1e308, "loss_t0.9": 1}),
        dict(step=3, kind="goodput", time=-1, productive="all", compile=1),
    ]
    rows.append(dict(step=4, kind="train", time=1.7e9, loss=2.0))
    (tmp_path / metrics.FILE).write_text("\n".join(map(json.dumps, rows)))
    _, checker = written(tmp_path)
    assert "Too large: 2 of 3" in checker.text
    assert "4 lines whose time is not a date" in checker.text


def test_a_folder_in_place_of_a_file_is_one_line(tmp_path):
    log_line(tmp_path)
    (tmp_path / "scores.json").mkdir()
    _, checker = written(tmp_path)
    assert "scores.json is not understood" in checker.text
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match="report.html is a folder"):
        report.run(base.get_config(), str(tmp_path))
    (tmp_path / metrics.FILE).unlink()
    (tmp_path / metrics.FILE).mkdir()
    with pytest.raises(UserError, match="jsonl is a folder"):
        report.run(base.get_config(), str(tmp_path))
