"""The stage graph, as DVC has it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ldm.errors import UserError


def stage_graph(root: Path) -> dict[str, tuple[str, ...]]:
    """Each stage of ``dvc.yaml`` and the stages it waits for, in an order that may be run."""
    from dvc.repo import Repo
    from networkx import topological_sort

    with Repo(str(root)) as repo:
        graph = repo.index.graph
        stages = [stage for stage in topological_sort(graph.reverse()) if stage.cmd]
        return {
            stage.name: tuple(sorted(needed.name for needed in graph[stage] if needed.cmd))
            for stage in stages
        }


def stale(root: Path) -> Mapping[str, object]:
    """What ``dvc repro`` would do: a reason by stage or data file; empty when all is up to date."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "--wait-for-lock", "status", "--json"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        # In several lines, and the remedy in the last, where another dvc is at work.
        reason = " ".join((done.stderr or done.stdout).split())
        raise UserError(f"dvc status failed: {reason}")
    found: dict[str, object] = json.loads(done.stdout or "{}")
    return found
