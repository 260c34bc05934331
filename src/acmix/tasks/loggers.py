"""Loggers by name: TensorBoard, which is ours, and those of Lightning that need a package."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from acmix.errors import UserError

NAMES = ("tensorboard", "wandb", "mlflow", "none")
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}


def create_logger(name: str, run: Path) -> Logger | None:
    """Lightning's logger of this name; None for what needs none.

    Raises:
        UserError: Where its package is not installed.
    """
    package = PACKAGES.get(name)
    if package is None:
        return None
    if find_spec(package) is None:
        raise UserError(f"logger: {name} needs {package}: pip install {package}")
    if name == "wandb":
        return WandbLogger(name=run.name, project="acmix", save_dir=run)
    runs = run.resolve().parent
    store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs / 'mlflow.db'}"
    return MLFlowLogger(experiment_name="acmix", run_name=run.name, tracking_uri=store)
