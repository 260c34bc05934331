"""Heads in a cascade, each of which starts from the boxes of the one before.

Cai and Vasconcelos, "Cascade R-CNN: Delving into High Quality Object Detection", CVPR 2018, and its
extension to masks, "Cascade R-CNN: High Quality Object Detection and Instance Segmentation", TPAMI
2019.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss
from torchvision.ops.boxes import clip_boxes_to_image, remove_small_boxes

from acmix.detection._torchvision import RoIHeads, maskrcnn_inference, maskrcnn_loss
from acmix.detection.heads import Heads

IOUS = (0.5, 0.6, 0.7)
LOSS_WEIGHTS = (1.0, 0.5, 0.25)
BOX_WEIGHTS = (10.0, 20.0, 30.0)  # of the centre; the sides' are half of these
GIOU_WEIGHT = 10.0  # of boxes beside classes, as is the custom with this loss
BoxLoss = Literal["smooth_l1", "giou"]
Targets = list[dict[str, Tensor]]
Shapes = list[tuple[int, int]]


class Samples(NamedTuple):
    """Boxes to learn from, by image."""

    boxes: list[Tensor]  # (N, 4)
    matched: list[Tensor]  # (N,): the object of the image
    labels: list[Tensor]  # (N,): its class; 0 is the background
    codes: list[Tensor]  # (N, 4): what leads from the box to the object's


class CascadeHeads(nn.Module):
    """Stages that detect, each with a stricter idea of what a found object is.

    At test the scores of all stages, each on its own boxes, are averaged, and so are the masks on
    the boxes of the last stage.
    """

    def __init__(
        self,
        heads: Heads,
        class_agnostic: bool = True,
        box_loss: BoxLoss = "smooth_l1",
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        """Build the stages.

        Args:
            heads: Makes the modules of each.
            class_agnostic: Whether a stage moves a box alike for every class.
            box_loss: Of the codes of the boxes (smooth_l1) or of the boxes themselves (giou).
            score_threshold: Least score of a detection.
            nms_threshold: Most overlap of two detections of a class.
            max_detections: Of an image.
        """
        super().__init__()
        self.num_classes = heads.num_classes
        self.class_agnostic = class_agnostic
        self.box_loss = box_loss
        self.has_masks = heads.masks
        self.stages = nn.ModuleList(
            RoIHeads(
                heads.box_pool(),
                heads.box_head(),
                heads.box_predictor(class_agnostic),
                fg_iou_thresh=iou,
                bg_iou_thresh=iou,
                batch_size_per_image=512,
                positive_fraction=0.25,
                bbox_reg_weights=(weight, weight, weight / 2, weight / 2),
                score_thresh=score_threshold,
                nms_thresh=nms_threshold,
                detections_per_img=max_detections,
                mask_roi_pool=heads.mask_pool(),
                mask_head=heads.mask_head(),
                mask_predictor=heads.mask_predictor(),
            )
            for iou, weight in zip(IOUS, BOX_WEIGHTS, strict=True)
        )

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: Shapes,
        targets: Targets | None = None,
    ) -> tuple[Targets, dict[str, Tensor]]:
        """As torchvision's `RoIHeads`: detections in eval mode, losses in training."""
        if self.training:
            assert targets is not None
            return [], dict(self._losses(features, proposals, image_shapes, targets))
        return self._detections(features, proposals, image_shapes), {}

    def _losses(
        self, features: dict[str, Tensor], boxes: list[Tensor], shapes: Shapes, targets: Targets
    ) -> Iterator[tuple[str, Tensor]]:
        for number, (stage, weight) in enumerate(zip(self.stages, LOSS_WEIGHTS, strict=True), 1):
            samples = Samples(*stage.select_training_samples(boxes, targets))  # type: ignore[operator]
            logits, codes = outputs(stage, features, samples.boxes, shapes)
            yield f"class_{number}", weight * class_loss(logits, torch.cat(samples.labels))
            yield f"box_{number}", weight * self._box_loss(stage, codes, samples, targets)
            if self.has_masks:
                yield (
                    f"mask_{number}",
                    weight * mask_loss(stage, features, samples, shapes, targets),
                )
            labels = torch.cat(samples.labels)
            likeliest = torch.where(labels > 0, labels, likeliest_class(logits))
            boxes = self._refined(stage, codes.detach(), likeliest, samples.boxes, shapes)
            boxes = [
                without_objects(refined, sampled, target["boxes"])
                for refined, sampled, target in zip(boxes, samples.boxes, targets, strict=True)
            ]

    def _box_loss(
        self, stage: nn.Module, codes: Tensor, samples: Samples, targets: Targets
    ) -> Tensor:
        """Over the boxes that have an object, divided by all boxes."""
        labels = torch.cat(samples.labels)
        rows = torch.where(labels > 0)[0]
        found = self._of_classes(codes[rows], labels[rows])
        if self.box_loss == "smooth_l1":
            wanted = torch.cat(samples.codes)[rows]
            return F.smooth_l1_loss(found, wanted, reduction="sum") / max(1, len(labels))
        objects = [
            target["boxes"][matched] if len(target["boxes"]) else boxes
            for target, matched, boxes in zip(targets, samples.matched, samples.boxes, strict=True)
        ]
        start = torch.cat(samples.boxes)[rows]
        decoded = stage.box_coder.decode_single(found, start)  # type: ignore[union-attr, operator]
        loss = generalized_box_iou_loss(decoded, torch.cat(objects)[rows], reduction="sum")
        return GIOU_WEIGHT * loss / max(1, len(labels))

    def _refined(
        self,
        stage: nn.Module,
        codes: Tensor,
        labels: Tensor,
        boxes: list[Tensor],
        shapes: Shapes,
    ) -> list[Tensor]:
        """Boxes (N, 4) of each image after a stage, moved as it moves objects of `labels`."""
        codes = self._of_classes(codes, labels)
        moved = stage.box_coder.decode_single(codes, torch.cat(boxes))  # type: ignore[union-attr, operator]
        parts = moved.split([len(of) for of in boxes])
        return [clip_boxes_to_image(of, shape) for of, shape in zip(parts, shapes, strict=True)]

    def _of_classes(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Codes (N, 4) of each box for its class."""
        if self.class_agnostic:
            return codes
        rows = torch.arange(len(codes), device=codes.device)
        return codes.unflatten(1, (-1, 4))[rows, labels]

    def _detections(
        self, features: dict[str, Tensor], boxes: list[Tensor], shapes: Shapes
    ) -> Targets:
        scores: list[Tensor] = []
        for number, stage in enumerate(self.stages, 1):
            logits, codes = outputs(stage, features, boxes, shapes)
            scores.append(logits.softmax(1))
            if number < len(self.stages):
                boxes = self._refined(stage, codes, likeliest_class(logits), boxes, shapes)
        mean = torch.stack(scores).mean(0)
        if self.class_agnostic:
            codes = codes.repeat(1, self.num_classes)
        tiny = torch.finfo(mean.dtype).tiny
        found = stage.postprocess_detections(mean.clamp_min(tiny).log(), codes, boxes, shapes)  # type: ignore[operator]
        detections = [
            {"boxes": of, "scores": score, "labels": label}
            for of, score, label in zip(*found, strict=True)
        ]
        if self.has_masks:
            for detection, masks in zip(
                detections, self._masks(features, detections, shapes), strict=True
            ):
                detection["masks"] = masks
        return detections

    def _masks(
        self, features: dict[str, Tensor], detections: Targets, shapes: Shapes
    ) -> Iterator[Tensor]:
        """Probabilities (N, 1, M, M) of each image, the mean over the stages."""
        boxes = [of["boxes"] for of in detections]
        labels = [of["labels"] for of in detections]
        stages = [
            maskrcnn_inference(mask_logits(stage, features, boxes, shapes), labels)
            for stage in self.stages
        ]
        return (torch.stack(of_image).mean(0) for of_image in zip(*stages, strict=True))


def outputs(
    stage: nn.Module, features: dict[str, Tensor], boxes: list[Tensor], shapes: Shapes
) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and codes (N, 4 or 4 classes) of the boxes of all images."""
    pooled = stage.box_roi_pool(features, boxes, shapes)  # type: ignore[operator]
    return stage.box_predictor(stage.box_head(pooled))  # type: ignore[operator]


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over the boxes; 0 where there are none."""
    return F.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels))


def mask_logits(
    stage: nn.Module, features: dict[str, Tensor], boxes: list[Tensor], shapes: Shapes
) -> Tensor:
    """(N, classes, M, M) of the boxes of all images."""
    pooled = stage.mask_roi_pool(features, boxes, shapes)  # type: ignore[operator]
    return stage.mask_predictor(stage.mask_head(pooled))  # type: ignore[operator]


def mask_loss(
    stage: nn.Module,
    features: dict[str, Tensor],
    samples: Samples,
    shapes: Shapes,
    targets: Targets,
) -> Tensor:
    """Over the boxes that have an object."""
    rows = [torch.where(labels > 0)[0] for labels in samples.labels]
    boxes = [of[some] for of, some in zip(samples.boxes, rows, strict=True)]
    matched = [of[some] for of, some in zip(samples.matched, rows, strict=True)]
    logits = mask_logits(stage, features, boxes, shapes)
    masks = [target["masks"] for target in targets]
    labels = [target["labels"] for target in targets]
    return maskrcnn_loss(logits, boxes, masks, labels, matched)


def likeliest_class(logits: Tensor) -> Tensor:
    """(N,): of the classes without the background, which is 0."""
    return logits[:, 1:].argmax(1) + 1


def without_objects(refined: Tensor, sampled: Tensor, objects: Tensor) -> Tensor:
    """Refined boxes without empty ones, and without those of the objects themselves.

    Every stage adds the objects to its proposals; what it made of them is no proposal.
    """
    is_object = (sampled[:, None] == objects.to(sampled.dtype)[None]).all(2).any(1)
    refined = refined[~is_object]
    return refined[remove_small_boxes(refined, 1e-2)]
