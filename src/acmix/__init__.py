"""acmix: convolution and self-attention from one set of projections (ACmix, CVPR 2022)."""

from acmix import models, ops
from acmix.layers import ACmix2d

__all__ = ["ACmix2d", "__version__", "models", "ops"]

__version__ = "0.1.0"
