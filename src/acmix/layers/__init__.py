"""nn.Modules: the operator of the paper."""

from acmix.layers.acmix import ACmix2d

__all__ = ["ACmix2d"]
