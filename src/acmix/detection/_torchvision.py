"""What is not public in torchvision's detectors; tests/detection/test_torchvision.py holds it."""

from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    maskrcnn_inference,
    maskrcnn_loss,
)
from torchvision.models.detection.transform import GeneralizedRCNNTransform

__all__ = [
    "GeneralizedRCNNTransform",
    "RoIHeads",
    "maskrcnn_inference",
    "maskrcnn_loss",
    "set_box_loss",
]


def set_box_loss(model: RetinaNet, name: str) -> None:
    """Of RetinaNet's regression: "l1", "smooth_l1" or "giou"."""
    model.head.regression_head._loss_type = name
