"""``torch.compile`` of the network that a training trains."""

from __future__ import annotations

import torch

from ldm.nn import UNet
from ldm.unet import Network

CHANNELS_LAST = {"force_layout_optimization": True}
"""Convolutions in the order that a GPU's matrix units want, in a network that is in another.

The compiler by itself leaves it out of a network with a convolution to half as many channels, which
is every UNet that joins its skips, and then turns each convolution's input and output around. It
turns around what attention keeps, too, which is why ours brings its own order.
"""


def compile_steps(unet: Network, device: torch.device, shapes: int) -> None:
    """Compile it in place, so weights keep their names, for each of so many shapes by itself."""
    # Of more it would run some uncompiled.
    torch._dynamo.config.recompile_limit = max(8, shapes + 1)
    forced = device.type != "cpu" and not isinstance(unet, UNet)
    unet.compile(dynamic=False, options=CHANNELS_LAST if forced else {})
