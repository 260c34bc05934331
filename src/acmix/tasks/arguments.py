"""What is read from the arguments of a command before its parser can be made."""

from __future__ import annotations

from argparse import ArgumentError, ArgumentParser
from collections.abc import Collection
from pathlib import Path

from acmix.errors import UserError, did_you_mean
from acmix.tasks.options import read_config
from acmix.tasks.run_folder import is_run, nearest_run

DEFAULT_TASK = "classification"


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


def task_of_args(args: list[str], known: Collection[str]) -> str:
    """`--task`, else that of the last configuration which names one."""
    options = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("--task")
    try:
        given = options.parse_known_args(args)[0].task
    except ArgumentError:
        given = None  # a value is missing, which the whole parser says better
    named = [given] if given is not None else [read_config(f).get("task") for f in configs_of(args)]
    task = next((task for task in reversed(named) if task is not None), DEFAULT_TASK)
    if task not in known:
        offer = did_you_mean(str(task), known)
        raise UserError(f"task: expected {' or '.join(known)}, got {task!r}{offer}")
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
