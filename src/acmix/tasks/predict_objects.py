"""`acmix predict RUN IMAGES` of a detector: pictures of what it found, and files of it."""

from __future__ import annotations

import csv
import json
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from PIL import Image

from acmix.analysis import figures, objects
from acmix.errors import Parser, UserError, did_you_mean, user_errors
from acmix.tasks.detection import Detection
from acmix.tasks.own_images import checkpoint_of, choose_device, find_images
from acmix.tasks.predict_dense import Writer, as_picture, load, make_parser, normalised, write_all

FORMS = ("coco", "yolo", "csv")
EXAMPLES = """\
  acmix predict runs/cells slide.png
  acmix predict runs/cells slides/ --threshold 0.3 --only platelets --out found
  acmix predict runs/cells slides/ --write yolo --no-pictures
"""


def run(args: list[str]) -> None:
    """Write what is found in images, and draw it."""
    options = _parser().parse_args(args)
    if not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold: expected 0 to 1, got {options.threshold}")
    with user_errors(ValueError, OSError, torch.OutOfMemoryError):
        device = choose_device(options.device)
        paths = find_images(options.images)
        model, config = load(Detection, checkpoint_of(Path(options.network)))
        if options.threshold < (least := model.hparams["score_threshold"]):
            raise UserError(
                f"--threshold: expected {least} or more, which the run has as "
                f"model.score_threshold, got {options.threshold}"
            )
        labels = chosen_labels(options.only, model.class_names)
        writer = ObjectWriter(options, model.to(device), config, labels)
        write_all(paths, config.get("background", "white"), writer)


def _parser() -> Parser:
    parser = make_parser(
        "What a detector finds in images, or in all images of folders: drawn, and as files.",
        EXAMPLES,
    )
    parser.add_argument(
        "--threshold", type=float, default=0.5, metavar="S", help="least score (0.5)"
    )
    parser.add_argument("--only", nargs="+", metavar="CLASS", help="of these classes alone")
    parser.add_argument(
        "--write",
        nargs="+",
        choices=FORMS,
        default=["coco"],
        help="predictions.json of COCO's form (the default), labels/*.txt of YOLO's, or one CSV",
    )
    return parser


def chosen_labels(only: Sequence[str] | None, names: Sequence[str]) -> set[int]:
    if only is None:
        return set(range(len(names)))
    for name in only:
        if name not in names:
            raise UserError(f"--only: no class {name!r}{did_you_mean(name, names)}")
    return {names.index(name) for name in only}


class ObjectWriter(Writer):
    """In one file what is in all images, or a file an image, by the forms that were chosen."""

    def __init__(
        self, options: Namespace, model: Detection, config: dict[str, Any], labels: set[int]
    ) -> None:
        super().__init__(options)
        self.forms, self.threshold, self.labels = options.write, options.threshold, sorted(labels)
        self.model, self.config, self.names = model, config, model.class_names
        # Numbers of the classes in COCO's form, from 1 on where the data had none.
        self.ids = list(config.get("category_ids") or range(1, len(self.names) + 1))
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def write(self, path: Path, image: Image.Image) -> str:
        stem, marks, number = self.name_of(path), self.find(image), len(self.images) + 1
        row = {"id": number, "file_name": str(path), "height": image.height, "width": image.width}
        self.images.append(row)
        self.annotations += rows_of(marks, number, len(self.annotations) + 1, self.ids)
        if "yolo" in self.forms:
            (self.folder / "labels").mkdir(exist_ok=True)
            lines = "".join(f"{line}\n" for line in yolo_lines(marks, *image.size))
            (self.folder / "labels" / f"{stem}.txt").write_text(lines)
        if self.pictures:
            figure = objects.picture(as_picture(image), marks, self.names)
            figures.save(figure, self.folder / f"{stem}.png")
        return said(marks, self.names)

    def find(self, image: Image.Image) -> objects.Marks:
        """The detections with the least score and of the classes that were asked for."""
        [found] = self.model.detect([normalised(image, self.config).to(self.model.device)])
        wanted = torch.isin(found["labels"].cpu(), torch.tensor(self.labels))
        taken = (found["scores"].cpu() >= self.threshold) & wanted
        return objects.Marks.of({key: of.cpu()[taken] for key, of in found.items()})

    def end(self) -> None:
        if "coco" in self.forms:
            pairs = zip(self.ids, self.names, strict=True)
            content = {
                "images": self.images,
                "annotations": self.annotations,
                "categories": [{"id": number, "name": name} for number, name in pairs],
            }
            (self.folder / "predictions.json").write_text(json.dumps(content) + "\n")
        if "csv" in self.forms:
            with (self.folder / "predictions.csv").open("w", newline="") as table:
                csv.writer(table).writerows(self.table())

    def table(self) -> Iterator[tuple[Any, ...]]:
        yield ("image", "class", "score", "left", "top", "width", "height")
        for row in self.annotations:
            file = self.images[row["image_id"] - 1]["file_name"]
            yield (file, self.names[self.ids.index(row["category_id"])], row["score"], *row["bbox"])


def rows_of(
    marks: objects.Marks, image_id: int, first: int, ids: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """In COCO's form: boxes as left, top, width, height; masks as compressed run lengths."""
    assert marks.scores is not None
    for place, (box, label) in enumerate(zip(marks.boxes.tolist(), marks.labels, strict=True)):
        left, top, right, bottom = box
        row = {
            "id": first + place,
            "image_id": image_id,
            "category_id": ids[label],
            "score": round(marks.scores[place], 4),
            "bbox": [round(side, 2) for side in (left, top, right - left, bottom - top)],
            "area": round((right - left) * (bottom - top), 2),
            "iscrowd": 0,
        }
        if marks.masks is not None:
            mask = np.asfortranarray(marks.masks[place].astype(np.uint8))
            code = coco_mask.encode(mask)
            row["segmentation"] = {"size": list(code["size"]), "counts": code["counts"].decode()}
            row["area"] = int(mask.sum())
        yield row


def yolo_lines(marks: objects.Marks, width: int, height: int) -> Iterator[str]:
    """class, centre x, centre y, width, height as parts of the image, score."""
    assert marks.scores is not None
    for box, label, score in zip(marks.boxes.tolist(), marks.labels, marks.scores, strict=True):
        left, top, right, bottom = box
        centre = (left + right) / 2 / width, (top + bottom) / 2 / height
        sides = (*centre, (right - left) / width, (bottom - top) / height)
        yield " ".join([str(label), *(f"{side:.6f}" for side in sides), f"{score:.4f}"])


def said(marks: objects.Marks, names: Sequence[str]) -> str:
    """How many of which class, the most first."""
    counts = Counter(names[label] for label in marks.labels).most_common()
    return ", ".join(f"{count} {name}" for name, count in counts) or "nothing"
