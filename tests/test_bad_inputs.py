"""What users get wrong, by number: 64 bad inputs, and what is said or done of each.

A row of MISTAKES is a command, its exit code and what its last line of stderr says: one
line, with the culprit. Where the right behaviour is no error, a test with the number in
its name says what it is. Depth is elsewhere; these are short, and compile next to
nothing. Not here:

    15  of the coordinator: nobody answers, or peers do not come:
        tests/distributed/test_processes.py; here is what is wrong with the
        variables that name it
    55  a batch too large for memory: train says so in one line, from the compiler's;
        what fits, `plan` says (tests/tools/plan/test_plan.py)
    56  CPUs by accident: large models are refused,
        tests/assembly/test_compatibility.py; here, that run.json names the devices
    57  HTTP: there is no server
    58  signals: tests/chaos.py, tests/checkpoints/test_manager.py
    59  a loader's worker process that dies: the loader has threads
    60  clocks, slow disks, stuck hosts: tests/distributed/test_processes.py
    62  statistics for FID: there are none yet
"""

import functools
import io
import json
import logging
import pickle
import re
import shlex
import shutil
import struct
import tarfile
import types
import zipfile
import zlib
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import multiprocess
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from flax import linen as nn
from PIL import Image

from sd3_jax import main, tree
from sd3_jax.assembly import model_parts
from sd3_jax.checkpoints.manager import Checkpoints
from sd3_jax.checkpoints.restoring import restore_params
from sd3_jax.data import images, records, shards, tokenizers
from sd3_jax.data.ingest import tars
from sd3_jax.data.records import Record
from sd3_jax.distributed import lock, sharding
from sd3_jax.errors import UserError
from sd3_jax.monitoring import metrics
from sd3_jax.sampling.job import prompt_file
from sd3_jax.tools.parity import tiny_tokenizers
from sd3_jax.weights import safetensors
from sd3_jax.weights.safetensors import Entry

TINY = "configs/quickstart.py:tiny"
LATENTS = "configs/sd3_2b.py:tiny"  # of 8 x 8 x 16, read from records
RECORDS = f"train config={LATENTS} data.name=records data.held_out="


class Row(NamedTuple):
    """`command` is short for a command line: `optim.lr=1` is --config.optim.lr=1, what
    has no config or workdir gets TINY and a new one, and {name} is a fixture. A list is
    the command line itself. All of `words` must be in what is said."""

    number: int
    command: str | list[str]
    words: tuple[str, ...]
    code: int

    @property
    def name(self):
        text = self.command if isinstance(self.command, str) else " ".join(self.command)
        return f"{self.number:02d} {text}"


def row(number, command, *words, code=2):
    return Row(number, command, words, code)


MISTAKES = [
    row(1, "train optim.lrr=1", 'key config.optim.lrr; did you mean "config.optim.lr"'),
    row(1, "train data.batchsize=8", 'did you mean "config.data.batch_size"'),
    row(1, "train batch=8", 'did you mean "config.data.batch_size"'),
    row(
        2,
        "train config={recipes}/locked.py",
        "locked.py:5: unknown key config.optim.learning_rate",
    ),
    row(
        2,
        "train config={recipes}/unlocked.py",
        "unlocked.py: unknown key config.optim.learning_rate",
        'did you mean "config.optim.lr"',
    ),
    row(2, "train config={recipes}/top.py", 'config.sed; did you mean "config.seed"'),
    row(2, "train config={recipes}/lacks.py", "config.optim.accumulate is missing"),
    row(
        3, "train data.batch_size=2.5", "config.data.batch_size = 2.5: expected an int"
    ),
    row(
        3, "train data.batch_size=1e3", "= 1e3: expected an int", 'did you mean "1000"'
    ),
    row(
        3, "train model.qk_norm=yes", "config.model.qk_norm = yes: expected true or fal"
    ),
    row(3, "train optim.lr=fast", "config.optim.lr = fast: expected a number"),
    row(3, "train train.changes=3", "config.train.changes = (3,): expected texts"),
    row(
        3,
        "train config={recipes}/typed.py",
        "typed.py:5: config.optim.lr = ",
        '"1e-3": expected a',
    ),
    row(4, ["train", "optim.lr=1"], "argument optim.lr=1; did you forget --?"),
    row(4, ["train", "sample"], "unexpected argument sample"),
    row(5, "train seed=1 seed=2", "twice: --config.seed=1 and --config.seed=2"),
    row(5, "train workdir=a workdir=b", "twice: --workdir=a and --workdir=b"),
    row(6, ["train", "--workdir=a"], "no recipe given; set --config=RECIPE"),
    row(6, ["train", f"--config={TINY}"], "no workdir given; set --workdir=DIR"),
    row(6, [f"--config={TINY}"], "no job given; expected one of train, sample"),
    row(
        7, "train optim.lr=nan", "config.optim.lr = nan: expected a number in (0, 100]"
    ),
    row(7, "train optim.lr=-1", "config.optim.lr = -1.0: expected a number in (0, 100"),
    row(
        7, "train optim.clip=nan", "config.optim.clip = nan: expected a number in [0, "
    ),
    row(7, "train text.dropout=nan", "dropout = nan: expected a number in [0, 1)"),
    row(7, "train ema.decay=1", "config.ema.decay = 1.0: expected a number in [0, 1)"),
    row(7, "train data.batch_size=0", "batch_size = 0: expected an integer in [1, "),
    row(7, "train data.batch_size=-8", "batch_size = -8: expected an integer in [1"),
    row(7, "train data.name=", 'config.data.name = "": expected one of digits'),
    row(8, "train data.name=folder", '"folder"', "records (which precompute makes"),
    row(7, "train image.height=6", "config.image.height = 6: expected at least 8"),
    row(7, "train model.weight_sets=3", "text_split = 5: expected less than the 4 tok"),
    row(7, "train model.width=30", "config.model.width = 30: expected a multiple of 4"),
    row(8, "trian", 'unknown job "trian"; did you mean "train"'),
    row(8, f"train config={TINY[:-5]}:tinny", '"tinny"; did you mean "tiny"'),
    row(8, "train config=configs/quikstart.py", 'did you mean "configs/quickstart.py"'),
    row(8, "train model.name=unett", '"unett": expected one of mmdit', '"unet"'),
    row(8, "train text.name=byte", 'text.name = "byte"', 'did you mean "bytes"'),
    row(8, "train flow.path=vp", 'config.flow.path = "vp": expected one of rf'),
    row(8, "train data.name=digit", '"digit": expected one of digits, synthetic, rec'),
    row(8, f"train config={LATENTS} data.name=recods", 'did you mean "records"'),
    row(
        8, "train data.name=synthetic", 'config.text.name = "bytes": expected "precomp'
    ),
    row(
        8, "train image.autoencoder=latents image.height=16 image.width=16", '"pixels"'
    ),
    row(8, "train optim.name=sgd", 'config.optim.name = "sgd": expected one of adamw'),
    row(8, "train optim.schedule=cosin", '"cosin"', 'did you mean "cosine"'),
    row(8, "sample sample.solver=eular", 'did you mean "euler"'),
    row(
        8,
        "evaluate eval.scores=ssim",
        'config.eval.scores: "ssim"; expected one of val_l',
    ),
    row(7, "evaluate eval.scores=", "config.eval.scores = (): set at least one of"),
    row(7, "plan plan.slices=", "config.plan.slices = (): expected one text"),
    row(7, "compare", "config.image.height = 8: expected a multiple of 16"),
    row(7, "benchmark", "config.benchmark.scaling.tokens: 512 are 16 x 32, expected"),
    row(
        7,
        "evaluate eval.scores=fid eval.pictures=1 eval.features=pixels",
        "config.eval.pictures = 1: must be at least 2 to compute fid",
    ),
    row(8, "convert convert.to=onnx", '"onnx": expected one of diffusers, original'),
    row(9, "train mesh.fsdp=3", "fsdp=3", "needs 3 devices but there are 8"),
    row(9, "train mesh.data=3 mesh.fsdp=2", "needs 6 devices but there are 8"),
    row(9, "train mesh.data=3", "data=3, fsdp=-1", "3 does not divide the 8 devices"),
    row(
        10,
        "train mesh.fsdp=16",
        "needs 16 devices but there are 8",
        "set one axis to -1",
    ),
    row(11, "train mesh.fdsp=2", 'config.mesh.fdsp; did you mean "config.mesh.fsdp"'),
    row(11, "train mesh.fsdp=2 mesh.fsdp=4", "twice: --config.mesh.fsdp=2 and"),
    row(11, "train mesh.data=-1", "config.mesh = ", "-1", "for one axis at most"),
    row(12, "train data.batch_size=12", "batch_size = 12: must be a multiple", "as 16"),
    row(12, "train data.batch_size=4", "multiple of data x fsdp = 8, such as 8"),
    row(12, "train optim.accumulate=3", "accumulate = 3; the nearest is 9"),
    row(
        13,
        "train config=configs/sd3_2b.py data.batch_size=8 model.depth=2"
        " model.num_heads=4 model.width=1500",
        "config.mesh: weight ['denoiser']",
        "1500 by fsdp=8; choose a divisor",
    ),
    row(
        16,
        "train config=configs/sd3_2b.py:tiny data.name=records data.records={shard}"
        " data.held_out={other} eval.examples=99",
        "config.data.held_out: ",
        "8 records but config.eval.examples",
        "--config.eval.examples=8",
    ),
    row(17, RECORDS + " data.records=no/a-0.arecord", "no/a-0.arecord: cannot be read"),
    row(17, RECORDS + " data.records={empty}", "empty.arecord: has 0 bytes, expected"),
    row(
        17,
        RECORDS + " data.records={cut}",
        "cut.arecord: not a shard of records, or truncated",
    ),
    row(17, RECORDS + " data.records={bit}", "bit.arecord:0: Corrupted"),
    row(
        18, RECORDS + " data.records={shard},{shard}", "the same shard is listed twice"
    ),
    row(18, RECORDS + " data.records=no/*.arecord", "no/*.arecord: matches no file"),
    row(19, RECORDS + " data.records={killed}/*.arecord", "*.arecord: matches no file"),
    row(
        20, RECORDS + " data.records={version}", "version.arecord:0: version 3 is newer"
    ),
    row(20, RECORDS + " data.records={field}", "field.arecord:0: caption: missing"),
    row(
        21, RECORDS + " data.records={nan}", "nan.arecord:0: pooled: 1 of 32 values are"
    ),
    row(
        21,
        RECORDS + " data.records={small}",
        "small.arecord: latents of 4 x 4 x 16, the recipe's are 8 x 8 x 16",
    ),
    row(29, "sample weights={words} sample.prompt=a", "tokenizer for clip_l has 521 t"),
    row(
        31,
        "train image.height=9",
        "a multiple of 2 (1 pixel a latent, 2 ",
        "the nearest is 8",
    ),
    row(31, f"train config={LATENTS} image.width=250", "16 (8 pix", "nearest is 256"),
    row(
        32,
        f"train config={LATENTS} image.width=4096",
        "config.image.width = 4096: expected at m",
    ),
    row(
        33, "sample workdir=no/run", "no complete checkpoint in ", "no/run/checkpoints"
    ),
    row(33, "convert weights={trained}", "is a run of sd3_jax, not released weights"),
    row(33, "evaluate workdir={trained}/checkpoints/2", "/2/checkpoints"),
    row(33, "convert workdir={hollow}", "cannot read", "hollow/checkpoints/7"),
    row(
        33,
        "sample weights=no/such/model sample.prompt=a",
        "config.weights = no/such/model: no",
    ),
    row(
        33, "convert weights={trained}/checkpoints/2", "/2: expected a diffusers folder"
    ),
    row(33, "report workdir=no/run", "no/run: no metrics.jsonl to report on"),
    row(
        34,
        "convert workdir={trained} model.depth=1",
        "config.model.depth was 2, is 1; use the recipe and variant of that run",
    ),
    row(
        34,
        "sample workdir={trained} model.qk_norm=false",
        "config.model.qk_norm was true, is false; use",
    ),
    row(
        34, "convert weights={lacks}", "lacks.safetensors: denoiser: 1 missing", "qkv.w"
    ),
    row(
        34, "convert weights={nans}", "nans.safetensors: pos_embed holds", "NaN or inf"
    ),
    row(
        37, "convert workdir={ruined}", "checkpoints/2 is damaged: state/", "100 bytes"
    ),
    row(
        40,
        "train workdir={trained} optim.name=muon",
        "optim.name was",
        "muon",
        "changes",
    ),
    row(40, "train workdir={trained} ema.decay=0.9", "ema.decay was 0.995, is 0.9"),
    row(40, "train workdir={trained} model.depth=3", "config.model.depth was 2, is 3"),
    row(
        40,
        "train workdir={trained} model.depth=3 train.changes=model.depth",
        "checkpoints/2 does not fit: 0 missing, 0 extra",
        "of another dtype or shape",
    ),
    row(40, "train workdir={trained} train.changes=optim.foo", 'no key "optim.foo"'),
    row(42, "train workdir={newer}", "format 99, written by sd3_jax 9.0; this is sd3_"),
    row(
        42, "sample workdir={newer}", "format 99, written by sd3_jax 9.0; this is sd3_"
    ),
    row(
        43,
        "convert weights={pickles}/a.ckpt",
        "a.ckpt is a pickle",
        "convert it to safet",
    ),
    row(43, "convert weights={pickles}/b.pth", "b.pth is a pickle", "safetensors/conv"),
    row(43, "convert weights={pickles}/c.safetensors", "c.safetensors is a pickle"),
    row(43, "convert weights={pickles}/folder", "pytorch_model.bin is a pickle"),
    row(
        44, "convert weights={sharded}", "index.json names 5 files, of which 2 are mis"
    ),
    row(45, "convert weights={other}", "other.arecord: not a safetensors file"),
    row(
        45, "convert weights={foreign}", "foreign.safetensors is not a model of this fa"
    ),
    row(
        45,
        "convert weights={stray}",
        "stray.safetensors: 1 tensors belong to no known part",
    ),
    row(
        45,
        "convert weights={strange}/a.gguf",
        "a.gguf is a GGUF file without tensors",
    ),
    row(
        45,
        "sample weights={strange}/pointer.safetensors sample.prompt=a",
        "is a git-lfs pointer",
        "git lfs pull",
    ),
    row(45, "convert weights={strange}/page.safetensors", "is a web page: download it"),
    row(
        45,
        "convert weights={strange}/scaled.safetensors",
        "joint_blocks.0.weight is missing, but its scale_weight exists",
    ),
    row(
        45,
        "convert weights={strange}/shards",
        "1 of the 3 shards of model.safetensors are missing: 2",
    ),
    row(
        33,
        "sample weights=https://huggingface.co/a/b/blob/main/c.safetensors"
        " sample.prompt=a",
        'is a link; use "a/b/c.safetensors"',
    ),
    row(
        33,
        "sample weights={trained},no/such.safetensors sample.prompt=a",
        '"no/such.safetensors": no such file',
    ),
    row(46, "train workdir={full}", "full/checkpoints has 1e-06 GB free but two"),
    row(47, "train workdir=/proc/no", "cannot write to /proc/no"),
    row(47, "train workdir={file}", "file is a file, expected a folder"),
    row(47, "sample workdir={file}/run", "file is a file, expected a folder"),
    row(47, "train workdir=gs:/bucket/run", 'did you mean "gs://bucket/run"'),
    row(
        47,
        "convert workdir={trained} convert.out={file}",
        "file already exists; set a new",
    ),
    row(
        48, f"train config={LATENTS} workdir={{trained}}", "trained with other settings"
    ),
    row(49, "train workdir={held}", "another job is running in ", "pid ", "since 20"),
    row(
        50,
        "train optim.lr=100 optim.weight_decay=100 train.steps=8",
        ": loss ",
        "the update was skipped; last good step",
        "its batch: digits:",
        code=1,
    ),
    row(
        51,
        "train optim.lr=100 optim.weight_decay=100 train.steps=8"
        " train.skip_nonfinite=1",
        "last good step",
        "2 steps were skipped, and config.train.skip_nonfinite = 1",
        code=1,
    ),
    row(
        53,
        "sample sample.steps=0",
        "sample.steps = 0: expected an integer in [1, 1",
    ),
    row(
        53, "sample sample.steps=-1", "sample.steps = -1: expected an integer in [1, 1"
    ),
    row(53, "sample sample.steps=2.5", "config.sample.steps = 2.5: expected an int"),
    row(53, "sample sample.cfg=nan", "cfg = nan: expected a number in [0, 1000]"),
    row(53, "sample sample.cfg=inf", "cfg = inf: expected a number in [0, 1000]"),
    row(53, "sample sample.cfg=-1", "cfg = -1.0: expected a number in [0, 1000]"),
    row(
        53, "sample sample.seed=-1", "seed = -1: expected an integer in [0, 4294967295]"
    ),
    row(53, "sample sample.seed=4294967296", "expected an integer in [0, 4294967295]"),
    row(53, "sample sample.seed=0.5", "config.sample.seed = 0.5: expected an int"),
    row(
        53, "sample sample.cfg_start=0.9 sample.cfg_stop=0.1", "at most config.sample."
    ),
    row(
        54,
        "sample 'sample.prompt=a\x07b'",
        "config.sample.prompt: \\x07 at character 2",
    ),
    row(
        54,
        "sample sample.prompt=\udcff",
        "config.sample.prompt: \\udcff at character 1",
    ),
    row(
        54,
        f"sample sample.prompt={9000 * 'a'}",
        "9000 characters; the limit is 8192",
    ),
    row(54, "sample train.prompts=", "no prompt; set --config.sample.prompt=TEXT"),
    row(54, "sample sample.prompts_file={latin}", "latin.txt: not UTF-8 at byte 8"),
    row(54, "sample sample.prompts_file={blank}", "blank.txt: holds no prompt"),
    row(
        61, "train data.mix=0,0,0", "config.data.mix = (0.0, 0.0, 0.0): expected three"
    ),
    row(61, "train data.mix=1,-1,1", "(1.0, -1.0, 1.0): expected three numbers"),
    row(61, "train data.mix=1,1", "config.data.mix = (1.0, 1.0): expected three"),
    row(
        61, RECORDS + " data.records={shard} data.weights=0", "weights = (0,): expected"
    ),
    row(61, RECORDS + " data.records={shard} data.weights=-1", "numbers in (0, "),
    row(61, RECORDS + " data.records={shard} data.weights=1,2", "one for each of the"),
    row(64, "train train.steps=2147483648", "expected an integer in [1, 2147483647]"),
    row(64, "train train.steps=-1", "train.steps = -1: expected an integer in [1, "),
]


def expand(command, fixture):
    """The command line that a row's command is short for."""
    if isinstance(command, list):
        return command
    known = {name: str(fixture(name)) for name in re.findall(r"{(\w+)}", command)}
    job, *words = shlex.split(command.format(**known))
    own = ("config=", "workdir=")
    argv = [f"--{x}" if x.startswith(own) else f"--config.{x}" for x in words]
    usual = {"config": TINY, "workdir": fixture("tmp_path") / "run"}
    given = {x.partition("=")[0] for x in words}
    return [job, *argv, *(f"--{k}={v}" for k, v in usual.items() if k not in given)]


@pytest.mark.parametrize("row", MISTAKES, ids=lambda row: ascii(row.name)[1:-1][:80])
def test_a_mistake_is_one_line(row, request, capsys, caplog):
    argv = expand(row.command, request.getfixturevalue)
    if row.number in (50, 51):  # those alone come to train
        request.getfixturevalue("one_device")
    capsys.readouterr()
    caplog.clear()
    assert main.main(argv) == row.code
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("sd3-jax: error: ")
    assert sum(line.startswith("sd3-jax: error:") for line in said) == 1
    assert all(words in said[-1] for words in row.words), said[-1]
    assert not re.search(r"Traceback|[\x00-\x1f\x7f]", said[-1])
    assert row.code == 1 or "compiled the step" not in caplog.text


def test_every_number_is_here_or_said_to_be_elsewhere():
    names = " ".join(name for name in globals() if name.startswith("test_"))
    tests = {int(number) for number in re.findall(r"(?<=_)\d\d(?=_)", names)}
    elsewhere = {int(number) for number in re.findall(r"^ {4}(\d\d) ", __doc__, re.M)}
    assert {row.number for row in MISTAKES} | tests | elsewhere == set(range(1, 65))


# What is no mistake, or none of one process


def test_13_a_small_weight_that_does_not_divide_is_replicated_and_told_of(caplog):
    shape = jax.ShapeDtypeStruct((12, 4), jnp.float32)
    boxed = {"w": nn.LogicallyPartitioned(shape, ("embed", None))}
    assert not any(sharding.shardings(boxed, sharding.make_mesh(fsdp=8))["w"].spec)
    assert "['w'] of shape (12, 4) is replicated: 12 by fsdp=8" in caplog.text


def test_14_processes_with_other_settings_are_refused_by_all(tmp_path):
    program = (
        "import os, sys; from sd3_jax import main; rate = os.environ['SD3_PROCESS_ID'];"
        "sys.exit(main.main([*sys.argv[1:], f'--config.optim.lr=0.{rate}1']))"
    )
    argv = ["-c", program, "train", f"--config={TINY}", f"--workdir={tmp_path}/run"]
    for done in multiprocess.run(argv, devices=1, timeout=100):
        assert done.returncode == 2, done.stderr[-2000:]
        assert done.stderr.splitlines()[-1] == (
            "sd3-jax: error: processes 0 and 1 have different code or config:"
            " config.optim.lr: 0.01 and 0.11"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "env, words",
    [
        (
            dict(SD3_COORDINATOR="host:1"),
            "SD3_NUM_PROCESSES is not set; set all of",
        ),
        (dict(SD3_COORDINATOR="host"), "SD3_COORDINATOR = host: expected host:port"),
        (dict(SD3_PROCESS_ID="2"), "SD3_PROCESS_ID = 2: expected an integer in [0, 1]"),
        (dict(SD3_INIT_S="never"), "SD3_INIT_S = never: expected an integer in [1, "),
    ],
    ids=str,
)
def test_15_a_wrong_description_of_processes(env, words, monkeypatch, capsys, tmp_path):
    right = dict(SD3_COORDINATOR="a:1", SD3_NUM_PROCESSES="2", SD3_PROCESS_ID="0")
    for name, value in (env if "not set" in words else right | env).items():
        monkeypatch.setenv(name, value)
    assert main.main(["train", f"--config={TINY}", f"--workdir={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sd3-jax: error: {words}")


def test_19_a_writer_that_fails_leaves_no_shard(tmp_path):
    with pytest.raises(KeyError), shards.Writer(tmp_path / "a.arecord") as shard:
        shard.write(record(0))
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_21_bad_records_are_counted_up_to_a_share(nan, caplog, capsys, tmp_path):
    command = RECORDS + " data.bad_records=0.2 data.batch_size=16 data.records={nan}"
    argv = expand(command, dict(nan=nan, tmp_path=tmp_path).get)
    assert main.main(argv) == 2  # which comes after the first record
    assert "config.data.held_out = (): validation needs" in capsys.readouterr().err
    assert "8 records for 16 places in a batch, so at least 8 repeat" in caplog.text
    assert "nan.arecord:0: pooled: 1 of 32 values are nan or infinite" in caplog.text
    assert "using the next good record; 1 of bad_records = 0.2 of 8" in caplog.text


@pytest.mark.parametrize("data", [b"", b"null", b"\0" * 64], ids=str)
def test_22_what_is_no_record_is_never_none(data):
    with pytest.raises(records.BadRecord, match="a.arecord:3: not a record: "):
        records.decode(data, "a.arecord:3")


def png(width, height):
    """A header of any size, over one line of pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")
    chunk = lambda name, data: (
        struct.pack(">I", len(data))
        + name
        + data
        + struct.pack(">I", zlib.crc32(name + data))
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


PLAIN = Image.new("RGB", (64, 48), "red")
MOVING = dict(save_all=True, append_images=[Image.new("RGB", (64, 48), "blue")])


PICTURES = [
    (23, b"", "not one of JPEG, PNG, WEBP, or damaged"),
    (23, b"a text", "not one of JPEG, PNG, WEBP, or damaged"),
    (23, encoded(PLAIN, "TIFF"), "not one of JPEG, PNG, WEBP"),
    (23, encoded(PLAIN, "JPEG")[:400], "runcated"),
    (24, png(30_000, 30_000), "900000000 pixels"),
    (24, png(1, 1), "1 x 1 pixels; expected sides of 16 or more"),
    (24, png(4_000, 16), "4000 x 16 pixels; expected"),
    (26, encoded(PLAIN, "WEBP", **MOVING), "animated, 2 frames"),
    (26, encoded(PLAIN, "PNG", **MOVING), "animated, 2 frames"),
    (26, encoded(PLAIN, "GIF", **MOVING), "not one of JPEG"),
]


@pytest.mark.parametrize("number, data, words", PICTURES, ids=lambda x: str(x)[:9])
def test_23_24_26_a_picture_that_is_not_taken(number, data, words):
    with pytest.raises(images.BadImage, match="^a.tar/7: ") as error:
        images.read(data, "a.tar/7")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_25_every_mode_becomes_rgb_by_a_rule():
    clear = Image.new("RGBA", (32, 32), (0, 0, 255, 0))
    modes = {
        "CMYK": encoded(PLAIN.convert("CMYK"), "JPEG", quality=95),
        "P": encoded(PLAIN.convert("P")),
        "LA": encoded(clear.convert("LA")),
        "RGBA": encoded(clear),
        "I;16": encoded(Image.fromarray(np.full((32, 32), 0x8080, np.uint16))),
    }
    red, white, grey = (254, 0, 0), (255, 255, 255), (128, 128, 128)
    wanted = {"CMYK": red, "P": (255, 0, 0), "LA": white, "RGBA": white, "I;16": grey}
    for mode, data in modes.items():
        assert abs(images.read(data)[20, 20] - np.array(wanted[mode])).max() <= 1, mode
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    assert images.read(encoded(PLAIN, "JPEG", exif=exif)).shape == (64, 48, 3)


@pytest.mark.parametrize("caption", ["", " \n\t", None, b"", "\u2003"], ids=ascii)
def test_27_no_caption_is_the_unconditional_one(caption):
    assert records.clean(caption) == ""
    assert not tokenizers.byte_ids("", 24).any()


def test_27_captions_that_are_cut_or_refused():
    assert records.clean(10**6 * "ü") == 8_192 * "ü"
    assert records.clean("a\0fox\x1b[2J") == "a fox [2J"
    for text in b"\xff\xfe", "\ud800":
        with pytest.raises(ValueError, match="caption: not UTF-8"):
            records.clean(text)


def test_28_a_prompt_of_too_many_tokens_is_cut_and_told_of(words, caplog):
    found = tokenizers.load(words)
    texts = ["fox", *(n * "the red fox in " for n in (9, 90))]
    clip = tokenizers.token_ids(found["clip_l"], texts, 77, encoder="CLIP")
    assert clip.shape == (3, 77) and clip.max() < len(found["clip_l"])
    assert tokenizers.token_ids(found["t5"], texts, 256, encoder="T5").shape == (3, 256)
    told = [line for line in caplog.messages if "cuts 1 of 3 prompts" in line]
    assert [line.split(":")[0] for line in told] == [
        "CLIP reads 77 tokens",
        "T5 reads 256 tokens",
    ]


def test_30_members_that_are_no_samples_are_skipped_and_nothing_is_extracted(
    tmp_path, monkeypatch
):
    odd = {
        "../out.jpg": {},
        "/etc/out.jpg": {},
        "link.jpg": dict(type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "hard.jpg": dict(type=tarfile.LNKTYPE, linkname="../x"),
        "device.jpg": dict(type=tarfile.CHRTYPE),
        "huge.jpg": dict(size=2000),
    }
    path = tmp_path / "in" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, changes in {"a.jpg": dict(size=3), **odd, "a.txt": {}}.items():
            member = tarfile.TarInfo(name)
            for key, value in changes.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    monkeypatch.setattr(tars, "MEMBER", 1000)
    places = list(tars.members(path))
    assert [(x.key, x.extension, x.size) for x in places if not x.reason] == [
        ("a", "jpg", 3),
        ("a", "txt", 0),
    ]
    reasons = Counter(x.reason for x in places if x.reason)
    assert sum(reasons.values()) == len(odd) and max(reasons.values()) == 2
    assert [x.name for x in tmp_path.rglob("*")] == ["in", "a.tar"]
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(tars.BadTar, match=f"{path}: at a.jpg: .*"):
        list(tars.members(path))


def test_35_a_checkpoint_of_another_dtype_is_not_cast(trained):
    parts = model_parts.build_parts(
        main.parse(["train", f"--config={TINY}", "--workdir=a"])[1]
    )
    params = tree.unbox(jax.eval_shape(parts.objective.init, jax.random.key(0)))
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    with pytest.raises(UserError, match=r"is float32\[.*\], expected bfloat16\["):
        restore_params(trained / "checkpoints", half)


def test_36_a_flipped_bit_sets_a_step_aside(copy, caplog):
    damaged = largest(copy / "checkpoints" / "2")
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    train(copy, "train.steps=1")
    assert f"{copy}/checkpoints/2 is damaged: " in caplog.text
    assert "renamed it to damaged-2; step 1 is the newest now" in caplog.text


@pytest.mark.parametrize("how", ["cut", "deleted", "about", "config", "data"])
def test_37_a_damaged_step_is_passed_over(copy, tmp_path, caplog, how):
    damaged = largest(copy / "checkpoints" / "2")
    if how == "cut":
        damaged.write_bytes(damaged.read_bytes()[:100])
    elif how == "deleted":
        damaged.unlink()
    else:
        (copy / "checkpoints" / "2" / how / "data.json").write_text("")
    run(f"convert workdir={copy}", tmp_path)
    assert "using an earlier step" in caplog.text
    assert f"step 1 of {copy}" in caplog.text


def test_38_only_a_step_that_is_whole_counts(copy, tmp_path, caplog):
    steps = copy / "checkpoints"
    (steps / "9").mkdir()
    shutil.copytree(steps / "2", steps / "5")
    (steps / "5" / "commit_success.txt").unlink()
    run(f"convert workdir={copy}", tmp_path)
    assert f"step 2 of {copy}" in caplog.text


def test_39_damaged_metrics_do_not_end_a_run(copy, one_device):
    path = copy / "metrics.jsonl"
    path.write_bytes(b'\0{"step": 1, "ki\n[]\n' + path.read_bytes()[:-30])
    train(copy, "train.steps=3 train.changes=train.steps")
    assert [x["step"] for x in metrics.read(copy) if x["kind"] == "train"][-1] == 3


def test_41_another_number_of_devices_may_go_on(copy, caplog):
    train(copy, "train.steps=2 mesh.data=2")
    assert "was saved in another environment (" in caplog.text
    assert f"{copy} already has all of its 2 steps" in caplog.text


def test_45_a_file_says_which_model_it_is(weights, tmp_path, caplog):
    half = lambda key, x: {key: x.astype(ml_dtypes.float8_e4m3fn)}
    eight = rewritten(weights, tmp_path / "eight.safetensors", half)
    run(f"convert weights={eight} convert.to=original", tmp_path)
    assert (
        "an SD3 transformer: depth 2, width 32, qk-norm, 0 dual blocks" in caplog.text
    )
    found, _ = safetensors.open_file(tmp_path / "run" / "model.safetensors")
    assert {x.dtype.name for x in found.values()} == {"float8_e4m3fn"}  # as it was


def test_56_the_devices_are_named(trained):
    about = json.loads((trained / "run.json").read_text())
    assert (about["devices"], about["device_kind"]) == (1, "cpu")


def test_52_a_spike_is_in_the_log(trained):
    rows = [x for x in metrics.read(trained) if x["kind"] == "train"]
    assert len(rows) == 2 and all(x["loss"] > 0 < x["grad_norm"] for x in rows)


@pytest.mark.parametrize("text", [" ", "🦊" * 40, "слон 象 ฟ", "\u202eon", 99 * "a"])
def test_54_any_text_is_a_prompt(text):
    command = ["sample", f"--config={TINY}", "--workdir=a"]
    config = main.parse([*command, f"--config.sample.prompt={text}"]).config
    (task,) = prompt_file.tasks(config)
    ids = tokenizers.byte_ids(task.caption, 24)
    assert task.caption == text and ids.shape == (24,) and ids.max() < 384


def test_63_a_damaged_cache_of_programs_is_compiled_again(tmp_path):
    def compiled():
        jax._src.compilation_cache.reset_cache()
        return jax.jit(lambda x: jnp.sin(x) * 63)(jnp.arange(3.0))

    known = "cache_dir", "persistent_cache_min_compile_time_secs"
    known = [f"jax_compilation_{known[0]}", f"jax_{known[1]}"]
    before = [getattr(jax.config, name) for name in known]
    try:
        for name, value in zip(known, [str(tmp_path), 0.0]):
            jax.config.update(name, value)
        wanted, files = compiled(), list(tmp_path.glob("*sin*-cache"))
        files = list(tmp_path.glob("*-cache"))
        for file in files:
            file.write_bytes(file.read_bytes()[:40])
        with pytest.warns(UserWarning, match="persistent compilation cache"):
            found = compiled()
    finally:
        for name, value in zip(known, before):
            jax.config.update(name, value)
        jax._src.compilation_cache.reset_cache()
    assert files and np.array_equal(found, wanted)


def test_64_a_step_below_one_is_not_saved(tmp_path):
    with Checkpoints(tmp_path, every=1, keep=1, keep_every=None) as checkpoints:
        for step in 0, -1:
            assert not checkpoints.save(step, {"x": jnp.ones(2)}, {}, {}, force=True)
    assert not list(tmp_path.glob("*"))


# Commands, and what the rows name in braces

OFTEN = "checkpoint.every=1 train.eval_every=9 train.sample_every=9"


def run(command, tmp_path):
    """A command that is right."""
    assert main.main(expand(command, dict(tmp_path=tmp_path).get)) == 0


def train(workdir, flags):
    run(f"train workdir={workdir} {OFTEN} {flags}", workdir)


@pytest.fixture(autouse=True)
def heard(caplog):
    caplog.set_level(logging.INFO)


def on_one_device(patch):
    devices = jax.devices()[:1]
    make = functools.partial(sharding.make_mesh, devices=devices)
    patch.setattr(sharding, "make_mesh", make)
    patch.setattr(jax, "device_count", lambda: 1)


@pytest.fixture
def one_device(monkeypatch):
    on_one_device(monkeypatch)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of two steps, both saved, by one device."""
    path = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        train(path, "train.steps=2")
    return path


@pytest.fixture
def copy(trained, tmp_path):
    """One of it, to be damaged."""
    return shutil.copytree(trained, tmp_path / "copy")


def largest(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


@pytest.fixture
def ruined(copy):
    shutil.rmtree(copy / "checkpoints" / "1")
    damaged = largest(copy / "checkpoints" / "2")
    damaged.write_bytes(damaged.read_bytes()[:100])
    return copy


@pytest.fixture
def newer(copy):
    path = copy / "checkpoints" / "2" / "about" / "data.json"
    about = json.loads(path.read_text()) | {"format": 99}
    about["made"]["sd3_jax"] = "9.0"
    path.write_text(json.dumps(about))
    shutil.rmtree(copy / "checkpoints" / "2" / "sums")
    return copy


@pytest.fixture
def hollow(tmp_path):
    path = tmp_path / "hollow" / "checkpoints" / "7" / "commit_success.txt"
    path.parent.mkdir(parents=True)
    path.write_text("")
    return tmp_path / "hollow"


HEAD = "from configs import quickstart\n\ndef get_config():\n    c = quickstart."
RECIPES = {
    "locked": "c.optim.update(learning_rate=1)",
    "typed": "c.optim.lr = '1e-3'",
    "unlocked": "c.unlock(); c.optim.learning_rate = 1",
    "top": "c.unlock(); c.sed = 1",
    "lacks": "c.unlock(); c.optim = dict(lr=1e-3)",
}


@pytest.fixture(scope="session")
def recipes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    for name, line in RECIPES.items():
        text = f"{HEAD}get_config('tiny')\n    {line}\n    return c\n"
        (folder / f"{name}.py").write_text(text)
    return folder


def record(seed, side=8):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    tensors = dict(latents=normal(side, side, 16), context=normal(24, 64))
    return Record(tensors | dict(pooled=normal(32)), f"number {seed}", "a fox")


def shard_of(path, some):
    with shards.Writer(path) as writer:
        for each in some:
            writer.write(each)
    return path


@pytest.fixture(scope="session")
def shard(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "shard.arecord"
    return shard_of(path, map(record, range(8)))


@pytest.fixture(scope="session")
def other(shard):
    return shard_of(shard.with_name("other.arecord"), map(record, range(8, 16)))


@pytest.fixture
def small(tmp_path):
    some = [record(i, side=4) for i in range(8)]
    return shard_of(tmp_path / "small.arecord", some)


@pytest.fixture
def empty(tmp_path):
    (tmp_path / "empty.arecord").write_bytes(b"")
    return tmp_path / "empty.arecord"


@pytest.fixture
def cut(shard, tmp_path):
    (tmp_path / "cut.arecord").write_bytes(shard.read_bytes()[:-100])
    return tmp_path / "cut.arecord"


@pytest.fixture
def bit(shard, tmp_path):
    data = bytearray(shard.read_bytes())
    data[2_000] ^= 1  # of the first record
    (tmp_path / "bit.arecord").write_bytes(data)
    return tmp_path / "bit.arecord"


@pytest.fixture
def killed(tmp_path):
    folder = tmp_path / "killed"
    writer = shards.Writer(folder / "a.arecord")
    writer.write(record(0))
    yield folder
    writer.__exit__(KeyError, None, None)


def forged(path, first, **changes):
    """A shard whose first record is as this code would never write it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "decode", lambda *_: None)
        for name, value in changes.items():
            patch.setattr(records, name, value)
        data = [records.encode(first)]
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for each in [*data, *(records.encode(record(i)) for i in range(7))]:
        writer.write(each)
    writer.close()
    return path


@pytest.fixture
def version(tmp_path):
    return forged(tmp_path / "version.arecord", record(0), VERSION=3)


@pytest.fixture
def field(tmp_path):
    save = records.save
    less = lambda x, said: save(x, {k: v for k, v in said.items() if k != "caption"})
    return forged(tmp_path / "field.arecord", record(0), save=less)


@pytest.fixture
def nan(tmp_path):
    first = record(0)
    first.tensors["pooled"][3] = np.nan
    return forged(tmp_path / "nan.arecord", first)


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """A folder of a model whose tokenizers and encoder are not of one another."""
    folder = tmp_path_factory.mktemp("words")
    tiny_tokenizers.save(folder)
    index = {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    encoder = folder / "text_encoder"
    x = {f"text_model.encoder.layers.{i}.x": np.ones(3, np.float32) for i in range(12)}
    safetensors.write_file(encoder / "model.safetensors", entries(x))
    (encoder / "config.json").write_text(json.dumps({"vocab_size": 49408}))
    return folder


def entries(tensors):
    return {k: Entry(x.dtype, x.shape, lambda x=x: x) for k, x in tensors.items()}


@pytest.fixture(scope="session")
def weights(trained, tmp_path_factory):
    """Those of the run, as one file."""
    folder = tmp_path_factory.mktemp("weights")
    path = folder / "a.safetensors"
    run(f"convert workdir={trained} convert.to=original convert.out={path}", folder)
    return path


def rewritten(weights, path, change, said=True):
    """The file again, each of its tensors as `change(key, x)` has it."""
    tensors, metadata = safetensors.open_file(weights)
    made = {}
    for key, tensor in tensors.items():
        made |= change(key, tensor.read())
    safetensors.write_file(path, entries(made), metadata if said else {})
    return path


@pytest.fixture
def lacks(weights, tmp_path):
    gone = "joint_blocks.1.x_block.attn.qkv.weight"
    change = lambda key, x: {} if key.endswith(gone) else {key: x}
    return rewritten(weights, tmp_path / "lacks.safetensors", change)


@pytest.fixture
def nans(weights, tmp_path):
    change = lambda key, x: {key: np.where(x == x.max(), np.nan, x)}
    return rewritten(weights, tmp_path / "nans.safetensors", change)


@pytest.fixture
def foreign(weights, tmp_path):
    change = lambda key, x: {key.replace("joint_blocks", "input_blocks"): x}
    return rewritten(weights, tmp_path / "foreign.safetensors", change, said=False)


@pytest.fixture
def stray(weights, tmp_path):
    path, added = tmp_path / "stray.safetensors", {"odd.weight": np.ones(3, np.float32)}
    return rewritten(
        weights,
        path,
        lambda key, x: {key: x} | (added if key.endswith("pos_embed") else {}),
    )


@pytest.fixture
def strange(tmp_path):
    """Files that are no safetensors, or no plain weights."""
    for name, data in {
        "a.gguf": b"GGUF\x03\0\0\0" + bytes(40),
        "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha",
        "page.safetensors": b"<!doctype html><html><body>Sign in</body></html>",
    }.items():
        (tmp_path / name).write_bytes(data)
    one = {"joint_blocks.0.scale_weight": np.ones(1, np.float32)}
    safetensors.write_file(tmp_path / "scaled.safetensors", entries(one))
    for i in 1, 3:
        name = f"shards/model-0000{i}-of-00003.safetensors"
        safetensors.write_file(tmp_path / name, entries({str(i): np.ones(1, "f4")}))
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    tensors = {str(i): np.ones(8, np.float32) for i in range(5)}
    safetensors.write_folder(folder, entries(tensors), "model", shard=32)
    for i in 2, 4:
        (folder / f"model-0000{i}-of-00005.safetensors").unlink()
    (folder / "config.json").write_text('{"_class_name": "SD3Transformer2DModel"}')
    return folder


@pytest.fixture
def pickles(tmp_path):
    (tmp_path / "folder").mkdir()
    for name, protocol in ("a.ckpt", 4), ("c.safetensors", 2):
        (tmp_path / name).write_bytes(pickle.dumps({"a": 1}, protocol))
    for name in "b.pth", "folder/diffusion_pytorch_model.bin":  # as PyTorch has them
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            file.writestr("archive/data.pkl", pickle.dumps({}))
    return tmp_path


@pytest.fixture
def full(tmp_path, monkeypatch):
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    return tmp_path / "full"


@pytest.fixture
def file(tmp_path):
    (tmp_path / "file").write_text("")
    return tmp_path / "file"


@pytest.fixture
def held(tmp_path):
    with lock.held(tmp_path / "held", "train"):
        yield tmp_path / "held"


@pytest.fixture
def latin(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"a fox\na \xfcber")
    return tmp_path / "latin.txt"


@pytest.fixture
def blank(tmp_path):
    (tmp_path / "blank.txt").write_text("\n \n")
    return tmp_path / "blank.txt"
