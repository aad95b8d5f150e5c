"""What a launcher asks of the processes that it starts: a stage's arguments, as JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ldm.config import Encode, EvaluationSampling, Pretrained, Registry, Section, Train
from ldm.errors import UserError, full_disk_told
from ldm.termination import LAUNCHER, ask_when_orphaned

REQUEST = "LDM_REQUEST"
"""Where it stands in their environment."""


class TrainRequest(Section):
    """The arguments of :func:`ldm.train.stage.train`."""

    train: Train
    pretrained: Pretrained
    latents: Path
    out: Path
    runs: Path
    resume: Path | None = None
    changed: bool = False
    registry: Registry | None = None
    sampling: EvaluationSampling = EvaluationSampling()


class EncodeRequest(Section):
    """The arguments of :func:`ldm.encode.stage.encode`."""

    encode: Encode
    pretrained: Pretrained
    images: Path
    out: Path
    runs: Path


Request = TypeVar("Request", bound=Section)


def leave(request: Section) -> None:
    """Put it where processes that are started from now on find it."""
    os.environ |= {REQUEST: request.model_dump_json(), LAUNCHER: str(os.getpid())}


def serve(stage: str, kind: type[Request], run: Callable[[Request], None]) -> None:
    """Do in such a process what was asked; a :class:`UserError` ends it as it ends ``ldm STAGE``.

    SIGTERM comes when the launcher dies.
    """
    ask_when_orphaned()
    try:
        with full_disk_told(Path.cwd()):
            run(kind.model_validate_json(os.environ[REQUEST]))
    except UserError as error:
        sys.exit(f"ldm {stage}: {error}")
    except RuntimeError as error:
        if not (_of_a_peer(error) or _of_a_loader(error)):
            raise
        sys.exit(
            f"ldm {stage}: another process of it is gone or stands still "
            f"({str(error).splitlines()[0]}); the same command goes on from what is done"
        )


def _of_a_loader(error: RuntimeError) -> bool:
    """Whether it is what torch says of one that was killed, or makes no batch."""
    return any(words in str(error) for words in ("DataLoader worker (pid", "DataLoader timed out"))


def _of_a_peer(error: RuntimeError) -> bool:
    """Whether it is what torch says of a process that it waited for in vain."""
    names = [kind.__name__ for kind in type(error).__mro__]
    return "DistError" in names or "gloo" in str(error)
