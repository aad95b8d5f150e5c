"""``ldm first-stage`` from what is there already: a VAE to go on with, a text encoder to keep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import constants
from transformers import CLIPVisionModel

from ldm.artifacts import opening
from ldm.config import Encode, FirstStage, Pretrained, Train, VaeTraining
from ldm.encode.stage import encode
from ldm.errors import UserError
from ldm.first_stage.loop import Run
from ldm.first_stage.parts import Given
from ldm.first_stage.perceptual import load_tower
from ldm.first_stage.stage import first_stage
from ldm.first_stage.vae import train_vae
from ldm.models import Source, digest_weights, digests, load_encoders, load_vae
from ldm.train.stage import train
from tests.conftest import Pixels, scenes

CPU = torch.device("cpu")
SHORT = {"steps": 3, "warmup_steps": 1, "batch_size": 4, "compute": "float32"}


def from_the(pipeline: Path, run: Run, **settings: object) -> AutoencoderKL:
    config = VaeTraining.model_validate({**SHORT, "init": str(pipeline), **settings})
    pixels = Pixels(scenes("train", 8))
    return train_vae(config, pixels, pixels, CPU, run, start=load_vae(Source(str(pipeline))))


def moved(vae: AutoencoderKL, pipeline: Path) -> dict[str, float]:
    """How far its tensors are from where they started, by name."""
    start = load_vae(Source(str(pipeline))).state_dict()
    return {name: float((one - start[name]).abs().max()) for name, one in vae.state_dict().items()}


def test_a_vae_is_trained_on_from_where_it_stands(pipeline: Path, tmp_path: Path) -> None:
    """Adam's first step is as long as its rate."""
    vae = from_the(pipeline, Run(tmp_path, 1, 1), steps=1, learning_rate=1e-5)
    assert 0 < max(moved(vae, pipeline).values()) < 1.1e-5
    scaling = load_vae(Source(str(pipeline))).config.scaling_factor
    assert vae.config.scaling_factor == scaling


def test_latents_stay_where_the_decoder_alone_is_trained(pipeline: Path, tmp_path: Path) -> None:
    vae = from_the(pipeline, Run(tmp_path, 1, 1), trains="decoder", adversarial_from=1)
    far = moved(vae, pipeline)
    of_latents = {name for name in far if name.startswith(("encoder.", "quant_conv."))}
    assert {far[name] for name in of_latents} == {0}
    assert all(far[name] for name in far.keys() - of_latents)


def test_a_decoder_alone_wants_an_encoder() -> None:
    with pytest.raises(ValueError, match=r"trains decoder .* name a pipeline in init"):
        VaeTraining(trains="decoder")


def test_what_would_be_ignored_is_refused() -> None:
    with pytest.raises(ValueError, match=r"widths: is for init random; with init tiny .* its own"):
        VaeTraining(init="tiny", widths=(64, 64))
    with pytest.raises(ValueError, match=r"clip: is not trained where text_encoder names one"):
        FirstStage.model_validate({"text_encoder": "tiny", "clip": {"steps": 5}})


def test_sides_that_the_vae_cannot_halve_are_one_line(tmp_path: Path) -> None:
    pixels = Pixels(scenes("train", 2)[:, :60, :60])
    config = VaeTraining(widths=(8, 8, 8, 8), norm_groups=4)
    with pytest.raises(UserError, match=r"multiples of 8, and the pictures' are 60; set ingest\."):
        train_vae(config, pixels, pixels, CPU, Run(tmp_path, 1, 1))


def test_pictures_are_compared_by_a_revision_of_a_hub_id(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the cache of a hub that has a newer one too."""
    older = load_tower(str(pipeline / "clip"), None)
    towers = {"a" * 40: older, "b" * 40: CLIPVisionModel(older.config)}
    cached = tmp_path / "models--ldm--clip"
    for revision, tower in towers.items():
        tower.save_pretrained(cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("b" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision, wanted in (("a" * 40, "a"), ("b" * 40, "b"), (None, "b")):
        vae = {"perceptual": "ldm/clip", "perceptual_revision": revision}
        given = Given.by(FirstStage.model_validate({"vae": vae}), CPU)
        assert given.digests() == {"perceptual": digest_weights(towers[wanted * 40])}


def test_a_vae_of_ones_own_goes_through_encode_and_train(
    pipeline: Path, images: Path, tmp_path: Path
) -> None:
    """Beside the text encoder and on from the UNet of the pipeline that it comes from."""
    own, runs = tmp_path / "first-stage", tmp_path / "runs"
    vae = {**SHORT, "init": str(pipeline)}
    config = {"vae": vae, "text_encoder": str(pipeline), "log_every": 1, "track": False}
    first_stage(FirstStage.model_validate(config), images, own, runs)
    made = opening(own, "first-stage", "first-stage")
    assert set(made.inputs) == {"images", "start", "text_encoder", "tokenizer"}
    assert {"clip", "layout"}.isdisjoint(made.config)
    assert not (own / "clip").exists()
    assert set(json.loads((own / "measured.json").read_text())) == {"vae_psnr_db"}
    before, after = (digests(load_encoders(Source(str(one)))) for one in (pipeline, own))
    assert {part for part in before if before[part] != after[part]} == {"vae"}
    pretrained, latents = Pretrained(pipeline=str(own)), tmp_path / "latents"
    encode(Encode(batch_size=16), pretrained, images, latents, runs)
    settings = {"steps": 2, "batch_size": 4, "validate_every": 2, "workers": 0}
    config = Train.model_validate({**settings, "init": str(pipeline), "mixed_precision": "no"})
    train(config, pretrained, latents, tmp_path / "model", runs)
    model = digests(load_encoders(Source(str(tmp_path / "model"))))
    assert model == after


def test_a_new_decoder_asks_for_no_new_latents(
    pipeline: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, runs, latents = tmp_path / "first-stage", tmp_path / "runs", tmp_path / "latents"
    encode(Encode(batch_size=16), Pretrained(pipeline=str(pipeline)), images, latents, runs)
    before = opening(latents, "latents", "encode")
    vae = {**SHORT, "init": str(pipeline), "trains": "decoder"}
    config = {"vae": vae, "text_encoder": str(pipeline), "log_every": 1, "track": False}
    first_stage(FirstStage.model_validate(config), images, own, runs)
    pretrained = Pretrained(pipeline=str(own))
    settings = {"steps": 2, "batch_size": 4, "init": str(pipeline), "mixed_precision": "no"}
    model = tmp_path / "model"
    train(Train.model_validate(settings), pretrained, latents, model, runs)
    decoders = [load_vae(Source(str(one))).decoder.state_dict() for one in (pipeline, own, model)]
    assert not torch.equal(*(one["conv_out.weight"] for one in decoders[:2]))
    assert torch.equal(*(one["conv_out.weight"] for one in decoders[1:]))
    capsys.readouterr()
    encode(Encode(batch_size=16), pretrained, images, latents, runs)
    assert "16 validation pictures (0 encoded, the rest reused)" in capsys.readouterr().out
    after = opening(latents, "latents", "encode")
    assert (after.files, after.inputs) == (before.files, before.inputs)
