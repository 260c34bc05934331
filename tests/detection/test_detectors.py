"""Detectors by name: on every family, with every option, in pixels of the images as given."""

import copy
import math
import pickle

import pytest
import torch
from timm.layers import BatchNormAct2d
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.ops import box_iou

from acmix.detection import DETECTORS, Detector, create_detector, heads
from acmix.detection.pyramid import batch_norms

# Small networks of each family.
FAMILIES = {
    "resnet26_acmix": {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)},
    "san10_acmix": {"depths": (1, 1, 1, 1, 1), "widths": (32, 32, 64, 96, 128)},
    "pvt_tiny_acmix": {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 40, 64)},
    "swin_tiny_acmix": {"depths": (1, 1, 1, 1), "embed_dim": 24},
}
TWO_STAGES = [name for name in DETECTORS if name != "retinanet"]
CASCADES = [name for name in DETECTORS if "cascade" in name]
CLASSES = 3
LOSSES = {
    "retinanet": {"classification", "bbox_regression"},
    "faster_rcnn": {"loss_classifier", "loss_box_reg"},
    "mask_rcnn": {"loss_classifier", "loss_box_reg", "loss_mask"},
    "cascade_rcnn": {f"{part}_{n}" for part in ("class", "box") for n in (1, 2, 3)},
    "cascade_mask_rcnn": {f"{part}_{n}" for part in ("class", "box", "mask") for n in (1, 2, 3)},
}


@pytest.fixture(autouse=True)
def _fewer_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a box, for the sake of time."""
    monkeypatch.setattr(heads, "FEATURES", 64)


def create(detector: str, name: str = "resnet26_acmix", **kwargs) -> Detector:
    options = {"width": 16, "test_size": 64, "max_size": 96, "score_threshold": 0.0, **kwargs}
    return create_detector(name, detector, CLASSES, model_kwargs=FAMILIES.get(name), **options)


def target(height: int, width: int, boxes: list[list[float]], label: int = 1) -> dict[str, Tensor]:
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, box in zip(masks, boxes, strict=True):
        left, top, right, bottom = map(int, box)
        mask[top:bottom, left:right] = 1
    labels = torch.full((len(boxes),), label)
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": labels, "masks": masks}


def batch(label: int = 1) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images of different sizes, one without objects."""
    images = [torch.randn(3, 70, 96), torch.randn(3, 40, 20)]
    boxes = [[10.0, 10.0, 42.0, 40.0], [50.0, 20.0, 70.0, 60.0]]
    return images, [target(70, 96, boxes, label), target(40, 20, [])]


def learn(detector: Detector, images: list[Tensor], targets: list) -> dict[str, Tensor]:
    losses = detector.train()(images, targets)
    sum(losses.values()).backward()
    return {name: loss.detach() for name, loss in losses.items()}


def assert_all_learn(detector: Detector) -> None:
    """As DDP asks of every batch."""
    for name, weight in detector.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("detector", DETECTORS)
def test_every_detector_learns_and_detects_on_every_family(detector, name):
    model = create(detector, name, max_detections=10)
    losses = learn(model, *batch())
    proposals = set() if detector == "retinanet" else {"loss_objectness", "loss_rpn_box_reg"}
    assert losses.keys() == LOSSES[detector] | proposals
    assert all(loss.isfinite() for loss in losses.values())
    assert_all_learn(model)
    assert next(model.features.parameters()).grad.any()
    images = [torch.randn(3, 50, 70), torch.randn(3, 20, 30)]
    with torch.no_grad():
        found = model.eval()(images)
    for image, one in zip(images, found, strict=True):
        height, width = image.shape[1:]
        masks = {"masks"} if "mask" in detector else set()
        assert one.keys() == {"boxes", "scores", "labels"} | masks
        assert 0 < len(one["boxes"]) <= 10
        assert one["boxes"].min() >= 0
        assert (one["boxes"][:, 2:] <= torch.tensor([width, height]) + 1e-3).all()
        assert one["labels"].min() >= 0
        assert one["labels"].max() < CLASSES
        assert (one["scores"].diff() <= 0).all()
        if masks:
            assert one["masks"].shape == (len(one["boxes"]), 1, height, width)
            assert 0 <= one["masks"].min() <= one["masks"].max() <= 1


@pytest.mark.parametrize("detector", DETECTORS)
def test_batches_without_objects_teach_every_weight(detector):
    model = create(detector, head_norm="group", box_head=box_head(detector))
    losses = learn(model, batch()[0], [target(70, 96, []), target(40, 20, [])])
    assert all(loss.isfinite() for loss in losses.values())
    assert_all_learn(model)


def box_head(detector: str) -> str:
    return "mlp" if detector == "retinanet" else "conv"


# Classes and coordinates.


def predict_by_hand(model: Detector, label: int) -> None:
    """Boxes stay where anchors or proposals are, all of one class, whatever the image."""
    for module in model.modules():
        for name in ("bbox_reg", "bbox_pred"):
            if hasattr(module, name):
                nn.init.zeros_(getattr(module, name).weight)
                nn.init.zeros_(getattr(module, name).bias)
        for name in ("cls_score", "cls_logits"):
            layer = getattr(module, name, None)
            if layer is not None and not (model.first and name == "cls_logits"):
                nn.init.zeros_(layer.weight)
                nn.init.constant_(layer.bias, -5.0)
                layer.bias.data.unflatten(0, (-1, CLASSES + model.first))[
                    :, label + model.first
                ] = 5
        if hasattr(module, "mask_fcn_logits"):
            nn.init.zeros_(module.mask_fcn_logits.weight)
            nn.init.constant_(module.mask_fcn_logits.bias, -9.0)
            module.mask_fcn_logits.bias.data[label + model.first] = 9


@pytest.mark.parametrize("label", [0, CLASSES - 1])
@pytest.mark.parametrize("detector", DETECTORS)
def test_classes_are_numbered_from_zero(detector, label):
    """In what is found, and in what is learned: the loss is least for the class that is found."""
    model = create(detector, score_threshold=0.5)
    predict_by_hand(model, label)
    with torch.no_grad():
        found = model.eval()([torch.randn(3, 64, 96)])[0]
    assert set(found["labels"].tolist()) == {label}
    losses = {}
    for other in (label, 1):
        torch.manual_seed(0)
        losses[other] = {name: float(of) for name, of in learn(model, *batch(other)).items()}
    for name in losses[label]:
        if "class" in name or "mask" in name:
            assert losses[label][name] < losses[1][name]


@pytest.mark.parametrize("detector", TWO_STAGES)
def test_boxes_and_masks_are_in_pixels_of_the_image(detector, monkeypatch):
    """A proposal in the resized image, 128 x 91, is found where it was in the one of 70 x 50."""
    model = create(detector, test_size=100, max_size=128, score_threshold=0.5).eval()
    predict_by_hand(model, 1)
    box, scale = torch.tensor([[14.0, 20.0, 56.0, 40.0]]), torch.tensor([128 / 70, 91 / 50])
    whole = torch.tensor([[-40.0, -40.0, 900.0, 900.0]])  # is cut to the image, without its padding
    proposals = [box * scale.repeat(2), whole]
    monkeypatch.setattr(model.model.rpn, "filter_proposals", lambda *args: (proposals, None))
    found, cut = model([torch.randn(3, 50, 70), torch.randn(3, 30, 40)])
    torch.testing.assert_close(found["boxes"], box)
    torch.testing.assert_close(cut["boxes"], torch.tensor([[0.0, 0.0, 40.0, 30.0]]))
    if "mask" in detector:
        mask = found["masks"][0, 0]
        assert mask.shape == (50, 70)
        assert mask[21:39, 15:55].min() > 0.5
        outside = torch.ones(50, 70, dtype=torch.bool)
        outside[18:42, 12:58] = False
        assert mask[outside].max() == 0


def test_boxes_of_retinanet_are_in_pixels_of_the_image(monkeypatch):
    """The anchor of 32 pixels at row 4, column 6 of the map of stride 8."""
    model = create("retinanet", test_size=100, max_size=128, score_threshold=0.5).eval()
    maps = [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]  # of 96 x 128 pixels
    anchors = sum(height * width for height, width in maps) * 9
    logits = torch.full((1, anchors, CLASSES), -9.0)
    logits[0, (4 * 16 + 6) * 9 + 3, 2] = 9.0  # 9 at each place: ratios 0.5, 1, 2 of three sizes
    outputs = {"cls_logits": logits, "bbox_regression": torch.zeros(1, anchors, 4)}
    monkeypatch.setattr(model.model.head, "forward", lambda maps: outputs)
    found = model([torch.randn(3, 50, 70)])[0]
    scale = torch.tensor([70 / 128, 50 / 91]).repeat(2)
    anchor = torch.tensor([[48.0 - 16, 32 - 16, 48 + 16, 32 + 16]])
    torch.testing.assert_close(found["boxes"], anchor * scale)
    assert found["labels"].tolist() == [2]


# Options.


@pytest.mark.parametrize("detector", DETECTORS)
def test_anchors_have_the_sizes_and_ratios_asked_for(detector):
    sizes, ratios = (10, 20, 40, 80, 160), (0.25, 1.0)
    model = create(detector, anchor_sizes=sizes, aspect_ratios=ratios)
    learn(model, *batch())
    one_stage = detector == "retinanet"
    part = model.model if one_stage else model.model.rpn
    octaves = (1, 2 ** (1 / 3), 2 ** (2 / 3)) if one_stage else (1,)
    for size, anchors in zip(sizes, part.anchor_generator.cell_anchors, strict=True):
        sides = [(int(size * octave), ratio) for ratio in ratios for octave in octaves]
        expected = [(side / math.sqrt(ratio), side * math.sqrt(ratio)) for side, ratio in sides]
        found = anchors[:, 2:] - anchors[:, :2]
        torch.testing.assert_close(found, torch.tensor(expected), atol=1.01, rtol=0)
    last = part.head.regression_head.bbox_reg if one_stage else part.head.bbox_pred
    assert last.out_channels == 4 * len(ratios) * len(octaves)


@pytest.mark.parametrize("agnostic", [True, False], ids=["agnostic", "by class"])
@pytest.mark.parametrize("detector", TWO_STAGES)
def test_boxes_are_moved_alike_for_all_classes_or_not(detector, agnostic):
    """Cascades choose; without one, a class moves boxes its own way."""
    model = create(detector, class_agnostic=agnostic)
    alike = agnostic and detector in CASCADES
    predictors = [of for of in model.modules() if hasattr(of, "cls_score")]
    assert len(predictors) == (3 if detector in CASCADES else 1)
    for predictor in predictors:
        assert predictor.cls_score.out_features == CLASSES + 1
        assert predictor.bbox_pred.out_features == (4 if alike else 4 * (CLASSES + 1))


@pytest.mark.parametrize("detector", TWO_STAGES)
def test_box_heads_have_linear_layers_or_convolutions(detector):
    for name, convolutions, layers in (("mlp", 0, 2), ("conv", 4, 1)):
        model = create(detector, box_head=name)
        parts = [of.box_head for of in model.modules() if hasattr(of, "box_head")]
        assert len(parts) == (3 if detector in CASCADES else 1)
        for part in parts:
            kinds = [type(module) for module in part.modules()]
            assert kinds.count(nn.Conv2d) == convolutions
            assert kinds.count(nn.Linear) == layers


@pytest.mark.parametrize("loss", ["smooth_l1", "giou"])
@pytest.mark.parametrize("detector", CASCADES)
def test_cascades_learn_boxes_by_the_loss_asked_for(detector, loss):
    assert create(detector, box_loss=loss).model.roi_heads.box_loss == loss
    assert create(detector).model.roi_heads.box_loss == "smooth_l1"


@pytest.mark.parametrize("detector", DETECTORS)
@torch.no_grad()
def test_detections_have_the_scores_and_overlaps_asked_for(detector):
    """One class has a score of 0.9 or more, the others of little; anchors and proposals overlap."""
    images = [torch.randn(3, 64, 64)]
    numbers = {}
    for score, overlap in ((0.5, 0.1), (0.5, 0.9), (0.0, 0.9)):
        model = create(
            detector, score_threshold=score, nms_threshold=overlap, max_detections=10_000
        ).eval()
        predict_by_hand(model, 1)
        found = model(images)[0]
        numbers[score, overlap] = len(found["boxes"])
        assert (found["scores"] > score).all()
        overlaps = box_iou(found["boxes"], found["boxes"]).fill_diagonal_(0)
        overlaps[found["labels"][:, None] != found["labels"]] = 0
        assert overlaps.max() <= overlap + 1e-4
    assert 0 < numbers[0.5, 0.1] < numbers[0.5, 0.9] < numbers[0.0, 0.9]


# Norms in the pyramid (two a map) and after convolutions: RetinaNet's eight, four of a head.
NORMS = {"retinanet": 14, "faster_rcnn": 12, "mask_rcnn": 16, "cascade_rcnn": 20}
NORMS["cascade_mask_rcnn"] = 32


@pytest.mark.parametrize("detector", DETECTORS)
def test_heads_have_the_norms_asked_for(detector):
    for name, kind in (("group", nn.GroupNorm), ("sync", nn.SyncBatchNorm)):
        model = create(detector, "resnet18", head_norm=name, box_head=box_head(detector))
        assert sum(type(module) is kind for module in model.modules()) == NORMS[detector]


@pytest.mark.parametrize("name", ["l1", "smooth_l1", "giou"])
def test_boxes_of_retinanet_are_learned_by_the_loss_asked_for(name):
    """On one object, of which each anchor that meets it predicts the anchor."""
    model = create("retinanet", box_loss=None if name == "l1" else name)
    predict_by_hand(model, 0)
    box = [20.0, 16.0, 52.0, 60.0]
    losses = model([torch.randn(3, 64, 64)], [target(64, 64, [box])])
    goal = torch.tensor(box)
    anchors = torch.cat(
        [
            (torch.cartesian_prod(torch.arange(0, 64, s), torch.arange(0, 64, s))[:, None, [1, 0]])
            .repeat(1, 1, 2)
            .add(cells)
            .flatten(0, 1)
            for s, cells in zip(
                (8, 16, 32, 64, 64), model.model.anchor_generator.cell_anchors, strict=True
            )
        ]
    )
    inner = torch.minimum(anchors, goal)[:, 2:] - torch.maximum(anchors, goal)[:, :2]
    inner = inner.clamp(min=0).prod(1)
    size, goal_size = anchors[:, 2:] - anchors[:, :2], goal[2:] - goal[:2]
    union = size.prod(1) + goal_size.prod() - inner
    near = inner / union >= 0.5
    assert near.any()
    shift = (goal[:2] + goal[2:] - anchors[:, :2] - anchors[:, 2:]) / 2 / size
    codes = torch.cat([shift, (goal_size / size).log()], 1)[near]
    outer = (torch.maximum(anchors, goal)[:, 2:] - torch.minimum(anchors, goal)[:, :2]).prod(1)
    expected = {
        "l1": codes.abs().sum(1),
        "smooth_l1": torch.where(codes.abs() < 1, codes**2 / 2, codes.abs() - 0.5).sum(1),
        "giou": (1 - inner / union + (outer - union) / outer)[near],
    }
    torch.testing.assert_close(losses["bbox_regression"], expected[name].mean())


REFUSED = [
    ("retina", {}, "detector: expected one of 'retinanet', .*, got 'retina'"),
    ("retinanet", {"backbone_norm": "layer"}, "backbone_norm: expected one of 'batch', .*'layer'"),
    ("retinanet", {"head_norm": "layer"}, "head_norm: expected one of 'batch', .*, got 'layer'"),
    ("mask_rcnn", {"box_head": "fc"}, "box_head: expected one of 'mlp', 'conv', got 'fc'"),
    ("retinanet", {"box_head": "conv"}, "box_head: expected mlp with retinanet, .*, got conv"),
    ("retinanet", {"box_loss": "ciou"}, "box_loss: expected one of 'smooth_l1', 'giou', got"),
    ("faster_rcnn", {"box_loss": "giou"}, "box_loss: expected none with faster_rcnn, got giou"),
    ("mask_rcnn", {"box_loss": "smooth_l1"}, "box_loss: expected none with mask_rcnn, got smoo"),
    ("retinanet", {"anchor_sizes": (8, 16)}, "anchor_sizes: expected 5, one a level, got 2"),
    ("cascade_rcnn", {"aspect_ratios": ()}, "aspect_ratios: expected one at least, got none"),
]


@pytest.mark.parametrize(
    ("detector", "options", "message"),
    REFUSED,
    ids=[message.split(":")[0] for *_, message in REFUSED],
)
def test_options_that_a_detector_does_not_have_are_refused(detector, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        create(detector, **options)


def test_images_have_the_channels_asked_for():
    model = create("faster_rcnn", in_chans=5)
    assert model.eval()([torch.randn(5, 40, 50)])[0]["boxes"].shape[1] == 4


def test_names_without_weight_decay_are_those_of_weights():
    model = create("retinanet", "pvt_tiny_acmix")
    names = dict(model.named_parameters())
    assert model.no_weight_decay() <= set(names)
    assert any(name.endswith("pos_embed1") for name in model.no_weight_decay())


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_frozen_norms_stay_as_they_are(name):
    model = create("retinanet", name, backbone_norm="frozen", head_norm="batch")
    norms = batch_norms(model.features)
    assert norms
    if name != "resnet18":
        assert any(isinstance(norm, BatchNormAct2d) for norm in norms)
    before = copy.deepcopy([norm.state_dict() for norm in norms])
    learn(model.eval().train(), *batch())
    for norm, state in zip(norms, before, strict=True):
        assert not norm.training
        assert all(weight.grad is None for weight in norm.parameters())
        assert all(torch.equal(of, state[key]) for key, of in norm.state_dict().items())
    others = [of for of in batch_norms(model) if of not in norms]
    assert all(norm.training and norm.weight.grad is not None for norm in others)
    assert len(others) == NORMS["retinanet"]


@pytest.mark.parametrize("name", ["resnet26_acmix", "san10_acmix", "mobilenetv3_small_050"])
def test_other_norms_of_the_network_learn(name):
    for norm, kind in (("group", nn.GroupNorm), ("sync", nn.SyncBatchNorm)):
        model = create("retinanet", name, backbone_norm=norm)
        assert any(isinstance(module, kind) for module in model.features.modules())
        learn(model, *batch())
        assert_all_learn(model)
        if norm == "group":
            assert not batch_norms(model)


# Types and copies.


@pytest.mark.parametrize("detector", ["retinanet", "mask_rcnn", "cascade_mask_rcnn"])
def test_boxes_are_as_precise_under_autocast(detector):
    """bfloat16 has no odd number of pixels above 256; anchors and proposals here have."""
    model = create(detector, max_size=640, anchor_sizes=(33, 65, 129, 257, 513)).eval()
    predict_by_hand(model, 1)
    for module in model.model.rpn.modules() if hasattr(model.model, "rpn") else ():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    image = torch.randn(3, 64, 640)
    with torch.no_grad():
        expected = model([image])[0]
        with torch.autocast("cpu", torch.bfloat16):
            found = model([image])[0]
    assert (expected["boxes"][:, 0] > 256).any()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        close = 1e-2 if key in ("masks", "scores") else 1e-4
        torch.testing.assert_close(found[key], value, atol=close, rtol=0)


@pytest.mark.parametrize("detector", DETECTORS)
def test_detectors_learn_under_autocast(detector):
    """At 96 pixels: PyTorch's gradient of a bfloat16 convolution with stride 2 of one pixel, as P6
    has at 64, is memory that nothing wrote."""
    model = create(detector)
    torch.manual_seed(0)
    expected = learn(model, *batch())
    model.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        found = learn(model, *batch())
    assert_all_learn(model)
    for name, loss in expected.items():
        assert found[name].dtype == torch.float32
        if "class" in name:  # the proposals are not the same ones
            torch.testing.assert_close(found[name], loss, rtol=0.1, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("detector", ["retinanet", "mask_rcnn", "cascade_mask_rcnn"])
def test_networks_of_other_types(detector, dtype):
    model = create(detector, max_detections=5).to(dtype)
    images, targets = batch()
    losses = learn(model, [image.to(dtype) for image in images], targets)
    assert all(loss.isfinite() for loss in losses.values())
    with torch.no_grad():
        found = model.eval()([images[0].to(dtype)])[0]
    assert found["boxes"].dtype == torch.promote_types(dtype, torch.float32)
    assert len(found["boxes"]) == 5


@pytest.mark.parametrize("detector", ["retinanet", "cascade_mask_rcnn"])
@torch.no_grad()
def test_copies_detect_the_same(detector):
    """As an average of weights, a file and a GPU make them: copied, pickled, channels last."""
    model, images = create(detector, max_detections=5).eval(), [torch.randn(3, 50, 70)]
    expected = model(images)[0]
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model).to(memory_format=torch.channels_last),
    ]
    fresh = create(detector, max_detections=5).eval()
    fresh.load_state_dict(model.state_dict())
    for other in (*copies, fresh):
        found = other(images)[0]
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("detector", ["retinanet", "mask_rcnn", "cascade_mask_rcnn"])
def test_targets_of_transforms_are_taken(detector):
    """tv_tensors, as torchvision's transforms give them; no tensor of theirs is written to."""
    model, (images, targets) = create(detector), batch()
    wrapped = [
        {
            "boxes": tv_tensors.BoundingBoxes(
                of["boxes"], format="XYXY", canvas_size=image.shape[-2:]
            ),
            "masks": tv_tensors.Mask(of["masks"]),
            "labels": of["labels"],
        }
        for image, of in zip(images, targets, strict=True)
    ]
    before = copy.deepcopy(targets)
    torch.manual_seed(0)
    expected = learn(model, images, targets)
    torch.manual_seed(0)
    found = learn(model, [tv_tensors.Image(image) for image in images], wrapped)
    assert found == expected
    for of, kept in zip(targets, before, strict=True):
        assert all(torch.equal(of[key], kept[key]) for key in kept)


def test_first_images_have_no_say_in_later_ones():
    """torchvision's pools took strides from the first images; 40 pixels, padded, misled them."""
    model = create("mask_rcnn")
    other = copy.deepcopy(model)
    with torch.no_grad():
        model([torch.randn(3, 40, 40)] * 2, [target(40, 40, [])] * 2)
    other.load_state_dict(model.state_dict())
    image = [torch.randn(3, 64, 64)]
    with torch.no_grad():
        found, expected = model.eval()(image)[0], other.eval()(image)[0]
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_the_network_and_its_pyramid_compile():
    model = create("retinanet")
    expected = learn(model, *batch())
    model.zero_grad()
    model.model.backbone = torch.compile(model.model.backbone, backend="eager")
    found = learn(model, *batch())
    assert_all_learn(model)
    assert found.keys() == expected.keys()
    assert all(loss.isfinite() for loss in found.values())


# Of 91 classes with torchvision's background, whose norms have no parameters but buffers: 53,120.
# Its RetinaNet makes P6 from P5 (590,080), ours from C5 as the paper does (4,718,848), and has the
# background among its classes, which ours is given as one more.
OF_NORMS, OF_P6 = 53_120, 4_718_848 - 590_080


@pytest.mark.parametrize(
    ("detector", "classes", "torchvisions", "more"),
    [
        ("retinanet", 91, 34_014_999, OF_NORMS + OF_P6),
        ("faster_rcnn", 90, 41_755_286, OF_NORMS),
        ("mask_rcnn", 90, 44_401_393, OF_NORMS),
    ],
)
def test_numbers_of_parameters_are_torchvisions(detector, classes, torchvisions, more, monkeypatch):
    monkeypatch.setattr(heads, "FEATURES", 1024)
    with torch.device("meta"):
        model = create_detector("resnet50", detector, classes)
    assert sum(weight.numel() for weight in model.parameters()) == torchvisions + more


@pytest.mark.parametrize("detector", ["retinanet", "cascade_rcnn"])
def test_rates_by_layer_slow_the_network_alone(detector):
    net = create(detector)
    groups = create_optimizer_v2(
        net, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5
    ).param_groups
    of = {id(weight): group for group in groups for weight in group["params"]}
    scales = {key: of[id(weight)]["lr_scale"] for key, weight in net.named_parameters()}
    body = [key for key in scales if key.startswith("model.backbone.features.body.")]
    assert {scales[key] for key in scales if key not in body} == {1.0}
    assert scales[body[0]] < scales[body[-1]] < 1.0
    assert len({scales[key] for key in body}) >= 4
    assert {of[id(net.get_parameter(key))]["weight_decay"] for key in net.no_weight_decay()} == {
        0.0
    }
