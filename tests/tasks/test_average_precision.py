"""COCO's numbers, held to the seventh digit against pycocotools."""

import contextlib
import io
import socket

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from acmix.tasks.average_precision import AveragePrecision

NAMES = [
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
]
CLASSES = [0, 2, 3, 7]  # gaps, and 7 is only ever found
SIDE = 200


def scene(seed, ten_of_a_class=False, images=12):
    """Objects and detections of some images, crowds and images without either among them."""
    draw = np.random.default_rng(seed)
    targets, found = [], []
    for image in range(images):
        count = 10 if ten_of_a_class and image == 0 else int(draw.integers(0, 5)) * (image % 4 > 0)
        boxes = boxes_of(draw, count)
        labels = np.zeros(count, int) if ten_of_a_class else draw.choice(CLASSES[:3], count)
        crowd = np.zeros(count, bool) if ten_of_a_class else draw.random(count) < 0.2
        targets.append(target_of(boxes, labels, crowd))
        near = boxes + draw.normal(0, 4, boxes.shape) * (draw.random((count, 1)) < 0.7)
        more = boxes_of(draw, int(draw.integers(0, 3)) * (image % 3 > 0))
        guesses = np.concatenate([near, more]).clip(0, SIDE)
        guesses[:, 2:] = np.maximum(guesses[:, 2:], guesses[:, :2] + 1)
        kinds = np.concatenate([labels, draw.choice(CLASSES, len(more))])
        found.append(
            {
                "boxes": torch.tensor(guesses, dtype=torch.float32).view(-1, 4),
                "scores": torch.tensor(draw.random(len(kinds)).round(2), dtype=torch.float32),
                "labels": torch.tensor(kinds, dtype=torch.long),
                "masks": masks_of(guesses),
            }
        )
    return found, targets


def boxes_of(draw, count):
    start = draw.uniform(0, 120, (count, 2))
    return np.concatenate([start, start + draw.choice([14, 40, 75], (count, 1))], 1).round(1)


def masks_of(boxes):
    """Ellipse-like masks: the box without its corners."""
    masks = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int), strict=True):
        mask[top:bottom, left + 2 : max(left + 3, right - 2)] = True
        mask[top + 2 : max(top + 3, bottom - 2), left:right] = True
    return masks


def target_of(boxes, labels, crowd):
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1) * 0.6  # the annotation's, not the box's
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.long),
        "iscrowd": torch.tensor(crowd),
        "area": torch.tensor(area, dtype=torch.float32),
        "masks": masks_of(boxes),
    }


def by_pycocotools(found, targets, kind):
    """(12 numbers, AP of each class)"""

    def rows(parts):
        for image, of in enumerate(parts):
            for n, (left, top, right, bottom) in enumerate(of["boxes"].double().tolist()):
                mask = np.asfortranarray(of["masks"][n].numpy().astype(np.uint8))
                row = {"image_id": image, "category_id": int(of["labels"][n])}
                row |= {"bbox": [left, top, right - left, bottom - top]}
                yield {**row, "segmentation": coco_mask.encode(mask)}, of, n

    truth = COCO()
    truth.dataset = {
        "images": [{"id": n, "height": SIDE, "width": SIDE} for n in range(len(targets))],
        "categories": [{"id": label} for label in CLASSES],
        "annotations": [
            {**row, "id": n, "iscrowd": int(of["iscrowd"][i]), "area": float(of["area"][i])}
            for n, (row, of, i) in enumerate(rows(targets), 1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        guesses = [{**row, "score": float(of["scores"][i])} for row, of, i in rows(found)]
        if kind == "bbox":
            guesses = [{k: v for k, v in row.items() if k != "segmentation"} for row in guesses]
        run = COCOeval(truth, truth.loadRes(guesses), kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    precision = run.eval["precision"][:, :, :, 0, 2]
    of_class = {
        label: float(precision[:, :, place].mean())
        for place, label in enumerate(run.params.catIds)
        if precision[0, 0, place] > -1
    }
    return run.stats, of_class, precision


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ten", [False, True], ids=["mixed", "ten-of-a-class"])
def test_measures_are_those_of_pycocotools(masks, seed, ten):
    found, targets = scene(seed, ten)
    metric = AveragePrecision(8, masks)
    for batch in range(0, len(found), 5):
        metric.update(found[batch : batch + 5], targets[batch : batch + 5])
    summaries = metric.summaries()
    assert set(summaries) == ({"", "mask_"} if masks else {""})
    for kind, name in {"": "bbox", "mask_": "segm"}.items() if masks else {"": "bbox"}.items():
        stats, of_class, precision = by_pycocotools(found, targets, name)
        known = {key: value for key, value in zip(NAMES, stats, strict=True) if value > -1}
        assert summaries[kind].measures == pytest.approx(known, abs=1e-7)
        classes = {key: of["ap"] for key, of in summaries[kind].of_class.items()}
        assert classes == pytest.approx(of_class, abs=1e-7)
        real = torch.cat([of["labels"][~of["iscrowd"]] for of in targets])
        assert summaries[kind].objects == real.bincount(minlength=8).tolist()
        for label, curve in summaries[kind].curves.items():
            np.testing.assert_allclose(curve, precision[0, :, CLASSES.index(label)], atol=1e-7)


@pytest.mark.parametrize("hits", [1, 3, 7, 10])
def test_a_recall_of_some_tenths_counts_as_coco_counts_it(hits):
    """One of ten objects found is a recall of 0.1, which float32 thresholds place beside it."""
    boxes = np.array([[20 * n, 10, 20 * n + 15, 40] for n in range(10)], float)
    target = target_of(boxes, np.zeros(10, int), np.zeros(10, bool))
    found = {
        "boxes": target["boxes"][:hits],
        "scores": torch.linspace(0.9, 0.5, hits),
        "labels": target["labels"][:hits],
        "masks": target["masks"][:hits],
    }
    metric = AveragePrecision(8)
    metric.update([found], [target])
    ap = metric.summaries()[""].measures["ap"]
    assert ap == pytest.approx(by_pycocotools([found], [target], "bbox")[0][0], abs=1e-9)
    # COCO's own thresholds have 0.7000000000000001, beside which 7 of 10 fall.
    assert ap == pytest.approx((10 * hits + (hits != 7)) / 101)


def test_where_there_is_no_object_there_is_no_number():
    found, targets = scene(0)
    empty = target_of(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool))
    metric = AveragePrecision(8)
    metric.update(found, [empty] * len(found))
    assert metric.summaries() == {}
    nothing = {
        "boxes": torch.zeros(0, 4),
        "scores": torch.zeros(0),
        "labels": torch.zeros(0).long(),
    }
    metric.reset()
    metric.update([nothing] * len(targets), targets)
    [summary] = metric.summaries().values()
    assert summary.measures["ap"] == summary.measures["ar100"] == 0


def part_of(rank: int, port: int, folder: str) -> None:
    """A process that sees every second image of seven, so not as many as the other."""
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=2)
    found, targets = scene(3, images=7)
    metric = AveragePrecision(8, masks=True)
    for image in range(rank, 7, 2):
        metric.update([found[image]], [targets[image]])
    torch.save(metric.summaries(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_that_saw_unlike_numbers_of_images_agree_with_one(tmp_path):
    found, targets = scene(3, images=7)
    whole = AveragePrecision(8, masks=True)
    whole.update(found, targets)
    expected = whole.summaries()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(part_of, (port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        summaries = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for kind, summary in expected.items():
            assert summaries[kind].measures == summary.measures
            assert summaries[kind].of_class == summary.of_class
            assert summaries[kind].objects == summary.objects
