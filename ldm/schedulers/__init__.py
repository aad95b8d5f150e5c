"""Samplers by name: from scratch, or diffusers' own."""

from collections.abc import Mapping
from typing import Any

from ldm.diffusion import FLOW
from ldm.errors import UserError
from ldm.schedulers.base import Sampler as Sampler
from ldm.schedulers.dpm_solver import DPMSolverSampler, DPMSolverSDESampler
from ldm.schedulers.flow import FlowEulerSampler, FlowSolverSampler, FlowSolverSDESampler
from ldm.schedulers.pndm import PNDMSampler
from ldm.schedulers.reference import ReferenceSampler
from ldm.schedulers.variance_exploding import EulerSampler, LMSSampler
from ldm.schedulers.variance_preserving import DDIMSampler, DDPMSampler

SAMPLERS: dict[str, type[Sampler]] = {
    "dpm++": DPMSolverSampler,
    "dpm++sde": DPMSolverSDESampler,
    "euler": EulerSampler,
    "lms": LMSSampler,
    "ddim": DDIMSampler,
    "ddpm": DDPMSampler,
    "pndm": PNDMSampler,
}
FLOW_SAMPLERS: dict[str, type[Sampler]] = {
    "dpm++": FlowSolverSampler,
    "dpm++sde": FlowSolverSDESampler,
    "euler": FlowEulerSampler,
    "ddim": FlowEulerSampler,
}
"""The same methods on a flow, where Euler's and DDIM's are one."""


SOLVERS = ("dpm++", "dpm++sde")


def make_sampler(
    name: str, schedule: Mapping[str, Any], steps: int, implementation: str = "ldm"
) -> Sampler:
    """A sampler on a model's noise schedule, fresh for one batch.

    :class:`UserError` where it cannot follow the schedule.
    """
    settings, samplers = dict(schedule), SAMPLERS
    if schedule.get("prediction_type") == FLOW:
        samplers = FLOW_SAMPLERS
        if name not in samplers:
            known = ", ".join(samplers)
            raise UserError(f"sampler {name}: cannot follow a flow; take one of {known}")
    elif name in SOLVERS and schedule["beta_schedule"] == "squaredcos_cap_v2":
        # Below this the cosine schedule is numerically pure noise (DPM-Solver++, appendix).
        settings["lambda_min_clipped"] = -5.1
    if name in SOLVERS:
        settings["final_sigmas_type"] = "zero"
    if name == "pndm":
        settings["skip_prk_steps"] = True
    if implementation == "diffusers":
        return ReferenceSampler(name, settings, steps)
    return samplers[name](settings, steps)
