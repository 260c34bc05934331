"""`acmix fit`, `validate`, `test` and `predict`, for every task."""

from __future__ import annotations

import json
import logging
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from acmix.analysis.rates import rate
from acmix.data import ImageData
from acmix.data.survey import broken_within
from acmix.errors import UserError, one_line, user_errors
from acmix.tasks import report
from acmix.tasks.arguments import expand_run, run_of_config
from acmix.tasks.base import Task
from acmix.tasks.callbacks import write_csv
from acmix.tasks.console import console
from acmix.tasks.options import name_trainer_option
from acmix.tasks.run_folder import check_folder
from acmix.tasks.training_cli import TrainingCLI, make

RUN_ERRORS = (ValueError, OSError, MisconfigurationException, torch.OutOfMemoryError)
LOOKING = 5.0  # seconds in which `fit` looks for broken files before it starts
NAMED = 20  # of them
TERMINATED = 128 + signal.SIGTERM


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
        check_epochs(checkpoint, cli.trainer.max_epochs)
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
    except KeyboardInterrupt as stop:
        raise stop if stop.args else KeyboardInterrupt("Stopped after training.") from stop
    finally:
        cli.folder.lock.release()


def check_images(data: ImageData) -> None:
    """Broken files that can be found within seconds raise `UserError`, after all are named."""
    if not data.looks_early:
        return
    background = (data.input_config or {}).get("background", "white")
    parts = filter(None, map(data.pictures, ("train", "val")))
    broken = list(broken_within(LOOKING, parts, background))
    for image in broken[:NAMED]:
        print(f"cannot read {image.name}: {image.reason}", file=sys.stderr)
    if broken:
        raise UserError(
            f"data.source: expected images that can be read, got {len(broken)} that cannot "
            f"(--data.{data.leave_out} leaves them out, acmix check names all)"
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


def check_epochs(path: Path, wanted: int | None) -> None:
    """Fewer epochs than the checkpoint has trained raise `UserError`."""
    done = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["epoch"]
    if wanted is not None and 0 <= wanted < done:
        raise UserError(f"trainer.max_epochs: expected {done} or more, as in {path}, got {wanted}")


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


def evaluate(cli: TrainingCLI) -> None:
    """What is measured of the checkpoint, as a table."""
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
        print(f"{'images/s':20}{rate(speed)}")


def predict(cli: TrainingCLI) -> None:
    """What the task says of every test image, in `predictions.csv` of the run folder."""
    if cli.trainer.world_size > 1:
        raise UserError(f"trainer.devices: expected 1, got {cli.trainer.world_size} processes")
    outputs = cli.trainer.predict(
        cli.model, datamodule=cli.datamodule, ckpt_path=_checkpoint(cli), weights_only=True
    )
    loader: Any = cli.trainer.predict_dataloaders
    images = getattr(loader.dataset, "stream", loader.dataset)
    rows = cli.model.rows(outputs or [], getattr(images, "name", str))
    path = cli.run_folder / "predictions.csv"
    write_csv(path, rows)
    of = "test" if cli.datamodule.test_set() else "held-out"
    print(f"{len(images)} {of} images: {path}")


def _checkpoint(cli: TrainingCLI) -> str:
    """The chosen checkpoint; weights at random would give numbers that look like a result."""
    path = cli.config["ckpt_path"] or str(cli.run_folder / "checkpoints" / "last.ckpt")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; name a run: acmix {cli.command} RUN")
    check_checkpoint(Path(path), cli.model)
    return path
