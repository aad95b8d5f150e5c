"""What the first stage's VAE minimises: features, and the adversary from a step on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import CLIPVisionModel

from ldm.clip_score import MEAN, STD
from ldm.config import VaeTraining
from ldm.errors import UserError
from ldm.first_stage.discriminator import (
    MOST,
    PatchDiscriminator,
    adaptive_weight,
    decoder_loss,
    discriminator_loss,
)
from ldm.first_stage.loop import Run
from ldm.first_stage.perceptual import feature_distance, load_tower
from ldm.first_stage.vae import build_vae, train_vae
from ldm.first_stage.vae_loss import VaeLoss
from ldm.images import to_model
from tests.conftest import Pixels, scenes

CPU = torch.device("cpu")
SMALL = {
    "widths": (8, 8, 8, 8), "norm_groups": 4, "batch_size": 4, "warmup_steps": 2,
    "compute": "float32", "discriminator_widths": (8, 16),
}  # fmt: skip
LOGITS = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=8).map(torch.tensor)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return scenes("train", 24)


@pytest.fixture(scope="module")
def images(pixels: np.ndarray) -> torch.Tensor:
    return to_model(pixels[:4])


@pytest.fixture(scope="module")
def tower() -> CLIPVisionModel:
    return load_tower("tiny", None)


def trained(
    folder: Path, pixels: np.ndarray, tower: CLIPVisionModel | None = None, **settings: object
) -> torch.nn.Module:
    config = VaeTraining.model_validate({**SMALL, **settings})
    run = Run(folder, checkpoint_every=4, log_every=1)
    return train_vae(config, Pixels(pixels), Pixels(pixels[:2]), CPU, run, tower=tower)


@given(LOGITS, LOGITS)
def test_the_hinge_losses_are_torchs(real: torch.Tensor, fake: torch.Tensor) -> None:
    told = F.hinge_embedding_loss(real, -torch.ones_like(real), margin=1)
    not_fooled = F.hinge_embedding_loss(-fake, -torch.ones_like(fake), margin=1)
    torch.testing.assert_close(discriminator_loss(real, fake), (told + not_fooled) / 2)
    torch.testing.assert_close(decoder_loss(fake), -fake.mean())


def test_the_discriminator_is_right_where_its_loss_is_0() -> None:
    assert discriminator_loss(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -2.0])) == 0
    assert discriminator_loss(torch.tensor([0.0]), torch.tensor([0.0])) == 1


@pytest.mark.parametrize(("widths", "side"), [((4, 4, 4), 34), ((4, 4, 4, 4), 70)])
def test_a_verdict_is_on_a_patch(widths: tuple[int, ...], side: int) -> None:
    """Without batch norm, whose statistics come from the whole batch."""
    torch.manual_seed(0)
    patches = [
        one for one in PatchDiscriminator(widths) if not isinstance(one, torch.nn.BatchNorm2d)
    ]
    seen = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = torch.nn.Sequential(*patches)(seen)
    logits[0, 0, 7, 7].backward()
    reached = seen.grad[0].abs().sum(dim=0) > 0
    assert (reached.any(dim=0).sum(), reached.any(dim=1).sum()) == (side, side)


def test_the_adaptive_weight_makes_both_pull_alike_on_the_last_layer() -> None:
    torch.manual_seed(0)
    last, first, second = torch.randn(5, requires_grad=True), torch.randn(5), torch.randn(5)
    reconstruction, adversarial = (last * first).sum() ** 2, 7 * (last * second).sum()
    weight = adaptive_weight(reconstruction, adversarial, last)
    wanted = 2 * (last @ first).abs() * first.norm() / (7 * second.norm() + 1e-6)
    torch.testing.assert_close(weight, wanted.detach())
    assert not weight.requires_grad
    assert adaptive_weight(reconstruction, 0 * adversarial, last) == MOST


def gradient(loss: VaeLoss, images: torch.Tensor, step: int) -> torch.Tensor:
    """Of the VAE's loss, in the decoder's last layer."""
    torch.manual_seed(0)
    value, _ = next(loss.of(images, step))
    return torch.autograd.grad(value, loss.vae.decoder.conv_out.weight)[0]


def test_the_decoder_is_pulled_by_the_adversary_as_hard_as_it_should_be(
    images: torch.Tensor,
) -> None:
    config = VaeTraining.model_validate({**SMALL, "adversarial_from": 5, "adversarial_weight": 0.5})
    torch.manual_seed(0)
    vae, discriminator = build_vae(config, 64), PatchDiscriminator((8, 16))
    loss = VaeLoss(config, vae, discriminator=discriminator)
    alone = gradient(VaeLoss(config, vae), images, 5)
    assert torch.equal(gradient(loss, images, 4), alone)
    pull = gradient(loss, images, 5) - alone
    # The divergence has no gradient there.
    torch.testing.assert_close(pull.norm(), 0.5 * alone.norm(), rtol=1e-3, atol=0)
    decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample
    fooled = -discriminator(decoded).mean()
    (wanted,) = torch.autograd.grad(fooled, vae.decoder.conv_out.weight)
    assert F.cosine_similarity(pull.flatten(), wanted.flatten(), dim=0) > 0.9


def test_until_its_step_the_adversary_changes_nothing(tmp_path: Path, pixels: np.ndarray) -> None:
    trained(tmp_path / "alone", pixels, steps=6)
    trained(tmp_path / "adversary", pixels, steps=6, adversarial_from=4)
    weights, optimizers = (
        {
            (name, step): load_file(tmp_path / name / f"vae/step-{step:08d}/{part}.safetensors")
            for name in ("alone", "adversary")
            for step in (4, 6)
        }
        for part in ("weights", "optimizer")
    )
    before, after = weights["adversary", 4], weights["adversary", 6]
    assert all(torch.equal(before[name], one) for name, one in weights["alone", 4].items())
    assert optimizers["alone", 4].keys() == optimizers["adversary", 4].keys()
    assert all(
        torch.equal(optimizers["adversary", 4][name], one)
        for name, one in optimizers["alone", 4].items()
    )
    decoder = "vae.decoder.conv_out.weight"
    assert not torch.equal(after[decoder], weights["alone", 6][decoder])
    learned = [name for name, one in before.items() if "discriminator" in name and one.ndim == 4]
    assert learned and not any(torch.equal(before[name], after[name]) for name in learned)
    assert float(optimizers["adversary", 6]["discriminator.0.step"]) == 2


def test_a_discriminator_learns_to_tell() -> None:
    torch.manual_seed(0)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    discriminator = PatchDiscriminator((8, 16))
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9))
    blurred = F.interpolate(F.avg_pool2d(images, 4), scale_factor=4)
    losses = []
    for _ in range(40):
        loss = discriminator_loss(discriminator(images), discriminator(blurred))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1, abs=0.1) and losses[-1] < 0.3


def test_the_feature_distance_is_that_of_unit_states(
    tower: CLIPVisionModel, images: torch.Tensor
) -> None:
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in (MEAN, STD))
    pair = torch.stack([images[:2], images[2:]])
    states = [
        [
            one.numpy().astype(np.float64)
            for one in tower(((each + 1) / 2 - mean) / std, output_hidden_states=True).hidden_states
        ]
        for each in pair
    ]
    per_layer = []
    for first, second in list(zip(*states, strict=True))[1:]:
        units = [one / np.linalg.norm(one, axis=-1, keepdims=True) for one in (first, second)]
        per_layer.append(((units[0] - units[1]) ** 2).sum(axis=-1).mean(axis=-1))
    assert len(per_layer) == tower.config.num_hidden_layers
    found = feature_distance(tower, *pair).numpy()
    np.testing.assert_allclose(found, np.mean(per_layer, axis=0), rtol=1e-4)
    assert (feature_distance(tower, images, images) == 0).all()


def test_training_on_features_brings_features_closer(
    tmp_path: Path, tower: CLIPVisionModel, pixels: np.ndarray, images: torch.Tensor
) -> None:
    settings = {"steps": 30, "learning_rate": 5e-3, "perceptual": "tiny", "perceptual_weight": 1.0}
    distances = []
    for name, used in (("without", None), ("with", tower)):
        vae = trained(tmp_path / name, pixels, used, **settings)
        with torch.no_grad():
            decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample
            distances.append(feature_distance(tower, decoded, images).mean())
    assert distances[1] < 0.8 * distances[0]
    assert all(parameter.grad is None for parameter in tower.parameters())


def test_a_tower_is_clips(pipeline: Path) -> None:
    with pytest.raises(UserError, match=r"text_encoder: has no image tower .*perceptual"):
        load_tower(str(pipeline / "text_encoder"), None)


def test_the_absolute_error_is_an_option(images: torch.Tensor) -> None:
    losses = {}
    for reconstruction in ("mse", "l1"):
        config = VaeTraining.model_validate(
            {**SMALL, "reconstruction": reconstruction, "kl_weight": 0}
        )
        torch.manual_seed(0)
        vae = build_vae(config, 64)
        torch.manual_seed(1)
        losses[reconstruction] = next(VaeLoss(config, vae).of(images, 0))
    torch.manual_seed(1)
    decoded = vae.decode(vae.encode(images).latent_dist.sample()).sample
    torch.testing.assert_close(losses["l1"][0], (decoded - images).abs().mean())
    torch.testing.assert_close(losses["mse"][0], (decoded - images).square().mean())
    assert torch.equal(losses["l1"][1]["psnr_db"], losses["mse"][1]["psnr_db"])


def test_a_weight_is_how_much_its_part_counts(images: torch.Tensor, tower: CLIPVisionModel) -> None:
    torch.manual_seed(0)
    vae = build_vae(VaeTraining.model_validate(SMALL), 64)

    def loss(**weights: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config = VaeTraining.model_validate({**SMALL, "kl_weight": 0, **weights})
        torch.manual_seed(1)
        return next(VaeLoss(config, vae, tower).of(images, 0))

    lightest, figures = loss(perceptual_weight=1e-9)
    for weight, part in (("kl_weight", "kl"), ("perceptual_weight", "perceptual")):
        heavier, _ = loss(**{"perceptual_weight": 1e-9, weight: 0.25})
        torch.testing.assert_close(heavier - lightest, 0.25 * figures[part])


def test_the_discriminator_has_a_rate_of_its_own(tmp_path: Path, pixels: np.ndarray) -> None:
    """Adam's first step is as long as its rate."""
    moved = []
    for rate in (1e-5, 1e-3):
        settings = {"adversarial_from": 0, "discriminator_learning_rate": rate, "warmup_steps": 1}
        trained(tmp_path / str(rate), pixels, steps=1, **settings)
        torch.manual_seed(VaeTraining().seed)
        build_vae(VaeTraining.model_validate(SMALL), 64)
        before = PatchDiscriminator((8, 16)).state_dict()
        (file,) = tmp_path.glob(f"{rate}/vae/step-00000001/weights.safetensors")
        after = load_file(file)
        moved.append(
            max((after[f"discriminator.{key}"] - before[key]).abs().max() for key in before)
        )
    assert moved == pytest.approx([1e-5, 1e-3], rel=0.05)


def test_an_adversary_that_never_plays_is_refused() -> None:
    with pytest.raises(ValueError, match="adversarial_from 10 is past the last of 10 steps"):
        VaeTraining(steps=10, adversarial_from=10)
