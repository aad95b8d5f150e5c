"""Every setting, typed: one frozen model a stage. Unknown keys and wrong types are refused."""

from __future__ import annotations

from ldm.config.accelerate import Accelerate
from ldm.config.dataset import Encode, Ingest, Pretrained, Scenes
from ldm.config.drawing import Evaluate, EvaluationSampling, Gate, Registry, Sampling
from ldm.config.first_stage import (
    ClipTraining,
    FirstStage,
    LayoutTraining,
    PartTraining,
    VaeTraining,
)
from ldm.config.section import Precision, Section
from ldm.config.training import Lora, NoiseSchedule, Train, UnetShape

__all__ = [
    "Accelerate",
    "ClipTraining",
    "Encode",
    "Evaluate",
    "EvaluationSampling",
    "FirstStage",
    "Gate",
    "Ingest",
    "LayoutTraining",
    "Lora",
    "NoiseSchedule",
    "Params",
    "PartTraining",
    "Precision",
    "Pretrained",
    "Registry",
    "Sampling",
    "Scenes",
    "Section",
    "Train",
    "UnetShape",
    "VaeTraining",
]


class Params(Section):
    """All of ``params.yaml``."""

    scenes: Scenes = Scenes()
    ingest: Ingest = Ingest()
    pretrained: Pretrained = Pretrained()
    first_stage: FirstStage = FirstStage()
    encode: Encode = Encode()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    generate: Sampling = Sampling()
    registry: Registry = Registry()
