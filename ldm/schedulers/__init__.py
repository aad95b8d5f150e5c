"""Samplers from scratch, by name."""

from ldm.schedulers.base import Sampler as Sampler
from ldm.schedulers.dpm_solver import DPMSolverSampler
from ldm.schedulers.pndm import PNDMSampler
from ldm.schedulers.variance_exploding import EulerSampler, LMSSampler
from ldm.schedulers.variance_preserving import DDIMSampler, DDPMSampler

SAMPLERS: dict[str, type[Sampler]] = {
    "dpm++": DPMSolverSampler,
    "euler": EulerSampler,
    "lms": LMSSampler,
    "ddim": DDIMSampler,
    "ddpm": DDPMSampler,
    "pndm": PNDMSampler,
}
