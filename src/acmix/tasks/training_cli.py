"""Lightning's CLI around the tasks: network, data and trainer, made from YAML and options."""

from __future__ import annotations

import os
import re
import sys
from argparse import ArgumentError, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from acmix import data as data_kinds
from acmix.errors import UserError, one_line
from acmix.ranges import check_ranges
from acmix.tasks import loggers, report
from acmix.tasks.arguments import configs_of, task_of_args
from acmix.tasks.base import Task
from acmix.tasks.callbacks import (
    BestCheckpoint,
    History,
    LastCheckpoint,
    Patience,
    Speed,
    StepLog,
    WholeFileCheckpointIO,
)
from acmix.tasks.classification import Classification
from acmix.tasks.detection import Detection
from acmix.tasks.options import (
    check_config,
    check_loggers,
    check_monitors,
    check_own,
    check_trainer,
    explain_parser,
    name_trainer_option,
    own_words,
    whole_numbers_first,
)
from acmix.tasks.progress import TrainingBar
from acmix.tasks.run_folder import Lock, move_earlier_run, named_folder
from acmix.tasks.segmentation import Segmentation

SETUP_ERRORS = (ValueError, TypeError, OSError, ImportError, MisconfigurationException)
NO_DEVICE = re.compile("No supported gpu backend|accelerator is not available|torch_xla")
TASKS: dict[str, type[Task]] = {
    kind.task: kind for kind in (Classification, Detection, Segmentation)
}

SUMMARIES = {
    "fit": "train a network; pictures, metrics and checkpoints go into the run folder",
    "validate": "measure a run on its held-out images",
    "test": "measure a run on its test images",
    "predict": "write what is found in every test image as CSV",
    "check": "look at every image that fit would take: counts, sizes, broken and equal files",
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
    "check": """\
  acmix check --config recipes/digits.yaml
  acmix check --data Images --data.source my_images --data.val_fraction 0.1""",
}
HINTS = {
    **dict.fromkeys(("fit", "check"), "or take them from a recipe: --config recipes/digits.yaml"),
    **dict.fromkeys(("validate", "test", "predict"), "or name a run, such as runs/digits"),
}


def make(command: str, args: list[str]) -> TrainingCLI:
    """Network, data and trainer of a command; a mistake in the options raises `UserError`."""
    try:
        return TrainingCLI(command, args)
    except SETUP_ERRORS as error:
        raise UserError(one_line(own_words(error))) from error


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """jsonargparse's, with the examples left as they are written."""


class TrainingCLI(LightningCLI):
    """Lightning's CLI for one subcommand: the objects, made from YAML and options."""

    def __init__(self, command: str, args: list[str]) -> None:
        self.command = command
        self.task = TASKS[task_of_args(args, TASKS)]
        positional = "" if command in ("fit", "check") else " RUN_OR_CHECKPOINT"
        super().__init__(
            self.task,
            self.task.data_class,
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
        parser.add_argument(
            "--task", type=str, default=self.task.task, help=f"one of {', '.join(TASKS)}"
        )
        parser.add_argument("--run", type=str, default="runs/fit", help="folder of this run")
        parser.add_argument(
            "--threads",
            type=int | None,
            help="CPU threads; the default is PyTorch's choice",
        )
        parser.add_argument(
            "--ckpt_path", type=str | None, help="checkpoint to go on from, or 'last' of the run"
        )
        parser.add_argument(
            "--every_n_steps",
            type=int,
            default=500,
            help="steps from one last.ckpt to the next within an epoch",
        )
        parser.add_argument(
            "--patience",
            type=int | None,
            help=f"stop after so many epochs without a better {self.task.monitor}",
        )
        parser.add_argument(
            "--logger",
            type=Literal[loggers.NAMES],
            default="tensorboard",
            help="where losses and measures go beside metrics.csv",
        )
        whole_numbers_first(parser)
        parser.link_arguments("run", "trainer.default_root_dir")
        for name in self.task.from_data:
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        options = [action.dest for action in parser._actions]
        for path in configs_of(args):
            check_config(path, options)
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            message = explain_parser(str(error), options, data_of(self.task))
            needed = message.startswith(("model.name", "data:", "data.source: expected a value"))
            hint = f" ({HINTS[self.command]})" if needed and "got none" in message else ""
            raise UserError(message + hint) from error
        check_own(self.config)
        check_trainer(self.config["trainer"])
        folder = named_folder(self.config["run"])
        self.config["run"] = self.config["trainer"]["default_root_dir"] = folder
        check_ranges(Task.__init__, self.config["model"], "model.")
        check_ranges(self.task.__init__, self.config["model"], "model.")

    def before_instantiate_classes(self) -> None:
        if threads := self.config["threads"]:
            torch.set_num_threads(threads)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        chosen = self.config_init["trainer"]
        callbacks = chosen.callbacks or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        check_monitors(callbacks, self.model.measures)
        check_loggers(callbacks, chosen.logger or self.config["logger"] in loggers.PACKAGES)
        if self.command == "fit":
            callbacks += self._fit_callbacks(chosen, callbacks)
            if logger := loggers.create_logger(self.config["logger"], self.run_folder):
                kwargs["logger"] = logger
        else:
            if chosen.enable_progress_bar is None and not sys.stderr.isatty():
                kwargs["enable_progress_bar"] = False  # which would stand among the results
            self.speed = Speed()
            callbacks.append(self.speed)
        plugins = [*_as_list(chosen.plugins), WholeFileCheckpointIO()]
        if "SLURM_NTASKS" in os.environ and "SLURM_STEP_NUM_TASKS" not in os.environ:
            # Of a batch script, which srun did not start: Lightning would wait for others.
            plugins.append(LightningEnvironment())
        try:
            trainer = super().instantiate_trainer(
                **kwargs,
                callbacks=callbacks,
                plugins=plugins,
                use_distributed_sampler=False,  # our loaders divide the images among processes
            )
        except (*SETUP_ERRORS, RuntimeError) as error:
            if NO_DEVICE.search(str(error)):
                kind = chosen.accelerator
                raise UserError(
                    f"trainer.accelerator: expected a device that is there, got {kind}"
                ) from error
            raise UserError(name_trainer_option(one_line(error), "trainer: ")) from error
        check_processes(trainer)
        return trainer

    def after_instantiate_classes(self) -> None:
        self.model.look_at(self.datamodule)
        self.datamodule.seed = self.model.seed = int(self.config["seed_everything"])

    def save_config(self, path: Path) -> None:
        """The options of the run, to do it again from any folder."""
        config = self.config.clone()
        config["ckpt_path"] = None
        for name in ("source", "root"):
            if name in config["data"].get("init_args", {}) and hasattr(self.datamodule, name):
                config["data"]["init_args"][name] = getattr(self.datamodule, name)
        start = config["model"]["warm_start"]
        if start and Path(start).is_file():
            config["model"]["warm_start"] = str(Path(start).resolve())
        self.parser.save(config, path, overwrite=True)

    def _fit_callbacks(self, chosen: Any, given: list[Callback]) -> list[Callback]:
        self.folder, self.history = RunFolder(self), History(self.run_folder)
        self.held_out = self.model.create_held_out()
        callbacks: list[Callback] = [self.folder, self.history, self.held_out]
        tensorboard = self.config["logger"] == "tensorboard"
        callbacks.append(StepLog(self.run_folder, self.history, tensorboard))
        own_bar = any(isinstance(of, ProgressBar) for of in given)
        if chosen.enable_progress_bar is not False and not own_bar:
            callbacks.append(TrainingBar(self.history, self.task))
        self.patience = self.last = None
        if patience := self.config["patience"]:
            self.patience = Patience(self.task.monitor, mode="max", patience=patience)
            callbacks.append(self.patience)
        if chosen.enable_checkpointing is not False:
            checkpoints = self.run_folder / "checkpoints"
            best = BestCheckpoint(
                checkpoints,
                filename="best",
                monitor=self.task.monitor,
                mode="max",
                save_on_train_epoch_end=True,
                enable_version_counter=False,
            )
            self.last = LastCheckpoint(checkpoints / "last.ckpt", self.config["every_n_steps"])
            callbacks += [best, self.last]
        return callbacks


class RunFolder(Callback):
    """Touches the run folder only once network, optimizer and checkpoint are known to be good.

    What makes a folder a run is `config.yaml` beside `checkpoints`, as `is_run` asks.
    """

    def __init__(self, cli: TrainingCLI) -> None:
        self.cli = cli
        self.goes_on = False
        self.lock = Lock(cli.run_folder)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before the loggers write, which may do so in this folder.
        if trainer.enable_validation:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()  # a mistake there moves no folder
        if not trainer.is_global_zero or trainer.fit_loop.skip:
            return
        self.lock.check()
        if not self.goes_on:
            move_earlier_run(self.cli.run_folder)
        self.lock.take()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["input"] = self.cli.datamodule.input_config  # for `acmix predict`

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            folder = self.cli.run_folder
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (folder / "summary.json").unlink(missing_ok=True)  # of a run that was shorter
            self.cli.save_config(folder / "config.yaml")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        picture = self.cli.run_folder / "augmented.png"
        if trainer.is_global_zero and trainer.global_step == batch_idx == 0:
            report.draw(lambda: self.cli.model.draw_batch(self.cli.datamodule, batch), picture)


def data_of(task: type[Task]) -> dict[str, type]:
    """The kinds of data that a task takes, by name."""
    kinds = {name: getattr(data_kinds, name) for name in data_kinds.__all__}
    return {
        name: kind
        for name, kind in kinds.items()
        if issubclass(kind, task.data_class) and kind.__module__ != data_kinds.base.__name__
    }


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
