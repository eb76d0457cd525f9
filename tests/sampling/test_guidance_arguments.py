"""generate's choice of a guidance: one line for mistakes, numbers as data, a mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from parity import convert, miniature

import sd3_jax
from sd3_jax.config.schema import sampling_schema
from sd3_jax.diffusion.guidance_methods import LIMITS, METHODS, defaults
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.sampling import compiled, guidance_arguments

RUN = dict(height=48, width=64, max_sequence_length=20, steps=3, output="latents")


@pytest.fixture(scope="module")
def bundle():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return sd3_jax.load(str(miniature.folder("sd35_medium")), mesh, "float32")


def paint(bundle, prompts="a fox", **options):
    return sd3_jax.generate(bundle, prompts, **RUN | options)


@pytest.mark.parametrize(
    "method, one, other",
    [
        ("apg", dict(eta=0.5), dict(eta=0.0, momentum=0.3, threshold=2)),
        ("cfg_zero", dict(zero_steps=1), dict(zero_steps=0)),
        ("pag", dict(layers=[1]), dict(layers=[1], scale=1.0, start=0.3, stop=0.9)),
    ],
)
def test_the_numbers_of_a_method_are_no_new_program(bundle, method, one, other):
    first = paint(bundle, guidance_method=method, guidance_options=one)
    count = compiled.sample._cache_size()
    second = paint(bundle, guidance_method=method, guidance_options=other, steps=4)
    again = paint(bundle, guidance_method=method, guidance_options=other, guidance=3.0)
    assert compiled.sample._cache_size() == count
    assert convert.error(again, np.asarray(first)) > 1e-3
    assert np.isfinite(second).all()


def test_a_schedule_is_data(bundle):
    plain = paint(bundle)
    ones = paint(bundle, guidance_schedule=[(0.5, 1.0)])
    assert convert.error(ones, np.asarray(plain)) < 1e-5
    count = compiled.sample._cache_size()
    for schedule in ("linear", "cosine", "1:0.5, 0:2", [(1, 0.5), (0, 2)]):
        moved = paint(bundle, guidance_schedule=schedule, steps=4)
    assert compiled.sample._cache_size() == count
    same = paint(bundle, guidance_schedule="1:0.5,0:2", steps=4)
    np.testing.assert_array_equal(same, moved)
    assert convert.error(ones, np.asarray(moved)) > 1e-3


def test_a_guide_is_the_weaker_bundle(bundle):
    """Guided by itself it is not guided, whatever the scale."""
    itself = paint(bundle, guidance_method="autoguidance", guide=bundle)
    assert convert.error(itself, np.asarray(paint(bundle, guidance=1.0))) < 1e-4
    weaker = jax.tree.map(lambda x: 0.8 * x, bundle.variables["denoiser"])
    other = dataclasses.replace(bundle, variables={"denoiser": weaker})
    found = paint(bundle, guidance_method="autoguidance", guide=other)
    assert convert.error(found, np.asarray(itself)) > 1e-2


@pytest.mark.parametrize("method, axis", [("apg", "fsdp"), ("pag", "context")])
def test_a_mesh_paints_the_same(bundle, method, axis):
    """The momentum is sharded as x is; perturbed tokens, as the queries are."""
    mesh = sharding.make_mesh(**{"data": 2, "fsdp": 1, axis: 4})
    wide = sd3_jax.load(str(miniature.folder("sd35_medium")), mesh, "float32")
    options = dict(images_per_prompt=2, steps=2, guidance_method=method)
    one, many = (paint(b, [*"abcd"], **options) for b in (bundle, wide))
    assert convert.error(many, np.asarray(one)) < 1e-4
    assert not many.sharding.is_fully_replicated


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(guidance_method="apgg"), 'guidance_method "apgg"; did you mean "apg"?'),
        (dict(guidance_method=3), "guidance_method 3: expected one of cfg"),
        (dict(guidance_options=[1]), "guidance_options [1]: expected a dict"),
        (
            dict(guidance_method="apg", guidance_options=dict(etta=1)),
            'guidance_options "etta" of guidance_method "apg"; did you mean "eta"?',
        ),
        (
            dict(guidance_options=dict(eta=1)),
            'guidance_options "eta" of guidance_method "cfg": it takes none',
        ),
        (
            dict(guidance_method="apg", guidance_options=dict(eta=2)),
            "guidance_options eta 2: expected a number in [0, 1]",
        ),
        (
            dict(guidance_method="pag", guidance_options=dict(layers=[99])),
            "guidance_options: layers 99: expected a whole number 0 to 3",
        ),
        (
            dict(guidance_method="pag", guidance_options=dict(layers=[])),
            "guidance_options: layers (): expected at least one",
        ),
        (
            dict(guidance_method="apg", skip_layers=[1]),
            'guidance_method "apg" does not take skip_layers',
        ),
        (dict(guidance_method="cfg_pp"), "guidance 5: expected 0 to 1"),
        (
            dict(guidance_method="cfg_pp", guidance=0.6, solver="dpmpp_2m"),
            'guidance_method "cfg_pp" with solver "dpmpp_2m": expected solver "euler"',
        ),
        (
            dict(guidance_method="cfg_pp", guidance=0.6, guidance_rescale=0.5),
            'guidance_method "cfg_pp" does not take guidance_rescale',
        ),
        (dict(guidance_method="autoguidance"), "set guide, the weights of a weaker"),
        (
            dict(guidance_method="autoguidance", guide=1),
            "guide 1: expected a Bundle",
        ),
        (dict(guidance_schedule="linaer"), "nearest: linear"),
        (dict(guidance_schedule=[(2.0, 1.0)]), "pairs of t in [0, 1] and a finite"),
        (dict(guidance_schedule=5), "guidance_schedule 5: expected one of constant"),
    ],
)
def test_a_guidance_that_cannot_be_is_one_line(bundle, options, words):
    with pytest.raises(UserError) as error:
        paint(bundle, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_options_as_a_text():
    assert guidance_arguments.options_of("") == {}
    text = "layers=7 8 9, scale=2"
    assert guidance_arguments.options_of(text) == {"layers": (7, 8, 9), "scale": 2.0}
    for wrong in ("eta", "eta=", "eta=one", "layers=1.5"):
        with pytest.raises(UserError, match="expected NAME=NUMBER"):
            guidance_arguments.options_of(wrong)


def test_the_schema_knows_every_method():
    assert sampling_schema.METHODS == tuple(METHODS)
    assert all(defaults(name).keys() <= LIMITS.keys() for name in METHODS)
