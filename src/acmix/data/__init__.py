"""Kinds of data, one a file; `acmix fit --data NAME` chooses one."""

from acmix.data.base import ClassifiedData, DetectionData, ImageData, SegmentationData
from acmix.data.digits import Digits
from acmix.data.images import Images
from acmix.data.masks import Masks
from acmix.data.objects import Objects

__all__ = [
    "ClassifiedData",
    "DetectionData",
    "Digits",
    "ImageData",
    "Images",
    "Masks",
    "Objects",
    "SegmentationData",
]
