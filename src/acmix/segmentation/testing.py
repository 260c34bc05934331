"""What a segmenter says of images: once, or as the mean over windows, scales and mirror images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix.segmentation.blocks import Size, resize, size_of

Network = Callable[[Tensor], Tensor]  # images (B, C, H, W) -> logits (B, classes, H, W)


class Views(NamedTuple):
    """Of an image.

    scales: factors of its size. flip: whether its mirror image is looked at too. window: side of
    the squares, `stride` apart, that the network sees one by one, or None for the whole image.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: int | None = None
    stride: int | None = None  # two thirds of the window


def log_probabilities(
    net: Network, images: Tensor, size: Size, views: Views, align_corners: bool = False
) -> Tensor:
    """Logarithms of the mean probabilities over the views, (B, classes, *size), in float32."""
    total: Tensor | None = None
    for scale in views.scales:
        scaled = rescale(images, scale)
        for mirror in (False, True)[: 1 + views.flip]:
            given = scaled.flip(3) if mirror else scaled
            logits = over_windows(net, given, views) if views.window else net(given)
            logits = logits.flip(3) if mirror else logits
            of_view = resize(logits.float(), size, align_corners).log_softmax(1)
            total = of_view if total is None else torch.logaddexp(total, of_view)
    assert total is not None
    return total - math.log(len(views.scales) * (1 + views.flip))


def rescale(images: Tensor, scale: float) -> Tensor:
    """Images (B, C, H, W) at a multiple of their size, smoothed where that is smaller."""
    size = tuple(max(1, round(side * scale)) for side in size_of(images))
    if size == size_of(images):
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def over_windows(net: Network, images: Tensor, views: Views) -> Tensor:
    """Logits of each pixel, as the mean over the windows that it is in."""
    assert views.window
    stride = views.stride or max(1, 2 * views.window // 3)
    height, width = size_of(images)
    total = counts = torch.zeros((), device=images.device)
    for top in starts(height, views.window, stride):
        for left in starts(width, views.window, stride):
            place = (..., slice(top, top + views.window), slice(left, left + views.window))
            logits = net(images[place]).float()
            if total.ndim == 0:
                total = logits.new_zeros(*logits.shape[:2], height, width)
                counts = logits.new_zeros(height, width)
            total[place] += logits
            counts[place] += 1
    return total / counts


def starts(length: int, window: int, stride: int) -> list[int]:
    """First places of windows that cover a length; the last ends with it."""
    last = max(0, length - window)
    return [*range(0, last, stride), last]
