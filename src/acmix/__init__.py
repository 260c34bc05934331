"""acmix: convolution and self-attention from one set of projections (ACmix, CVPR 2022)."""

from acmix import models, ops
from acmix.layers import ACmix2d
from acmix.surgery.convert import convert
from acmix.surgery.fuse import fuse
from acmix.surgery.warm_start import warm_start

__all__ = ["ACmix2d", "__version__", "convert", "fuse", "models", "ops", "warm_start"]

__version__ = "0.1.0"
