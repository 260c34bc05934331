"""Detectors by name: torchvision's, and cascades, on a pyramid of any network's maps.

RetinaNet: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017. Faster R-CNN: Ren et al.,
NeurIPS 2015. Mask R-CNN: He et al., ICCV 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from acmix.detection._torchvision import set_box_loss
from acmix.detection.cascade import BoxLoss, CascadeHeads
from acmix.detection.heads import BoxHead, Heads
from acmix.detection.pyramid import (
    Norm,
    Pyramid,
    Resize,
    at_least_float32,
    batch_norms,
    norm_layer,
    with_norm,
)
from acmix.models.features import Features, create_features
from acmix.ops._checks import check_choice

DetectorName = Literal["retinanet", "faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn"]
DETECTORS: tuple[str, ...] = get_args(DetectorName)
BackboneNorm = Literal["batch", "frozen", "group", "sync"]
SIZES = (32, 64, 128, 256, 512)
RATIOS = (0.5, 1.0, 2.0)
FEATURES = "model.backbone.features."  # where a detector has its network
OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))  # RetinaNet's anchors of a level
# What gives scores, boxes and masks.
PREDICTORS = (RetinaNetHead, RPNHead, FastRCNNPredictor, MaskRCNNPredictor)


class Detector(nn.Module):
    """A detector whose classes are numbered from 0, whatever it does with a background.

    In training, `forward` returns losses by name; in eval mode a dict an image, in pixels of the
    image as it was given: boxes (N, 4) as x1, y1, x2, y2, scores (N,), labels (N,) and, of a
    detector with masks, masks (N, 1, H, W) in [0, 1].
    """

    def __init__(self, model: nn.Module, background: bool, frozen_norms: bool) -> None:
        """model: of torchvision; background: whether its class 0 is that."""
        super().__init__()
        self.model = model
        for module in model.modules():
            if isinstance(module, PREDICTORS):
                module.register_forward_hook(widen)
        self.first = int(background)
        self.frozen_norms = frozen_norms
        if frozen_norms:
            for norm in batch_norms(self.features):
                norm.requires_grad_(False)
        self.train()

    @property
    def features(self) -> Features:
        """The network whose maps the pyramid is built on."""
        return self.model.backbone.features  # type: ignore[union-attr, return-value]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that go without weight decay, as `timm.optim` asks."""
        return {f"{FEATURES}{key}" for key in self.features.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Any:
        """The layer of a parameter, for layer-wise learning rates; all but the network is last."""
        return lambda key: self.features.layer_of(key.removeprefix(FEATURES))

    def train(self, mode: bool = True) -> Detector:
        super().train(mode)
        if self.frozen_norms:
            for norm in batch_norms(self.features):
                norm.eval()
        return self

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> Any:
        """Detect, or learn.

        Args:
            images: (C, H, W) each, normalised, of any size.
            targets: In training, of each image: boxes (N, 4), labels (N,) and, of a detector with
                masks, masks (N, H, W).
        """
        if targets is not None:
            targets = [{**of, "labels": of["labels"] + self.first} for of in targets]
        found = self.model(list(images), targets)
        if self.training:
            return found
        return [{**of, "labels": of["labels"] - self.first} for of in found]


def create_detector(
    name: str,
    detector: DetectorName = "retinanet",
    num_classes: int = 80,
    in_chans: int = 3,
    model_kwargs: dict[str, Any] | None = None,
    test_size: int = 800,
    max_size: int = 1333,
    width: int = 256,
    backbone_norm: BackboneNorm = "batch",
    head_norm: Norm | None = None,
    anchor_sizes: Sequence[int] = SIZES,
    aspect_ratios: Sequence[float] = RATIOS,
    box_head: BoxHead = "mlp",
    box_loss: BoxLoss | None = None,
    class_agnostic: bool = True,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    max_detections: int = 100,
) -> Detector:
    """A detector on a network.

    Args:
        name: Network, as `timm.create_model` knows it.
        detector: One of `DETECTORS`.
        num_classes: Classes, without a background.
        in_chans: Channels of the images.
        model_kwargs: Further arguments of the network's constructor.
        test_size: Shorter side to which images are brought in eval mode, in pixels.
        max_size: Most that the longer side may then have.
        width: Channels of the pyramid.
        backbone_norm: What becomes of the network's batch norms: as they are, frozen, or others.
        head_norm: Norm in the pyramid and in the heads of convolutions.
        anchor_sizes: Sides of the anchors of each of five levels, in pixels; RetinaNet's have two
            more sizes each.
        aspect_ratios: Height over width of the anchors.
        box_head: Two linear layers, or four convolutions and one.
        box_loss: smooth_l1 or giou, of RetinaNet and the cascades; by default L1 of RetinaNet, as
            in torchvision, and smooth_l1 of the cascades.
        class_agnostic: Whether a cascade moves boxes alike for every class.
        score_threshold: Least score of a detection.
        nms_threshold: Most overlap (IoU) of two detections of a class.
        max_detections: Of an image.

    Raises:
        ValueError: For an option that the detector does not have.
    """
    choices = {
        "detector": (detector, DETECTORS),
        "backbone_norm": (backbone_norm, get_args(BackboneNorm)),
        "head_norm": (head_norm, get_args(Norm)),
        "box_head": (box_head, get_args(BoxHead)),
        "box_loss": (box_loss, get_args(BoxLoss)),
    }
    for option, (value, known) in choices.items():
        if value is not None:
            check_choice(option, value, known)
    check_goes_together(detector, anchor_sizes, aspect_ratios, box_head, box_loss)
    one_stage = detector == "retinanet"
    strides = (8, 16, 32) if one_stage else (4, 8, 16, 32)
    features = create_features(name, in_chans, strides, model_kwargs)
    features.body = with_norm(features.body, backbone_norm)
    coarser = LastLevelP6P7(features.channels[-1], width) if one_stage else LastLevelMaxPool()
    pyramid = Pyramid(features, width, coarser, norm_layer(head_norm))
    if one_stage:
        model = _retinanet(
            pyramid,
            num_classes,
            anchors(anchor_sizes, aspect_ratios, OCTAVES),
            head_norm,
            box_loss,
            score_thresh=score_threshold,
            nms_thresh=nms_threshold,
            detections_per_img=max_detections,
        )
    else:
        ends: dict[str, Any] = {
            "score_threshold": score_threshold,
            "nms_threshold": nms_threshold,
            "max_detections": max_detections,
        }
        generator = anchors(anchor_sizes, aspect_ratios)
        heads = Heads(width, num_classes + 1, box_head, head_norm, "mask" in detector)
        if "cascade" in detector:
            model = FasterRCNN(pyramid, num_classes + 1, rpn_anchor_generator=generator)
            model.roi_heads = CascadeHeads(heads, class_agnostic, box_loss or "smooth_l1", **ends)
        else:
            model = _two_stages(pyramid, heads, generator, ends)
    model.transform = Resize(test_size, max_size, in_chans)
    return Detector(model, background=not one_stage, frozen_norms=backbone_norm == "frozen")


def check_goes_together(
    detector: str,
    anchor_sizes: Sequence[int],
    aspect_ratios: Sequence[float],
    box_head: str,
    box_loss: str | None,
) -> None:
    if len(anchor_sizes) != len(SIZES):
        raise ValueError(
            f"anchor_sizes: expected {len(SIZES)}, one a level, got {len(anchor_sizes)}"
        )
    if not aspect_ratios:
        raise ValueError("aspect_ratios: expected one at least, got none")
    if box_loss is not None and detector in ("faster_rcnn", "mask_rcnn"):
        raise ValueError(f"box_loss: expected none with {detector}, got {box_loss}")
    if box_head != "mlp" and detector == "retinanet":
        raise ValueError(f"box_head: expected mlp with {detector}, which has none, got {box_head}")


class Anchors(AnchorGenerator):
    """torchvision's, which are never less precise than float32, as maps under autocast are.

    bfloat16 knows no odd number of pixels above 256.
    """

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.promote_types(dtype, torch.float32), device)


def widen(module: nn.Module, args: Any, output: Any) -> Any:
    """What a module gives, which autocast made less precise than boxes are."""
    if isinstance(output, dict):
        return {key: widen(module, args, of) for key, of in output.items()}
    if isinstance(output, list | tuple):
        return type(output)(widen(module, args, of) for of in output)
    return at_least_float32(output)


def anchors(
    sizes: Sequence[int], ratios: Sequence[float], scales: Sequence[float] = (1.0,)
) -> AnchorGenerator:
    """Anchors of each level: all sides of it in all ratios."""
    of_levels = tuple(tuple(int(size * scale) for scale in scales) for size in sizes)
    return Anchors(of_levels, (tuple(ratios),) * len(sizes))


def _retinanet(
    pyramid: Pyramid,
    num_classes: int,
    generator: AnchorGenerator,
    head_norm: Norm | None,
    box_loss: BoxLoss | None,
    **kwargs: Any,
) -> RetinaNet:
    per_place = generator.num_anchors_per_location()[0]
    head = RetinaNetHead(pyramid.out_channels, per_place, num_classes, norm_layer(head_norm))
    model = RetinaNet(pyramid, num_classes, anchor_generator=generator, head=head, **kwargs)
    if box_loss:
        set_box_loss(model, box_loss)
    return model


def _two_stages(
    pyramid: Pyramid, heads: Heads, generator: AnchorGenerator, ends: dict[str, Any]
) -> FasterRCNN:
    kwargs = {
        "rpn_anchor_generator": generator,
        "box_roi_pool": heads.box_pool(),
        "box_head": heads.box_head(),
        "box_predictor": heads.box_predictor(),
        "box_score_thresh": ends["score_threshold"],
        "box_nms_thresh": ends["nms_threshold"],
        "box_detections_per_img": ends["max_detections"],
    }
    if not heads.masks:
        return FasterRCNN(pyramid, **kwargs)
    masks = {
        "mask_roi_pool": heads.mask_pool(),
        "mask_head": heads.mask_head(),
        "mask_predictor": heads.mask_predictor(),
    }
    return MaskRCNN(pyramid, **masks, **kwargs)
