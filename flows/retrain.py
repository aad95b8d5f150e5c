"""The retraining flow: DVC's stages one by one, then register, promote, report.

``python -m flows.retrain`` runs it here; ``prefect.yaml`` declares it as a scheduled deployment.
DVC alone decides what is stale, so no task is cached by Prefect.
"""

from __future__ import annotations

import argparse
import base64
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run
from pydantic import Field

from flows.dag import stage_graph, stale
from flows.process import ROOT, run, run_ldm, stop_in_order
from ldm.artifacts import manifest_of
from ldm.errors import UserError
from ldm.options import EVAL, REPORT
from ldm.progress import say

ADVICE = (
    "Generating lock file",
    "Updating lock file",
    "To track the changes",
    "git add ",
    "To enable auto staging",
    "dvc config ",
    "Use `dvc push`",
)
"""Beginnings of lines that DVC prints for a person at a terminal."""


@dataclass(frozen=True)
class Outcome:
    """What became of a stage: ``cached`` or ``run``, in seconds."""

    stage: str
    what: str
    seconds: float


def _task_name() -> str:
    return str(task_run.parameters["name"])


@task(task_run_name=_task_name, cache_policy=NO_CACHE)
def stage(name: str, root: Path) -> Outcome:
    """One stage of ``dvc.yaml`` through ``dvc repro``."""
    logger = get_run_logger()
    started = time.monotonic()
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "-s", name]

    def log(line: str) -> None:
        if not line.strip().startswith(ADVICE):
            logger.info(line)

    lines = run(command, root, log)
    ran = any(line.startswith(f"Running stage '{name}'") for line in lines)
    outcome = Outcome(name, "run" if ran else "cached", round(time.monotonic() - started, 1))
    logger.info("%s: %s in %.1f s", outcome.stage, outcome.what, outcome.seconds)
    return outcome


@task(task_run_name=_task_name, cache_policy=NO_CACHE)
def command(name: str, root: Path, options: Sequence[str] = ()) -> str:
    """A step with side effects outside DVC's reach: ``ldm NAME``; its line of result."""
    return run_ldm(name, *options, root=root)


@flow(name="retrain")
def retrain(
    root: Path = ROOT,
    ingest_retries: int = 2,
    keep_runs: Annotated[int, Field(ge=0)] | None = None,
) -> list[Outcome]:
    """Bring the model up to date with the data, register it, let the gate decide, report.

    Then trainings that have ended give up their checkpoints, all but the newest ``keep_runs``.
    """
    done: dict[str, Outcome] = {}
    for name, needed in stage_graph(root).items():
        # Fetching depends on other people's servers; the rest fails for a reason that stays.
        retries = ingest_retries if name == "ingest" else 0
        # Not submitted to a thread: a cancelled flow would wait there for the stage to end.
        done[name] = stage.with_options(retries=retries, retry_delay_seconds=10)(
            name, root, wait_for=[done[other] for other in needed]
        )
    outcomes = list(done.values())
    said = [command(name, root) for name in ("register", "promote", "report")]
    if keep_runs is not None:
        said.append(command("prune", root, [f"--keep={keep_runs}"]))
    _leave_artifacts(root, outcomes, said)
    return outcomes


def _leave_artifacts(root: Path, outcomes: list[Outcome], said: list[str]) -> None:
    metrics = json.loads((root / EVAL / "metrics.json").read_text())
    start = metrics["start"]
    lines = ["# Retraining", "", "| stage | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {done.stage} | {done.what} | {done.seconds} |" for done in outcomes]
    lines += ["", "| metric | start | this model |", "|---|---|---|"]
    lines += [
        f"| {name} | {start.get(name, '')} | {value} |"
        for name, value in metrics.items()
        if name != "start"
    ]
    lines += ["", *(f"- {line}" for line in said)]
    create_markdown_artifact("\n".join(lines), key="retraining")
    picture = base64.b64encode((root / EVAL / "samples.png").read_bytes()).decode()
    create_image_artifact(f"data:image/png;base64,{picture}", key="samples")


def reported(root: Path) -> bool:
    """Whether the page, which is made last, is about the present model and its evaluation.

    If not, what follows the evaluation has failed, and is still to be done.
    """
    page = manifest_of(root / REPORT, "run `ldm report` to make it")
    judged = manifest_of(root / EVAL, "run `ldm evaluate` to make it")
    if page is None or judged is None:
        return False
    shown = page.inputs["model"], page.inputs["eval"]
    return shown == (judged.inputs["model"], judged.digest)


def main() -> None:
    """Run the flow, or say that there is nothing to do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--keep-runs", type=int, metavar="N", help="`ldm prune --keep N` at the end; default: none"
    )
    keep_runs = parser.parse_args().keep_runs
    if keep_runs is not None and keep_runs < 0:
        parser.error(f"--keep-runs {keep_runs}: give 0 or more")
    stop_in_order()
    started = time.monotonic()
    try:
        if not stale(ROOT) and reported(ROOT):
            seconds = time.monotonic() - started
            say(f"retrain: every stage is up to date, nothing done again ({seconds:.0f} s)")
            return
        outcomes = retrain(keep_runs=keep_runs)
    except UserError as error:
        sys.exit(f"retrain: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"retrain: `{' '.join(error.cmd[1:])}` failed; its last lines are above")
    table = ", ".join(f"{done.stage} {done.what} {done.seconds:.0f} s" for done in outcomes)
    say(f"retrain: {table}; see artifacts/report/index.html")


if __name__ == "__main__":
    main()
