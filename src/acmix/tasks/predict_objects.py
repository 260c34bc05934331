"""`acmix predict RUN IMAGES` of a detector: pictures of what it found, and files of it."""

from __future__ import annotations

import csv
import json
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from acmix.analysis import figures, objects
from acmix.errors import Parser, UserError, did_you_mean, one_line, printable, user_errors
from acmix.tasks.detection import Detection
from acmix.tasks.own_images import checkpoint_of, choose_device, find_images, read_image

FORMS = ("coco", "yolo", "csv")
EXAMPLES = """\
  acmix predict runs/cells slide.png
  acmix predict runs/cells slides/ --threshold 0.3 --only platelets --out found
  acmix predict runs/cells slides/ --write yolo --no-pictures
"""


class Found(NamedTuple):
    """What was found in an image: its file, its size, and the detections, the surest first."""

    path: Path
    picture: np.ndarray  # (H, W, 3) in [0, 1]
    parts: dict[str, Tensor]  # boxes (N, 4), scores (N,), labels (N,) and perhaps masks (N, H, W)


def run(args: list[str]) -> None:
    """Write what is found in images, and draw it."""
    options = _parser().parse_args(args)
    if not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold: expected 0 to 1, got {options.threshold}")
    with user_errors(ValueError, OSError, torch.OutOfMemoryError):
        device = choose_device(options.device)
        paths = find_images(options.images)
        model, config = load(checkpoint_of(Path(options.network)))
        if options.threshold < (least := model.hparams["score_threshold"]):
            raise UserError(
                f"--threshold: expected {least} or more, which the run has as "
                f"model.score_threshold, got {options.threshold}"
            )
        labels = chosen_labels(options.only, model.class_names)
        model.to(device)
        writer = Writer(
            Path(options.out),
            options.write,
            options.pictures,
            model.class_names,
            config.get("category_ids"),
        )
        unread = write_all(model, config, paths, options, labels, writer)
    if unread:
        print(f"{unread} of {len(paths)} images could not be read", file=sys.stderr)
        raise SystemExit(1)


def _parser() -> Parser:
    parser = Parser(
        "acmix predict",
        "What a detector finds in images, or in all images of folders: drawn, and as files.",
        EXAMPLES,
        usage="acmix predict RUN IMAGE_OR_FOLDER ... [options]",
    )
    parser.add_argument("network", metavar="RUN", help="run folder, or checkpoint of one")
    parser.add_argument(
        "images", metavar="IMAGE_OR_FOLDER", nargs="+", help="a folder with all folders in it"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.5, metavar="S", help="least score (0.5)"
    )
    parser.add_argument("--only", nargs="+", metavar="CLASS", help="of these classes alone")
    parser.add_argument(
        "--out", default="predictions", metavar="FOLDER", help="of all files (predictions)"
    )
    parser.add_argument(
        "--write",
        nargs="+",
        choices=FORMS,
        default=["coco"],
        help="predictions.json of COCO's form (the default), labels/*.txt of YOLO's, or one CSV",
    )
    parser.add_argument(
        "--no-pictures", dest="pictures", action="store_false", help="draw no picture of each image"
    )
    parser.add_argument("--device", help="such as cpu or cuda:0; by default a GPU if there is one")
    return parser


def load(path: Path) -> tuple[Detection, dict[str, Any]]:
    """The detector of a checkpoint, and how an image is prepared; nothing in the file is run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = Detection(**checkpoint["hyper_parameters"])
        model.load_state_dict(checkpoint["state_dict"])
        return model.eval(), checkpoint["input"]
    except Exception as error:  # of a file that is no checkpoint, torch.load raises anything
        raise UserError(f"{path} is no checkpoint of acmix fit: {one_line(error)}") from error


def chosen_labels(only: Sequence[str] | None, names: Sequence[str]) -> set[int]:
    if only is None:
        return set(range(len(names)))
    for name in only:
        if name not in names:
            raise UserError(f"--only: no class {name!r}{did_you_mean(name, names)}")
    return {names.index(name) for name in only}


@torch.inference_mode()
def write_all(
    model: Detection,
    config: dict[str, Any],
    paths: Sequence[Path],
    options: Namespace,
    labels: set[int],
    writer: Writer,
) -> int:
    """Write what is in each image as it comes; how many could not be read, each is named."""
    stderr, done = Console(stderr=True), 0
    shown = track(paths, "images", console=stderr, transient=True, disable=not stderr.is_terminal)
    try:
        with writer:
            for path in shown:
                try:
                    image = read_image(path, config.get("background", "white"))
                except ValueError as error:
                    print(error, file=sys.stderr)
                    continue
                writer.add(find(model, config, path, image, options.threshold, labels))
                done += 1
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"Stopped after {done} of {len(paths)} images.") from stop
    return len(paths) - done


def find(
    model: Detection,
    config: dict[str, Any],
    path: Path,
    image: Image.Image,
    threshold: float,
    labels: set[int],
) -> Found:
    picture = np.asarray(image, dtype=np.float32) / 255
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    pixels = (torch.from_numpy(picture).permute(2, 0, 1) - mean) / std
    [found] = model.detect([pixels.to(model.device)])
    wanted = torch.tensor(sorted(labels), device=found["labels"].device)
    taken = (found["scores"] >= threshold) & torch.isin(found["labels"], wanted)
    return Found(path, picture, {key: of[taken].cpu() for key, of in found.items()})


class Writer:
    """Files of what was found, image by image; those that hold all images end with the last."""

    def __init__(
        self,
        folder: Path,
        forms: Sequence[str],
        pictures: bool,
        names: Sequence[str],
        ids: Sequence[int] | None = None,
    ) -> None:
        """ids: numbers of the classes in COCO's form, from 1 on where the data had none."""
        self.folder, self.forms, self.pictures, self.names = folder, forms, pictures, names
        self.ids = list(ids or range(1, len(names) + 1))
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.stems: Counter[str] = Counter()

    def __enter__(self) -> Writer:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *error: object) -> None:
        if "coco" in self.forms:
            categories = [
                {"id": number, "name": name}
                for number, name in zip(self.ids, self.names, strict=True)
            ]
            content = {
                "images": self.images,
                "annotations": self.annotations,
                "categories": categories,
            }
            (self.folder / "predictions.json").write_text(json.dumps(content) + "\n")
        if "csv" in self.forms:
            self._write_csv()
        if self.images:
            print(f"{len(self.images)} images: {self.folder}")

    def add(self, found: Found) -> None:
        """Take what was found in an image, draw it, and say it in a line."""
        stem, marks = self._stem(found.path), objects.Marks.of(found.parts)
        height, width = found.picture.shape[:2]
        image = {"id": len(self.images) + 1, "file_name": str(found.path)}
        self.images.append({**image, "height": height, "width": width})
        self.annotations += rows_of(marks, len(self.images), len(self.annotations) + 1, self.ids)
        if "yolo" in self.forms:
            (self.folder / "labels").mkdir(exist_ok=True)
            lines = "".join(f"{line}\n" for line in yolo_lines(marks, width, height))
            (self.folder / "labels" / f"{stem}.txt").write_text(lines)
        if self.pictures:
            figure = objects.picture(found.picture, marks, self.names)
            figures.save(figure, self.folder / f"{stem}.png")
        print(f"{printable(str(found.path))}  {said(marks, self.names)}", flush=True)

    def _stem(self, path: Path) -> str:
        """A name for the image's files; of a second image of one name with a number."""
        self.stems[path.stem] += 1
        number = self.stems[path.stem]
        return path.stem if number == 1 else f"{path.stem}-{number}"

    def _write_csv(self) -> None:
        with (self.folder / "predictions.csv").open("w", newline="") as table:
            writer = csv.writer(table)
            writer.writerow(("image", "class", "score", "left", "top", "width", "height"))
            for of in self.annotations:
                image, name = (
                    self.images[of["image_id"] - 1],
                    self.names[self.ids.index(of["category_id"])],
                )
                writer.writerow((image["file_name"], name, of["score"], *of["bbox"]))


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
