"""The cascade against its definition, written here a second time: box by box, stage by stage.

All boxes lie on the finest map, and are few, so that every one of them is sampled.
"""

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align

from acmix.detection.cascade import CascadeHeads
from acmix.detection.heads import Heads

WIDTH, CLASSES, SIDE = 8, 4, 64  # with the background; of the image
STAGES = ((0.5, 1.0, 10.0), (0.6, 0.5, 20.0), (0.7, 0.25, 30.0))  # IoU, weights of loss and codes
SHAPES = [(SIDE, SIDE), (48, SIDE)]
OBJECTS = torch.tensor([[4.0, 4.0, 28.0, 28.0], [30.0, 10.0, 60.0, 40.0]])
PROPOSALS = [
    torch.tensor(
        [
            [6.0, 6.0, 30.0, 30.0],
            [4.0, 5.0, 27.0, 27.0],
            [0.0, 0.0, 20.0, 24.0],
            [31.0, 12.0, 60.0, 41.0],
            [28.0, 10.0, 56.0, 40.0],
            [40.0, 30.0, 63.0, 63.0],
            [1.0, 40.0, 21.0, 60.0],
        ]
    ),
    torch.tensor([[3.0, 3.0, 23.0, 23.0], [20.0, 8.0, 50.0, 47.0], [30.0, 2.0, 63.0, 40.0]]),
]
KINDS = [
    (agnostic, loss, masks)
    for agnostic in (True, False)
    for loss in ("smooth_l1", "giou")
    for masks in (True, False)
]
NAMES = [
    f"{'agnostic' if agnostic else 'by class'}-{loss}-{'masks' if masks else 'boxes'}"
    for agnostic, loss, masks in KINDS
]


def cascade(
    agnostic: bool = True, loss: str = "smooth_l1", masks: bool = True, **kwargs: float
) -> CascadeHeads:
    """Whose stages differ and move boxes by a pixel or so."""
    heads = CascadeHeads(Heads(WIDTH, CLASSES, "mlp", None, masks), agnostic, loss, **kwargs)
    for stage in heads.stages:
        torch.nn.init.normal_(stage.box_predictor.cls_score.bias)
        torch.nn.init.normal_(stage.box_predictor.bbox_pred.bias, std=0.6)
        torch.nn.init.normal_(stage.box_predictor.cls_score.weight, std=0.2)
        torch.nn.init.normal_(stage.box_predictor.bbox_pred.weight, std=0.1)
    return heads


def maps() -> dict[str, Tensor]:
    """Of two images; the finest alone is to be read."""
    finest = torch.randn(2, WIDTH, 16, 16)
    rest = {str(n): torch.full((2, WIDTH, 16 >> n, 16 >> n), math.nan) for n in (1, 2, 3)}
    return {"0": finest, **rest, "pool": torch.full((2, WIDTH, 1, 1), math.nan)}


def targets(empty: bool = True) -> list[dict[str, Tensor]]:
    """Two objects in the first image; none in the second one, or one."""
    number = 0 if empty else 1
    return [
        target(OBJECTS, [2, 3], SHAPES[0]),
        target(torch.tensor([[18.0, 6.0, 50.0, 46.0]])[:number], [1][:number], SHAPES[1]),
    ]


def target(boxes: Tensor, labels: list[int], shape: tuple[int, int]) -> dict[str, Tensor]:
    masks = torch.zeros(len(boxes), *shape, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top : (top + bottom) // 2, left:right] = 1  # upper half of the object
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), "masks": masks}


# The definition.


def iou(one: list[float], other: list[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0) * max(height, 0)
    return both / (area(one) + area(other) - both)


def area(box: list[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def matches(boxes: Tensor, of: dict[str, Tensor], least: float) -> tuple[list[int], list[int]]:
    """Class and object of each box; class 0 of those that overlap none enough."""
    labels, objects = [], []
    for box in boxes.tolist():
        overlaps = [iou(box, other) for other in of["boxes"].tolist()]
        best = max(range(len(overlaps)), key=overlaps.__getitem__, default=0)
        good = bool(overlaps) and overlaps[best] >= least
        labels.append(int(of["labels"][best]) if good else 0)
        objects.append(best)
    return labels, objects


def centre(box: Tensor) -> tuple[Tensor, Tensor]:
    return (box[:2] + box[2:]) / 2, box[2:] - box[:2]


def encoded(box: Tensor, to: Tensor, weight: float) -> Tensor:
    (at, size), (goal, goal_size) = centre(box), centre(to)
    moved, grown = (goal - at) / size, torch.log(goal_size / size)
    return torch.cat([weight * moved, weight / 2 * grown])


def decoded(box: Tensor, codes: Tensor, weight: float) -> Tensor:
    at, size = centre(box)
    at, size = at + codes[:2] / weight * size, size * torch.exp(codes[2:] / (weight / 2))
    return torch.cat([at - size / 2, at + size / 2])


def clipped(box: Tensor, shape: tuple[int, int]) -> Tensor:
    height, width = shape
    most = torch.tensor([width, height, width, height])
    return torch.minimum(box.clamp(min=0), most)


def generalised_iou_loss(one: Tensor, other: Tensor) -> Tensor:
    least, most = torch.minimum(one, other), torch.maximum(one, other)
    inner = (least[2:] - most[:2]).clamp(min=0).prod()
    outer = (most[2:] - least[:2]).prod()
    union = (one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - inner
    return 1 - inner / union + (outer - union) / outer


def smooth_l1(difference: Tensor) -> Tensor:
    size = difference.abs()
    return torch.where(size < 1, size**2 / 2, size - 0.5).sum()


def pooled(features: dict[str, Tensor], image: int, boxes: Tensor, side: int) -> Tensor:
    return roi_align(features["0"][image : image + 1], [boxes], side, 1 / 4, 2)


def codes_for(codes: Tensor, label: int, agnostic: bool) -> Tensor:
    return codes if agnostic else codes[4 * label : 4 * label + 4]


def expected_losses(
    heads: CascadeHeads, features: dict[str, Tensor], found: list[dict[str, Tensor]], loss: str
) -> dict[str, Tensor]:
    agnostic = heads.class_agnostic
    proposals, losses = PROPOSALS, {}
    for number, (least, weight, scale) in enumerate(STAGES, 1):
        stage = heads.stages[number - 1]
        of_class, of_box, of_mask, after = [], [], [], []
        for image, (start, of) in enumerate(zip(proposals, found, strict=True)):
            boxes = torch.cat([start, of["boxes"]])
            labels, objects = matches(boxes, of, least)
            vectors = stage.box_head(pooled(features, image, boxes, 7))
            logits, codes = stage.box_predictor(vectors)
            of_class += [
                -row.log_softmax(0)[label] for row, label in zip(logits, labels, strict=True)
            ]
            likeliest = (logits[:, 1:].argmax(1) + 1).tolist()
            kept = []
            for row, (box, label) in enumerate(zip(boxes, labels, strict=True)):
                moves = label or likeliest[row]
                moved = decoded(box, codes_for(codes[row], moves, agnostic), scale)
                if row < len(start):
                    kept.append(clipped(moved.detach(), SHAPES[image]))
                if label:
                    goal, mask = of["boxes"][objects[row]], of["masks"][objects[row]]
                    if loss == "giou":
                        of_box.append(10 * generalised_iou_loss(moved, goal))
                    else:
                        code = codes_for(codes[row], label, agnostic)
                        of_box.append(smooth_l1(code - encoded(box, goal, scale)))
                    if heads.has_masks:
                        of_mask.append(expected_mask_loss(stage, features, image, box, label, mask))
            after.append(torch.stack(kept))
        assert of_box, "nothing to learn from"
        losses[f"class_{number}"] = weight * torch.stack(of_class).mean()
        losses[f"box_{number}"] = weight * torch.stack(of_box).sum() / len(of_class)
        if heads.has_masks:
            losses[f"mask_{number}"] = weight * torch.stack(of_mask).mean()
        proposals = after
    return losses


def expected_mask_loss(stage, features, image, box, label, mask) -> Tensor:
    vector = pooled(features, image, box[None], 14)
    probability = stage.mask_predictor(stage.mask_head(vector))[0, label].sigmoid()
    goal = roi_align(mask[None, None].float(), [box[None]], 28)[0, 0]
    return -(goal * probability.log() + (1 - goal) * (1 - probability).log()).mean()


@pytest.mark.parametrize(("agnostic", "loss", "masks"), KINDS, ids=NAMES)
@pytest.mark.parametrize("empty", [True, False], ids=["one image empty", "objects in both"])
def test_losses_are_those_of_the_definition(agnostic, loss, masks, empty):
    heads, features, found = cascade(agnostic, loss, masks), maps(), targets(empty)
    given = [{key: of for key, of in one.items() if masks or key != "masks"} for one in found]
    _, losses = heads(features, PROPOSALS, SHAPES, given)
    expected = expected_losses(heads, features, found, loss)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, atol=1e-5, rtol=1e-4, msg=name)


def expected_detections(
    heads: CascadeHeads, features: dict[str, Tensor], image: int, most: int
) -> list[tuple[float, int, Tensor]]:
    """Score, label and box of the detections of an image, best first."""
    boxes, mean = PROPOSALS[image], 0
    for number, (stage, (*_, scale)) in enumerate(zip(heads.stages, STAGES, strict=True), 1):
        logits, codes = stage.box_predictor(stage.box_head(pooled(features, image, boxes, 7)))
        mean = mean + logits.softmax(1) / 3
        if number < 3:
            labels = (logits[:, 1:].argmax(1) + 1).tolist()
            moved = [
                decoded(box, codes_for(code, label, heads.class_agnostic), scale)
                for box, code, label in zip(boxes, codes, labels, strict=True)
            ]
            boxes = torch.stack([clipped(box, SHAPES[image]) for box in moved])
    candidates = [
        (
            float(mean[row, label]),
            label,
            clipped(
                decoded(boxes[row], codes_for(codes[row], label, heads.class_agnostic), 30.0),
                SHAPES[image],
            ),
        )
        for row in range(len(boxes))
        for label in range(1, CLASSES)
        if mean[row, label] > 0.2
    ]
    kept: list[tuple[float, int, Tensor]] = []
    for score, label, box in sorted(candidates, key=lambda of: -of[0]):
        same = [other for _, its, other in kept if its == label]
        if all(iou(box.tolist(), other.tolist()) <= 0.5 for other in same):
            kept.append((score, label, box))
    return kept[:most]


@pytest.mark.parametrize("most", [2, 100])
@pytest.mark.parametrize(("agnostic", "loss", "masks"), KINDS[::2], ids=NAMES[::2])
@torch.no_grad()
def test_detections_are_those_of_the_definition(agnostic, loss, masks, most):
    torch.manual_seed(3)
    heads = cascade(agnostic, loss, masks, score_threshold=0.2, max_detections=most).eval()
    features = maps()
    found, losses = heads(features, PROPOSALS, SHAPES)
    assert losses == {}
    for image, detections in enumerate(found):
        expected = expected_detections(heads, features, image, most)
        assert len(expected) >= 2, "too few to compare"
        assert detections["labels"].tolist() == [label for _, label, _ in expected]
        scores = torch.tensor([score for score, _, _ in expected])
        torch.testing.assert_close(detections["scores"], scores)
        boxes = torch.stack([box for *_, box in expected])
        torch.testing.assert_close(detections["boxes"], boxes, atol=1e-3, rtol=0)
        torch.testing.assert_close(
            detections["masks"], expected_masks(heads, features, image, detections)
        )


def expected_masks(heads, features, image, detections) -> Tensor:
    rows = torch.arange(len(detections["boxes"]))
    vectors = pooled(features, image, detections["boxes"], 14)
    of_stages = [
        stage.mask_predictor(stage.mask_head(vectors))[rows, detections["labels"]].sigmoid()
        for stage in heads.stages
    ]
    return sum(of_stages)[:, None] / 3


def by_hand(heads: CascadeHeads) -> CascadeHeads:
    """Which predicts its biases, whatever it sees."""
    for stage in heads.stages:
        for layer in (stage.box_predictor.cls_score, stage.box_predictor.bbox_pred):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        torch.nn.init.zeros_(stage.mask_predictor.mask_fcn_logits.weight)
        torch.nn.init.zeros_(stage.mask_predictor.mask_fcn_logits.bias)
    return heads


@torch.no_grad()
def test_each_stage_adds_its_score_its_move_and_its_mask():
    """Probabilities are averaged, not logits; each stage starts where the one before arrived."""
    heads = by_hand(cascade()).eval()
    chances, moves, masked = (0.9, 0.5, 0.1), (0.1, 0.2, 0.4), (0.95, 0.6, 0.4)
    for stage, chance, move, mask, (*_, scale) in zip(
        heads.stages, chances, moves, masked, STAGES, strict=True
    ):
        rest = (1 - chance) / (CLASSES - 1)
        of_classes = torch.tensor([rest, chance, rest, rest])
        stage.box_predictor.cls_score.bias.copy_(of_classes.log())
        stage.box_predictor.bbox_pred.bias[1] = move * scale  # down by this part of the height
        stage.mask_predictor.mask_fcn_logits.bias[1] = math.log(mask / (1 - mask))
    box = torch.tensor([[10.0, 10.0, 30.0, 20.0]])
    found = heads({k: v[:1] for k, v in maps().items()}, [box], SHAPES[:1])[0][0]
    best = {key: of[0] for key, of in found.items()}
    assert best["labels"] == 1
    assert best["scores"].item() == pytest.approx(sum(chances) / 3)
    torch.testing.assert_close(best["boxes"], torch.tensor([10.0, 17.0, 30.0, 27.0]))
    torch.testing.assert_close(best["masks"], torch.full((1, 28, 28), sum(masked) / 3))


def test_no_gradient_crosses_stages():
    """A stage learns from its own boxes alone, and all of them teach the maps."""
    heads, features = cascade(agnostic=False, loss="giou"), maps()
    finest = features["0"].requires_grad_()
    _, losses = heads(features, PROPOSALS, SHAPES, targets())
    for number in (1, 2, 3):
        loss = sum(of for name, of in losses.items() if name.endswith(str(number)))
        for other, stage in enumerate(heads.stages, 1):
            weights = [*stage.box_head.parameters(), *stage.box_predictor.parameters()]
            gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            learns = [gradient is not None and bool(gradient.any()) for gradient in gradients]
            assert learns == [other == number] * len(weights)
        assert torch.autograd.grad(loss, finest, retain_graph=True)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_objects_are_proposals_of_each_stage_once(dtype, monkeypatch):
    """What a stage made of them leaves; the objects themselves are added to each stage."""
    heads = by_hand(cascade())
    given: list[list[Tensor]] = []
    for stage in heads.stages:
        original = stage.select_training_samples
        monkeypatch.setattr(
            stage,
            "select_training_samples",
            lambda boxes, of, original=original: given.append(boxes) or original(boxes, of),
        )
    found = targets(empty=False)
    for of in found:
        of["boxes"] = of["boxes"].to(dtype) + 0.1  # which float32 and float64 round differently
    heads(maps(), PROPOSALS, SHAPES, found)
    assert len(given) == 3
    for boxes in given:
        for some, proposals in zip(boxes, PROPOSALS, strict=True):
            torch.testing.assert_close(some, proposals, atol=1e-4, rtol=0)


def test_boxes_that_became_empty_leave(monkeypatch):
    """Here all do: a stage moves them out of the image; the objects alone are left."""
    heads = by_hand(cascade())
    with torch.no_grad():
        heads.stages[0].box_predictor.bbox_pred.bias[0] = 100.0  # ten widths to the right
    seen = []
    second = heads.stages[1]
    original = second.select_training_samples
    monkeypatch.setattr(
        second,
        "select_training_samples",
        lambda boxes, of: seen.extend(boxes) or original(boxes, of),
    )
    _, losses = heads(maps(), PROPOSALS, SHAPES, targets())
    assert [tuple(of.shape) for of in seen] == [(0, 4), (0, 4)]
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(("agnostic", "loss", "masks"), KINDS, ids=NAMES)
@pytest.mark.parametrize("number", [0, 3], ids=["no proposals", "background"])
def test_without_objects_losses_are_finite_and_all_weights_get_gradients(
    agnostic, loss, masks, number
):
    heads = cascade(agnostic, loss, masks)
    nothing = target(torch.zeros(0, 4), [], SHAPES[0])
    proposals = [of[:number] for of in PROPOSALS]
    _, losses = heads(maps(), proposals, SHAPES, [nothing, nothing])
    sum(losses.values()).backward()
    for name, value in losses.items():
        assert value.isfinite()
        assert (value == 0) == (number == 0 or not name.startswith("class"))
    for name, weight in heads.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name


@pytest.mark.parametrize("agnostic", [True, False], ids=["agnostic", "by class"])
@torch.no_grad()
def test_without_proposals_nothing_is_found(agnostic):
    heads, none = cascade(agnostic).eval(), torch.zeros(0, 4)
    found, _ = heads(maps(), [none, none], SHAPES)
    assert [{key: tuple(of.shape) for key, of in one.items()} for one in found] == 2 * [
        {"boxes": (0, 4), "scores": (0,), "labels": (0,), "masks": (0, 1, 28, 28)}
    ]
    found, _ = heads(maps(), [none, PROPOSALS[1]], SHAPES)
    assert [len(one["masks"]) > 0 for one in found] == [False, True]
