"""Low-rank adapters beside the layers of frozen networks, by peft (LoRA, arXiv:2106.09685).

A layer's ``W x`` becomes ``W x + alpha / rank * B A x`` (section 4.1); ``A`` and ``B`` are trained.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors.torch import save_file

from ldm.checkpoint import Tensors
from ldm.config import Lora, Pretrained, Train
from ldm.denoiser import Denoiser
from ldm.errors import UserError

if TYPE_CHECKING:
    from peft import LoraModel

FOLDER, DIFFUSERS, KOHYA = "lora", "pytorch_lora_weights.safetensors", "kohya.safetensors"
"""Where a pipeline folder has the adapters alone, and in which files."""
NAME = "default"
"""Of the set of adapters; peft can hold many."""
PREFIXES = {"unet": "unet.", "text_encoder": "text_encoder.text_model."}
"""Of the networks' names in files; the text encoder's layers lay a level deeper when these names
were agreed on."""


class Adapters:
    """Adapters beside layers of a denoiser, which is changed in place and frozen but for them.

    At first they change no output: each ``B`` is 0, and ``A`` is a function of the seed. UserError
    for targets that are no layers of the UNet, or of the text encoder.
    """

    def __init__(self, denoiser: Denoiser, lora: Lora, seed: int = 0) -> None:
        self.denoiser, self.lora = denoiser, lora
        self._networks = dict(denoiser.named_children())
        self._tuners = [self._beside(name, seed) for name in self._networks]

    def _targets(self, name: str) -> tuple[str, ...]:
        return self.lora.targets if name == "unet" else self.lora.text_targets

    def _beside(self, name: str, seed: int) -> LoraModel:
        """Put adapters beside layers of one of the networks."""
        from peft import LoraConfig, LoraModel
        from peft.tuners.lora import LoraLayer

        network, lora = self._networks[name], self.lora
        _check_targets(name, network, self._targets(name))
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(self._targets(name)),
        )
        tuner = LoraModel(network, config, NAME)
        torch.manual_seed(seed)
        # In order of name, which is the same in our UNet and in diffusers'.
        for _, module in sorted(network.named_modules(), key=itemgetter(0)):
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters(NAME, init_lora_weights=True)
        return tuner

    def save(self, folder: Path) -> None:
        """Write the adapters alone, twice, both for diffusers' ``load_lora_weights``.

        ``kohya.safetensors`` has the names of kohya-ss's scripts, which other programs know.
        """
        weights, about = self._weights(), json.dumps(self._description())
        of_kohya = {
            # diffusers gives the text encoder the name that it has among the two of SDXL.
            name.replace("lora_te1_", "lora_te_"): tensor
            for name, tensor in convert_state_dict_to_kohya(weights).items()
        }
        alpha = torch.tensor(self.lora.alpha)
        of_kohya |= {name: alpha.clone() for name in of_kohya if name.endswith(".alpha")}
        folder.mkdir()
        # One entry a file: safetensors writes several in no fixed order.
        save_file(weights, folder / DIFFUSERS, {"lora_adapter_metadata": about})
        save_file(of_kohya, folder / KOHYA, {"format": "pt"})

    def _weights(self) -> Tensors:
        """By peft's names, that diffusers reads for any layer; its older ones it reads for some."""
        from peft import get_peft_model_state_dict

        return {
            f"{PREFIXES[network]}{name}": tensor.detach().cpu().contiguous()
            for network, module in self._networks.items()
            for name, tensor in get_peft_model_state_dict(module, adapter_name=NAME).items()
        }

    def _description(self) -> dict[str, Any]:
        """What diffusers makes peft's configuration from."""
        values = {"r": self.lora.rank, "lora_alpha": self.lora.alpha}
        return {
            f"{network}.{name}": value
            for network in self._networks
            for name, value in {**values, "target_modules": [*self._targets(network)]}.items()
        }

    def merge(self) -> None:
        """Leave the networks without adapters, their products added to the weights beside them.

        On the CPU: the sum is then the same to the last bit wherever the adapters were trained.
        """
        self.denoiser.to("cpu")
        for tuner in self._tuners:
            tuner.merge_and_unload()


def _check_targets(name: str, network: torch.nn.Module, targets: tuple[str, ...]) -> None:
    kinds = torch.nn.Linear | torch.nn.Conv2d
    modules = dict(network.named_modules())
    setting, what, usual = {
        "unet": ("targets", "UNet; name some by the end of diffusers' names", Lora().targets),
        "text_encoder": (
            *("text_targets", "text encoder; name some by the end of transformers' names"),
            Lora().text_targets,
        ),
    }[name]
    for target in targets:
        found = [one for name, one in modules.items() if f".{name}".endswith(f".{target}")]
        if not found or not all(isinstance(one, kinds) for one in found):
            raise UserError(
                f"train.lora.{setting}: {target} names no linear layers or convolutions of the "
                f"{what}, as {', '.join(usual)}"
            )


@dataclass(frozen=True)
class Base:
    """The networks that adapters were trained beside, by name and weights, and their settings.

    The text encoder is that of the pipeline; ``text_digest`` is None in earlier checkpoints.
    """

    name: str
    revision: str | None
    digest: str
    lora: dict[str, Any]
    text_digest: str | None = None

    @classmethod
    def of(cls, config: Train, pretrained: Pretrained, digest: str, text_digest: str) -> Base:
        """Of a training of adapters beside a UNet and a text encoder of these digests."""
        assert config.lora
        name, revision = config.init, None
        if config.init == "pretrained":
            name, revision = pretrained.pipeline, pretrained.revision
        return cls(name, revision, digest, config.lora.as_dict(), text_digest)
