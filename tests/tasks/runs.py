"""Runs of `acmix fit` on the digits: here, in processes of their own, and what is left of them.

`python -m tasks.runs COMMANDS`, a list of lists of arguments as JSON, runs one after another and
prints their exit codes.
"""

import csv
import json
import operator
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch.utils._pytree import keystr, tree_leaves_with_path

from acmix.cli import main

RECIPE = Path(__file__).parents[2] / "recipes" / "digits.yaml"
# A step of one process has the images of a step of two; layer norm, as batch statistics differ.
GLOBAL_BATCH = {
    "data.batch_size": 128,
    "model.model_kwargs.norm_layer": "groupnorm1",
    "trainer.max_epochs": 2,
}
TWO_PROCESSES = {**GLOBAL_BATCH, "data.batch_size": 64, "trainer.devices": 2}


class SignalAt(Callback):
    """Sends this process a signal once `step` steps are done, before they are saved."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


class StopAt(Callback):
    """Asks the trainer to stop once `batches` batches of the run are done, as a timer does."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            trainer.should_stop = True


def signal_at(step, number=signal.SIGTERM):
    callback = {"": "tasks.runs.SignalAt", ".step": step, ".number": int(number)}
    return [f"--trainer.callbacks{key}={value}" for key, value in callback.items()]


def arguments(run, options, *more):
    """Of a command: two epochs of 11 steps, unless the options say otherwise."""
    given = {"trainer.max_epochs": 2, "every_n_steps": 4, "run": run, **options}
    return ["fit", "--config", str(RECIPE), *(f"--{k}={v}" for k, v in given.items()), *more]


def fit(run, options, *more):
    """In this process."""
    return main(arguments(run, options, *more))


def start(run, options, *more):
    """In a process of its own."""
    return _start("acmix.cli", arguments(run, options, *more), {})


def start_command(args):
    """`acmix ARGS` in a process of its own."""
    return _start("acmix.cli", args, {})


def start_two(commands):
    """Several commands, one after another, in the same two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    argument = json.dumps(commands)
    return [_start("tasks.runs", [argument], {**common, "LOCAL_RANK": str(i)}) for i in range(2)]


def _hear_hangups():
    """In a suite that runs under nohup, too."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _start(module, args, environment):
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join([tests, *filter(None, sys.path)])
    return subprocess.Popen(
        [sys.executable, "-m", module, *args],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_hear_hangups if hasattr(signal, "SIGHUP") else None,
    )


def ended(process):
    """(exit code, the last line that it said)"""
    said = process.communicate(timeout=240)[1].strip().splitlines()
    return process.returncode, said[-1] if said else ""


def checkpoint_of(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def rows_of(run, file="metrics.csv"):
    """Of a CSV of the run, all but the times."""
    with (run / file).open() as lines:
        timed = ("images_per_second", "train_seconds")
        return [{k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(lines)]


def differences(one, two):
    """Where in two nested containers the tensors or numbers are not the same."""
    pairs = zip(tree_leaves_with_path(one), tree_leaves_with_path(two), strict=True)
    same = {True: torch.equal, False: operator.eq}
    return [keystr(p) for (p, a), (_, b) in pairs if not same[isinstance(a, torch.Tensor)](a, b)]


def assert_same_end(run, other, steps=22):
    one, two = checkpoint_of(run), checkpoint_of(other)
    assert one["global_step"] == two["global_step"] == steps
    assert any(name.startswith("net.") for name in one["state_dict"])
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert differences(one[part], two[part]) == [], part
    assert rows_of(run) == rows_of(other)


def _exit_code(args):
    try:
        return main(args)
    except SystemExit as stop:
        return stop.code


if __name__ == "__main__":
    for command in json.loads(sys.argv[1]):
        print("exit code", _exit_code(command), flush=True)
