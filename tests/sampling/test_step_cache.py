"""generate's step cache: bits, branches, data, a mesh, and one line for mistakes."""

import re

import jax
import numpy as np
import pytest
from parity import convert, miniature

import sd3_jax
from sd3_jax.diffusion import cache_schedules
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.sampling import cache_calibration, compiled
from sd3_jax.sampling.cache_calibration import Calibration

RUN = dict(height=48, width=64, max_sequence_length=20, steps=6, output="latents")


@pytest.fixture(scope="module")
def bundle():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return sd3_jax.load(str(miniature.folder("sd35_medium")), mesh, "float32")


def paint(bundle, prompts="a fox", **options):
    """Latents, and which steps were computed."""
    records = []
    run = RUN | dict(cache_report=records.append) | options
    latents = sd3_jax.generate(bundle, prompts, **run)
    return np.asarray(latents), np.asarray(records[0].computed).tolist()


@pytest.mark.parametrize(
    "cache, options",
    [
        ("first_block", dict(threshold=0)),
        ("magcache", dict(threshold=0.0)),
        ("taylorseer", dict(interval=1)),
    ],
)
def test_nothing_to_skip_is_the_uncached_picture(bundle, cache, options):
    usual, _ = paint(bundle)
    curve = Calibration(bundle.unadapted_fingerprint("denoiser"), np.ones(6, "f"))
    if cache == "magcache":
        options = dict(options, retention=0.0)
    more = dict(cache_calibration=curve) if cache == "magcache" else {}
    same, computed = paint(bundle, cache=cache, cache_options=options, **more)
    np.testing.assert_array_equal(same, usual)
    assert all(computed) and len(computed) == 6


def dots(jaxpr) -> int:
    """Matrix products of a program, with those of the programs inside of it."""
    inner = [x for eqn in jaxpr.eqns for x in jax.core.jaxprs_in_params(eqn.params)]
    here = sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)
    return here + sum(map(dots, inner))


def branches(jaxpr) -> list[list[int]]:
    """Matrix products of the branches of each cond, outermost first."""
    rows = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "cond":
            rows.append([dots(x.jaxpr) for x in eqn.params["branches"]])
        for x in jax.core.jaxprs_in_params(eqn.params):
            rows += branches(x)
    return rows


@pytest.mark.parametrize("cache", ["first_block", "taylorseer"])
def test_a_skipped_step_has_no_products_of_blocks(bundle, monkeypatch, cache):
    programs, run = [], compiled.sample_cached

    def traced(plan, *args):
        programs.append(jax.make_jaxpr(lambda *x: run(plan, *x))(*args))
        return run(plan, *args)

    monkeypatch.setattr(compiled, "sample_cached", traced)
    paint(bundle, cache=cache)
    outer = max(branches(programs[0].jaxpr), key=max)
    skipped, computed = outer
    # The blocks' projections, MLPs and attentions are all in one branch.
    assert skipped == 0 and computed > 30
    # The embedders and the final layer; and the first block, where it decides.
    rest = dots(programs[0].jaxpr) - computed
    assert rest < 20 + 30 * (cache == "first_block")


def test_thresholds_and_steps_are_data(bundle):
    every, one = {}, dict(threshold=0.5)
    paint(bundle, cache="first_block", cache_options=one)
    paint(bundle, cache="taylorseer", cache_options=every)
    count = compiled.sample_cached._cache_size()
    most, skipped = paint(
        bundle, cache="first_block", cache_options=dict(threshold=1e3), steps=9
    )
    assert skipped == [True] + [False] * 8
    options = dict(threshold=1e3, retention=0.5)
    _, half = paint(bundle, cache="first_block", cache_options=options)
    assert half == [True] * 3 + [False] * 3
    options = dict(interval=2, warmup=1)
    _, turns = paint(bundle, cache="taylorseer", cache_options=options, solver="euler")
    assert turns == [True, False, True, False, True, False]
    assert compiled.sample_cached._cache_size() == count


def test_a_mesh_computes_the_same_steps(bundle):
    """Rows and tokens on eight devices: the decision is one, and the pictures too."""
    mesh = sharding.make_mesh(data=2, fsdp=1, context=2, tensor=2)
    over = sd3_jax.load(bundle.source, mesh, "float32", only=["denoiser"])
    cond, uncond = (bundle.encode_prompts([x] * 2, 20) for x in ("a fox", ""))
    cond, uncond = jax.tree.map(np.asarray, (cond, uncond))
    for cache, options in (
        ("first_block", dict(threshold=0.6)),
        ("taylorseer", dict(interval=2, warmup=2, order=2)),
    ):
        run = dict(cache=cache, cache_options=options, steps=12)
        run |= dict(negative_prompts=uncond, guidance_method="apg")
        one, computed = paint(bundle, cond, **run)
        several, same = paint(over, cond, **run)
        error = convert.error(several, one)
        print(f"{cache} on 8 devices: {error:.1e}, {sum(computed)} of 12 computed")
        assert same == computed and 1 < sum(computed) < 12
        assert error < 1e-4


def test_eight_bits_and_a_whole_trajectory(bundle):
    """Layers are cut out of stacked weights, whatever stands for them."""
    eight = sd3_jax.load(
        bundle.source, bundle.mesh, "float32", quantize={"denoiser": "int8"}
    )
    usual, _ = paint(eight, return_latents="all")
    run = dict(cache="first_block", cache_options=dict(threshold=1e-6))
    cached, computed = paint(eight, return_latents="all", **run)
    error = convert.error(cached, usual)
    print(f"int8, all steps computed: {error:.1e}")
    assert all(computed) and cached.shape[0] == 7 and error < 1e-5


def test_magcache_counts_the_error_since_the_last_computed_step():
    ratios = np.array([1, 1, 0.96, 0.96, 1.0, 1.0, 1.0, 0.5, 1.0], np.float32)
    options = dict(threshold=0.1, most=2, retention=0.0)
    # .04 is below .1; .04 + .0784 is above. Then two in a row, and the one of .5.
    expected = [True, False, False, True, False, False, True, True, False]
    assert cache_schedules.magnitudes(ratios, **options).tolist() == expected


def test_a_calibration_goes_through_its_file(bundle, tmp_path, caplog):
    curve = Calibration(bundle.unadapted_fingerprint("denoiser"), np.ones(4, "f"))
    path = tmp_path / "curve.json"
    cache_calibration.write(path, curve)
    run = dict(cache="magcache", cache_calibration=path)
    options = dict(most_skipped=2, retention=0.3)
    _, computed = paint(bundle, cache_options=options, **run)
    assert computed == [True, True, False, False, True, False]
    assert "the calibration has 4 steps and the call 6" in caplog.text
    cache_calibration.write(path, curve._replace(model="0123"))
    with pytest.raises(UserError, match="is of the weights 0123, but these are"):
        paint(bundle, **run)


@pytest.mark.parametrize(
    "ratios, words",
    [
        ("[" * 100_000, "expected JSON; calibrate it"),
        (f"[1, {10**400}]", "expected a list of numbers 0 to 1e+06"),
        ("[1, 1e300]", "expected a list of numbers 0 to 1e+06"),
        ("[1, NaN]", "expected a list of numbers"),
        ("[]", "expected a list of numbers"),
    ],
    ids=["deep", "whole", "large", "nan", "none"],
)
def test_a_damaged_calibration_is_one_line(tmp_path, ratios, words):
    path = tmp_path / "curve.json"
    head = f'{{"format": "{cache_calibration.FORMAT}", "model": "0", "ratios": '
    path.write_text(head + ratios + "}")
    with pytest.raises(UserError, match=re.escape(words)) as error:
        cache_calibration.read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(cache="first"), 'cache "first"; did you mean "first_block"'),
        (dict(cache_options=dict(threshold=1)), "cache_options without cache"),
        (
            dict(cache="first_block", cache_options=dict(treshold=1)),
            'did you mean "threshold"',
        ),
        (
            dict(cache="taylorseer", cache_options=dict(order=9)),
            "cache_options order 9: expected a whole number 0 to 4",
        ),
        (dict(cache="first_block", solver="heun"), "such as dpmpp_2m or unipc_2"),
        (dict(cache="first_block", solver="adaptive"), "such as dpmpp_2m or unipc_2"),
        (dict(cache="first_block", guidance_method="pag"), "such as cfg or apg"),
        (dict(cache="taylorseer", skip_layers=[1]), "with skip_layers, which runs"),
        (dict(cache="magcache"), "make one with sd3-jax calibrate"),
        (
            dict(cache="magcache", cache_calibration="no/such"),
            "cache_calibration no/such: cannot be read",
        ),
        (
            dict(cache="first_block", cache_calibration="curve"),
            'expected cache "magcache"',
        ),
    ],
)
def test_mistakes_are_one_line(bundle, options, words):
    with pytest.raises(UserError) as error:
        paint(bundle, **options)
    assert words in str(error.value) and "\n" not in str(error.value)
