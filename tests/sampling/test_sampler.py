"""Painting and scoring runs on latents, whose text a released model encodes."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from parity import miniature

from sd3_jax import main, tree
from sd3_jax.assembly import model_parts
from sd3_jax.data import shards
from sd3_jax.data.records import Record
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.sampling import cache_calibration
from sd3_jax.sampling.job import row_batches
from sd3_jax.sampling.job.sampler import TrainedSampler
from sd3_jax.tools.study import run_scores

CAPTIONS = ["a red fox", "a blue house by the sea"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("held_out") / "held-out.arecord"
    image = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    with shards.Writer(path) as shard:
        for i, x in enumerate(image):
            shard.write(Record({"image": x}, f"{i}", CAPTIONS[i % 2]))
    flags = {
        **{"model.context_dim": 160, "model.pooled_dim": 128, "text.length": 100},
        **{"encode.weights": miniature.folder("sd35_large"), "sample.steps": 2},
        **{"data.name": "records", "data.held_out": path, "study.pictures": 3},
        **{"eval.clip": miniature.whole_clip(), "encode.dtype": "float32"},
        **{"encode.text_dtype": "float32", "encode.latents_dtype": "float32"},
    }
    given = [f"--config.{name}={value}" for name, value in flags.items()]
    argv = ["sample", "--config=configs/sd3_2b.py:tiny", "--workdir=unused", *given]
    return main.parse(argv).config


@pytest.fixture(scope="module")
def painted(config):
    """A painter whose denoiser is not all zeros, and its weights."""
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        parts = model_parts.build_parts(config)
        init = jax.jit(lambda key: tree.unbox(parts.objective.init(key)))
        off = lambda x: x + 0.05 * jax.random.normal(jax.random.key(1), x.shape)
        params = jax.tree.map(off, init(jax.random.key(0)))
        yield TrainedSampler(config, parts, mesh), params


def test_few_pictures_are_a_batch_where_tokens_take_the_other_devices():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    sizes = lambda **options: [
        row_batches.batch_size(n, most, mesh, **options)
        for n, most in ((1, 8), (9, 16), (9, 1), (3, 8))
    ]
    assert sizes() == [8, 16, 8, 8]
    assert sizes(spread=True) == [1, 16, 1, 3]


def test_a_run_on_latents_paints_by_the_encoders_it_is_given(painted, config):
    painter, params = painted
    images = painter(params, [*CAPTIONS, CAPTIONS[0]], [0, 1, 0])
    assert images.shape == (3, 64, 64, 3) and images.std() > 1
    assert (images[0] == images[2]).all() and (images[0] != images[1]).any()
    other = painter(params, [CAPTIONS[1], CAPTIONS[1]], [0, 1])
    assert (other[0] != images[0]).any()  # the words matter
    np.testing.assert_array_equal(other[1], images[1])  # whatever the company


def test_the_negative_prompt_is_encoded_too(painted, config):
    painter, params = painted
    own = config.copy_and_resolve_references()
    own.sample.negative = CAPTIONS[0]
    negative = TrainedSampler(own, painter.parts, painter.mesh, painter.encoder)
    a, b = (p(params, CAPTIONS[:1], [0]) for p in (painter, negative))
    assert (a != b).any()
    own.sample.cfg = 0.5  # no guidance, and so no negative prompt
    without = TrainedSampler(own, painter.parts, painter.mesh, painter.encoder)
    assert without.negative == {} and not without.guidance.guided


def test_a_study_scores_pictures_by_clip(painted, config):
    painter, params = painted
    run_scores.check(config)
    judge = run_scores.judge_of(config)
    traveller = run_scores.Traveller(
        config, painter.parts, painter.mesh, painter.encoder
    )
    found = judge(traveller, params)
    assert -1 <= found["score"] <= 1 and found["fid"] > 0
    assert traveller.length() > 0


@pytest.mark.parametrize(
    "settings",
    [
        dict(guidance_method="apg", guidance_schedule="1:0.5, 0:2"),
        dict(guidance_method="pag", guidance_options="layers=0 1, scale=2"),
        dict(guidance_method="autoguidance", guide="7"),
    ],
    ids=lambda settings: settings["guidance_method"],
)
def test_a_run_takes_every_guidance(painted, config, settings):
    painter, params = painted
    own = config.copy_and_resolve_references()
    own.sample.update(settings)
    weaker = jax.tree.map(lambda x: 0.9 * x, params)
    guided = TrainedSampler(
        own, painter.parts, painter.mesh, painter.encoder, guide=weaker
    )
    one = guided(params, CAPTIONS[:1], [0])
    assert (one != painter(params, CAPTIONS[:1], [0])).any() and one.std() > 1


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(guidance_method="apg", guidance_options="etta=0"), 'did you mean "eta"'),
        (dict(guidance_method="apg", guidance_options="eta"), "expected NAME=NUMBER"),
        (dict(guidance_method="cfg_pp"), "guidance 5: expected 0 to 1"),
        (dict(guidance_method="cfg_pp", cfg=0.6, solver="heun"), 'solver "euler"'),
        (dict(guidance_method="autoguidance"), "set guide"),
    ],
)
def test_a_guidance_that_cannot_be_is_one_line(painted, config, settings, words):
    painter, _ = painted
    own = config.copy_and_resolve_references()
    own.sample.update(settings)
    with pytest.raises(UserError, match=words):
        TrainedSampler(own, painter.parts, painter.mesh, painter.encoder)


def test_heads_that_devices_cannot_share_are_one_line(config):
    parts = model_parts.build_parts(config)
    net = parts.denoiser.clone(num_heads=6, context_attention="ulysses")
    mesh = sharding.make_mesh(data=2, fsdp=1, context=4)
    with pytest.raises(UserError, match="the 6 heads; expected context to be one of"):
        TrainedSampler(config, parts._replace(denoiser=net), mesh)


def test_a_run_keeps_its_blocks_from_step_to_step(painted, config, tmp_path):
    """Of a checkpoint, with its formulation around the network."""
    painter, params = painted
    records = []

    def paint(cache, **settings):
        own = config.copy_and_resolve_references()
        own.sample.update(cache=cache, steps=4, **settings)
        given = painter.parts, painter.mesh, painter.encoder
        sampler = TrainedSampler(own, *given, report=records.append)
        return sampler(params, CAPTIONS[:1], [0]).astype(int)

    usual = paint("")
    same = paint("first_block", cache_options="threshold=0")
    np.testing.assert_array_equal(same, usual)
    assert not records
    all_steps = paint("first_block", cache_options="threshold=1e-9")
    assert np.abs(all_steps - usual).max() <= 1
    skipping = paint("taylorseer", cache_options="interval=2, warmup=1")
    assert (skipping != usual).any()
    computed = [np.asarray(x.computed).tolist() for x in records]
    assert computed == [[True] * 4, [True, False, True, False]]
    path = tmp_path / "curve.json"
    cache_calibration.write(path, cache_calibration.mean("0123", [np.ones(4)]))
    with pytest.raises(UserError, match="is of the weights 0123"):
        paint("magcache", cache_calibration=str(path))
