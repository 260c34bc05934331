"""What is known of the objects in images, in whatever form it came, and what is wrong in it."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval.core import mask as coco_mask

from acmix.errors import printable

LEEWAY = 2.0  # pixels by which rounding may bring a box out of its image
OF_ZEROS = "a box of zeros; an image without objects has no box at all"


class Object(NamedTuple):
    """One object. box: left, top, right, bottom in pixels. ignored: crowds and the like.

    mask: polygons as arrays of x, y, x, y, ..., or compressed run lengths; None without one.
    """

    label: int
    box: tuple[float, float, float, float]
    area: float
    ignored: bool = False
    mask: tuple[np.ndarray, ...] | dict[str, Any] | None = None


class Record(NamedTuple):
    """An image file, its width and height, and what is in it.

    The objects of COCO would fill gigabytes one by one, again in every process that loads images.
    """

    path: str
    number: int
    size: tuple[int, int]
    pickled: bytes

    @property
    def objects(self) -> list[Object]:
        return pickle.loads(self.pickled)

    def holding(self, objects: list[Object]) -> Record:
        return self._replace(pickled=pickle.dumps(objects))


@dataclass
class Annotations:
    """Of one part of the data: images, and the faults of what is not among them.

    category_ids: of the classes, in the file's own numbers.
    """

    class_names: list[str]
    category_ids: list[int]
    records: list[Record] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def fault(self, where: str | Path, what: str) -> None:
        self.faults.append(f"{printable(str(where))}: {what}")


def checked_box(numbers: Sequence[Any], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box (left, top, right, bottom) within an image of (width, height).

    Raises:
        ValueError: If it is no box, empty, or not within the image; says why.
    """
    left, top, right, bottom = box = four_numbers(numbers)
    if not all(map(math.isfinite, box)):
        raise ValueError(f"expected a box of finite numbers, got {_words(box)}")
    if box == (0, 0, 0, 0):
        raise ValueError(OF_ZEROS)
    if right <= left or bottom <= top:
        raise ValueError(f"expected right > left and bottom > top, got the box {_words(box)}")
    width, height = size
    out = max(-left, -top, right - width, bottom - height)
    cut = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
    if out > LEEWAY or cut[2] <= cut[0] or cut[3] <= cut[1]:
        raise ValueError(f"the box {_words(box)} leaves its image of {width}x{height}")
    return cut


def four_numbers(values: Any) -> tuple[float, float, float, float]:
    """Of a box.

    Raises:
        ValueError: If they are others.
    """
    try:
        first, second, third, fourth = map(float, values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"expected four numbers of a box, got {values!r:.80}") from error
    return first, second, third, fourth


def checked_area(area: Any, box: Sequence[float], mask: Any, size: tuple[int, int]) -> float:
    """The area that a file gives, or else that of the mask, or of the box.

    Raises:
        ValueError: If the file gives what is no area.
    """
    if area is None and mask is not None:
        return float(decode(mask, size).sum())
    if area is None:
        return (box[2] - box[0]) * (box[3] - box[1])
    if not isinstance(area, int | float) or not 0 <= area < math.inf:
        raise ValueError(f"expected an area of 0 or more, got {area!r:.40}")
    return float(area)


def _words(box: Sequence[float]) -> str:
    return "({})".format(", ".join(f"{side:g}" for side in box))


def checked_polygons(polygons: Iterable[Any], size: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Arrays of x, y, x, y, ...; in float64, since rounding to float32 moves edges by a pixel.

    Raises:
        ValueError: If one has fewer than three points, what is no number, or a point far from the
            image.
    """
    arrays = []
    for polygon in polygons:
        try:
            array = np.asarray(polygon, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError("expected polygons of numbers, got something else") from error
        if array.ndim != 1 or len(array) < 6 or len(array) % 2:
            raise ValueError(
                f"expected a polygon of three points or more, got {array.size} numbers"
            )
        if not np.isfinite(array).all():
            raise ValueError("expected a polygon of finite numbers, got NaN or infinity")
        if array.min() < -max(size) or array.max() > 2 * max(size):
            raise ValueError("a polygon has a point far from its image of {}x{}".format(*size))
        arrays.append(array)
    return tuple(arrays)


def checked_run_lengths(code: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Run lengths in COCO's form, compressed.

    Raises:
        ValueError: If they are of another size than the image, or none.
    """
    width, height = size
    if list(code.get("size", ())) != [height, width]:
        raise ValueError(
            f"the mask has size {code.get('size')} (height, width), its image {[height, width]}"
        )
    counts = code.get("counts")
    whole = {"size": [height, width], "counts": counts}
    if isinstance(counts, list):
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError("expected run lengths of whole numbers from 0, got others")
        if sum(counts) != width * height:
            raise ValueError(f"the runs of the mask sum to {sum(counts)}, not {width * height}")
        whole = coco_mask.frPyObjects(whole, height, width)
    elif not isinstance(counts, str | bytes):
        raise ValueError(f"expected run lengths, got counts of {type(counts).__name__}")
    decode(whole, size)
    return whole


def decode(mask: Any, size: tuple[int, int]) -> np.ndarray:
    """(H, W) of 0 and 1.

    Raises:
        ValueError: If it cannot be decoded.
    """
    width, height = size
    try:
        if not isinstance(mask, dict):
            polygons = [polygon.tolist() for polygon in mask]
            mask = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        return coco_mask.decode(mask)
    except Exception as error:  # of a broken code, its decoder raises anything
        raise ValueError(f"a mask cannot be decoded: {error}") from error
