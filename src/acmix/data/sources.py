"""Where labelled images come from: a folder, torchvision, or the Hugging Face hub.

A source is named as in timm: the path of a folder, `torchvision/NAME` or `hfds/NAME`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageColor, UnidentifiedImageError
from torchvision import datasets

from acmix.data.folders import open_folder, part_names
from acmix.data.hub import hub_splits, open_hub
from acmix.errors import did_you_mean, one_line, printable

ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)  # longer than the letter of a drive
SPLITS = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "eval"),
    "test": ("test",),
}


class Labelled(Protocol):
    """Images, each with a class; `load` gives one as stored, or raises anything if it is broken."""

    class_names: list[str]
    labels: list[int]

    def load(self, index: int) -> Image.Image: ...

    def name(self, index: int) -> str: ...


class TorchvisionSet(NamedTuple):
    """A class of `torchvision.datasets`, and the names of its splits."""

    build: Callable[..., Any]
    splits: tuple[str, ...]
    option: str = "split"


TORCHVISION_ROOT = "data"
TORCHVISION = {
    "cifar10": TorchvisionSet(datasets.CIFAR10, ("train", "test"), "train"),
    "cifar100": TorchvisionSet(datasets.CIFAR100, ("train", "test"), "train"),
    "country211": TorchvisionSet(datasets.Country211, ("train", "valid", "test")),
    "dtd": TorchvisionSet(datasets.DTD, ("train", "val", "test")),
    "fashionmnist": TorchvisionSet(datasets.FashionMNIST, ("train", "test"), "train"),
    "fgvcaircraft": TorchvisionSet(datasets.FGVCAircraft, ("train", "val", "trainval", "test")),
    "flowers102": TorchvisionSet(datasets.Flowers102, ("train", "val", "test")),
    "food101": TorchvisionSet(datasets.Food101, ("train", "test")),
    "imagenet": TorchvisionSet(datasets.ImageNet, ("train", "val")),
    "imagenette": TorchvisionSet(datasets.Imagenette, ("train", "val")),
    "kmnist": TorchvisionSet(datasets.KMNIST, ("train", "test"), "train"),
    "mnist": TorchvisionSet(datasets.MNIST, ("train", "test"), "train"),
    "oxfordiiitpet": TorchvisionSet(datasets.OxfordIIITPet, ("trainval", "test")),
    "stl10": TorchvisionSet(datasets.STL10, ("train", "test")),
    "svhn": TorchvisionSet(datasets.SVHN, ("train", "test")),
}


def locate(source: str, root: str | None) -> tuple[str, str | None]:
    """Source and root from any working directory: local paths whole, hub names and addresses as is.

    Raises:
        ValueError: If the source is empty, or its prefix stands alone.
    """
    kind, separator, name = source.partition("/")
    remote = separator and kind in ("torchvision", "hfds", "wds")
    if not (name if remote else source).strip():
        raise ValueError(
            f"data.source: expected a folder, torchvision/, hfds/ or wds/, got {source!r}"
        )
    if kind == "torchvision" and remote:
        return source, absolute(root or TORCHVISION_ROOT)
    root = None if root is None else absolute(root)
    if not remote:
        return absolute(source), root
    is_local = not ADDRESS.match(name) if kind == "wds" else os.path.isdir(os.path.expanduser(name))
    return f"{kind}/{absolute(name)}" if is_local else source, root


def absolute(path: str) -> str:
    return str(Path(os.path.expanduser(path)).absolute())


def open_split(
    source: str,
    names: tuple[str, ...],
    train: bool = False,
    root: str | None = None,
    download: bool = False,
    image_key: str | None = None,
    label_key: str | None = None,
) -> Labelled | None:
    """The first split of `names` that the source has, or None.

    Args:
        source: Path of a folder, `torchvision/NAME` or `hfds/NAME`.
        names: Of the split, in order of preference.
        train: Whether it is the part to learn from, which needs an image of every class.
        root: Folder of torchvision's files (`data` by default), or of the cache of Hugging Face.
        download: Let torchvision download what is not there.
        image_key: Column of the images of a Hugging Face data set, if there are several.
        label_key: Column of their classes, if there are several.

    Raises:
        ValueError: If there is no such source, or it holds no image.
        ImportError: If its package is not installed.
    """
    kind, _, name = source.partition("/")
    if kind == "torchvision":
        return _open_torchvision(name, names, root or TORCHVISION_ROOT, download)
    if kind == "hfds":
        return open_hub(name, names, root, image_key, label_key)
    return open_folder(Path(source), names, train)


def split_names(source: str, root: str | None = None) -> tuple[str, ...]:
    """The splits that a source is known to have, for messages."""
    kind, _, name = source.partition("/")
    if kind == "torchvision":
        return TORCHVISION[name].splits
    if kind == "hfds":
        return hub_splits(name, root)
    return part_names(Path(source), tuple(name for names in SPLITS.values() for name in names))


class TorchvisionImages:
    """The images of one of torchvision's data sets."""

    def __init__(self, data: Any, title: str) -> None:
        self.data = data
        self.title = title
        samples = first_attribute(data, "_samples", "samples") or []
        labels = first_attribute(data, "targets", "_labels", "labels")
        labels = [label for _, label in samples] if labels is None else labels
        self.labels = [int(label) for label in labels]
        names = getattr(data, "classes", None) or range(max(self.labels) + 1)
        self.class_names = [str(name if isinstance(name, str | int) else name[0]) for name in names]
        files = first_attribute(data, "_image_files", "_images")
        files = [file for file, _ in samples] if files is None else files
        self.files = [str(file) for file in files]

    def load(self, index: int) -> Image.Image:
        return self.data[index][0]

    def name(self, index: int) -> str:
        return printable(self.files[index]) if self.files else f"image {index} of {self.title}"


def as_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """The image in 8 bits a channel, red, green and blue; what is transparent, on a background.

    Raises:
        ValueError: If it is of other numbers than 8 or 16 bits a channel.
    """
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if image.mode == "F":
        raise ValueError("expected 8 or 16 bits a channel, got floating-point numbers")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (*ImageColor.getrgb(background)[:3], 255))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """The upper 8 bits, as Pillow would cut off at 255; it gives some files' 16 bits as 32."""
    values = np.asarray(image)
    if values.size and not 0 <= values.min() <= values.max() < 1 << 16:
        span = f"{values.min()} to {values.max()}"
        raise ValueError(f"expected 8 or 16 bits a channel, got numbers from {span}")
    return Image.fromarray((values >> 8).astype(np.uint8))


def check_colour(background: str) -> None:
    """ValueError for what is no colour."""
    try:
        ImageColor.getrgb(background)
    except ValueError as error:
        raise ValueError(
            f"data.background: expected a colour such as white or #ffffff, got {background!r}"
        ) from error


def why_unreadable(error: Exception) -> str:
    """What is wrong with an image file, whose name stands before; Pillow repeats it."""
    if isinstance(error, UnidentifiedImageError):
        return "no image"
    return (isinstance(error, OSError) and error.strerror) or printable(one_line(error))


def first_attribute(data: Any, *names: str) -> Any:
    return next((vars(data)[name] for name in names if name in vars(data)), None)


def _open_torchvision(
    name: str, names: tuple[str, ...], root: str, download: bool
) -> Labelled | None:
    if name not in TORCHVISION:
        raise ValueError(
            f"data.source: unknown torchvision/{name}{did_you_mean(name, TORCHVISION)} "
            f"(known: {', '.join(TORCHVISION)})"
        )
    chosen = TORCHVISION[name]
    split = next((split for split in names if split in chosen.splits), None)
    if split is None:
        return None
    value = split == "train" if chosen.option == "train" else split
    options: dict[str, Any] = {chosen.option: value}
    if name != "imagenet":  # which torchvision does not download
        options["download"] = download
    try:
        data = chosen.build(root, **options)
    except (RuntimeError, OSError) as error:
        hint = "" if download else "; --data.download true fetches it"
        raise ValueError(f"data.source: no {name} in {root} ({error}){hint}") from error
    return TorchvisionImages(data, f"{split} of torchvision/{name}")
