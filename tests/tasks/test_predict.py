"""`acmix predict`: images, folders, pictures of what the network saw, and mistakes in one line."""

import csv
import io
import json
import pickle
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
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
        (("{run}", "no.png"), "no image or folder no.png"),
        (("{run}", "{images}/notes.txt"), "cannot read {images}/notes.txt: no image"),
        (("{run}", "{image}", "--device", "gpu"), "--device: expected one that is there, got gpu"),
        (("{run}", "--format", "csv"), "arguments are required: IMAGE_OR_FOLDER"),
        (("--top", "3", "{run}", "no.png"), "no image or folder no.png"),
        (("{run}", "{empty}"), "{empty}: expected images (.bmp"),
        (("{images}", "{image}"), "{images} is no run folder: no {images}/checkpoints/last.ckpt"),
        (
            ("{images}/notes.txt", "{image}"),
            "is no checkpoint of acmix fit: it holds something else",
        ),
        (("{other}", "{image}"), "{other} is no checkpoint of acmix fit: it holds something else"),
        (("nothing", "{image}"), "no run folder, checkpoint or model of timm is called nothing"),
        (("resnet50_acmx", "{image}"), "did you mean resnet50_acmix?"),
        (("resnet11_tiny_acmix", "{image}"), "--weights: expected a file of weights for resnet11"),
        (("resnet11_tiny_acmix", "{image}", "--weights", "{other}"), "{other} holds no weights of"),
        (("{run}", "{image}", "--weights", "x"), "expected with a model of timm"),
        (
            ("{run}", "{image}", "--top", "11"),
            "--top: expected 1 to 10, the number of classes, got",
        ),
        (("{run}", "{image}", "--top", "0"), "--top: expected 1 to 10, the number of classes, got"),
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
    assert main(["predict", *(arg.format(**names) for arg in args)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message.format(**names) in captured.err


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
