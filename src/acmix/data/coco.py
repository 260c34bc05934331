"""Objects in COCO's form: one JSON file a part, with images, categories and annotations.

https://cocodataset.org/#format-data
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

from acmix.data.records import (
    Annotations,
    Object,
    Record,
    checked_area,
    checked_box,
    checked_polygons,
    checked_run_lengths,
    four_numbers,
)
from acmix.errors import printable

OF_OTHER_TASKS = ("captions_", "image_info_", "panoptic_", "person_keypoints_", "stuff_")
BESIDE_IMAGES = "_annotations.coco.json"  # within the folder of a part, as Roboflow writes it


def read_coco(file: Path, folders: list[Path]) -> Annotations:
    """The objects of a file, whose images lie in one of the folders.

    Raises:
        ValueError: If the file is not of this form; what is wrong in a record is a fault.
    """
    content = load(file)
    names = categories_of(content["categories"], file)
    found = Annotations([*names.values()], [*names])
    images = images_of(content["images"], file, folders, found)
    places = {number: place for place, number in enumerate(names)}
    rows: dict[Any, list[Any]] = {number: [] for number in images}
    for row in content.pop("annotations"):
        number = row.get("image_id") if isinstance(row, dict) else None
        if isinstance(number, Hashable) and number in rows:
            rows[number].append(row)
        else:
            found.fault(_name(file, row), f"image_id {number!r:.40} is not among the images")
    for number, record in images.items():
        of_image = rows.pop(number)  # the last that holds them: they fill far more than objects do
        if record is not None:  # else the image is a fault already
            objects = objects_of(of_image, record.size, places, file, found)
            found.records.append(record.holding(objects))
    return found


def objects_of(
    rows: list[Any],
    size: tuple[int, int],
    places: dict[int, int],
    file: Path,
    found: Annotations,
) -> list[Object]:
    """The objects of an image that are without faults."""
    objects = []
    for row in rows:
        try:
            objects.append(object_of(row, size, places))
        except KeyError as error:
            found.fault(_name(file, row), f"expected {error.args[0]}, got none")
        except (ValueError, TypeError) as error:
            found.fault(_name(file, row), str(error))
    return objects


def load(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as text:
            content = json.load(text)
    except OSError as error:
        raise ValueError(f"data.source: cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"data.source: cannot read {file}: no JSON ({error})") from error
    needed = ("images", "annotations", "categories")
    content = content if isinstance(content, dict) else {}
    missing = [key for key in needed if not isinstance(content.get(key), list)]
    if missing:
        raise ValueError(f"data.source: expected a list {missing[0]} in {file}, got none")
    return content


def categories_of(rows: list[Any], file: Path) -> dict[int, str]:
    """Names by number, in the order of the numbers."""
    try:
        names = {int(row["id"]): str(row["name"]) for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"data.source: expected categories with id and name in {file}") from error
    if len(names) < len(rows) or len(set(names.values())) < len(names):
        raise ValueError(f"data.source: expected each category once in {file}, got some twice")
    return dict(sorted(names.items()))


def images_of(
    rows: list[Any], file: Path, folders: list[Path], found: Annotations
) -> dict[Any, Record | None]:
    """Records by the image's id; None for an image that cannot be had.

    Where ids are no whole numbers, images are numbered in their order.
    """
    are_numbers = all(isinstance(row, dict) and isinstance(row.get("id"), int) for row in rows)
    images: dict[Any, Record | None] = {}
    taken: set[str] = set()
    for number, row in enumerate(rows):
        try:
            key, name = row["id"], str(row["file_name"])
            size = (int(row["width"]), int(row["height"]))
            again = key in images
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            found.fault(f"{file}, image {number}", f"expected id, file_name and size: {error}")
            continue
        if again:
            found.fault(f"{file}, image {key}", "the id of another image")
            continue
        places = (os.path.join(folder, name) for folder in folders)
        path = next((place for place in places if os.path.isfile(place)), "")
        if not path or min(size) < 1:
            what = f"no file {printable(name)}" if not path else f"expected a size, got {size}"
            found.fault(f"{file}, image {key}", what)
            images[key] = None
            continue
        if path in taken:
            found.fault(f"{file}, image {key}", f"the file {printable(name)} of another image")
            images[key] = None
            continue
        taken.add(path)
        images[key] = Record(path, key if are_numbers else number, size, b"")
    return images


def object_of(row: dict[str, Any], size: tuple[int, int], places: dict[int, int]) -> Object:
    left, top, width, height = four_numbers(row["bbox"])
    box = checked_box((left, top, left + width, top + height), size)
    category = row["category_id"]
    if not isinstance(category, int) or category not in places:
        raise ValueError(f"category_id {category!r} is not among the categories")
    mask = row.get("segmentation") or None
    if isinstance(mask, dict):
        mask = checked_run_lengths(mask, size)
    elif mask is not None:
        mask = checked_polygons(mask, size)
    area = checked_area(row.get("area"), box, mask, size)
    return Object(places[category], box, area, bool(row.get("iscrowd", 0)), mask)


def _name(file: Path, row: Any) -> str:
    return f"{file}, annotation {row.get('id', '?') if isinstance(row, dict) else row!r}"


def part_files(root: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """JSON files that look like those of a part, the likeliest first."""
    folders = (root / "annotations", root)
    there = [file for folder in folders for file in sorted(folder.glob("*.json"))]
    there = [file for file in there if not file.name.startswith(OF_OTHER_TASKS)]
    for name in names:
        yield from (file for file in [root / name / BESIDE_IMAGES] if file.is_file())
        stems = [file for file in there if name in file.stem.rstrip("0123456789").split("_")]
        yield from sorted(stems, key=lambda file: not file.stem.startswith("instances"))


def image_folders(root: Path, file: Path) -> list[Path]:
    """Where the images of a file may lie."""
    part = file.stem.rpartition("_")[2]
    plain = part.rstrip("0123456789")
    names = ("images", part, plain, f"images/{part}", f"images/{plain}", "")
    folders = [*(root / name for name in dict.fromkeys(names)), file.parent]
    return [folder for folder in folders if folder.is_dir()]
