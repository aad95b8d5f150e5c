"""Text-to-image latent diffusion, from a list of URL pairs to a registered model."""

__version__ = "0.1.0"
