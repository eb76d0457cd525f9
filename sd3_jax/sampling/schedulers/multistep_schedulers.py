"""diffusers' multistep schedulers as a Scheduler, where their sigmas are a flow's."""

from collections.abc import Mapping
from typing import Any

from sd3_jax.sampling.schedulers.scheduler import Scheduler
from sd3_jax.sampling.schedulers.scheduler_fields import (
    CLOCK_KEY,
    END,
    SHIFT,
    SIZED,
    SPACED,
    count,
    is_number,
    one_of,
    real,
    sizes,
    value_text,
)
from sd3_jax.weights.config_fields import Field, flag

Complaints = dict[str, str]  # a setting that is not supported -> what is
SHARED_KEYS = {
    **CLOCK_KEY,
    "flow_shift": SHIFT,
    **SIZED,
    "max_shift": real(1.16),  # the pipeline's own, where no scheduler has one
    **SPACED,
    "use_flow_sigmas": flag(False),
    "prediction_type": one_of("epsilon", "flow_prediction", "sample", "v_prediction"),
    "solver_order": count(2),
    "thresholding": flag(False),
    "lower_order_final": flag(True),
    "time_shift_type": one_of("exponential"),
}
NUMBER = Field(None, "null or a finite number", is_number)
KINDS = ("midpoint", "heun", "bh1", "bh2", "logrho")  # of all three classes
DPM_KEYS = SHARED_KEYS | {
    "use_lu_lambdas": flag(False),
    "algorithm_type": one_of(
        *("dpmsolver++", "dpmsolver", "sde-dpmsolver", "sde-dpmsolver++", "deis")
    ),
    "solver_type": one_of(*KINDS),
    "final_sigmas_type": one_of("zero", "sigma_min"),
}
UNIPC_KEYS = SHARED_KEYS | {
    "predict_x0": flag(True),
    "solver_type": one_of("bh2", "bh1", "midpoint", "heun", "logrho"),
    "disable_corrector": Field([], "a list", lambda x: isinstance(x, list)),
    "solver_p": Field(None, "null or an object", lambda x: isinstance(x, dict)),
    "final_sigmas_type": one_of("zero", "sigma_min"),
    "shift_terminal": END,
    **dict.fromkeys(("sigma_min", "sigma_max"), NUMBER),  # of Karras' and the like
}
DEIS_KEYS = SHARED_KEYS | {
    "algorithm_type": one_of("deis", "dpmsolver", "dpmsolver++"),
    "solver_type": one_of("logrho", *KINDS[:-1]),
}
# Settings that do nothing where sigmas are those of a flow, whose last is 0: they are
# of noise in betas.
IDLE = (
    *("beta_start", "beta_end", "beta_schedule", "trained_betas", "steps_offset"),
    *("dynamic_thresholding_ratio", "sample_max_value"),
    *("euler_at_final", "lambda_min_clipped", "variance_type", "timestep_spacing"),
    "rescale_betas_zero_snr",
)
FLOWS = {
    "use_flow_sigmas": (True,),
    "prediction_type": ("flow_prediction",),
    "thresholding": (False,),
    **{name: (False,) for name in SPACED},
}


def dpm(values: Mapping[str, Any]) -> tuple[Scheduler, Complaints]:
    """DPM-Solver++ on flows, of the ODE or of the SDE; the ODE's first is Euler's."""
    stochastic = values["algorithm_type"] == "sde-dpmsolver++"
    third = values["solver_order"] == 3
    complaints = _complaints(
        values,
        # The class stands the foreign ones for its first.
        algorithm_type=("dpmsolver++", "sde-dpmsolver++", "deis"),
        # diffusers' third order of the SDE has its last term with a wrong sign.
        solver_order=(2,) if stochastic else (1, 2, 3),
        solver_type=("midpoint", "bh1", "bh2", "logrho"),
        final_sigmas_type=("zero",),
        use_lu_lambdas=(False,),
        # To t = 0 all steps are of first order, so it only matters to the third.
        lower_order_final=(True,) if third else (True, False),
    )
    # The ODE's first order is an exact step for a constant x0, which on a straight path
    # is Euler's.
    names = {1: "euler", 2: "dpmpp_2m_flow", 3: "dpmpp_3m_flow"}
    solver = "dpmpp_2m_sde" if stochastic else names.get(values["solver_order"], "")
    return _scheduler(values, solver or "euler", "flow"), complaints


def unipc(values: Mapping[str, Any]) -> tuple[Scheduler, Complaints]:
    complaints = _complaints(
        values,
        solver_order=(2, 3),
        solver_type=("bh2", "midpoint", "heun", "logrho"),
        final_sigmas_type=("zero",),
        lower_order_final=(True,),
        predict_x0=(True,),
        disable_corrector=([],),
        solver_p=(None,),
    )
    solver = "unipc_3" if values["solver_order"] == 3 else "unipc_2"
    # 0 is none, as in diffusers.
    terminal = values["shift_terminal"] or None
    return _scheduler(values, solver, "unipc", terminal=terminal), complaints


def deis(values: Mapping[str, Any]) -> tuple[Scheduler, Complaints]:
    """DEIS in log rho. The last step leads to 0.

    In diffusers it leads to the same sigma again, so that this one's noise is left.
    """
    third = values["solver_order"] == 3
    complaints = _complaints(
        values,
        solver_order=(1, 2, 3),
        lower_order_final=(True,) if third else (True, False),
    )
    names = {1: "euler", 2: "deis_2", 3: "deis_3"}
    solver = names.get(values["solver_order"], "euler")
    return _scheduler(values, solver, "flow"), complaints


def _complaints(values: Mapping[str, Any], **allowed: tuple) -> Complaints:
    return {
        key: " or ".join(map(value_text, choices))
        for key, choices in (FLOWS | allowed).items()
        if values[key] not in choices
    }


def _scheduler(values: Mapping[str, Any], solver: str, line: str, **options):
    shift = float(values["flow_shift"])
    return Scheduler(solver, line, shift, **sizes(values), **options)
