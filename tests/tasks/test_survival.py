"""A run that was killed goes on to the weights of one that was not, to the last bit."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from tasks.runs import (
    GLOBAL_BATCH,
    TWO_PROCESSES,
    arguments,
    assert_same_end,
    checkpoint_of,
    differences,
    ended,
    fit,
    rows_of,
    signal_at,
    start,
    start_two,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")

# All that is random or has a memory; two epochs of 11 steps, a checkpoint every 4.
STATEFUL = {
    "data.batch_size": 128,
    "model.model_kwargs.drop_rate": 0.1,
    "model.warmup_epochs": 0.5,
    "model.mixup": 0.2,
    "model.cutmix": 1.0,
    "model.ema_decay": 0.9,
    "trainer.limit_val_batches": 1,
}


@pytest.fixture(scope="module")
def undisturbed(made_once):
    def make(folder):
        assert fit(folder / "run", STATEFUL) == 0

    return made_once("undisturbed", make) / "run"


@pytest.fixture(scope="module")
def stopped(made_once):
    """Runs by the way they were stopped, all under way at once: (folder, exit code, last line)."""
    ways = {
        "killed": (STATEFUL, 8, signal.SIGKILL),
        "terminated": (STATEFUL, 6, signal.SIGTERM),
        "hung up": (STATEFUL, 7, signal.SIGHUP),
        "killed with workers": ({**STATEFUL, "data.num_workers": 2}, 18, signal.SIGKILL),
    }

    def make(folder):
        processes = {
            name: start(folder / name, options, *signal_at(step, number))
            for name, (options, step, number) in ways.items()
        }
        ends = {name: ended(process) for name, process in processes.items()}
        (folder / "ends.json").write_text(json.dumps(ends))

    folder = made_once("stopped", make)
    ends = json.loads((folder / "ends.json").read_text())
    return {name: (folder / name, *ends[name]) for name in ways}


@pytest.mark.parametrize(
    ("name", "workers", "code", "step"),
    [
        ("killed", 0, -signal.SIGKILL, 4),
        ("killed with workers", 2, -signal.SIGKILL, 16),
        ("terminated", 0, 128 + signal.SIGTERM, 6),
        ("hung up", 0, 128 + signal.SIGTERM, 7),
    ],
)
@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_bits(
    undisturbed, stopped, tmp_path, name, workers, code, step
):
    folder, returned, said = stopped[name]
    assert returned == code
    assert checkpoint_of(folder)["global_step"] == step
    last = folder / "checkpoints" / "last.ckpt"
    if name == "terminated":
        assert said.startswith(f"Stopped in epoch 1 of 2; {last} holds step 6.")
    run = shutil.copytree(folder, tmp_path / "run")
    options = {**STATEFUL, "data.num_workers": workers}
    assert fit(run, options, "--ckpt_path=last") == 0
    assert_same_end(run, undisturbed)


def stop_at(batches):
    return ("--trainer.callbacks=tasks.runs.StopAt", f"--trainer.callbacks.batches={batches}")


ENDS = {
    "steps": ({"trainer.max_steps": 6}, (), 6),
    "steps at the end of an epoch": ({"trainer.max_steps": 11}, (), 11),
    "a callback": ({}, stop_at(14), 14),
    "time": ({"trainer.max_time": "00:00:00:01"}, (), None),
}


@pytest.mark.parametrize("name", [*ENDS])
@pytest.mark.slow
def test_a_run_that_ended_early_goes_on_to_the_same_bits(undisturbed, tmp_path, capsys, name):
    options, more, step = ENDS[name]
    run = tmp_path / "run"
    assert fit(run, {**STATEFUL, **options}, *more) == 0
    held = checkpoint_of(run)["global_step"]
    assert held == step if step else 0 < held < 22
    assert json.loads((run / "summary.json").read_text())["steps"] == held
    assert float(rows_of(run)[-1]["val_accuracy"]) > 0  # measured where it ended
    capsys.readouterr()
    if not more:  # with the same limit there is nothing left to do
        assert fit(run, {**STATEFUL, **options}, "--ckpt_path=last") == 0
        assert capsys.readouterr().out.startswith(f"{run}: already finished (")
        assert checkpoint_of(run)["global_step"] == held
    assert fit(run, STATEFUL, "--ckpt_path=last") == 0
    assert_same_end(run, undisturbed)


@pytest.mark.slow
def test_an_end_asked_for_between_two_batches_of_a_step_comes_after_it(tmp_path):
    """Gradients that wait for the rest of their step are in no checkpoint."""
    options = {**STATEFUL, "trainer.accumulate_grad_batches": 3, "trainer.max_epochs": 1}
    assert fit(tmp_path / "whole", options) == 0
    assert fit(tmp_path / "run", options, *stop_at(4)) == 0
    assert checkpoint_of(tmp_path / "run")["global_step"] == 2
    assert fit(tmp_path / "run", options, "--ckpt_path=last") == 0
    one, two = checkpoint_of(tmp_path / "run"), checkpoint_of(tmp_path / "whole")
    assert one["global_step"] == two["global_step"] == 4
    assert differences(one["state_dict"], two["state_dict"]) == []
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")


@pytest.mark.slow
def test_patience_stops_and_more_patience_goes_on(tmp_path, capsys):
    stuck = {**GLOBAL_BATCH, "model.lr": 0, "trainer.max_epochs": 6}
    run = tmp_path / "run"
    assert fit(run, {**stuck, "patience": 1}) == 0
    assert [row["epoch"] for row in rows_of(run)] == ["1", "2"]
    capsys.readouterr()
    assert fit(run, {**stuck, "patience": 1}, "--ckpt_path=last") == 0
    assert "(1 epochs without a better val_accuracy)" in capsys.readouterr().out
    assert fit(run, {**stuck, "patience": 2}, "--ckpt_path=last") == 0
    assert [row["epoch"] for row in rows_of(run)] == ["1", "2", "3"]


@pytest.mark.slow
def test_validations_within_an_epoch_leave_the_same_rows(tmp_path):
    """Killed after one, the rest of the epoch still knows what it measured."""
    options = {**STATEFUL, "trainer.val_check_interval": 7, "every_n_steps": 2}
    assert fit(tmp_path / "whole", options) == 0
    killed = start(tmp_path / "run", options, *signal_at(9, signal.SIGKILL))
    assert ended(killed)[0] == -signal.SIGKILL
    assert checkpoint_of(tmp_path / "run")["global_step"] == 8
    assert fit(tmp_path / "run", options, "--ckpt_path=last") == 0
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_stopped_end_with_the_same_bits_and_the_loss_of_one(tmp_path):
    """A step of two processes has the images of a step of one with twice the batch size."""
    average = {"model.ema_decay": 0.9}
    two = {**TWO_PROCESSES, **average, "trainer.strategy": "ddp"}
    killed = start(tmp_path / "killed", two, *signal_at(18, signal.SIGKILL))
    assert fit(tmp_path / "one", {**GLOBAL_BATCH, **average}) == 0
    assert ended(killed)[0] == -signal.SIGKILL
    assert checkpoint_of(tmp_path / "killed")["global_step"] == 16
    commands = [
        arguments(tmp_path / "whole", two),
        arguments(tmp_path / "killed", two, "--ckpt_path=last"),
        arguments(tmp_path / "limited", {**two, "trainer.max_steps": 5}),
        arguments(tmp_path / "limited", two, "--ckpt_path=last"),
    ]
    for process in start_two(commands):
        assert ended(process) == (0, "")
    for run in ("killed", "limited"):
        assert_same_end(tmp_path / run, tmp_path / "whole")
    for one, two in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "whole"), strict=True):
        for loss in ("train_loss", "val_loss"):
            assert float(two[loss]) == pytest.approx(float(one[loss]), rel=1e-3)


@pytest.mark.slow
def test_a_changed_batch_within_an_epoch_is_refused(stopped, tmp_path, capsys):
    run = shutil.copytree(stopped["terminated"][0], tmp_path / "run")
    assert fit(run, {**STATEFUL, "data.batch_size": 64}, "--ckpt_path=last") == 2
    assert "data.batch_size: expected" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_names_the_step_and_the_last_good_checkpoint(tmp_path, capsys):
    run = tmp_path / "run"
    diverging = {"model.opt": "sgd", "model.lr": 1e30, "model.warmup_epochs": 0}
    assert fit(run, {**diverging, "data.batch_size": 128, "every_n_steps": 1}) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "the loss of step" in line
    assert f"the last good checkpoint is {run}/checkpoints/last.ckpt, of step 1" in line
    assert checkpoint_of(run)["global_step"] == 1


class SpoilAt(Callback):
    """Makes a weight NaN once `step` steps are done, as a NaN gradient does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        if trainer.global_step == self.step:
            next(pl_module.parameters()).data.fill_(torch.nan)


@pytest.mark.parametrize(("step", "saved"), [(8, 4), (11, 8)], ids=["within", "at the end"])
@pytest.mark.slow
def test_weights_that_are_not_finite_are_never_saved(tmp_path, capsys, step, saved):
    run = tmp_path / "run"
    spoil = ("--trainer.callbacks=tasks.test_survival.SpoilAt", f"--trainer.callbacks.step={step}")
    assert fit(run, {"data.batch_size": 128}, *spoil) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"the weights of step {step} are not finite" in line
    assert f"{run}/checkpoints/last.ckpt, of step {saved}" in line
    assert checkpoint_of(run)["global_step"] == saved
    assert not (run / "checkpoints" / "best.ckpt").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.slow
def test_no_room_on_disk_keeps_the_last_good_checkpoint(stopped, tmp_path, capsys):
    run = shutil.copytree(stopped["terminated"][0], tmp_path / "run")
    checkpoints = run / "checkpoints"
    before = (checkpoints / "last.ckpt").read_bytes()
    (checkpoints / "last.part").symlink_to("/dev/full")
    assert fit(run, STATEFUL, "--ckpt_path=last") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert (checkpoints / "last.ckpt").read_bytes() == before
