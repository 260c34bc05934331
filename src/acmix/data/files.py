"""Image files in a folder, in an order that is the same everywhere, and what lies beside them."""

from __future__ import annotations

import mimetypes
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from acmix.errors import few

# Pillow opens these too, but they are pages, films and fields of numbers.
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
LEFT_BEHIND = {
    *("__MACOSX", "Thumbs.db", "desktop.ini", "Icon\r", "@eaDir", "#recycle", "lost+found"),
    *("$RECYCLE.BIN", "System Volume Information", "__pycache__"),
}


class Found(NamedTuple):
    """Files below a folder, each kind in order."""

    images: list[Path]
    hidden: list[Path]  # what file systems, editors and tools leave
    others: list[Path]  # perhaps images, but of no suffix that is looked for

    def passed_over(self) -> str:
        """What was left out, in a few words; empty where there was nothing."""
        parts = []
        if self.hidden:
            parts.append(f"{len(self.hidden)} hidden ({few(self.hidden, 1)})")
        if self.others:
            parts.append(f"{len(self.others)} of no known suffix ({few(self.others, 1)})")
        return "files passed over: " + ", ".join(parts) if parts else ""


@cache
def suffixes() -> frozenset[str]:
    """Suffixes of the pictures that Pillow reads, such as ".jpg"."""
    Image.init()
    found = Image.registered_extensions().items()
    return frozenset(s for s, kind in found if kind in Image.OPEN and kind not in NO_PICTURES)


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts numbers by their value, "2" before "10"; names that differ never tie."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], name


def find_images(root: Path) -> Found:
    """All files below a folder; a link to a folder is followed, but never round in a circle.

    Raises:
        OSError: If a folder cannot be read.
    """
    found = Found([], [], [])
    for path, hidden in _walk(root, ()):
        if hidden:
            found.hidden.append(path)
        elif path.suffix.lower() in suffixes() and (path.is_file() or path.is_symlink()):
            found.images.append(path)
        elif _may_be_an_image(path):
            found.others.append(path)
    for files in found:
        files.sort(key=lambda path: natural_key(str(path)))
    return found


def _walk(
    folder: Path, above: tuple[tuple[int, int], ...], hidden: bool = False
) -> Iterator[tuple[Path, bool]]:
    """Files, and whether they are hidden or in a folder that is; above: the folders around."""
    status = folder.stat()
    this = (status.st_dev, status.st_ino)
    if this in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            left = hidden or is_left_behind(entry.name)
            if entry.is_dir():
                yield from _walk(Path(entry.path), (*above, this), left)
            else:
                yield Path(entry.path), left


def is_left_behind(name: str) -> bool:
    """Whether a file system, an editor or a tool leaves files of this name."""
    return name in LEFT_BEHIND or name.startswith((".", "~$")) or name.endswith("~")


def _may_be_an_image(path: Path) -> bool:
    if not path.is_file():
        return path.suffix.lower() in suffixes()  # a pipe or the like
    if path.suffix:
        kind = mimetypes.guess_type(path.name)[0] or "image"
        return kind.startswith("image")
    try:
        with Image.open(path):
            return True
    except Exception:  # of what is no image, Pillow raises anything
        return False
