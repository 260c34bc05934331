"""Images with their masks, cropped and augmented in training, resized when held out.

Masks are resized to the nearest pixel by centres, as images are; torchvision's transform of masks
rounds down, which shifts them by up to half a pixel.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nn_functional
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from acmix.data.loading import Sample

TRIES = 10  # crops, of which the first is taken that no class fills


@dataclass(frozen=True)
class Normalise:
    """Of 8-bit images (3, H, W), with one number a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Tensor) -> Tensor:
        return F.normalize(F.to_dtype(image, torch.float32, scale=True), self.mean, self.std)


@dataclass(frozen=True)
class Resized:
    """Images at a size, shorter side, with their masks as they are."""

    size: int
    normalise: Normalise

    def __call__(self, image: Image.Image, mask: np.ndarray) -> Sample:
        pixels = F.pil_to_tensor(image)
        resized = F.resize(pixels, scaled(pixels, self.size), antialias=True)
        return self.normalise(resized), torch.from_numpy(mask).long()


@dataclass(frozen=True)
class Training:
    """Random sizes, crops, mirror images and colours.

    size: shorter side of an image at scale 1. crop: height and width. class_share: the most of the
    labelled pixels of a crop that may be of one class, where that can be had. distortion:
    probability of each change of colours.
    """

    size: int
    scale: tuple[float, float]
    crop: tuple[int, int]
    class_share: float
    hflip: float
    distortion: float
    normalise: Normalise
    ignore_index: int

    def __call__(self, image: Image.Image, mask: np.ndarray) -> Sample:
        pixels, classes = F.pil_to_tensor(image), torch.from_numpy(mask)
        size = scaled(pixels, self.size * random.uniform(*self.scale))
        pixels, classes = F.resize(pixels, size, antialias=True), resize_mask(classes, size)
        top, left = self._place(classes)
        pixels, classes = (
            of[..., top : top + self.crop[0], left : left + self.crop[1]]
            for of in (pixels, classes)
        )
        if random.random() < self.hflip:
            pixels, classes = pixels.flip(-1), classes.flip(-1)
        return self._padded(self.normalise(distort(pixels, self.distortion)), classes.long())

    def _place(self, classes: Tensor) -> tuple[int, int]:
        """Of the crop: its first row and column."""
        room = [max(0, side - crop) for side, crop in zip(classes.shape, self.crop, strict=True)]
        for _ in range(TRIES):
            top, left = (random.randint(0, most) for most in room)
            if room == [0, 0] or self.class_share == 1:
                break
            part = classes[top : top + self.crop[0], left : left + self.crop[1]]
            counts = part[part != self.ignore_index].bincount()
            if len(counts) and counts.max() <= self.class_share * counts.sum():
                break
        return top, left

    def _padded(self, image: Tensor, mask: Tensor) -> Sample:
        """Up to the size of the crop, at the end: the mean colour, and no class."""
        missing = [crop - side for crop, side in zip(self.crop, mask.shape, strict=True)]
        ends = (0, missing[1], 0, missing[0])
        image = nn_functional.pad(image, ends)
        return image, nn_functional.pad(mask, ends, value=self.ignore_index)


def scaled(image: Tensor, shorter: float) -> list[int]:
    """Height and width at which the shorter side is so long."""
    height, width = image.shape[-2:]
    factor = shorter / min(height, width)
    return [max(1, round(height * factor)), max(1, round(width * factor))]


def resize_mask(mask: Tensor, size: list[int]) -> Tensor:
    """A mask (H, W) at another size, of the classes at the nearest centres."""
    return F.resize_image(mask[None], size, InterpolationMode.NEAREST_EXACT)[0]


def distort(image: Tensor, probability: float) -> Tensor:
    """Brightness, contrast, saturation and hue changed, each with a probability.

    The ranges are the usual ones of segmentation, after Liu et al., "SSD", ECCV 2016.
    """
    for kind, most in (("brightness", 0.125), ("contrast", 0.5), ("saturation", 0.5), ("hue", 0.1)):
        if random.random() < probability:
            image = v2.ColorJitter(**{kind: most})(image)
    return image
