"""Where labelled images come from: a folder, torchvision, or the Hugging Face hub.

A source is named as in timm: the path of a folder, `torchvision/NAME` or `hfds/NAME`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError
from timm.data.readers import create_reader
from torchvision import datasets

from acmix.errors import did_you_mean, one_line

SPLITS = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "eval"),
    "test": ("test",),
}
EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Labelled(Protocol):
    """Images, each with a class; `load` may raise anything where a file is broken."""

    class_names: list[str]
    labels: list[int]

    def load(self, index: int) -> Image.Image: ...

    def name(self, index: int) -> str: ...


class TorchvisionSet(NamedTuple):
    """A class of `torchvision.datasets`, and the names of its splits."""

    build: Callable[..., Any]
    splits: tuple[str, ...]
    option: str = "split"


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


def open_split(
    source: str,
    names: tuple[str, ...],
    root: str | None = None,
    download: bool = False,
    image_key: str = "image",
    label_key: str = "label",
) -> Labelled | None:
    """The first split of `names` that the source has, or None.

    Args:
        source: Path of a folder, `torchvision/NAME` or `hfds/NAME`.
        names: Of the split, in order of preference.
        root: Folder of torchvision's files (`data` by default), or of the cache of Hugging Face.
        download: Let torchvision download what is not there.
        image_key: Column of the images of a Hugging Face data set.
        label_key: Column of their classes.

    Raises:
        ValueError: If there is no such source, or it holds no image.
        ImportError: If its package is not installed.
    """
    kind, _, name = source.partition("/")
    if kind == "torchvision":
        return _open_torchvision(name, names, root or "data", download)
    if kind == "hfds":
        return _open_hub(name, names, root, image_key, label_key)
    return _open_folder(Path(source), names)


def split_names(source: str) -> tuple[str, ...]:
    """The splits that a source is known to have, for messages."""
    kind, _, name = source.partition("/")
    if kind == "torchvision":
        return TORCHVISION[name].splits
    if kind == "hfds":
        return ()
    known = [name for names in SPLITS.values() for name in names]
    return tuple(name for name in known if Path(source, name).is_dir())


class ReaderImages:
    """The images of one of timm's readers."""

    def __init__(self, reader: Any, labels: list[int]) -> None:
        self.reader = reader
        self.labels = labels
        self.class_names = sorted(reader.class_to_idx, key=reader.class_to_idx.get)

    def load(self, index: int) -> Image.Image:
        with self.reader[index][0] as file:
            return as_rgb(Image.open(file))

    def name(self, index: int) -> str:
        return self.reader.filename(index, absolute=True) or f"image {index}"


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
        return as_rgb(self.data[index][0])

    def name(self, index: int) -> str:
        return self.files[index] if self.files else f"image {index} of {self.title}"


def as_rgb(image: Image.Image) -> Image.Image:
    """The image in 8 bits a channel, red, green and blue.

    Raises:
        ValueError: If it is of other numbers than 8 or 16 bits a channel.
    """
    if image.mode.startswith("I;16"):  # which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("F", "I"):
        raise ValueError(f"expected 8 or 16 bits a channel, got mode {image.mode}")
    return image.convert("RGB")


def why_unreadable(error: Exception) -> str:
    """What is wrong with an image file, whose name stands before; Pillow repeats it."""
    return "no image" if isinstance(error, UnidentifiedImageError) else one_line(error)


def first_attribute(data: Any, *names: str) -> Any:
    return next((vars(data)[name] for name in names if name in vars(data)), None)


def _open_folder(folder: Path, names: tuple[str, ...]) -> Labelled | None:
    if not folder.is_dir():
        raise ValueError(
            f"data.source: expected a folder, torchvision/, hfds/ or wds/, got {folder}"
        )
    root = next((folder / name for name in names if (folder / name).is_dir()), None)
    if root is None and names[0] == "train":  # not divided: all of it
        root = folder
    if root is None:
        return None
    try:
        reader = create_reader("", root=str(root), input_key=";".join(EXTENSIONS))
    except RuntimeError as error:  # no image
        raise ValueError(f"data.source: expected images in {root}/CLASS/, got none") from error
    loose = [path for path, _ in reader.samples if Path(path).parent == root]
    if loose:
        raise ValueError(f"data.source: expected {root}/CLASS/IMAGE, got {loose[0]}")
    if names[0] == "train":
        check_every_class(root, [Path(path) for path, _ in reader.samples])
    return ReaderImages(reader, [label for _, label in reader.samples])


def check_every_class(root: Path, images: list[Path]) -> None:
    """A folder without images among those of the classes raises ValueError."""
    classes = {image.relative_to(root).parts[0] for image in images}
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and folder.name not in classes and not folder.name.startswith("."):
            raise ValueError(f"data.source: expected images in {folder}, got none")


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
        data = chosen.build(os.path.expanduser(root), **options)
    except (RuntimeError, OSError) as error:
        hint = "" if download else "; --data.download true fetches it"
        raise ValueError(f"data.source: no {name} in {root} ({error}){hint}") from error
    return TorchvisionImages(data, f"{split} of torchvision/{name}")


def _open_hub(
    name: str, names: tuple[str, ...], root: str | None, image_key: str, label_key: str
) -> Labelled | None:
    if find_spec("datasets") is None:
        raise ImportError("data.source: hfds/ needs datasets: pip install 'acmix[hf]'")
    for split in names:
        try:
            reader = create_reader(
                f"hfds/{name}",
                root=root,
                split=split,
                input_key=image_key,
                target_key=label_key,
            )
        except (ValueError, KeyError) as error:
            if "split" in str(error):
                continue
            raise ValueError(f"data.source: hfds/{name}: {error}") from error
        if not reader.class_to_idx:
            raise ValueError(f"data.label_key: expected a column of classes, got {label_key!r}")
        labels = list(reader.dataset[label_key])
        if min(labels, default=0) < 0:  # as parts without labels have it
            raise ValueError(f"data.source: expected a class of every image in {split} of {name}")
        return ReaderImages(reader, labels)
    return None
