"""Library defaults that a person at a terminal does not want: telemetry and chatter."""

from __future__ import annotations

import logging
import os

SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "DVC_NO_ANALYTICS": "1",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "WANDB_MODE": "disabled",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def quieten() -> None:
    """Set what the environment does not set itself; call it before the libraries are imported."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    # diffusers imports it where it is installed; then it warns of a kernel that is not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
