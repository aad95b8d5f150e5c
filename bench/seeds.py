"""What the demo's model draws right, by seed: each one trains, and is judged, anew.

Needs ``data`` and ``artifacts/latents`` (``make demo`` makes them); about 7 minutes a seed. Stopped
and started again it goes on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

SEEDS = range(3)
OUT = Path("build/seeds")
FIGURES = ("adherence", "adherence_new", "adherence_heldout", "val_loss")


def main() -> None:
    """Print each seed's figures, before and after training, their mean and standard deviation."""
    rows = [metrics(seed) for seed in SEEDS]
    for title, found in (("start", [row["start"] for row in rows]), ("retrained", rows)):
        print(f"\n{title:>20} " + " ".join(f"{f'seed {seed}':>8}" for seed in SEEDS), end="")
        print(f" {'mean':>8} {'+-':>8}")
        for figure in FIGURES:
            if values := [row[figure] for row in found if figure in row]:
                shown = " ".join(f"{one:8.4f}" for one in (*values, mean(values), stdev(values)))
                print(f"{figure:>20} {shown}")


def metrics(seed: int) -> dict[str, Any]:
    """``metrics.json`` of a training and an evaluation with this seed."""
    model, judged = OUT / f"{seed}" / "model", OUT / f"{seed}" / "eval"
    ldm("train", f"--out={model}", f"--set=train.seed={seed}", "--set=train.track=false")
    sets = f"--set=evaluate.sampling.seed={seed}"
    ldm("evaluate", f"--model={model}", f"--out={judged}", sets)
    found: dict[str, Any] = json.loads((judged / "metrics.json").read_text())
    return found


def ldm(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "ldm.cli", *arguments], check=True)
