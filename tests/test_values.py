"""Every key with values that make no sense: one line at once, or a job that builds.

Building is all that a job does before it compiles: modules, shapes of state, step and
pictures, the source and the loader of examples.
"""

import contextlib

import jax
import numpy as np
import pytest
from flax import linen as nn

from sd3_jax import cli, sharding
from sd3_jax.errors import ConfigError, UserError
from sd3_jax.jobs import (
    examples,
    paint,
    picture_scores,
    precompute,
    prompt_lines,
    prompt_scores,
    train,
)
from sd3_jax.validate import RULES, leaves, validate

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
    return cli.load(TINY)


def accepted(config, key):
    """The values that the command line takes for key; the config has each meanwhile."""
    holder, name = cli.place(config, key)
    before, seen = holder[name], []
    for text in VALUES:
        try:
            cli.override(config, key, text)
            validate(config)
            if holder[name] != before and holder[name] not in seen:
                seen.append(holder[name])
                yield holder[name]
        except ConfigError as error:
            assert f"config.{key}" in str(error) or "wanted" in str(error)
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
                validate(cli.ConfigDict(plain, type_safe=False))
            except ConfigError as error:
                assert str(error).startswith(f"config.{key} = "), error


def test_every_number_has_an_upper_bound(config):
    """No key takes 10^20, and none 1e30: what has no bound fails late, or never."""
    ruled = {key: rule for rule, keys in RULES for key in keys.split()}
    for key, value in leaves(config):
        if isinstance(value, bool | str):
            continue
        assert key in ruled, f"{key} has no rule"
        for huge in 10**20, 1e30, (10**20,), (1e30,):
            assert not ruled[key].holds(huge), (key, huge)


def built(config, tmp_path):
    """Training and painting up to what they would compile."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        job = train.Training(config, tmp_path, mesh)
        job.trace(0)
        examples.loader(config, job.rows, made=job.source)
        key = jax.eval_shape(lambda: jax.random.key(0))
        batch = train.example(config, mesh)
        state, _ = job.step.eval_shape(job.abstract, key, batch, {})
        painter = paint.Painter(config, job.parts, mesh)
        size = paint.batch_size(3, config.sample.batch_size, mesh)
        shape = lambda *x: jax.ShapeDtypeStruct(x, np.int32)
        rows = {"ids_bytes": shape(size, config.text.length), "number": shape(size)}
        images = painter.program.eval_shape(state.ema, rows, painter.negative)
        assert images.shape[0] == size
    assert all(
        np.isfinite(float(job.rate(step))) for step in (0, config.train.steps - 1)
    )


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
    config, groups, extreme, tmp_path
):
    config = config.copy_and_resolve_references()
    for key, _ in leaves(config):
        if key.partition(".")[0] not in groups.split() or key in APART:
            continue
        values = [x for x in accepted(config, key) if isinstance(x, int | float)]
        if values:
            holder, name = cli.place(config, key)
            holder[name] = extreme(values)
    validate(config)
    built(config, tmp_path)


CHECKS = {
    "mesh": lambda config: sharding.make_mesh(**config.mesh),
    "sample": prompt_lines.tasks,
    "ingest": precompute.prepare_settings,
    "image": examples.table,
    "eval": lambda config: (picture_scores.check(config), prompt_scores.check(config)),
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
    holder, name = cli.place(config, key)
    holder[name] = ("caption", "\udcff")
    with pytest.raises(
        ConfigError, match=f"^config.{key} = .*texts in UTF-8"
    ) as caught:
        validate(config)
    assert str(caught.value).isprintable()
