"""Where labelled images come from: a folder, torchvision, or the Hugging Face hub.

A source is named as in timm: the path of a folder, `torchvision/NAME` or `hfds/NAME`.
"""

from __future__ import annotations

import io
import os
import sys
import unicodedata
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageColor, UnidentifiedImageError
from torchvision import datasets

from acmix.data.files import find_images, is_left_behind, natural_key, suffixes
from acmix.errors import did_you_mean, few, one_line

SPLITS = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "eval"),
    "test": ("test",),
}
KINDS = "a folder, torchvision/NAME, hfds/NAME or wds/PATH"


class Labelled(Protocol):
    """Images, each with a class; `open` may raise anything where a file is broken."""

    class_names: list[str]
    labels: list[int]

    def open(self, index: int) -> Image.Image: ...

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


def resolve(source: str) -> str:
    """The source by its whole path, ~ and the working folder in place, so that it lasts.

    Raises:
        ValueError: If it is empty.
    """
    if not source.strip():
        raise ValueError(f"data.source: expected {KINDS}, got {source!r}")
    kind, _, name = source.partition("/")
    if kind == "torchvision" or Path(source).is_dir():
        return source if kind == "torchvision" else str(Path(source).resolve())
    if kind not in ("hfds", "wds"):
        return str(Path(source).expanduser().resolve())
    path = Path(name).expanduser()
    return f"{kind}/{path.resolve()}" if path.exists() else source


def open_split(
    source: str,
    names: tuple[str, ...],
    root: str | None = None,
    download: bool = False,
    image_key: str | None = None,
    label_key: str | None = None,
) -> Labelled | None:
    """The first split of `names` that the source has, or None.

    Args:
        source: Path of a folder, `torchvision/NAME` or `hfds/NAME`.
        names: Of the split, in order of preference.
        root: Folder of torchvision's files (`data` by default), or of the cache of Hugging Face.
        download: Let torchvision download what is not there.
        image_key: Column of the images of a Hugging Face data set; by default the one of images.
        label_key: Column of their classes; by default the one of classes.

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
    """The splits that a source has, as far as that shows, for messages."""
    kind, _, name = source.partition("/")
    if kind == "torchvision":
        return TORCHVISION[name].splits
    if kind in ("hfds", "wds"):
        return ()
    folders = (path.name for path in Path(source).iterdir() if path.is_dir())
    return tuple(sorted((n for n in folders if not is_left_behind(n)), key=natural_key))


class FolderImages:
    """CLASS/.../IMAGE of a folder: the class is the first folder, whatever lies between."""

    def __init__(self, root: Path, files: Sequence[Path]) -> None:
        self.files = list(files)
        folders = [file.relative_to(root).parts[0] for file in files]
        self.class_names = class_names_of(root, folders)
        places = {name: place for place, name in enumerate(self.class_names)}
        self.labels = [places[normal(folder)] for folder in folders]

    def open(self, index: int) -> Image.Image:
        return Image.open(self.files[index])

    def name(self, index: int) -> str:
        return str(self.files[index])


def normal(name: str) -> str:
    """One spelling of a name: disks of macOS take accents apart."""
    return unicodedata.normalize("NFC", name)


def class_names_of(root: Path, folders: Sequence[str]) -> list[str]:
    """Names of the classes of these folders, in the one order that there is of them.

    Raises:
        ValueError: If two folders differ only in how their accents are spelt.
    """
    spelt: dict[str, str] = {}
    for folder in sorted(set(folders)):
        if (other := spelt.setdefault(normal(folder), folder)) != folder:
            raise ValueError(
                f"data.source: expected one folder a class in {root}, got two spellings of "
                f"{normal(folder)!r}: {other!a} and {folder!a}"
            )
    return sorted(spelt, key=natural_key)


class HubImages:
    """The images of a Hugging Face data set, by its columns of images and classes."""

    def __init__(self, data: Any, title: str, image_key: str | None, label_key: str | None) -> None:
        from datasets import ClassLabel, Image

        image = column(data, "image_key", image_key, Image)
        label = column(data, "label_key", label_key, ClassLabel)
        self.title, self.image_key = title, image
        self.class_names = list(data.features[label].names)
        self.labels = [-1 if value is None else int(value) for value in data[label]]
        if min(self.labels, default=0) < 0:  # as parts without labels have it
            at = self.labels.index(-1)
            raise ValueError(
                f"data.source: expected a class of every image, got none of {at} of {title}"
            )
        self.data = data.select_columns([image]).cast_column(image, Image(decode=False))

    def open(self, index: int) -> Image.Image:
        cell = self.data[index][self.image_key]
        if cell is None:
            raise ValueError("no image (null)")
        return Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"])

    def name(self, index: int) -> str:
        cell = self.data[index][self.image_key]
        return (cell and cell["path"]) or f"image {index} of {self.title}"


def column(data: Any, option: str, chosen: str | None, kind: type) -> str:
    """The named column of this kind, or the only one.

    Raises:
        ValueError: With the columns that there are.
    """
    of_kind = [name for name, feature in data.features.items() if isinstance(feature, kind)]
    if chosen is None and len(of_kind) == 1:
        return of_kind[0]
    if chosen in of_kind:
        return str(chosen)
    there = ", ".join(f"{name} ({type(of).__name__})" for name, of in data.features.items())
    what = "no name" if chosen is None else repr(chosen)
    raise ValueError(
        f"data.{option}: expected a column of type {kind.__name__}, got {what}; there are {there}"
    )


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

    def open(self, index: int) -> Image.Image:
        return self.data[index][0]

    def name(self, index: int) -> str:
        return self.files[index] if self.files else f"image {index} of {self.title}"


def as_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """The image in 8 bits a channel, red, green and blue; what is transparent, on a background.

    Raises:
        ValueError: If it is of other numbers than 8 or 16 bits a channel.
    """
    if image.mode == "I":  # as Pillow reads some files of 16 bits
        values = np.asarray(image)
        if 0 <= values.min() <= values.max() < 1 << 16:
            image = Image.fromarray(values.astype(np.uint16))
    if image.mode.startswith("I;16"):  # which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("F", "I"):
        raise ValueError(f"expected 8 or 16 bits a channel, got mode {image.mode}")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, background)
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def check_colour(name: str) -> str:
    """The name of a colour, or its #rrggbb; anything else raises ValueError."""
    try:
        ImageColor.getrgb(name)
    except ValueError as error:
        raise ValueError(
            f"data.background: expected a colour such as white or #ff8800, got {name!r}"
        ) from error
    return name


def why_unreadable(error: Exception) -> str:
    """What is wrong with an image file, whose name stands before; Pillow repeats it."""
    return "no image" if isinstance(error, UnidentifiedImageError) else one_line(error)


def first_attribute(data: Any, *names: str) -> Any:
    return next((vars(data)[name] for name in names if name in vars(data)), None)


def _open_folder(folder: Path, names: tuple[str, ...]) -> Labelled | None:
    if not folder.is_dir():
        what = "a file: " if folder.is_file() else ""
        raise ValueError(f"data.source: expected {KINDS}, got {what}{folder}")
    root = part_folder(folder, names)
    if root is None and names[0] == "train":  # not divided: all of it
        root = folder
        check_undivided(folder)
    if root is None:
        return None
    try:
        found = find_images(root)
    except OSError as error:
        raise ValueError(f"data.source: {one_line(error)}") from error
    if not found.images:
        raise ValueError(
            f"data.source: expected images in {root}/CLASS/ ({' '.join(sorted(suffixes()))}), "
            f"got none; {found.passed_over() or 'no file'}"
        )
    if said := found.passed_over():
        print(f"{root}: {said}", file=sys.stderr)
    loose = [path for path in found.images if path.parent == root]
    if loose:
        raise ValueError(f"data.source: expected {root}/CLASS/IMAGE, got {loose[0]}")
    if names[0] == "train":
        check_every_class(root, found.images)
    return FolderImages(root, found.images)


def part_folder(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The folder of a part by the first of its names that is there, in capitals or not."""
    there = {path.name: path for path in folder.iterdir() if path.is_dir()}
    for name in names:
        if name in there:
            return there[name]
        for other in sorted(there):
            if other.lower() == name.lower():
                return there[other]
    return folder / names[0] if len(names) == 1 and (folder / names[0]).is_dir() else None


def check_undivided(folder: Path) -> None:
    """A folder of classes that holds a part to be held out: no part to learn from was found."""
    for part in ("val", "test"):
        if there := part_folder(folder, SPLITS[part]):
            raise ValueError(
                f"data.source: expected {' or '.join(SPLITS['train'])} beside {there}, got "
                f"{few(split_names(str(folder)))}; name one with --data.train_split"
            )


def check_every_class(root: Path, images: list[Path]) -> None:
    """A folder without images among those of the classes raises ValueError."""
    classes = {image.relative_to(root).parts[0] for image in images}
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and folder.name not in classes and not is_left_behind(folder.name):
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
    name: str,
    names: tuple[str, ...],
    root: str | None,
    image_key: str | None,
    label_key: str | None,
) -> Labelled | None:
    if find_spec("datasets") is None:
        raise ImportError("data.source: hfds/ needs datasets: pip install 'acmix[hf]'")
    from datasets import load_dataset

    for split in names:
        try:
            data = load_dataset(name, split=split, cache_dir=root)
        except (ValueError, KeyError) as error:
            if "split" in str(error):
                continue
            raise ValueError(f"data.source: hfds/{name}: {one_line(error)}") from error
        return HubImages(data, f"{split} of hfds/{name}", image_key, label_key)
    return None
