"""What the rows of sampling count: forwards by solver and guidance, memory by phase."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import released
from sd3_jax.diffusion import solvers
from sd3_jax.diffusion.guidance_methods import METHODS
from sd3_jax.distributed import sharding
from sd3_jax.sampling import compiled
from sd3_jax.sampling.guidance_arguments import Layers, checked
from sd3_jax.tools.plan import phase_memory, sampling_programs, slices

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "solvers_and_guidance.md"


def denoise(**keys):
    config = released.get_config("tiny")
    config.sample.update(steps=10, **keys)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    steering = sampling_programs.guidance(config)
    with compiled.on(mesh):
        case = sampling_programs.denoise(
            config, slices.find("v5e-1"), mesh, 2, steering, share=2.0
        )
    return case


FORWARDS = [
    (dict(cfg=1.0), 10),
    (dict(), 20),
    (dict(cfg=1.0, guidance_method="apg"), 10),
    (dict(cfg=0.6, guidance_method="cfg_pp"), 20),
    (dict(guidance_method="autoguidance", guide="1"), 20),
    (dict(guidance_method="pag"), 30),
    # Steps 1 to 4 of 10 leave layers out.
    (dict(skip_layers=(1,), skip_stop=0.5), 20 + 4),
    (dict(guidance_method="pag", guidance_options="start=0, stop=0.5"), 20 + 5),
    (dict(solver="heun"), 2 * 19),
    (dict(solver="dpmpp_2m_sde", cfg=1.0), 10),
    (dict(solver="adaptive", cfg=1.0), 31),
]


@pytest.mark.parametrize("keys, forwards", FORWARDS)
def test_forwards_of_the_solver_and_the_guidance(keys, forwards):
    case = denoise(**keys)
    assert case.forwards == pytest.approx(forwards)
    plain = denoise(cfg=1.0)
    assert case.flops == pytest.approx(plain.flops * forwards / 10)


def test_a_step_cache_is_not_counted_and_said_so(caplog):
    assert denoise(cache="first_block").forwards == denoise().forwards
    assert 'cache = "first_block": plan counts the steps without it' in caplog.text


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_the_passes_of_a_solver_are_those_that_it_makes(name):
    """Counted on the host as it runs, without a compiled loop."""
    calls = []

    def velocity(x, t):
        jax.debug.callback(lambda t: calls.append(1), t)
        return x

    grid = np.linspace(1, 0, 6, dtype=np.float32)
    draws = solvers.draws(solvers.SOLVERS[name])
    x = jnp.ones((1, 2))
    options = {"draw": lambda step: jnp.zeros_like(x)} if draws else {}
    solvers.SOLVERS[name](velocity, x, grid, **options)
    jax.effects_barrier()
    most = solvers.passes(name, 5)
    assert len(calls) == most or (name == "adaptive" and len(calls) < most)


def rows_of(head):
    """{name: words} of the table's column that counts, from the page."""
    table = PAGE.read_text().split(head, 1)[1].split("\n\n")[0]
    lines = [line.split("|")[1:-1] for line in table.splitlines()[2:]]
    column = 3 if "order" in head else 2
    return {
        name: line[column].strip()
        for line in lines
        for name in re.findall(r"`(\w+)`", line[0])
        if "with" not in line[0]
    }


def test_the_page_has_the_same_counts():
    passes = rows_of("| solver | paper | order | passes a step |")
    assert passes.keys() == solvers.SOLVERS.keys()
    for name, words in passes.items():
        assert int(words) == solvers.PASSES.get(name, 1), name
    forwards = rows_of("| `guidance_method` | paper | forwards a step |")
    assert forwards.keys() == METHODS.keys()
    times = np.linspace(1, 0, 5, dtype=np.float32)
    forwards_of = sampling_programs.forwards
    for name, words in forwards.items():
        scale = 0.6 if name == "cfg_pp" else 5.0
        guide = METHODS[name].against == "weak" or None
        steering = checked(4, scale=scale, method=name, guide=guide, skip=Layers())
        assert sum(map(int, re.findall(r"\d+", words))) == forwards_of(steering, times)


def row(program, peak, needs=None, capacity=15.75):
    row = dict(slice="v5e-1", program=program, capacity=capacity, verdict="fits")
    return row | ({"needs": needs} if needs else {"peak": peak})


def test_memory_of_the_placements():
    rows = [row("text", 10.0), row("denoise", 9.0), row("decode", 2.0)]
    weights = [9.0, 8.0, 0.5]
    quantized = {"t5": "", "denoiser": "int8"}
    one = phase_memory.with_placements(rows, weights, "sequential")
    assert [x["peak"] for x in one] == [10.0, 9.0, 2.0]
    every = phase_memory.with_placements(rows, weights, "all")
    assert [x["peak"] for x in every] == [18.5, 18.5, 19.0]
    assert {x["verdict"] for x in every} == {"exceeds"}
    first, second = phase_memory.lines(every, quantized)
    assert first.endswith("set config.sample.placement=sequential")
    assert second.endswith("text 10.0, denoise 9.0, decode 2.0")


def test_what_helps_where_a_program_is_tight():
    rows = [row("text", 10.0), row("denoise", 15.5), row("decode", 2.0)]
    rows = phase_memory.with_placements(rows, [9.0, 15.2, 0.5], "sequential")
    assert rows[1]["verdict"] == "tight"
    lines = phase_memory.lines(rows, {"t5": "", "denoiser": ""})
    assert "denoise 15.5 (tight)" in lines[1]
    assert lines[1].endswith("; denoise: set config.quantize.denoiser=int8")


def test_what_helps_where_a_program_does_not_fit():
    rows = [row("text", 17.0), row("denoise", 0, "17.9G of 15.75G"), row("decode", 2.0)]
    rows = phase_memory.with_placements(rows, [9.0, 16.0, 0.5], "sequential")
    lines = phase_memory.lines(rows, {"t5": "", "denoiser": ""})
    assert "text: set config.quantize.t5=int8" in lines[1]
    assert "denoise needs 17.9G" in lines[1]
    assert "denoise: set config.quantize.denoiser=int8" in lines[1]
    both = {"t5": "int8", "denoiser": "int8"}
    assert "fewer images" in phase_memory.lines(rows, both)[1]
