"""The structure holds: who may import whom, and what is light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
STAGES = {
    "ingest",
    "first_stage",
    "encode",
    "train",
    "evaluate",
    "registry",
    "generate",
    "explain",
    "report",
    "export",
    "prune",
    "trace",
}
ALLOWED = {"report": "registry", "trace": "ingest.rows"}
"""The exceptions: what the report says of versions, and which sample a URL names."""
SPEAK_MLFLOW = {"tracking", "registry"}
HEAVY = {"torch", "diffusers", "transformers", "mlflow", "prefect", "pandas", "dvc", "numpy"}
HEAVY |= {"fsspec", "botocore"}
SOURCES = sorted((ROOT / "ldm").rglob("*.py"))


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def stage_of(path: Path) -> str:
    return path.relative_to(ROOT / "ldm").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    own = stage_of(path)
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in {"prefect", "flows"}, f"{path} imports {name}"
        if parts[0] == "mlflow":
            assert own in SPEAK_MLFLOW, f"{path} imports {name}"
        if own in STAGES and parts[0] == "ldm" and len(parts) > 1:
            inside = ".".join(parts[1:])
            allowed = own in ALLOWED and f"{inside}.".startswith(f"{ALLOWED[own]}.")
            assert parts[1] not in STAGES - {own} or allowed, f"stage {own} imports {inside}"


def test_no_module_is_called_utils() -> None:
    assert not [path for path in SOURCES if "util" in path.stem]


def test_ingest_names_all_its_parts() -> None:
    room = ROOT / "ldm" / "ingest"
    parts = {path.stem for path in room.glob("*.py")} - {"__init__"}
    assert set(re.findall(r"``(\w+)``", (room / "__init__.py").read_text())) == parts


def test_the_command_line_is_light() -> None:
    for name in ("cli", "options", "__init__", "quiet", "importing"):
        path = ROOT / "ldm" / f"{name}.py"
        assert not {name.split(".")[0] for name in imports(path, top_level_only=True)} & HEAVY
    code = "import sys, ldm.cli; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not HEAVY & set(loaded)


ANYWHERE = {
    "artifacts",
    "cli",
    "code",
    "config",
    "device",
    "errors",
    "locks",
    "params",
    "progress",
    "quiet",
    "tracking",
}
"""What no stage's result depends on, or what its parameters cover."""
ONLOOKERS = {"tracking.live", "train.sample_sheet"}
"""What looks on while a stage runs, with all that it needs for that."""


def needed_by(module: str, seen: set[str]) -> set[str]:
    """The modules of ``ldm`` that a module imports, directly or not; itself included."""
    seen.add(module)
    path = (ROOT / module.replace(".", "/")).with_suffix(".py")
    path = path if path.is_file() else path.with_suffix("") / "__init__.py"
    for name in imports(path):
        for found in (name, name.rpartition(".")[0]):
            place = ROOT / found.replace(".", "/")
            known = place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()
            if found.startswith("ldm.") and known and found not in seen:
                needed_by(found, seen)
    return seen


KEEPING = {
    "checkpoint",
    "memory",
    "milestones",
    "models",
    "optimizer_state",
    "request",
    "run_log",
    "runs",
    "saver",
    "shards",
    "termination",
}
"""What stores and reads, and is verified: weights, shards and states by their digests."""


def deciding(*modules: str) -> set[str]:
    """What modules need that may decide a result, as paths without their ending."""
    needed = {f"ldm.{name}" for name in ONLOOKERS}
    for module in modules:
        needed_by(module, needed)
    known = (ANYWHERE - {"device"}) | KEEPING
    others = {name.removeprefix("ldm.") for name in needed if name.split(".")[1] not in known}
    files = [name.replace(".", "/") for name in others - ONLOOKERS]
    return {name for name in files if (ROOT / "ldm" / f"{name}.py").is_file()}


def test_a_first_stage_is_named_by_the_code_that_decides_it() -> None:
    from ldm.first_stage.stage import DECIDING

    parts = ("vae", "tokenizer", "clip", "layout")
    found = deciding(*(f"ldm.first_stage.{part}" for part in parts))
    others = {path for path in found if not path.startswith("first_stage")}
    come_with_the_package = {"nn/config", "nn/convolution", "nn/layers", "nn/norm", "nn/unet"}
    assert others - come_with_the_package == set(DECIDING)


def test_a_run_is_named_by_the_code_that_decides_its_steps() -> None:
    from ldm.train.stage import DECIDING

    found = {path for path in deciding("ldm.train.trainer") if path.split("/")[0] != "nn"}
    # How attention is computed, and which adapters are trained, is set beforehand.
    assert found | {"device", "lora", "train/compilation"} == set(DECIDING)


def test_what_was_encoded_is_known_by_the_code_that_did() -> None:
    from ldm.encode.encoders import CODE, PICTURE_CODE

    assert deciding("ldm.encode.encoders") | {"device"} == set(PICTURE_CODE)  # It is given them.
    assert {*PICTURE_CODE} - {*CODE} == {"images"}


@pytest.mark.parametrize(
    ("stage", "module"),
    [
        ("ingest", "ldm.ingest.stage"),
        ("encode", "ldm.encode.stage"),
        ("train", "ldm.train.stage"),
        ("evaluate", "ldm.evaluate"),
    ],
)
def test_dvc_knows_the_code_that_makes_each_stage(stage: str, module: str) -> None:
    """A mended module must not leave old results in place."""
    listed = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]["deps"]
    for name in needed_by(module, {f"ldm.{name}" for name in ONLOOKERS}):
        parts = name.split(".")
        if parts[1] in ANYWHERE or name.removeprefix("ldm.") in ONLOOKERS:
            continue
        paths = {"/".join(parts[:depth]) for depth in range(2, len(parts) + 1)}
        covered = paths & {path.removesuffix(".py") for path in listed}
        assert covered, f"dvc.yaml: {stage} does not depend on {name}"
