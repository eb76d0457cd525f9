"""The `sample` job with other guidances than CFG: lines of a file, and a guide."""

import json

import jax
import numpy as np
import pytest
from parity import miniature
from PIL import Image

import sd3_jax
from sd3_jax import main, pictures
from sd3_jax.distributed import sharding


def flags(workdir, prompts, **keys):
    values = {
        "weights": miniature.folder("sd35_medium"),
        "sample.prompts_file": prompts,
        **{"image.height": 48, "image.width": 48, "sample.steps": 3},
        **{"sample.max_length": 16, "sample.batch_size": 8, "model.dtype": "float32"},
    }
    values |= keys
    args = [f"--config.{key}={value}" for key, value in values.items()]
    return ["sample", "--config=released:sd35_medium", f"--workdir={workdir}", *args]


def test_lines_choose_their_guidance(tmp_path, caplog):
    """As generate paints them, and a guide is read for those that are guided by it."""
    rows = [
        {"guidance_method": "apg", "guidance_options": "eta=0.3", "cfg": 9.0},
        {"guidance_method": "autoguidance", "cfg": 2.0},
        {"guidance_method": "apgg"},
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": "a fox", **x}) for x in rows))
    guide = miniature.folder("sd35_large")
    run = tmp_path / "run"
    assert main.main(flags(run, prompts, **{"sample.guide": guide})) == 0
    assert 'did you mean "apg"?' in caplog.text
    lines = [json.loads(x) for x in (run / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["guide"] for line in lines)
    mesh = sharding.make_mesh()
    bundle = sd3_jax.load(str(miniature.folder("sd35_medium")), mesh, "float32")
    weaker = sd3_jax.load(str(guide), mesh, "float32", only=["denoiser"])
    options = [
        dict(guidance=9.0, guidance_method="apg", guidance_options=dict(eta=0.3)),
        dict(guidance=2.0, guidance_method="autoguidance", guide=weaker),
    ]
    size = dict(height=48, width=48, steps=3, max_sequence_length=16)
    for line, more in zip(lines, options):
        # The job's batch has a row for each device.
        images = sd3_jax.generate(bundle, ["a fox"] * 8, seed=[0] * 8, **size, **more)
        ours = pictures.to_uint8(2 * np.asarray(images[:1]) - 1)[0].astype(int)
        painted = np.asarray(Image.open(run / line["file"]))
        assert np.abs(painted - ours).max() <= 1, line
    assert jax.device_count() == 8


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"sample.guidance_options": "eta=0"}, 'guidance_method "cfg": it takes none'),
        ({"sample.guidance_method": "autoguidance"}, "config.sample.guide ="),
        ({"sample.guidance_method": "cfg_pp"}, "expected 0 to 1"),
        ({"sample.guidance_schedule": "lin"}, "expected constant, linear, cosine"),
        (
            {"sample.guidance_method": "autoguidance", "sample.guide": "no/such"},
            "config.sample.guide = no/such: ",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, keys, words):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n")
    assert main.main(flags(tmp_path / "run", prompts, **keys)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sd3-jax: error:") and words in error
