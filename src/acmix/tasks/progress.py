"""The progress of a training run: loss, images/s, time left."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from acmix.analysis.rates import rate
from acmix.tasks.base import Task
from acmix.tasks.callbacks import History

SECONDS_BETWEEN_UPDATES = 0.25
SECONDS_BETWEEN_LINES = 10.0


class TrainingBar(ProgressBar):
    """One bar over all epochs, which Lightning's bars lack; lines where there is no terminal."""

    def __init__(self, history: History, task: type[Task]) -> None:
        super().__init__()
        self.history, self.task = history, task
        self._console = Console(stderr=True)
        self._enabled = True
        self._updated = self._printed = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epochs, batches = trainer.max_epochs or -1, trainer.num_training_batches
        known = epochs > 0 and batches != float("inf")
        self._task = self._bar.add_task(
            "starting",
            total=epochs * batches if known else None,
            completed=trainer.fit_loop.total_batch_idx + 1,
            metrics="",
        )
        self._printed = time.monotonic()
        if self._enabled and self._console.is_terminal:
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        self._bar.advance(self._task)
        now = time.monotonic()
        if now - self._updated > SECONDS_BETWEEN_UPDATES:
            self._updated = now
            self._update(trainer, float(outputs["loss"]))
        if now - self._printed > SECONDS_BETWEEN_LINES:
            self._print_line()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._update(trainer, self.history.epochs[-1]["train_loss"])
        if trainer.current_epoch + 1 == trainer.max_epochs:
            self._print_line()

    def _print_line(self) -> None:
        """Where there is no terminal, a line for the bar."""
        self._printed = time.monotonic()
        if self._enabled and not self._console.is_terminal:
            task = self._bar.tasks[0]
            left = f"{task.time_remaining:.0f} s left" if task.time_remaining is not None else ""
            print(task.description, task.fields["metrics"], left, sep="  ", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def _update(self, trainer: Trainer, loss: float) -> None:
        epochs = trainer.max_epochs or -1
        measured = trainer.callback_metrics.get(self.task.monitor)
        held_out = f"  {self.task.measure} {float(measured):.1%}" if measured is not None else ""
        self._bar.update(
            self._task,
            description=f"epoch {trainer.current_epoch + 1}" + (f"/{epochs}" if epochs > 0 else ""),
            metrics=f"loss {loss:.3f}{held_out}  {rate(self.history.images_per_second)} images/s",
        )
