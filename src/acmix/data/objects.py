"""Images with objects in COCO's, Pascal VOC's or YOLO's form, augmented by torchvision."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from acmix.data import coco, voc, yolo
from acmix.data.base import DetectionData
from acmix.data.loading import Sample
from acmix.data.records import Annotations, Record, decode
from acmix.data.sources import SPLITS, absolute, as_rgb, check_colour, why_unreadable
from acmix.data.survey import Broken, Picture, in_threads, look
from acmix.errors import few, printable
from acmix.ranges import (
    Count,
    NonNegative,
    Number,
    Part,
    PartBelowOne,
    Positive,
    PositiveCount,
    check_ranges,
)

Form = Literal["coco", "voc", "yolo"]
Transform = Callable[[tv_tensors.Image, dict[str, Any]], tuple[Any, dict[str, Any]]]
LOOKED_FOR = (
    "data.yaml (YOLO), Annotations/ and JPEGImages/ (Pascal VOC), or a JSON file such as "
    "instances_train.json or annotations/instances_train2017.json (COCO)"
)


class Objects(DetectionData):
    """Colour images with objects: boxes, and perhaps masks."""

    def __init__(
        self,
        source: str,
        form: Form | None = None,
        train_split: str | None = None,
        val_split: str | None = None,
        test_split: str | None = None,
        val_fraction: PartBelowOne = 0.0,
        split_seed: Count = 0,
        on_error: Literal["raise", "skip"] = "raise",
        test_size: PositiveCount = 800,
        max_size: PositiveCount = 1333,
        train_sizes: list[PositiveCount] | None = None,
        jitter: tuple[Positive, Positive] | None = None,
        jitter_size: PositiveCount = 1024,
        hflip: Part = 0.5,
        distort: Part = 0.0,
        min_box: NonNegative = 1.0,
        mean: tuple[Number, Number, Number] = (0.485, 0.456, 0.406),
        std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225),
        background: str = "white",
        batch_size: PositiveCount = 2,
        num_workers: Count = 0,
    ) -> None:
        """Read what is known of the images.

        Args:
            source: A folder in one of the forms, or a data.yaml of YOLO's.
            form: Of what is known of the images; by default what lies in the folder decides.
            train_split: Name of the part to learn from; by default train, training or trainval.
            val_split: Name of the held-out part; by default val, valid, validation or eval.
            test_split: Name of the part for `acmix test`; by default test.
            val_fraction: Hold out this part of the training images instead.
            split_seed: Seed of the choice of held-out images; apart from the training seed.
            on_error: What is wrong in the annotations ends a run (raise), or is left out and
                counted (skip).
            test_size: Shorter side to which held-out images are brought, in pixels.
            max_size: Most that the longer side may then have, in training too.
            train_sizes: Shorter sides of training images, one drawn for each; test_size by default.
            jitter: Least and greatest factor by which training images are resized instead, and
                then cropped: large-scale jitter, such as 0.1 and 2.0.
            jitter_size: Height and width of those crops; factor 1 fits an image into it.
            hflip: Probability of a mirrored training image.
            distort: Probability of changes of brightness, contrast, hue and saturation.
            min_box: Least side of a box after augmentation, in pixels; smaller ones are left out.
            mean: Of red, green and blue, to normalise with.
            std: Of red, green and blue.
            background: Colour beneath transparent images, a name or #rrggbb.
            batch_size: Images a step on each device.
            num_workers: Processes that load images; 0 loads in the training process.
        """
        check_ranges(Objects.__init__, locals(), "data.")
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        if jitter and jitter[0] > jitter[1]:
            raise ValueError(f"data.jitter: expected the smaller factor first, got {jitter}")
        check_colour(background)
        self.source, self.on_error = absolute(source), on_error
        self.looks_early = on_error == "raise"
        self.form: Form = form or form_of(Path(self.source))
        chosen = {"train": train_split, "val": val_split, "test": test_split}
        self.splits = {part: (name,) if name else SPLITS[part] for part, name in chosen.items()}
        self.val_fraction, self.split_seed = val_fraction, split_seed
        self.test_size, self.max_size = test_size, max_size
        self.mean, self.std, self.background = mean, std, background
        self.train_transform = train_transform(
            train_sizes or [test_size],
            max_size,
            (jitter, jitter_size) if jitter else None,
            hflip,
            distort,
            fill=[255 * value for value in mean],
        )
        self.min_box = min_box
        self.known: dict[str, Annotations | None] = {}
        self.wrong_files: dict[str, list[str]] = {}
        training = self._open("train")
        if training is None:
            raise ValueError(self._nothing("train"))
        self.class_names, self.category_ids = training.class_names, training.category_ids
        if not self.class_names:
            raise ValueError(f"data.source: expected classes in {printable(self.source)}, got none")
        self.input_config = {"mean": mean, "std": std, "background": background}
        self.input_config |= {"category_ids": self.category_ids}

    def setup(self, stage: str) -> None:
        """Faults of held-out images, too, end a run before its first step."""
        for part in ("train", "val") if stage == "fit" else ():
            self._records(part)

    def train_set(self) -> Dataset[Sample]:
        records = self._records("train")
        if not any(not of.ignored for record in records for of in record.objects):
            raise ValueError(
                f"data.source: expected objects to learn from in {printable(self.source)}, "
                f"got none in {len(records)} images"
            )
        return self._set(records, self.train_transform)

    def val_set(self) -> Dataset[Sample]:
        return self._set(self._records("val"))

    def test_set(self) -> Dataset[Sample] | None:
        return self._set(self._records("test")) if self._open("test") else None

    def pictures(self, part: str) -> Iterable[Picture] | None:
        if part == "test" and self._open(part) is None:
            return None
        return self._pictures(self._records(part, checked=False))

    def _pictures(self, records: list[Record]) -> Iterator[Picture]:
        for record in records:
            names = tuple(self.class_names[of.label] for of in record.objects)
            yield Picture(printable(record.path), names, partial(open_stored, record))

    def faults(self, part: str) -> list[str]:
        known = self._open(part)
        return known.faults if known else []

    def class_counts(self) -> list[int]:
        """Training objects of each class."""
        records = self._records("train")
        counts = Counter(of.label for record in records for of in record.objects if not of.ignored)
        return [counts[label] for label in range(len(self.class_names))]

    @staticmethod
    def collate(samples: list[Sample]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Images and targets, each a list: their sizes differ."""
        images, targets = zip(*samples, strict=True)
        return list(images), list(targets)

    def _set(self, records: list[Record], transform: Transform | None = None) -> Dataset[Sample]:
        normalise = partial(F.normalize, mean=list(self.mean), std=list(self.std))
        min_box, background = self.min_box, self.background
        return ObjectImages(records, transform, normalise, self.with_masks, min_box, background)

    def _records(self, part: str, checked: bool = True) -> list[Record]:
        """Of the training or held-out images, whichever way they are divided."""
        divided = self.val_fraction and part != "test"
        records = self._known("train" if divided else part, checked).records
        if divided:
            order = np.random.default_rng(self.split_seed).permutation(len(records))
            held = set(order[: max(1, round(self.val_fraction * len(records)))].tolist())
            records = [of for n, of in enumerate(records) if (n in held) == (part == "val")]
        if checked and self.with_masks:
            return with_masks_only(records, part, self.on_error)
        return records

    def _known(self, part: str, checked: bool) -> Annotations:
        known = self._open(part)
        if known is None:
            raise ValueError(self._nothing(part))
        if checked and self.on_error == "raise":
            if part not in self.wrong_files:
                self.wrong_files[part] = wrong_files(known.records)
            if faults := known.faults + self.wrong_files[part]:
                more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
                raise ValueError(
                    f"data.source: {'; '.join(faults[:3])}{more} (acmix check names all, "
                    "--data.on_error skip goes on without them)"
                )
        if known.class_names != self.class_names:
            raise ValueError(
                "data.source: expected the same classes in every part, got "
                f"{few(known.class_names)} in {part} beside {few(self.class_names)}"
            )
        return known

    def _open(self, part: str) -> Annotations | None:
        """What is known of a part, read once; None where there is no such part."""
        if part not in self.known:
            known = self.known[part] = self._read(part)
            if known is not None and self.on_error == "skip":
                leave_out_broken(known, self.background)
            if known is not None and known.faults and self.on_error == "skip":
                what = "1 fault" if len(known.faults) == 1 else f"{len(known.faults)} faults"
                first = f"such as {known.faults[0]}"
                print(f"data.source: left out {what} in {part}, {first}", file=sys.stderr)
        return self.known[part]

    def _read(self, part: str) -> Annotations | None:
        root = Path(self.source)
        if self.form == "coco":
            file = next(coco.part_files(root, self.splits[part]), None)
            return coco.read_coco(file, coco.image_folders(root, file)) if file else None
        if self.form == "voc":
            return self._read_voc(root, part)
        file = yolo.yolo_file(root)
        if file is None:
            raise ValueError(f"data.source: expected data.yaml in {printable(self.source)}")
        content = yolo.load(file)
        name = next((name for name in self.splits[part] if content.get(name)), None)
        return yolo.read_yolo(file, content, name) if name else None

    def _read_voc(self, root: Path, part: str) -> Annotations | None:
        name = next((name for name in self.splits[part] if voc.has_part(root, name)), None)
        whole = part == "train" and name is None and not (root / voc.LISTS).is_dir()
        if name is None and not whole:
            return None
        return voc.read_voc(root, name, getattr(self, "class_names", None))

    def _nothing(self, part: str) -> str:
        names = " or ".join(self.splits[part])
        offer = "; --data.val_fraction 0.1 holds out a part of the others" if part == "val" else ""
        return (
            f"data.source: expected a part {names} in {printable(self.source)} (form {self.form}), "
            f"got none{offer}"
        )


class ObjectImages(Dataset[Sample]):
    """Images with their targets; augmented where there is a transform, else as they are stored."""

    def __init__(
        self,
        records: list[Record],
        transform: Transform | None,
        normalise: Callable[[Tensor], Tensor],
        with_masks: bool,
        min_box: float,
        background: str,
    ) -> None:
        self.records, self.transform, self.normalise = records, transform, normalise
        self.with_masks, self.min_box, self.background = with_masks, min_box, background
        # Wide and high images make batches of their own, which are padded less.
        self.groups = [int(record.size[0] > record.size[1]) for record in records]

    def __len__(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        return printable(self.records[index].path)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        image = load(record, self.background)
        target = self._target(record, training=self.transform is not None)
        if self.transform is not None:
            image, target = self.transform(image, target)
            target = only_visible(target, self.min_box)
        pixels = self.normalise(F.to_dtype(image, torch.float32, scale=True).as_subclass(Tensor))
        plain = {key: value.as_subclass(Tensor) for key, value in target.items()}
        return pixels, {**plain, "image_id": torch.tensor(record.number)}

    def _target(self, record: Record, training: bool) -> dict[str, Tensor]:
        objects = [of for of in record.objects if not (training and of.ignored)]
        width, height = record.size
        boxes = torch.tensor([of.box for of in objects], dtype=torch.float32).view(-1, 4)
        box_format: Any = {"format": "XYXY", "canvas_size": (height, width)}
        target: dict[str, Tensor] = {
            "boxes": tv_tensors.BoundingBoxes(boxes, **box_format),
            "labels": torch.tensor([of.label for of in objects], dtype=torch.int64),
            "area": torch.tensor([of.area for of in objects], dtype=torch.float32),
            "iscrowd": torch.tensor([of.ignored for of in objects], dtype=torch.bool),
        }
        if self.with_masks:
            masks = [decode(of.mask, record.size) for of in objects]
            stacked = np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)
            target["masks"] = tv_tensors.Mask(torch.from_numpy(stacked))
        return target


def open_stored(record: Record) -> Image.Image:
    """The image as it is stored.

    Raises:
        ValueError: If it has another size than the annotations say; others if it cannot be read.
    """
    image = Image.open(record.path)
    if image.size != record.size:
        there, said = ("x".join(map(str, size)) for size in (image.size, record.size))
        raise ValueError(f"the image is {there}, its annotation says {said}")
    return image


def wrong_files(records: list[Record]) -> list[str]:
    """What the heads of the image files tell at once: no image, or one of another size."""

    def wrong(record: Record) -> str | None:
        try:
            open_stored(record).close()
        except Exception as error:  # of a broken file, Pillow raises anything
            return f"{printable(record.path)}: {why_unreadable(error)}"
        return None

    return [found for found in in_threads(wrong, records) if found]


def leave_out_broken(known: Annotations, background: str) -> None:
    """Read every image once; those that cannot be had become faults."""
    pictures = [Picture(of.path, (), partial(open_stored, of)) for of in known.records]
    kept = []
    found = in_threads(lambda picture: look(picture, background), pictures)
    for record, image in zip(known.records, found, strict=True):
        if isinstance(image, Broken):
            known.fault(image.name, image.reason)
        else:
            kept.append(record)
    known.records = kept


def load(record: Record, background: str) -> tv_tensors.Image:
    """The image in 8 bits a channel.

    Raises:
        ValueError: If it cannot be read, or has another size than the annotations say.
    """
    try:
        with open_stored(record) as image:
            picture = as_rgb(image, background)
    except Exception as error:  # of a broken file, Pillow raises anything
        why = why_unreadable(error)
        raise ValueError(f"data.source: cannot read {printable(record.path)}: {why}") from error
    return tv_tensors.Image(F.pil_to_tensor(picture))


def train_transform(
    sizes: list[int],
    max_size: int,
    jitter: tuple[tuple[float, float], int] | None,
    hflip: float,
    distort: float,
    fill: list[float],
) -> Transform:
    """Resizing to one of some sizes, or large-scale jitter; then mirroring and colours."""
    steps: list[Any] = []
    if jitter:
        scale, side = jitter
        padding: Any = {tv_tensors.Image: fill, "others": 0}
        steps.append(v2.ScaleJitter((side, side), scale, antialias=True))
        steps.append(v2.RandomCrop((side, side), pad_if_needed=True, fill=padding))
        steps.append(around_masks)
    else:
        steps.append(v2.RandomShortestSize(sizes, max_size, antialias=True))
    steps.append(v2.RandomHorizontalFlip(hflip))
    steps.append(v2.RandomPhotometricDistort(p=distort))
    steps.append(v2.ClampBoundingBoxes())
    return v2.Compose(steps)


def around_masks(
    image: tv_tensors.Image, target: dict[str, Tensor]
) -> tuple[tv_tensors.Image, dict[str, Tensor]]:
    """Boxes around what a crop left of the masks; without masks, as the crop cut them."""
    if "masks" in target:
        seen = target["masks"].bool().flatten(1).any(1)
        target = {key: tv_tensors.wrap(of[seen], like=of) for key, of in target.items()}
        boxes = masks_to_boxes(target["masks"].as_subclass(Tensor)).float()
        boxes[:, 2:] += 1  # the last pixel belongs to the box
        target["boxes"] = tv_tensors.wrap(boxes, like=target["boxes"])
    return image, target


def only_visible(target: dict[str, Tensor], min_box: float) -> dict[str, Tensor]:
    """The objects whose box still has sides of `min_box`, and of a mask a pixel; areas by box.

    All entries are taken alike: torchvision's own transform leaves behind those it is not told of.
    """
    boxes = target["boxes"]
    sides = boxes[:, 2:] - boxes[:, :2]
    seen = (sides >= max(min_box, 1e-3)).all(1)
    if "masks" in target:
        seen &= target["masks"].bool().flatten(1).any(1)
    kept = {key: value[seen] for key, value in target.items()}
    return {**kept, "area": sides[seen].prod(1)}


def with_masks_only(records: list[Record], part: str, on_error: str) -> list[Record]:
    """The records without the objects that have no mask, which are counted.

    Raises:
        ValueError: If there are such objects, and they are not to be skipped.
    """
    without = [of for of in records if any(o.mask is None for o in of.objects)]
    if not without:
        return records
    where = f"in {len(without)} images of {part}, such as {printable(without[0].path)}"
    if on_error == "raise":
        raise ValueError(
            f"data.source: expected a mask for every object, got objects without {where}"
        )
    print(f"data.source: left out the objects without a mask {where}", file=sys.stderr)
    return [of.holding([o for o in of.objects if o.mask is not None]) for of in records]


def form_of(source: Path) -> Form:
    """By what lies in the folder.

    Raises:
        ValueError: If nothing that is known does.
    """
    if yolo.yolo_file(source):
        return "yolo"
    if voc.is_voc(source):
        return "voc"
    if any(next(coco.part_files(source, names), None) for names in SPLITS.values()):
        return "coco"
    where = printable(str(source))
    if not source.is_dir():
        raise ValueError(f"data.source: expected a folder or data.yaml, got {where}")
    raise ValueError(f"data.source: expected {LOOKED_FOR} in {where}, got none of these")
