"""A checkpoint as a model is what the training would have ended with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ldm.train.trainer
from ldm.artifacts import opening
from ldm.checkpoint import folders
from ldm.errors import UserError
from ldm.export import export
from tests.disk import room_for
from tests.test_train import run_here

EVERY = {"log_every": 1, "checkpoint_every": 4, "validate_every": 4, "keep_checkpoints": 9}


@pytest.mark.parametrize(
    ("network", "settings"),
    [
        ("ldm", {}),
        ("diffusers", {"text_learning_rate": 1e-3}),
        ("ldm", {"lora": {"rank": 2}}),
        ("ldm", {"lora": {"rank": 2}, "text_learning_rate": 1e-3}),
    ],
    ids=["all", "text", "adapters", "text adapters"],
)
def test_the_last_checkpoint_is_the_model(
    pipeline: Path, latents: Path, tmp_path: Path, network: str, settings: dict[str, Any]
) -> None:
    model = run_here(pipeline, latents, tmp_path, network, **EVERY, **settings, learning_rate=1e-2)
    (run,) = (tmp_path / "runs").iterdir()
    export(folders(run)[-1], tmp_path / "exported")
    made, exported = (opening(path, "model", "train") for path in (model, tmp_path / "exported"))
    assert exported == made.__class__(**{**vars(made), "path": exported.path})


def test_a_run_gives_its_best_checkpoint(
    pipeline: Path,
    latents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, losses = ldm.train.trainer.validation_loss, iter((0.25, 0.5, 0.75))

    def worse(*arguments: Any, **options: Any) -> dict[str, Any]:
        found = whole(*arguments, **options)
        assert found
        return {**found, "val_loss": next(losses)}

    monkeypatch.setattr(ldm.train.trainer, "validation_loss", worse)
    run_here(pipeline, latents, tmp_path, **EVERY)
    (run,) = (tmp_path / "runs").iterdir()
    capsys.readouterr()
    export(run, tmp_path / "exported")
    assert "export: step 4, val_loss 0.2500 -> " in capsys.readouterr().out
    made = opening(tmp_path / "exported", "model", "train")
    assert made.counts == {"steps": 4, "samples": 32}
    log = (tmp_path / "exported" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4, 4]
    export(run / "step-00000004", tmp_path / "named")
    assert opening(tmp_path / "named", "model", "train").files == made.files


def test_what_is_no_checkpoint_is_refused(pipeline: Path, tmp_path: Path) -> None:
    for named in (pipeline, tmp_path / "nothing"):
        with pytest.raises(UserError, match="is no checkpoint of `ldm train`; name a folder of"):
            export(named, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"{}"])
def test_a_damaged_description_of_the_model_is_named(
    pipeline: Path, latents: Path, tmp_path: Path, content: bytes
) -> None:
    run_here(pipeline, latents, tmp_path, steps=2)
    (run,) = (tmp_path / "runs").iterdir()
    (run / "model.json").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.json: is damaged \(.*\); the command that made"):
        export(folders(run)[-1], tmp_path / "exported")


def test_a_disk_that_is_full_of_weights_is_told(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    run_here(pipeline, latents, tmp_path, steps=2)
    (checkpoint,) = tmp_path.glob("runs/*/step-00000002")
    out = tmp_path / "exported"
    with room_for(20_000), pytest.raises(UserError, match=rf"^{out}: cannot be written .* make ro"):
        export(checkpoint, out)
    assert not out.exists()
