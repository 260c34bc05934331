"""Detection of objects by their boxes, and masks, with any timm network, ours included."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from acmix.analysis import objects
from acmix.data import DetectionData, ImageData
from acmix.detection import create_detector
from acmix.detection.cascade import BoxLoss
from acmix.detection.detectors import RATIOS, SIZES, BackboneNorm, DetectorName
from acmix.detection.heads import BoxHead
from acmix.detection.pyramid import Norm
from acmix.ranges import Part, Positive, PositiveCount
from acmix.tasks.average_precision import RECALLS, AveragePrecision, Summary
from acmix.tasks.base import naming_network, nested
from acmix.tasks.classification import to_picture
from acmix.tasks.dense import DenseTask
from acmix.tasks.held_out import HeldOut, Row

Images = list[Tensor]
Targets = list[dict[str, Tensor]]
Batch = tuple[Images, Targets]
SHOWN = 8
SIDES = ("left", "top", "right", "bottom")
OF_A_CLASS = ("ap", "ap50", "ap75", "ar100")
MASKED = 0.5  # probability from which a pixel is of the object
# What a loss of a detector is part of; a cascade has one of each for every stage.
PARTS = {
    "classification": "class_loss",
    "loss_classifier": "class_loss",
    "class": "class_loss",
    "bbox_regression": "box_loss",
    "loss_box_reg": "box_loss",
    "box": "box_loss",
    "loss_mask": "mask_loss",
    "mask": "mask_loss",
    "loss_objectness": "proposal_loss",
    "loss_rpn_box_reg": "proposal_loss",
}


class Detection(DenseTask):
    """A detector on a network by its timm name."""

    task: ClassVar[str] = "detection"
    data_class: ClassVar[type[ImageData]] = DetectionData  # type: ignore[type-abstract]
    from_data: ClassVar[tuple[str, ...]] = ("class_names", "in_chans", "test_size", "max_size")
    monitor: ClassVar[str] = "val_ap"
    measure: ClassVar[str] = "AP"

    def __init__(
        self,
        name: str,
        class_names: list[str],
        test_size: PositiveCount = 800,
        max_size: PositiveCount = 1333,
        detector: DetectorName = "retinanet",
        width: PositiveCount = 256,
        backbone_norm: BackboneNorm = "batch",
        head_norm: Norm | None = None,
        anchor_sizes: list[PositiveCount] = list(SIZES),  # noqa: B006
        aspect_ratios: list[Positive] = list(RATIOS),  # noqa: B006
        box_head: BoxHead = "mlp",
        box_loss: BoxLoss | None = None,
        class_agnostic: bool = True,
        score_threshold: Part = 0.05,
        nms_threshold: Part = 0.5,
        max_detections: PositiveCount = 100,
        **kwargs: Any,
    ) -> None:
        """Build the network.

        Args:
            name: Network, as `timm.create_model` knows it.
            class_names: Names of the classes in the order of the labels; taken from the data.
            test_size: Shorter side of held-out images as the detector sees them; taken from the
                data.
            max_size: Most that their longer side may then have; taken from the data.
            detector: RetinaNet; Faster or Mask R-CNN; a cascade of either.
            width: Channels of the feature pyramid and of the heads on it.
            backbone_norm: What becomes of the network's batch norms: batch leaves them, frozen
                keeps weights and statistics as they are, group and sync replace them.
            head_norm: Norm in the pyramid and after convolutions of the heads.
            anchor_sizes: Sides of the anchors of each of five levels, in pixels of the image as
                the detector sees it; RetinaNet's have two more sizes each.
            aspect_ratios: Heights of the anchors over their widths.
            box_head: Of two stages and of cascades: two linear layers, or four convolutions and
                one.
            box_loss: Of RetinaNet, by default L1, and of cascades, by default smooth L1.
            class_agnostic: Whether a cascade moves a box alike for every class.
            score_threshold: Least score of a detection.
            nms_threshold: Most overlap (IoU) of two detections of one class.
            max_detections: Of an image.
            kwargs: What every task takes, see `Task`.
        """
        super().__init__(name, class_names, **kwargs)
        self.val_metric = AveragePrecision(len(class_names), self.has_masks)
        self.test_metric = AveragePrecision(len(class_names), self.has_masks)
        self.latest: dict[str, Summary] = {}  # of the latest validation

    def create_net(self) -> nn.Module:
        hp = self.hparams
        known = inspect.signature(create_detector).parameters
        options = {key: hp[key] for key in known if key in hp}
        options["model_kwargs"] = nested(hp["model_kwargs"] or {})
        with naming_network(hp["name"], known):
            return create_detector(num_classes=len(self.class_names), **options)

    @property
    def has_masks(self) -> bool:
        return "mask" in self.hparams["detector"]

    @property
    def averages(self) -> tuple[str, ...]:
        masks = ("mask_loss",) if self.has_masks else ()
        proposals = () if self.hparams["detector"] == "retinanet" else ("proposal_loss",)
        return ("class_loss", "box_loss", *masks, *proposals)

    @property
    def measures(self) -> list[str]:
        names = [f"ap{of}" for of in ("", "50", "75", "_small", "_medium", "_large")]
        names += [f"ar{of}" for of in ("1", "10", "100", "_small", "_medium", "_large")]
        kinds = ("val_", "val_mask_") if self.has_masks else ("val_",)
        return [
            *("train_loss", *(f"train_{name}" for name in self.averages)),
            *(f"{kind}{name}" for kind in kinds for name in names),
        ]

    def look_at(self, data: ImageData) -> None:
        data.with_masks = self.has_masks  # type: ignore[attr-defined]

    def step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets = batch
        losses = self(images, targets)
        sums = {name: torch.zeros_like(next(iter(losses.values()))) for name in self.averages}
        for name, loss in losses.items():
            part = PARTS[name] if name in PARTS else PARTS[name.rpartition("_")[0]]
            sums[part] = sums[part] + loss.detach() * len(images)
        return torch.stack(list(losses.values())).sum(), sums

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        return {"found": self._evaluate(batch, self.val_metric)}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.test_metric)

    def _evaluate(self, batch: Batch, metric: AveragePrecision) -> Targets:
        images, targets = batch
        found = self.detect(images)
        metric.update(found, targets)
        return found

    def look(self, images: Images) -> Targets:
        return self.detect(images)

    def detect(self, images: Images) -> Targets:
        """Of each image boxes (N, 4), scores (N,), labels (N,) and masks (N, H, W) of bool."""
        found = []
        for of in self(images):
            if "masks" in of:
                of["masks"] = of["masks"][:, 0] > MASKED
            found.append({**of, "boxes": of["boxes"].float(), "scores": of["scores"].float()})
        return found

    def on_validation_epoch_end(self) -> None:
        self.latest = self._log(self.val_metric, "val")

    def on_test_epoch_end(self) -> None:
        self._log(self.test_metric, "test")

    def _log(self, metric: AveragePrecision, stage: str) -> dict[str, Summary]:
        summaries = metric.summaries()
        metric.reset()
        if not summaries and not self.trainer.sanity_checking:
            raise ValueError("data: expected objects in the images to measure on, got none")
        for kind, summary in summaries.items():
            self.log_dict({f"{stage}_{kind}{key}": of for key, of in summary.measures.items()})
        return summaries

    def predict_step(self, batch: Batch, batch_idx: int) -> list[list[Row]]:
        """Of each image a row a detection, in pixels of the image."""
        return [self._rows_of(found) for found in self.detect(batch[0])]

    def _rows_of(self, found: dict[str, Tensor]) -> list[Row]:
        parts = (found[key].tolist() for key in ("labels", "scores", "boxes"))
        return [
            {
                "class": self.class_names[label],
                "score": round(score, 4),
                **{side: round(at, 2) for side, at in zip(SIDES, box, strict=True)},
            }
            for label, score, box in zip(*parts, strict=True)
        ]

    def rows(self, outputs: list[Any], name: Callable[[int], str]) -> list[Row]:
        images = [rows for batch in outputs for rows in batch]
        return [{"image": name(n), **row} for n, rows in enumerate(images) for row in rows]

    def create_held_out(self) -> HeldOut:
        return Detected(self)

    def draw_batch(self, data: ImageData, batch: Batch) -> Figure:
        images, targets = batch
        return objects.sheet(
            [to_picture(data, image.cpu()) for image in images[:SHOWN]],
            [objects.Marks.of(target) for target in targets[:SHOWN]],
            data.class_names,
            title="Training images of the first step as the detector gets them, augmented",
        )


class Detected(HeldOut):
    """Some images with what is in them and what was found, and the precision of each class."""

    def __init__(self, task: Detection) -> None:
        super().__init__()
        self.task = task

    def reset(self) -> None:
        self.seen = 0
        self.kept: dict[int, tuple[Tensor, objects.Marks, objects.Marks]] = {}

    def __len__(self) -> int:
        return self.seen

    def keep(self, outputs: dict[str, Any], batch: Batch) -> None:
        for image, target, found in zip(*batch, outputs["found"], strict=True):
            self.kept[self.seen] = image, objects.Marks.of(target), objects.Marks.of(found)
            self.seen += 1
            if len(self.kept) > SHOWN:
                del self.kept[max(self.kept, key=_chance)]

    def pictures(self, data: ImageData) -> dict[str, Callable[[], Figure]]:
        if not self.task.latest:
            return {}
        names, box = data.class_names, self.task.latest[""]
        curves = {kind: of.curves for kind, of in self.task.latest.items()}
        return {
            "predictions.png": lambda: self._draw(data),
            "pr_curve.png": lambda: objects.precision_recall(curves, RECALLS, names),
            "classes.png": lambda: objects.classes(self.class_rows(names), box.measures["ap"]),
        }

    def tables(self, data: ImageData) -> dict[str, list[Row]]:
        return {"classes.csv": self.class_rows(data.class_names)} if self.task.latest else {}

    def class_rows(self, names: list[str]) -> list[Row]:
        """Objects and precision of each class; None where it has no object."""
        rows: list[Row] = []
        for label, name in enumerate(names):
            row: Row = {"class": name, "objects": self.task.latest[""].objects[label]}
            for kind, summary in self.task.latest.items():
                measures = summary.of_class.get(label, {})
                row |= {f"{kind}{key}": measures.get(key) for key in OF_A_CLASS}
            rows.append(row)
        return rows

    def _draw(self, data: ImageData) -> Figure:
        kept = [self.kept[place] for place in sorted(self.kept)]
        return objects.predictions(
            [to_picture(data, image.cpu()) for image, _, _ in kept],
            [truth for _, truth, _ in kept],
            [found for _, _, found in kept],
            data.class_names,
            title=f"{len(kept)} of {self.seen} held-out images: what is there, and what was found",
        )


def _chance(place: int) -> float:
    """A number for each place, which does not depend on how many there are."""
    return random.Random(place).random()
