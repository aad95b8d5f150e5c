"""The registered model: prompts in, PNG bytes out; and how it is stored.

MLflow keeps this very file with each version and runs it to load one ("models from code"), so it
imports mlflow first of all. What it imports of ``ldm`` is then the copy that is stored beside it.
"""

from __future__ import annotations

import shutil
import tempfile
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import mlflow
from mlflow.models import set_model, set_signature
from mlflow.pyfunc import PythonModel
from mlflow.types import ParamSchema, ParamSpec

from ldm.config import Sampling
from ldm.images import encode_png
from ldm.models import Source
from ldm.params import with_changes
from ldm.sampling import Painter, Request
from ldm.tracking.versions import PIPELINE

# What this file imports, directly or through diffusers (scipy: the lms sampler).
REQUIRED = (
    *("mlflow", "torch", "diffusers", "transformers", "safetensors"),
    *("numpy", "scipy", "pillow", "pydantic", "pyyaml"),
)


class Pictures(PythonModel):
    """A :class:`~ldm.sampling.Painter` on the stored pipeline folder."""

    def load_context(self, context: Any) -> None:
        """Load the weights, onto the first GPU if there is one."""
        self.painter = Painter.load(Source(context.artifacts[PIPELINE]))

    def predict(self, model_input: list[str], params: dict[str, Any] | None = None) -> list[bytes]:
        """One PNG a prompt, in order; picture ``i`` is drawn with ``seed + i``.

        ``params``: the fields of :class:`~ldm.config.Sampling`, by default the evaluation's;
        ``negative``, a prompt to stay away from; ``height`` and ``width`` in pixels, 0 for the
        model's own. Raises :class:`~ldm.errors.UserError` naming a parameter that cannot be used.
        """
        given = dict(params or {})
        negative = given.pop("negative", "")
        height, width = given.pop("height", 0) or None, given.pop("width", 0) or None
        sampling = with_changes(Sampling(), given, "params")
        requests = [
            Request(prompt, sampling.seed + number, negative)
            for number, prompt in enumerate(model_input)
        ]
        drawn = self.painter.draw(requests, sampling, height=height, width=width)
        return [encode_png(pixels) for pixels in drawn]


def parameters(sampling: Sampling) -> ParamSchema:
    """The parameters that ``predict`` takes, with their types and with defaults."""
    kinds = {int: "long", float: "double", str: "string"}
    defaults = {**sampling.as_dict(), "negative": "", "height": 0, "width": 0}
    return ParamSchema(
        [ParamSpec(name, kinds[type(value)], value) for name, value in defaults.items()]
    )


def requirements() -> list[str]:
    """Pinned as installed here; a local build (``+cpu``) satisfies its public version."""
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIRED]


def store_model(folder: Path, sampling: Sampling) -> str:
    """Log a pipeline folder as a model of the active run; its ``models:/`` URI.

    The model is code (this file, and the package without its weights) and the folder's safetensors.
    ``sampling`` gives the defaults of its parameters.
    """
    package = Path(str(resources.files("ldm")))
    with tempfile.TemporaryDirectory() as staged:
        code = Path(staged) / package.name
        shutil.copytree(package, code, ignore=shutil.ignore_patterns("pretrained", "__pycache__"))
        info = mlflow.pyfunc.log_model(
            name=PIPELINE,
            python_model=__file__,
            artifacts={PIPELINE: str(folder.absolute())},
            code_paths=[str(code)],
            pip_requirements=requirements(),
        )
    # Type hints gave it inputs and outputs. Parameters would come from an example only, and MLflow
    # would draw that example, twice.
    signature = info.signature
    signature.params = parameters(sampling)
    set_signature(info.model_uri, signature)
    return str(info.model_uri)


set_model(Pictures())
