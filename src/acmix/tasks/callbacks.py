"""What is kept while a network trains: its history, its predictions, its checkpoints."""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from acmix.analysis.paths import path_weights

Row = dict[str, Any]


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


class History(Callback):
    """One row an epoch, in `metrics.csv`, and alpha and beta of every layer, in `mix.csv`.

    The rows travel with the checkpoint, so a resumed run goes on in the same files.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.epochs: list[Row] = []
        self.mix: list[Row] = []
        self.trained = False  # whether an epoch ended in this process
        self._images = 0
        self._start = self._last = 0.0

    @property
    def images_per_second(self) -> float:
        """Training speed of this epoch so far, over all devices, validation left out."""
        return self._images / max(self._last - self._start, 1e-9)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.mix:
            self._record_mix(pl_module, epoch=0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._images = 0
        self._start = self._last = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._images += len(batch[0]) * trainer.world_size
        self._last = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trained = True
        epoch = trainer.current_epoch + 1
        measured = {
            **{name: float(value) for name, value in sorted(trainer.callback_metrics.items())},
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "images_per_second": self.images_per_second,
            "train_seconds": self._last - self._start,
        }
        rounded = {name: float(f"{value:.6g}") for name, value in measured.items()}
        self.epochs.append({"epoch": epoch, "step": trainer.global_step, **rounded})
        self._record_mix(pl_module, epoch)
        if trainer.is_global_zero:
            write_csv(self.run / "metrics.csv", self.epochs)
            write_csv(self.run / "mix.csv", self.mix)

    def _record_mix(self, pl_module: LightningModule, epoch: int) -> None:
        layers = path_weights(pl_module.get_submodule("net"))
        self.mix += [{"epoch": epoch, **layer._asdict()} for layer in layers]

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "mix": self.mix}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs, self.mix = list(state_dict["epochs"]), list(state_dict["mix"])


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


class HeldOut(Callback):
    """Predictions of the latest validation: all classes, and images of some rights and wrongs."""

    def __init__(self, keep: int = 48) -> None:
        self.keep = keep
        self._reset()

    def _reset(self) -> None:
        self.truth: list[int] = []
        self.predicted: list[int] = []
        self.confidence: list[float] = []
        self.images: dict[int, Tensor] = {}
        self._room = {True: self.keep, False: self.keep}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._reset()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking:
            return
        images, classes = batch
        confidence, predicted = (part.tolist() for part in outputs.max(dim=1))
        for image, truth, guess in zip(images, classes.tolist(), predicted, strict=True):
            if self._room[truth == guess]:
                self._room[truth == guess] -= 1
                self.images[len(self.truth)] = image.detach().cpu()
            self.truth.append(truth)
            self.predicted.append(guess)
        self.confidence += confidence
