"""Options of training beyond the network: loggers, callbacks, surroundings, what a run keeps."""

import csv
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from tasks.runs import fit, rows_of

from acmix.analysis import figures
from acmix.cli import main
from acmix.tasks import loggers
from acmix.tasks.classification import Classification, Classified, per_class
from acmix.tasks.options import whole_numbers_first

SHORT = {"trainer.max_epochs": 1, "trainer.limit_train_batches": 2, "data.batch_size": 128}


@pytest.mark.slow
def test_callbacks_loggers_and_bars_of_lightning(tmp_path, capsys):
    run = tmp_path / "run"
    callbacks = [
        "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.monitor=val_accuracy",
        "--trainer.callbacks.dirpath=" + str(tmp_path / "mine"),
        "--trainer.callbacks+=LearningRateMonitor",
        "--trainer.callbacks+=TQDMProgressBar",
        "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=" + str(tmp_path / "logs"),
        "--trainer.log_every_n_steps=1",
    ]
    assert fit(run, SHORT, *callbacks) == 0
    assert len(list((tmp_path / "mine").iterdir())) == 1
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    [metrics] = (tmp_path / "logs").rglob("metrics.csv")
    with metrics.open() as file:
        rows = list(csv.DictReader(file))
    for name in ("loss", "lr", "val_accuracy", "train_loss"):
        assert any(row[name] for row in rows), name


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("1.0", 1.0), ("4", 4), ("0.5", 0.5), ("0", 0)]
)
def test_a_number_of_batches_is_no_part(text, value):
    """Whatever order of int and float the process has seen before."""
    parser = ArgumentParser()
    parser.add_argument("--batches", type=float | int | None)
    whole_numbers_first(parser)
    found = parser.parse_args([f"--batches={text}"]).batches
    assert (found, type(found)) == (value, type(value))


@pytest.mark.slow
def test_without_a_logger(tmp_path):
    assert fit(tmp_path / "run", {**SHORT, "logger": "none"}) == 0
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("wandb", "WandbLogger", {"name": "run", "project": "acmix"}),
        ("mlflow", "MLFlowLogger", {"experiment_name": "acmix", "run_name": "run"}),
    ],
)
def test_loggers_that_need_a_package(tmp_path, monkeypatch, name, kind, expected):
    """Neither package is here; Lightning's class is asked for as it wants to be."""
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(__spec__=object()))
    monkeypatch.setattr(loggers, kind, lambda **options: options)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made = loggers.create_logger(name, tmp_path / "run")
    assert expected.items() <= made.items()
    where = {"wandb": tmp_path / "run", "mlflow": f"sqlite:///{tmp_path}/mlflow.db"}[name]
    assert where in made.values()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("job", [{}, {"SLURM_JOB_ID": "3", "SLURM_JOB_NAME": "train"}])
def test_tasks_of_a_batch_script_that_srun_did_not_start(tmp_path, monkeypatch, job):
    for name, value in {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", **job}.items():
        monkeypatch.setenv(name, value)
    assert fit(tmp_path / "run", SHORT) == 0


def test_tasks_of_srun_that_are_not_the_processes_of_the_run(tmp_path, monkeypatch, capsys):
    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.setenv(name, "2")
    assert fit(tmp_path / "run", SHORT) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--ntasks" in line


@pytest.mark.slow
def test_the_configuration_holds_what_was_resolved(tmp_path, monkeypatch):
    from data.pictures import write_folder

    write_folder(tmp_path / "pets", {"cat": 4, "dog": 4})
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    args = ["fit", "--data=Images", "--data.img_size=8", "--data.val_fraction=0.5"]
    args += ["--data.batch_size=4", "--model.name=resnet11_tiny_conv", "--trainer.accelerator=cpu"]
    assert main([*args, "--data.source=~/pets", "--run=one", "--trainer.max_epochs=1"]) == 0
    again = ["--config=one/config.yaml", "--ckpt_path=last", "--trainer.max_epochs=2"]
    assert main(["fit", *again]) == 0
    start = ["--model.warm_start=one/checkpoints/last.ckpt", "--run=two", "--trainer.max_epochs=1"]
    assert main([*args, "--data.source=pets", *start]) == 0
    for run in ("one", "two"):
        config = yaml.safe_load((tmp_path / run / "config.yaml").read_text())
        assert config["data"]["init_args"]["source"] == str(tmp_path / "pets")
        assert config.get("ckpt_path") is None
    assert config["model"]["warm_start"] == str(tmp_path / "one" / "checkpoints" / "last.ckpt")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["validate", "../one"]) == 0


@pytest.mark.slow
def test_a_picture_that_fails_costs_no_run_its_report(tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("no such font")

    monkeypatch.setattr(figures, "confusion", fail)
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        fit(run, SHORT)
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    assert f"{run}/confusion.png could not be drawn: no such font" in err.splitlines()
    assert "held-out accuracy" in out
    assert {"summary.json", "curves.png", "predictions.png"} <= {
        path.name for path in run.iterdir()
    }


def test_rare_classes_weigh_more():
    task = Classification("resnet11_tiny_conv", ["a", "b", "c"], class_weights="balanced")
    task._trainer = SimpleNamespace(
        datamodule=SimpleNamespace(class_counts=lambda: [10, 20, 60]), strategy=None
    )
    assert task._balanced().tolist() == pytest.approx([3.0, 1.5, 0.5])


@pytest.mark.slow
def test_weights_of_classes_weigh_the_loss(tmp_path):
    weighted = {**SHORT, "model.class_weights": "[1,1,1,1,1,1,1,1,1,5]", "model.smoothing": 0}
    assert fit(tmp_path / "weighted", weighted) == 0
    assert fit(tmp_path / "plain", {**SHORT, "model.smoothing": 0}) == 0
    one, two = (float(rows_of(tmp_path / run)[0]["train_loss"]) for run in ("weighted", "plain"))
    assert one != two
    names = torch.load(tmp_path / "weighted" / "checkpoints" / "last.ckpt", weights_only=True)
    assert not any("train_loss" in name for name in names["state_dict"])


@pytest.mark.slow
def test_a_run_measured_with_mirror_images(tmp_path, capsys):
    run = tmp_path / "run"
    assert fit(run, SHORT) == 0
    capsys.readouterr()
    found = []
    for more in ([], ["--model.flip_test=true"]):
        assert main(["validate", str(run), *more]) == 0
        found.append(capsys.readouterr().out.splitlines()[0])
    assert found[0] != found[1]


def test_classes_that_nothing_is_taken_for():
    rows = per_class(np.array([[2, 0, 0], [1, 0, 0], [0, 0, 0]]), ["a", "b", "c"])
    assert [row["precision"] for row in rows] == [pytest.approx(2 / 3), None, None]
    assert [row["recall"] for row in rows] == [1.0, 0.0, None]
    assert [row["f1"] for row in rows] == [pytest.approx(0.8), 0.0, None]


def test_the_images_kept_are_the_ones_to_show_whatever_the_batches():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.rand(300, 4, generator=generator).softmax(1)
    classes = torch.randint(4, (300,), generator=generator)
    images = torch.arange(300.0).view(300, 1, 1, 1)
    kept = []
    for size in (300, 7):
        held_out = Classified()
        for first in range(0, 300, size):
            part = slice(first, first + size)
            held_out.keep(outputs[part], (images[part], classes[part]))
        assert all(int(image) == index for index, image in held_out.images.items())
        kept.append(list(held_out.images))
    assert kept[0] == kept[1]
    assert len(kept[0]) == 40


@pytest.mark.slow
def test_the_summary_counts_images(tmp_path):
    run = tmp_path / "run"
    assert fit(run, SHORT) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["train_images"], summary["held_out_images"]) == (1437, 360)
    assert summary["val_top5_accuracy"] > 0
    assert summary["task"] == "classification"
