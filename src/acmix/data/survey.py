"""What images there are: every one read once, and counted."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from statistics import median_low
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from acmix.data.sources import as_rgb, why_unreadable

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 512  # items under way at most, as those of shards are in memory


class Picture(NamedTuple):
    """An image that is to be looked at; `load` may raise anything where it is broken.

    classes: its one, or one an object, or those of its pixels.
    """

    name: str
    classes: tuple[str, ...]
    load: Callable[[], Image.Image]


class Broken(NamedTuple):
    """An image that cannot be read, and why."""

    name: str
    reason: str


class Seen(NamedTuple):
    """What is kept of an image that can be read."""

    name: str
    classes: tuple[str, ...]
    size: tuple[int, int]  # width, height
    mode: str
    content: str  # a hash of the pixels in RGB: equal for equal pictures, whatever the format
    thumbnail: np.ndarray | None  # (H, W, 3) in [0, 1]

    @property
    def label(self) -> str:
        """Its classes in words."""
        return ", ".join(sorted(set(self.classes))) or "no class"


class Span(NamedTuple):
    """Of some numbers."""

    smallest: int
    median: int
    largest: int


@dataclass(frozen=True)
class Survey:
    """The images that can be read, and those that cannot."""

    seen: list[Seen] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        """Images by class, or objects where an image has several."""
        return Counter(name for image in self.seen for name in image.classes)

    @property
    def modes(self) -> dict[str, int]:
        """Images by Pillow's mode, as stored, the most frequent first."""
        return dict(Counter(image.mode for image in self.seen).most_common())

    @property
    def width(self) -> Span | None:
        return _span([image.size[0] for image in self.seen])

    @property
    def height(self) -> Span | None:
        return _span([image.size[1] for image in self.seen])


def survey(
    pictures: Iterable[Picture],
    background: str = "white",
    shown: int = 0,
    jobs: int | None = None,
    progress: Callable[[], Any] = lambda: None,
) -> Survey:
    """Read each image once.

    Args:
        pictures: Of a part of the data.
        background: Colour beneath what is transparent.
        shown: Of each class so many images keep a thumbnail.
        jobs: Threads that read; by default one a core.
        progress: Called after each image.
    """
    found, so_far = Survey(), Counter[str]()

    def chosen() -> Iterator[tuple[Picture, bool]]:
        for picture in pictures:
            so_far.update(set(picture.classes))
            yield picture, any(so_far[name] <= shown for name in picture.classes)

    for result in in_threads(lambda of: _look(*of, background), chosen(), jobs):
        if isinstance(result, Broken):
            found.broken.append(result)
        else:
            found.seen.append(result)
        progress()
    return found


def duplicates(*surveys: Survey) -> list[list[tuple[int, Seen]]]:
    """Groups of equal pictures, within parts and across, as (place of the survey, image)."""
    groups: dict[str, list[tuple[int, Seen]]] = {}
    for place, part in enumerate(surveys):
        for image in part.seen:
            groups.setdefault(image.content, []).append((place, image))
    return [group for group in groups.values() if len(group) > 1]


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], jobs: int | None = None
) -> Iterator[Result]:
    """Results in order; whoever stops asking waits for no item that is not under way."""
    threads, items = ThreadPoolExecutor(jobs or os.cpu_count()), iter(items)
    try:
        while some := list(islice(items, AHEAD)):
            yield from threads.map(function, some)
    finally:
        threads.shutdown(cancel_futures=True)


def look(picture: Picture, background: str) -> Image.Image | Broken:
    """The image in RGB, or why it cannot be read."""
    try:
        return as_rgb(picture.load(), background)
    except Exception as error:  # of a broken file, Pillow raises anything
        return Broken(picture.name, why_unreadable(error))


def _look(picture: Picture, shown: bool, background: str) -> Seen | Broken:
    modes: list[str] = []

    def load() -> Image.Image:
        image = picture.load()
        modes.append(image.mode)
        return image

    pixels = look(picture._replace(load=load), background)
    if isinstance(pixels, Broken):
        return pixels
    content = hashlib.blake2b(repr(pixels.size).encode(), digest_size=16)
    content.update(pixels.tobytes())
    return Seen(
        picture.name,
        picture.classes,
        pixels.size,
        modes[0],
        content.hexdigest(),
        thumbnail(pixels) if shown else None,
    )


def broken_within(
    seconds: float, parts: Iterable[Iterable[Picture]], background: str
) -> Iterator[Broken]:
    """The images that cannot be read, of those that there is time to look at."""
    end = time.monotonic() + seconds
    for pictures in parts:
        for result in in_threads(lambda picture: look(picture, background), pictures):
            if isinstance(result, Broken):
                yield result
            if time.monotonic() > end:
                return


def thumbnail(pixels: Image.Image, side: int = 160) -> np.ndarray:
    """The image within a square of this side, (H, W, 3) in [0, 1]."""
    pixels.thumbnail((side, side))
    return np.asarray(pixels) / np.float32(255)


def _span(numbers: list[int]) -> Span | None:
    return Span(min(numbers), median_low(numbers), max(numbers)) if numbers else None
