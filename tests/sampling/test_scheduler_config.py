"""What a scheduler_config.json may say; its sigmas are in tests/parity."""

import json

import numpy as np
import pytest

from sd3_jax.diffusion import grids
from sd3_jax.errors import UserError
from sd3_jax.sampling.schedulers import scheduler_config
from sd3_jax.sampling.schedulers.scheduler_config import (
    DEIS,
    DPM,
    EULER,
    HEUN,
    LCM,
    PUBLISHED,
    UNIPC,
)

FLOW = {
    "_class_name": DPM,
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "flow_shift": 3.0,
}


@pytest.mark.parametrize(
    "config, words",
    [
        ({"shift": "abc"}, 'shift "abc": expected a finite number > 0'),
        ({"shift": None}, "shift null: expected a finite number > 0"),
        ({"shift": 0}, "shift 0: expected"),
        ({"shift": -3.0}, "shift -3.0: expected"),
        ({"shift": float("nan")}, "shift NaN: expected"),
        ({"shift": float("inf")}, "shift Infinity: expected"),
        ({"shift": True}, "shift true: expected"),
        ({"shift": [3.0]}, "shift [3.0]: expected"),
        ({"use_karras_sigmas": 1}, "use_karras_sigmas 1: expected true or false"),
        ({"use_dynamic_shifting": "no"}, 'use_dynamic_shifting "no": expected true'),
        (
            {"shift_terminal": 1.0},
            "shift_terminal 1.0: expected null or a number in [0",
        ),
        ({"shift_terminal": -0.1}, "shift_terminal -0.1: expected"),
        ({"time_shift_type": "log"}, "expected one of exponential, linear"),
        ({"num_train_timesteps": 0}, "num_train_timesteps 0: expected a whole number"),
        ({"num_train_timesteps": 1e3}, "num_train_timesteps 1000.0: expected"),
        ({"base_shift": "x"}, 'base_shift "x": expected a finite number'),
        ({"base_image_seq_len": 1.5}, "base_image_seq_len 1.5: expected"),
        (
            {"use_dynamic_shifting": True, "max_image_seq_len": 256},
            "base_image_seq_len and max_image_seq_len are the same",
        ),
        ({"_class_name": 3}, "_class_name 3: expected a text"),
        ({"_class_name": "Own", "shift": {}}, "shift {}: expected"),
        ({**FLOW, "flow_shift": "3"}, 'flow_shift "3": expected'),
        ({**FLOW, "solver_order": 2.0}, "solver_order 2.0: expected"),
        ({**FLOW, "algorithm_type": "x"}, "expected one of dpmsolver++"),
        ([], "[]: expected a JSON object"),
    ],
)
def test_a_setting_of_the_wrong_type_or_out_of_range(config, words):
    with pytest.raises(UserError) as error:
        scheduler_config.read(config, "the scheduler of sd3/")
    assert str(error.value).startswith("the scheduler of sd3/: ")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"invert_sigmas": True}, f"invert_sigmas true of {EULER} is not supported"),
        ({"num_train_timesteps": 500}, "num_train_timesteps 500 of"),
        (
            {"use_karras_sigmas": True, "use_beta_sigmas": True},
            "expected false, or use_karras_sigmas false",
        ),
        ({"_class_name": LCM, "scale_factors": [0.5]}, "scale_factors [0.5] of"),
        ({**FLOW, "use_flow_sigmas": False}, "use_flow_sigmas false of"),
        ({**FLOW, "prediction_type": "epsilon"}, 'expected "flow_prediction"'),
        ({**FLOW, "solver_order": 4}, "solver_order 4 of"),
        ({**FLOW, "algorithm_type": "sde-dpmsolver"}, "algorithm_type"),
        (
            {**FLOW, "algorithm_type": "sde-dpmsolver++", "solver_order": 3},
            "solver_order 3 of",
        ),
        (
            {**FLOW, "solver_order": 3, "lower_order_final": False},
            "lower_order_final false of",
        ),
        ({**FLOW, "solver_type": "heun"}, 'solver_type "heun" of'),
        ({**FLOW, "final_sigmas_type": "sigma_min"}, "final_sigmas_type"),
        ({**FLOW, "thresholding": True}, "thresholding true of"),
        ({**FLOW, "use_lu_lambdas": True}, "use_lu_lambdas true of"),
        ({**FLOW, "use_karras_sigmas": True}, "use_karras_sigmas true of"),
        ({**FLOW, "_class_name": UNIPC, "solver_type": "bh1"}, 'solver_type "bh1" of'),
        ({**FLOW, "_class_name": UNIPC, "solver_order": 1}, "solver_order 1 of"),
        ({**FLOW, "_class_name": UNIPC, "predict_x0": False}, "predict_x0 false of"),
        ({**FLOW, "_class_name": UNIPC, "disable_corrector": [0]}, "disable_corrector"),
        ({**FLOW, "_class_name": UNIPC, "solver_p": {}}, "solver_p {} of"),
        ({**FLOW, "_class_name": DEIS, "use_beta_sigmas": True}, "use_beta_sigmas"),
        ({"_class_name": DEIS}, "use_flow_sigmas false of"),
        ({"_class_name": "SASolverScheduler", "flow_shift": 3.0}, LCM),
        ({"_class_name": "EulerDiscreteScheduler"}, "EulerDiscreteScheduler is not"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name_unless_replaced(config, words):
    read = scheduler_config.read(config)
    for given in {}, {"solver": "euler"}, {"grid": "released"}, {"shift": 2.0}:
        with pytest.raises(UserError) as error:
            read.sampler(4, 1_024, **given)
        assert words in str(error.value)
        assert str(error.value).endswith("or set both a solver and a grid")
    solver, times = read.sampler(4, 1_024, solver="heun", grid="shifted", shift=2.0)
    np.testing.assert_array_equal(times, grids.shifted(4, 2.0))
    assert solver == "heun"


def test_a_file_that_says_nothing_has_diffusers_defaults_and_no_file_the_published():
    assert scheduler_config.read(None) == PUBLISHED and PUBLISHED.shift == 3.0
    assert scheduler_config.read({}).shift == 1.0
    assert scheduler_config.read({"shift": 3}) == PUBLISHED
    optional = ("base_shift", "use_karras_sigmas", "shift_terminal")
    assert scheduler_config.read({"shift": 3.0} | dict.fromkeys(optional)) == PUBLISHED
    _, times = PUBLISHED.sampler(28, 1_024)
    np.testing.assert_array_equal(times, grids.released(28, 3.0))


def test_a_caller_replaces_what_he_names():
    read = scheduler_config.read({"shift": 5.0, "use_dynamic_shifting": True})
    times = lambda **given: read.sampler(4, 1_024, **given)[1]
    np.testing.assert_array_equal(times(shift=2.0), grids.released(4, 2.0))
    np.testing.assert_array_equal(times(grid="shifted"), grids.shifted(4, 5.0))
    assert read.sampler(4, 1_024, solver="dpmpp_2m")[0] == "dpmpp_2m"
    np.testing.assert_array_equal(times(solver="dpmpp_2m"), times())
    flow = PUBLISHED.sampler(4, 1_024, solver="dpmpp_2m_flow")[1]
    np.testing.assert_array_equal(flow, grids.flow(4, 3.0))
    # Of a folder of another line, its own solver named is no change.
    first = scheduler_config.read({**FLOW, "solver_order": 1})
    named = first.sampler(4, 1_024, solver="euler")[1]
    np.testing.assert_array_equal(named, first.sampler(4, 1_024)[1])


@pytest.mark.parametrize(
    "given, words",
    [
        ({"grid": "flow", "mu": 0.5}, "grid and mu are both set"),
        ({"grid": "flow", "sigmas": [0.5]}, "grid and sigmas are both set"),
        ({"shift": 2.0, "mu": 0.5}, "shift and mu are both set"),
        ({"shift": 0.0}, "shift: got 0.0"),
        ({"shift": float("nan")}, "shift: got nan"),
        ({"shift": 1e30}, "keeps 4 float32 steps apart"),
        ({"mu": 1e6}, "mu: got"),
        ({"mu": float("nan")}, "mu: got nan"),
        ({"steps": 0}, "steps: got 0"),
    ],
)
def test_what_a_caller_cannot_ask_for(given, words):
    with pytest.raises(UserError) as error:
        PUBLISHED.sampler(**{"steps": 4, "tokens": 1_024} | given)
    assert words in str(error.value)


def test_a_class_that_is_not_known_still_says_its_shift():
    for config, shift in ({"flow_shift": 5}, 5.0), ({"shift": 2.0}, 2.0), ({}, 3.0):
        read = scheduler_config.read({"_class_name": "SASolverScheduler"} | config)
        _, times = read.sampler(4, 1_024, solver="euler", grid="released")
        np.testing.assert_array_equal(times, grids.released(4, shift))


def test_a_terminal_needs_two_steps():
    read = scheduler_config.read({"shift_terminal": 0.1})
    with pytest.raises(UserError, match="steps: got 1, expected 2 or more"):
        read.sampler(1, 1_024)
    assert read.sampler(2, 1_024)[1][-2] == np.float32(0.1)


def test_keys_that_are_of_no_use_are_told_and_those_that_do_nothing_are_not():
    own = {"_diffusers_version": "0.42.1", "shift": 3.0, "shfit": 4.0}
    assert scheduler_config.unread(own) == ["shfit"]
    assert scheduler_config.unread({"_class_name": HEUN, "use_beta_sigmas": True}) == [
        "use_beta_sigmas"
    ]
    assert (
        scheduler_config.unread({**FLOW, "beta_start": 1e-4, "steps_offset": 1}) == []
    )


def test_a_line_tells_what_differs_from_the_published():
    assert PUBLISHED.non_default_settings() == {}
    odd = {"shift": 5.0, "use_beta_sigmas": True, "max_shift": 1.3}
    told = scheduler_config.read(odd).non_default_settings()
    assert told == {"shift": 5.0, "most": [4096, 1.3], "spacing": "beta"}
    assert json.loads(json.dumps(told)) == told  # or a job begun would not go on
