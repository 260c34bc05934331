"""`acmix predict`: images, folders, pictures of what the network saw, and mistakes in one line."""

import csv
import io
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from timm.data import create_transform

from acmix.analysis.explain import explain
from acmix.cli import main
from acmix.errors import UserError
from acmix.tasks import predict
from acmix.tasks.classification import Classification

RECIPE = Path(__file__).parents[2] / "recipes" / "digits.yaml"
LAYERS = ("layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run with a moving average of the weights, shared."""
    folder = tmp_path_factory.mktemp("predict") / "run"
    args = ["fit", "--config", str(RECIPE), "--run", str(folder), "--trainer.max_epochs", "1"]
    assert main([*args, "--trainer.limit_train_batches", "3", "--model.ema_decay", "0.5"]) == 0
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    for index, name in enumerate(("a.png", "b.PNG", "more/c.png")):
        pixels = (load_digits().images[index] / 16 * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def output(capsys, *args):
    assert main(["predict", *map(str, args)]) == 0
    return capsys.readouterr().out


def test_probabilities_are_those_of_the_run(run, images, capsys):
    rows = list(csv.DictReader(io.StringIO(output(capsys, run, images, "--format", "csv"))))
    assert [row["rank"] for row in rows] == list("12345") * 3
    assert [Path(row["image"]).name for row in rows[::5]] == ["a.png", "b.PNG", "c.png"]
    network = Classification.load_from_checkpoint(run / "checkpoints" / "last.ckpt").eval()
    pixels = torch.from_numpy(load_digits().images[:3]).float()[:, None] / 16
    expected = network((pixels - 0.305) / 0.376).softmax(1).topk(5)
    assert [row["class"] for row in rows] == [str(n) for n in expected.indices.flatten().tolist()]
    found = [float(row["probability"]) for row in rows]
    np.testing.assert_allclose(found, expected.values.flatten().tolist(), atol=3e-3)  # 8 bits


def test_a_checkpoint_alone_will_do(run, images, tmp_path, capsys):
    path = shutil.copy(run / "checkpoints" / "last.ckpt", tmp_path)
    [row] = json.loads(output(capsys, path, images / "a.png", "--top", "3", "--format", "json"))
    [whole] = json.loads(output(capsys, run, images / "a.png", "--top", "3", "--format", "json"))
    assert row == whole
    assert len(row["classes"]) == 3


def test_table(run, images, capsys):
    out = output(capsys, run, images, "--top", "2")
    assert len(out.splitlines()) == 4
    assert out.count("%") == 6


def test_timm_model_with_weights(images, tmp_path, capsys):
    network = timm.create_model("resnet11_tiny_acmix", num_classes=2)
    weights, classes = tmp_path / "weights.safetensors", tmp_path / "classes.txt"
    safetensors.torch.save_file(network.state_dict(), weights)
    classes.write_text("[cat]\ndog\n")
    args = ("resnet11_tiny_acmix", images / "a.png", "--weights", weights, "--classes", classes)
    out = output(capsys, *args)
    assert "[cat]" in out
    assert "dog" in out


def test_explain_saves_two_pictures(run, images, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    output(capsys, run, images / "a.png", "--explain", out, "--pixel", 2, 3)
    assert sorted(path.name for path in out.iterdir()) == ["attention.png", "paths.png"]
    for path in out.iterdir():
        assert matplotlib.image.imread(path).std() > 0.05


def test_the_layers_of_the_average_are_explained(run):
    classifier = predict.load(str(run))
    views = explain(classifier.net, torch.zeros(1, 1, 8, 8), (2, 3))
    assert tuple(view.layer for view in views) == LAYERS
    assert classifier.net is classifier.model.ema.module


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_a_pixel_is_found_where_the_crop_shows_it(crop_mode):
    config = {"input_size": (3, 32, 32), "crop_pct": 0.875, "crop_mode": crop_mode}
    transform = create_transform(**config)
    for pixel in ((50, 90), (20, 100), (77, 60)):
        pixels = np.zeros((100, 180, 3), np.uint8)
        pixels[pixel[0] - 3 : pixel[0] + 4, pixel[1] - 3 : pixel[1] + 4] = 255
        seen = transform(Image.fromarray(pixels)).sum(0)
        brightest = divmod(int(seen.argmax()), 32)
        found = predict.locate(config, (180, 100), pixel)
        assert np.abs(np.subtract(found, brightest)).max() <= 1


def test_a_pixel_that_is_cut_off_is_refused():
    config = {"input_size": (3, 32, 32), "crop_pct": 1.0}
    with pytest.raises(UserError, match=r"columns 39 to 137, which the network sees, got 50 10"):
        predict.locate(config, (180, 100), (50, 10))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("{run}", "no.png"), "got no such file: 'no.png'"),
        (("{run}", ""), "got no such file: ''"),
        (("{run}", "{pipe}"), "{pipe}, a pipe or device"),
        (("{run}", "{image}", "--pixel", "1", "2"), "--pixel: expected with --explain FOLDER"),
        (("{run}", "{image}", "--layers", "x"), "--layers: expected with --explain FOLDER"),
        (("{run}x", "{image}"), "; did you mean {run}?"),
        (
            ("resnet11_tiny_acmix", "{image}", "--weights", "{checkpoint}"),
            "--weights: {checkpoint} is a checkpoint of acmix fit: acmix predict {checkpoint}",
        ),
        (("{run}", "{image}", "--device", "gpu"), "--device: expected one that is there, got gpu"),
        (("{run}", "--format", "csv"), "arguments are required: IMAGE_OR_FOLDER"),
        (("--top", "3", "{run}", "no.png"), "got no such file: 'no.png'"),
        (("{run}", "{empty}"), "{empty}: expected images, found none (looked for .apng"),
        (("{images}", "{image}"), "{images} is no run folder: no {images}/checkpoints/last.ckpt"),
        (
            ("{images}/notes.txt", "{image}"),
            "is no checkpoint of acmix fit: it holds something else",
        ),
        (("{other}", "{image}"), "{other} is no checkpoint of acmix fit: it holds something else"),
        (("nothing", "{image}"), "no run folder, checkpoint or model of timm is called 'nothing'"),
        (("resnet50_acmx", "{image}"), "did you mean resnet50_acmix?"),
        (("resnet11_tiny_acmix", "{image}"), "--weights: expected a file of weights for resnet11"),
        (("resnet11_tiny_acmix", "{image}", "--weights", "{other}"), "{other} holds no weights of"),
        (("{run}", "{image}", "--weights", "x"), "expected with a model of timm"),
        (("{run}", "{image}", "--top", "0"), "--top: expected at least 1, got 0"),
        (("{run}", "{image}", "--batch_size", "0"), "--batch_size: expected at least 1, got 0"),
        (("{run}", "{images}", "--explain", "{empty}"), "--explain: expected one image, got 3"),
        (
            ("{run}", "{image}", "--explain", "{empty}", "--pixel", "8", "0"),
            "--pixel: expected a row below 8 and a column below 8, got 8 0",
        ),
        (
            ("{run}", "{image}", "--explain", "{empty}", "--layers", "x"),
            "layers: expected some of layer1.0.conv2, layer2.0.conv2, layer3.0.conv2, got x",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(run, images, tmp_path, capsys, args, message):
    (tmp_path / "empty").mkdir()
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    names = {"run": run, "images": images, "image": images / "a.png"}
    names |= {"empty": tmp_path / "empty", "other": tmp_path / "other.pt"}
    names |= {"pipe": tmp_path / "pipe.png", "checkpoint": run / "checkpoints" / "last.ckpt"}
    os.mkfifo(names["pipe"])
    assert main(["predict", *(arg.format(**names) for arg in args)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message.format(**names) in captured.err


def folder_of_trouble(images, folder):
    """One image among what lies in folders of images."""
    folder.mkdir()
    shutil.copy(images / "a.png", folder / "2.png")
    shutil.copy(images / "b.PNG", folder / "10.png")
    (folder / "1.png").write_bytes(b"no picture")
    (folder / "._2.png").write_bytes(b"of macOS")
    (folder / "3.heic").write_bytes(b"of no known suffix")
    (folder / "notes.txt").write_text("no image")
    (folder / "x.jpg").mkdir()
    (folder / "lost.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    return folder


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_what_cannot_be_read_is_named_and_the_rest_is_shown(run, images, tmp_path, capsys, form):
    folder = folder_of_trouble(images, tmp_path / "folder")
    args = ["predict", str(run), str(folder), "--format", form, "--top", "1", "--batch_size", "1"]
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    names = [str(folder / name) for name in ("2.png", "10.png")]
    if form == "json":
        assert [row["image"] for row in json.loads(out)] == names
    else:
        assert [re.split(r",| {2}", line)[0] for line in out.splitlines()[1:]] == names
    passed, *unread, last = err.splitlines()
    assert passed == (
        f"{folder}: passed over 1 file ({folder}/._2.png) left by systems and tools; 2 files (such "
        f"as {folder}/3.heic) with no suffix of an image that Pillow reads"
    )
    assert unread == [
        f"cannot read {folder}/1.png: no image",
        f"cannot read {folder}/lost.png: no file",
    ]
    assert last == "2 of 4 images could not be read"


def test_rows_come_with_their_batch(run, images, monkeypatch, capsys):
    """What was shown before a stop was shown whole."""
    seen = []

    def stop_at_the_second(*args, _predict=predict.predict, **kwargs):
        if seen:
            raise KeyboardInterrupt
        seen.append(1)
        return _predict(*args, **kwargs)

    monkeypatch.setattr(predict, "predict", stop_at_the_second)
    args = ["predict", str(run), str(images), "--batch_size=1", "--format=csv", "--top=1"]
    assert main(args) == 130
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert err == "Stopped after 1 of 3 images.\n"


def test_more_classes_than_there_are_gives_all(run, images, capsys):
    out = output(capsys, run, images / "a.png", "--top", "100", "--format", "csv")
    assert len(out.splitlines()) == 1 + 10


def test_several_images_and_folders(run, images, capsys):
    out = output(capsys, run, images / "b.PNG", images, "--top", "1", "--format", "csv")
    assert [Path(line.split(",")[0]).name[0] for line in out.splitlines()[1:]] == list("babc")


def test_flip_is_the_mean_of_an_image_and_its_mirror_image(run, images, tmp_path, capsys):
    def probabilities(image, *more):
        args = (run, image, "--top", "10", "--format", "json", *more)
        [row] = json.loads(output(capsys, *args))
        return {of["class"]: of["probability"] for of in row["classes"]}

    mirrored = tmp_path / "mirrored.png"
    ImageOps.mirror(Image.open(images / "a.png")).save(mirrored)
    one, other = probabilities(images / "a.png"), probabilities(mirrored)
    mean = probabilities(images / "a.png", "--flip")
    assert one != pytest.approx(other, abs=1e-3)
    assert mean == pytest.approx({name: (one[name] + other[name]) / 2 for name in one}, abs=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16", "LA"])
@pytest.mark.parametrize("size", [(8, 8), (1, 1), (13, 40)])
def test_an_image_of_any_size_and_mode(run, tmp_path, capsys, mode, size):
    path = tmp_path / "image.tif"
    Image.new(mode, size).save(path)
    assert output(capsys, run, path, "--top", "1").count("%") == 1


def test_an_image_of_which_little_is_seen_is_named(run, tmp_path, capsys):
    for name, size in (("wide", (500, 20)), ("plain", (40, 30))):
        Image.new("L", size).save(tmp_path / f"{name}.png")
    assert main(["predict", str(run), str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert said == f"{tmp_path}/wide.png: judged on its middle, 4% of the image\n"


class Exploit:
    """A pickle that would write a file as it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "save", [torch.save, lambda data, path: path.write_bytes(pickle.dumps(data))]
)
def test_nothing_in_a_checkpoint_is_run(images, tmp_path, save, capsys):
    path, touched = tmp_path / "bad.ckpt", tmp_path / "touched"
    save({"hyper_parameters": Exploit(touched), "state_dict": {}}, path)
    assert main(["predict", str(path), str(images)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not touched.exists()
