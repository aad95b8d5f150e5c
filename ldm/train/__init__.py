"""The UNet on cached latents: the loop, what it is made of, and its stage."""
