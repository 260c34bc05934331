"""`acmix ablate`: every variant and seed once, also after a stop; table, CSV and picture."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from acmix.cli import main
from acmix.tasks import ablate

RECIPE = Path(__file__).parents[2] / "recipes" / "digits.yaml"
SHORT = ["--trainer.limit_train_batches", "2", "--trainer.max_epochs", "1"]


def study(name, out, *options):
    args = ["ablate", name, "--config", str(RECIPE), "--out", str(out), *SHORT]
    return main([*args, *options])


def rows_of(out):
    with (out / "results.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """conv and acmix, two seeds each, with an argument of the operator."""
    out = tmp_path_factory.mktemp("ablate") / "paths"
    options = ["--model.model_kwargs", '{"acmix_kwargs": {"kernel_att": 3}}']
    assert study("paths", out, *options, "--variants", "conv", "acmix", "--seeds", "2") == 0
    return out, options


@pytest.mark.slow
def test_results_are_those_of_the_runs(paths):
    out, _ = paths
    rows = rows_of(out)
    assert [(row["variant"], row["seed"]) for row in rows] == [
        *(("conv", "0"), ("conv", "1"), ("acmix", "0"), ("acmix", "1")),
    ]
    for row in rows:
        summary = json.loads((out / f"{row['variant']}-seed{row['seed']}/summary.json").read_text())
        assert float(row["accuracy"]) == summary["val_accuracy"]
        assert int(row["parameters"]) == summary["parameters"]
        assert summary["seed"] == int(row["seed"])
        assert float(row["infer_images_per_second"]) > 0
        model = summary["config"]["model"]
        assert model["name"] == f"resnet11_tiny_{row['variant']}"
        if row["variant"] == "acmix":
            assert model["model_kwargs"]["acmix_kwargs"] == {"kernel_att": 3, "mix": "learned"}
    assert (out / "ablation.png").is_file()


@pytest.mark.slow
def test_finished_runs_are_not_repeated_and_a_missing_one_is_made(paths, capsys):
    out, options = paths
    before = rows_of(out)
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}
    gone = out / "conv-seed1" / "summary.json"
    gone.unlink()  # as if stopped before the end
    (out / "conv-seed1" / "checkpoints" / "last.ckpt").unlink()
    unreported = out / "acmix-seed0" / "summary.json"
    unreported.unlink()  # as if stopped between the last epoch and the report
    assert study("paths", out, *options, "--variants", "conv", "acmix", "--seeds", "2") == 0
    captured = capsys.readouterr()
    assert captured.err.count("(finished)") == 2
    assert "variant" in captured.out
    assert "±" in captured.out
    again = {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}
    for path in (gone, unreported):
        assert again.pop(path) != times.pop(path)
    assert again == times
    assert [row["accuracy"] for row in rows_of(out)] == [row["accuracy"] for row in before]


@pytest.mark.slow
def test_other_options_are_refused(paths, capsys):
    out, options = paths
    assert study("paths", out, *options, "--model.lr", "1e-4") == 2
    assert "holds an ablation with other options" in capsys.readouterr().err


@pytest.mark.slow
def test_shifts(tmp_path):
    options = ["--variants", "tensor", "learned_random", "--seeds", "1"]
    assert study("shifts", tmp_path / "out", *options) == 0
    rows = rows_of(tmp_path / "out")
    assert [row["variant"] for row in rows] == ["tensor", "learned_random"]
    assert int(rows[0]["parameters"]) < int(rows[-1]["parameters"])


def test_variants_are_those_of_the_paper():
    assert list(ablate.PATHS) == ["conv", "attention", "convolution", "sum", "convex", "acmix"]
    started = {name for name, options in ablate.SHIFTS.items() if "shift_init" in options}
    assert started == {"learned_random", "learned_shared_random"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--run", "x"], "--run, --ckpt_path: the runs of an ablation lie in --out DIR"),
        (
            ["--model.name", "resnet11_tiny_conv"],
            "model.name: expected a network of acmix that ends",
        ),
        (["--variants", "sums"], "--variants: expected some of conv, attention, "),
        (["--model.lrr", "1"], "unknown option model.lrr; did you mean model.lr?"),
        (["--trainer.limit_val_batches", "0"], "trainer.limit_val_batches: expected held-out"),
        (["--trainer.fast_dev_run", "true"], "trainer.fast_dev_run: expected false, got true"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, capsys, options, message):
    """And leave nothing behind that the corrected command would trip over."""
    assert study("paths", tmp_path / "out", *options) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_split_that_is_missing_is_told_before_anything_is_written(tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "pets" / name / "0.png")
    options = ["--data", "Images", "--data.source", str(tmp_path / "pets")]
    model = ["--model.name", "resnet11_tiny_acmix", "--out", str(tmp_path / "out")]
    assert main(["ablate", "paths", *options, *model]) == 2
    assert "--data.val_fraction 0.1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert study("paths", tmp_path) == 2
    assert "is not empty and no ablation" in capsys.readouterr().err


def test_unknown_study(capsys):
    assert main(["ablate", "path"]) == 2
    assert "invalid choice: 'path'" in capsys.readouterr().err
