"""`acmix fit`, `validate`, `test` and `predict`: Lightning's CLI around the tasks."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import signal
import sys
import time
import warnings
from argparse import ArgumentError, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, ProgressBar, Timer
from lightning.pytorch.cli import (
    LightningArgumentParser,
    LightningCLI,
)
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from acmix import data as data_kinds
from acmix.data import ImageData
from acmix.data.survey import broken_within
from acmix.errors import UserError, did_you_mean, one_line, user_errors
from acmix.ranges import check_ranges
from acmix.tasks import loggers, report
from acmix.tasks.base import Task
from acmix.tasks.callbacks import History, LastCheckpoint, StepLog, WholeFileCheckpointIO, write_csv
from acmix.tasks.classification import Classification
from acmix.tasks.console import console
from acmix.tasks.options import (
    check_config,
    check_loggers,
    check_monitors,
    check_own,
    check_trainer,
    explain_parser,
    name_trainer_option,
    own_words,
    read_config,
    whole_numbers_first,
)
from acmix.tasks.progress import TrainingBar
from acmix.tasks.run_folder import (
    Lock,
    check_folder,
    is_run,
    move_earlier_run,
    named_folder,
    nearest_run,
)

SETUP_ERRORS = (ValueError, TypeError, OSError, ImportError, MisconfigurationException)
RUN_ERRORS = (ValueError, OSError, MisconfigurationException, torch.OutOfMemoryError)
NO_DEVICE = re.compile("No supported gpu backend|accelerator is not available|torch_xla")
LOOKING = 5.0  # seconds in which `fit` looks for broken files before it starts
NAMED = 20  # of them
TERMINATED = 128 + signal.SIGTERM
TASKS: dict[str, type[Task]] = {kind.task: kind for kind in (Classification,)}

SUMMARIES = {
    "fit": "train a network; pictures, metrics and checkpoints go into the run folder",
    "validate": "measure loss and accuracy of a run on its held-out images",
    "test": "measure loss and accuracy of a run on its test images",
    "predict": "write the class and confidence of every test image as CSV",
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


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """jsonargparse's, with the examples left as they are written."""


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


class TrainingCLI(LightningCLI):
    """Lightning's CLI for one subcommand: the objects, made from YAML and options."""

    def __init__(self, command: str, args: list[str]) -> None:
        self.command = command
        self.task = TASKS[task_of_args(args)]
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
        parser.link_arguments("data.class_names", "model.class_names", apply_on="instantiate")
        parser.link_arguments("data.in_chans", "model.in_chans", apply_on="instantiate")

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
            callbacks.append(TrainingBar(self.history, self.task.monitor))
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


def data_of(task: type[Task]) -> dict[str, type]:
    """The kinds of data that a task takes, by name."""
    kinds = {name: getattr(data_kinds, name) for name in data_kinds.__all__}
    return {
        name: kind
        for name, kind in kinds.items()
        if issubclass(kind, task.data_class) and kind is not task.data_class
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


def run(command: str, args: list[str], debug: bool = False) -> None:
    """Run one of the commands; a mistake of the user raises `UserError`."""
    with quiet(debug):
        if command != "fit":
            args = expand_run(args)
        cli = make(command, run_of_config(args))
        stages = {"fit": fit, "validate": evaluate, "test": evaluate, "predict": predict}
        with run_errors():
            stages[command](cli)


@contextmanager
def run_errors() -> Iterator[None]:
    """Turn what goes wrong in a run for a reason of the user's into a `UserError`."""
    try:
        yield
    except BrokenPipeError:  # of stdout: its reader has seen enough
        raise
    except RUN_ERRORS as error:
        raise UserError(name_trainer_option(one_line(error))) from error


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
    try:
        return TrainingCLI(command, args)
    except SETUP_ERRORS as error:
        raise UserError(one_line(own_words(error))) from error


def expand_run(args: list[str]) -> list[str]:
    """A run folder or checkpoint in first place -> the options that it stands for."""
    if not args or args[0].startswith("-"):
        return args
    given = Path(args[0])
    if not args[0] or not given.exists():
        raise UserError(f"expected a run folder or checkpoint, got {args[0]!r}{nearest_run(given)}")
    folder = given if given.is_dir() else given.parent.parent
    checkpoint = folder / "checkpoints" / "last.ckpt" if given.is_dir() else given
    for needed in (checkpoint, folder / "config.yaml"):
        if not needed.is_file():
            raise UserError(f"expected a run folder or checkpoint, got {given}: no {needed}")
    return [
        *("--config", str(folder / "config.yaml"), "--run", str(folder)),
        *("--ckpt_path", str(checkpoint), *args[1:]),
    ]


def task_of_args(args: list[str]) -> str:
    """`--task`, else that of the last configuration which names one."""
    options = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("--task")
    try:
        given = options.parse_known_args(args)[0].task
    except ArgumentError:
        given = None  # a value is missing, which the whole parser says better
    named = [given] if given is not None else [read_config(f).get("task") for f in configs_of(args)]
    task = next((task for task in reversed(named) if task is not None), Classification.task)
    if task not in TASKS:
        offer = did_you_mean(str(task), TASKS)
        raise UserError(f"task: expected {' or '.join(TASKS)}, got {task!r}{offer}")
    return task


def configs_of(args: list[str]) -> list[str]:
    """The files that `--config` names."""
    options = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("-c", "--config", action="append", default=[])
    try:
        return options.parse_known_args(args)[0].config
    except ArgumentError:
        return []  # a value is missing, which the whole parser says better


def run_of_config(args: list[str]) -> list[str]:
    """The `config.yaml` of a run -> `--run` with the folder where it lies, unless one is given.

    The folder that the file names may be another one: runs are moved, copied, and named from
    elsewhere.
    """
    named = any(arg.split("=")[0] == "--run" for arg in args)
    folders = [Path(file).parent for file in configs_of(args) if Path(file).name == "config.yaml"]
    if named or not folders or not is_run(folders[-1]):
        return args
    return [*args, "--run", str(folders[-1])]


def fit(cli: TrainingCLI) -> None:
    summary = train(cli)
    if summary is not None:
        report.show(cli.run_folder, summary, console())
        if "failed" in summary:
            raise SystemExit(1)


def train(cli: TrainingCLI) -> dict[str, Any] | None:
    """Train and write what a run leaves; its summary, or None where there was nothing to do."""
    folder = cli.run_folder
    if cli.trainer.is_global_zero:
        cli.folder.lock.check()
    checkpoint = _checkpoint_to_go_on_from(cli)
    if checkpoint is not None:
        check_checkpoint(checkpoint, cli.model)
        cli.model.goes_on = True
        cli.folder.goes_on = folder.resolve() in checkpoint.resolve().parents
    if cli.trainer.is_global_zero and not cli.folder.goes_on:
        check_folder(folder)
    if cli.trainer.is_global_zero and not cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
        with user_errors(ValueError):
            check_images(cli.datamodule)
    try:
        _train(cli, checkpoint)
        return _report(cli) if cli.trainer.is_global_zero else None
    finally:
        cli.folder.lock.release()


def check_images(data: ImageData) -> None:
    """Broken files that can be found within seconds raise `UserError`, after all are named."""
    if not data.looks_early:
        return
    background = (data.input_config or {}).get("background", "white")
    broken = list(broken_within(LOOKING, data.pictures().values(), background))
    for image in broken[:NAMED]:
        print(f"cannot read {image.name}: {image.reason}", file=sys.stderr)
    if broken:
        raise UserError(
            f"data.source: expected images that can be read, got {len(broken)} that cannot "
            "(--data.max_corrupt leaves them out, acmix check names all)"
        )


def _train(cli: TrainingCLI, checkpoint: Path | None) -> None:
    try:
        cli.trainer.fit(
            cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True
        )
    except SIGTERMException as stop:
        if cli.trainer.is_global_zero:
            print(f"Stopped {_what_is_saved(cli)}", file=sys.stderr)
        raise SystemExit(TERMINATED) from stop
    except SystemExit as stop:
        if cli.trainer.interrupted:
            raise KeyboardInterrupt(f"Stopped {_what_is_saved(cli)}") from stop
        raise


def _report(cli: TrainingCLI) -> dict[str, Any] | None:
    # A run that was killed after its last epoch still lacks its report.
    reported = (cli.run_folder / "summary.json").is_file() or not cli.history.epochs
    if not cli.history.trained and reported:
        print(_why_nothing_was_trained(cli))
        return None
    if cli.last is not None and cli.last.within and cli.trainer.max_steps < 0:
        print(f"Ended {_what_is_saved(cli, len(cli.history.epochs))}", file=sys.stderr)
    loader: Any = cli.trainer.train_dataloader
    images = len(getattr(loader.dataset, "stream", loader.dataset))
    config = json.loads(cli.parser.dump(cli.config, format="json"))
    finished = report.Finished(cli.model, cli.datamodule, cli.history, cli.held_out, images, config)
    return report.write(cli.run_folder, finished)


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


def check_checkpoint(path: Path, model: Task) -> None:
    """Before any work: a file that cannot be read or holds another network raises `UserError`."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        was = checkpoint["hyper_parameters"]["opt"]
    except Exception as error:  # of a file that is no checkpoint, torch.load raises anything
        raise UserError(f"ckpt_path: expected a checkpoint of acmix fit, got {path}") from error
    with user_errors(ValueError):
        try:
            model.on_load_checkpoint(checkpoint)
        except ValueError as error:
            raise ValueError(f"{path}: {one_line(error)}") from error
        if was != (opt := model.hparams["opt"]):
            raise ValueError(f"{path}: the checkpoint was trained with model.opt {was}, not {opt}")


def _why_nothing_was_trained(cli: TrainingCLI) -> str:
    trainer, done = cli.trainer, len(cli.history.epochs)
    finished = f"{cli.run_folder}: already finished"
    if 0 < trainer.max_steps <= trainer.global_step:
        return f"{finished} (step {trainer.global_step} of {trainer.max_steps})"
    if cli.patience is not None and cli.patience.used_up:
        return f"{finished} ({cli.patience.wait_count} epochs without a better {cli.task.monitor})"
    if any(isinstance(of, Timer) and _is_over(of) for of in trainer.callbacks):  # type: ignore[attr-defined]
        return f"{finished} (trainer.max_time is over)"
    if done:
        return f"{finished} ({done} of {trainer.max_epochs} epochs)"
    return "nothing was trained: the trainer's limits leave no epoch or no batch"


def _is_over(timer: Timer) -> bool:
    left = timer.time_remaining()
    return left is not None and left <= 0


def _what_is_saved(cli: TrainingCLI, epoch: int | None = None) -> str:
    last = cli.run_folder / "checkpoints" / "last.ckpt"
    epochs, epoch = cli.trainer.max_epochs or -1, epoch or cli.trainer.current_epoch + 1
    where = f"in epoch {epoch}" + (f" of {epochs}" if epochs > 0 else "")
    if not last.is_file():
        return f"{where}; no checkpoint is saved yet."
    step = torch.load(last, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    return (
        f"{where}; {last} holds step {step}. Go on with: "
        f"acmix fit --config {shlex.quote(f'{cli.run_folder}/config.yaml')} --ckpt_path last"
    )


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
    if not cli.trainer.is_global_zero:
        return
    for name, value in metrics.items():
        shown = f"{value:.2%}" if name.endswith("accuracy") else f"{value:.4f}"
        print(f"{name:20}{shown}")
    if speed := cli.speed.images_per_second:
        print(f"{'images/s':20}{speed:,.0f}")


def predict(cli: TrainingCLI) -> None:
    """What the task says of every test image, in `predictions.csv` of the run folder."""
    if cli.trainer.world_size > 1:
        raise UserError(f"trainer.devices: expected 1, got {cli.trainer.world_size} processes")
    outputs = cli.trainer.predict(
        cli.model, datamodule=cli.datamodule, ckpt_path=_checkpoint(cli), weights_only=True
    )
    loader: Any = cli.trainer.predict_dataloaders
    rows = cli.model.rows(outputs or [], getattr(loader.dataset, "name", str))
    path = cli.run_folder / "predictions.csv"
    write_csv(path, rows)
    of = "test" if cli.datamodule.test_set() else "held-out"
    print(f"{len(rows)} {of} images: {path}")


def _checkpoint(cli: TrainingCLI) -> str:
    """The chosen checkpoint; weights at random would give numbers that look like a result."""
    path = cli.config["ckpt_path"] or str(cli.run_folder / "checkpoints" / "last.ckpt")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; name a run: acmix {cli.command} RUN")
    check_checkpoint(Path(path), cli.model)
    return path
