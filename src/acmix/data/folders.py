"""Images of a folder: CLASS/IMAGE, however deep, or parts such as train/ and val/ of that form."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from pathlib import Path

from PIL import Image

from acmix.data.files import (
    EXTENSIONS,
    Found,
    find_images,
    is_folder,
    is_hidden,
    natural_order,
)
from acmix.errors import printable

PART = re.compile(
    r"(train(ing)?|val(id|idate|idation)?|test(ing)?|eval(uation)?|dev)"
    r"([ _-]?(set|data|split|images|\d+))?",
    re.IGNORECASE,
)


class FolderImages:
    """Images below a folder, each of the class that its first folder there names."""

    def __init__(self, root: Path, found: Found) -> None:
        """Sort the images into classes.

        Raises:
            ValueError: If an image is in no class, or two folders spell one name differently.
        """
        self.files, self.found = found.images, found
        folders = [_first_folder(root, file) for file in self.files]
        self.class_names = sorted(_classes(root, set(folders)), key=natural_order)
        places = {name: place for place, name in enumerate(self.class_names)}
        self.labels = [places[unicodedata.normalize("NFC", folder)] for folder in folders]

    def load(self, index: int) -> Image.Image:
        with open(self.files[index], "rb") as file:
            image = Image.open(file)
            image.load()
        return image

    def name(self, index: int) -> str:
        return printable(self.files[index])


def open_folder(folder: Path, names: tuple[str, ...], train: bool) -> FolderImages | None:
    """The first part of `names` in a folder, or None.

    A folder without parts is all training, where the choice is among several names.

    Raises:
        ValueError: If it is no folder, cannot be read, or does not hold images by class.
    """
    try:
        return _open(folder, names, train)
    except OSError as error:
        where = printable(str(error.filename))
        raise ValueError(f"data.source: cannot read {where}: {error.strerror}") from error


def part_names(folder: Path, known: tuple[str, ...]) -> tuple[str, ...]:
    """The folders that are parts: those known, and others that hold folders of classes."""
    there = tuple(name for name in known if (folder / name).is_dir())
    likely = [name for name in _folders(folder) if there or PART.fullmatch(name)]
    return there + tuple(n for n in likely if n not in there and _folders(folder / n))


def _open(folder: Path, names: tuple[str, ...], train: bool) -> FolderImages | None:
    if not folder.is_dir():
        got = f"the file {folder}" if folder.exists() else str(folder)
        raise ValueError(
            f"data.source: expected a folder, torchvision/, hfds/ or wds/, got {printable(got)}"
        )
    root = next((folder / name for name in names if (folder / name).is_dir()), None)
    if root is None and train and len(names) > 1 and not part_names(folder, ()):
        root = folder
    if root is None:
        return None
    found = find_images(root)
    check_every_class(root, found, train)
    images = FolderImages(root, found)
    if remark := found.remark():
        print(f"data.source: {remark}", file=sys.stderr)
    return images


def check_every_class(root: Path, found: Found, train: bool) -> None:
    """No images, a class whose link is broken, or one of training without images: ValueError."""
    for path in found.passed_over:
        if os.path.dirname(path) == str(root) and not os.path.exists(path):
            raise ValueError(f"data.source: expected a folder, got a broken link {printable(path)}")
    held = {_first_folder(root, file) for file in found.images}
    empty = [name for name in _folders(root) if train and name not in held]
    if empty or not held:
        where = printable(str(root / empty[0])) if held else f"{printable(str(root))}/CLASS/"
        reason = found.remark() or f"looked for {' '.join(EXTENSIONS)}"
        raise ValueError(f"data.source: expected images in {where}, got none ({reason})")


def _classes(root: Path, folders: set[str]) -> set[str]:
    """Names of classes, in the one of Unicode's forms that does not depend on the file system."""
    names: dict[str, str] = {}
    for folder in sorted(folders):
        name = unicodedata.normalize("NFC", folder)
        if name in names:
            raise ValueError(
                f"data.source: expected one folder a class in {printable(str(root))}, "
                f"got two forms of one name, {names[name]!a} and {folder!a}"
            )
        names[name] = folder
    return set(names)


def _first_folder(root: Path, file: str) -> str:
    first, separator, _ = file.removeprefix(str(root)).lstrip(os.sep).partition(os.sep)
    if not separator:
        root_name = printable(str(root))
        raise ValueError(f"data.source: expected {root_name}/CLASS/IMAGE, got {printable(file)}")
    return first


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if is_folder(entry)]
    return sorted((name for name in names if not is_hidden(name)), key=natural_order)
