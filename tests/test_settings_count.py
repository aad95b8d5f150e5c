"""Every setting of a training counts: the same training with another value leaves something else.

:data:`CASES` has what each changes, and nothing else does; what this way does not show is named in
:data:`ELSEWHERE`, with the test that does. A setting that is in neither fails here.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import tqdm

import ldm.launch
import ldm.train.stage
from ldm.artifacts import digest_file
from ldm.checkpoint import folders
from ldm.config import Params, Section, Train
from ldm.models import Source
from ldm.noise_schedule import load_schedule
from ldm.runs import folder_of
from ldm.train.data import Batch, TrainingBatches
from ldm.train.settings import settings_of_result
from ldm.train.stage import settled_training
from ldm.train.trainer import Trainer
from tests import test_kills, test_lora, test_memory, test_options, test_text_lora, test_train
from tests.test_train import read_log, run_here

pytestmark = pytest.mark.usefixtures("any_precision")
BASE: dict[str, Any] = {"steps": 4, "warmup_steps": 1, "learning_rate": 1e-2, "batch_size": 8}
BASE |= {"log_every": 2, "validate_every": 4, "checkpoint_every": 4, "keep_checkpoints": 9}
BASE |= {"sample_every": None}
SMALL = {"widths": (8, 16), "head_width": 8, "norm_groups": 4}
RANDOM = {"init": "random", "unet": SMALL}
DRAWN = {"sample_every": 4, "sample_prompts": ["a red star"]}

LEARNT = {"weights", "average", "optimizer", "losses", "validated"}
LENGTH = LEARNT | {"lines", "checkpoints"}
CASES: dict[str, tuple[dict[str, Any], Any, set[str]]] = {
    "unet.widths": (RANDOM, (16, 16), LEARNT),
    "unet.layers_per_block": (RANDOM, 2, LEARNT),
    "unet.head_width": (RANDOM, 4, LEARNT),
    "unet.norm_groups": (RANDOM, 2, LEARNT),
    "noise.beta_schedule": (RANDOM, "linear", LEARNT),
    "noise.prediction": (RANDOM | {"snr_floor": 0.0}, "epsilon", LEARNT),
    "noise.zero_terminal_snr": (RANDOM, True, LEARNT),
    "noise.train_timesteps": (RANDOM, 100, LEARNT),
    "steps": ({}, 6, LENGTH),
    "batch_size": ({}, 4, LEARNT),
    "optimizer": ({}, "prodigy", LEARNT),
    "schedule": ({}, "constant", LEARNT),
    "learning_rate": ({}, 2e-2, LEARNT),
    "text_learning_rate": ({}, 1e-2, LEARNT | {"text encoder"}),
    "warmup_steps": ({}, 3, LEARNT),
    "weight_decay": ({}, 0.9, LEARNT),
    "max_grad_norm": ({}, 1e-7, LEARNT),
    "ema_decay": ({}, 0.1, {"average", "validated"}),
    "min_snr_gamma": ({}, 0.6, LEARNT),
    "snr_floor": ({}, 0.0, LEARNT),
    "timestep_shift": ({}, 3.0, LEARNT),
    "offset_noise": ({}, 0.5, LEARNT),
    "caption_dropout": ({}, 1.0, LEARNT),
    "mixed_precision": ({}, "bf16", LEARNT),
    "seed": ({}, 1, LEARNT),
    "log_every": ({}, 1, {"losses", "lines"}),
    "validate_every": ({}, 2, {"validated", "lines", "checkpoints"}),
    "checkpoint_every": ({}, 1, {"checkpoints"}),
    "sample_every": (DRAWN, 2, {"sheets"}),
    "sample_prompts": (DRAWN, ["two blue stars"], {"sheets"}),
    "keep_checkpoints": ({"checkpoint_every": 1}, 2, {"checkpoints"}),
}
"""By setting: what else is set, its other value, and what of :func:`left_by` that changes."""


def left_by(folder: Path) -> dict[str, Any]:
    """What a training leaves, by part; files by their digests."""
    (run,) = (folder / "runs").iterdir()
    log, last = read_log(folder / "model"), folders(run)[-1]
    kept = {"weights": "weights", "average": "ema", "optimizer": "optimizer"}
    sheets = {path.name: digest_file(path) for path in run.glob("samples-*.png")}
    return {part: digest_file(last / f"{name}.safetensors") for part, name in kept.items()} | {
        "text encoder": digest_file(folder / "model" / "text_encoder" / "model.safetensors"),
        "losses": [line["loss"] for line in log if "loss" in line],
        "validated": [line["val_loss"] for line in log if "val_loss" in line],
        "lines": [(line["step"], "loss" in line) for line in log],
        "checkpoints": [one.name for one in folders(run)],
        "sheets": sheets,
    }


Left = Callable[[Mapping[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def left(pipeline: Path, latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Left:
    """What a training of these settings, besides ``BASE``, leaves; each is run once."""
    found: dict[str, dict[str, Any]] = {}

    def of(settings: Mapping[str, Any]) -> dict[str, Any]:
        key = json.dumps(settings, sort_keys=True)
        if key not in found:
            folder = tmp_path_factory.mktemp("left")
            run_here(pipeline, latents, folder, **{**BASE, **settings})
            found[key] = left_by(folder)
        return found[key]

    return of


def with_other(settings: Mapping[str, Any], name: str, value: object) -> dict[str, Any]:
    section, _, key = name.rpartition(".")
    if section:
        return {**settings, section: {**settings.get(section, {}), key: value}}
    return {**settings, name: value}


@pytest.mark.parametrize("setting", CASES)
def test_a_setting_changes_what_it_is_for_and_nothing_else(left: Left, setting: str) -> None:
    common, other, parts = CASES[setting]
    before, after = left(common), left(with_other(common, setting, other))
    assert {part for part, one in before.items() if one != after[part]} == parts


# What has no second value that a short training of its own would show


def test_workers_make_the_batches(
    pipeline: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    makers, make = tmp_path / "makers", TrainingBatches.__getitem__

    def noted(batches: TrainingBatches, micro_batch: int) -> Batch:
        with makers.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return make(batches, micro_batch)

    monkeypatch.setattr(TrainingBatches, "__getitem__", noted)
    for workers in (0, 2):
        makers.write_text("")
        run_here(pipeline, latents, tmp_path / str(workers), **{**BASE, "workers": workers})
        processes = set(makers.read_text().split())
        assert (str(os.getpid()) in processes, len(processes)) == (not workers, max(workers, 1))


@pytest.mark.parametrize(("tracked", "configuration"), [(True, "one.yaml"), (False, "two.yaml")])
def test_the_launcher_is_told_whom_to_start_and_whether_to_show_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracked: bool, configuration: str
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(ldm.launch, "_launch", lambda *arguments: asked.extend(arguments))
    train = Train(track=tracked, accelerate=configuration)
    ldm.launch.launch_training(Params(train=train), tmp_path, tmp_path, tmp_path)
    assert asked[1] == configuration and bool(asked[2].registry) is tracked


@pytest.mark.parametrize(("able", "precision"), [(True, "bf16"), (False, "no")])
def test_auto_precision_is_what_the_hardware_computes(
    monkeypatch: pytest.MonkeyPatch, able: bool, precision: str
) -> None:
    monkeypatch.setattr(ldm.train.settings, "has_bfloat16", lambda _: able)
    cpu = torch.device("cpu")
    assert settled_training(Train(mixed_precision="auto"), cpu).mixed_precision == precision
    for named in ("bf16", "no"):
        kept = settled_training(Train.model_validate({"mixed_precision": named}), cpu)
        assert kept.mixed_precision == named


ELSEWHERE: dict[str, object] = {
    "init": test_options.test_it_starts_from_a_folder,
    "lora.rank": test_lora.test_each_setting_changes_what_is_learnt,
    "lora.alpha": test_lora.test_each_setting_changes_what_is_learnt,
    "lora.targets": test_lora.test_each_setting_changes_what_is_learnt,
    "lora.text_targets": test_text_lora.test_only_adapters_are_trained,
    "lora.dropout": test_lora.test_each_setting_changes_what_is_learnt,
    "accumulation": test_memory.test_validation_takes_no_larger_batches_than_training,
    "gradient_checkpointing": (
        test_options.test_gradient_checkpointing_computes_twice_and_changes_nothing
    ),
    "compile": test_options.test_a_compiled_training_is_the_same_but_for_rounding,
    "deterministic": test_options.test_deterministic_training_allows_no_other_kernels,
    "max_skipped": test_train.test_a_training_without_finite_gradients_stops,
    "workers": test_workers_make_the_batches,
    "track": test_the_launcher_is_told_whom_to_start_and_whether_to_show_it,
    "accelerate": test_the_launcher_is_told_whom_to_start_and_whether_to_show_it,
    "patience_s": test_kills.test_a_trainer_that_stands_still_for_too_long_ends_it,
}
"""By setting, the test that fails when it does nothing."""


def names_in(section: type[Section]) -> Iterator[str]:
    """All settings of a section, with dots those of sections within."""
    for name, field in section.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from (f"{name}.{inner}" for inner in names_in(kind))
                break
        else:
            yield name


def test_no_setting_is_forgotten() -> None:
    assert sorted(names_in(Train)) == sorted([*CASES, *ELSEWHERE])


# Which of them make another run

OTHERS: dict[str, tuple[dict[str, Any], Any]] = {
    "init": ({}, "other"),
    "lora.rank": ({"lora": {}}, 4),
    "lora.alpha": ({"lora": {}}, 8.0),
    "lora.targets": ({"lora": {}}, ["to_q"]),
    "lora.text_targets": ({"lora": {}, "text_learning_rate": 1e-4}, ["fc1"]),
    "lora.dropout": ({"lora": {}}, 0.5),
    "accumulation": ({}, 2),
    "gradient_checkpointing": ({}, True),
    "compile": ({}, True),
    "deterministic": ({}, True),
    "max_skipped": ({}, 3),
    "workers": ({}, 2),
    "track": ({}, False),
    "accelerate": ({}, "two.yaml"),
    "patience_s": ({}, 60),
}
"""As in :data:`CASES`, of the settings that are not there: what else is set, and another value."""
OF_NO_RESULT = {"workers", "accumulation", "gradient_checkpointing", "accelerate", "patience_s"}
OF_NO_RESULT |= {"log_every", "validate_every", "checkpoint_every", "keep_checkpoints"}
OF_NO_RESULT |= {"max_skipped"}
OF_NO_RESULT |= {"sample_every", "sample_prompts", "track"}


@pytest.mark.parametrize("setting", names_in(Train))
def test_another_value_makes_another_run_where_it_decides_the_result(setting: str) -> None:
    common, other = OTHERS.get(setting) or CASES[setting][:2]
    common = {**BASE, **common}
    before, after = (
        settings_of_result(Train.model_validate(one))
        for one in (common, with_other(common, setting, other))
    )
    same = folder_of(Path(), {"config": before}) == folder_of(Path(), {"config": after})
    assert same is (setting in OF_NO_RESULT)


# The noise as the prediction, and what a watcher sees


def test_from_random_weights_it_learns_to_predict_the_noise(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    settings = {**RANDOM, "noise": {"prediction": "epsilon"}, "snr_floor": 0.0}
    settings |= {"min_snr_gamma": None, "steps": 60, "learning_rate": 1e-2, "ema_decay": 0.9}
    model = run_here(pipeline, latents, tmp_path, **settings)
    assert load_schedule(Source(str(model)))["prediction_type"] == "epsilon"
    found = [line["val_loss"] for line in read_log(model) if "val_loss" in line]
    assert found[-1] < 0.6 * found[0]


def test_the_bar_shows_speed_and_figures(
    pipeline: Path, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = run_here(pipeline, latents, tmp_path, **{**BASE, "log_every": 1})
    written = re.split(r"[\r\n]", capsys.readouterr().err)
    *_, last = (line for line in written if line.startswith("train:"))
    *_, figures = (line for line in read_log(model) if "loss" in line)
    loss, rate, gradient = (figures[key] for key in ("loss", "lr", "gradient_norm"))
    speed = re.match(r"train: 100%.* 32/32 \[.*, +([\d.]+) samples/s, ", last)
    assert speed and float(speed[1]) > 0
    assert last.endswith(f"samples/s, loss {loss:.3f}, lr {rate:.1e}, gradient {gradient:.2f}]")


def test_the_bar_counts_samples_and_goes_on_from_those_of_before(
    pipeline: Path,
    latents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By a clock on which a step of 8 samples takes two seconds, and all else none."""
    now, step = [time.time()], Trainer.step

    def timed(*arguments: Any) -> tuple[float, float, bool]:
        now[0] += 2
        return step(*arguments)

    monkeypatch.setattr(Trainer, "step", timed)
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    settings = {**BASE, "checkpoint_every": 3}
    run_here(pipeline, latents, tmp_path, **settings)
    assert bar_of(capsys) == [("0/32", "?"), ("32/32", "4.00")]
    (run,) = (tmp_path / "runs").iterdir()
    (folders(run)[-1] / "state.json").unlink()
    run_here(pipeline, latents, tmp_path, **settings)
    assert bar_of(capsys) == [("24/32", "?"), ("32/32", "4.00")]


def bar_of(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    """How many samples a training's bar counted, of how many, and how many a second."""
    shown = r"train: [^\r\n]* (\d+/\d+) \[[^\r\n]*, +([\d.?]+) samples/s"
    return re.findall(shown, capsys.readouterr().err)
