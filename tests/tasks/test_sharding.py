"""FSDP2 on two processes: what one process computes, in checkpoints that one process reads."""

import re
import sys

import pytest
import torch
from lightning.pytorch import Callback
from tasks.runs import (
    GLOBAL_BATCH,
    TWO_PROCESSES,
    arguments,
    assert_same_end,
    checkpoint_of,
    fit,
    rows_of,
    signal_at,
    start_two,
)

from acmix.tasks.sharding import here

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX"),
]
FSDP2 = {**TWO_PROCESSES, "trainer.strategy": "fsdp2", "trainer.gradient_clip_val": 1.0}
ONE = {**GLOBAL_BATCH, "trainer.gradient_clip_val": 1.0}


class HeldHere(Callback):
    """Prints how many numbers of the weights this process holds between the first steps."""

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        if trainer.global_step == 1:
            print("held", sum(here(weight).numel() for weight in pl_module.parameters()))


@pytest.fixture(scope="module")
def runs(made_once):
    """A folder with the runs `whole`, `stopped`, and `resumed` from its checkpoint."""

    def make(folder):
        stopped = folder / "stopped" / "checkpoints" / "last.ckpt"
        commands = [
            arguments(folder / "whole", FSDP2, "--trainer.callbacks=tasks.test_sharding.HeldHere"),
            arguments(folder / "stopped", FSDP2, *signal_at(6)),
            arguments(folder / "resumed", FSDP2, f"--ckpt_path={stopped}"),
            arguments(folder / "average", {**FSDP2, "model.ema_decay": 0.9}),
            ["validate", folder / "whole"],
        ]
        processes = start_two([[str(word) for word in command] for command in commands])
        for rank, process in enumerate(processes):
            out, err = process.communicate(timeout=240)
            (folder / f"out{rank}").write_text(out)
            (folder / f"err{rank}").write_text(err)

    return made_once("sharded", make)


def test_each_command_ends_as_it_should(runs):
    for rank in range(2):
        out = (runs / f"out{rank}").read_text()
        codes = [line for line in out.splitlines() if line.startswith("exit code")]
        assert codes == [f"exit code {code}" for code in (0, 143, 0, 2, 0)], (
            runs / f"err{rank}"
        ).read_text()
    assert checkpoint_of(runs / "stopped")["global_step"] == 6


def test_a_stopped_run_ends_with_the_same_bits(runs):
    assert_same_end(runs / "resumed", runs / "whole")


def test_what_was_measured_is_measured_again(runs):
    measured = dict(re.findall(r"^(val_\w+) +(\S+)$", (runs / "out0").read_text(), re.M))
    last = rows_of(runs / "whole")[-1]
    assert measured["val_accuracy"] == f"{float(last['val_accuracy']):.2%}"
    assert float(measured["val_loss"]) == pytest.approx(float(last["val_loss"]), abs=1e-4)


def test_each_process_holds_its_part(runs):
    held = [
        int(line.split()[1])
        for rank in range(2)
        for line in (runs / f"out{rank}").read_text().splitlines()
        if line.startswith("held")
    ]
    weights = checkpoint_of(runs / "whole")["state_dict"]
    assert sum(held) == sum(weight.numel() for weight in weights.values())
    assert max(held) < 0.6 * sum(held)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process with the images of two."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert fit(folder, ONE) == 0
    return folder


def assert_near(run, other):
    for one, two in zip(rows_of(run), rows_of(other), strict=True):
        for loss in ("train_loss", "val_loss"):
            assert float(two[loss]) == pytest.approx(float(one[loss]), rel=1e-3)
    mixes = rows_of(run, "mix.csv"), rows_of(other, "mix.csv")
    assert len(mixes[0]) == 9  # three layers before and after each epoch
    for one, two in zip(*mixes, strict=True):
        assert (one["epoch"], one["layer"]) == (two["epoch"], two["layer"])
        for weight in ("alpha", "beta"):
            assert float(two[weight]) == pytest.approx(float(one[weight]), rel=1e-4)


def test_the_loss_and_the_mix_are_those_of_one_process(runs, one):
    assert_near(one, runs / "whole")


def test_a_checkpoint_holds_what_that_of_one_process_holds(runs, one):
    def form(value):
        if isinstance(value, dict):
            return {key: form(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [form(inner) for inner in value]
        return (type(value), value.shape) if isinstance(value, torch.Tensor) else type(value)

    parts = "state_dict", "optimizer_states"
    two, alone = checkpoint_of(runs / "whole"), checkpoint_of(one)
    assert [form(two[part]) for part in parts] == [form(alone[part]) for part in parts]


def test_one_process_goes_on_from_a_checkpoint_of_two(runs, one, tmp_path):
    stopped = runs / "stopped" / "checkpoints" / "last.ckpt"
    assert fit(tmp_path / "run", ONE, f"--ckpt_path={stopped}") == 0
    assert_near(one, tmp_path / "run")


def test_an_average_of_the_weights_is_refused_in_one_line(runs):
    said = [line for line in (runs / "err0").read_text().splitlines() if "acmix fit:" in line]
    assert said == ["acmix fit: model.ema_decay: expected 0 with FSDP, got 0.9"]
    assert not (runs / "average").exists()
