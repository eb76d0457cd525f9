"""The job `calibrate`, and `sample` with the curve that it writes."""

import json

import numpy as np
from parity import miniature

from sd3_jax import main


def flags(job, workdir, **keys):
    values = {
        "weights": miniature.folder("sd35_medium"),
        "sample.prompt": "a fox",
        **{"image.height": 48, "image.width": 48, "sample.steps": 5},
        **{"sample.max_length": 16, "sample.batch_size": 8, "model.dtype": "float32"},
    }
    args = [f"--config.{key}={value}" for key, value in (values | keys).items()]
    return [job, "--config=released:sd35_medium", f"--workdir={workdir}", *args]


def test_a_curve_is_measured_and_followed(tmp_path, caplog, capsys):
    caplog.set_level("INFO")
    assert main.main(flags("calibrate", tmp_path)) == 0
    curve = json.loads((tmp_path / "calibration.json").read_text())
    assert curve["steps"] == len(curve["ratios"]) == 5 and curve["ratios"][0] == 1
    assert np.ptp(curve["ratios"]) > 0.01
    cached = {
        "sample.cache": "magcache",
        "sample.cache_options": "threshold=100, retention=0, most_skipped=2",
        "sample.cache_calibration": tmp_path / "calibration.json",
    }
    assert main.main(flags("sample", tmp_path / "run", **cached)) == 0
    assert "the blocks of 3 of 5 steps were skipped" in caplog.text
    (line,) = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert json.loads(line)["settings"]["cache"] == "magcache"
    # The same weights in other bits are another model.
    capsys.readouterr()
    other = cached | {"model.dtype": "bfloat16"}
    assert main.main(flags("sample", tmp_path / "other", **other)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"cache_calibration is of the weights {curve['model']}" in last
