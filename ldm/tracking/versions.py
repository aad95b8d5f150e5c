"""Versions of a registered model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ldm.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

PIPELINE = "pipeline"
"""The logged model's artifact that is the pipeline folder."""
MODEL_DIGEST = "model_digest"
"""Tag of a version: the digest of its pipeline folder's manifest."""
EVAL_DIGEST, PROMPTS, SAMPLING = "eval_digest", "prompts_digest", "sampling_digest"
JUDGE = "judge_digest"
"""Tags of a version: what judged it, on which prompts, with which settings and by which CLIP."""
CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
"""Aliases of a version: registered last, in use, in use before."""
Metrics = dict[str, float]


def aliases(client: MlflowClient, name: str) -> dict[str, str]:
    """Alias to version of a registered model; empty when there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}
    return {alias: str(version) for alias, version in found.items()}


def version_of(client: MlflowClient, name: str, version: str) -> tuple[ModelVersion, Metrics]:
    """A version of a registered model and the last metrics of its run.

    Raises :class:`UserError` when there is no such version.
    """
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_model_version(name, version)
    except MlflowException as error:
        raise UserError(f"{name}: has no version {version!r}; `mlflow ui` shows them") from error
    return found, client.get_run(found.run_id).data.metrics


def exists(client: MlflowClient, name: str, version: str) -> bool:
    """Whether there is such a version; one can be deleted."""
    return bool(client.search_model_versions(f"name = '{name}' and version_number = {version}"))


def with_tag(client: MlflowClient, name: str, tag: str, like: ModelVersion) -> list[str]:
    """The versions of a registered model that have a tag, of those with the weights of one."""
    digest = like.tags.get(MODEL_DIGEST)
    found = client.search_model_versions(f"name = '{name}' and tags.{MODEL_DIGEST} = '{digest}'")
    return [str(one.version) for one in found if tag in one.tags]


def find_version(client: MlflowClient, name: str, tags: Mapping[str, str]) -> ModelVersion | None:
    """The newest version of a registered model that has all of these tags."""
    wanted = [f"name = '{name}'", *(f"tags.{key} = '{value}'" for key, value in tags.items())]
    found = client.search_model_versions(" and ".join(wanted))
    return max(found, key=lambda version: int(version.version), default=None)
