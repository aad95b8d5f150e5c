"""Registered models: ``models:/NAME@ALIAS`` as a folder, verified; what versions were made of."""

from __future__ import annotations

import os
import re
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ldm.artifacts import opening
from ldm.config import Registry
from ldm.errors import UserError
from ldm.tracking.connection import (
    SQLITE,
    TRACKING_URI,
    connect,
    first_line,
    may_exist,
    tracking_uri,
)
from ldm.tracking.versions import MODEL_DIGEST, PIPELINE, aliases

if TYPE_CHECKING:
    from mlflow import MlflowClient

SAMPLES = "samples.txt"
"""In a version's run: the split and the key of each sample it was trained or validated on."""
USES = {"train": "was trained on", "validation": "was validated on"}


def fetch_model(uri: str) -> Path:
    """The pipeline folder of ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.

    The registry is that of ``MLFLOW_TRACKING_URI``, by default the configuration's. A store on this
    machine is read in place; from others the folder is fetched once, into ``ldm/models`` of the
    user's cache. Raises :class:`UserError` when there is no such model or it is damaged.
    """
    client, name, version = _version_behind(uri)
    return _folder_of(client, uri, name, version)


def pinned(uri: str) -> str:
    """``models:/NAME/VERSION`` for ``models:/NAME@ALIAS``: aliases move. Raises as above."""
    _, name, version = _version_behind(uri)
    return f"models:/{name}/{version}"


def trained_on(config: Registry, sample: str) -> dict[str, str | None]:
    """Each version of the registered model, by name, to what it did with a sample.

    That is one of :data:`USES`, empty for nothing, or None if the version does not say.
    """
    at = tracking_uri(config.tracking_uri)
    if not may_exist(at):
        return {}
    client = connect(at)
    named = aliases(client, config.model)
    versions = client.search_model_versions(f"name = '{config.model}'")
    uses: dict[str, str | None] = {}
    found: dict[str, str | None] = {}
    for version in sorted(versions, key=lambda version: int(version.version)):
        own = [alias for alias, number in named.items() if number == str(version.version)]
        name = " ".join((config.model, "version", str(version.version), *map("@{}".format, own)))
        # Versions that were trained on the same latents were trained on the same samples.
        latents = version.tags.get("latents_digest", version.run_id)
        if uses.get(latents) is None:
            uses[latents] = _use(client, version.run_id, sample)
        found[name] = uses[latents]
    return found


def _use(client: MlflowClient, run_id: str, sample: str) -> str | None:
    from mlflow.artifacts import load_text

    if SAMPLES not in {item.path for item in client.list_artifacts(run_id)}:
        return None
    for line in load_text(f"runs:/{run_id}/{SAMPLES}").splitlines():
        split, _, key = line.partition(" ")
        if key == sample:
            return USES[split]
    return ""


def _version_behind(uri: str) -> tuple[MlflowClient, str, str]:
    at = tracking_uri(Registry().tracking_uri)
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if not match:
        raise UserError(f"{uri}: is no model; write models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, version = match.groups()
    if not may_exist(at):
        raise UserError(
            f"{uri}: {at.removeprefix(SQLITE)} does not exist; run `ldm register`, or set "
            f"{TRACKING_URI}"
        )
    client = connect(at)
    version = version or aliases(client, name).get(alias)
    if not version:
        raise UserError(f"{uri}: {at} has no such model; run `ldm register` and `ldm promote`")
    return client, name, version


def _folder_of(client: MlflowClient, uri: str, name: str, version: str) -> Path:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    try:
        digest = client.get_model_version(name, version).tags.get(MODEL_DIGEST)
        store = client.get_model_version_download_uri(name, version).rstrip("/")
        if digest is None:
            raise UserError(f"{uri}: was not registered by `ldm register`; name another version")
        cached = _cache() / digest
        if cached.is_dir():
            return _verified(cached, digest, uri)
        flavor = Model.load(store).flavors["python_function"]
        source = f"{store}/{flavor['artifacts'][PIPELINE]['path']}"
        if _is_here(source):
            # Without a destination MLflow answers with the place itself.
            return _verified(Path(download_artifacts(artifact_uri=source)), digest, uri)
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as aside:
            fetched = Path(download_artifacts(artifact_uri=source, dst_path=aside))
            _verified(fetched, digest, uri)
            if not cached.is_dir():
                fetched.rename(cached)
    except (MlflowException, OSError) as error:
        raise UserError(
            f"{uri}: cannot be fetched ({first_line(error)}); register it again"
        ) from error
    return cached


@lru_cache
def _verified(folder: Path, digest: str, uri: str) -> Path:
    """``folder`` if it holds what was registered; read once a process."""
    if opening(folder, "model", "register").digest != digest:
        raise UserError(f"{folder}: is not what {uri} was registered with; register it again")
    return folder


def _is_here(uri: str) -> bool:
    return urlsplit(uri).scheme in ("", "file")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm" / "models"
