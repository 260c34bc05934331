"""The image files below a folder, in one order on every machine, and what else lies there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from acmix.errors import printable

# Formats that Pillow names, but cannot draw by itself, or that hold no picture.
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
# What systems, editors and tools leave behind.
HIDDEN = re.compile(
    r"\..*|.*~|~\$.*|#.*#|\$recycle\.bin|#recycle|@eadir|__macosx|__pycache__|desktop\.ini|"
    r"ehthumbs.*\.db|icon\r|lost\+found|system volume information|thumbs\.db",
    re.IGNORECASE | re.DOTALL,
)
PLAINLY_OTHER = re.compile(  # text, tables, programs, sound and film
    r"\.(cfg|csv|db|docx?|html?|ini|ipynb|jsonl?|js|log|lst|md5|md|odt|py|rst|rtf|sha1|sha256|sh|"
    r"sqlite|sql|tex|toml|tsv|txt|url|xlsx?|xml|ya?ml|"
    r"aac|avi|flac|m4a|m4v|mkv|mov|mp3|mp4|mpe?g|ogg|wav|webm|wmv)",
    re.IGNORECASE,
)


def _extensions() -> tuple[str, ...]:
    Image.init()
    formats = (Image.OPEN.keys() | {"MPO"}) - NO_PICTURES  # MPO opens as JPEG
    known = Image.registered_extensions()
    return tuple(sorted(suffix for suffix, form in known.items() if form in formats))


EXTENSIONS = _extensions()
SUFFIXES = frozenset(EXTENSIONS)


class Found(NamedTuple):
    """Paths below a folder: its images, and what was left out for its name or its suffix."""

    images: list[str]
    hidden: list[str]  # files, and folders as a whole
    passed_over: list[str]  # not what is plainly no image, such as text

    def remark(self) -> str | None:
        """One line on the files that were left out, if there are any."""
        left = [
            f"{_with_example(self.hidden)} left by systems and tools" if self.hidden else "",
            f"{_with_example(self.passed_over)} with no suffix of an image that Pillow reads"
            if self.passed_over
            else "",
        ]
        said = "; ".join(filter(None, left))
        return f"passed over {said}" if said else None


def _with_example(paths: list[str]) -> str:
    example = printable(paths[0])
    return f"1 file ({example})" if len(paths) == 1 else f"{len(paths)} files (such as {example})"


def find_images(root: str | Path) -> Found:
    """All images below a folder, through links to folders too.

    Raises:
        OSError: If a folder cannot be read.
    """
    found = Found([], [], [])
    for path, kind in _walk(str(root), frozenset()):
        getattr(found, kind).append(path)
    for paths in found:
        paths.sort(key=natural_order)
    return found


def _walk(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """(path, kind) of what lies below; a link back to a folder `above` is not followed."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                yield entry.path, "hidden"
            elif is_folder(entry):
                yield from _walk(entry.path, above | {here})
            elif kind := _kind(entry):
                yield entry.path, kind


def _kind(entry: os.DirEntry[str]) -> str | None:
    suffix = os.path.splitext(entry.name)[1].lower()
    # A broken link to an image is an image that cannot be read.
    if suffix in SUFFIXES and (entry.is_file() or entry.is_symlink()):
        return "images"
    return None if PLAINLY_OTHER.fullmatch(suffix) else "passed_over"


def is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def is_hidden(name: str) -> bool:
    """Whether it is the name of what systems, editors and tools leave beside images."""
    return HIDDEN.fullmatch(name) is not None


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Sort key: numbers by value, 2 before 10, and no two names equal."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if odd % 2 else part for odd, part in enumerate(parts)], name
