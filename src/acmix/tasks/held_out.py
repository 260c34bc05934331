"""What a task keeps of the latest validation, to draw it when a run ends."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure

from acmix.data import ImageData

Row = dict[str, Any]


class HeldOut(Callback):
    """Predictions of the latest validation, by batch; those of the sanity check are passed over."""

    def __init__(self) -> None:
        self.reset()

    @abstractmethod
    def reset(self) -> None:
        """Forget all that was kept."""

    @abstractmethod
    def keep(self, outputs: Any, batch: Any) -> None:
        """Keep what a validation step returned for a batch."""

    @abstractmethod
    def __len__(self) -> int:
        """Images that were kept count of."""

    def pictures(self, data: ImageData) -> dict[str, Callable[[], Figure]]:
        """What can be drawn, by the name of its file."""
        return {}

    def tables(self, data: ImageData) -> dict[str, list[Row]]:
        """Rows by the name of their file."""
        return {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.reset()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking:
            self.keep(outputs, batch)
