"""Decoders that give every pixel a class, on the maps of any network."""

from acmix.segmentation.segmenter import DECODERS, Segmenter, create_segmenter

__all__ = ["DECODERS", "Segmenter", "create_segmenter"]
