"""Going on from a run, under the same settings and under others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from ldm import checkpoint
from ldm.artifacts import opening
from ldm.config import Pretrained, Sampling, Train
from ldm.errors import UserError
from ldm.export import export
from ldm.params import load_params
from ldm.train.stage import train
from tests.launched import ROOT, SHORT, launch

HALF = {**SHORT, "mixed_precision": "no", "checkpoint_every": 6, "keep_checkpoints": 9}


def run(
    pipeline: Path, latents: Path, folder: Path, resume: Path | None = None, **settings: object
) -> Path:
    """Train in ``folder``; the folder of the newest run."""
    changed = bool(settings.pop("changed", False))
    config = Train.model_validate({**HALF, **settings})
    runs = folder / "runs"
    before = set(runs.glob("*"))
    train(
        *(config, Pretrained(pipeline=str(pipeline)), latents, folder / "model", runs),
        resume=resume,
        changed=changed,
    )
    return next(iter(set(runs.glob("*")) - before), next(iter(before), runs))


def steps_logged(folder: Path) -> list[int]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)]


def stopped_at(folder: Path, step: int) -> None:
    """Take away the checkpoints after ``step``."""
    for one in checkpoint.folders(folder):
        if int(one.name.removeprefix("step-")) > step:
            shutil.rmtree(one)


def test_a_run_goes_on_by_its_name(pipeline: Path, latents: Path, tmp_path: Path) -> None:
    earlier = run(pipeline, latents, tmp_path)
    whole = opening(tmp_path / "model", "model", "train").files
    stopped_at(earlier, 6)
    assert run(pipeline, latents, tmp_path, resume=earlier) == earlier
    assert opening(tmp_path / "model", "model", "train").files == whole


def test_a_run_that_goes_on_past_its_end_averages_each_step_once(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    earlier = run(pipeline, latents, tmp_path, steps=6)
    later = run(pipeline, latents, tmp_path, resume=earlier, changed=True, steps=7)
    before, after = (checkpoint.newest(one) for one in (earlier, later))
    assert before is not None and after is not None
    assert (before.averaged, after.averaged) == (6, 7)
    kept = min(Train.model_validate({**HALF}).ema_decay, 8 / 17)
    for name, one in after.ema.items():
        expected = kept * before.ema[name] + (1 - kept) * after.weights[name]
        assert torch.allclose(one, expected, atol=1e-6), name
        assert not torch.equal(one, before.ema[name])


def test_other_settings_are_refused_by_name(pipeline: Path, latents: Path, tmp_path: Path) -> None:
    earlier = run(pipeline, latents, tmp_path)
    with pytest.raises(UserError, match=r"train\.learning_rate 0\.0004 -> 0\.001; train\.steps 12"):
        run(pipeline, latents, tmp_path, resume=earlier, steps=18, learning_rate=1e-3)
    assert list((tmp_path / "runs").iterdir()) == [earlier]


def test_other_settings_that_are_meant_go_on_as_a_run_of_their_own(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    earlier = run(pipeline, latents, tmp_path)
    kept = (earlier / "log.jsonl").read_bytes()
    later = {"steps": 18, "learning_rate": 1e-3, "changed": True}
    new = run(pipeline, latents, tmp_path, resume=earlier, **later)
    assert new != earlier and steps_logged(new) == [14, 16, 18]
    assert (earlier / "log.jsonl").read_bytes() == kept
    whole = opening(tmp_path / "model", "model", "train").files
    stopped_at(new, 17)
    run(pipeline, latents, tmp_path, resume=earlier, **later)  # The same command goes on with it.
    assert opening(tmp_path / "model", "model", "train").files == whole


@pytest.mark.slow
def test_the_commands_options_name_the_run_and_say_that_changes_are_meant(
    pipeline: Path, latents: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = [f"train.{key}={value}" for key, value in {**HALF, "steps": 4}.items()]
    config = load_params(str(ROOT / "params.yaml"), asked).train  # What `launch` begins with.
    paths = (latents, tmp_path / "model", tmp_path / "runs")
    train(config, Pretrained(pipeline=str(pipeline)), *paths)
    (earlier,) = paths[-1].iterdir()
    capfd.readouterr()
    later = {**HALF, "steps": 6, "learning_rate": 1e-3, "resume": earlier}
    assert launch(pipeline, latents, tmp_path, **later).wait() == 1
    (said,) = capfd.readouterr().err.splitlines()
    differs = "train.learning_rate 0.0004 -> 0.001; train.steps 4 -> 6"
    assert said.startswith(f"ldm train: {earlier}: was trained otherwise ({differs}); ")
    assert list(paths[-1].iterdir()) == [earlier]
    assert launch(pipeline, latents, tmp_path, **later, changed=True).wait() == 0
    (new,) = set(paths[-1].iterdir()) - {earlier}
    assert steps_logged(new) == [6] and steps_logged(earlier) == [2, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 12, "seed": 1}, "has taken 12 steps; raise train.steps"),
        ({"steps": 18, "text_learning_rate": 1e-4}, "trained other weights"),
        (
            {"steps": 18, "optimizer": "prodigy", "learning_rate": 1},
            "trained by adamw, whose state",
        ),
    ],
)
def test_what_cannot_be_gone_on_with(
    pipeline: Path, latents: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    earlier = run(pipeline, latents, tmp_path)
    with pytest.raises(UserError, match=message):
        run(pipeline, latents, tmp_path, resume=earlier, changed=True, **settings)


def test_whose_network_it_is_makes_another_run(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    config = Train.model_validate({**HALF, "steps": 2})
    for network in ("ldm", "diffusers"):
        parts = Pretrained.model_validate({"pipeline": str(pipeline), "network": network})
        train(config, parts, latents, tmp_path / "model", tmp_path / "runs")
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_damaged_description_of_another_run_stops_nothing(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    earlier = run(pipeline, latents, tmp_path, steps=2)
    for steps, content in ((3, "{"), (4, "[]")):
        (earlier / "run.json").write_text(content)
        assert run(pipeline, latents, tmp_path, steps=steps) != earlier


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"config": 3, "inputs": {}}'])
def test_a_damaged_description_is_named_and_mended_by_the_runs_own_command(
    pipeline: Path, latents: Path, tmp_path: Path, content: bytes
) -> None:
    earlier = run(pipeline, latents, tmp_path, steps=2)
    known = (earlier / "run.json").read_bytes()
    (earlier / "run.json").write_bytes(content)
    message = r"run\.json: is damaged \(.*\); the command that made the run writes it again$"
    with pytest.raises(UserError, match=message):
        run(pipeline, latents, tmp_path, steps=3, resume=earlier)
    with pytest.raises(UserError, match=message):
        export(earlier, tmp_path / "exported")
    run(pipeline, latents, tmp_path, steps=2)
    assert (earlier / "run.json").read_bytes() == known


def scheduler_of(pipeline: Path, **changes: object) -> None:
    path = pipeline / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_noise_schedule_makes_another_run(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(pipeline, other)
    earlier = run(other, latents, tmp_path, steps=2)
    scheduler_of(other, beta_end=0.02)
    with pytest.raises(UserError, match=r"trained otherwise \(another noise schedule\)"):
        run(other, latents, tmp_path, resume=earlier, steps=2)
    assert run(other, latents, tmp_path, steps=2) != earlier


def test_latents_scaled_otherwise_make_another_run(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    """Their bytes are the same: the cache holds them unscaled."""
    other, encoded = tmp_path / "other", tmp_path / "latents"
    shutil.copytree(pipeline, other)
    shutil.copytree(latents, encoded)
    earlier = run(other, encoded, tmp_path, steps=2)
    for file in (other / "vae" / "config.json", encoded / "manifest.json"):
        told = json.loads(file.read_text())
        told.get("config", told)["scaling_factor"] *= 2
        file.write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"trained otherwise \(another scaling of the latents\)"):
        run(other, encoded, tmp_path, resume=earlier, steps=2)
    assert run(other, encoded, tmp_path, steps=2) != earlier


def test_how_often_to_look_is_no_other_run(pipeline: Path, latents: Path, tmp_path: Path) -> None:
    earlier = run(pipeline, latents, tmp_path, steps=2)
    looked = {"validate_every": 1, "max_skipped": 3, "log_every": 1, "checkpoint_every": 1}
    assert run(pipeline, latents, tmp_path, steps=2, **looked) == earlier


def test_a_sampler_that_cannot_draw_the_sheets_is_refused_before_the_first_step(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    config = Train.model_validate({**HALF, "noise": {"prediction": "flow_prediction"}})
    paths = (latents, tmp_path / "model", tmp_path / "runs")
    with pytest.raises(UserError, match=r"evaluate\.sampling: cannot draw .*train\.sample_every"):
        train(config, Pretrained(pipeline=str(pipeline)), *paths, sampling=Sampling(sampler="lms"))
    assert not list(tmp_path.glob("runs/*/step-*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "sample"}, r"train\.init: .* predicts 'sample'; give one that"),
        ({"beta_schedule": "sigmoid"}, "scheduler: sigmoid is not known here"),
        ({"trained_betas": [0.1] * 1000}, "scheduler: trained_betas is not known here"),
        ({"beta_schedule": "bent"}, "other: scheduler: bent is not implemented"),
    ],
)
def test_a_noise_schedule_that_is_not_known_is_refused_before_the_first_step(
    pipeline: Path, latents: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(pipeline, other)
    scheduler_of(other, **change)
    with pytest.raises(UserError, match=message):
        run(other, latents, tmp_path)


def test_a_folder_that_is_no_run(pipeline: Path, latents: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run \(has no run\.json\); name a folder of runs/$"):
        run(pipeline, latents, tmp_path, resume=tmp_path / "runs" / "nothing")
    earlier = run(pipeline, latents, tmp_path, steps=2)
    with pytest.raises(UserError, match=rf"is no run .*; name its run, {earlier}$"):
        run(pipeline, latents, tmp_path, resume=earlier / "step-00000002")


def test_an_unfinished_run_of_other_settings_is_mentioned(
    pipeline: Path, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = run(pipeline, latents, tmp_path)
    assert "--resume" not in capsys.readouterr().out
    stopped_at(earlier, 6)
    run(pipeline, latents, tmp_path, learning_rate=1e-3)
    said = capsys.readouterr().out
    assert f"--resume {earlier} --changed" in said
    assert "train.learning_rate 0.0004 -> 0.001" in said


def test_a_finished_run_with_fewer_steps_is_mentioned(
    pipeline: Path, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(pipeline, latents, tmp_path, steps=6)
    earlier = run(pipeline, latents, tmp_path, steps=3)
    assert "--resume" not in capsys.readouterr().out
    run(pipeline, latents, tmp_path, steps=7)
    said = capsys.readouterr().out
    assert f"(train.steps 3 -> 7); `ldm train --resume {earlier} --changed` goes on" in said
