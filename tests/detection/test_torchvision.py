"""What is not public in torchvision's detectors and is relied on: where it moved, and how."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

SOURCE = Path(__file__).parents[2] / "src/acmix/detection/_torchvision.py"
IMPORTED = [
    (node.module, name.name)
    for node in ast.walk(ast.parse(SOURCE.read_text()))
    if isinstance(node, ast.ImportFrom)
    for name in node.names
]
DETECTION = "torchvision.models.detection"
# Arguments by name or by place, in the order in which they are given.
SIGNATURES = {
    "roi_heads.RoIHeads": (
        *("box_roi_pool", "box_head", "box_predictor", "fg_iou_thresh", "bg_iou_thresh"),
        *("batch_size_per_image", "positive_fraction", "bbox_reg_weights", "score_thresh"),
        *("nms_thresh", "detections_per_img", "mask_roi_pool", "mask_head", "mask_predictor"),
    ),
    "roi_heads.RoIHeads.select_training_samples": ("self", "proposals", "targets"),
    "roi_heads.RoIHeads.postprocess_detections": (
        *("self", "class_logits", "box_regression", "proposals", "image_shapes"),
    ),
    "roi_heads.maskrcnn_inference": ("x", "labels"),
    "roi_heads.maskrcnn_loss": (
        *("mask_logits", "proposals", "gt_masks", "gt_labels", "mask_matched_idxs"),
    ),
    "transform.GeneralizedRCNNTransform": ("min_size", "max_size", "image_mean", "image_std"),
    "transform.GeneralizedRCNNTransform.normalize": ("self", "image"),
    "transform.GeneralizedRCNNTransform.resize": ("self", "image", "target"),
    "_utils.BoxCoder.decode_single": ("self", "rel_codes", "boxes"),
    "anchor_utils.AnchorGenerator.set_cell_anchors": ("self", "dtype", "device"),
}


def changed(what: str) -> str:
    return (
        f"torchvision {torchvision.__version__} changed {what}, which is not public: "
        "see acmix/detection/_torchvision.py and what imports it"
    )


def found(path: str) -> object:
    module, *names = path.split(".")
    place = importlib.import_module(f"{DETECTION}.{module}")
    for name in names:
        assert hasattr(place, name), changed(path)
        place = getattr(place, name)
    return place


@pytest.mark.parametrize(("module", "name"), IMPORTED, ids=[name for _, name in IMPORTED])
def test_names_are_where_they_were(module, name):
    assert hasattr(importlib.import_module(module), name), changed(f"{module}.{name}")


@pytest.mark.parametrize(("path", "expected"), SIGNATURES.items(), ids=list(SIGNATURES))
def test_arguments_are_what_they_were(path, expected):
    arguments = tuple(inspect.signature(found(path)).parameters)
    kept = tuple(name for name in arguments if name in expected)
    assert kept == expected, changed(f"the arguments of {path}")


def heads(**kwargs) -> nn.Module:
    parts = [nn.Identity(), nn.Identity(), nn.Identity()]
    numbers = [0.5, 0.5, 512, 0.25, (10.0, 10.0, 5.0, 5.0), 0.05, 0.5, 100]
    return found("roi_heads.RoIHeads")(*parts, *numbers, **kwargs)


def test_samples_are_boxes_objects_labels_and_codes():
    """With few proposals all are taken, and the objects after them."""
    objects = torch.tensor([[0.0, 0.0, 10.0, 10.0], [40.0, 40.0, 60.0, 60.0]])
    proposals = torch.tensor([[41.0, 40.0, 61.0, 60.0], [0.0, 50.0, 9.0, 60.0]])
    target = {"boxes": objects, "labels": torch.tensor([3, 4])}
    answer = heads().select_training_samples([proposals], [target])
    assert len(answer) == 4, changed("what RoIHeads.select_training_samples gives")
    boxes, matched, labels, codes = (of[0] for of in answer)
    assert torch.equal(boxes, torch.cat([proposals, objects])), changed("the samples of RoIHeads")
    assert labels.tolist() == [4, 0, 3, 4]
    assert matched[labels > 0].tolist() == [1, 0, 1]
    torch.testing.assert_close(codes[0], torch.tensor([-0.5, 0.0, 0.0, 0.0]))


def test_parts_of_the_heads_have_their_names():
    for name in ("box_roi_pool", "box_head", "box_predictor", "box_coder"):
        assert hasattr(heads(), name), changed(f"RoIHeads.{name}")
    for name in ("mask_roi_pool", "mask_head", "mask_predictor"):
        part = nn.Identity()
        assert getattr(heads(**{name: part}), name) is part, changed(f"RoIHeads.{name}")


@pytest.mark.parametrize("name", ["l1", "smooth_l1", "giou"])
def test_retinanet_asks_for_the_loss_of_boxes_by_this_name(name, monkeypatch):
    module = importlib.import_module(f"{DETECTION}.retinanet")
    head = module.RetinaNetHead(4, 1, 2).regression_head
    assert getattr(head, "_loss_type", None) == "l1", changed("RetinaNetRegressionHead._loss_type")
    asked = []
    monkeypatch.setattr(module, "_box_loss", lambda kind, *args: asked.append(kind) or 0.0)
    head._loss_type = name
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    outputs = {"bbox_regression": torch.zeros(1, 1, 4)}
    head.compute_loss([{"boxes": boxes}], outputs, [boxes], [torch.tensor([0])])
    assert asked == [name], changed("how RetinaNetRegressionHead chooses a loss")


def test_held_out_images_are_resized_by_the_method_that_is_replaced(monkeypatch):
    transform = found("transform.GeneralizedRCNNTransform")(8, 16, [0.0], [1.0]).eval()
    for name in ("normalize", "resize"):
        seen = []
        original = getattr(transform, name)
        monkeypatch.setattr(
            transform, name, lambda *args, o=original, s=seen: s.append(len(args)) or o(*args)
        )
        batch, _ = transform([torch.zeros(1, 8, 8)])
        assert seen, changed(f"GeneralizedRCNNTransform.{name}")
    assert batch.tensors.shape == (1, 1, 32, 32), changed("how images are padded")
    assert batch.image_sizes == [(8, 8)]
