"""Objects in YOLO's form: data.yaml names the classes and the folders of images.

Beside images/ lies labels/ with a text file an image: a row an object, its class and box, or its
class and polygon, as parts of the image.

https://docs.ultralytics.com/datasets/detect/
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from acmix.data.files import find_images
from acmix.data.records import (
    OF_ZEROS,
    Annotations,
    Object,
    Record,
    checked_area,
    checked_box,
    checked_polygons,
)
from acmix.data.sources import why_unreadable

FILES = ("data.yaml", "dataset.yaml", "data.yml")


def yolo_file(source: Path) -> Path | None:
    """The file that describes the data, in a folder or itself."""
    if source.suffix in (".yaml", ".yml") and source.is_file():
        return source
    return next((source / name for name in FILES if (source / name).is_file()), None)


def load(file: Path) -> dict[str, Any]:
    """The description, with the names of the classes in order.

    Raises:
        ValueError: If it is none.
    """
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"data.source: cannot read {file}: no YAML") from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError(
            f"data.source: expected names of classes, a list or numbered from 0, in {file}"
        )
    return {**content, "names": [str(name) for name in names]}


def read_yolo(file: Path, content: dict[str, Any], part: str) -> Annotations:
    """The objects of a part that the file names.

    Raises:
        ValueError: If its images are not there; what is wrong in a row is a fault.
    """
    names = content["names"]
    found = Annotations(names, list(range(1, len(names) + 1)))
    for number, path in enumerate(images_of(file, content, part)):
        try:
            with Image.open(path) as image:
                size = image.size
        except Exception as error:  # of a broken file, Pillow raises anything
            found.fault(path, why_unreadable(error))
            continue
        labels = labels_of(path)
        objects = objects_of(labels, size, found) if os.path.isfile(labels) else []
        found.records.append(Record(str(path), number, size, b"").holding(objects))
    return found


def images_of(file: Path, content: dict[str, Any], part: str) -> list[str]:
    given = content[part] if isinstance(content[part], list) else [content[part]]
    root = file.parent / str(content.get("path") or "")
    paths: list[str] = []
    for name in map(str, given):
        # Some exports name train/images, which lies beside the file, as ../train/images.
        places = (root / name, file.parent / name, file.parent / name.removeprefix("../"))
        place = next((place for place in places if place.exists()), None)
        if place is None:
            raise ValueError(f"data.source: {file} names {part}: {name}, which is not there")
        if place.is_dir():
            paths += find_images(place).images
        else:
            text = place.read_text(errors="replace")
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            paths += [line if os.path.isabs(line) else str(place.parent / line) for line in lines]
    return paths


def labels_of(image: str) -> str:
    """images/ABOVE/NAME.jpg -> labels/ABOVE/NAME.txt, of the last folder of that name."""
    before, separator, after = image.rpartition(f"{os.sep}images{os.sep}")
    moved = f"{before}{os.sep}labels{os.sep}{after}" if separator else image
    return f"{os.path.splitext(moved)[0]}.txt"


def objects_of(file: str, size: tuple[int, int], found: Annotations) -> list[Object]:
    """The objects of an image that are without faults."""
    objects = []
    for number, line in enumerate(Path(file).read_text(errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            objects.append(object_of(line, size, len(found.class_names)))
        except ValueError as error:
            found.fault(f"{file}, line {number}", str(error))
    return objects


def object_of(line: str, size: tuple[int, int], classes: int) -> Object:
    try:
        label, *parts = (float(word) for word in line.split())
    except ValueError as error:
        raise ValueError(f"expected numbers, got {line[:40]!r}") from error
    if not label.is_integer() or not 0 <= label < classes:
        raise ValueError(f"class {label:g} is not among the {classes} classes, from 0")
    if len(parts) == 4:
        centre, half = np.array(parts[:2]), np.array(parts[2:]) / 2
        if not any(parts):
            raise ValueError(OF_ZEROS)
        corners = np.concatenate([centre - half, centre + half]) * [*size, *size]
        box, mask = checked_box(corners.tolist(), size), None
    elif len(parts) >= 6 and len(parts) % 2 == 0:
        points = np.array(parts).reshape(-1, 2) * size
        box = checked_box((*points.min(0).tolist(), *points.max(0).tolist()), size)
        mask = checked_polygons([points.ravel()], size)
    else:
        raise ValueError(f"expected a class and 4 numbers, or 6 and more, got {line[:40]!r}")
    return Object(int(label), box, checked_area(None, box, mask, size), False, mask)
