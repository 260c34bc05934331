"""Segmentation: a class for every pixel, with any timm network, ours included."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from acmix.analysis import masks as pictures
from acmix.data import ImageData, SegmentationData
from acmix.ranges import NonNegative, PartBelowOne, Positive, PositiveCount
from acmix.segmentation import create_segmenter
from acmix.segmentation.blocks import Norm, Size, size_of
from acmix.segmentation.segmenter import DecoderName
from acmix.segmentation.testing import Views, log_probabilities
from acmix.tasks import overlap
from acmix.tasks.base import naming_network, nested
from acmix.tasks.classification import to_picture
from acmix.tasks.dense import DenseTask
from acmix.tasks.held_out import HeldOut, Row

Batch = tuple[Tensor, Tensor]
HeldOutBatch = tuple[list[Tensor], list[Tensor]]
SHOWN = 3  # held-out images of each kind
SHEET = 8  # training images
MOST_DRAWN = 50  # classes: more are too small to read
SIDE = 640  # pixels of a mask that is kept to be drawn


class Segmentation(DenseTask):
    """A decoder on a network by its timm name, trained with the cross-entropy of pixels."""

    task: ClassVar[str] = "segmentation"
    data_class: ClassVar[type[ImageData]] = SegmentationData  # type: ignore[type-abstract]
    from_data: ClassVar[tuple[str, ...]] = ("class_names", "in_chans", "ignore_index")
    monitor: ClassVar[str] = "val_miou"
    measure: ClassVar[str] = "mean IoU"

    def __init__(
        self,
        name: str,
        class_names: list[str],
        ignore_index: int = 255,
        decoder: DecoderName = "semantic_fpn",
        width: PositiveCount | None = None,
        head_width: PositiveCount | None = None,
        norm: Norm | None = None,
        dropout: PartBelowOne = 0.0,
        align_corners: bool = False,
        auxiliary_weight: NonNegative = 0.4,
        class_weights: Literal["balanced"] | list[Positive] | None = None,
        test_scales: list[Positive] | None = None,
        flip_test: bool = False,
        window: PositiveCount | None = None,
        window_stride: PositiveCount | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the network.

        Args:
            name: Network, as `timm.create_model` knows it.
            class_names: Names of the classes in the order of the outputs; taken from the data.
            ignore_index: Number of pixels that are neither learned nor measured; taken from the
                data.
            decoder: What makes classes of the network's maps: Semantic FPN or UPerNet.
            width: Channels of the decoder's pyramid; by default 256 of Semantic FPN, 512 of
                UPerNet.
            head_width: Channels of Semantic FPN's branches, by default 128, or of UPerNet's
                auxiliary head, 256.
            norm: Norm in the decoder; by default group of Semantic FPN, batch of UPerNet. sync is
                batch over all processes.
            dropout: Probability that a channel is left out before the last layer.
            align_corners: Whether the corners of maps coincide where they are resized, instead of
                their borders.
            auxiliary_weight: Weight of the loss of UPerNet's auxiliary head; 0 has no such head.
            class_weights: Weight of each class in the training loss, in their order; "balanced"
                weighs each by how rare its pixels are among the training masks.
            test_scales: Measure and predict by the mean of the probabilities at these multiples of
                the size of an image.
            flip_test: Measure and predict by the mean over an image and its mirror image.
            window: Measure and predict by square windows of this side, in pixels, instead of by
                whole images.
            window_stride: Pixels from one window to the next; by default two thirds of it.
            kwargs: What every task takes, see `Task`.
        """
        super().__init__(name, class_names, **kwargs)
        classes = len(self.class_names)
        if isinstance(class_weights, list) and len(class_weights) != classes:
            raise ValueError(
                f"model.class_weights: expected {classes}, one a class, got {len(class_weights)}"
            )
        if window_stride is not None and window_stride > (window or 0):
            most = f"at most the window, {window}" if window else "a window"
            raise ValueError(f"model.window_stride: expected {most}, got {window_stride}")
        if test_scales == []:
            raise ValueError("model.test_scales: expected a scale or more, got none")
        self.views = Views(tuple(test_scales or (1.0,)), flip_test, window, window_stride)
        # In the options, so no part of the state: it may change when a run goes on.
        self.register_buffer("class_weight", None, persistent=False)
        # Lightning's own mean counts images of several processes by whole numbers, rounded down.
        self.held_out_loss = nn.ModuleDict({"val": MeanMetric(), "test": MeanMetric()})
        options: dict[str, Any] = {"ignore_index": ignore_index, "validate_args": False}
        self.val_counts = MulticlassConfusionMatrix(classes, **options)
        self.test_counts = MulticlassConfusionMatrix(classes, **options)
        self.latest: np.ndarray | None = None  # (classes, classes) of the latest validation

    def create_net(self) -> nn.Module:
        hp = self.hparams
        known = inspect.signature(create_segmenter).parameters
        options = {key: hp[key] for key in known if key in hp}
        options["model_kwargs"] = nested(hp["model_kwargs"] or {})
        options["auxiliary"] = hp["auxiliary_weight"] > 0
        with naming_network(hp["name"], known):
            return create_segmenter(num_classes=len(self.class_names), **options)

    @property
    def averages(self) -> tuple[str, ...]:
        return ("pixel_accuracy",)

    @property
    def measures(self) -> list[str]:
        held_out = ("loss", *overlap.MEASURES)
        return ["train_loss", "train_pixel_accuracy", *(f"val_{name}" for name in held_out)]

    def create_held_out(self) -> HeldOut:
        return Segmented(self)

    def draw_batch(self, data: ImageData, batch: Batch) -> Figure:
        images, masks = (part[:SHEET].cpu() for part in batch)
        return pictures.sheet(
            [to_picture(data, image) for image in images],
            [self.to_draw(mask) for mask in masks],
            data.class_names,
            title="Training images of the first step as the network gets them, augmented, "
            "and their masks",
        )

    def to_draw(self, mask: Tensor) -> np.ndarray:
        """A mask to draw, with `pictures.IGNORED` where there is no class."""
        step = -(-max(mask.shape) // SIDE)
        small = mask[::step, ::step].cpu().numpy()
        return np.where(small == self.hparams["ignore_index"], pictures.IGNORED, small)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        weights = self.hparams["class_weights"]
        if stage == "fit" and weights is not None:
            weights = self._balanced() if weights == "balanced" else weights
            self.class_weight = torch.as_tensor(weights, dtype=torch.float32, device=self.device)

    def _balanced(self) -> Tensor:
        """Weights in inverse proportion to the pixels of a class, 1 on average over the pixels."""
        counts = torch.tensor(self.trainer.datamodule.class_counts(), dtype=torch.float64)  # type: ignore[attr-defined]
        return counts.sum() / (len(counts) * counts.clamp_min(1))

    def step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, masks = batch
        logits, auxiliary = self(images)
        loss = self._train_loss(logits, masks)
        if auxiliary is not None:
            loss = loss + self.hparams["auxiliary_weight"] * self._train_loss(auxiliary, masks)
        labelled = masks != self.hparams["ignore_index"]
        right = (classes_of(logits, 1) == masks) & labelled
        accuracy = right.sum() / labelled.sum().clamp_min(1)
        return loss, {"pixel_accuracy": accuracy * len(images)}

    def _train_loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        found = logits.float().log_softmax(1)
        return pixel_loss(found, masks, self.hparams["ignore_index"], self.class_weight)

    def validation_step(self, batch: HeldOutBatch, batch_idx: int) -> dict[str, Any]:
        return {"found": self._evaluate(batch, "val", self.val_counts)}

    def test_step(self, batch: HeldOutBatch, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_counts)

    def _evaluate(
        self, batch: HeldOutBatch, stage: str, counts: MulticlassConfusionMatrix
    ) -> list[Tensor]:
        """Log the loss, count the pixels; return the classes of each image, (H, W)."""
        images, masks = batch
        predicted, losses = [], []
        sizes = [size_of(mask) for mask in masks]
        for found, mask in zip(self.log_probabilities(images, sizes), masks, strict=True):
            losses.append(pixel_loss(found[None], mask[None], self.hparams["ignore_index"]))
            predicted.append(classes_of(found, 0))
            counts.update(predicted[-1], mask)
        loss = torch.stack(losses).mean()
        self.held_out_loss[stage].update(loss, len(images))  # type: ignore[operator]
        self.log(f"{stage}_loss", self.held_out_loss[stage])  # type: ignore[arg-type]
        return predicted

    def on_validation_epoch_end(self) -> None:
        self.latest = self._log(self.val_counts, "val")

    def on_test_epoch_end(self) -> None:
        self._log(self.test_counts, "test")

    def _log(self, counts: MulticlassConfusionMatrix, stage: str) -> np.ndarray:
        found = counts.compute().cpu().numpy()
        counts.reset()
        measured = overlap.measures(found)
        self.log_dict({f"{stage}_{name}": measured[name] for name in overlap.MEASURES})
        return found

    def log_probabilities(
        self, images: Sequence[Tensor], sizes: Sequence[Size]
    ) -> Iterator[Tensor]:
        """Logarithms of the probabilities (classes, H, W) of each image (C, h, w), at its size.

        Images of one size in a row go through the network together.
        """
        align_corners = self.hparams["align_corners"]
        together = groupby(zip(images, sizes, strict=True), key=lambda of: (of[0].shape, of[1]))
        for (_, size), group in together:
            batch = torch.stack([image for image, _ in group])
            yield from log_probabilities(self, batch, size, self.views, align_corners)

    def look(self, images: Sequence[Tensor]) -> list[Tensor]:
        return list(self.segment(images, [size_of(image) for image in images]))

    def segment(self, images: Sequence[Tensor], sizes: Sequence[Size]) -> Iterator[Tensor]:
        """The class of every pixel of each image, (H, W) at its size."""
        return (classes_of(found, 0) for found in self.log_probabilities(images, sizes))

    def predict_step(self, batch: HeldOutBatch, batch_idx: int) -> Tensor:
        """Shares of the classes in each image, (B, classes)."""
        images, masks = batch
        classes = len(self.class_names)
        found = self.segment(images, [size_of(mask) for mask in masks])
        return torch.stack(
            [of.flatten().bincount(minlength=classes) / max(1, of.numel()) for of in found]
        )

    def rows(self, outputs: list[Any], name: Callable[[int], str]) -> list[Row]:
        return [
            {
                "image": name(index),
                **{of: round(share, 6) for of, share in zip(self.class_names, shares, strict=True)},
            }
            for index, shares in enumerate(torch.cat(outputs).tolist())
        ]


def classes_of(scores: Tensor, dim: int) -> Tensor:
    """The class of the highest score; on CPUs five times as fast as `argmax`."""
    return scores.max(dim).indices


def pixel_loss(
    log_probabilities: Tensor, masks: Tensor, ignore_index: int, weight: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the pixels, summed over the labelled ones, over the number of all pixels.

    So every labelled pixel of every image weighs alike, the loss is the mean of those of images of
    one size, and it is 0 where no pixel is labelled.

    Args:
        log_probabilities: (B, classes, H, W).
        masks: (B, H, W), of classes or `ignore_index`.
        ignore_index: Of pixels that are not labelled.
        weight: Of each class, by which its pixels count.
    """
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": "sum"}
    return F.nll_loss(log_probabilities, masks, weight, **options) / max(1, masks.numel())


class Shown(NamedTuple):
    """A held-out image, its mask and what was found in it, to draw."""

    image: Tensor
    truth: np.ndarray
    found: np.ndarray
    miou: float


class Segmented(HeldOut):
    """How the pixels were taken, and some images: those of the lowest mean IoU, and any others."""

    def __init__(self, task: Segmentation) -> None:
        super().__init__()
        self.task = task

    def reset(self) -> None:
        self.seen = 0
        self.kept: dict[int, Shown] = {}

    def __len__(self) -> int:
        return self.seen

    def keep(self, outputs: dict[str, Any], batch: HeldOutBatch) -> None:
        for image, mask, found in zip(*batch, outputs["found"], strict=True):
            miou = overlap.measures(self._counts(mask, found))["miou"]
            shown = (self.task.to_draw(mask), self.task.to_draw(found))
            self.kept[self.seen] = Shown(image.cpu(), *shown, miou)
            self.seen += 1
            chosen = {*self._lowest(), *sorted(self.kept, key=_chance)[: 2 * SHOWN]}
            self.kept = {place: of for place, of in self.kept.items() if place in chosen}

    def _counts(self, mask: Tensor, found: Tensor) -> np.ndarray:
        classes = len(self.task.class_names)
        labelled = mask != self.task.hparams["ignore_index"]
        pairs = mask[labelled] * classes + found[labelled]
        counts = pairs.bincount(minlength=classes * classes)
        return counts.view(classes, classes).cpu().numpy()

    def _lowest(self) -> list[int]:
        return sorted(self.kept, key=lambda place: self.kept[place].miou)[:SHOWN]

    def pictures(self, data: ImageData) -> dict[str, Callable[[], Figure]]:
        counts, names = self.task.latest, data.class_names
        if counts is None or not self.kept:
            return {}
        rows, miou = overlap.per_class(counts, names), overlap.measures(counts)["miou"]
        found = {
            "predictions.png": lambda: self._draw(data),
            "classes.png": lambda: pictures.classes(rows, miou),
        }
        if len(names) <= MOST_DRAWN:
            found["confusion.png"] = lambda: pictures.confusion(counts, names)
        return found

    def tables(self, data: ImageData) -> dict[str, list[Row]]:
        counts = self.task.latest
        if counts is None or not self.kept:
            return {}
        return {"classes.csv": overlap.per_class(counts, data.class_names)}

    def _draw(self, data: ImageData) -> Figure:
        lowest = self._lowest()
        others = [place for place in sorted(self.kept, key=_chance) if place not in lowest]
        shown = [self.kept[place] for place in [*lowest, *others[:SHOWN]]]
        return pictures.predictions(
            [to_picture(data, of.image) for of in shown],
            [of.truth for of in shown],
            [of.found for of in shown],
            [of.miou for of in shown],
            data.class_names,
            title=f"{len(shown)} of {self.seen} held-out images: those of the lowest mean IoU, "
            "then others at random",
        )


def _chance(place: int) -> float:
    """A number for each place, which does not depend on how many there are."""
    return random.Random(place).random()
