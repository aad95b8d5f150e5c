"""Adapters: what they change and what they leave alone, and who can read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from ldm.config import Lora, Sampling
from ldm.denoiser import Denoiser
from ldm.errors import UserError
from ldm.lora import DIFFUSERS, KOHYA, Adapters
from ldm.models import Source
from ldm.params import load_params
from ldm.pipeline import load_unet
from ldm.sampling import Painter, Request
from ldm.train.stage import train
from ldm.unet import denoise
from tests.launched import launch
from tests.test_options import differ
from tests.test_train import run_here, text_weights, weights

ALL_KINDS = ["to_q", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "conv_shortcut"]
"""Linear layers and convolutions of either size, among them names that formats write unlike."""
STRONG: dict[str, Any] = {"learning_rate": 1e-2, "schedule": "constant"}


def adapted(name: str, targets: tuple[str, ...] = Lora().targets) -> bool:
    return any(f".{name}".endswith(f".{target}.weight") for target in targets)


def output(unet: torch.nn.Module) -> torch.Tensor:
    """What a network of the test pipeline makes of the same noise and text."""
    rng = torch.Generator().manual_seed(5)
    latents = torch.randn(3, 4, 8, 8, generator=rng)
    states = torch.randn(3, 40, 16, generator=rng)
    with torch.no_grad():
        return denoise(unet.eval(), latents, torch.tensor([1, 500, 999]), states)


@pytest.mark.parametrize("network", ["ldm", "diffusers"])
def test_merged_weights_do_what_the_adapters_did(pipeline: Path, network: str) -> None:
    unet = load_unet(Source(str(pipeline)), network)
    names, plain = unet.state_dict().keys(), output(unet)
    adapters = Adapters(Denoiser(unet), Lora(rank=3, alpha=5, targets=tuple(ALL_KINDS)), seed=1)
    assert torch.equal(output(unet), plain)
    torch.manual_seed(2)
    for name, parameter in unet.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    beside = output(unet)
    assert float((beside - plain).abs().max()) > 0.1
    adapters.merge()
    assert unet.state_dict().keys() == names
    torch.testing.assert_close(output(unet), beside, rtol=1e-5, atol=1e-5)


def test_both_networks_get_the_same_adapters(pipeline: Path) -> None:
    drawn = []
    for network in ("ldm", "diffusers"):
        unet = load_unet(Source(str(pipeline)), network)
        Adapters(Denoiser(unet), Lora(), seed=7)
        drawn.append({name: one for name, one in unet.state_dict().items() if "lora_A" in name})
    assert drawn[0].keys() == drawn[1].keys() and drawn[0]
    assert all(tensor.equal(drawn[1][name]) for name, tensor in drawn[0].items())


@pytest.mark.parametrize("network", ["ldm", "diffusers"])
def test_only_adapters_are_trained(
    pipeline: Path, latents: Path, tmp_path: Path, network: str
) -> None:
    """What comes out is the start, but for the sum in adapted layers, weighed by alpha."""
    lora = {"rank": 2, "alpha": 3}
    model = run_here(pipeline, latents, tmp_path, network, lora=lora, **STRONG)
    alone = load_file(model / "lora" / DIFFUSERS)
    before, after = weights(pipeline), weights(model)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if not adapted(name):
            assert torch.equal(after[name], tensor), name
            continue
        layer = f"unet.{name.removesuffix('.weight')}"
        up, down = (alone.pop(f"{layer}.lora_{side}.weight") for side in "BA")
        assert up.shape[1] == down.shape[0] == 2
        torch.testing.assert_close(after[name], tensor + 1.5 * up @ down)
        assert not torch.equal(after[name], tensor), name
    assert not alone


@pytest.mark.parametrize("file", [DIFFUSERS, KOHYA, None])
@pytest.mark.parametrize("targets", [list(Lora().targets), ALL_KINDS])
def test_diffusers_puts_the_adapters_on_the_start(
    pipeline: Path, latents: Path, tmp_path: Path, file: str | None, targets: list[str]
) -> None:
    lora = {"rank": 4, "alpha": 32, "targets": targets}
    model = run_here(pipeline, latents, tmp_path, lora=lora, **STRONG)
    ours = StableDiffusionPipeline.from_pretrained(model)
    theirs = StableDiffusionPipeline.from_pretrained(pipeline)
    plain, wanted = output(theirs.unet), output(ours.unet)
    theirs.load_lora_weights(model / "lora", **({"weight_name": file} if file else {}))
    moved = float((wanted - plain).abs().max())
    assert moved > 0.05
    torch.testing.assert_close(output(theirs.unet), wanted, rtol=1e-4, atol=1e-4 * moved)
    pictures = []
    for one in (ours, theirs):
        one.set_progress_bar_config(disable=True)
        how: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
        how["generator"] = torch.Generator().manual_seed(1)
        pictures.append(one("a red star", **how).images)
    np.testing.assert_allclose(*pictures, atol=1e-4)


def test_kohya_has_every_adapter_and_its_alpha(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    lora = {"rank": 3, "alpha": 7.5, "targets": ALL_KINDS}
    model = run_here(pipeline, latents, tmp_path, lora=lora, steps=1)
    found = load_file(model / "lora" / KOHYA)
    layers = {
        f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": tensor
        for name, tensor in weights(pipeline).items()
        if adapted(name, tuple(ALL_KINDS))
    }
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert found.keys() == {f"{layer}.{part}" for layer in layers for part in parts}
    for layer, weight in layers.items():
        assert float(found[f"{layer}.alpha"]) == 7.5
        assert found[f"{layer}.lora_down.weight"].shape == (3, *weight.shape[1:])
        assert found[f"{layer}.lora_up.weight"].shape[:2] == (weight.shape[0], 3)


def test_equal_adapters_are_equal_bytes(pipeline: Path, tmp_path: Path) -> None:
    """safetensors writes several entries of a header in an order of chance."""
    adapters = Adapters(Denoiser(load_unet(Source(str(pipeline)))), Lora())
    for number in range(8):
        adapters.save(tmp_path / str(number))
    for file in (DIFFUSERS, KOHYA):
        assert len({(one / file).read_bytes() for one in tmp_path.iterdir()}) == 1


def checkpoint_of(folder: Path) -> Path:
    (found,) = folder.glob("runs/*/step-00000012")
    return found


def test_checkpoints_hold_adapters_alone(pipeline: Path, latents: Path, tmp_path: Path) -> None:
    run_here(pipeline, latents, tmp_path / "lora", lora={"rank": 2})
    run_here(pipeline, latents, tmp_path / "all")
    expected = sum(
        2 * sum(tensor.shape) for name, tensor in weights(pipeline).items() if adapted(name)
    )
    sizes = {}
    for part in ("weights", "ema", "optimizer"):
        small, whole = (
            checkpoint_of(tmp_path / one) / f"{part}.safetensors" for one in ("lora", "all")
        )
        if part != "optimizer":
            assert sum(tensor.numel() for tensor in load_file(small).values()) == expected
        sizes[part] = small.stat().st_size / whole.stat().st_size
    assert max(sizes.values()) < 0.25


def assert_resumes(pipeline: Path, latents: Path, tmp_path: Path, **settings: Any) -> Path:
    """Without its last checkpoint a training ends in the same bytes; where that checkpoint is."""
    model = run_here(pipeline, latents, tmp_path, **settings)
    last = checkpoint_of(tmp_path)
    straight = {path.name: path.read_bytes() for path in last.iterdir()}
    manifest = (model / "manifest.json").read_text()
    shutil.rmtree(last)
    shutil.rmtree(model)
    torch.manual_seed(99)
    run_here(pipeline, latents, tmp_path, **settings)
    assert {path.name: path.read_bytes() for path in last.iterdir()} == straight
    assert (model / "manifest.json").read_text() == manifest
    return last


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
def test_a_training_of_adapters_resumes_bit_for_bit(
    pipeline: Path, latents: Path, tmp_path: Path, optimizer: str
) -> None:
    """Dropout too, which the network draws by itself."""
    settings: dict[str, Any] = {"lora": {"rank": 4, "dropout": 0.3}, "accumulation": 2}
    settings |= {"optimizer": optimizer, "learning_rate": 1.0 if optimizer == "prodigy" else 1e-2}
    settings |= {"checkpoint_every": 7, "validate_every": 12}
    assert_resumes(pipeline, latents, tmp_path, **settings)


def test_a_checkpoint_draws_what_the_finished_model_draws(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    """Beside the network that the training started from, which is not the pipeline's."""
    start = run_here(pipeline, latents, tmp_path / "start", learning_rate=1e-2)
    settings = {"init": str(start), "lora": {"alpha": 40}, **STRONG}
    model = run_here(pipeline, latents, tmp_path, **settings)
    checkpoint = checkpoint_of(tmp_path)

    def drawn(folder: Path, network: str = "ldm") -> np.ndarray:
        painter = Painter.load(Source(str(folder)), network)
        return np.stack(list(painter.draw([Request("a red star", 1)], Sampling(steps=3))))

    assert np.array_equal(drawn(checkpoint), drawn(model))
    assert not np.array_equal(drawn(start), drawn(model))
    assert np.array_equal(drawn(checkpoint, "diffusers"), drawn(model, "diffusers"))

    other = start / "unet" / "diffusion_pytorch_model.safetensors"
    changed = load_file(other)
    changed["conv_in.bias"] += 1
    save_file(changed, other, {"format": "pt"})
    with pytest.raises(UserError, match=r"start/model: has another UNet than .*train again"):
        drawn(checkpoint)


@pytest.mark.parametrize(
    "other", [{"rank": 3}, {"alpha": 8}, {"dropout": 0.5}, {"targets": ["to_q"]}]
)
def test_each_setting_changes_what_is_learnt(
    pipeline: Path, latents: Path, tmp_path: Path, other: dict[str, Any]
) -> None:
    lora = {"rank": 2, "alpha": 2.0}
    settings = {"steps": 3, **STRONG}
    one = run_here(pipeline, latents, tmp_path / "one", lora=lora, **settings)
    two = run_here(pipeline, latents, tmp_path / "two", lora={**lora, **other}, **settings)
    assert differ(one, two)


@pytest.mark.kills
def test_two_processes_drop_what_one_does_that_accumulates(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    """In the text encoder too."""
    together = {"accelerate": "infra/accelerate/cpu-ddp.yaml"}
    settings = {"lora": json.dumps({"dropout": 0.4}), "steps": 6, **STRONG}
    settings |= {"text_learning_rate": 1e-2}
    others = ({"accumulation": 2}, together, {**together, "lora": json.dumps({})})
    for number, other in enumerate(others):
        process = launch(pipeline, latents, tmp_path / str(number), **{**settings, **other})
        assert process.wait() == 0
    models = [tmp_path / str(number) / "model" for number in range(3)]
    one, two, undropped = ({**weights(model), **text_weights(model)} for model in models)
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(one, undropped, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("network", ["ldm", "diffusers"])
def test_a_block_computed_twice_drops_the_same(
    pipeline: Path, latents: Path, tmp_path: Path, network: str
) -> None:
    settings = {"lora": {"dropout": 0.4}, "steps": 4, "text_learning_rate": 1e-2, **STRONG}
    plain, again = (
        run_here(
            pipeline,
            latents,
            tmp_path / str(twice),
            network,
            gradient_checkpointing=twice,
            **settings,
        )
        for twice in (False, True)
    )
    assert not differ(plain, again)


@pytest.mark.parametrize("target", ["to_x", "norm1", "attn1", "q"])
def test_targets_that_are_no_layers_are_named(
    pipeline: Path, latents: Path, tmp_path: Path, target: str
) -> None:
    with pytest.raises(
        UserError, match=rf"train\.lora\.targets: {target} names no .* as to_q, to_k"
    ):
        run_here(pipeline, latents, tmp_path, lora={"targets": ["to_q", target]})
    assert not (tmp_path / "model").exists()


def test_a_run_of_all_weights_does_not_go_on_with_adapters(
    pipeline: Path, latents: Path, tmp_path: Path
) -> None:
    run_here(pipeline, latents, tmp_path, steps=2)
    (run,) = (tmp_path / "runs").iterdir()
    known = json.loads((run / "run.json").read_text())["config"]
    from ldm.config import Pretrained, Train

    config = Train.model_validate({**known, "steps": 4, "track": False, "lora": {}})
    arguments = (config, Pretrained(pipeline=str(pipeline)), latents, tmp_path / "next")
    with pytest.raises(UserError, match=r"train\.lora\.rank None -> 16"):
        train(*arguments, tmp_path / "runs", resume=run)
    with pytest.raises(UserError, match=r"trained other weights than this would"):
        train(*arguments, tmp_path / "runs", resume=run, changed=True)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["init=random", "lora.rank=4"], r"train: lora: adapts a trained UNet, .*set init to"),
        (
            ["lora.text_targets=[fc1]"],
            r"train: lora\.text_targets: the text encoder is not trained; set text_learning_rate",
        ),
        (["lora.rank=0"], r"train\.lora\.rank: .*greater than or equal to 1"),
        (["lora.alpha=0"], r"train\.lora\.alpha: .*greater than 0"),
        (["lora.dropout=1"], r"train\.lora\.dropout: .*less than 1"),
        (["lora.targets=[]"], r"train\.lora\.targets: .*at least 1"),
        (["lora.text_targets=[]"], r"train\.lora\.text_targets: .*at least 1"),
        (["lora.bias=all"], r"train\.lora\.bias: unknown key"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_params("tiny", [f"train.{one}" for one in overrides])
    assert "\n" not in str(caught.value)


def test_adapters_are_asked_for_on_the_command_line() -> None:
    assert load_params("tiny", []).train.lora is None
    assert load_params("tiny", ["train.lora={}"]).train.lora == Lora()
    assert load_params("tiny", ["train.lora.rank=4"]).train.lora == Lora(rank=4)
