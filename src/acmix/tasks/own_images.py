"""What `acmix predict` is given: images of the user's, a checkpoint, a device."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from acmix.data.files import EXTENSIONS
from acmix.data.files import find_images as find_files
from acmix.data.sources import as_rgb, why_unreadable
from acmix.errors import UserError, printable
from acmix.tasks.base import task_of


def choose_device(name: str | None) -> torch.device:
    """The named device; by default a GPU if there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: expected one that is there, got {name}") from error


def find_images(given: Sequence[str]) -> list[Path]:
    """Files of these names, and the images in folders of these names."""
    paths: list[Path] = []
    for name in given:
        path = Path(name)
        if not name.strip() or not path.exists():
            raise UserError(f"expected an image or a folder of images, got no such file: {name!r}")
        if path.is_dir():
            paths += images_in(path)
        elif path.is_file():
            paths.append(path)
        else:
            raise UserError(
                f"expected an image or a folder of images, got {name}, a pipe or device"
            )
    return paths


def images_in(folder: Path) -> list[Path]:
    found = find_files(folder)
    if not found.images:
        why = found.remark() or f"looked for {' '.join(EXTENSIONS)}"
        raise UserError(f"{folder}: expected images, found none ({why})")
    if remark := found.remark():
        print(f"{folder}: {remark}", file=sys.stderr)
    return [Path(image) for image in found.images]


def read_image(path: Path, background: str) -> Image.Image:
    """The image in RGB.

    Raises:
        ValueError: If it cannot be read; the message names it.
    """
    try:
        if not path.is_file():
            raise ValueError("no file")
        with Image.open(path) as image:
            return as_rgb(image, background)
    except Exception as error:  # of a broken file, Pillow raises anything
        raise ValueError(f"cannot read {printable(str(path))}: {why_unreadable(error)}") from error


def checkpoint_of(path: Path) -> Path:
    """The last checkpoint of a run folder, or the file itself."""
    checkpoint = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not checkpoint.is_file():
        raise UserError(f"{path} is no run folder: no {checkpoint}")
    return checkpoint


def peek(path: Path) -> dict[str, Any]:
    """What a checkpoint of `acmix fit` holds, its weights left on the disk; {} for another file."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return found if "hyper_parameters" in found else {}
    except Exception:  # of a file that is no checkpoint, torch.load raises anything
        return {}


def task_of_network(network: str) -> str | None:
    """The task of a run folder or checkpoint; None for what is neither."""
    path = Path(network)
    if not network or not path.exists():
        return None
    path = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    found = peek(path)
    return task_of(found) if found else None
