"""Settings of drawing, judging and registering."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ldm.config.section import Count, Precision, Section, Share

SamplerName = Literal["dpm++", "dpm++sde", "euler", "lms", "ddim", "ddpm", "pndm"]


class Sampling(Section):
    """How pictures are drawn."""

    sampler: SamplerName = "dpm++"
    implementation: Literal["ldm", "diffusers"] = "ldm"
    """Whose code takes the steps; the pictures are the same."""
    steps: Count = 20
    guidance: Annotated[float, Field(ge=1)] = 2.0
    """Classifier-free guidance scale; 1 switches guidance off."""
    guided_from: Share = 0.0
    guided_to: Share = 1.0
    """Guidance is computed at timesteps within these shares of the schedule alone; outside, a step
    costs half."""
    compute: Precision = "float32"
    """Precision of the UNet."""
    batch_size: Count = 40
    """Pictures at a time on a GPU. A CPU has batches of its own, so that a picture is the same to
    the last bit whatever is drawn beside it."""
    seed: int = 0

    @model_validator(mode="after")
    def _own_noise(self) -> Self:
        if self.sampler in ("ddpm", "dpm++sde") and self.implementation == "diffusers":
            raise ValueError(
                f"sampler {self.sampler}: diffusers' draws its own noise; set sampler dpm++, or "
                "implementation ldm"
            )
        return self


class EvaluationSampling(Sampling):
    """How evaluation draws: hundreds of pictures, whose share that is right bfloat16 keeps."""

    sampler: SamplerName = "dpm++sde"
    compute: Precision = "auto"
    """Precision of the UNet."""


FAST = {"compute": "auto", "guided_from": 0.3, "guided_to": 0.9}
"""What of a :class:`Sampling` ``ldm generate --fast`` changes; ``python -m bench generation``
measures it."""


class Evaluate(Section):
    """Batch sampling over the evaluation prompts."""

    sampling: EvaluationSampling = EvaluationSampling()


class Gate(Section):
    """When a challenger becomes champion."""

    wins_on: tuple[str, ...] = ("adherence_new", "adherence_heldout")
    """The mean of these metrics must rise by ``min_gain`` at least; where that is 0, at all."""
    min_gain: float = 0.0
    holds: tuple[str, ...] = ("adherence",)
    """None of these may fall by more than ``max_loss``."""
    max_loss: Annotated[float, Field(ge=0)] = 0.03


class Registry(Section):
    """MLflow."""

    tracking_uri: str = "sqlite:///mlflow.db"
    experiment: str = "ldm"
    model: str = "ldm"
    gate: Gate = Gate()
