"""Every key with values that make no sense: one line at once, or a job that builds.

Building is all that a job does before it compiles: modules, shapes of state, step and
pictures, the source and the loader of examples.
"""

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath
from flax import linen as nn
from PIL import Image

from sd3_jax.assembly import (
    examples,
    finetune_start,
    precompute_plan,
    record_shapes,
)
from sd3_jax.config import command_line
from sd3_jax.config.schema import KEYS
from sd3_jax.config.validation import leaves, validate
from sd3_jax.distributed import sharding
from sd3_jax.errors import ConfigError, UserError
from sd3_jax.evaluation import picture_scores, prompt_scores
from sd3_jax.jobs import evaluate, precompute
from sd3_jax.sampling.job import prompt_file, row_batches, sampler
from sd3_jax.training.held_out_loss import Validation
from sd3_jax.training.profiler import Trace
from sd3_jax.training.program import abstract_batch, build_program

VALUES = (
    *("0", "1", "-1", "3", "999", "1000", "1024", "8192", "65536", "1048576"),
    *("2147483647", "2147483648", "9223372036854775808", "1" + "0" * 20),
    *("0.5", "1e30", "1e-30", "nan", "inf", "-inf", "1e400"),
    *("", " ", "x", "None", "True", "(1,2)", "[1, 2]", "('a',)", "()", "1e30,nan,-1"),
)
OBJECTS = (0, -1, 2**63, 10**400, 1e30, np.nan, "", "x", None, True, 1j, b"x", {1: 2})
OBJECTS += ((1, 2), [], [[1], [2]], (None,), ({},), ("a", 1), object(), np.ones(3))
TINY = "quickstart:tiny"


@pytest.fixture(scope="module")
def config():
    return command_line.load(TINY)


def accepted(config, key):
    """The values that the command line takes for key; the config has each meanwhile."""
    holder, name = command_line.place(config, key)
    before, seen = holder[name], []
    for text in VALUES:
        try:
            command_line.override(config, key, text)
            validate(config)
            if holder[name] != before and holder[name] not in seen:
                seen.append(holder[name])
                yield holder[name]
        except ConfigError as error:
            assert f"config.{key}" in str(error) or "expected" in str(error)
            assert "\n" not in str(error)
        finally:
            holder[name] = before


def test_no_value_of_a_recipe_or_a_flag_is_a_traceback(config):
    for key, _ in leaves(config):
        tuple(accepted(config, key))
        group, _, name = key.rpartition(".")
        for wrong in OBJECTS:
            plain = {name: wrong}
            for part in reversed(group.split(".") if group else ()):
                plain = {part: plain}
            try:
                validate(command_line.ConfigDict(plain, type_safe=False))
            except ConfigError as error:
                assert str(error).startswith(f"config.{key} = "), error


def test_every_number_has_an_upper_bound(config):
    """No key takes 10^20, and none 1e30: what has no bound fails late, or never."""
    for key, entry in KEYS.items():
        if isinstance(entry.default, bool | str):
            continue
        for huge in 10**20, 1e30, (10**20,), (1e30,):
            assert not entry.rule.holds(huge), (key, huge)


def built(config, tmp_path):
    """Training and painting up to what they would compile."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        rows = sharding.local_rows(mesh, config.data.batch_size)
        program = build_program(config, mesh)
        if config.train.sample_every <= config.train.steps and config.train.prompts:
            sampler.require_text_encoders(config)
        source, steps = examples.source(config), config.train.steps
        examples.encoder_of(config, source, mesh)
        parts = program.parts
        finetune_start.start(config, parts.denoiser, parts.objective, mesh)
        Validation(config, parts, mesh)
        Trace(tmp_path / "profile", **config.profile, done=0, total=steps)
        examples.loader(config, rows, examples=source)
        key = jax.eval_shape(lambda: jax.random.key(0))
        batch = abstract_batch(config, mesh)
        state, _ = program.step.eval_shape(program.abstract, key, batch, {})
        painter = sampler.TrainedSampler(config, parts, mesh)
        size = row_batches.batch_size(3, config.sample.batch_size, mesh)
        shape = lambda *x: jax.ShapeDtypeStruct(x, np.int32)
        rows = {"ids_bytes": shape(size, config.text.length), "number": shape(size)}
        images = painter.program.eval_shape(
            state.ema, rows, painter.negative, painter.times
        )
        assert images.shape[0] == size
        scored(config, parts, state.ema, mesh)
    assert all(
        np.isfinite(float(program.rate(step))) for step in (0, config.train.steps - 1)
    )


def measured(config):
    """What evaluate paints, and what judges it."""
    evaluate.check(config)
    captions, extract, _ = picture_scores.measured(config)
    benchmarks = [prompt_scores.benchmark(x, config) for x in prompt_scores.BENCHMARKS]
    return captions and extract and all(asked for _, asked in benchmarks)


def scored(config, parts, params, mesh):
    """Evaluation by every measure up to what it would compile."""
    measured(config)
    shape = lambda *x: jax.ShapeDtypeStruct(x, np.int32)
    for painter in evaluate.digit_samplers(config, parts, mesh):
        size = row_batches.batch_size(3, config.sample.batch_size, mesh)
        rows = {"ids_bytes": shape(size, config.text.length), "number": shape(size)}
        images = painter.program.eval_shape(
            params, rows, painter.negative, painter.times
        )
        assert images.shape[0] == size
    validation = Validation(config, parts, mesh)
    validation.batches()
    batch = examples.nominal(config)
    batch = {
        k: jax.ShapeDtypeStruct((validation.size, *x.shape[1:]), x.dtype)
        for k, x in batch.items()
    }
    t = jax.ShapeDtypeStruct((), np.float32)
    losses = validation.program.eval_shape(params, validation.key, batch, t)
    assert {x.shape for x in jax.tree.leaves(losses)} == {()}


def prepared(config, workdir):
    """precompute up to the first batch that it would encode."""
    settings = precompute_plan.ingest_settings(config)
    parts = precompute_plan.plan_input(config, workdir, settings)
    work = precompute.new_encoder(config, settings)
    made_by = precompute_plan.record_settings(config, work.encoder, "")
    todo = precompute_plan.remaining_parts(config, workdir, made_by, parts, {})
    assert todo == [*range(len(parts))]
    assert list(precompute.storage_lines(config, work, parts))
    progress = SimpleNamespace(add=lambda **_: None)
    with ThreadPoolExecutor(config.precompute.threads) as readers:
        batches = work.batches(parts[0], readers, [], [], progress)
        for batch in batches:
            assert 0 < len(batch) <= work.size
    return True


HOOKS = """
def some(images, *_):
    return [0.5] * len(images)
"""


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """Pictures, prompts and functions, for the keys that name some, in a folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "judged.py").write_text(HOOKS)
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        path = tmp_path / "pictures" / f"{i}.png"
        Image.fromarray(np.full((16, 12 + i, 3), i, np.uint8)).save(path)
        path.with_suffix(".txt").write_text("one")
    line = {"tag": "colors", "prompt": "a", "include": [{"class": "cat", "count": 1}]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    (tmp_path / "words.txt").write_text('a sign, "a fox"')
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "color_val.txt").write_text("a red fox")
    return {
        "ingest.inputs": ("pictures",),
        "precompute.only": (),
        "eval.scores": ("val_loss", "digits", "fid", "kid", *prompt_scores.BENCHMARKS),
        "eval.features": "pixels",
        "eval.real": ("pictures",),
        "eval.geneval": "metadata.jsonl",
        "eval.detector": "judged:some",
        "eval.typography": "words.txt",
        "eval.ocr": "judged:some",
        "eval.compbench": "prompts",
        "eval.compbench_scorers": ("color=judged:some",),
    }


def with_inputs(config, inputs):
    config = config.copy_and_resolve_references()
    for key, value in inputs.items():
        holder, name = command_line.place(config, key)
        holder[name] = value
    return config


# A table that is made at once, and what only records have.
APART = "model.pos_size", "image.buckets"


@pytest.mark.parametrize("extreme", [min, max])
@pytest.mark.parametrize(
    "groups",
    [
        "seed text image flow optim ema tune train profile checkpoint data sample eval",
        "model",
    ],
)
def test_the_least_and_the_most_of_every_number_build_the_job(
    config, groups, extreme, tmp_path, inputs
):
    config = with_inputs(config, inputs)
    for key, _ in leaves(config):
        if key.partition(".")[0] not in groups.split() or key in APART:
            continue
        values = [x for x in accepted(config, key) if isinstance(x, int | float)]
        if values:
            holder, name = command_line.place(config, key)
            holder[name] = extreme(values)
    config.eval.pictures = max(config.eval.pictures, 2)  # fid compares distributions
    validate(config)
    built(config, tmp_path)


CHECKS = {
    "mesh": lambda config: sharding.make_mesh(**config.mesh),
    "sample": prompt_file.tasks,
    "image": record_shapes.bucket_table,
}


@pytest.mark.parametrize("group", CHECKS)
def test_what_is_looked_at_before_anything_compiles(config, group):
    for key, _ in leaves(config):
        if key.partition(".")[0] == group:
            for _ in accepted(config, key):
                with contextlib.suppress(UserError):
                    CHECKS[group](config)


@pytest.mark.parametrize("text", ["\udcff", "sks\ud800 style", "x" * 1025])
def test_a_text_that_no_record_can_hold_is_refused(config, text):
    config = config.copy_and_resolve_references()
    config.ingest.prefix = text
    with pytest.raises(ConfigError, match="^config.ingest.prefix = ") as caught:
        validate(config)
    assert str(caught.value).isprintable() and "in UTF-8 of at most" in str(
        caught.value
    )


@pytest.mark.parametrize("key", ["ingest.captions", "ingest.filters", "train.prompts"])
def test_texts_are_utf8(config, key):
    config = config.copy_and_resolve_references()
    holder, name = command_line.place(config, key)
    holder[name] = ("caption", "\udcff")
    with pytest.raises(
        ConfigError, match=f"^config.{key} = .*texts in UTF-8"
    ) as caught:
        validate(config)
    assert str(caught.value).isprintable()


def test_every_value_of_an_evaluation_builds_or_is_refused(config, inputs):
    config = with_inputs(config, inputs)
    assert measured(config)
    for key, _ in leaves(config):
        if key.startswith("eval."):
            for _ in accepted(config, key):
                with contextlib.suppress(UserError):
                    measured(config)
    config.eval.scores = ("clip_score",)
    for key in "eval.clip", "eval.features", "eval.real", "eval.scores":
        for _ in accepted(config, key):
            with contextlib.suppress(UserError):
                evaluate.check(config)


# Of precompute_plan.RECORD_KEYS those that a recipe of pixels reads, and some more.
@pytest.mark.parametrize("groups", ["seed precompute mesh", "ingest", "encode image"])
def test_every_value_of_precompute_builds_or_is_refused(
    config, inputs, groups, tmp_path
):
    config, count = with_inputs(config, inputs), 0
    assert prepared(config, epath.Path(tmp_path) / "plain")
    for key, _ in leaves(config):
        if key.partition(".")[0] in groups.split():
            for _ in accepted(config, key):
                count += 1
                with contextlib.suppress(UserError):
                    prepared(config, epath.Path(tmp_path) / str(count))
