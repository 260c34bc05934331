"""Image classification with any timm network, ours included, under timm's optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from lightning.pytorch import LightningModule
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

import acmix.models  # noqa: F401  registers our networks with timm
from acmix.tasks.errors import did_you_mean

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")
Batch = tuple[Tensor, Tensor]


class Classification(LightningModule):
    """A network by its timm name, trained with cross-entropy."""

    def __init__(
        self,
        name: str,
        class_names: list[str],
        in_chans: int = 3,
        model_kwargs: dict[str, Any] | None = None,
        opt: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        momentum: float = 0.9,
        opt_kwargs: dict[str, Any] | None = None,
        sched: str = "cosine",
        warmup_epochs: int = 0,
        min_lr: float = 0.0,
        sched_kwargs: dict[str, Any] | None = None,
        smoothing: float = 0.1,
    ) -> None:
        """Build the network.

        Args:
            name: Network, as `timm.create_model` knows it.
            class_names: Names of the classes in the order of the outputs; taken from the data.
            in_chans: Channels of the images; taken from the data.
            model_kwargs: Further arguments of the network's constructor.
            opt: Optimizer, as `timm.optim.create_optimizer_v2` knows it.
            lr: Highest learning rate.
            weight_decay: Weight decay; biases, norms and other vectors go without.
            momentum: Momentum, for the optimizers that have it.
            opt_kwargs: Further arguments of the optimizer.
            sched: Schedule of the learning rate, as `timm.scheduler.create_scheduler_v2` knows
                it, set anew at every step.
            warmup_epochs: Epochs in which the learning rate rises, part of the whole.
            min_lr: Lowest learning rate at the end.
            sched_kwargs: Further arguments of the schedule.
            smoothing: Label smoothing in training; the validation loss is plain cross-entropy.
        """
        super().__init__()
        self.save_hyperparameters()
        check_known("opt", opt.lower().removeprefix("lookahead_"), map(str, list_optimizers()))
        check_known("sched", sched, SCHEDULES)
        self.net = create_net(name, in_chans, len(class_names), model_kwargs or {})
        self.train_loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
        self.eval_loss = nn.CrossEntropyLoss()
        self.train_accuracy = MulticlassAccuracy(len(class_names), average="micro")
        self.val_accuracy = self.train_accuracy.clone()
        self.test_accuracy = self.train_accuracy.clone()

    @property
    def class_names(self) -> list[str]:
        return self.hparams["class_names"]

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, classes = batch
        logits = self(images)
        loss = self.train_loss(logits, classes)
        self.train_accuracy(logits, classes)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(images))
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate(batch, "test", self.test_accuracy)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probabilities (B, classes)."""
        return self(batch[0]).float().softmax(dim=1)

    def _evaluate(self, batch: Batch, stage: str, accuracy: Metric) -> Tensor:
        """Log loss and accuracy; return probabilities (B, classes)."""
        images, classes = batch
        logits = self(images).float()
        accuracy(logits, classes)
        loss = self.eval_loss(logits, classes)
        self.log(f"{stage}_loss", loss, batch_size=len(images), sync_dist=True)
        self.log(f"{stage}_accuracy", accuracy)
        return logits.softmax(dim=1)

    def configure_optimizers(self) -> Any:
        hp = self.hparams
        with naming("opt_kwargs"):
            optimizer = create_optimizer_v2(
                self.net,
                opt=hp["opt"],
                lr=hp["lr"],
                weight_decay=hp["weight_decay"],
                momentum=hp["momentum"],
                **hp["opt_kwargs"] or {},
            )
        steps, epochs = int(self.trainer.estimated_stepping_batches), self.trainer.max_epochs or 1
        with naming("sched_kwargs"):
            scheduler, _ = create_scheduler_v2(
                optimizer,
                sched=hp["sched"],
                num_epochs=max(1, epochs),
                warmup_epochs=hp["warmup_epochs"],
                min_lr=hp["min_lr"],
                step_on_epochs=False,
                updates_per_epoch=max(1, steps // max(1, epochs)),
                **hp["sched_kwargs"] or {},
            )
        if scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def lr_scheduler_step(self, scheduler: Scheduler, metric: Any) -> None:  # type: ignore[override]
        scheduler.step_update(self.global_step)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        hp = checkpoint.get("hyper_parameters", {})
        saved = hp.get("class_names", self.class_names)
        if list(saved) != self.class_names:
            raise ValueError(
                f"the checkpoint knows {len(saved)} classes ({_few(saved)}), "
                f"the data has {len(self.class_names)} ({_few(self.class_names)})"
            )
        if _shapes(checkpoint["state_dict"]) != _shapes(self.state_dict()):
            was, name = hp.get("name", "another network"), self.hparams["name"]
            other = f"of {was}, the model is {name}" if was != name else f"of another {name}"
            raise ValueError(f"the checkpoint is {other}: the weights differ in name or shape")


def create_net(
    name: str, in_chans: int, num_classes: int, model_kwargs: dict[str, Any]
) -> nn.Module:
    """`timm.create_model`, with a suggestion where the name is unknown."""
    if ":" not in name:  # "hf-hub:..." and the like are looked up elsewhere
        check_known("model", name.split(".")[0], timm.list_models())
    return timm.create_model(name, in_chans=in_chans, num_classes=num_classes, **model_kwargs)


def check_known(what: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}{did_you_mean(name, known)}")


@contextmanager
def naming(option: str) -> Iterator[None]:
    """Arguments that nothing takes are a mistake in the option that passes them on: name it."""
    try:
        yield
    except TypeError as error:
        raise ValueError(f"model.{option}: {error}") from error


def _shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in weights.items()}


def _few(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
