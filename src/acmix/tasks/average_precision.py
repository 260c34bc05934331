"""COCO's average precision of boxes and masks, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

# COCO's own numbers, to the last digit: torchmetrics makes them in float32, where 0.1 is less, and
# the recall of one object in ten falls beside it.
IOUS = np.linspace(0.5, 0.95, 10).tolist()
RECALLS = np.linspace(0.0, 1.0, 101).tolist()
DETECTIONS = [1, 10, 100]
SIZES = ("all", "small", "medium", "large")  # by the area of the annotation
ALL, MOST = 0, -1  # places of all sizes, and of the most detections
NONE = -1.0  # COCO's word for a class, or a size, that has no object


class Summary(NamedTuple):
    """Of boxes or of masks, over all held-out images.

    measures: ap, ap50, ap75, ap_small, ..., ar1, ar10, ar100, ar_small, ..., of what has objects.
    of_class: by index of a class with objects, ap, ap50, ap75, ar1, ar10 and ar100.
    objects: by index of a class; crowds do not count.
    curves: by index of a class with objects, the precision (101,) at IoU 0.5 for each of `RECALLS`.
    """

    measures: dict[str, float]
    of_class: dict[int, dict[str, float]]
    curves: dict[int, np.ndarray]
    objects: list[int]


class AveragePrecision(MeanAveragePrecision):
    """torchmetrics' metric at COCO's thresholds, exactly, and by class in one evaluation."""

    def __init__(self, classes: int, masks: bool = False) -> None:
        """masks: whether of masks too, which detections and targets then have."""
        super().__init__(
            iou_type=("bbox", "segm") if masks else ("bbox",),
            iou_thresholds=IOUS,
            rec_thresholds=RECALLS,
            max_detection_thresholds=DETECTIONS,
            extended_summary=True,
            backend="faster_coco_eval",
            sync_on_compute=False,
        )
        self.warn_on_many_detections = False
        self.add_state("objects", torch.zeros(classes, dtype=torch.long), dist_reduce_fx="sum")
        self.objects: Tensor
        self.kinds = {"": "bbox_", "mask_": "segm_"} if masks else {"": ""}

    def update(self, preds: list[dict[str, Tensor]], target: list[dict[str, Tensor]]) -> None:
        super().update(preds, target)
        for of in target:
            real = of["labels"][~of["iscrowd"].bool()] if "iscrowd" in of else of["labels"]
            self.objects += real.bincount(minlength=len(self.objects))

    def compute(self) -> dict[str, Any]:
        return {**super().compute(), "objects": self.objects.clone()}

    def _gather(self) -> None:
        """What all processes saw, in the order in which one would have seen it.

        torchmetrics' own way expects as many images of each.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        own = apply_to_collection(
            {name: getattr(self, name) for name in self._defaults}, Tensor, Tensor.cpu
        )
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        for name, value in own.items():
            of = [part[name] for part in parts]
            if isinstance(value, Tensor):
                setattr(self, name, torch.stack(of).sum(0))
            else:
                turns = zip_longest(*of)
                setattr(self, name, [one for turn in turns for one in turn if one is not None])

    def summaries(self) -> dict[str, Summary]:
        """By the prefix of the kind: "" of boxes, "mask_" of masks; none where there is no object.

        Every process takes part, and gets the same; then the metric is to be reset.
        """
        self._gather()
        found = self.compute()
        classes = found["classes"].flatten().tolist()  # of one class a scalar
        objects = found["objects"].flatten().tolist()
        summaries = {}
        for kind, key in self.kinds.items():
            precision, recall = found[f"{key}precision"].numpy(), found[f"{key}recall"].numpy()
            summaries[kind] = _summary(precision, recall, classes, objects)
        return {kind: of for kind, of in summaries.items() if of.measures}


def _summary(
    precision: np.ndarray, recall: np.ndarray, classes: list[int], objects: list[int]
) -> Summary:
    """precision: by IoU, recall, class, size, detections; recall: the same without the second."""
    known = precision[0, 0, :, ALL, MOST] > NONE
    with_objects = np.flatnonzero(known)
    of_class = {
        classes[place]: dict(_measures(precision[:, :, [place]], recall[:, [place]], ("all",)))
        for place in with_objects
    }
    curves = {classes[place]: precision[0, :, place, ALL, MOST] for place in with_objects}
    return Summary(dict(_measures(precision, recall, SIZES)), of_class, curves, objects)


def _measures(
    precision: np.ndarray, recall: np.ndarray, sizes: tuple[str, ...]
) -> Iterator[tuple[str, float]]:
    """Means over the classes that have objects; nothing where none has."""
    parts: dict[str, Any] = {
        "ap": precision[..., ALL, MOST],
        "ap50": precision[0, ..., ALL, MOST],
        "ap75": precision[IOUS.index(0.75), ..., ALL, MOST],
        **{f"ap_{size}": precision[..., n, MOST] for n, size in enumerate(sizes) if n},
        **{f"ar{most}": recall[..., ALL, n] for n, most in enumerate(DETECTIONS)},
        **{f"ar_{size}": recall[..., n, MOST] for n, size in enumerate(sizes) if n},
    }
    for name, values in parts.items():
        known = values[values > NONE]
        if known.size:
            yield name, float(known.mean())
