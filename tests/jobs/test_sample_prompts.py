"""sample and precompute with embeddings, weights in prompts, and words that are cut."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from parity import miniature
from PIL import Image

import sd3_jax
from configs import sd3_2b
from sd3_jax import main, pictures
from sd3_jax.assembly import examples
from sd3_jax.distributed import sharding

LONG = "the red fox in " * 25 + "rain"


@pytest.fixture(scope="module")
def embedding(tmp_path_factory):
    """A file in ComfyUI's names for the miniature encoders."""
    generator = np.random.default_rng(0)
    widths = {"clip_l": 64, "clip_g": 64, "t5xxl": 160}
    draw = lambda width: generator.normal(size=(2, width)).astype(np.float32)
    path = tmp_path_factory.mktemp("embedding") / "mine.safetensors"
    safetensors.numpy.save_file({k: draw(x) for k, x in widths.items()}, path)
    return path


def flags(workdir, **keys):
    weights = miniature.folder("sd35_medium")
    keys = {"weights": weights, "sample.steps": 1} | keys
    settings = [f"--config.{key}={value}" for key, value in keys.items()]
    return ["--config=configs/released.py:tiny", f"--workdir={workdir}", *settings]


def test_the_job_paints_what_the_api_does_and_tells_what_is_cut(
    tmp_path, embedding, caplog
):
    rows = [
        {"prompt": "a <s> (fox:1.4)", "prompt_weighting": "parentheses"},
        {"prompt": "a <s> fox++", "prompt_weighting": "compel"},
        {"prompt": "a (fox:1.4)"},
        {"prompt": LONG},
        {"prompt": "(a", "prompt_weighting": "round"},
        {"prompt": "a (fox", "prompt_weighting": "parentheses"},
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    keys = {
        "sample.prompts_file": prompts,
        "sample.embeddings": f"('{embedding}=<s>',)",
    }
    assert main.main(["sample", *flags(tmp_path / "run", **keys)]) == 0
    text = (tmp_path / "run" / "samples.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in rows[:4]]
    assert {*map(str, (line["embeddings"] for line in lines))} == {
        str([f"{embedding}=<s>"])
    }
    assert [list(line.get("cut", {})) for line in lines[:3]] == [[], [], []]
    assert {name: x[-4:] for name, x in lines[3]["cut"].items()} == dict.fromkeys(
        ("clip_l", "clip_g", "t5"), "rain"
    )
    told = [line for line in caplog.messages if "not read:" in line]
    assert [line.split(" ")[0] for line in told] == ["CLIP", "T5"]
    assert 'config.sample.prompt_weighting = "round"' in caplog.text
    assert 'jsonl:6: skipped: prompt "a (fox", character 3: "("' in caplog.text
    # --- the same from Python
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    source = str(miniature.folder("sd35_medium"))
    bundle = sd3_jax.load(source, mesh, "float32", embeddings={embedding: "<s>"})
    run = dict(height=64, width=64, steps=1, guidance=5.0, max_sequence_length=16)
    for row, line in zip(rows[:2], lines):
        weighting = row["prompt_weighting"]
        image = sd3_jax.generate(
            bundle, row["prompt"], seed=0, prompt_weighting=weighting, **run
        )
        ours = pictures.to_uint8(2 * np.asarray(image)[0] - 1).astype(int)
        painted = np.asarray(Image.open(tmp_path / "run" / line["file"]))
        assert np.abs(painted - ours).max() <= 1, line


WRONG = {
    "sample.embeddings": ("('no/such.safetensors=<s>',)", "no such file"),
    "sample.prompt_weighting": ("parentheses", 'prompt "a (fox", character 3'),
}


@pytest.mark.parametrize("key", WRONG)
def test_mistakes_are_one_line(tmp_path, capsys, key):
    value, words = WRONG[key]
    keys = {"sample.prompt": "a (fox", key: value}
    assert main.main(["sample", *flags(tmp_path, **keys)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sd3-jax: error:") and words in error
    assert not (tmp_path / "samples").exists()


def test_captions_of_training_may_have_placeholders(embedding):
    config = sd3_2b.get_config("tiny")
    config.encode.weights = str(miniature.folder("sd35_medium"))
    config.sample.embeddings = (f"{embedding}=<s>",)
    config.model.update(context_dim=160, pooled_dim=128)
    config.text.length = 97
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    encoder = examples.encoder(config, mesh, ["clip_l", "clip_g", "t5"])
    ids = encoder.tokenize(["a <s> fox", LONG])
    vocab = encoder.bundle.configs["clip_l"]["vocab_size"]
    assert ids["ids_clip_l"][0, 2:4].tolist() == [vocab, vocab + 1]
    assert encoder.cut == {"CLIP": 1, "T5": 1}
