"""Semantic FPN: a feature pyramid whose levels are brought to the finest and summed.

Kirillov, Girshick, He and Dollar, "Panoptic Feature Pyramid Networks", CVPR 2019, section 3.2.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from acmix.segmentation.blocks import Classifier, ConvNorm, resize, size_of

WIDTH, BRANCH_WIDTH = 256, 128


class SemanticFPN(nn.Module):
    """Maps of strides 4, 8, 16, ... -> logits at the stride of the first."""

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        width: int = WIDTH,
        branch_width: int = BRANCH_WIDTH,
        norm: str = "group",
        dropout: float = 0.0,
        align_corners: bool = False,
    ) -> None:
        """Build the decoder.

        Args:
            channels: Of the maps, the finest first.
            num_classes: Classes.
            width: Of the pyramid.
            branch_width: Of the convolutions that bring a level to the finest.
            norm: In these: batch, group, layer or sync. The paper's is group.
            dropout: Of channels before the last layer.
            align_corners: Whether the corners of maps coincide when they are resized, instead of
                their borders.
        """
        super().__init__()
        self.align_corners = align_corners
        self.pyramid = FeaturePyramidNetwork(list(channels), width)
        self.branches = nn.ModuleList(
            _branch(width, branch_width, max(1, level), norm) for level in range(len(channels))
        )
        self.classifier = Classifier(branch_width, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: (B, C, H / stride, W / stride) each, the finest first."""
        named = OrderedDict((str(level), of) for level, of in enumerate(maps))
        levels = list(self.pyramid(named).values())
        sizes = [size_of(of) for of in levels]
        total = torch.zeros_like(levels[0][:, :1])
        for level, (branch, of) in enumerate(zip(self.branches, levels, strict=True)):
            convs: Any = branch
            for stage, conv in enumerate(convs, 1):
                # Twice as large, which is the size of the next finer map.
                of = resize(conv(of), sizes[max(0, level - stage)], self.align_corners)
            total = total + of
        return self.classifier(total)


def _branch(width: int, branch_width: int, stages: int, norm: str) -> nn.ModuleList:
    """As many convolutions as a level is to be doubled, at least one."""
    widths = [width] + [branch_width] * stages
    return nn.ModuleList(ConvNorm(*pair, 3, norm) for pair in pairwise(widths))
