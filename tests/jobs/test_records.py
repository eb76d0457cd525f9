"""Training from records on disk, end to end, and what is said before it begins."""

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from sd3_jax import main
from sd3_jax.assembly import examples, stored_records
from sd3_jax.data import records
from sd3_jax.data.records import Record
from sd3_jax.data.shards import Writer
from sd3_jax.monitoring import metrics

RECIPE = "configs/sd3_2b.py:tiny"  # 64 pixels: latents of 8 x 8 x 16
BATCH = 8


def record(seed: int, side=8, width=64) -> Record:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    tensors = dict(latents=normal(side, side, 16), context=normal(24, width))
    return Record(tensors | dict(pooled=normal(32)), f"number {seed}", "a fox")


def write(path, seeds, **shape):
    with Writer(path) as shard:
        for seed in seeds:
            shard.write(record(seed, **shape))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    write(folder / "a-0.arecord", range(7))
    write(folder / "a-1.arecord", range(7, 14))
    write(folder / "b.arecord", range(20, 28))
    write(folder / "held-out.arecord", range(30, 46))
    return folder


def flags(folder, **changes):
    given = dict(records=f"{folder}/a-*.arecord,{folder}/b.arecord", weights="3,1")
    given |= dict(held_out=f"{folder}/held-out.arecord", batch_size=BATCH)
    given |= dict(name="records")
    return [
        f"--config={RECIPE}",
        *(f"--config.data.{name}={x}" for name, x in (given | changes).items()),
    ]


def config(folder, *more, **changes):
    return main.parse(
        ["train", "--workdir=unused", *flags(folder, **changes), *more]
    ).config


def train(workdir, folder, steps):
    some = [f"--config.train.steps={steps}", "--config.train.eval_every=3"]
    some += ["--config.checkpoint.every=2"]
    argv = ["train", f"--workdir={workdir}", *flags(folder), *some]
    return main.main(argv), [
        row["loss"] for row in metrics.read(workdir) if row["kind"] == "train"
    ]


def test_training_from_records_goes_on_as_if_unbroken(folder, tmp_path):
    code, whole = train(tmp_path / "whole", folder, 5)
    assert code == 0 and len(whole) == 5 and np.isfinite(whole).all()
    val = [row for row in metrics.read(tmp_path / "whole") if row["kind"] == "val"]
    assert [row["step"] for row in val] == [3, 5]
    assert train(tmp_path / "two", folder, 3)[0] == 0  # in the midst of an epoch
    code, parts = train(tmp_path / "two", folder, 5)
    assert code == 0 and parts == whole


def test_the_loader_gives_what_the_program_is_compiled_for(folder):
    c = config(folder)
    loader = examples.loader(c, np.arange(2, 6), start=3)
    batch, wanted = next(loader), examples.nominal(c)
    assert batch.keys() == wanted.keys()
    for name, x in batch.items():
        assert x.shape == (4, *wanted[name].shape[1:]) and x.dtype == wanted[name].dtype
    names = loader.names(3)
    assert len(names) == BATCH and {name.split(":")[0] for name in names} <= {
        "a-0.arecord",
        "a-1.arecord",
        "b.arecord",
    }
    held = examples.source(c, held_out=True)
    assert len(held) == 16 and held.identity() != examples.source(c).identity()


def said(folder, capsys, *more, **changes):
    """The one line that a mistake is answered with, before anything is compiled."""
    compiled = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", lambda *_: compiled.append(1))
        argv = ["train", f"--workdir={folder}/run", *flags(folder, **changes), *more]
        assert main.main(argv) == 2 and not compiled
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sd3-jax: error: ")
    return error


def test_a_set_smaller_than_its_part_of_a_batch_repeats(folder, caplog):
    given = config(folder, batch_size=24)
    source = stored_records.open_records(given, held_out=False)
    assert (
        "a-*.arecord has 14 records for 18 places in a batch, so at least 4 repeat"
        in caplog.text
    )
    assert "b.arecord" not in caplog.text.partition("a-*.arecord has 14")[0]
    names = examples.loader(given, np.arange(24), examples=source).names(0)
    assert len(names) == 24 and len(set(names)) == 14 + 6


@pytest.mark.parametrize(
    "flags, size, wanted",
    [
        (["batch_size=2", "examples=5"], 2, 4),  # whole batches
        (["batch_size=16", "examples=5"], 16, 5),  # one, of which some repeat
        (["examples=16"], BATCH, 16),
    ],
)
def test_validation_has_a_batch_size_of_its_own(folder, flags, size, wanted):
    given = config(folder, *(f"--config.eval.{flag}" for flag in flags))
    assert stored_records.validated(given) == wanted
    batches = examples.loader(given, np.arange(size), held_out=True)
    assert len(next(batches)["latents"]) == size


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            dict(records=""),
            "config.data.weights = (3, 1): expected none, or one for each",
        ),
        (dict(records="", weights="()"), "config.data.records: no paths"),
        (dict(records="x*", weights="()"), "config.data.records: x*: matches no file"),
        (
            dict(records="{}/a-*d,{}/a-1.arecord"),
            "a-1.arecord: the same shard is liste",
        ),
        (dict(records="('a', 7)"), "expected paths of shards, or globs of them"),
        (
            dict(weights="3,0"),
            "config.data.weights = (3, 0): expected numbers in (0, 1e+09]",
        ),
        (dict(weights="3"), "one for each of the 2"),
        (dict(weights="-1,-2"), "expected numbers in (0, 1e+09]"),
        (
            dict(held_out="()"),
            "config.data.held_out = (): validation needs held-out shards",
        ),
        (
            dict(held_out="{}/b.arecord,{}/held-out.arecord"),
            "b.arecord is in config.data.records too",
        ),
        (
            dict(held_out="{}/*0.arecord"),
            "7 records but config.eval.examples = 16 needs 16",
        ),
        (
            dict(bad_records=1.0),
            "config.data.bad_records = 1.0: expected a number in [0,",
        ),
        (dict(bad_records="nan"), "expected a number in [0, 1)"),
        (dict(name="recods"), 'did you mean "records"?'),
    ],
    ids=str,
)
def test_mistakes_are_one_line(folder, capsys, changes, words):
    changes = {k: str(v).replace("{}", str(folder)) for k, v in changes.items()}
    assert words in said(folder, capsys, **changes)


@pytest.mark.parametrize(
    "flag, words",
    [
        (
            "image.height=32",
            "latents of 8 x 8 x 16, the recipe's are 4 x 8 x 16: config.image.height x"
            " width = 32 x 64, config.image.buckets = 1, config.model.channels = 16;"
            " the records were made at 64 x 64",
        ),
        (
            "text.length=20",
            "context of 24 x 64, the recipe's are 20 x 64: config.text.length = 20,",
        ),
        ("model.context_dim=48", "config.model.context_dim = 48"),
        ("model.pooled_dim=48", "pooled of 32, the recipe's are 48"),
        (
            "image.autoencoder=pixels --config.model.channels=3"
            " --config.model.pos_size=32",
            "its records hold latents, context, pooled: config.image.autoencoder ="
            ' "pixels" needs image',
        ),
    ],
)
def test_records_of_other_shapes(folder, capsys, flag, words):
    assert words in said(folder, capsys, *f"--config.{flag}".split())


def test_held_out_records_are_looked_at_too(folder, tmp_path, capsys):
    other = write(tmp_path / "small.arecord", range(16), side=4)
    error = said(folder, capsys, held_out=other)
    assert f"config.data.held_out: {other}: latents of 4 x 4 x 16" in error
    other.write_bytes(b"")
    assert "small.arecord: has 0 bytes" in said(folder, capsys, held_out=other)


def test_without_validation_none_are_needed(folder):
    c = config(folder, "--config.train.eval_every=11", held_out="()")
    assert len(examples.source(c)) == 22


def test_a_bad_record_ends_training_by_name(folder, tmp_path, capsys):
    path = tmp_path / "bad.arecord"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for seed in range(8):
        data = records.encode(record(seed))
        writer.write(data if seed != 5 else data[:-1] + bytes([data[-1] ^ 1]))
    writer.close()
    argv = ["train", f"--workdir={tmp_path}/run", "--config.train.eval_every=99"]
    argv += flags(folder, records=path, weights="()")
    assert main.main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"error: {path}:5: checksum: " in error
    argv += ["--config.data.bad_records=0.2", "--config.train.steps=3"]
    assert main.main(argv) == 0
