"""Solvers on eight devices: the same pictures as on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import convert

from sd3_jax.diffusion import grids, solvers
from sd3_jax.distributed import sharding
from sd3_jax.sampling import compiled
from sd3_jax.sampling.generate import generate
from sd3_jax.sampling.text.prompts import Conditioning

KEYS = jax.random.split(jax.random.key(0), 8)
COND = Conditioning(jnp.ones((8, 3, 4)), jnp.linspace(-1, 1, 32).reshape(8, 4))
WEIGHTS = jax.random.normal(jax.random.key(1), (4, 4)) / 2


def network(weights, x, t, cond):
    """A bend of x that depends on the row's text and time, with a split matrix."""
    h = jnp.tanh(x @ weights + cond.pooled[:, None, None])
    return x - h * (1 - t[:, None, None, None])


def sample(weights, keys, cond, times, solver):
    return generate(
        lambda *args: network(weights, *args),
        *(keys, cond, cond),
        shape=(8, 8, 4),
        solver=solver,
        scale=2.0,
        **times,
    )


PROGRAMS = dict.fromkeys(solvers.same_program(name) for name in solvers.SOLVERS)


@pytest.mark.parametrize("names", PROGRAMS, ids=lambda names: names[0])
def test_a_mesh_changes_no_picture(names):
    """Of each solver, in the one program that they share, which compiles once."""

    @jax.jit
    def run(weights, keys, cond, times, number):
        return sample(weights, keys, cond, times, solvers.of_program(names, number))

    def all_solvers(place):
        pictures = []
        for steps, name in enumerate(names, 5):
            times = compiled.solver_inputs(name, grids.released(steps, 3.0))
            number = times.pop("solver")
            args = place((KEYS, COND, times, number))
            pictures.append(np.asarray(run(WEIGHTS, *args)))
        return pictures

    one = all_solvers(lambda x: x)
    assert run._cache_size() == 1
    mesh = sharding.make_mesh(data=2, fsdp=4, context=1, tensor=1)
    with compiled.on(mesh):
        eight = all_solvers(lambda x: compiled.place(x, mesh))
    assert run._cache_size() == 2
    for name, a, b in zip(names, one, eight):
        assert convert.error(b, a) < 1e-5, name
    assert all(np.abs(x - one[0]).max() > 1e-4 for x in one[1:])
