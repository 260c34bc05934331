"""What every task shares, by a task that is none of the package's: images from themselves."""

import pytest
import timm
import torch
from lightning.pytorch import Trainer
from tasks.runs import checkpoint_of, rows_of

from acmix.analysis import figures
from acmix.cli import main
from acmix.data import ClassifiedData, Digits
from acmix.tasks import training_cli
from acmix.tasks.base import Task, create_network
from acmix.tasks.held_out import HeldOut

DIGITS = [str(digit) for digit in range(10)]


class Errors(HeldOut):
    """The error of every held-out image."""

    def reset(self):
        self.errors = []

    def keep(self, outputs, batch):
        self.errors += outputs.tolist()

    def __len__(self):
        return len(self.errors)

    def pictures(self, data):
        return {"errors.png": lambda: figures.curves([])}

    def tables(self, data):
        return {"errors.csv": [{"error": error} for error in self.errors]}


class Brightness(Task):
    """The mean of an image, told by a network of one output."""

    task = "brightness"
    monitor = "val_fit"
    measure = "fit"
    averages = ("error",)
    data_class = ClassifiedData

    def create_net(self):
        hp = self.hparams
        return create_network(hp["name"], hp["in_chans"], hp["model_kwargs"] or {}, num_classes=1)

    @property
    def measures(self):
        return ["train_loss", "train_error", "val_fit"]

    def create_held_out(self):
        return Errors()

    def predict_step(self, batch, batch_idx):
        return self._errors(batch)

    def rows(self, outputs, name):
        return [{"image": name(n), "error": float(of)} for n, of in enumerate(torch.cat(outputs))]

    def draw_batch(self, data, batch):
        return figures.curves([])

    def _errors(self, batch):
        return (self(batch[0])[:, 0] - batch[0].mean((1, 2, 3))).abs()

    def step(self, batch):
        errors = self._errors(batch)
        return errors.mean(), {"error": errors.detach().sum()}

    def validation_step(self, batch, batch_idx):
        errors = self._errors(batch)
        self.log("val_fit", -errors.mean(), batch_size=len(errors))
        return errors


@pytest.fixture
def brightness(monkeypatch, tmp_path):
    """Runs `acmix fit` with the task in a recipe, or by options; returns its exit code."""
    monkeypatch.setitem(training_cli.TASKS, "brightness", Brightness)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "task: brightness\nthreads: 1\ndata: {class_path: Digits, init_args: {batch_size: 128}}\n"
        "model: {name: resnet11_tiny_conv, ema_decay: 0.9, warmup_steps: 3, lr: 1.0e-3}\n"
        "trainer: {accelerator: cpu, max_epochs: 2}\n"
    )
    return lambda *options: main(["fit", "--config", str(recipe), *options])


@pytest.mark.slow
def test_a_run_knows_its_task(brightness, tmp_path, capsys):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert brightness(f"--run={whole}") == 0
    assert {"errors.csv", "errors.png", "augmented.png"} <= {path.name for path in whole.iterdir()}
    assert "task: brightness" in (whole / "config.yaml").read_text()
    assert [float(row["train_error"]) for row in rows_of(whole)] == pytest.approx(
        [float(row["train_loss"]) for row in rows_of(whole)], rel=1e-5
    )
    assert brightness(f"--run={run}", "--trainer.max_steps=4", "--model.sched=none") == 0
    assert (
        main(["fit", "--config", f"{whole}/config.yaml", f"--run={run}", "--ckpt_path=last"]) == 0
    )
    assert checkpoint_of(run)["global_step"] == 22
    assert main(["validate", str(run)]) == 0
    assert "val_fit" in capsys.readouterr().out
    assert main(["predict", str(run)]) == 0
    assert "360 held-out images: " in capsys.readouterr().out
    assert len(rows_of(run, "predictions.csv")) == 360


def test_a_checkpoint_of_another_task_is_refused(brightness, tmp_path, capsys):
    run = tmp_path / "run"
    assert brightness(f"--run={run}", "--trainer.max_steps=1") == 0
    again = ["fit", "--config", f"{run}/config.yaml", "--ckpt_path=last"]
    assert main([*again, "--task=classification"]) == 2
    assert "the checkpoint is of task brightness, not classification" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--task=clasification"], ["--config={}"]])
def test_an_unknown_task_is_named(tmp_path, capsys, args):
    (tmp_path / "recipe.yaml").write_text("task: clasification\n")
    args = [arg.format(tmp_path / "recipe.yaml") for arg in args]
    assert main(["fit", *args]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "got 'clasification'; did you mean classification?" in line


def fitted(trainer=(), steps=6, **options):
    torch.manual_seed(0)
    task = Brightness(name="resnet11_tiny_conv", class_names=DIGITS, in_chans=1, **options)
    run = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        **{"limit_train_batches": steps, "max_epochs": 1, **dict(trainer)},
    )
    run.fit(task, datamodule=Digits(batch_size=16))
    return task, run


@pytest.mark.parametrize(
    "limits",
    [{"max_epochs": 2}, {"max_steps": 12, "max_epochs": -1}, {"max_steps": 12, "max_epochs": 2}],
    ids=str,
)
def test_a_schedule_ends_where_training_does(limits, monkeypatch):
    rates = []

    def note(task, *_):
        rates.append(task.optimizers().param_groups[0]["lr"])

    monkeypatch.setattr(Brightness, "on_train_batch_end", note)
    fitted(limits, lr=1.0, warmup_steps=4, opt="sgd")
    assert len(rates) == 12
    assert rates[:3] == sorted(rates[:3])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-2] > rates[-1] == pytest.approx(0.0, abs=1e-6)


def test_another_limit_leaves_the_schedule_as_it_is():
    """So that what ended early goes on to what it would have been."""
    ends = {"max_steps": 3, "limit_train_batches": 6}
    cut, whole = (fitted({"max_epochs": 2, **more}, lr=1.0)[1] for more in (ends, {}))
    one, two = (run.lr_scheduler_configs[0].scheduler for run in (cut, whole))
    assert [one._get_lr(step) for step in range(12)] == [two._get_lr(step) for step in range(12)]


def test_a_schedule_without_an_end_is_refused():
    endless = {"max_epochs": -1, "max_time": "00:00:00:01"}
    with pytest.raises(
        ValueError, match=r"trainer.max_epochs, .*: expected an end of the schedule"
    ):
        fitted(endless)
    assert fitted(endless, sched="none")[1].global_step > 0


@pytest.mark.parametrize(
    ("freeze", "moves"),
    [(["backbone"], {"fc"}), (["conv1", "bn1", "layer1"], {"layer2", "layer3", "fc"})],
)
def test_frozen_modules_keep_weights_and_statistics(freeze, moves):
    torch.manual_seed(0)
    start = timm.create_model("resnet11_tiny_conv", in_chans=1, num_classes=1)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    task, _ = fitted(freeze=freeze, weight_decay=0.5, warmup_epochs=0, lr=0.01)
    changed = {
        name.split(".")[0]
        for name, value in task.net.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == moves


def test_what_cannot_be_frozen_is_named():
    with pytest.raises(ValueError, match=r"model.freeze: unknown 'layr1'; did you mean layer1"):
        fitted(freeze=["layr1"])
    with pytest.raises(ValueError, match=r"model.freeze: expected weights left to train"):
        fitted(freeze=["backbone", "fc"])


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("lr", -1, "model.lr: expected at least 0, got -1"),
        ("weight_decay", -1, "model.weight_decay: expected at least 0"),
        ("momentum", 5, "model.momentum: expected 0 to below 1"),
        ("ema_decay", 1.5, "model.ema_decay: expected 0 to below 1"),
        ("layer_decay", 0, "model.layer_decay: expected above 0, at most 1"),
        ("warmup_epochs", float("nan"), "model.warmup_epochs: "),
        ("lr_batch_size", 0, "model.lr_batch_size: expected at least 1"),
        ("opt", "adamww", "model.opt: unknown 'adamww'; did you mean adamw?"),
        ("sched", "cosin", "model.sched: unknown 'cosin'; did you mean cosine?"),
    ],
)
def test_what_is_out_of_range_is_refused(option, value, said):
    with pytest.raises(ValueError, match="^" + said.replace("?", r"\?")):
        fitted(**{option: value})
