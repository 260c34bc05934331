"""Segmentation as a task: its loss, its measures, and a run that stops, goes on and predicts."""

import re

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from data.mask_folders import NAMES, colours, stripes, write_folders
from lightning.pytorch import Trainer
from PIL import Image
from tasks.runs import checkpoint_of, differences, rows_of, signal_at, start_command

from acmix.analysis import masks
from acmix.cli import main
from acmix.data import Masks
from acmix.tasks.segmentation import Segmentation, pixel_loss

SMALL = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}
DATA = {"resize": 32, "crop": 32, "scale": (0.8, 1.2), "batch_size": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("segmentation") / "set", size=(40, 32))


def segmentation(name="resnet26_acmix", **options):
    torch.manual_seed(0)
    options = {"width": 16, "head_width": 16, "model_kwargs": SMALL, **options}
    return Segmentation(name, NAMES, **options)


def fitted(folder, steps=1, **options):
    task = segmentation(**options)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        max_steps=steps,
    )
    trainer.fit(task, datamodule=Masks(str(folder), **DATA))
    return task, trainer


def test_loss_is_the_mean_over_all_pixels():
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    masks = torch.randint(0, 3, (2, 4, 5))
    masks[0, :2] = 255
    found, weight = logits.log_softmax(1), torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    total = weighted = 0.0
    for image in range(2):
        for row in range(4):
            for column in range(5):
                label = masks[image, row, column].item()
                if label != 255:
                    one = -found[image, label, row, column].item()
                    total, weighted = total + one, weighted + weight[label].item() * one
    assert pixel_loss(found, masks, 255).item() == pytest.approx(total / 40)
    assert pixel_loss(found, masks, 255, weight).item() == pytest.approx(weighted / 40)
    of_each = [pixel_loss(found[n : n + 1], masks[n : n + 1], 255) for n in range(2)]
    torch.testing.assert_close(pixel_loss(found, masks, 255), sum(of_each) / 2)


@pytest.mark.parametrize("decoder", ["semantic_fpn", "upernet"])
def test_a_batch_without_a_labelled_pixel_has_no_loss(decoder):
    task = segmentation(decoder=decoder)
    loss, sums = task.step((torch.randn(2, 3, 32, 32), torch.full((2, 32, 32), 255)))
    assert (loss.item(), sums["pixel_accuracy"].item()) == (0.0, 0.0)
    loss.backward()
    assert all((weight.grad == 0).all() for weight in task.net.parameters())


@pytest.mark.parametrize("weight", [0.4, 0.0])
def test_loss_has_a_part_of_the_auxiliary_head(weight):
    task = segmentation(decoder="upernet", auxiliary_weight=weight, norm="layer").train()
    assert (task.net.auxiliary is None) == (weight == 0)
    images, masks = torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))
    loss, sums = task.step((images, masks))
    logits, auxiliary = task(images)
    expected = F.cross_entropy(logits, masks)
    if weight:
        expected = expected + weight * F.cross_entropy(auxiliary, masks)
    torch.testing.assert_close(loss, expected)
    right = (logits.argmax(1) == masks).float().mean()
    assert sums["pixel_accuracy"].item() == pytest.approx(2 * right.item())


@pytest.mark.parametrize(
    "options",
    [{}, {"flip_test": True, "test_scales": [1.0, 0.5]}, {"window": 20, "window_stride": 15}],
    ids=["plain", "views", "windows"],
)
def test_measures_are_those_of_the_masks(folder, options):
    """At the size of the masks, which is not that of the images that the network sees."""
    data = Masks(str(folder), test_size=24, batch_size=3)
    task = segmentation(**options).eval()
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    [measured] = trainer.validate(task, datamodule=data, verbose=False)
    truths, founds, losses = [], [], []
    for place in range(2):
        image, mask = data.val_set()[place]
        with torch.no_grad():
            [found] = task.log_probabilities([image], [(32, 40)])
        assert found.shape == (3, 32, 40)
        if not options:
            logits = F.interpolate(task(image[None]), (32, 40), mode="bilinear")
            torch.testing.assert_close(found, logits[0].log_softmax(0))
        losses.append(F.cross_entropy(found[None], mask[None], ignore_index=255, reduction="sum"))
        truths.append(mask.numpy()[mask != 255])
        founds.append(found.argmax(0).numpy()[mask != 255])
    truth, found = np.concatenate(truths), np.concatenate(founds)
    ious = [
        ((truth == k) & (found == k)).sum() / ((truth == k) | (found == k)).sum() for k in range(3)
    ]
    assert measured["val_miou"] == pytest.approx(np.mean(ious), abs=1e-3)
    assert measured["val_pixel_accuracy"] == pytest.approx((truth == found).mean(), abs=1e-3)
    assert measured["val_loss"] == pytest.approx(sum(losses).item() / (2 * 32 * 40), rel=1e-4)
    assert list(measured) == [name for name in task.measures if name.startswith("val_")]


def test_images_of_one_size_go_together():
    task = segmentation().eval()
    seen = []
    task.net.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    images = [torch.randn(3, *size) for size in ((32, 40), (32, 40), (24, 40), (32, 40))]
    sizes = [(32, 40), (32, 40), (24, 40), (50, 60)]
    found = list(task.segment(images, sizes))
    assert [tuple(of.shape) for of in found] == sizes
    assert seen == [(2, 3, 32, 40), (1, 3, 24, 40), (1, 3, 32, 40)]


def test_rare_classes_weigh_more(folder):
    task, trainer = fitted(folder, class_weights="balanced")
    counts = torch.tensor(trainer.datamodule.class_counts(), dtype=torch.float64)
    expected = counts.sum() / (3 * counts)
    torch.testing.assert_close(task.class_weight.double(), expected, rtol=1e-5, atol=0)
    assert not any("class_weight" in key for key in task.state_dict())
    given, _ = fitted(folder, class_weights=[1.0, 2.0, 3.0])
    assert given.class_weight.tolist() == [1.0, 2.0, 3.0]


def test_a_segmenter_starts_from_a_classifier(capsys):
    classifier = timm.create_model("resnet26_conv", num_classes=7, **SMALL)
    task = segmentation()
    task.start_from(classifier.state_dict())
    body, theirs = task.net.features.body.state_dict(), classifier.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in body.items() if key in theirs)
    assert "layer4.0.conv1.weight" in body
    assert "tensors of a classifier" in capsys.readouterr().err


def test_a_segmenter_of_other_classes_gives_all_but_the_last_layers(capsys):
    torch.manual_seed(1)
    options = {"width": 16, "head_width": 16, "model_kwargs": SMALL, "decoder": "upernet"}
    source = Segmentation("resnet26_acmix", [*NAMES, "person"], **options)
    task = segmentation(decoder="upernet")
    task.start_from(source.net.state_dict())
    last = ("decoder.classifier.1", "auxiliary.classifier.1")
    for key, value in task.net.state_dict().items():
        if not key.startswith(last):
            assert torch.equal(value, source.net.state_dict()[key]), key
    said = "all of the checkpoint but decoder.classifier.1, auxiliary.classifier.1"
    assert said in capsys.readouterr().err


def test_a_frozen_network_stays_as_it_is(folder):
    start = segmentation().net.state_dict()
    task, _ = fitted(folder, steps=2, freeze=["backbone"], sched="none")
    changed = {
        ".".join(key.split(".")[:2])
        for key, value in task.net.state_dict().items()
        if not torch.equal(value, start[key])
    }
    assert changed == {"decoder.pyramid", "decoder.branches", "decoder.classifier"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"class_weights": [1.0]}, "model.class_weights: expected 3, one a class, got 1"),
        ({"window_stride": 4}, "model.window_stride: expected a window, got 4"),
        (
            {"window": 4, "window_stride": 5},
            "model.window_stride: expected at most the window, 4, got 5",
        ),
        ({"test_scales": []}, "model.test_scales: expected a scale or more, got none"),
        ({"test_scales": [1.0, 0.0]}, "model.test_scales: expected above 0"),
        ({"dropout": 1.0}, "model.dropout: expected 0 to below 1"),
        ({"name": "resnet50_acmx"}, "model.name: unknown 'resnet50_acmx'; did you mean"),
        (
            {"name": "resnet11_tiny_acmix", "model_kwargs": {}},
            "model.name: expected a network with maps of strides 4, 8, 16, 32",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(ValueError, match="^" + re.escape(said)):
        segmentation(**options)


RECIPE = """\
task: segmentation
threads: 1
data: {{class_path: Masks, init_args: {{source: {}, resize: 32, crop: 32, batch_size: 2}}}}
model:
  {{name: resnet26_acmix, decoder: upernet, width: 16, head_width: 16, dropout: 0.1,
    model_kwargs: {{channels: [8, 8, 16, 16], layers: [1, 1, 1, 1]}}, ema_decay: 0.9, lr: 1.0e-3,
    sched: poly, sched_kwargs: {{decay_rate: 0.9}}, warmup_steps: 1}}
trainer: {{accelerator: cpu, max_epochs: 3, enable_progress_bar: false}}
"""


@pytest.fixture(scope="module")
def fit(folder):
    """Runs `acmix fit` of the task with a recipe and options; returns its exit code."""
    recipe = folder.parent / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder))
    return lambda *options: main(["fit", "--config", str(recipe), *options])


@pytest.fixture(scope="module")
def whole(fit, folder):
    """A run of three epochs of two steps."""
    run = folder.parent / "whole"
    assert fit(f"--run={run}") == 0
    return run


@pytest.mark.slow
def test_a_run_is_drawn_measured_and_predicts(whole, capsys):
    files = {path.name for path in whole.iterdir()}
    assert {"augmented.png", "predictions.png", "classes.png", "confusion.png"} <= files
    assert {"classes.csv", "curves.png", "mix.csv", "summary.json"} <= files
    assert [row["class"] for row in rows_of(whole, "classes.csv")] == NAMES
    assert main(["validate", str(whole)]) == 0
    said = dict(line.split() for line in capsys.readouterr().out.splitlines())
    measured = float(rows_of(whole)[-1]["val_miou"])
    assert float(said["val_miou"].rstrip("%")) in (
        pytest.approx(measured, abs=1e-4),
        pytest.approx(100 * measured, abs=1e-2),
    )
    assert main(["predict", str(whole)]) == 0
    rows = rows_of(whole, "predictions.csv")
    assert [row["image"].rpartition("/")[2] for row in rows] == ["0.png", "1.png"]
    assert [sum(float(row[name]) for name in NAMES) for row in rows] == pytest.approx([1, 1])


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(whole, tmp_path):
    run, recipe = tmp_path / "run", whole.parent / "recipe.yaml"
    options = ["--config", str(recipe), f"--run={run}", "--every_n_steps=1", *signal_at(4, 9)]
    assert start_command(["fit", *options]).wait() != 0
    assert checkpoint_of(run)["global_step"] == 3  # within an epoch
    goes_on = ["--config", f"{whole}/config.yaml", f"--run={run}", "--ckpt_path=last"]
    assert main(["fit", *goes_on]) == 0
    one, two = checkpoint_of(whole), checkpoint_of(run)
    assert one["global_step"] == two["global_step"] == 6
    for part in ("state_dict", "optimizer_states"):
        assert differences(one[part], two[part]) == [], part
    assert rows_of(whole) == rows_of(run)


def test_a_mask_that_cannot_be_used_ends_a_run_in_one_line(fit, folder, tmp_path, capsys):
    spoilt = write_folders(tmp_path / "spoilt", size=(40, 32))
    Image.new("L", (40, 32), 9).save(spoilt / "masks" / "train" / "2.png")
    assert fit(f"--run={tmp_path / 'run'}", f"--data.source={spoilt}") == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert f"data.source: {spoilt}/masks/train/2.png: expected 0 to 2 of the 3 classes" in line


@pytest.mark.slow
def test_own_images_get_masks_and_pictures(whole, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    (images / "deep").mkdir(parents=True)
    for name, size in {"a": (40, 32), "deep/a": (33, 57)}.items():
        colours(stripes(size=size)).save(images / f"{name}.png")
    (images / "broken.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as stop:
        main(["predict", str(whole), str(images), "--out", str(out)])
    assert stop.value.code == 1
    said = capsys.readouterr()
    assert "1 of 3 images could not be read" in said.err
    for name, size in {"a": (40, 32), "a-2": (33, 57)}.items():
        with Image.open(out / "masks" / f"{name}.png") as mask:
            assert (mask.mode, mask.size) == ("P", size)
            numbers = np.asarray(mask)
            red, green, blue = masks.colour(int(numbers[0, 0]))
            shown = np.asarray(mask.convert("RGB"))[0, 0] / 255
        np.testing.assert_allclose(shown, (red, green, blue), atol=0.01)
        assert numbers.max() < len(NAMES)
        assert (out / f"{name}.png").is_file()
        most = NAMES[np.bincount(numbers.ravel()).argmax()]
        assert any(f"  {most} " in line for line in said.out.splitlines())
    first = out / "masks" / "a.png"
    before = first.read_bytes()
    only = ["predict", str(whole), str(images / "a.png"), "--out", str(tmp_path / "more")]
    assert main([*only, "--no-pictures"]) == 0
    assert (tmp_path / "more" / "masks" / "a.png").read_bytes() == before
    assert not (tmp_path / "more" / "a.png").exists()


@pytest.mark.slow
def test_variants_of_the_operator_are_trained_side_by_side(whole, tmp_path, capsys):
    out, recipe = tmp_path / "paths", whole.parent / "recipe.yaml"
    args = ["--seeds", "1", "--variants", "conv", "acmix", "--trainer.max_epochs", "1"]
    assert main(["ablate", "paths", "--config", str(recipe), *args, "--out", str(out)]) == 0
    assert "held-out mean IoU" in capsys.readouterr().out
    assert all(0 <= float(row["miou"]) <= 1 for row in rows_of(out, "results.csv"))


@pytest.mark.slow
def test_two_processes_measure_what_one_does(whole, tmp_path, capsys):
    """Of three images, which two processes cannot share evenly."""
    odd = write_folders(tmp_path / "odd", val=3, size=(40, 32))
    args = ["validate", str(whole), f"--data.source={odd}", "--trainer.accelerator=cpu"]
    assert main(args) == 0
    one = dict(line.split() for line in capsys.readouterr().out.splitlines())
    process = start_command([*args, "--trainer.devices=2", "--trainer.strategy=ddp"])
    said, _ = process.communicate(timeout=240)
    two = dict(line.split() for line in said.splitlines())
    assert process.returncode == 0
    for name in ("val_loss", "val_miou", "val_pixel_accuracy"):
        assert two[name] == one[name]
