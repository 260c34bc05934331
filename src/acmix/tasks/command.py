"""`acmix fit`, `validate`, `test` and `predict`: Lightning's CLI around classification."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from argparse import ArgumentError, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import DefaultHelpFormatter
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import (
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch import Tensor

from acmix import data as data_kinds
from acmix.data import ImageData
from acmix.tasks import report
from acmix.tasks.callbacks import HeldOut, History, WholeFileCheckpointIO, write_csv
from acmix.tasks.classification import Classification
from acmix.tasks.errors import UserError, explain_parser, user_errors
from acmix.tasks.progress import TrainingBar

SETUP_ERRORS = (ValueError, TypeError, OSError, ImportError, MisconfigurationException)
RUN_ERRORS = (ValueError, OSError, MisconfigurationException)
KINDS = {name: getattr(data_kinds, name) for name in data_kinds.__all__ if name != "ImageData"}

SUMMARIES = {
    "fit": "train a network; pictures, metrics and checkpoints go into the run folder",
    "validate": "measure loss and accuracy of a run on its held-out images",
    "test": "measure loss and accuracy of a run on its test images",
    "predict": "write the class and confidence of every test image as CSV",
}
EXAMPLES = {
    "fit": """\
  acmix fit --config recipes/digits.yaml
  acmix fit --config recipes/digits.yaml --model.name resnet11_tiny_conv --run runs/conv
  acmix fit --config recipes/digits.yaml --model.lr 1e-3 --trainer.max_epochs 5 --run runs/short

  go on with a run that was stopped:
  acmix fit --config runs/digits/config.yaml --ckpt_path last""",
    "validate": """\
  acmix validate runs/digits
  acmix validate runs/digits/checkpoints/best.ckpt""",
    "test": """\
  acmix test runs/digits""",
    "predict": """\
  acmix predict runs/digits""",
}
HINTS = {
    "fit": "or take them from a recipe: --config recipes/digits.yaml",
    **dict.fromkeys(("validate", "test", "predict"), "or name a run, such as runs/digits"),
}


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """jsonargparse's, with the examples left as they are written."""


class SaveConfig(SaveConfigCallback):
    """The whole configuration as `config.yaml` in the run folder, whatever the logger."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            path = Path(self.config["run"]) / "config.yaml"
            self.parser.save(self.config, path, overwrite=True)


class TrainingCLI(LightningCLI):
    """Lightning's CLI for one subcommand: the objects, made from YAML and options."""

    def __init__(self, command: str, args: list[str]) -> None:
        self.command = command
        positional = "" if command == "fit" else " RUN_OR_CHECKPOINT"
        super().__init__(
            Classification,
            ImageData,
            subclass_mode_data=True,
            args=args,
            run=False,
            seed_everything_default=0,
            trainer_defaults={"max_epochs": 100, "enable_model_summary": False, "logger": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            parser_kwargs={
                "prog": f"acmix {command}",
                "usage": f"acmix {command}{positional} [--config FILE] [options]",
                "description": f"acmix {command}: {SUMMARIES[command]}",
                "epilog": f"examples:\n{EXAMPLES[command]}",
                "formatter_class": HelpFormatter,
                "exit_on_error": False,
                "allow_abbrev": False,
            },
        )

    @property
    def run_folder(self) -> Path:
        return Path(self.config["run"])

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", type=str, default="runs/fit", help="folder of this run")
        parser.add_argument(
            "--threads",
            type=PositiveInt | None,
            help="CPU threads; the default is PyTorch's choice",
        )
        parser.add_argument(
            "--ckpt_path", type=str | None, help="checkpoint to go on from, or 'last' of the run"
        )
        parser.link_arguments("run", "trainer.default_root_dir")
        parser.link_arguments("data.class_names", "model.class_names", apply_on="instantiate")
        parser.link_arguments("data.in_chans", "model.in_chans", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            options = [action.dest for action in parser._actions]
            message = explain_parser(str(error), options, KINDS)
            hint = f" ({HINTS[self.command]})" if "are required" in message else ""
            raise UserError(message + hint) from error

    def before_instantiate_classes(self) -> None:
        if threads := self.config["threads"]:
            torch.set_num_threads(threads)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        chosen = self.config_init["trainer"]
        callbacks = chosen.callbacks or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        if self.command == "fit":
            callbacks += self._fit_callbacks(chosen)
        return super().instantiate_trainer(
            callbacks=callbacks, plugins=[*_as_list(chosen.plugins), WholeFileCheckpointIO()]
        )

    def _fit_callbacks(self, chosen: Any) -> list[Callback]:
        self.history, self.held_out = History(self.run_folder), HeldOut()
        callbacks: list[Callback] = [self.history, self.held_out]
        if chosen.enable_progress_bar is not False:
            callbacks.append(TrainingBar(self.history))
        if chosen.enable_checkpointing is not False:
            callbacks.append(
                ModelCheckpoint(
                    self.run_folder / "checkpoints",
                    filename="best",
                    monitor="val_accuracy",
                    mode="max",
                    save_last=True,
                    save_on_train_epoch_end=True,
                    enable_version_counter=False,
                )
            )
        return callbacks


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def run(command: str, args: list[str], debug: bool = False) -> None:
    """Run one of the commands; a mistake of the user raises `UserError`."""
    with warnings.catch_warnings():
        if not debug:
            _quieten()
        if command != "fit":
            args = expand_run(args)
        with user_errors(*SETUP_ERRORS):
            cli = TrainingCLI(command, args)
        with user_errors(*RUN_ERRORS):
            {"fit": fit, "validate": evaluate, "test": evaluate, "predict": predict}[command](cli)


def _quieten() -> None:
    """Lightning's hints are for those who write training code, not for those who run it."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")


def expand_run(args: list[str]) -> list[str]:
    """A run folder or checkpoint in first place -> the options that it stands for."""
    if not args or args[0].startswith("-"):
        return args
    given = Path(args[0])
    folder = given if given.is_dir() else given.parent.parent
    checkpoint = folder / "checkpoints" / "last.ckpt" if given.is_dir() else given
    for needed in (checkpoint, folder / "config.yaml"):
        if not needed.is_file():
            raise UserError(f"{given} is no run folder or checkpoint of one: no {needed}")
    return [
        *("--config", str(folder / "config.yaml"), "--run", str(folder)),
        *("--ckpt_path", str(checkpoint), *args[1:]),
    ]


def fit(cli: TrainingCLI) -> None:
    folder, checkpoint = cli.run_folder, _checkpoint_to_go_on_from(cli)
    if cli.trainer.is_global_zero:
        if checkpoint is None or folder.resolve() not in checkpoint.resolve().parents:
            move_earlier_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint)
    except SystemExit as stop:
        if cli.trainer.interrupted:
            raise KeyboardInterrupt(_what_is_saved(cli)) from stop
        raise
    if cli.trainer.is_global_zero:
        config = json.loads(cli.parser.dump(cli.config, format="json"))
        summary = report.write(folder, cli.model, cli.datamodule, cli.history, cli.held_out, config)
        report.show(folder, summary, Console())


def _checkpoint_to_go_on_from(cli: TrainingCLI) -> Path | None:
    """`--ckpt_path`; "last" before there is a checkpoint starts anew, as a requeued job needs."""
    chosen, last = cli.config["ckpt_path"], cli.run_folder / "checkpoints" / "last.ckpt"
    if chosen == "last":
        return last if last.is_file() else None
    if chosen is not None and not Path(chosen).is_file():
        raise FileNotFoundError(f"ckpt_path: no checkpoint at {chosen}")
    return chosen and Path(chosen)


def move_earlier_run(folder: Path) -> None:
    """A run already in the folder keeps its files under the first free name FOLDER.1, .2, ..."""
    if not (folder / "config.yaml").is_file():
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    print(f"{folder} held an earlier run, which is now {aside}", file=sys.stderr)


def _what_is_saved(cli: TrainingCLI) -> str:
    last = cli.run_folder / "checkpoints" / "last.ckpt"
    where = f"Stopped in epoch {cli.trainer.current_epoch + 1} of {cli.trainer.max_epochs}"
    if not last.is_file():
        return f"{where}; no epoch was finished, so no checkpoint is saved."
    epoch = torch.load(last, map_location="cpu", weights_only=True, mmap=True)["epoch"] + 1
    return (
        f"{where}; {last} holds the end of epoch {epoch}. Go on with: "
        f"acmix fit --config {cli.run_folder}/config.yaml --ckpt_path last"
    )


def evaluate(cli: TrainingCLI) -> None:
    """Loss and accuracy of the checkpoint, as a table."""
    run_stage = getattr(cli.trainer, cli.command)
    [metrics] = run_stage(
        cli.model, datamodule=cli.datamodule, ckpt_path=_checkpoint(cli), verbose=False
    )
    for name, value in metrics.items():
        shown = f"{value:.2%}" if name.endswith("accuracy") else f"{value:.4f}"
        print(f"{name:16}{shown}")


def predict(cli: TrainingCLI) -> None:
    """Class and confidence of every test image, in `predictions.csv` of the run folder."""
    batches = cli.trainer.predict(cli.model, datamodule=cli.datamodule, ckpt_path=_checkpoint(cli))
    confidence, predicted = torch.cat(cast("list[Tensor]", batches)).max(dim=1)
    names = cli.model.class_names
    rows = [
        {"image": index, "class": names[label], "confidence": round(sure, 6)}
        for index, (label, sure) in enumerate(
            zip(predicted.tolist(), confidence.tolist(), strict=True)
        )
    ]
    path = cli.run_folder / "predictions.csv"
    write_csv(path, rows)
    print(f"{len(rows)} images: {path}")


def _checkpoint(cli: TrainingCLI) -> str:
    """The chosen checkpoint; weights at random would give numbers that look like a result."""
    path = cli.config["ckpt_path"] or str(cli.run_folder / "checkpoints" / "last.ckpt")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; name a run: acmix {cli.command} RUN")
    return path
