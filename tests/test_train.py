"""The trainer as it is used: launched, killed, launched again."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from ldm.artifacts import opening
from ldm.cache import LatentCache
from ldm.config import Encode, Pretrained, Sampling, Train
from ldm.encode.stage import encode
from ldm.errors import UserError
from ldm.models import Source
from ldm.report.stage import read_curves
from ldm.run_log import metrics_of
from ldm.sampling import Painter, Request
from ldm.train.objective import Objective
from ldm.train.stage import train
from ldm.train.validation import by_band
from tests.encoding import Project, in_shards, picture, write_images
from tests.launched import SHORT, launch, wait_for


def run_here(
    pipeline: Path, latents: Path, folder: Path, network: str = "ldm", **settings: object
) -> Path:
    config = Train.model_validate({**SHORT, "mixed_precision": "no", **settings})
    pretrained = Pretrained.model_validate({"pipeline": str(pipeline), "network": network})
    train(config, pretrained, latents, folder / "model", folder / "runs")
    return folder / "model"


def read_log(model: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (model / "log.jsonl").read_text().splitlines()]


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "unet" / "diffusion_pytorch_model.safetensors")


def test_it_learns_and_writes_a_pipeline(pipeline: Path, latents: Path, tmp_path: Path) -> None:
    model = run_here(pipeline, latents, tmp_path, steps=60, learning_rate=3e-3, ema_decay=0.9)
    log = read_log(model)
    val = [line["val_loss"] for line in log if "val_loss" in line]
    assert val[-1] < 0.9 * val[0]
    assert opening(model, "model", "train").counts == {"steps": 60, "samples": 480}
    loaded = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    assert loaded.scheduler.config.prediction_type == "v_prediction"


def text_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "text_encoder" / "model.safetensors")


def test_the_text_encoder_is_trained_if_asked(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    before = text_weights(pipeline)
    frozen = run_here(pipeline, latents, tmp_path / "frozen")
    trained = run_here(pipeline, latents, tmp_path / "trained", text_learning_rate=1e-3)
    for name, tensor in before.items():
        assert torch.equal(text_weights(frozen)[name], tensor)
    moved = {name for name, one in text_weights(trained).items() if not one.equal(before[name])}
    assert moved == set(before)


def test_texts_encoded_in_training_are_those_of_the_cache(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    cached = weights(run_here(pipeline, latents, tmp_path / "cached"))
    online = weights(run_here(pipeline, latents, tmp_path / "online", text_learning_rate=1e-12))
    for name, tensor in cached.items():
        torch.testing.assert_close(online[name], tensor, rtol=1e-3, atol=2e-4)


def test_a_start_that_reads_other_texts_is_refused(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    other = run_here(pipeline, latents, tmp_path / "other", text_learning_rate=1e-3)
    with pytest.raises(UserError, match=r"has another text encoder than .*latents was"):
        run_here(pipeline, latents, tmp_path / "next", init=str(other))


def test_a_start_that_is_a_training_is_refused(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    run_here(pipeline, latents, tmp_path / "other", steps=2)
    (checkpoint,) = tmp_path.glob("other/runs/*/step-00000002")
    for start in (checkpoint, checkpoint.parent):
        with pytest.raises(UserError, match=f"`ldm export {start}` makes a model of it"):
            run_here(pipeline, latents, tmp_path / "next", init=str(start))


@pytest.mark.parametrize("settings", [{}, {"text_learning_rate": 1e-3}])
def test_a_checkpoint_draws_what_the_finished_model_draws(
    pipeline: Path, latents: Path, tmp_path: Path, settings: dict[str, float]
) -> None:
    model = run_here(pipeline, latents, tmp_path, **settings)
    (checkpoint,) = tmp_path.glob("runs/*/step-00000012")
    drawn = [
        list(Painter.load(Source(str(folder))).draw([Request("a red star", 1)], Sampling(steps=3)))
        for folder in (model, checkpoint)
    ]
    assert np.array_equal(drawn[0], drawn[1])
    (checkpoint / "ema.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"ema.safetensors is missing or altered"):
        Painter.load(Source(str(checkpoint)))
    shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match=r"state.json is missing or altered.*give another che"):
        Painter.load(Source(str(checkpoint)))
    with pytest.raises(UserError, match=r"is the run of a training; name one of its step-N"):
        Painter.load(Source(str(checkpoint.parent)))


def test_accumulation_and_batch_give_the_same_step(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    whole = weights(run_here(pipeline, latents, tmp_path / "a"))
    parts = weights(run_here(pipeline, latents, tmp_path / "b", accumulation=4))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-3, atol=2e-4)


def change_json(path: Path, key: str, value: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def other_vae(pipeline: Path) -> None:
    path = pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    changed = load_file(path)
    changed["encoder.conv_out.bias"] += 1
    save_file(changed, path)


def other_text_encoder(pipeline: Path) -> None:
    path = pipeline / "text_encoder" / "model.safetensors"
    changed = {name: 2 * weight for name, weight in load_file(path).items()}
    save_file(changed, path, metadata={"format": "pt"})


def other_tokenizer(pipeline: Path) -> None:
    path = pipeline / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    (first, a), (second, b) = list(content["model"]["vocab"].items())[-2:]
    content["model"]["vocab"] |= {first: b, second: a}
    path.write_text(json.dumps(content))


def other_scale(pipeline: Path) -> None:
    change_json(pipeline / "vae" / "config.json", "scaling_factor", 0.25)


def other_shift(pipeline: Path) -> None:
    change_json(pipeline / "vae" / "config.json", "shift_factor", 0.125)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_vae, "latents: was encoded with another vae than that of .*other"),
        (other_text_encoder, "was encoded with another text_encoder than"),
        (other_tokenizer, "was encoded with another tokenizer than"),
        (other_scale, r"has scaling_factor 0\.\d+, the vae of .*other has 0\.25"),
        (other_shift, r"has shift_factor 0, the vae of .*other has 0\.125"),
    ],
)
def test_stale_latents_are_refused(
    pipeline: Path, latents: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(pipeline, other)
    change(other)
    with pytest.raises(UserError, match=f"{message}.*; run `ldm encode` again"):
        run_here(other, latents, tmp_path)


def test_latents_computed_in_bfloat16_are_of_the_same_encoders(
    pipeline: Path, images: Path, tmp_path: Path
) -> None:
    config, out = Encode(compute="bfloat16"), tmp_path / "latents"
    encode(config, Pretrained(pipeline=str(pipeline)), images, out, tmp_path / "runs")
    assert run_here(pipeline, out, tmp_path, steps=2).is_dir()


def spoil(monkeypatch: pytest.MonkeyPatch, spoilt: Callable[[LatentCache, int], bool]) -> None:
    """Latents of samples that are spoilt come out as NaN."""
    whole = LatentCache.latents

    def latents(cache: LatentCache, samples: Sequence[int], *others: Any) -> np.ndarray:
        drawn = whole(cache, samples, *others)
        drawn[[spoilt(cache, sample) for sample in samples]] = np.nan
        return drawn

    monkeypatch.setattr(LatentCache, "latents", latents)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_without_a_finite_gradient_changes_nothing(
    pipeline: Path,
    latents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    accumulation: int,
) -> None:
    spoil(
        monkeypatch, lambda cache, sample: (cache.split, cache.key(sample)) == ("train", "00000007")
    )
    model = run_here(pipeline, latents, tmp_path, accumulation=accumulation, log_every=1)
    assert all(tensor.isfinite().all() for tensor in weights(model).values())
    log = read_log(model)
    skipped = {line["step"]: line["skipped"] for line in log if "skipped" in line}
    # Twelve steps of 8 show each of the 48 samples twice.
    assert len(skipped) == 2 and set(map(tuple, skipped.values())) == {("00000007",)}
    assert {line["step"] for line in log if "loss" in line} == set(range(1, 13)) - set(skipped)
    (newest,) = tmp_path.glob("runs/*/step-00000012")
    optimizer = load_file(newest / "optimizer.safetensors")
    assert {int(one) for name, one in optimizer.items() if name.endswith(".step")} == {10}


def endless_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The loss of one step is infinite, with the gradient that it would have anyway."""
    whole, calls = Objective.loss, []

    def infinite(*arguments: Any) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return whole(*arguments) + (math.inf if sum(calls) == step and calls[-1] else 0.0)

    monkeypatch.setattr(Objective, "loss", infinite)


def assert_fourth_skipped(model: Path, folder: Path) -> None:
    """Of a training's twelve steps the fourth was, and no other."""
    (skipped,) = (line for line in read_log(model) if "skipped" in line)
    assert skipped["step"] == 4 and len(skipped["skipped"]) == 8
    (newest,) = folder.glob("runs/*/step-00000012")
    optimizer = load_file(newest / "optimizer.safetensors")
    assert {int(one) for name, one in optimizer.items() if name.endswith(".step")} == {11}


def test_a_step_without_a_finite_loss_is_skipped_whatever_its_gradient(
    pipeline: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless_at(monkeypatch, 4)
    model = run_here(pipeline, latents, tmp_path, log_every=1)
    assert_fourth_skipped(model, tmp_path)


def test_the_average_takes_in_all_steps_before_a_last_one_that_is_skipped(
    pipeline: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of no memory is then the weights; of the skipped step there is nothing to take in."""
    endless_at(monkeypatch, 12)
    run_here(pipeline, latents, tmp_path, ema_decay=0.0)
    (newest,) = tmp_path.glob("runs/*/step-00000012")
    present, average = (load_file(newest / f"{one}.safetensors") for one in ("weights", "ema"))
    assert all(torch.equal(average[name], one) for name, one in present.items())
    assert all(one.isfinite().all() for one in average.values())


def test_what_was_trained_is_kept_where_validation_is_not_finite(
    pipeline: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda cache, _: cache.split == "validation")
    with pytest.raises(UserError, match="the validation loss is not finite, of the averaged"):
        run_here(pipeline, latents, tmp_path)
    assert list(tmp_path.glob("runs/*/step-00000006/state.json"))


def test_a_training_without_finite_gradients_stops(
    pipeline: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda cache, _: cache.split == "train")
    with pytest.raises(UserError, match=r"step 4: no finite loss .* 4 steps in a row"):
        run_here(pipeline, latents, tmp_path, max_skipped=3)
    assert not (tmp_path / "model").exists()


def test_validation_is_the_same_whatever_the_batch_size(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    found = []
    for size in (8, 24):
        model = run_here(
            pipeline, latents, tmp_path / str(size), batch_size=size, learning_rate=1e-12, steps=1
        )
        found.append(read_log(model)[-1])
    assert found[0]["val_loss"] == pytest.approx(found[1]["val_loss"], rel=1e-5)
    assert found[0]["val_loss_bands"] == pytest.approx(found[1]["val_loss_bands"], rel=1e-5)
    # Each sample is seen once in every band.
    assert np.mean(found[0]["val_loss_bands"]) == pytest.approx(found[0]["val_loss"])


def test_a_band_without_a_sample_has_no_loss() -> None:
    losses, timesteps = torch.tensor([1.0, 2, 6, 5]), torch.tensor([0, 249, 250, 999])
    found = by_band(losses, timesteps, 1000)
    assert found == [1.5, 6.0, None, 5.0]
    assert metrics_of({"step": 6, "skipped": ["00000007"]}) == {"skipped": 1.0}
    line = {"step": 6, "val_loss": 3.5, "val_loss_bands": found}
    assert metrics_of(line) == {
        "val_loss": 3.5, "val_loss_band_0": 1.5, "val_loss_band_1": 6.0, "val_loss_band_3": 5.0
    }  # fmt: skip


def no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def test_validation_on_one_sample_leaves_a_log_that_is_json(pipeline: Path, tmp_path: Path) -> None:
    project = Project(tmp_path, pipeline)
    write_images(project.images, in_shards({"00000000": (picture(0), "a star")}, 1))
    project.encode()
    model = run_here(pipeline, project.out, tmp_path, steps=2, batch_size=1)
    lines = (model / "log.jsonl").read_text().splitlines()
    (last,) = [json.loads(line, parse_constant=no_constant) for line in lines if "bands" in line]
    assert np.mean(last["val_loss_bands"]) == pytest.approx(last["val_loss"])
    assert read_curves(model / "log.jsonl").validated == [(2, last["val_loss"])]
    assert len(metrics_of(last)) == 5


@pytest.mark.slow
def test_sigterm_saves_and_leaves_and_the_same_command_goes_on(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    settings = {"steps": 120, "checkpoint_every": 1000, "validate_every": 1000, "workers": 1}
    process = launch(pipeline, latents, tmp_path / "stopped", **settings)
    logs = partial(tmp_path.glob, "stopped/runs/*/log.jsonl")
    wait_for(lambda: any('"step": 10' in log.read_text() for log in logs()), process)
    asked = time.monotonic()
    process.terminate()
    assert process.wait() == 143
    assert time.monotonic() - asked < 30
    (saved,) = tmp_path.glob("stopped/runs/*/step-*")
    assert 10 <= int(saved.name.removeprefix("step-")) < 120
    names = "stopped", "straight"
    started = [launch(pipeline, latents, tmp_path / name, **settings) for name in names]
    assert [process.wait() for process in started] == [0, 0]
    stopped, straight = (opening(tmp_path / name / "model", "model", "train") for name in names)
    assert stopped.files == straight.files


@pytest.mark.slow
def test_killed_and_launched_again_it_ends_in_the_same_bytes(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    process = launch(pipeline, latents, tmp_path / "killed")
    wait_for(lambda: list(tmp_path.glob("killed/runs/*/step-00000010")), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model").exists()
    names = "straight", "killed"
    started = [launch(pipeline, latents, tmp_path / name) for name in names]
    assert [process.wait() for process in started] == [0, 0]
    straight, killed = (opening(tmp_path / name / "model", "model", "train") for name in names)
    assert straight.files == killed.files
