"""Wrong paths are answered before jax is imported."""

import importlib.util
import re
import subprocess
import sys

import pytest

from sd3_jax.config import input_files
from sd3_jax.errors import UserError

NONE = "no such file, folder or hub name"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("a,b.safetensors", "lora=1000.safetensors", "step=1000"):
        (tmp_path / name).write_text("")


@pytest.mark.parametrize(
    "job, values",
    [
        ("sample", {"weights": "models"}),
        ("sample", {"weights": "a,b.safetensors"}),
        ("sample", {"weights": "owner/name,models"}),
        ("sample", {"weights": "owner/name@main"}),
        ("sample", {"weights": "owner/name@refs/pr/3"}),
        ("sample", {"weights": "owner/name:fp16,models:fp16"}),
        ("sample", {"weights": "owner/name,a,b.safetensors,models"}),
        ("sample", {"weights": "models/name"}),  # the hub's: the owner may be a folder
        ("sample", {"weights": "hf://owner/name"}),
        ("sample", {"weights": "owner/na.me-1/text/model.safetensors"}),
        ("sample", {"weights": "owner/name@v1/model.safetensors"}),
        ("sample", {"weights": "gs://bucket/sd3"}),
        ("sample", {"weights": "models", "sample.lora": ("step=1000", "models=0.5")}),
        ("sample", {"weights": "models", "sample.lora": ("lora=1000.safetensors",)}),
        ("sample", {"weights": "models", "sample.lora": ("owner/name=-1.5",)}),
        ("sample", {"weights": "", "tokenizers": "WRONG", "encode.weights": "WRONG"}),
        ("report", {"weights": "WRONG"}),
        ("train", {"tune.base": "WRONG", "encode.weights": "models"}),
    ],
)
def test_what_may_be_there(here, job, values):
    input_files.check(job, values)


@pytest.mark.parametrize(
    "job, key, text, words",
    [
        ("sample", "weights", "WRONG", f"config.weights = WRONG: {NONE}"),
        ("sample", "weights", "/no/such", NONE),
        ("train", "weights", "models", "train does not use it; set config.tune"),
        ("precompute", "weights", "models", "set config.encode.weights"),
        ("sample", "weights", "./no/such", NONE),
        ("sample", "weights", "~/no/such/folder", NONE),
        ("sample", "weights", "models/sd3.safetensors", NONE),
        ("sample", "weights", "no/such/folder", NONE),
        ("sample", "weights", "WRONG:fp16", NONE),
        ("sample", "weights", "owner/name,a,c.safetensors", f'"a": {NONE}'),
        ("sample", "weights", "models/sd3/model.safetensors", NONE),
        ("sample", "weights", "owner/name.safetensors", NONE),
        ("sample", "weights", "models,WRONG", f'"WRONG": {NONE}'),
        ("sample", "weights", "models,", f'"": {NONE}'),
        ("sample", "weights", "https://example.org/a/b", "a link, which is not down"),
        ("compare", "weights", "ftp://x/y", "expected a path, or a hub name such as"),
        ("convert", "weights", "WRONG", NONE),
        ("evaluate", "weights", "WRONG", NONE),
        ("inspect", "weights", "WRONG", NONE),
        ("sample", "tokenizers", "WRONG", "config.tokenizers = WRONG"),
        ("sample", "sample.lora", ("WRONG=0.8",), "config.sample.lora = WRONG=0.8"),
        ("sample", "sample.lora", ("./models/x=0.8",), NONE),
        ("sample", "sample.prompts_file", "no.txt", "no.txt: no such file"),
        ("sample", "sample.prompts_file", "models", "models: is a folder, expected"),
        ("evaluate", "eval.prompts_file", "models", "is a folder, expected a file"),
        ("precompute", "encode.weights", "WRONG", "config.encode.weights = WRONG"),
        ("train", "encode.weights", "WRONG", NONE),
        ("convert", "encode.weights", "WRONG", NONE),
        ("train", "encode.tokenizers", "WRONG", "config.encode.tokenizers = WRONG"),
    ],
)
def test_what_cannot_be_there(here, job, key, text, words):
    with pytest.raises(UserError) as error:
        usual = {} if job in input_files.INSTEAD else {"weights": "models"}
        input_files.check(job, usual | {key: text})
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flag",
    ["weights=WRONG", "sample.lora=WRONG=0.5", "sample.prompts_file=WRONG"],
)
def test_jax_is_not_imported_to_say_so(tmp_path, flag):
    key = flag.partition("=")[0]
    args = ["sample", "--config=configs/released.py", f"--workdir={tmp_path}"]
    args += [f"--config.{flag}"]
    args += [] if key == "weights" else [f"--config.weights={tmp_path}"]
    code = (
        "import sys; from sd3_jax import main; code = main.main(sys.argv[1:])\n"
        "print(code, *{'jax', 'transformers', 'huggingface_hub'} & {*sys.modules})"
    )
    run = [sys.executable, "-c", code, *args]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.stdout.split() == ["2"]
    assert done.stderr.startswith(f"sd3-jax: error: config.{key} = WRONG")
    assert "no such file" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "values, wanted",
    [
        ({"workdir": "gs://b/run"}, "--workdir=gs://b/run: gs:// paths need gcsfs"),
        ({"config.data.records": ("a", "s3://b/x")}, "s3:// paths need s3fs"),
        ({"config.weights": "gs://b/sd3"}, '(the extras "gcs" and "tpu" have it)'),
    ],
)
def test_a_bucket_wants_what_reads_it(monkeypatch, values, wanted):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape(wanted)):
        input_files.require_drivers(values)
    input_files.require_drivers({"workdir": "runs", "config.sample.prompt": "gs://b"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    input_files.require_drivers(values)
