"""Image classification with any timm network, ours included, under timm's optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from timm.data import Mixup
from timm.models import load_state_dict
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

import acmix.models  # noqa: F401  registers our networks with timm
from acmix.data.loading import seed_generators
from acmix.errors import did_you_mean, one_line
from acmix.surgery.warm_start import warm_start
from acmix.tasks import sharding

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")
Batch = tuple[Tensor, Tensor]


class Classification(LightningModule):
    """A network by its timm name, trained with cross-entropy."""

    seed: int = 0  # of what is random in a step; `acmix fit` sets it
    goes_on: bool = False  # from a checkpoint, instead of a warm start; `acmix fit` sets it

    def __init__(
        self,
        name: str,
        class_names: list[str],
        in_chans: int = 3,
        model_kwargs: dict[str, Any] | None = None,
        warm_start: str | None = None,
        opt: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        momentum: float = 0.9,
        layer_decay: float | None = None,
        opt_kwargs: dict[str, Any] | None = None,
        lr_batch_size: int | None = None,
        sched: str = "cosine",
        warmup_epochs: float = 0,
        min_lr: float = 0.0,
        sched_kwargs: dict[str, Any] | None = None,
        smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixup_kwargs: dict[str, Any] | None = None,
        ema_decay: float = 0.0,
        ema_kwargs: dict[str, Any] | None = None,
        channels_last: bool | None = None,
        compile: bool = False,
    ) -> None:
        """Build the network.

        Args:
            name: Network, as `timm.create_model` knows it.
            class_names: Names of the classes in the order of the outputs; taken from the data.
            in_chans: Channels of the images; taken from the data.
            model_kwargs: Further arguments of the network's constructor, such as drop_path_rate.
            warm_start: Network of timm, whose pretrained weights are downloaded, or the path of a
                checkpoint, one of `acmix fit` among them; `fit` then starts by
                `acmix.warm_start`, unless it goes on from a checkpoint of its own.
            opt: Optimizer, as `timm.optim.create_optimizer_v2` knows it.
            lr: Highest learning rate.
            weight_decay: Weight decay; biases, norms, other vectors and what the network names in
                `no_weight_decay` go without.
            momentum: Momentum, for the optimizers that have it.
            layer_decay: Factor of the learning rate from each layer to the one before it.
            opt_kwargs: Further arguments of the optimizer.
            lr_batch_size: Images a step, over all processes, that `lr` is meant for: it grows in
                proportion to the images a step there are. Without it, `lr` is taken as it is.
            sched: Schedule of the learning rate, as `timm.scheduler.create_scheduler_v2` knows
                it, set anew at every step.
            warmup_epochs: Epochs, or a fraction, in which the learning rate rises, part of the
                whole.
            min_lr: Lowest learning rate at the end.
            sched_kwargs: Further arguments of the schedule.
            smoothing: Label smoothing in training; the validation loss is plain cross-entropy.
            mixup: Alpha of mixup; 0 mixes no images.
            cutmix: Alpha of cutmix; 0 cuts no images.
            mixup_kwargs: Further arguments of `timm.data.Mixup`, such as prob and switch_prob.
            ema_decay: Decay a step of a moving average of the weights, which is then what is
                measured and predicts; 0 keeps none.
            ema_kwargs: Further arguments of `timm.utils.ModelEmaV3`, such as use_warmup.
            channels_last: Memory format of weights and images; by default for networks whose
                weights are mostly convolutions.
            compile: Run the network through `torch.compile`.
        """
        super().__init__()
        self.save_hyperparameters()
        check_known("opt", opt.lower().removeprefix("lookahead_"), map(str, list_optimizers()))
        check_known("sched", sched, SCHEDULES)
        self.net = create_net(name, in_chans, len(class_names), model_kwargs or {})
        self.size = sum(weight.numel() for weight in self.net.parameters())
        self.channels_last = is_convolutional(self.net) if channels_last is None else channels_last
        if self.channels_last:
            self.net.to(memory_format=torch.channels_last)
        with naming("ema_kwargs"):
            ema = ModelEmaV3(self.net, ema_decay, **ema_kwargs or {}) if ema_decay else None
        self.ema: ModelEmaV3 | None = ema
        self.mixup = self._create_mixup()
        self.train_loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
        self.eval_loss = nn.CrossEntropyLoss()
        self.val_accuracy = MulticlassAccuracy(len(class_names), average="micro")
        self.test_accuracy = self.val_accuracy.clone()
        self.sums = torch.zeros(3)  # of this epoch and process: loss, right answers, images

    @property
    def class_names(self) -> list[str]:
        return self.hparams["class_names"]

    def forward(self, images: Tensor) -> Tensor:
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        net = self.net if self.training or self.ema is None else self.ema.module
        return net(images)

    @property
    def _strategy(self) -> Strategy | None:
        return None if self._trainer is None else self.trainer.strategy

    @property
    def _cut_to_vectors(self) -> bool:
        """Whether each process holds but a part of the weights, as vectors: FSDP."""
        return isinstance(self._strategy, FSDPStrategy)

    def whole_weights(self) -> AbstractContextManager[None]:
        """Within, every process has all weights, to read."""
        return sharding.whole_weights(self.trainer.model)  # type: ignore[arg-type]

    def setup(self, stage: str) -> None:
        if self.ema is not None and isinstance(self._strategy, sharding.SHARDED):
            raise ValueError(f"model.ema_decay: expected 0 with FSDP, got {self.ema.decay}")
        if stage == "fit" and self.hparams["warm_start"] and not self.goes_on:
            self._warm_start(self.hparams["warm_start"])
        if isinstance(self._strategy, sharding.FSDP2Strategy):
            self._strategy.shard(self.net)
        if stage == "fit":
            # Before weights are cut into vectors, which go without weight decay.
            self._optimizer = self._create_optimizer()

    def _warm_start(self, source: str) -> None:
        try:
            warm_start(self.net, pretrained_weights(source))
        except ValueError as error:
            raise ValueError(f"model.warm_start: {error}") from error
        if self.ema is not None:
            self.ema.set(self.net)

    def configure_model(self) -> None:
        if self.hparams["compile"]:
            self.net.compile()

    def on_train_start(self) -> None:
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.sums = self.sums.to(self.device, dtype)

    def on_train_epoch_start(self) -> None:
        self.sums = torch.zeros_like(self.sums)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # What is random in a step follows from the step, so that a run can go on at any.
        seed_generators(self.seed, self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(torch.initial_seed())  # other devices' generators too

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        if self.mixup is not None:
            images, targets = self._mix(images, targets)
        logits = self(images)
        loss = self.train_loss(logits, targets)
        classes = targets if targets.ndim == 1 else targets.argmax(dim=1)
        right = (logits.argmax(dim=1) == classes).sum()
        seen = torch.full_like(right, len(images))
        self.sums += torch.stack([loss.detach() * seen, right, seen])
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.net, step=self.global_step + 1)

    def train_metrics(self) -> dict[str, float]:
        """Loss and accuracy of this epoch so far, over all processes."""
        loss, right, images = self._all_sums().tolist()
        return {"train_loss": loss / images, "train_accuracy": right / images}

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.train_metrics())

    def on_validation_start(self) -> None:
        # Batch statistics differ among processes; what is measured is what is saved.
        if self.trainer.world_size > 1:
            for buffer in self.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate(batch, "test", self.test_accuracy)

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Probabilities (B, classes) and the true classes (B,)."""
        images, classes = batch
        return self(images).float().softmax(dim=1), classes

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
        hp, optimizer = self.hparams, self._optimizer
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

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm") and self._cut_to_vectors:
            # The norm is over all processes, which only the sharded module knows.
            self.trainer.model.clip_grad_norm_(gradient_clip_val)  # type: ignore[union-attr, operator]
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def lr_scheduler_step(self, scheduler: Scheduler, metric: Any) -> None:  # type: ignore[override]
        scheduler.step_update(self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["train_sums"] = self._all_sums().cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        hp = checkpoint.get("hyper_parameters", {})
        saved = hp.get("class_names", self.class_names)
        if len(saved) != len(self.class_names):
            raise ValueError(
                f"the checkpoint knows {len(saved)} classes ({_few(saved)}), "
                f"the data has {len(self.class_names)} ({_few(self.class_names)})"
            )
        for was, name in zip(saved, self.class_names, strict=True):
            if was != name:
                raise ValueError(f"the checkpoint has class {was!r} where the data has {name!r}")
        _as_vectors(checkpoint)
        if not self._cut_to_vectors and _shapes(checkpoint["state_dict"]) != _shapes(
            self.state_dict()
        ):
            was, name = hp.get("name", "another network"), self.hparams["name"]
            other = f"of {was}, the model is {name}" if was != name else f"of another {name}"
            raise ValueError(f"the checkpoint is {other}: the weights differ in name or shape")
        # The schedule follows from the step and the options: a longer run has a longer one.
        checkpoint["lr_schedulers"] = []
        sums = checkpoint.get("train_sums", torch.zeros(3))
        self.sums = sums if self.global_rank == 0 else torch.zeros_like(sums)

    def _all_sums(self) -> Tensor:
        return self.trainer.strategy.reduce(self.sums.clone(), reduce_op="sum")

    def _create_optimizer(self) -> torch.optim.Optimizer:
        hp = self.hparams
        with naming("opt_kwargs"):
            return create_optimizer_v2(
                self.net,
                opt=hp["opt"],
                lr=hp["lr"] * self._lr_scale(),
                weight_decay=hp["weight_decay"],
                momentum=hp["momentum"],
                layer_decay=hp["layer_decay"],
                **hp["opt_kwargs"] or {},
            )

    def _lr_scale(self) -> float:
        """Images a step, over all processes, as a multiple of those that `lr` is meant for."""
        meant_for, data = self.hparams["lr_batch_size"], getattr(self.trainer, "datamodule", None)
        if meant_for is None or data is None:
            return 1.0
        steps = self.trainer.accumulate_grad_batches
        return data.batch_size * self.trainer.world_size * steps / meant_for

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


def create_net(
    name: str, in_chans: int, num_classes: int, model_kwargs: dict[str, Any]
) -> nn.Module:
    """`timm.create_model`, with a suggestion where the name is unknown."""
    if ":" not in name:  # "hf-hub:..." and the like are looked up elsewhere
        check_known("model", name.split(".")[0], timm.list_models())
    return timm.create_model(name, in_chans=in_chans, num_classes=num_classes, **model_kwargs)


def pretrained_weights(source: str) -> dict[str, Any]:
    """Weights of a checkpoint at a path, or of a network of timm.

    Of a checkpoint of `acmix fit` those that it measures: the moving average where there is one.

    Raises:
        ValueError: for what is neither a file nor a network of timm with pretrained weights.
    """
    if not Path(source).is_file():
        check_known("network or file", source.split(".")[0], timm.list_models())
        if not timm.is_model_pretrained(source):
            raise ValueError(f"expected a network of timm with pretrained weights, got {source!r}")
        return timm.create_model(source, pretrained=True).state_dict()
    try:
        weights = load_state_dict(source, use_ema=True, weights_only=True)
    except Exception as error:  # of a file that is no checkpoint, torch.load raises anything
        raise ValueError(f"expected a checkpoint, got {source}: {one_line(error)}") from error
    for prefix in ("ema.module.", "net."):
        ours = {key: value for key, value in weights.items() if key.startswith(prefix)}
        if ours:
            return {key.removeprefix(prefix): value for key, value in ours.items()}
    return weights


def is_convolutional(net: nn.Module) -> bool:
    """Whether less than half of the weights, the head aside, are those of linear layers."""
    linear = sum(
        layer.weight.numel()
        for layer in net.modules()
        if isinstance(layer, nn.Linear) and layer.out_features != getattr(net, "num_classes", 0)
    )
    return 2 * linear < sum(weight.numel() for weight in net.parameters())


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


def _as_vectors(checkpoint: dict[str, Any]) -> None:
    """alpha and beta, which early checkpoints have as scalars, as vectors of one; so what the
    optimizer knows of them."""
    weights = checkpoint.get("state_dict", {})  # FSDP has loaded them by then
    for name, weight in weights.items():
        if name.endswith((".mix.alpha", ".mix.beta")):
            weights[name] = torch.atleast_1d(weight)
    for optimizer in checkpoint.get("optimizer_states", []):
        for state in optimizer["state"].values():
            values = {k: v for k, v in state.items() if k != "step" and isinstance(v, Tensor)}
            if all(value.ndim == 0 for value in values.values()):
                state.update({name: torch.atleast_1d(v) for name, v in values.items()})


def _shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in weights.items()}


def _few(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
