"""What every task shares: a network by its timm name, and all of its training but the loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from matplotlib.figure import Figure
from timm.models import load_state_dict
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import acmix.models  # noqa: F401  registers our networks with timm
from acmix.data import ImageData
from acmix.data.loading import seed_generators
from acmix.errors import did_you_mean, few, one_line
from acmix.models._layout import is_convolutional
from acmix.ranges import (
    Count,
    NonNegative,
    PartBelowOne,
    PositiveCount,
    PositivePart,
    check_ranges,
)
from acmix.surgery.warm_start import warm_start
from acmix.tasks import sharding
from acmix.tasks.held_out import HeldOut, Row

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")
WITHOUT_END = ("constant", "none", "rsqrt", "step", "multistep")
BACKBONE = "backbone"


class Task(LightningModule):
    """A network by its timm name, trained for one purpose.

    A task is a subclass that names itself and the kind of data it takes, builds its network in
    `create_net`, and gives the loss of a step and what is measured.
    """

    task: ClassVar[str]
    data_class: ClassVar[type[ImageData]] = ImageData  # type: ignore[type-abstract]
    from_data: ClassVar[tuple[str, ...]] = ("class_names", "in_chans")  # options that the data set
    monitor: ClassVar[str]  # what is measured on held-out images: the best is where it is highest
    measure: ClassVar[str]  # its name for people

    seed: int = 0  # of what is random in a step; `acmix fit` sets it
    goes_on: bool = False  # from a checkpoint, instead of a warm start; `acmix fit` sets it

    def __init__(
        self,
        name: str,
        class_names: list[str],
        in_chans: PositiveCount = 3,
        model_kwargs: dict[str, Any] | None = None,
        warm_start: str | None = None,
        freeze: list[str] | None = None,
        opt: str = "adamw",
        lr: NonNegative = 1e-3,
        weight_decay: NonNegative = 0.05,
        momentum: PartBelowOne = 0.9,
        layer_decay: PositivePart | None = None,
        opt_kwargs: dict[str, Any] | None = None,
        lr_batch_size: PositiveCount | None = None,
        sched: str = "cosine",
        warmup_epochs: NonNegative = 0,
        warmup_steps: Count = 0,
        min_lr: NonNegative = 0.0,
        sched_kwargs: dict[str, Any] | None = None,
        ema_decay: PartBelowOne = 0.0,
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
            freeze: Modules of the network, such as conv1 or layer1, that keep their weights and
                running statistics; "backbone" is all but the last layer.
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
                it, set anew at every step. It ends with `trainer.max_epochs`, or where these
                are -1 with `trainer.max_steps`.
            warmup_epochs: Epochs, or a fraction, in which the learning rate rises, part of the
                whole.
            warmup_steps: The same in steps.
            min_lr: Lowest learning rate at the end.
            sched_kwargs: Further arguments of the schedule.
            ema_decay: Decay a step of a moving average of the weights, which is then what is
                measured and predicts; 0 keeps none.
            ema_kwargs: Further arguments of `timm.utils.ModelEmaV3`, such as use_warmup.
            channels_last: Memory format of weights and images; by default for networks whose
                weights are mostly convolutions.
            compile: Run the network through `torch.compile`.
        """
        super().__init__()
        self.save_hyperparameters()
        check_ranges(Task.__init__, self.hparams, "model.")
        check_ranges(type(self).__init__, self.hparams, "model.")
        check_known(
            "model.opt", opt.lower().removeprefix("lookahead_"), map(str, list_optimizers())
        )
        check_known("model.sched", sched, SCHEDULES)
        if warmup_epochs and warmup_steps:
            raise ValueError(
                "model.warmup_epochs, model.warmup_steps: expected one of them, got both"
            )
        self.net = self.create_net()
        self.size = sum(weight.numel() for weight in self.net.parameters())
        self._frozen = freeze_modules(self.backbone, freeze or [])
        self.channels_last = is_convolutional(self.net) if channels_last is None else channels_last
        if self.channels_last:
            self.net.to(memory_format=torch.channels_last)
        with naming("ema_kwargs"):
            ema = ModelEmaV3(self.net, ema_decay, **ema_kwargs or {}) if ema_decay else None
        self.ema: ModelEmaV3 | None = ema
        if ema is not None:
            ema.requires_grad_(False)  # else DDP would wait for its gradients
        self.sums = torch.zeros(2 + len(self.averages))  # of this epoch and process: with images

    @abstractmethod
    def create_net(self) -> nn.Module:
        """The network, from the hyperparameters."""

    @abstractmethod
    def step(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a training batch, the mean over its images, and sums over them of `averages`."""

    @property
    def averages(self) -> tuple[str, ...]:
        """Of a step, beside the loss; over the images."""
        return ()

    @property
    @abstractmethod
    def measures(self) -> list[str]:
        """Names of what is logged, in training and on held-out images."""

    @abstractmethod
    def create_held_out(self) -> HeldOut:
        """What keeps, and later draws, the predictions of the latest validation."""

    @abstractmethod
    def rows(self, outputs: list[Any], name: Callable[[int], str]) -> list[Row]:
        """A row an image of what predictions returned; name: of an image by its place."""

    @abstractmethod
    def draw_batch(self, data: ImageData, batch: Any) -> Figure:
        """The images of a training batch as the network gets them, with what is known of each."""

    def look_at(self, data: ImageData) -> None:
        """Tell the data what of them is needed, once both are made."""

    @property
    def backbone(self) -> nn.Module:
        """The network that `freeze` names modules of, and that may start from a classifier."""
        return self.net

    @property
    def class_names(self) -> list[str]:
        return self.hparams["class_names"]

    @property
    def measured(self) -> nn.Module:
        """The network that is measured and predicts: the moving average where there is one."""
        return self.net if self.ema is None else self.ema.module

    def forward(self, images: Any, *known: Any) -> Any:
        """What the network says of images; known: in training, what it asks for beside them."""
        if self.channels_last and isinstance(images, Tensor):
            images = images.contiguous(memory_format=torch.channels_last)
        return (self.net if self.training else self.measured)(images, *known)

    def look(self, images: Any) -> Any:
        """What is found in the images of a held-out batch, as it is measured."""
        return self(images)

    def train(self, mode: bool = True) -> Task:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

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
            self.start_from(pretrained_weights(source))
        except ValueError as error:
            raise ValueError(f"model.warm_start: {error}") from error
        if self.ema is not None:
            self.ema.set(self.net)

    def start_from(self, weights: dict[str, Any]) -> None:
        """Take what can be taken of the weights of another network."""
        warm_start(self.net, weights)

    def configure_model(self) -> None:
        if self.hparams["compile"]:
            self.net.compile()

    def on_train_start(self) -> None:
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.sums = self.sums.to(self.device, dtype)

    def on_train_epoch_start(self) -> None:
        self.sums = torch.zeros_like(self.sums)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # What is random in a step follows from the step, so that a run can go on at any.
        seed_generators(self.seed, self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(torch.initial_seed())  # other devices' generators too

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, sums = self.step(batch)
        images = len(batch[0])
        parts = [loss.detach() * images, *(sums[name] for name in self.averages)]
        seen = loss.new_tensor(images, dtype=self.sums.dtype)
        self.sums += torch.stack([*(part.to(self.sums) for part in parts), seen])
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.net, step=self.global_step + 1)

    def train_metrics(self) -> dict[str, float]:
        """Loss and other averages of this epoch so far, over all processes."""
        *sums, images = self._all_sums().tolist()
        names = ("loss", *self.averages)
        return {f"train_{name}": part / images for name, part in zip(names, sums, strict=True)}

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.train_metrics())

    def on_validation_start(self) -> None:
        # Batch statistics differ among processes; what is measured is what is saved.
        if self.trainer.world_size > 1:
            for buffer in self.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def configure_optimizers(self) -> Any:
        scheduler = self._create_scheduler(self._optimizer)
        if scheduler is None:
            return self._optimizer
        return [self._optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def _create_scheduler(self, optimizer: torch.optim.Optimizer) -> Scheduler | None:
        """timm's schedule in steps; what its options count in epochs, too."""
        hp, an_epoch = self.hparams, self._steps_an_epoch()
        epochs = self._epochs(an_epoch)
        warmup = hp["warmup_steps"] / an_epoch or hp["warmup_epochs"]
        with naming("sched_kwargs"):
            scheduler, _ = create_scheduler_v2(
                optimizer,
                sched=hp["sched"],
                num_epochs=int(epochs) if epochs == int(epochs) else epochs,  # type: ignore[arg-type]
                warmup_epochs=warmup,
                min_lr=hp["min_lr"],
                step_on_epochs=False,
                updates_per_epoch=an_epoch,
                **hp["sched_kwargs"] or {},
            )
        return scheduler

    def _epochs(self, steps_an_epoch: int) -> float:
        """Of the schedule: what `max_epochs` says, though other limits may end a run within it."""
        epochs, steps = self.trainer.max_epochs, self.trainer.max_steps
        if epochs is not None and epochs >= 0:
            return max(1, epochs)
        if steps < 0 and self.hparams["sched"] not in WITHOUT_END:
            raise ValueError(
                "trainer.max_epochs, trainer.max_steps: expected an end of the schedule "
                f"{self.hparams['sched']} (model.sched), got none"
            )
        return max(steps, 1) / steps_an_epoch

    def _steps_an_epoch(self) -> int:
        self.trainer.fit_loop.setup_data()  # else not counted yet
        batches, of_step = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        return max(1, -(-int(batches) // of_step)) if batches != float("inf") else 1

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
        checkpoint["task"] = self.task
        checkpoint["train_sums"] = self._all_sums().cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        hp = checkpoint.get("hyper_parameters", {})
        if (task := task_of(checkpoint)) != self.task:
            raise ValueError(f"the checkpoint is of task {task}, not {self.task}")
        check_classes(hp.get("class_names", self.class_names), self.class_names)
        _as_vectors(checkpoint)
        if not self._cut_to_vectors and _shapes(checkpoint["state_dict"]) != _shapes(
            self.state_dict()
        ):
            was, name = hp.get("name", "another network"), self.hparams["name"]
            other = f"of {was}, the model is {name}" if was != name else f"of another {name}"
            raise ValueError(f"the checkpoint is {other}: the weights differ in name or shape")
        # The schedule follows from the step and the options: a longer run has a longer one.
        checkpoint["lr_schedulers"] = []
        sums = checkpoint.get("train_sums", torch.zeros_like(self.sums))
        self.sums = sums if self.global_rank == 0 else torch.zeros_like(sums)

    def _all_sums(self) -> Tensor:
        return self.trainer.strategy.reduce(self.sums.clone(), reduce_op="sum")

    def _create_optimizer(self) -> torch.optim.Optimizer:
        hp = self.hparams
        if not any(weight.requires_grad for weight in self.net.parameters()):
            raise ValueError(f"model.freeze: expected weights left to train, got {hp['freeze']}")
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


def create_network(
    name: str, in_chans: int, model_kwargs: dict[str, Any], **more: Any
) -> nn.Module:
    """`timm.create_model`, with a suggestion where the name is unknown."""
    with naming_network(name):
        return timm.create_model(name, in_chans=in_chans, **more, **nested(model_kwargs))


@contextmanager
def naming_network(name: str, options: Iterable[str] = ("name",)) -> Iterator[None]:
    """Mistakes in the name of a network or in its arguments name the option that held them.

    options: of the model, which the message may begin with; others are of the network itself.
    """
    if ":" not in name:  # "hf-hub:..." and the like are looked up elsewhere
        check_known("model.name", name.split(".")[0], timm.list_models())
    try:
        yield
    except RuntimeError as error:  # of a tag that there is not
        raise ValueError(f"model.name: {one_line(error)}") from error
    except (TypeError, ValueError) as error:
        own = str(error).partition(":")[0] in options
        option = "model." if own else "model.model_kwargs: "
        raise ValueError(f"{option}{one_line(error)}") from error


def nested(options: dict[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}`, as the command line gives it, -> `{"a": {"b": 1}}`."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        *folders, last = name.split(".")
        place = found
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = {**place.get(last, {}), **value} if isinstance(value, dict) else value
    return found


def freeze_modules(net: nn.Module, names: list[str]) -> list[nn.Module]:
    """The named modules, in eval mode, whose weights are no longer trained.

    Raises:
        ValueError: For a name that no module has.
    """
    if BACKBONE in names:
        head = net.get_classifier() if hasattr(net, "get_classifier") else None  # type: ignore[operator]
        names = [name for name in names if name != BACKBONE]
        names += [name for name, part in net.named_children() if not _holds(part, head)]
    modules = dict(net.named_modules())
    for name in names:
        check_known("model.freeze", name, [BACKBONE, *filter(None, modules)])
        modules[name].requires_grad_(False).eval()
    return [modules[name] for name in names]


def _holds(part: nn.Module, module: Any) -> bool:
    return any(inner is module for inner in part.modules())


def pretrained_weights(source: str) -> dict[str, Any]:
    """Weights of a checkpoint at a path, or of a network of timm.

    Of a checkpoint of `acmix fit` those that it measures: the moving average where there is one.

    Raises:
        ValueError: for what is neither a file nor a network of timm with pretrained weights.
    """
    if not Path(source).is_file():
        known = timm.list_models()
        if source.split(".")[0] not in known:
            a_file = "/" in source or source.endswith((".ckpt", ".pt", ".pth", ".safetensors"))
            near = "" if a_file else did_you_mean(source.split(".")[0], known)
            raise ValueError(f"expected a checkpoint or a network of timm, got {source!r}{near}")
        if not timm.is_model_pretrained(source):
            raise ValueError(f"expected a network of timm with pretrained weights, got {source!r}")
        return timm.create_model(source, pretrained=True).state_dict()
    try:
        weights = load_state_dict(source, use_ema=True, weights_only=True)
    except Exception as error:  # of a file that is no checkpoint, torch.load raises anything
        raise ValueError(f"expected a checkpoint, got {source}, which holds none") from error
    for prefix in ("ema.module.", "net."):
        ours = {key: value for key, value in weights.items() if key.startswith(prefix)}
        if ours:
            return {key.removeprefix(prefix): value for key, value in ours.items()}
    return weights


def check_known(option: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        offer = did_you_mean(name, known) or f" (known: {few(known)})"
        raise ValueError(f"{option}: unknown {name!r}{offer}")


def check_classes(saved: list[str], names: list[str]) -> None:
    """Classes of a checkpoint that are not those of the data raise `ValueError`."""
    if len(saved) != len(names):
        raise ValueError(
            f"the checkpoint knows {len(saved)} classes ({few(saved)}), "
            f"the data has {len(names)} ({few(names)})"
        )
    for was, name in zip(saved, names, strict=True):
        if was != name:
            raise ValueError(f"the checkpoint has class {was!r} where the data has {name!r}")


def task_of(checkpoint: dict[str, Any]) -> str:
    """The task of a checkpoint; early ones, all of classification, do not name theirs."""
    return checkpoint.get("task", "classification")


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
