"""The text-conditioned UNet, from scratch."""

from ldm.nn.unet import UNet as UNet
