"""Low-rank adapters beside the layers of a frozen UNet, by peft (LoRA, arXiv:2106.09685).

A layer's ``W x`` becomes ``W x + alpha / rank * B A x`` (section 4.1); ``A`` and ``B`` are trained.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors.torch import save_file

from ldm.config import Lora, Pretrained, Train
from ldm.errors import UserError
from ldm.unet import Network

FOLDER, DIFFUSERS, KOHYA = "lora", "pytorch_lora_weights.safetensors", "kohya.safetensors"
"""Where a pipeline folder has the adapters alone, and in which files."""
NAME = "default"
"""Of the set of adapters; peft can hold many."""


class Adapters:
    """Adapters beside layers of a UNet, which is changed in place and frozen but for them.

    At first they change no output: each ``B`` is 0, and ``A`` is a function of the seed. UserError
    for targets that are no layers of the network.
    """

    def __init__(self, unet: Network, lora: Lora, seed: int = 0) -> None:
        from peft import LoraConfig, LoraModel
        from peft.tuners.lora import LoraLayer

        _check_targets(unet, lora.targets)
        self.unet, self.lora = unet, lora
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(lora.targets),
        )
        self._tuner = LoraModel(unet, config, NAME)
        torch.manual_seed(seed)
        # In order of name, which is the same in both networks.
        for _, module in sorted(unet.named_modules(), key=itemgetter(0)):
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters(NAME, init_lora_weights=True)

    def save(self, folder: Path) -> None:
        """Write the adapters alone, twice, both for diffusers' ``load_lora_weights``.

        ``kohya.safetensors`` has the names of kohya-ss's scripts, which other programs know.
        """
        from peft import get_peft_model_state_dict

        # By peft's names, that diffusers reads for any layer; its older ones it reads for some.
        weights = {
            f"unet.{name}": tensor.detach().cpu().contiguous()
            for name, tensor in get_peft_model_state_dict(self.unet, adapter_name=NAME).items()
        }
        of_kohya = convert_state_dict_to_kohya(weights)
        alpha = torch.tensor(self.lora.alpha)
        of_kohya |= {name: alpha.clone() for name in of_kohya if name.endswith(".alpha")}
        folder.mkdir()
        # One entry a file: safetensors writes several in no fixed order.
        save_file(weights, folder / DIFFUSERS, {"lora_adapter_metadata": self._description()})
        save_file(of_kohya, folder / KOHYA, {"format": "pt"})

    def _description(self) -> str:
        """What diffusers makes peft's configuration from."""
        lora = self.lora
        values = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(lora.targets)}
        return json.dumps({f"unet.{name}": value for name, value in values.items()})

    def merge(self) -> Network:
        """The network without adapters, their products added to the weights beside them.

        On the CPU: the sum is then the same to the last bit wherever the adapters were trained.
        """
        self.unet.to("cpu")
        return self._tuner.merge_and_unload()


def _check_targets(unet: Network, targets: tuple[str, ...]) -> None:
    kinds = torch.nn.Linear | torch.nn.Conv2d
    modules = dict(unet.named_modules())
    for target in targets:
        found = [one for name, one in modules.items() if f".{name}".endswith(f".{target}")]
        if not found or not all(isinstance(one, kinds) for one in found):
            raise UserError(
                f"train.lora.targets: {target} names no linear layers or convolutions of the UNet; "
                f"name some by the end of diffusers' names, as {', '.join(Lora().targets)}"
            )


@dataclass(frozen=True)
class Base:
    """The network that adapters were trained beside, by name and weights, and their settings."""

    name: str
    revision: str | None
    digest: str
    lora: dict[str, Any]

    @classmethod
    def of(cls, config: Train, pretrained: Pretrained, digest: str) -> Base:
        """Of a training of adapters; ``digest`` is that of the UNet it starts from."""
        assert config.lora
        name, revision = config.init, None
        if config.init == "pretrained":
            name, revision = pretrained.pipeline, pretrained.revision
        return cls(name, revision, digest, config.lora.as_dict())
