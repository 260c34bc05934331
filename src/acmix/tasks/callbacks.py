"""What is kept while a network trains: its history and its checkpoints."""

from __future__ import annotations

import csv
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from acmix.analysis.paths import path_weights
from acmix.tasks.sharding import here

Row = dict[str, Any]
CHECK_EVERY = 10  # steps: to look at a number, or ask the others, holds an accelerator up


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Writes beside the checkpoint and renames, so that no kill or full disk leaves half a file.

    Lightning's own way writes to the system's temporary folder and copies from there.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


class LastCheckpoint(Checkpoint):
    """`last.ckpt` every n steps, at the end of an epoch, and on SIGTERM, which then stops the run.

    Raises `ValueError` once a loss is NaN or infinite, and never saves such a network.
    """

    def __init__(self, path: Path, every_n_steps: int) -> None:
        self.path = path
        self.every_n_steps = every_n_steps
        self.saved_step: int | None = None
        self.within = False  # whether training ended, for now, within an epoch
        self._terminated = self._stop_wanted = False
        self._loader_state: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        loader = trainer.train_dataloader
        if loader is not None and hasattr(loader, "state_dict"):
            checkpoint["train_loader"] = loader.state_dict()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._loader_state = checkpoint.get("train_loader")
        if Path(trainer.ckpt_path or "") == self.path:
            self.saved_step = checkpoint["global_step"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning restores loaders too, but not one that was made early, to count the steps.
        state = self._loader_state
        if state is not None and state["epoch"] == trainer.current_epoch:
            trainer.train_dataloader.load_state_dict(state)  # type: ignore[union-attr]
        self._step = trainer.global_step
        self._first_bad = torch.full((), torch.inf, device=pl_module.device)
        if threading.current_thread() is threading.main_thread():
            # Lightning's handler talks to the other processes from within the signal.
            signal.signal(signal.SIGTERM, self._on_sigterm)
            if (
                getattr(signal, "SIGHUP", None)
                and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
            ):
                signal.signal(signal.SIGHUP, self._on_sigterm)  # a terminal that was closed

    def _on_sigterm(self, number: int, frame: Any) -> None:
        self._terminated = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        finite = outputs["loss"].detach().isfinite()
        bad_step = torch.where(finite, torch.inf, self._step + 1.0)
        self._first_bad = torch.minimum(self._first_bad, bad_step)
        if trainer.global_step == self._step:  # gradients are still being accumulated
            self._put_off_the_end(trainer)
            return
        self._step = trainer.global_step
        self.within = self._ends_here(trainer) and not trainer.is_last_batch
        due = self._step % self.every_n_steps == 0
        now = due or self.within
        if not now and pl_module.device.type != "cpu" and self._step % CHECK_EVERY:
            return
        stop = self._agree_to_stop(trainer)
        # An epoch's last step is saved once it was measured: a run goes on after that.
        if (now or stop) and not trainer.is_last_batch:
            self._save(trainer, pl_module)
            if stop:
                raise SIGTERMException

    def _put_off_the_end(self, trainer: Trainer) -> None:
        """Gradients of a step that is not done are in no checkpoint: training ends after it."""
        if trainer.should_stop:
            trainer.should_stop, self._stop_wanted = False, True

    def _ends_here(self, trainer: Trainer) -> bool:
        """Whether this step is the last by `max_steps`, or since somebody asked to stop."""
        trainer.should_stop = trainer.should_stop or self._stop_wanted
        if 0 <= trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True  # for a last validation
            return True
        return trainer.should_stop and trainer.fit_loop._can_stop_early

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._check_weights(trainer, pl_module)  # else they might be the best at first

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stop = self._agree_to_stop(trainer)
        if not self.within:  # else it was saved before this epoch was counted as one
            self._save(trainer, pl_module)
        if stop and trainer.current_epoch + 1 != trainer.max_epochs:
            raise SIGTERMException

    def _agree_to_stop(self, trainer: Trainer) -> bool:
        """Whether any process was told to stop; a bad loss of any process raises in all."""
        go_on = torch.full_like(self._first_bad, not self._terminated)
        mine = torch.stack([self._first_bad, go_on])
        first_bad, all_go_on = trainer.strategy.reduce(mine, reduce_op="min").tolist()
        if first_bad < torch.inf:
            raise ValueError(f"the loss of step {first_bad:.0f} is not finite; {self.last_good}")
        return not all_go_on

    @property
    def last_good(self) -> str:
        if self.saved_step is None:
            return "no checkpoint was saved before"
        return f"the last good checkpoint is {self.path}, of step {self.saved_step}"

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._check_weights(trainer, pl_module)
        trainer.save_checkpoint(self.path)
        self.saved_step = self._step

    def _check_weights(self, trainer: Trainer, pl_module: LightningModule) -> None:
        finite = all(bool(here(weight).isfinite().all()) for weight in pl_module.parameters())
        if not trainer.strategy.reduce_boolean_decision(finite):
            raise ValueError(f"the weights of step {self._step} are not finite; {self.last_good}")


class BestCheckpoint(ModelCheckpoint):
    """By a name of its own, so that a run may have others of the class that watch the same."""


class Patience(EarlyStopping):
    """Stops where the task's measure was not better for so many epochs.

    A run that stopped so is finished, unless it goes on with more patience.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self.used_up

    @property
    def used_up(self) -> bool:
        return self.wait_count >= self.patience


class Speed(Callback):
    """Images/s of an evaluation, loading included; the first batch, which warms up, is left out."""

    def __init__(self) -> None:
        self.images, self.started, self.ended = 0, 0.0, 0.0

    @property
    def images_per_second(self) -> float | None:
        return self.images / (self.ended - self.started) if self.images else None

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._count(trainer, args[2])

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._count(trainer, args[2])

    def _count(self, trainer: Trainer, batch: Any) -> None:
        self.ended = time.perf_counter()
        if self.started:
            self.images += len(batch[0]) * trainer.world_size
        else:
            self.started = self.ended


class StepLog(Callback):
    """Loss and learning rate every few steps, for loggers; for TensorBoard the history too."""

    def __init__(self, run: Path, history: History, tensorboard: bool = True) -> None:
        self.run = run
        self.history = history
        self.tensorboard = tensorboard
        self._writer: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.tensorboard and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            from torch.utils.tensorboard import SummaryWriter

            # What a killed run wrote after its last checkpoint is hidden.
            self._writer = SummaryWriter(
                str(self.run / "tensorboard"), purge_step=trainer.global_step + 1
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        batches, every = trainer.fit_loop.total_batch_idx + 1, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and batches % every == 0:
            values = {"loss": float(outputs["loss"]), "lr": learning_rate(trainer)}
            self._write(trainer, values)
            for logger in trainer.loggers:  # rows of an epoch they have from Lightning
                logger.log_metrics(values, trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._writer is not None:
            row = self.history.epochs[-1]
            self._write(trainer, {f"epoch/{name}": value for name, value in row.items()})
            self._writer.flush()

    def _write(self, trainer: Trainer, values: Row) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._writer is not None:
            self._writer.close()


class History(Callback):
    """One row an epoch, in `metrics.csv`, and alpha and beta of every layer, in `mix.csv`.

    The rows travel with the checkpoint, so a resumed run goes on in the same files.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.epochs: list[Row] = []
        self.mix: list[Row] = []
        self.trained = False  # whether an epoch ended in this process
        self._validated: Row = {}  # what the latest validation of this epoch measured
        self._images = 0
        self._seconds = self._last = 0.0

    @property
    def images_per_second(self) -> float:
        """Training speed of this epoch so far, over all devices, validation left out."""
        return self._images / max(self._seconds, 1e-9)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.mix:
            self._record_mix(pl_module, epoch=0)
        # What other callbacks look at, where a run goes on after a validation within an epoch.
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in self._validated.items()})
        self._last = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._images, self._seconds = 0, 0.0
        self._last = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._images += len(batch[0]) * trainer.world_size
        last, self._last = self._last, time.perf_counter()
        self._seconds += self._last - last

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics.items()
            self._validated = {k: float(v) for k, v in metrics if k.startswith("val_")}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trained = True
        epoch = trainer.current_epoch + 1
        # A measurement of an earlier epoch, which Lightning still has, is none of this one.
        logged = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("val_")}
        metrics = {**logged, **self._validated, **pl_module.train_metrics()}  # type: ignore[operator]
        self._validated = {}
        measured = {
            **{name: float(metrics[name]) for name in sorted(metrics)},
            "lr": learning_rate(trainer),
            "images_per_second": self.images_per_second,
            "train_seconds": self._seconds,
        }
        rounded = {name: float(f"{value:.6g}") for name, value in measured.items()}
        counts = {"epoch": epoch, "step": trainer.global_step, "images": self._images}
        self.epochs.append({**counts, **rounded})
        self._record_mix(pl_module, epoch)
        if trainer.is_global_zero:
            write_csv(self.run / "metrics.csv", self.epochs)
            write_csv(self.run / "mix.csv", self.mix)

    def _record_mix(self, pl_module: LightningModule, epoch: int) -> None:
        with pl_module.whole_weights():  # type: ignore[operator]
            layers = path_weights(pl_module.get_submodule("net"))
        self.mix += [{"epoch": epoch, **layer._asdict()} for layer in layers]

    def state_dict(self) -> dict[str, Any]:
        so_far = {"images": self._images, "seconds": self._seconds, "validated": self._validated}
        return {"epochs": self.epochs, "mix": self.mix, **so_far}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs, self.mix = list(state_dict["epochs"]), list(state_dict["mix"])
        self._images, self._seconds = state_dict["images"], state_dict["seconds"]
        self._validated = state_dict.get("validated", {})


def learning_rate(trainer: Trainer) -> float:
    return max(group["lr"] for group in trainer.optimizers[0].param_groups)


def write_csv(path: Path, rows: list[Row]) -> None:
    """Rows as CSV, a whole file at once; columns in the order in which they first come."""
    if not rows:
        return
    columns = list(dict.fromkeys(column for row in rows for column in row))
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)
