"""No page lets what it shows become markup, whoever wrote it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from configs import base
from sd3_jax import pictures
from sd3_jax.data.images import BadImage
from sd3_jax.data.records import Record
from sd3_jax.jobs import report
from sd3_jax.monitoring import metrics
from sd3_jax.reports import html_page, parity_page
from sd3_jax.tools.dedup import dedup_page
from sd3_jax.tools.inspect import inspect_page
from sd3_jax.tools.study import study_page

TEMPLATES = Path(html_page.__file__).parent / "templates"
SCRIPT = "<script>alert(1)</script>"
EVIL = (
    f"{SCRIPT}\"'& onerror=x \ud800\x00\x1b[2J\x9b\u202egpj.exe\ufffe</title></style>"
)
SHOWN = f"{SCRIPT}\"'& onerror=x ��\ufffd[2J\ufffd\ufffdgpj.exe\ufffd</title></style>"


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.values = set(), "", []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.values += [value for _, value in attributes]
        assert not [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        self.text += data


def read(page):
    reader = Reader()
    reader.feed(page)
    assert "script" not in reader.tags and SCRIPT not in page
    return reader


def samples(tmp_path):
    settings = dict(steps=4, solver=EVIL, cfg=4.0, width=64, height=64)
    line = dict(prompt=EVIL, file="samples/0.png", weights=EVIL, seed=EVIL)
    line["settings"] = settings
    lines = [line, line | {"prompt": ["a", EVIL, "b"]}]
    return html_page.render("samples.html", lines=lines)


def training(tmp_path):
    folder = tmp_path / "run"
    pictures.save_png(np.zeros((32, 32, 3), np.uint8), folder / "samples.png")
    pictures.save_png(np.zeros((32, 32, 3), np.uint8), folder / "grid.png")
    with metrics.Metrics(folder, total_steps=10) as log:
        log.write(1, "train", {"loss": 1.0, EVIL: 1.0})
        log.write(1, "samples", {"path": "grid.png", "prompts": [EVIL, EVIL]})
        log.write(2, "samples", {"path": EVIL, "prompts": []})
        for step in 1, 2:
            log.write(step, "score", {EVIL: 0.5})
    score = dict(name=EVIL, score=0.5, n=3)
    scores = dict(weights=EVIL, step=1, scores=[score], settings={EVIL: EVIL})
    scores["prompts"] = [dict(prompt=EVIL, split=EVIL, score=0.1)]
    (folder / "scores.json").write_text(json.dumps(scores))
    config = {"model": {"name": EVIL, EVIL: EVIL}, "train": {"prompts": [EVIL]}}
    (folder / "config.json").write_text(json.dumps(config))
    facts = {"recipe": EVIL, "device_kind": EVIL, "devices": EVIL, EVIL: [EVIL]}
    (folder / "run.json").write_text(json.dumps(facts))
    report.run(base.get_config(), str(folder))
    return (folder / "report.html").read_text(encoding="utf-8")


def comparison(tmp_path):
    number = dict(largest=1e-6, relative=1e-6, angle=1e-6)
    row = dict(layer=EVIL, float32=number, bfloat16=number, theirs=number)
    made = dict(name=EVIL, source=EVIL, first_departure=dict(part=EVIL, layer=EVIL))
    made |= dict(parts={"denoiser": [row]})
    made["pictures"] = parity_page.pictures({EVIL: np.zeros((16, 16, 3))})
    limit = dict(float32=1e-4, bfloat16=2.0)
    return parity_page.html(dict(tolerance=limit, models=[made], passed=False))


def inspection(tmp_path):
    record = Record({"image": np.zeros((8, 8, 3), np.uint8)}, EVIL)
    record = record._replace(caption=EVIL, caption_from=EVIL, size=(9, 9))
    image = inspect_page.jpeg(inspect_page.picture(record))
    contact = inspect_page.Contact(EVIL, "8x8", 1, record, image)
    rows, figures = [(EVIL, "1", 1.0, EVIL)], [(EVIL, EVIL, EVIL)]
    lines = [EVIL]
    return inspect_page.html(
        EVIL, figures, rows, lines, lines, [contact], rendering=EVIL
    )


def duplicates(tmp_path):
    shot = dedup_page.shot(EVIL, np.zeros((8, 8, 3), np.uint8))
    report = dict(pictures=2, removed=1, pairs=1, unreadable={EVIL: 1})
    report |= dict(settings={EVIL: EVIL, "inputs": [EVIL]}, seconds={EVIL: EVIL})
    pairs = [(shot, shot, 1.0), (shot, None, 0.9)]
    return dedup_page.html(report, np.ones(1, np.float32), 0.92, pairs)


def study(tmp_path):
    score = dict(setting=EVIL, steps=4, cfg=2.0, weights=EVIL, score=0.5, fid=1.0)
    row = {"step": 4, "loss": 0.5, "loss_t0.5": 0.5}
    result = dict(variant=EVIL, seed=0, loss=0.5, best=True, option=EVIL, step=4)
    result |= dict(scores=[score | dict(path=1.0, n=8)], validation=[row])
    result |= dict(path_of_flow="rf", parameters=1, flops=1e9)
    return study_page.html([result], epath.Path(f"/runs/{EVIL.replace('/', '')}"))


@pytest.mark.parametrize("made", [samples, training, comparison, inspection])
def test_what_is_shown_is_never_markup(made, tmp_path):
    text = made(tmp_path)
    text.encode()  # which a surrogate would not survive
    reader = read(text)
    assert not re.search(
        "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\ufffe]", text
    )
    assert SHOWN in reader.text, "it is still told"
    assert any(SHOWN in value for value in reader.values if value)  # as an alt
    (policy,) = [v for v in reader.values if v and v.startswith("default-src")]
    assert policy.startswith("default-src 'none'; img-src ")
    assert "http" not in policy and "script" not in policy


@pytest.mark.parametrize("page", [duplicates, study])
def test_names_of_files_and_variants_are_never_markup(page, tmp_path):
    """They are escaped for a terminal or drawn before they come to the page."""
    text = page(tmp_path)
    text.encode()
    assert SCRIPT in read(text).text


def test_only_a_plot_is_taken_as_it_is():
    templates = "".join(path.read_text() for path in TEMPLATES.glob("*.html"))
    assert re.findall(r"\w+\|safe|autoescape|Markup", templates) == ["svg|safe"]


def test_a_picture_that_is_none_is_refused():
    bomb = b"\x89PNG\r\n\x1a\n" + bytes(30)
    with pytest.raises(BadImage, match="expected a whole JPEG"):
        html_page.picture(bomb, "a\nb", limit=1000)
