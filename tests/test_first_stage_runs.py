"""``ldm first-stage`` as it is used: stopped, killed, started again."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

import ldm.first_stage.loop
from ldm.artifacts import making, opening
from ldm.checkpoint import folders, newest
from ldm.config import ClipTraining, FirstStage, LayoutTraining, VaeTraining
from ldm.errors import UserError
from ldm.first_stage.clip import train_clip
from ldm.first_stage.layout import train_layout
from ldm.first_stage.loop import Run
from ldm.first_stage.stage import first_stage
from ldm.first_stage.vae import reconstruct, train_vae
from ldm.images import decode_image, psnr
from ldm.learning_rate import rate_factor
from ldm.run_log import entries, metrics_of
from ldm.scenes.lists import caption_of
from tests.conftest import Pixels, scenes
from tests.launched import ROOT, wait_for

CPU = torch.device("cpu")
SHORT = {"steps": 10, "warmup_steps": 2, "batch_size": 4, "compute": "float32"}
VAE = {
    **SHORT, "widths": (8, 8, 8, 8), "norm_groups": 4, "kl_weight": 0.1,
    "adversarial_from": 4, "discriminator_widths": (8, 16),
}  # fmt: skip
CLIP = {**SHORT, "width": 16, "layers": 1, "heads": 2, "patch_size": 16, "rearranged": 2}
# The pool of 60 is seven batches: the last steps are of another.
LAYOUT = {**SHORT, "heads": 2, "batch_size": 9}
COUNT = 60
CAPTIONS = [caption_of("retrain", "train", row) for row in range(COUNT)]


def vae(run: Run, pipeline: Path) -> torch.nn.Module:
    config, training = VaeTraining.model_validate(VAE), Pixels(scenes("train", COUNT))
    return train_vae(config, training, Pixels(scenes("validation", 6)), CPU, run)


def clip(run: Run, pipeline: Path) -> torch.nn.Module:
    pictures = scenes("train", COUNT)
    tokenizer = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    config = ClipTraining.model_validate(CLIP)
    return train_clip(config, tokenizer, lambda chosen: pictures[chosen], CAPTIONS, 64, CPU, run)


def layout(run: Run, pipeline: Path) -> torch.nn.Module:
    tokenizer = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(pipeline / "text_encoder", dtype=torch.float32)
    latents = torch.randn(COUNT, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    config = LayoutTraining.model_validate(LAYOUT)
    train_layout(config, text_encoder, tokenizer, latents, CAPTIONS, CPU, run)
    return text_encoder


PARTS = (vae, clip, layout)
Part = Callable[[Run, Path], torch.nn.Module]


class Killed(BaseException):
    """Nothing of the program runs after it."""


def kill_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """A training that comes to that step, counted from 0, ends there."""

    def rate(at: int, **schedule: int) -> float:
        if at == step:
            raise Killed
        return rate_factor(at, **schedule)

    patch.setattr(ldm.first_stage.loop, "rate_factor", rate)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_a_part_that_is_killed_in_its_steps_ends_in_the_same_state(
    pipeline: Path, tmp_path: Path, part: Part
) -> None:
    whole, broken = (Run(tmp_path / name, checkpoint_every=3, log_every=1) for name in "ab")
    results = [part(whole, pipeline)]
    saved = []
    for step in (2, 4, 5, 7, 9):
        with pytest.MonkeyPatch.context() as patch:
            kill_at(step, patch)
            with pytest.raises(Killed):
                part(broken, pipeline)
        found = newest(broken.folder / part.__name__)
        saved.append(found.step if found else 0)
    assert saved == [0, 3, 3, 6, 9]
    results.append(part(broken, pipeline))
    states = [result.state_dict() for result in results]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    folders = [run.folder / part.__name__ for run in (whole, broken)]
    files = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
        for folder in folders
    ]
    names = ("weights.safetensors", "optimizer.safetensors", "random.safetensors", "state.json")
    wanted = {Path("log.jsonl"), *(Path(f"step-{n:08d}", one) for n in (9, 10) for one in names)}
    assert files[0].keys() == wanted
    assert files[0] == files[1]


def test_what_is_finished_is_not_trained_again(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, checkpoint_every=3, log_every=1)
    once = vae(run, pipeline)
    monkeypatch.delattr(ldm.first_stage.loop, "rate_factor")
    again = vae(run, pipeline)
    assert again.config.scaling_factor == once.config.scaling_factor
    assert all(
        torch.equal(again.state_dict()[name], one) for name, one in once.state_dict().items()
    )


def layout_on(latents: torch.Tensor, run: Run, pipeline: Path) -> CLIPTextModel:
    config = LayoutTraining.model_validate({**LAYOUT, "batch_size": COUNT // 5})
    tokenizer = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(pipeline / "text_encoder", dtype=torch.float32)
    train_layout(config, text_encoder, tokenizer, latents, CAPTIONS, CPU, run)
    return text_encoder


def test_a_step_whose_gradient_is_not_finite_changes_nothing(
    pipeline: Path, tmp_path: Path
) -> None:
    """Five batches are all captions: one of five steps meets the bad latents."""
    latents = torch.zeros(COUNT, 4, 8, 8)
    latents[7] = torch.nan
    text_encoder = layout_on(latents, Run(tmp_path, checkpoint_every=1, log_every=1), pipeline)
    log = [json.loads(line) for line in (tmp_path / "layout/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [*range(1, 11)]
    assert sum("skipped" in line for line in log) == sum("loss" not in line for line in log) == 2
    assert all(metrics_of(line) for line in log)
    suspects = [line["samples"] for line in log if "skipped" in line]
    assert all(7 in samples and len(samples) == COUNT // 5 for samples in suspects)
    found = newest(tmp_path / "layout")
    assert all(one.isfinite().all() for one in text_encoder.state_dict().values())
    assert found is not None and all(one.isfinite().all() for one in found.weights.values())


def test_too_many_steps_in_a_row_that_are_not_finite_end_a_training(
    pipeline: Path, tmp_path: Path
) -> None:
    latents, run = torch.full((COUNT, 4, 8, 8), torch.nan), Run(tmp_path, 1, 1, max_skipped=3)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(2, patch)
        with pytest.raises(Killed):
            layout_on(latents, run, pipeline)
    with pytest.raises(UserError, match=r"layout: no finite loss or gradient for 4 steps in a row"):
        layout_on(latents, run, pipeline)
    assert steps_in(tmp_path / "layout") == [1, 2, 3, 4]


@pytest.mark.parametrize("part", [vae, clip], ids=lambda part: part.__name__)
def test_the_samples_of_a_skipped_step_are_named(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: Part
) -> None:
    """Those that the step chose: as many as a batch, and others in every step."""
    clipped = torch.nn.utils.clip_grad_norm_

    def never(*arguments: Any) -> torch.Tensor:
        return torch.tensor(torch.nan) * clipped(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", never)
    keys = [f"key{number}" for number in range(COUNT)]
    part(Run(tmp_path, checkpoint_every=99, log_every=1, keys=keys), pipeline)
    log = entries(tmp_path / part.__name__ / "log.jsonl")
    named = [line["samples"] for line in log if "samples" in line]
    rng = np.random.default_rng(0)
    assert len(named) == 10
    assert named[0] == [keys[number] for number in rng.integers(COUNT, size=4)]
    assert named[0] != named[1]


def steps_in(folder: Path) -> list[int]:
    """Of the lines of a log."""
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def trained_vae(run: Run, held_out: Pixels | None = None, **settings: object) -> AutoencoderKL:
    config = VaeTraining.model_validate({**VAE, **settings})
    measured = held_out or Pixels(scenes("validation", 66))
    return train_vae(config, Pixels(scenes("train", COUNT)), measured, CPU, run)


def test_held_out_pictures_are_measured_on_the_way_and_the_best_checkpoint_stays(
    tmp_path: Path,
) -> None:
    settings = {"learning_rate": 0.003, "adversarial_from": None, "steps": 9}
    run = Run(tmp_path / "measured", checkpoint_every=4, log_every=20, validate_every=1)
    # What it learns of scenes makes it worse at noise.
    pixels = np.random.default_rng(0).integers(0, 256, (66, 64, 64, 3), dtype=np.uint8)
    vae = trained_vae(run, Pixels(pixels), **settings)
    log = (run.folder / "vae/log.jsonl").read_text().splitlines()
    losses = {line["step"]: line["val_loss"] for line in map(json.loads, log) if "val_loss" in line}
    assert list(losses) == [*range(1, 10)]
    best = min(losses, key=losses.__getitem__)
    assert best < 8, "so that the newest two are others"
    kept = [int(folder.name.removeprefix("step-")) for folder in folders(run.folder / "vae")]
    assert kept == [best, 8, 9]
    each = psnr(pixels, reconstruct(vae, pixels, CPU))
    last = json.loads(log[-1])
    assert last["val_psnr_db"] == round(each.mean(), 2)
    assert last["val_loss"] == pytest.approx((4 * 10 ** (-each / 10)).mean(), rel=1e-4)
    unseen = trained_vae(Run(tmp_path / "unseen", checkpoint_every=4, log_every=20), **settings)
    assert all(torch.equal(unseen.state_dict()[key], one) for key, one in vae.state_dict().items())


class Asking(Pixels):
    """A SIGTERM comes while they are read for the second time."""

    reads = 0

    def pictures(self, numbers: np.ndarray) -> np.ndarray:
        self.reads += 1
        if self.reads == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().pictures(numbers)


def test_a_stop_breaks_a_measurement_off_and_the_next_start_makes_it(tmp_path: Path) -> None:
    whole, stopped = (
        Run(tmp_path / name, checkpoint_every=4, log_every=1, validate_every=5, sheet_every=5)
        for name in ("whole", "stopped")
    )
    trained_vae(whole)
    with pytest.raises(SystemExit, match="143"):
        # More than two batches: the third is not read.
        trained_vae(stopped, asking := Asking(scenes("validation", 130)))
    assert asking.reads == 2 and steps_in(stopped.folder / "vae") == [*range(1, 6)]
    assert not list(stopped.folder.glob("vae/*.png"))
    trained_vae(stopped)
    names = ("log.jsonl", "step-00000010/state.json", "step-00000010/weights.safetensors")
    for name in (*names, "reconstructions-00000005.png"):
        files = [run.folder / "vae" / name for run in (whole, stopped)]
        assert files[0].read_bytes() == files[1].read_bytes()


def settings(pipeline: Path, steps: int = 10) -> dict[str, object]:
    every = {"log_every": 1, "checkpoint_every": 4, "sheet_every": 4, "track": False}
    parts = {"vae": {**VAE, "perceptual": str(pipeline / "clip")}, "clip": CLIP, "layout": LAYOUT}
    return {**{name: {**part, "steps": steps} for name, part in parts.items()}, **every}


def test_the_stage_writes_parts_figures_and_a_sheet(
    pipeline: Path, images: Path, tmp_path: Path
) -> None:
    out, runs = tmp_path / "first-stage", tmp_path / "runs"
    config = FirstStage.model_validate(settings(pipeline))
    first_stage(config, images, out, runs)
    made = opening(out, "first-stage", "first-stage")
    assert made.counts == {"train": 48} and set(made.inputs) == {"images", "perceptual"}
    assert {"log_every", "checkpoint_every", "sheet_every", "track"}.isdisjoint(made.config)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [*range(1, 11), *([10] + [*range(1, 11)] * 2)]
    measurement = log.pop(10)
    assert set(measurement) == {"part", "step", "val_loss", "val_psnr_db"}
    assert {line["part"] for line in log} == {"vae", "clip", "layout"}
    every = {"part", "step", "lr", "loss", "gradient_norm"}
    alone = every | {"psnr_db", "kl", "perceptual"}
    playing = {"adversarial", "adaptive_weight", "discriminator", "discriminator_gradient_norm"}
    assert set(log[3]) == alone
    assert set(log[4]) == alone | playing
    assert set(log[10]) == set(log[20]) == every
    assert all(line["gradient_norm"] > 0 for line in log)
    sheet = decode_image((out / "reconstructions.png").read_bytes())
    assert sheet.shape == (128, 8 * 64, 3)
    assert np.array_equal(sheet[:64], np.concatenate(list(scenes("validation", 8)), axis=1))
    assert not np.array_equal(sheet[64:], sheet[:64])
    shown = [decode_image(path.read_bytes()) for path in sorted(runs.glob("*/vae/*.png"))]
    assert len(shown) == 2 and all(np.array_equal(one[:64], sheet[:64]) for one in shown)
    assert not np.array_equal(shown[0], shown[1])
    measured = json.loads((out / "measured.json").read_text())
    assert set(measured) == {"vae_psnr_db", "clip_retrieval", "clip_order", "text_order"}
    assert measured["vae_psnr_db"] == measurement["val_psnr_db"]
    other = {"checkpoint_every": 7, "sheet_every": None}
    first_stage(config.model_copy(update=other), images, out, runs)
    assert opening(out, "first-stage", "first-stage").files == made.files
    assert len(list(runs.iterdir())) == 1
    first_stage(config.model_copy(update=other), images, tmp_path / "unseen", tmp_path / "others")
    assert opening(tmp_path / "unseen", "first-stage", "first-stage").files == made.files


def test_more_steps_go_on_from_a_run(pipeline: Path, images: Path, tmp_path: Path) -> None:
    """Under a schedule of their own; what has all its steps stays as it is."""
    runs = tmp_path / "runs"

    def trained(steps: int, resume: Path | None = None, *, changed: bool = False) -> Path:
        asked = settings(pipeline)
        config = FirstStage.model_validate({**asked, "vae": {**asked["vae"], "steps": steps}})
        how = {"resume": resume, "changed": changed}
        before = set(runs.glob("*"))
        first_stage(config, images, tmp_path / f"out{steps}", runs, **how)
        return next(iter(set(runs.glob("*")) - before), resume or runs)

    earlier = trained(10)
    assert trained(10, earlier) == earlier
    with pytest.raises(UserError, match=r"trained otherwise \(first_stage\.vae\.steps 10 -> 14\)"):
        trained(14, earlier)
    with pytest.raises(UserError, match=r"vae: has taken 10 steps; raise first_stage\.vae\.steps"):
        trained(9, earlier, changed=True)
    later = trained(14, earlier, changed=True)
    steps = {part: steps_in(later / part) for part in ("vae", "clip", "layout")}
    # It learns from the VAE's latents.
    assert steps == {"vae": [11, 12, 13, 14, 14], "clip": [], "layout": [*range(1, 11)]}
    with pytest.raises(UserError, match="began from another run and has not all checkpoints"):
        trained(14, later)
    start, end = (newest(run / "vae") for run in (earlier, later))
    moments = [one.optimizer["vae.0.step"].item() for one in (start, end)]
    assert moments == [10, 14]
    made = [tmp_path / f"out{steps}" / "clip" / "model.safetensors" for steps in (10, 14)]
    assert made[0].read_bytes() == made[1].read_bytes()
    wider = FirstStage.model_validate(settings(pipeline) | {"clip": {**CLIP, "width": 32}})
    with pytest.raises(UserError, match=r"another network \(first_stage\.clip\.width 16\)"):
        first_stage(wider, images, tmp_path / "wider", runs, resume=earlier, changed=True)
    about = json.loads((earlier / "run.json").read_text())
    about["inputs"]["images"] = "others"
    (earlier / "run.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="learned its words from other captions"):
        trained(20, earlier, changed=True)


def test_patches_larger_than_pictures_are_refused_before_the_first_step(
    pipeline: Path, images: Path, tmp_path: Path
) -> None:
    config = FirstStage.model_validate(settings(pipeline) | {"clip": {**CLIP, "patch_size": 65}})
    with pytest.raises(UserError, match=r"clip\.patch_size 65: is more than the \d+ pixels of the"):
        first_stage(config, images, tmp_path / "first-stage", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_an_output_that_another_process_makes_is_refused_before_the_first_step(
    pipeline: Path, images: Path, tmp_path: Path
) -> None:
    out, runs = tmp_path / "first-stage", tmp_path / "runs"
    config = FirstStage.model_validate(settings(pipeline))
    busy = pytest.raises(UserError, match="first-stage: another process makes it")
    with making(out, "first-stage"), busy:
        first_stage(config, images, out, runs)
    assert [path.name for path in runs.glob("*/*")] == ["lock"]


def launch(
    pipeline: Path, images: Path, folder: Path, steps: int, **others: str | bool
) -> Popen[bytes]:
    """``ldm first-stage`` in a process group of its own."""
    command = [
        sys.executable,
        "-m",
        "ldm.cli",
        "first-stage",
        "--params",
        str(ROOT / "params.yaml"),
    ]
    command += ["--images", str(images), "--out", str(folder / "out")]
    command += ["--runs", str(folder / "runs")]
    if experiment := others.pop("experiment", None):
        command += ["--set", f"registry.experiment={experiment}"]
    for key, value in {**settings(pipeline, steps), **others}.items():
        command += ["--set", f"first_stage.{key}={json.dumps(value)}"]
    return Popen(command, cwd=ROOT, start_new_session=True, stderr=PIPE)


def steps_done(folder: Path) -> int:
    return sum(log.read_text().count("\n") for log in folder.glob("runs/*/*/log.jsonl"))


def ended(process: Popen[bytes]) -> tuple[int, str]:
    """The exit code as a shell sees it, and the last line on stderr."""
    _, said = process.communicate()
    code = process.returncode
    lines = said.decode().strip().splitlines() or [""]  # Killed at once, it says nothing.
    return code if code >= 0 else 128 - code, lines[-1]


@pytest.mark.slow
@pytest.mark.kills
def test_killed_anywhere_it_ends_in_the_same_bytes(
    pipeline: Path, images: Path, tmp_path: Path
) -> None:
    steps = 40
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert ended(launch(pipeline, images, whole, steps))[0] == 0
    rng = random.Random(0)
    ways = {signal.SIGKILL: 137, signal.SIGTERM: 143, signal.SIGINT: 130}
    for number, way in enumerate([*ways, signal.SIGKILL, signal.SIGKILL]):
        process = launch(pipeline, images, broken, steps)
        wanted = 3 * steps * (number + 1) // 7 + rng.randrange(10)
        wait_for(lambda wanted=wanted: steps_done(broken) >= wanted, process)
        time.sleep(rng.uniform(0, 0.1))
        if number == 1:
            process.send_signal(signal.SIGSTOP)
            code, said = ended(launch(pipeline, images, broken, steps))
            assert code == 1 and "another process trains it" in said
            process.send_signal(signal.SIGCONT)
        process.send_signal(way)
        assert ended(process)[0] == ways[way]
        assert not (broken / "out").exists()
    assert ended(launch(pipeline, images, broken, steps))[0] == 0
    made, again = (opening(one / "out", "first-stage", "first-stage") for one in (whole, broken))
    assert made.files == again.files
