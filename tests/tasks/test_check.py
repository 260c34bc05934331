"""`acmix check`: what it counts, what it finds wrong, and what `fit` names before it starts."""

import csv
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from data.pictures import write_shards
from PIL import Image

from acmix.cli import main

RECIPE = str(Path(__file__).parents[2] / "recipes" / "digits.yaml")


def write_noise(folder, counts):
    """CLASS/N.png of pictures that are all unlike."""
    rng = np.random.default_rng(len(str(folder)))
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (10, 12 + number, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


@pytest.fixture
def pets(tmp_path, monkeypatch):
    write_noise(tmp_path / "pets" / "train", {"cat": 4, "dog": 3})
    write_noise(tmp_path / "pets" / "val", {"cat": 2, "dog": 1})
    monkeypatch.chdir(tmp_path)
    return tmp_path / "pets"


def check(*options, source="pets"):
    try:
        return main(["check", "--data=Images", f"--data.source={source}", *options])
    except SystemExit as stop:
        return stop.code


def rows_of(name):
    with Path("runs", "fit-check", name).open() as file:
        return list(csv.DictReader(file))


def test_good_data(pets, capsys):
    assert check() == 0
    out, err = capsys.readouterr()
    assert err == ""
    cells = [line.split() for line in out.splitlines()]
    assert ["train", "7", "0", "0", "12", "to", "13", "to", "15", "10", "RGB", "7"] in cells
    assert ["cat", "4", "2"] in cells
    assert cells[-1] == ["Nothing", "is", "wrong."]
    assert rows_of("classes.csv") == [
        {"class": "cat", "train": "4", "val": "2"},
        {"class": "dog", "train": "3", "val": "1"},
    ]
    assert matplotlib.image.imread("runs/fit-check/samples.png").std() > 0.05
    assert [path.name for path in Path("runs").iterdir()] == ["fit-check"]


def test_broken_and_equal_images(pets, capsys):
    (pets / "train" / "cat" / "3.png").write_bytes(b"no picture")
    shutil.copy(pets / "train" / "cat" / "0.png", pets / "val" / "cat" / "9.png")
    Image.open(pets / "train" / "dog" / "0.png").save(pets / "train" / "cat" / "8.bmp")
    assert check() == 1
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"cannot read {pets}/train/cat/3.png: no image",
        f"equal images in several parts: {pets}/train/cat/0.png (train), "
        f"{pets}/val/cat/9.png (val)",
        f"equal images of several classes: {pets}/train/cat/8.bmp (cat), "
        f"{pets}/train/dog/0.png (dog)",
    ]
    assert [row["name"] for row in rows_of("broken.csv")] == [f"{pets}/train/cat/3.png"]
    assert [row["group"] for row in rows_of("equal.csv")] == ["1", "1", "2", "2"]
    shutil.rmtree(pets)
    write_noise(pets / "train", {"cat": 2, "dog": 2})
    assert check("--data.val_fraction=0.5") == 0
    assert not Path("runs", "fit-check", "broken.csv").exists()


def test_a_part_that_is_missing_and_a_class_without_an_image_that_can_be_read(pets, capsys):
    shutil.rmtree(pets / "val")
    for path in (pets / "train" / "dog").iterdir():
        path.write_bytes(b"")
    assert check() == 1
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("data.source: expected a split val or")
    assert last == "nothing to learn of class dog"


def test_a_test_part_without_classes_is_told_and_does_not_stop_training(pets, capsys):
    (pets / "test").mkdir()
    shutil.copy(pets / "val" / "cat" / "0.png", pets / "test" / "1.png")
    assert check() == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"data.source: expected {pets}/test/CLASS/IMAGE, got {pets}/test/1.png"
    args = ["fit", "--data=Images", f"--data.source={pets}", "--model.name=resnet11_tiny_conv"]
    assert main([*args, "--data.img_size=8", "--trainer.fast_dev_run=true"]) == 0
    assert main([*args, "--data.img_size=8", "--trainer.max_epochs=0"]) == 0


def test_one_part_may_be_held_out_and_test(pets, capsys):
    (pets / "val").rename(pets / "test")
    assert check("--data.val_split=test") == 0


def test_long_lists_are_cut(pets, capsys):
    for number in range(30):
        (pets / "train" / "cat" / f"bad{number}.png").write_bytes(b"")
    assert check() == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 21
    assert said[-1] == "... and 10 more"
    assert len(rows_of("broken.csv")) == 30


def test_shards_and_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "wds", "train", [3, 2])
    write_shards(tmp_path / "wds", "val", [3], first=9)
    assert check(source="wds/wds") == 0
    assert main(["check", "--config", RECIPE]) == 0
    assert "1,437" in capsys.readouterr().out


@pytest.mark.parametrize("more", [(), ("--data.num_workers=1",)])
def test_fit_names_every_broken_file_before_it_starts(pets, capsys, more):
    bad = [pets / "train" / "cat" / "1.png", pets / "val" / "dog" / "0.png"]
    for path in bad:
        path.write_bytes(b"no picture")
    args = ["fit", "--data=Images", f"--data.source={pets}", "--model.name=resnet11_tiny_conv"]
    assert main([*args, *more]) == 2
    *named, last = capsys.readouterr().err.splitlines()
    assert named == [f"cannot read {path}: no image" for path in bad]
    assert "got 2 that cannot (--data.max_corrupt" in last
    assert not Path("runs").exists()
