"""Image classification with any timm network, ours included, under timm's optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from timm.data import Mixup
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from acmix.analysis import figures
from acmix.data import ClassifiedData, ImageData
from acmix.ranges import NonNegative, PartBelowOne, Positive
from acmix.tasks.base import Task, create_network, naming
from acmix.tasks.held_out import HeldOut, Row

Batch = tuple[Tensor, Tensor]
TOP = 5
SHOWN = 40
MOST_DRAWN = 50  # classes: more are too small to read


class Classification(Task):
    """A network by its timm name, trained with cross-entropy."""

    task: ClassVar[str] = "classification"
    monitor: ClassVar[str] = "val_accuracy"
    measure: ClassVar[str] = "accuracy"
    data_class: ClassVar[type[ImageData]] = ClassifiedData  # type: ignore[type-abstract]

    def __init__(
        self,
        name: str,
        class_names: list[str],
        smoothing: PartBelowOne = 0.1,
        class_weights: Literal["balanced"] | list[Positive] | None = None,
        mixup: NonNegative = 0.0,
        cutmix: NonNegative = 0.0,
        mixup_kwargs: dict[str, Any] | None = None,
        flip_test: bool = False,
        **kwargs: Any,
    ) -> None:
        """Build the network.

        Args:
            name: Network, as `timm.create_model` knows it.
            class_names: Names of the classes in the order of the outputs; taken from the data.
            smoothing: Label smoothing in training; the validation loss is plain cross-entropy.
            class_weights: Weight of each class in the training loss, in their order; "balanced"
                weighs each by how rare it is among the training images.
            mixup: Alpha of mixup; 0 mixes no images.
            cutmix: Alpha of cutmix; 0 cuts no images.
            mixup_kwargs: Further arguments of `timm.data.Mixup`, such as prob and switch_prob.
            flip_test: Measure and predict by the mean of the probabilities of an image and its
                mirror image.
            kwargs: What every task takes, see `Task`.
        """
        super().__init__(name, class_names, **kwargs)
        classes = len(self.class_names)
        if isinstance(class_weights, list) and len(class_weights) != classes:
            raise ValueError(
                f"model.class_weights: expected {classes}, one a class, got {len(class_weights)}"
            )
        self.mixup = self._create_mixup()
        self.train_loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
        self.eval_loss = nn.CrossEntropyLoss()
        accuracies: dict[str, Metric | MetricCollection] = {
            name: MulticlassAccuracy(classes, average="micro", top_k=k)
            for name, k in (("accuracy", 1), (f"top{TOP}_accuracy", TOP))
            if k < classes
        }
        # Lightning's own mean counts images of several processes by whole numbers, rounded down.
        self.held_out_loss = nn.ModuleDict({"val": MeanMetric(), "test": MeanMetric()})
        self.val_metrics = MetricCollection(accuracies, prefix="val_", compute_groups=False)
        self.test_metrics = self.val_metrics.clone(prefix="test_")

    def create_net(self) -> nn.Module:
        hp = self.hparams
        kwargs = hp["model_kwargs"] or {}
        return create_network(hp["name"], hp["in_chans"], kwargs, num_classes=len(self.class_names))

    @property
    def averages(self) -> tuple[str, ...]:
        return ("accuracy",)

    @property
    def measures(self) -> list[str]:
        held_out = list(self.val_metrics.keys())
        return ["train_loss", "train_accuracy", "val_loss", *map(str, held_out)]

    def create_held_out(self) -> HeldOut:
        return Classified()

    def draw_batch(self, data: ImageData, batch: Batch) -> Figure:
        images, classes = (part[:SHOWN].cpu() for part in batch)
        return figures.images(
            [to_picture(data, image) for image in images],
            [data.class_names[index] for index in classes],
            title="Training images of the first step as the network gets them, augmented",
        )

    def setup(self, stage: str) -> None:
        super().setup(stage)
        weights = self.hparams["class_weights"]
        if stage == "fit" and weights is not None:
            weights = self._balanced() if weights == "balanced" else weights
            weight = torch.as_tensor(weights, dtype=torch.float32)
            # In the options, so no part of the state: it may change when a run goes on.
            self.train_loss.register_buffer("weight", weight, persistent=False)

    def _balanced(self) -> Tensor:
        """Weights in inverse proportion to how many training images a class has, 1 on average."""
        counts = torch.tensor(self.trainer.datamodule.class_counts(), dtype=torch.float64)  # type: ignore[attr-defined]
        return counts.sum() / (len(counts) * counts.clamp_min(1))

    def step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets = batch
        if self.mixup is not None:
            images, targets = self._mix(images, targets)
        logits = self(images)
        classes = targets if targets.ndim == 1 else targets.argmax(dim=1)
        right = (logits.argmax(dim=1) == classes).sum()
        return self.train_loss(logits, targets), {"accuracy": right}

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate(batch, "test", self.test_metrics)

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Probabilities (B, classes) and the true classes (B,)."""
        images, classes = batch
        return self.logits(images).softmax(dim=1), classes

    def rows(self, outputs: list[Any], name: Callable[[int], str]) -> list[Row]:
        found, true = (torch.cat(part) for part in zip(*outputs, strict=True))
        confidence, predicted = found.max(dim=1)
        names, rows = self.class_names, zip(predicted, true, confidence, strict=True)
        return [
            {
                "image": name(index),
                "class": names[int(label)],
                "truth": names[int(is_)],
                "confidence": float(sure),
            }
            for index, (label, is_, sure) in enumerate(rows)
        ]

    def logits(self, images: Tensor) -> Tensor:
        """Logits (B, classes) to measure by, in float32."""
        return flipped_logits(self, images) if self.hparams["flip_test"] else self(images).float()

    def _evaluate(self, batch: Batch, stage: str, metrics: MetricCollection) -> Tensor:
        """Log loss and accuracies; return probabilities (B, classes)."""
        images, classes = batch
        logits = self.logits(images)
        metrics(logits, classes)
        loss = self.eval_loss(logits, classes)
        self.held_out_loss[stage].update(loss, len(images))  # type: ignore[operator]
        self.log(f"{stage}_loss", self.held_out_loss[stage])  # type: ignore[arg-type]
        self.log_dict(metrics)
        return logits.softmax(dim=1)

    def _create_mixup(self) -> Mixup | None:
        hp = self.hparams
        if not hp["mixup"] and not hp["cutmix"]:
            return None
        with naming("mixup_kwargs"):
            return Mixup(
                hp["mixup"],
                hp["cutmix"],
                label_smoothing=0.0,  # the loss smooths
                num_classes=len(self.class_names),
                **hp["mixup_kwargs"] or {},
            )

    def _mix(self, images: Tensor, classes: Tensor) -> Batch:
        """Mixed images (B, C, H, W), and classes (B, classes) in proportion."""
        if len(images) % 2:
            raise ValueError(f"data.batch_size: expected even for mixup, got {len(images)} images")
        return self.mixup(images, classes)  # type: ignore[misc]


def flipped_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (B, classes) of the mean of the probabilities of images and their mirror images."""
    one, other = (model(of).float().log_softmax(1) for of in (images, images.flip(3)))
    return torch.logaddexp(one, other) - math.log(2)


class Classified(HeldOut):
    """All classes and confidences, and the images that are most worth a look."""

    def reset(self) -> None:
        self.truth: list[int] = []
        self.predicted: list[int] = []
        self.confidence: list[float] = []
        self.images: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.truth)

    def keep(self, outputs: Tensor, batch: Batch) -> None:
        images, classes = batch
        confidence, predicted = (part.tolist() for part in outputs.max(dim=1))
        first = len(self.truth)
        self.truth += classes.tolist()
        self.predicted += predicted
        self.confidence += confidence
        seen = [*self.images, *range(first, len(self.truth))]
        self.images = {
            index: self.images[index] if index < first else images[index - first].detach().cpu()
            for index in self._choose(seen)
        }

    def _choose(self, among: list[int]) -> list[int]:
        """Those to show, in the order in which they are shown."""
        truth = [self.truth[index] for index in among]
        predicted = [self.predicted[index] for index in among]
        confidence = [self.confidence[index] for index in among]
        return [among[n] for n in figures.choose_shown(truth, predicted, confidence, SHOWN)]

    def pictures(self, data: ImageData) -> dict[str, Callable[[], Figure]]:
        if not self.truth:
            return {}
        names, counts = data.class_names, self.counts(len(data.class_names))
        found = {"predictions.png": lambda: self._draw(data)}
        if len(names) <= MOST_DRAWN:
            found["confusion.png"] = lambda: figures.confusion(counts, names)
            found["classes.png"] = lambda: figures.classes(per_class(counts, names))
        return found

    def tables(self, data: ImageData) -> dict[str, list[Row]]:
        names = data.class_names
        return {"classes.csv": per_class(self.counts(len(names)), names)} if self.truth else {}

    def counts(self, classes: int) -> np.ndarray:
        """Images by class and prediction: (classes, classes)."""
        counts = np.zeros((classes, classes), dtype=np.int64)
        np.add.at(counts, (self.truth, self.predicted), 1)
        return counts

    def _draw(self, data: ImageData) -> Figure:
        wrong = sum(np.not_equal(self.truth, self.predicted))
        kept, names = list(self.images), data.class_names
        mistakes = "1 mistake" if wrong == 1 else f"{wrong} mistakes"
        return figures.predictions(
            [to_picture(data, self.images[index]) for index in kept],
            [names[self.truth[index]] for index in kept],
            [names[self.predicted[index]] for index in kept],
            [self.confidence[index] for index in kept],
            title=f"{mistakes} in {len(self)} held-out images: prediction and confidence\n"
            "The surest mistakes of each class come first, then right ones",
        )


def per_class(counts: np.ndarray, names: list[str]) -> list[Row]:
    """Images, precision, recall and F1 of each class; counts by class and prediction.

    None where there is nothing to divide by: no image of the class, or none taken for it.
    """
    rows: list[Row] = []
    for index, name in enumerate(names):
        right, images, taken = counts[index, index], counts[index].sum(), counts[:, index].sum()
        rows.append(
            {
                "class": name,
                "images": int(images),
                "precision": right / taken if taken else None,
                "recall": right / images if images else None,
                "f1": 2 * right / (images + taken) if images + taken else None,
            }
        )
    return rows


def to_picture(data: ImageData, image: Tensor) -> Any:
    """A normalised image (C, H, W) -> (H, W) or (H, W, 3) in [0, 1]."""
    pixels = data.to_pixels(image[None])[0].permute(1, 2, 0).numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels
