"""Detection as a task: what is trained, measured, drawn, written, and what is refused."""

import csv
import json

import pytest
import timm
import torch
from data.scenes import IDS, NAMES, change, scene, write_coco
from PIL import Image
from tasks.runs import assert_same_end, checkpoint_of, rows_of, signal_at, start_command

from acmix.cli import main
from acmix.models.features import create_features
from acmix.tasks.dense import load_same, network_of
from acmix.tasks.detection import Detection

SMALL = {"layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64)}
STILL = [
    *("--model.lr", "0", "--model.weight_decay", "0", "--model.sched", "none"),
    *("--model.warmup_steps", "0", "--trainer.max_steps", "1"),
]
PICTURES = ("augmented.png", "curves.png", "predictions.png", "pr_curve.png", "classes.png")


def recipe(folder, detector="retinanet", **more):
    """A run on 14 images of 64 pixels, whose steps take a tenth of a second."""
    write_coco(folder / "scenes", train=14, val=4)
    text = f"""
task: detection
threads: 1
data:
  class_path: Objects
  init_args:
    source: {folder / "scenes"}
    test_size: 64
    max_size: 96
    batch_size: 4
    distort: 0.2
model:
  name: resnet26_acmix
  model_kwargs: {{layers: [1, 1, 1, 1], channels: [8, 16, 32, 64]}}
  detector: {detector}
  width: 32
  anchor_sizes: [8, 16, 24, 48, 96]
  score_threshold: 0.01
  lr: 1.0e-3
  warmup_steps: 2
trainer: {{accelerator: cpu, max_epochs: 2}}
"""
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def counts(seeds):
    """Objects of each class in some scenes."""
    labels = [label for seed in seeds for label, *_ in scene(seed)[1]]
    return [labels.count(number) for number in range(len(NAMES))]


def code_of(args):
    try:
        return main(args)
    except SystemExit as stop:
        return stop.code


def command(file, run, *more):
    return ["fit", "--config", str(file), "--run", str(run), *more]


@pytest.fixture(scope="module")
def finished(made_once):
    """A folder with the recipe of a Mask R-CNN and its run."""

    def make(folder):
        assert main(command(recipe(folder, "mask_rcnn"), folder / "run")) == 0

    return made_once("detected", make)


@pytest.mark.slow
def test_a_run_leaves_measures_and_pictures(finished):
    run = finished / "run"
    rows = rows_of(run)
    names = {"train_loss", "train_class_loss", "train_box_loss", "train_mask_loss"}
    names |= {"train_proposal_loss", "val_ap", "val_ap50", "val_mask_ap", "val_mask_ar100"}
    assert names <= set(rows[-1])
    parts = [
        float(rows[-1][key]) for key in rows[-1] if key.endswith("_loss") and key != "train_loss"
    ]
    assert sum(parts) == pytest.approx(float(rows[-1]["train_loss"]), rel=1e-4)
    assert all((run / name).stat().st_size > 5000 for name in PICTURES)
    classes = list(csv.DictReader((run / "classes.csv").open()))
    assert [row["class"] for row in classes] == NAMES
    counts = [
        sum(label == n for seed in (101, 102, 103) for label, *_ in scene(seed)[1])
        for n in range(3)
    ]
    assert [int(row["objects"]) for row in classes] == counts
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["task"], summary["train_images"], summary["held_out_images"]) == (
        "detection",
        14,
        4,
    )
    assert list(summary["measure"]) == ["AP"]


@pytest.mark.slow
def test_a_run_is_measured_and_its_images_predicted(finished, capsys):
    run = finished / "run"
    assert main(["validate", str(run)]) == 0
    said = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(said["val_ap"]) == pytest.approx(float(rows_of(run)[-1]["val_ap"]), abs=1e-4)
    assert main(["predict", str(run)]) == 0
    assert "4 held-out images: " in capsys.readouterr().out
    for row in rows_of(run, "predictions.csv"):
        assert row["class"] in NAMES
        assert row["image"].endswith(".png")
        assert 0.01 <= float(row["score"]) <= 1
        assert 0 <= float(row["left"]) < float(row["right"]) <= 96


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    file = recipe(tmp_path)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main(command(file, whole)) == 0
    often = ("--every_n_steps", "1")
    process = start_command(command(file, run, *often, *signal_at(4, 9)))
    assert process.wait() != 0
    assert checkpoint_of(run)["global_step"] == 3
    assert main(command(file, run, "--ckpt_path", "last")) == 0
    assert_same_end(run, whole, steps=6)


@pytest.mark.slow
def test_own_images_are_drawn_and_written(finished, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    (images / "deep").mkdir(parents=True)
    for name, seed in {"a": 1, "deep/a": 2, "empty": 3}.items():
        scene(seed, count=0 if name == "empty" else None)[0].save(images / f"{name}.png")
    (images / "broken.png").write_bytes(b"no image")
    args = ["predict", str(finished / "run"), str(images), "--threshold", "0.02", "--out", str(out)]
    assert code_of([*args, "--write", "coco", "yolo", "csv"]) == 1
    said = capsys.readouterr()
    assert "1 of 4 images could not be read" in said.err
    assert "broken.png: no image" in said.err
    content = json.loads((out / "predictions.json").read_text())
    assert [of["id"] for of in content["categories"]] == IDS
    assert {of["file_name"].rpartition("/")[2] for of in content["images"]} == {
        "a.png",
        "empty.png",
    }
    files = {path.name for path in out.iterdir()}
    assert {"a.png", "a-2.png", "empty.png", "predictions.csv", "labels"} <= files
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert len(rows) == len(content["annotations"]) > 0
    for row in content["annotations"]:
        image = content["images"][row["image_id"] - 1]
        assert row["segmentation"]["size"] == [image["height"], image["width"]]
        left, top, width, height = row["bbox"]
        assert left + width <= image["width"] + 0.1
        assert top + height <= image["height"] + 0.1
    lines = [
        line.split()
        for name in ("a", "a-2", "empty")
        for line in (out / "labels" / f"{name}.txt").read_text().splitlines()
    ]
    assert len(lines) == len(rows)
    label, x, _, width, height, score = lines[0]
    first, image = content["annotations"][0], content["images"][0]
    assert IDS[int(label)] == first["category_id"]
    assert float(score) == pytest.approx(first["score"], abs=1e-3)
    left = (float(x) - float(width) / 2) * image["width"]
    assert left == pytest.approx(first["bbox"][0], abs=0.02)
    assert float(height) * image["height"] == pytest.approx(first["bbox"][3], abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--threshold", "1.5"], "--threshold: expected 0 to 1, got 1.5"),
        (["--threshold", "0"], "--threshold: expected 0.01 or more, which the run has as model.sc"),
        (["--only", "discs"], "--only: no class 'discs'; did you mean disc?"),
        (["--write", "xml"], "argument --write: invalid choice: 'xml'"),
        (["--device", "abacus"], "--device: expected one that is there"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_predict_refuses_in_one_line(args, said, finished, tmp_path, capsys):
    scene(1)[0].save(tmp_path / "a.png")
    assert main(["predict", str(finished / "run"), str(tmp_path / "a.png"), *args]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "predictions").exists()


@pytest.mark.slow
def test_only_some_classes_are_written(finished, tmp_path):
    scene(1)[0].save(tmp_path / "a.png")
    args = ["predict", str(finished / "run"), str(tmp_path / "a.png"), "--threshold", "0.01"]
    assert main([*args, "--only", "box", "--out", str(tmp_path / "out"), "--no-pictures"]) == 0
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {of["category_id"] for of in content["annotations"]} <= {IDS[1]}
    assert not (tmp_path / "out" / "a.png").exists()


@pytest.mark.slow
def test_another_number_of_classes_takes_all_but_the_last_layers(finished, tmp_path, capsys):
    file = recipe(tmp_path, "mask_rcnn")
    for part in ("train", "val"):
        path = tmp_path / "scenes" / f"instances_{part}.json"
        content = json.loads(path.read_text())
        content["categories"].append({"id": 91, "name": "cone"})
        path.write_text(json.dumps(content))
    start_at = ["--model.warm_start", str(finished / "run" / "checkpoints" / "last.ckpt")]
    assert main(command(file, tmp_path / "run", *start_at, *STILL)) == 0
    said = capsys.readouterr().err
    assert "model.warm_start: took all of the checkpoint but " in said
    assert "cls_score" in said
    theirs, ours = (checkpoint_of(of / "run")["state_dict"] for of in (finished, tmp_path))
    same = {key for key in ours if key in theirs and torch.equal(ours[key], theirs[key])}
    left = {key for key in ours if key.endswith((".weight", ".bias")) and key not in same}
    predictors = ("cls_score", "bbox_pred", "mask_fcn_logits")
    assert left == {
        key for key in ours if ".roi_heads." in key and any(name in key for name in predictors)
    }


@pytest.mark.slow
def test_a_backbone_starts_from_a_classifier(tmp_path, capsys):
    net = timm.create_model("resnet26_acmix", num_classes=5, **SMALL)
    torch.save(net.state_dict(), tmp_path / "classifier.pt")
    file = recipe(tmp_path)
    args = ["--model.warm_start", str(tmp_path / "classifier.pt"), *STILL]
    assert main(command(file, tmp_path / "run", *args)) == 0
    assert "tensors of a classifier for the resnet26_acmix" in capsys.readouterr().err
    ours = checkpoint_of(tmp_path / "run")["state_dict"]
    body = "net.model.backbone.features.body."
    for key, value in net.state_dict().items():
        if not key.startswith("fc.") and not key.endswith(
            ("running_mean", "running_var", "tracked")
        ):
            assert torch.equal(ours[body + key], value), key


@pytest.mark.parametrize("name", ["pvt_tiny_acmix", "swin_tiny_acmix", "san10_acmix"])
def test_the_network_of_a_classifier_is_found_in_every_family(name):
    net = timm.create_model(name, num_classes=3)
    body = network_of(create_features(name))
    assert load_same(body, net.state_dict()) == len(body.state_dict())
    for one, other in zip(net.parameters(), body.parameters(), strict=False):
        assert torch.equal(one, other)
    assert load_same(body, timm.create_model("resnet18").state_dict()) == 0


@pytest.mark.slow
def test_a_classifier_of_convolutions_starts_its_acmix_network(tmp_path, capsys):
    net = timm.create_model("resnet26_conv", num_classes=5, **SMALL)
    torch.save(net.state_dict(), tmp_path / "classifier.pt")
    args = ["--model.warm_start", str(tmp_path / "classifier.pt"), *STILL]
    assert main(command(recipe(tmp_path), tmp_path / "run", *args)) == 0
    assert "tensors of a classifier for the resnet26_acmix" in capsys.readouterr().err


def test_frozen_names_are_those_of_the_network():
    task = Detection(
        name="resnet26_conv", class_names=NAMES, model_kwargs=SMALL, width=32, freeze=["layer1"]
    )
    frozen = [key for key, of in task.net.named_parameters() if not of.requires_grad]
    assert frozen
    assert all(key.startswith("model.backbone.features.body.layer1.") for key in frozen)
    whole = Detection(
        name="resnet26_conv", class_names=NAMES, model_kwargs=SMALL, width=32, freeze=["backbone"]
    )
    assert not any(of.requires_grad for of in whole.net.features.body.parameters())
    assert all(of.requires_grad for of in whole.net.model.backbone.fpn.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "resnet5O"}, "model.name: unknown 'resnet5O'; did you mean resnet50"),
        ({"name": "vit_tiny_patch16_224"}, "model.name: expected a network with maps of strides"),
        ({"anchor_sizes": [8, 16]}, "model.anchor_sizes: expected 5, one a level, got 2"),
        ({"detector": "mask_rcnn", "box_loss": "giou"}, "model.box_loss: expected none with mask"),
        ({"score_threshold": 2}, "model.score_threshold: expected 0 to 1, got 2"),
        ({"model_kwargs": {"acmix_kwargs": {"heads": 3}}}, "model.model_kwargs: "),
        ({"model_kwargs": {"kernels": 3}}, "model.model_kwargs: "),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_what_a_detector_cannot_have_is_named(options, said):
    with pytest.raises(ValueError, match="^" + said):
        Detection(**{"name": "resnet26_acmix", "class_names": NAMES, **options})


@pytest.mark.slow
def test_faults_end_a_run_before_it_starts(tmp_path, capsys):
    file = recipe(tmp_path)
    change(tmp_path / "scenes", "train", bbox=[5, 5, 0, 9])
    run = tmp_path / "run"
    assert main(command(file, run)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "instances_train.json, annotation " in line
    assert not run.exists()
    few = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "1"]
    assert main(command(file, run, "--data.on_error", "skip", *few)) in (0, 2)
    assert "left out 1 fault in train" in capsys.readouterr().err


@pytest.mark.slow
def test_check_names_every_fault_and_counts_objects(tmp_path, capsys):
    file = recipe(tmp_path)
    args = ["check", "--config", str(file), "--run", str(tmp_path / "run")]
    assert main(args) == 0
    said = capsys.readouterr().out
    assert "Nothing is wrong." in said
    counts = [
        sum(label == n for seed in range(1, 14) for label, *_ in scene(seed)[1]) for n in range(3)
    ]
    for name, count in zip(NAMES, counts, strict=True):
        assert any(line.split()[:2] == [name, str(count)] for line in said.splitlines())
    change(tmp_path / "scenes", "val", bbox=[500, 5, 10, 9])
    Image.new("RGB", (5, 5)).save(tmp_path / "scenes" / "images" / "3.png")
    assert code_of(args) == 1
    lines = capsys.readouterr().err
    assert "instances_val.json, annotation " in lines
    assert "leaves its image of" in lines
    assert "3.png: the image is 5x5, its annotation says" in lines


@pytest.mark.slow
def test_held_out_images_without_any_object_have_no_precision(tmp_path, capsys):
    file = recipe(tmp_path)
    path = tmp_path / "scenes" / "instances_val.json"
    content = json.loads(path.read_text())
    content["annotations"] = []
    path.write_text(json.dumps(content))
    assert main(command(file, tmp_path / "run", "--trainer.max_steps", "1")) == 2
    assert "data: expected objects in the images to measure on, got none" in capsys.readouterr().err


@pytest.mark.slow
def test_variants_of_the_operator_are_trained_side_by_side(tmp_path, capsys):
    out = tmp_path / "paths"
    args = ["--seeds", "1", "--variants", "conv", "acmix", "--trainer.max_epochs", "1"]
    assert (
        main(["ablate", "paths", "--config", str(recipe(tmp_path)), *args, "--out", str(out)]) == 0
    )
    assert "held-out AP" in capsys.readouterr().out
    rows = rows_of(out, "results.csv")
    assert [row["variant"] for row in rows] == ["conv", "acmix"]
    assert all(0 <= float(row["ap"]) <= 1 for row in rows)
    assert int(rows[0]["parameters"]) != int(rows[1]["parameters"])
    assert all(float(row["infer_images_per_second"]) > 0 for row in rows)
