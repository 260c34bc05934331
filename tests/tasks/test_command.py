"""Training end to end through the command line: every file of a run, and going on with it."""

import csv
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch

from acmix.cli import main
from acmix.tasks import progress, report
from acmix.tasks.callbacks import WholeFileCheckpointIO
from acmix.tasks.classification import Classification, Classified

RECIPE = Path(__file__).parents[2] / "recipes" / "digits.yaml"
SHORT = ["--trainer.limit_train_batches", "4", "--trainer.max_epochs", "2"]


def fit(run, *options):
    return main(["fit", "--config", str(RECIPE), "--run", str(run), *SHORT, *options])


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def weights_of(run):
    path = run / "checkpoints" / "last.ckpt"
    return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished short run, shared; whoever writes into it copies it first."""
    folder = tmp_path_factory.mktemp("fit") / "run"
    assert fit(folder) == 0
    return folder


def test_files_of_a_run(run):
    files = {path.relative_to(run) for path in run.rglob("*") if path.is_file()}
    found = {path.parts[0] if "tensorboard" in path.parts else path.as_posix() for path in files}
    assert found == {
        "augmented.png",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "classes.csv",
        "classes.png",
        "config.yaml",
        "confusion.png",
        "curves.png",
        "metrics.csv",
        "mix.csv",
        "mix.png",
        "predictions.png",
        "summary.json",
        "tensorboard",
    }


def test_metrics_have_a_full_row_an_epoch(run):
    rows = rows_of(run / "metrics.csv")
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "4"), ("2", "8")]
    for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "images_per_second"):
        assert all(float(row[name]) > 0 for row in rows), name


def test_mix_starts_before_training(run):
    rows = rows_of(run / "mix.csv")
    assert {row["epoch"] for row in rows} == {"0", "1", "2"}
    assert {row["layer"] for row in rows} == {f"layer{stage}.0.conv2" for stage in (1, 2, 3)}
    assert all(float(row["alpha"]) == 0.5 for row in rows if row["epoch"] == "0")
    assert all(float(row["alpha"]) != 0.5 for row in rows if row["epoch"] == "2")


@pytest.mark.parametrize(
    "name", ["augmented", "classes", "confusion", "curves", "mix", "predictions"]
)
def test_pictures(run, name):
    pixels = matplotlib.image.imread(run / f"{name}.png")
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 0.05


def test_summary(run):
    summary = json.loads((run / "summary.json").read_text())
    network = Classification.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    assert summary["parameters"] == sum(weight.numel() for weight in network.parameters())
    assert summary["val_accuracy"] == float(rows_of(run / "metrics.csv")[-1]["val_accuracy"])
    assert (summary["epochs"], summary["steps"], summary["seed"]) == (2, 8, 0)
    assert (summary["train_images"], summary["held_out_images"]) == (1437, 360)
    assert summary["config"]["model"]["name"] == "resnet11_tiny_acmix"
    assert summary["versions"]["torch"] == torch.__version__.split("+")[0]


def test_class_names_are_kept_with_the_checkpoint(run):
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    assert checkpoint["hyper_parameters"]["class_names"] == [str(digit) for digit in range(10)]


def test_a_checkpoint_measures_as_it_did_in_training(run, capsys):
    assert main(["validate", str(run)]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    last = rows_of(run / "metrics.csv")[-1]
    for name in ("val_accuracy", "val_top5_accuracy"):
        assert printed[name] == f"{float(last[name]):.2%}"
    assert float(printed["val_loss"]) == pytest.approx(float(last["val_loss"]), abs=1e-4)
    assert float(printed["images/s"].replace(",", "")) > 0


def test_there_are_no_test_images(run, capsys):
    assert main(["test", str(run)]) == 2
    said = "data: expected test images, got none; acmix validate measures the held-out ones"
    assert said in capsys.readouterr().err


def test_rows_of_classes_are_those_of_scikit_learn(run, capsys):
    from sklearn.metrics import precision_recall_fscore_support

    assert main(["predict", str(run / "checkpoints" / "last.ckpt")]) == 0
    found = rows_of(run / "predictions.csv")
    (run / "predictions.csv").unlink()
    truth, predicted = ([row[name] for row in found] for name in ("truth", "class"))
    expected = precision_recall_fscore_support(truth, predicted, zero_division=0)
    rows = rows_of(run / "classes.csv")
    assert [row["class"] for row in rows] == list("0123456789")
    for name, values in zip(("precision", "recall", "f1", "images"), expected, strict=True):
        measured = [float(row[name] or 0) for row in rows]
        assert measured == pytest.approx(values.tolist()), name


def test_predict_writes_a_row_an_image(run):
    assert main(["predict", str(run / "checkpoints" / "best.ckpt")]) == 0
    rows = rows_of(run / "predictions.csv")
    (run / "predictions.csv").unlink()
    assert len(rows) == 360
    assert all(row["class"] in "0123456789" for row in rows)
    right = sum(row["class"] == row["truth"] for row in rows) / len(rows)
    assert right == pytest.approx(float(rows_of(run / "metrics.csv")[-1]["val_accuracy"]), abs=1e-5)
    assert all(0.1 <= float(row["confidence"]) <= 1 for row in rows)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_an_earlier_run_is_kept(run, tmp_path, capsys):
    again = tmp_path / "run"
    assert fit(again) == 0
    first, second = weights_of(run), weights_of(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert fit(again, "--trainer.max_epochs", "1", "--seed_everything", "1") == 0
    assert f"{again} held an earlier run, which is now {again}.1" in capsys.readouterr().err
    assert len(rows_of(tmp_path / "run.1" / "metrics.csv")) == 2
    assert len(rows_of(again / "metrics.csv")) == 1


@pytest.mark.slow
def test_a_run_goes_on_from_its_last_checkpoint(tmp_path):
    folder, falling = tmp_path / "run", ("--model.warmup_epochs", "0")
    assert fit(folder, *falling, "--trainer.max_epochs", "1") == 0
    first = rows_of(folder / "metrics.csv")
    assert fit(folder, *falling, "--trainer.max_epochs", "3", "--ckpt_path", "last") == 0
    rows = rows_of(folder / "metrics.csv")
    assert rows[:1] == first
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[1]["lr"]) > float(rows[0]["lr"]) == 0  # the schedule is longer too
    assert not (tmp_path / "run.1").exists()


def config_of(run):
    return ["fit", "--config", str(run / "config.yaml")]


@pytest.mark.slow
def test_a_run_that_was_moved_goes_on_where_it_lies(run, tmp_path, monkeypatch, capsys):
    moved, other = tmp_path / "run.1", tmp_path / "run"
    shutil.copytree(run, moved)
    shutil.copytree(run, other)
    config = (moved / "config.yaml").read_text().replace(f"run: {run}", "run: run")
    (moved / "config.yaml").write_text(config)
    monkeypatch.chdir(tmp_path)
    assert main([*config_of(moved), "--ckpt_path", "last", "--trainer.max_epochs", "3"]) == 0
    assert len(rows_of(moved / "metrics.csv")) == 3
    assert len(rows_of(other / "metrics.csv")) == 2
    assert sorted(tmp_path.iterdir()) == [other, moved]


@pytest.mark.slow
def test_an_early_checkpoint_with_scalars_goes_on_to_the_same_bits(run, tmp_path):
    """alpha, beta and what the optimizer knows of them were scalars once."""
    runs = []
    for early in (False, True):
        runs.append(shutil.copytree(run, tmp_path / f"early {early}"))
        path = runs[-1] / "checkpoints" / "last.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        [optimizer] = checkpoint["optimizer_states"]
        weights = checkpoint["state_dict"]
        mix = [name for name in weights if ".mix." in name]
        moments = [state for state in optimizer["state"].values() if state["exp_avg"].numel() == 1]
        assert len(mix) == len(moments) == 6
        if early:
            weights.update({name: weights[name].squeeze() for name in mix})
            for state in moments:
                state.update({name: value.squeeze() for name, value in state.items()})
            torch.save(checkpoint, path)
        args = [*config_of(runs[-1]), "--ckpt_path", "last", "--trainer.max_epochs", "3"]
        assert main(args) == 0
    one, two = map(weights_of, runs)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_fewer_epochs_than_were_trained_are_refused(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "epoch": 2}, path)  # as within the third
    args = [*config_of(folder), "--ckpt_path", "last", "--trainer.max_epochs", "1"]
    assert main(args) == 2
    said = f"trainer.max_epochs: expected 2 or more, as in {path}, got 1"
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_last_without_a_checkpoint_starts_anew_and_says_so(tmp_path, capsys):
    folder = tmp_path / "run"
    assert fit(folder, "--ckpt_path", "last", "--trainer.max_epochs", "1") == 0
    last = folder / "checkpoints" / "last.ckpt"
    assert f"no checkpoint at {last} yet: starting anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "was", "now"),
    [("name", "resnet11_tiny_acmix", "resnet11_tiny_conv"), ("opt", "adamw", "sgd")],
)
def test_another_network_or_optimizer_changes_nothing(run, tmp_path, capsys, option, was, now):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    before = (folder / "config.yaml").read_text()
    args = [*config_of(folder), "--ckpt_path", "last", f"--model.{option}", now]
    assert main([*args, "--trainer.max_epochs", "3"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for word in (f"{folder}/checkpoints/last.ckpt", was, now):
        assert word in said
    assert (folder / "config.yaml").read_text() == before


def test_a_finished_run_is_left_as_it_is(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main([*config_of(folder), "--ckpt_path", "last"]) == 0
    assert capsys.readouterr().out == f"{folder}: already finished (2 of 2 epochs)\n"
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pictures_are_of_the_last_validation_not_of_the_sanity_check():
    held_out = Classified()
    outputs, batch = torch.eye(3), (torch.zeros(3, 1, 8, 8), torch.arange(3))
    for sanity_checking, seen in ((True, 0), (False, 3), (True, 3)):
        trainer = SimpleNamespace(sanity_checking=sanity_checking)
        held_out.on_validation_epoch_start(trainer, None)
        held_out.on_validation_batch_end(trainer, None, outputs, batch, 0)
        assert len(held_out.truth) == len(held_out.images) == seen


@pytest.mark.parametrize("where", ["folder", "."])
@pytest.mark.parametrize("keys", ["x: 1", "run: a\nmodel: b\ndata: c\ntrainer: d"])
def test_a_folder_that_is_no_run_is_not_touched(tmp_path, monkeypatch, capsys, where, keys):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.yaml").write_text(keys)
    monkeypatch.chdir(folder if where == "." else tmp_path)
    assert fit(where) == 2
    assert "is not empty and no run of acmix" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [folder]
    assert list(folder.iterdir()) == [folder / "config.yaml"]


@pytest.mark.slow
def test_the_working_folder_as_run(run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    monkeypatch.chdir(folder)
    assert fit(".", "--trainer.max_epochs", "1") == 0
    assert f"{folder} held an earlier run, which is now {folder}.1" in capsys.readouterr().err
    assert len(rows_of(folder / "metrics.csv")) == 1


def test_nothing_to_train_leaves_no_folder(tmp_path, capsys):
    assert fit(tmp_path / "run", "--trainer.max_epochs", "0") == 0
    assert capsys.readouterr().out.startswith("nothing was trained")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "option", [["--trainer.fast_dev_run", "true"], ["--trainer.limit_val_batches", "0"]]
)
@pytest.mark.slow
def test_the_final_table_names_only_what_there_is(tmp_path, capsys, option):
    folder = tmp_path / "run"
    assert fit(folder, *option) == 0
    out = capsys.readouterr().out
    table, commands = out.split("Next, for example:")
    words = table.replace(",", " ").split()
    named = [word for word in words if word.endswith((".png", ".csv", ".json", ".ckpt"))]
    assert f"{folder}/curves.png" in named
    assert all((folder / name).is_file() for name in named)
    assert "nan" not in table
    assert ("held-out accuracy" in table) == ("fast_dev_run" in option[0])
    assert (folder / "config.yaml").is_file()
    assert ("acmix validate" in commands) == (folder / "checkpoints" / "last.ckpt").is_file()


def test_suggested_commands_take_their_folder_as_one_word(tmp_path):
    run = tmp_path / "my run"
    network = {"name": "resnet11_tiny_acmix"}
    [baseline, seed] = [shlex.split(command) for command in report.next_commands(run, network)]
    assert f"{run}/config.yaml" in baseline
    assert "resnet11_tiny_conv" in baseline
    assert f"{run}-seed1" in seed
    for other in ({"name": "swin_tiny_acmix"}, {**network, "model_kwargs": {"window": 5}}):
        assert len(report.next_commands(run, other)) == 1


@pytest.mark.slow
def test_lines_come_within_an_epoch(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    assert fit(tmp_path / "run", "--trainer.max_epochs", "1") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 1/1")]
    assert len(lines) == 5  # four batches and the end


def test_a_network_without_the_operator(tmp_path):
    folder = tmp_path / "run"
    assert fit(folder, "--model.name", "resnet11_tiny_conv", "--trainer.max_epochs", "1") == 0
    assert not list(folder.glob("mix.*"))


def test_another_set_of_classes_is_refused(run):
    network = Classification("resnet11_tiny_conv", ["cat", "dog"], in_chans=1)
    path = run / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match="the checkpoint knows 10 classes"):
        network.on_load_checkpoint(torch.load(path, map_location="cpu", weights_only=True))


def test_classes_of_another_name_are_refused(run):
    network = Classification("resnet11_tiny_conv", [*"012345678", "nine"], in_chans=1)
    path = run / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match="has class '9' where the data has 'nine'"):
        network.on_load_checkpoint(torch.load(path, map_location="cpu", weights_only=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--trainer.devices", "999"), "trainer.devices: expected at most"),
        pytest.param(
            ("--trainer.accelerator", "gpu"),
            "trainer.accelerator: expected a device that is there, got gpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there"),
        ),
    ],
)
def test_a_device_that_is_not_there(tmp_path, capsys, options, message):
    assert fit(tmp_path / "run", *options) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_predict_is_for_one_process(run, capsys):
    assert main(["predict", str(run), "--trainer.devices", "2"]) == 2
    assert "trainer.devices: expected 1, got 2 processes" in capsys.readouterr().err


def test_a_failed_write_keeps_the_last_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    WholeFileCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises(Exception, match=r"pickle|local"):
        WholeFileCheckpointIO().save_checkpoint({"step": lambda: 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.slow
def test_ctrl_c_says_what_is_saved(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "acmix.cli", "fit", "--config", str(RECIPE)]
    process = subprocess.Popen(
        [*command, "--run", str(folder), "--trainer.limit_train_batches", "2"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not (folder / "checkpoints" / "last.ckpt").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1].strip().splitlines()[-1]
    assert process.returncode == 130
    assert message.startswith("Stopped in epoch")
    assert f"{folder}/checkpoints/last.ckpt holds step" in message
