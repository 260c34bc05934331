"""Two images of coloured squares are learned by heart: the check that all parts fit together."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from acmix.detection import Detector, create_detector, heads

SIDE = 64
STEPS = {"retinanet": 90, "cascade_mask_rcnn": 40}
# Of each image: left, top, right, bottom and class, whose colour the square has.
SCENES = [
    [(6, 8, 30, 32, 0), (36, 30, 60, 58, 1)],
    [(10, 34, 34, 60, 1), (34, 4, 58, 26, 0)],
]


def scene(squares: list[tuple[int, ...]]) -> tuple[Tensor, dict[str, Tensor]]:
    image = torch.full((3, SIDE, SIDE), -1.0)
    masks = torch.zeros(len(squares), SIDE, SIDE, dtype=torch.uint8)
    for mask, (left, top, right, bottom, label) in zip(masks, squares, strict=True):
        image[label, top:bottom, left:right] = 1
        mask[top:bottom, left:right] = 1
    found = torch.tensor(squares)
    return image, {"boxes": found[:, :4].float(), "labels": found[:, 4], "masks": masks}


def create(detector: str) -> Detector:
    """Small, and with few boxes sampled, for the sake of time."""
    model = create_detector(
        "resnet26_acmix",
        detector,
        num_classes=2,
        model_kwargs={"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)},
        test_size=SIDE,
        max_size=SIDE,
        width=32,
        anchor_sizes=(16, 24, 32, 64, 128),
        head_norm="group",
        score_threshold=0.5,
    )
    for module in model.modules():
        if hasattr(module, "fg_bg_sampler"):
            module.fg_bg_sampler.batch_size_per_image = 32
    return model


def fit(
    model: Detector, images: list[Tensor], targets: list[dict[str, Tensor]], steps: int
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(model.train()(images, targets).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        schedule.step()


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["retinanet", "cascade_mask_rcnn"])
def test_squares_are_learned_by_heart(detector, monkeypatch):
    monkeypatch.setattr(heads, "FEATURES", 256)
    model = create(detector)
    images, targets = map(list, zip(*map(scene, SCENES), strict=True))
    fit(model, images, targets, STEPS[detector])
    with torch.no_grad():
        found = model.eval()(images)
    for one, target in zip(found, targets, strict=True):
        overlaps = box_iou(target["boxes"], one["boxes"])
        overlaps[target["labels"][:, None] != one["labels"]] = 0
        best = overlaps.max(1)
        assert best.values.min() > 0.7
        if "mask" in detector:
            masks, wanted = one["masks"][best.indices, 0] > 0.5, target["masks"] > 0
            both, either = (masks & wanted).sum((1, 2)), (masks | wanted).sum((1, 2))
            assert (both / either).min() > 0.7
