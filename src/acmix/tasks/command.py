"""`acmix fit`, `validate`, `test` and `predict`: Lightning's CLI around classification."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import signal
import sys
import warnings
from argparse import ArgumentError, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import DefaultHelpFormatter
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import (
    LightningArgumentParser,
    LightningCLI,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from acmix import data as data_kinds
from acmix.data import ImageData
from acmix.errors import UserError, one_line, user_errors
from acmix.tasks import report
from acmix.tasks.callbacks import (
    HeldOut,
    History,
    LastCheckpoint,
    TensorBoard,
    WholeFileCheckpointIO,
    write_csv,
)
from acmix.tasks.classification import Classification
from acmix.tasks.console import console
from acmix.tasks.options import explain_parser
from acmix.tasks.progress import TrainingBar

SETUP_ERRORS = (ValueError, TypeError, OSError, ImportError, MisconfigurationException)
RUN_ERRORS = (ValueError, OSError, MisconfigurationException, torch.OutOfMemoryError)
NO_DEVICE = re.compile("No supported gpu backend|accelerator is not available")
TERMINATED = 128 + signal.SIGTERM
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


def named_folder(path: str) -> str:
    """The path; one that ends in no name, such as ".", as the folder that it now stands for."""
    return path if Path(path).name not in ("", "..") else str(Path(path).resolve())


class RunFolder(Callback):
    """Touches the run folder only once network, optimizer and checkpoint are known to be good.

    What makes a folder a run is `config.yaml` beside `checkpoints`, as `is_run` asks.
    """

    def __init__(self, cli: TrainingCLI) -> None:
        self.cli = cli
        self.goes_on = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before the loggers write, which may do so in this folder.
        if trainer.is_global_zero and not self.goes_on and not trainer.fit_loop.skip:
            move_earlier_run(self.cli.run_folder)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["input"] = self.cli.datamodule.input_config  # for `acmix predict`

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            folder = self.cli.run_folder
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.cli.parser.save(self.cli.config, folder / "config.yaml", overwrite=True)


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
            save_config_callback=None,
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
        parser.add_argument(
            "--every_n_steps",
            type=PositiveInt,
            default=500,
            help="steps from one last.ckpt to the next within an epoch",
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
        folder = named_folder(self.config["run"])
        self.config["run"] = self.config["trainer"]["default_root_dir"] = folder

    def before_instantiate_classes(self) -> None:
        if threads := self.config["threads"]:
            torch.set_num_threads(threads)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        chosen = self.config_init["trainer"]
        callbacks = chosen.callbacks or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        if self.command == "fit":
            callbacks += self._fit_callbacks(chosen)
        try:
            trainer = super().instantiate_trainer(
                callbacks=callbacks,
                plugins=[*_as_list(chosen.plugins), WholeFileCheckpointIO()],
                use_distributed_sampler=False,  # our loaders divide the images among processes
            )
        except MisconfigurationException as error:
            if NO_DEVICE.search(str(error)):
                kind = chosen.accelerator
                raise UserError(
                    f"trainer.accelerator: expected a device that is there, got {kind}"
                ) from error
            raise
        check_processes(trainer)
        return trainer

    def after_instantiate_classes(self) -> None:
        self.datamodule.seed = self.model.seed = int(self.config["seed_everything"])

    def _fit_callbacks(self, chosen: Any) -> list[Callback]:
        self.folder, self.history = RunFolder(self), History(self.run_folder)
        self.held_out = HeldOut()
        callbacks: list[Callback] = [self.folder, self.history, self.held_out]
        callbacks.append(TensorBoard(self.run_folder, self.history))
        if chosen.enable_progress_bar is not False:
            callbacks.append(TrainingBar(self.history))
        if chosen.enable_checkpointing is not False:
            checkpoints = self.run_folder / "checkpoints"
            best = ModelCheckpoint(
                checkpoints,
                filename="best",
                monitor="val_accuracy",
                mode="max",
                save_on_train_epoch_end=True,
                enable_version_counter=False,
            )
            last = LastCheckpoint(checkpoints / "last.ckpt", self.config["every_n_steps"])
            callbacks += [best, last]
        return callbacks


def check_processes(trainer: Trainer) -> None:
    """More processes on a CPU than it has cores, which would halt it, raise `UserError`."""
    most = max(2, os.cpu_count() or 1)
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > most:
        raise UserError(
            f"trainer.devices: expected at most {most} on this CPU, got {trainer.num_devices}"
        )


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def run(command: str, args: list[str], debug: bool = False) -> None:
    """Run one of the commands; a mistake of the user raises `UserError`."""
    with quiet(debug):
        if command != "fit":
            args = expand_run(args)
        cli = make(command, run_of_config(args))
        stages = {"fit": fit, "validate": evaluate, "test": evaluate, "predict": predict}
        with user_errors(*RUN_ERRORS):
            stages[command](cli)


@contextmanager
def quiet(debug: bool) -> Iterator[None]:
    """Lightning's hints are for those who write training code, not for those who run it."""
    with warnings.catch_warnings():
        if not debug:
            for name in ("lightning.pytorch", "lightning.fabric"):
                logging.getLogger(name).setLevel(logging.WARNING)
            warnings.filterwarnings("ignore", module="lightning")
        yield


def make(command: str, args: list[str]) -> TrainingCLI:
    """Network, data and trainer of a command; a mistake in the options raises `UserError`."""
    with user_errors(*SETUP_ERRORS):
        return TrainingCLI(command, args)


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


def run_of_config(args: list[str]) -> list[str]:
    """The `config.yaml` of a run -> `--run` with the folder where it lies, unless one is given.

    The folder that the file names may be another one: runs are moved, copied, and named from
    elsewhere.
    """
    options = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("-c", "--config", action="append", default=[])
    options.add_argument("--run")
    try:
        given, _ = options.parse_known_args(args)
    except ArgumentError:
        return args  # a value is missing, which the whole parser says better
    folders = [Path(file).parent for file in given.config if Path(file).name == "config.yaml"]
    if given.run is not None or not folders or not is_run(folders[-1]):
        return args
    return [*args, "--run", str(folders[-1])]


def fit(cli: TrainingCLI) -> None:
    summary = train(cli)
    if summary is not None:
        report.show(cli.run_folder, summary, console())


def train(cli: TrainingCLI) -> dict[str, Any] | None:
    """Train and write what a run leaves; its summary, or None where there was nothing to do."""
    folder, checkpoint = cli.run_folder, _checkpoint_to_go_on_from(cli)
    if checkpoint is not None:
        check_checkpoint(checkpoint, cli.model)
        cli.model.goes_on = True
        cli.folder.goes_on = folder.resolve() in checkpoint.resolve().parents
    if cli.trainer.is_global_zero and not cli.folder.goes_on:
        check_folder(folder)
    try:
        cli.trainer.fit(
            cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True
        )
    except SIGTERMException as stop:
        if cli.trainer.is_global_zero:
            print(_what_is_saved(cli), file=sys.stderr)
        raise SystemExit(TERMINATED) from stop
    except SystemExit as stop:
        if cli.trainer.interrupted:
            raise KeyboardInterrupt(_what_is_saved(cli)) from stop
        raise
    if not cli.trainer.is_global_zero:
        return None
    # A run that was killed after its last epoch still lacks its report.
    reported = (folder / "summary.json").is_file() or not cli.history.epochs
    if not cli.history.trained and reported:
        print(_why_nothing_was_trained(cli))
        return None
    config = json.loads(cli.parser.dump(cli.config, format="json"))
    finished = report.Finished(cli.model, cli.datamodule, cli.history, cli.held_out, config)
    return report.write(folder, finished)


def _checkpoint_to_go_on_from(cli: TrainingCLI) -> Path | None:
    """`--ckpt_path`; "last" before there is a checkpoint starts anew, as a requeued job needs."""
    chosen, last = cli.config["ckpt_path"], cli.run_folder / "checkpoints" / "last.ckpt"
    if chosen == "last":
        if last.is_file():
            return last
        if cli.trainer.is_global_zero:
            print(f"no checkpoint at {last} yet: starting anew", file=sys.stderr)
        return None
    if chosen is not None and not Path(chosen).is_file():
        raise FileNotFoundError(f"ckpt_path: no checkpoint at {chosen}")
    return chosen and Path(chosen)


def check_checkpoint(path: Path, model: Classification) -> None:
    """Before any work: a file that cannot be read or holds another network raises `UserError`."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        model.on_load_checkpoint(checkpoint)
        was, opt = checkpoint["hyper_parameters"]["opt"], model.hparams["opt"]
        if was != opt:
            raise ValueError(f"the checkpoint was trained with model.opt {was}, not {opt}")
    except Exception as error:  # of a file that is no checkpoint, torch.load raises anything
        raise UserError(f"{path}: {one_line(error)}") from error


def is_run(folder: Path) -> bool:
    """Whether `acmix fit` made the folder: `checkpoints` beside a `config.yaml` with its keys."""
    config = folder / "config.yaml"
    if not (config.is_file() and (folder / "checkpoints").is_dir()):
        return False
    keys = {line.split(":")[0] for line in config.read_text(errors="replace").splitlines()}
    return keys >= {"data", "model", "run", "trainer"}


def check_folder(folder: Path) -> None:
    """A folder with anything but an earlier run in it raises `UserError`."""
    if folder.is_dir() and any(folder.iterdir()) and not is_run(folder):
        raise UserError(f"run: {folder} is not empty and no run of acmix")


def move_earlier_run(folder: Path) -> None:
    """A run already in the folder keeps its files under the first free name FOLDER.1, .2, ..."""
    if not is_run(folder):
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    print(f"{folder} held an earlier run, which is now {aside}", file=sys.stderr)


def _why_nothing_was_trained(cli: TrainingCLI) -> str:
    done, wanted = len(cli.history.epochs), cli.trainer.max_epochs
    if done:
        return f"{cli.run_folder}: already finished ({done} of {wanted} epochs)"
    return "nothing was trained: the trainer's limits leave no epoch or no batch"


def _what_is_saved(cli: TrainingCLI) -> str:
    last = cli.run_folder / "checkpoints" / "last.ckpt"
    where = f"Stopped in epoch {cli.trainer.current_epoch + 1} of {cli.trainer.max_epochs}"
    if not last.is_file():
        return f"{where}; no checkpoint is saved yet."
    step = torch.load(last, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    return (
        f"{where}; {last} holds step {step}. Go on with: "
        f"acmix fit --config {shlex.quote(f'{cli.run_folder}/config.yaml')} --ckpt_path last"
    )


def evaluate(cli: TrainingCLI) -> None:
    """Loss and accuracy of the checkpoint, as a table."""
    run_stage = getattr(cli.trainer, cli.command)
    [metrics] = run_stage(
        cli.model,
        datamodule=cli.datamodule,
        ckpt_path=_checkpoint(cli),
        weights_only=True,
        verbose=False,
    )
    for name, value in metrics.items():
        shown = f"{value:.2%}" if name.endswith("accuracy") else f"{value:.4f}"
        print(f"{name:16}{shown}")


def predict(cli: TrainingCLI) -> None:
    """Class and confidence of every test image, in `predictions.csv` of the run folder."""
    if cli.trainer.world_size > 1:
        raise UserError(f"trainer.devices: expected 1, got {cli.trainer.world_size} processes")
    batches = cli.trainer.predict(
        cli.model, datamodule=cli.datamodule, ckpt_path=_checkpoint(cli), weights_only=True
    )
    found, true = (torch.cat(part) for part in zip(*cast("Any", batches), strict=True))
    confidence, predicted = found.max(dim=1)
    names = cli.model.class_names
    loader: Any = cli.trainer.predict_dataloaders
    image_name = getattr(loader.dataset, "name", str)
    columns = (predicted.tolist(), true.tolist(), confidence.tolist())
    rows = [
        {"image": image_name(index), "class": names[label], "truth": names[is_], "confidence": sure}
        for index, (label, is_, sure) in enumerate(zip(*columns, strict=True))
    ]
    path = cli.run_folder / "predictions.csv"
    write_csv(path, rows)
    print(f"{len(rows)} images: {path}")


def _checkpoint(cli: TrainingCLI) -> str:
    """The chosen checkpoint; weights at random would give numbers that look like a result."""
    path = cli.config["ckpt_path"] or str(cli.run_folder / "checkpoints" / "last.ckpt")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; name a run: acmix {cli.command} RUN")
    check_checkpoint(Path(path), cli.model)
    return path
