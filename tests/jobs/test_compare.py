"""compare: verdict, report, and the first layer that departs."""

import json
import re
import sys

import jax
import pytest
from flax import linen as nn
from parity import miniature

import sd3_jax
from sd3_jax import main
from sd3_jax.models import clip
from sd3_jax.tools.parity import gap


def compare(workdir, weights, *flags):
    args = ["compare", f"--workdir={workdir}", f"--config.weights={weights}"]
    words = f"--config.tokenizers={miniature.folder('sd3_medium')}"
    few = ["--config.sample.steps=3", "--config.image.width=64", "--config.mesh.data=8"]
    return main.main([*args, words, *few, "--config.mesh.fsdp=1", *flags])


def test_a_single_file_agrees(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    folder = miniature.folder("sd35_medium")
    sd3_jax.save(sd3_jax.load(str(folder), dtype="float32"), path, "original")
    assert compare(tmp_path, path) == 0
    printed = capsys.readouterr().out
    assert "all within 1e-04" in printed and "trajectory" in printed
    result = json.loads((tmp_path / "compare.json").read_text())
    (model,) = result["models"]
    assert result["passed"] and model["first_departure"] is None
    assert list(model["parts"]) == [
        *("denoiser", "vae encoder", "vae decoder", "clip_l", "clip_g", "t5"),
        "trajectory",
    ]
    names = [row["layer"] for row in model["parts"]["denoiser"]]
    assert names[5:] == [
        *(f"block {i} {x}" for i in range(3) for x in ("image", "text")),
        *("block 3 image", "tokens out"),
    ]
    page = (tmp_path / "compare.html").read_text()
    assert page.count("<svg") == 2 and "block 2 text" in page
    assert page.count("data:image/png") == 3


def test_what_departs_is_named_and_the_exit_code_is_1(tmp_path, capsys, monkeypatch):
    """The tanh GELU for the exact one: 5e-4, in CLIP-G alone."""
    monkeypatch.setitem(clip.ACTIVATIONS, "gelu", nn.gelu)
    jax.clear_caches()
    assert compare(tmp_path, miniature.folder("sd3_medium")) == 1
    jax.clear_caches()
    printed = capsys.readouterr().out
    assert re.search("departs first in clip_g at block 0: float32 ..+e-0[34]", printed)
    result = json.loads((tmp_path / "compare.json").read_text())
    assert not result["passed"]
    first = result["models"][0]["first_departure"]
    assert (first["part"], first["layer"]) == ("clip_g", "block 0")
    page = (tmp_path / "compare.html").read_text()
    assert "The first layer that departs is block 0 of clip_g." in page


def test_without_pytorch(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    from sd3_jax.jobs import compare as job

    assert "torch" in sys.modules
    with pytest.raises(Exception, match="torch is not installed.*pip install"):
        job.run(None, tmp_path)


def test_the_measures():
    a = gap.gap([1.0, 2.0, 3.0], [1.0, 2.0, 4.0])
    assert a.largest == pytest.approx(1 / 1.2472191)
    assert a.relative == pytest.approx(1 / 21**0.5)
    assert a.angle == pytest.approx(1 - 17 / (14 * 21) ** 0.5)
    with pytest.raises(ValueError, match="ours is"):
        gap.gap([1.0], [1.0, 2.0])
