"""What `import sd3_jax` offers beyond diffusers' pipelines."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from parity import convert, miniature

import sd3_jax
from sd3_jax import sharding
from sd3_jax.diffusion import grids

RUN = dict(height=64, width=64, max_sequence_length=20, steps=4, output="latents")


@pytest.fixture(scope="module")
def bundle():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return sd3_jax.load(str(miniature.folder("sd35_medium")), mesh, "float32")


@pytest.fixture(scope="module")
def plain(bundle):
    return sd3_jax.generate(bundle, "a fox", **RUN)


def paint(bundle, **options):
    return sd3_jax.generate(bundle, "a fox", **RUN | options)


def apart(a, b):
    return convert.error(a, np.asarray(b))


def test_previews(bundle, plain):
    seen = []
    look = lambda i, t, rgb: seen.append((int(i), float(t), np.asarray(rgb)))
    found = jax.block_until_ready(paint(bundle, preview=look))
    jax.effects_barrier()
    assert apart(found, plain) < 1e-5
    seen.sort(key=lambda x: x[0])
    assert [i for i, _, _ in seen] == [0, 1, 2, 3]
    np.testing.assert_allclose([t for _, t, _ in seen], grids.released(4, 3.0)[1:])
    assert seen[-1][2].shape == (1, 8, 8, 3)
    assert 0 <= seen[-1][2].min() < seen[-1][2].max() <= 1


def test_the_guidances_interval_and_rescale(bundle, plain):
    assert apart(paint(bundle, guidance_interval=(0.0, 1.0)), plain) == 0
    none = paint(bundle, guidance=1.0)
    assert apart(paint(bundle, guidance_interval=(0.0, 0.0)), none) < 1e-5
    assert apart(paint(bundle, guidance_interval=(0.5, 1.0)), plain) > 0.01
    assert apart(paint(bundle, guidance_rescale=0.7), plain) > 0.01


def test_times_of_ones_own(bundle, plain):
    line = np.linspace(1, 3 / 1002, 4)  # what the released grid shifts
    assert apart(paint(bundle, sigmas=line), plain) < 1e-5
    assert apart(paint(bundle, shift=1.0), plain) > 0.01
    one = paint(bundle, mu=float(np.log(2.0)))
    other = paint(bundle, sigmas=np.linspace(1, 1e-3, 4), shift=2.0)
    assert apart(one, other) < 1e-5


def test_a_scheduler_that_shifts_by_size(bundle):
    shifting = {**bundle.scheduler, "use_dynamic_shifting": True}
    moved = sd3_jax.Bundle(
        bundle.modules,
        bundle.variables,
        bundle.configs | {"scheduler": shifting},
        bundle.tokenizers,
        bundle.mesh,
        bundle.dtype,
    )
    mu = grids.linear_mu(16)  # 64 pixels are 4 x 4 tokens
    assert apart(paint(moved), paint(bundle, mu=mu)) == 0
    assert apart(paint(moved), paint(bundle)) > 0.01


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "dpmpp_2m_flow"])
def test_solvers_come_to_the_same_end(bundle, solver):
    """Unguided and in many steps."""
    many = dict(guidance=1.0, steps=60, grid="released")
    assert apart(paint(bundle, solver=solver, **many), paint(bundle, **many)) < 0.15


def test_the_seed_and_the_number_tell_pictures_apart(bundle, plain):
    assert apart(paint(bundle, seed=1), plain) > 0.1
    both = paint(bundle, seed=[4], images_per_prompt=2)
    assert apart(both[:1], paint(bundle, seed=4)) < 1e-5
    assert apart(both[:1], both[1:]) > 0.1


def test_guidance_is_no_new_program(bundle):
    from sd3_jax.pipelines import programs

    paint(bundle, guidance=2.0)
    count = programs.sample._cache_size()
    paint(bundle, guidance=3.0, seed=9, shift=2.0, guidance_rescale=0.1)
    assert programs.sample._cache_size() == count


def test_import_is_quick_and_lists_the_api():
    code = "import sys, sd3_jax; print('jax' in sys.modules, *dir(sd3_jax))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.startswith("False") and "load_control" in run.stdout
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        getattr(sd3_jax, "lod")  # noqa: B009
