"""No page lets what it shows become markup, whoever wrote it."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from etils import epath

from configs import base
from sd3_jax import pictures
from sd3_jax.data.images import BadImage
from sd3_jax.jobs import report
from sd3_jax.monitoring import metrics
from sd3_jax.reports import html_page, parity_page
from sd3_jax.sampling import contact_sheet

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


def samples(tmp_path):
    settings = dict(steps=4, solver=EVIL, cfg=4.0, width=64, height=64)
    line = dict(prompt=EVIL, file="samples/0.png", weights=EVIL, seed=EVIL)
    line["settings"] = settings
    return contact_sheet.html([line, line | {"prompt": ["a", EVIL, "b"]}])


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
    return parity_page.html(
        dict(tolerance=limit, models=[made], passed=False), epath.Path(tmp_path)
    )


@pytest.mark.parametrize("made", [samples, training, comparison])
def test_what_is_shown_is_never_markup(made, tmp_path):
    text = made(tmp_path)
    text.encode()  # which a surrogate would not survive
    reader = Reader()
    reader.feed(text)
    assert "script" not in reader.tags and SCRIPT not in text
    assert not re.search(
        "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\ufffe]", text
    )
    assert SHOWN in reader.text, "it is still told"
    assert any(SHOWN in value for value in reader.values if value)  # as an alt
    (policy,) = [v for v in reader.values if v and v.startswith("default-src")]
    assert policy.startswith("default-src 'none'; img-src ")
    assert "http" not in policy and "script" not in policy


def test_a_picture_that_is_none_is_refused():
    bomb = b"\x89PNG\r\n\x1a\n" + bytes(30)
    with pytest.raises(BadImage, match="wanted a whole JPEG"):
        html_page.image(bomb, "a\nb", limit=1000)
