"""The noise schedule a network goes with: a diffusers scheduler configuration, read and written.

What its keys mean :mod:`ldm.diffusion` says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from ldm.artifacts import write_json
from ldm.config import NoiseSchedule
from ldm.diffusion import FLOW
from ldm.errors import UserError
from ldm.models import Source, explained

FILE = "scheduler/scheduler_config.json"
"""In a pipeline folder."""
FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"
UNKNOWN_TO_FLOWS = (
    *("use_dynamic_shifting", "shift_terminal", "invert_sigmas", "stochastic_sampling"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "thresholding"),
)
"""Options of diffusers' flow schedulers that ours does not have."""


def fresh_schedule(noise: NoiseSchedule) -> dict[str, Any]:
    """That of a UNet that learns it anew."""
    steps = {"num_train_timesteps": noise.train_timesteps, "prediction_type": noise.prediction}
    if noise.prediction == FLOW:
        return {**steps, "flow_shift": 1.0}
    return {
        **steps,
        "beta_schedule": noise.beta_schedule,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "rescale_betas_zero_snr": noise.zero_terminal_snr,
        "timestep_spacing": "trailing",
    }


def load_schedule(source: Source) -> dict[str, Any]:
    """That of a pipeline: betas, prediction type, spacing; of a flow, its shift.

    UserError for one that diffusers does not know, or a flow with options that we do not have.
    """
    with explained(source, "scheduler"):
        written = DDPMScheduler.load_config(
            source.location, subfolder="scheduler", revision=source.revision
        )
    where = f"{source.name or source.location}: scheduler"
    if _is_flow(written):
        return _of_flow(written, where)
    try:
        config = dict(DDPMScheduler.from_config(written).config)
    except NotImplementedError as error:
        raise UserError(f"{where}: {error}; give a model with one that diffusers knows") from error
    # The spacing that a folder leaves open is each sampler's own default, not DDPM's.
    if "timestep_spacing" in config.pop("_use_default_values", []):
        del config["timestep_spacing"]
    return config


def _is_flow(written: Mapping[str, Any]) -> bool:
    """Whether a scheduler's folder is that of a flow: by its class, or by what it predicts."""
    return written.get("_class_name") == FLOW_CLASS or written.get("prediction_type") == FLOW


def _of_flow(written: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What all the classes of diffusers that can follow a flow say of it, in one form."""
    for option in UNKNOWN_TO_FLOWS:
        if written.get(option):
            raise UserError(f"{where}: {option} is set, which is not known here")
    shift = "shift" if written.get("_class_name") == FLOW_CLASS else "flow_shift"
    return {
        "num_train_timesteps": written.get("num_train_timesteps", 1000),
        "prediction_type": FLOW,
        "flow_shift": written.get(shift, 1.0),
    }


def scheduler_of(schedule: Mapping[str, Any]) -> DPMSolverMultistepScheduler:
    """The scheduler with which StableDiffusionPipeline draws, whatever the network predicts.

    The pipeline sets an offset of 1 itself, and no clipping, which is for pixels, with pages of
    warnings where they are not set.
    """
    of_flow = {"use_flow_sigmas": schedule["prediction_type"] == FLOW}
    return DPMSolverMultistepScheduler.from_config(
        {"steps_offset": 1, **schedule, **of_flow, "clip_sample": False}
    )


def leave_open(folder: Path, schedule: Mapping[str, Any]) -> None:
    """Take out of a pipeline folder the spacing that the schedule leaves to each sampler."""
    if "timestep_spacing" not in schedule:
        written = folder / FILE
        content = json.loads(written.read_text())
        del content["timestep_spacing"]
        write_json(written, content)
