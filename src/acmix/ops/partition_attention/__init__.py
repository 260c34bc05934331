"""Attention within each of the windows that a map is cut into: Swin's."""

from acmix.ops.partition_attention import native, reference, tiled

IMPLEMENTATIONS = {"reference": reference, "tiled": tiled, "native": native}
