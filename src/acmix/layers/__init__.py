"""nn.Modules: the operator of the paper, and its forms in SAN, Swin and PVT."""

from acmix.layers.acmix import ACmix2d
from acmix.layers.patchwise import PairwiseAttention, PatchwiseACmix
from acmix.layers.reduced import ReducedACmix
from acmix.layers.window import WindowACmix

__all__ = ["ACmix2d", "PairwiseAttention", "PatchwiseACmix", "ReducedACmix", "WindowACmix"]
