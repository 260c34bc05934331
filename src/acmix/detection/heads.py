"""What a detector of two stages makes of each box: a class, a better box, a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from acmix.detection.pyramid import Norm, at_least_float32, norm_layer

BoxHead = Literal["mlp", "conv"]
SIDE = 7  # of what is pooled from a box
FEATURES = 1024  # of a box
CONVS = 4
MAPS = ("0", "1", "2", "3")  # that boxes are pooled from
FINEST = 4  # stride of the first of these


class Pool(MultiScaleRoIAlign):
    """torchvision's, at the strides of the maps, which it reads as precisely as boxes are given.

    torchvision takes the strides from the first images that it sees, without their padding, and
    keeps them: at 40 pixels, which are padded to 64, they would come out as half of what they are.
    """

    def __init__(self, side: int) -> None:
        super().__init__(MAPS, output_size=side, sampling_ratio=2)

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        finest = x[MAPS[0]]
        maps = {name: at_least_float32(x[name]) for name in MAPS}
        padded = [(FINEST * finest.shape[-2], FINEST * finest.shape[-1])]
        return super().forward(maps, boxes, padded).to(finest.dtype)


@dataclass(frozen=True)
class Heads:
    """Makes the modules of a stage.

    width: channels of the pyramid. num_classes: with the background. box: two linear layers, or
    four convolutions and one. norm: after the convolutions.
    """

    width: int
    num_classes: int
    box: BoxHead
    norm: Norm | None
    masks: bool

    def box_pool(self) -> Pool:
        return Pool(SIDE)

    def mask_pool(self) -> Pool | None:
        return Pool(2 * SIDE) if self.masks else None

    def box_head(self) -> nn.Module:
        if self.box == "mlp":
            return TwoMLPHead(self.width * SIDE**2, FEATURES)
        pooled = (self.width, SIDE, SIDE)
        return FastRCNNConvFCHead(pooled, [self.width] * CONVS, [FEATURES], norm_layer(self.norm))

    def box_predictor(self, class_agnostic: bool = False) -> nn.Module:
        predictor = FastRCNNPredictor(FEATURES, self.num_classes)
        if class_agnostic:
            predictor.bbox_pred = nn.Linear(FEATURES, 4)
        return predictor

    def mask_head(self) -> nn.Module | None:
        layers = (self.width,) * CONVS
        return MaskRCNNHeads(self.width, layers, 1, norm_layer(self.norm)) if self.masks else None

    def mask_predictor(self) -> nn.Module | None:
        width = self.width
        return MaskRCNNPredictor(width, width, self.num_classes) if self.masks else None
