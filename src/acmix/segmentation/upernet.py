"""UPerNet: a feature pyramid above a pyramid pooling, and an auxiliary head for training.

Xiao, Liu, Zhou, Jiang and Sun, "Unified Perceptual Parsing for Scene Understanding", ECCV 2018. The
pooling and the auxiliary head are those of Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix.segmentation.blocks import Classifier, ConvNorm, resize, size_of

WIDTH, AUXILIARY_WIDTH = 512, 256
BINS = (1, 2, 3, 6)


class PyramidPooling(nn.Module):
    """Means of a map over grids of several sizes beside the map: (B, in, H, W) -> (B, C, H, W)."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        norm: str,
        align_corners: bool = False,
        bins: Sequence[int] = BINS,
    ) -> None:
        super().__init__()
        self.bins, self.align_corners = tuple(bins), align_corners
        self.branches = nn.ModuleList(ConvNorm(in_channels, width, 1, norm) for _ in bins)
        self.fuse = ConvNorm(in_channels + len(bins) * width, width, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for side, branch in zip(self.bins, self.branches, strict=True):
            pooled = branch(F.adaptive_avg_pool2d(x, side))
            parts.append(resize(pooled, size_of(x), self.align_corners))
        return self.fuse(torch.cat(parts, 1))


class UPerNet(nn.Module):
    """Maps of strides 4, 8, 16, ... -> logits at the stride of the first."""

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        width: int = WIDTH,
        norm: str = "batch",
        dropout: float = 0.0,
        align_corners: bool = False,
    ) -> None:
        """Build the decoder.

        Args:
            channels: Of the maps, the finest first.
            num_classes: Classes.
            width: Of all its convolutions.
            norm: In these: batch, group, layer or sync. The paper's is batch, over all processes.
            dropout: Of channels before the last layer.
            align_corners: Whether the corners of maps coincide when they are resized, instead of
                their borders.
        """
        super().__init__()
        *finer, last = channels
        self.align_corners = align_corners
        self.pooling = PyramidPooling(last, width, norm, align_corners)
        self.laterals = nn.ModuleList(ConvNorm(of, width, 1, norm) for of in finer)
        self.outputs = nn.ModuleList(ConvNorm(width, width, 3, norm) for _ in finer)
        self.fuse = ConvNorm(len(channels) * width, width, 3, norm)
        self.classifier = Classifier(width, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: (B, C, H / stride, W / stride) each, the finest first."""
        *finer, last = maps
        level = self.pooling(last)
        levels = [level]
        for x, lateral, output in reversed(
            list(zip(finer, self.laterals, self.outputs, strict=True))
        ):
            level = lateral(x) + resize(level, size_of(x), self.align_corners)
            levels.append(output(level))
        size = size_of(maps[0])
        same = [resize(level, size, self.align_corners) for level in reversed(levels)]
        return self.classifier(self.fuse(torch.cat(same, 1)))


class AuxiliaryHead(nn.Module):
    """A head of one convolution whose loss helps to train the map below: -> logits of its size."""

    def __init__(
        self, in_channels: int, num_classes: int, width: int, norm: str, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.conv = ConvNorm(in_channels, width, 3, norm)
        self.classifier = Classifier(width, num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, H, W)."""
        return self.classifier(self.conv(x))
