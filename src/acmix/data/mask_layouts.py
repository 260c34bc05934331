"""How folders hold images and masks: which mask is of which image, and names of the classes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from acmix.data.files import find_images
from acmix.errors import printable

Form = Literal["folders", "ade20k", "voc", "cityscapes"]
FORMS: tuple[str, ...] = get_args(Form)
CLASSES = "classes.txt"
ADE20K_CLASSES = "objectInfo150.txt"  # of its archive: a table whose last column names a class
LISTS = Path("ImageSets", "Segmentation")  # of VOC
PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test",),
}
VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
    *("sheep", "sofa", "train", "tvmonitor"),
)
CITYSCAPES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light"),
    *("traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck"),
    *("bus", "train", "motorcycle", "bicycle"),
)


class Layout(NamedTuple):
    """Folders of images and of masks, and how their files end; "" is any image's suffix."""

    images: str
    masks: str
    image_suffix: str = ""
    mask_suffix: str = ""
    names: tuple[str, ...] = ()


LAYOUTS = {
    "folders": Layout("images", "masks"),
    "ade20k": Layout("images", "annotations"),
    "voc": Layout("JPEGImages", "SegmentationClass", ".jpg", ".png", VOC),
    "cityscapes": Layout(
        *("leftImg8bit", "gtFine", "_leftImg8bit.png", "_gtFine_labelTrainIds.png"), CITYSCAPES
    ),
}


class Pair(NamedTuple):
    """Paths of an image and of its mask."""

    image: str
    mask: str


class Pairs(NamedTuple):
    """Those of a part, and what is said of images without a mask and masks without an image."""

    pairs: list[Pair]
    alone: list[str]


def find_form(root: Path) -> str:
    """The form of a folder.

    Raises:
        ValueError: If it has none of them.
    """
    if not root.is_dir():
        got = f"the file {root}" if root.exists() else str(root)
        raise ValueError(f"data.source: expected a folder, got {_said(got)}")
    for form, layout in LAYOUTS.items():
        if (root / layout.images).is_dir() and (root / layout.masks).is_dir():
            return form
    wanted = "; ".join(f"{of.images}/ and {of.masks}/ ({form})" for form, of in LAYOUTS.items())
    there = ", ".join(sorted(printable(entry.name) for entry in root.iterdir())[:5]) or "nothing"
    raise ValueError(f"data.source: expected {wanted} in {_said(root)}, got {there}")


def find_pairs(
    root: Path,
    form: str,
    part: str,
    split: str | None = None,
    image_suffix: str | None = None,
    mask_suffix: str | None = None,
) -> Pairs | None:
    """Images and masks of a part, in natural order; None where there is no such part.

    Args:
        root: Folder of the data.
        form: One of `FORMS`.
        part: train, val or test.
        split: Name of the part in the folder, if it is none of the usual ones.
        image_suffix: End of an image's name, instead of the form's; what stands before it is the
            same in the mask's name.
        mask_suffix: End of a mask's name.

    Raises:
        ValueError: If a folder that is needed is not there.
    """
    layout = LAYOUTS[form]
    layout = layout._replace(
        image_suffix=layout.image_suffix if image_suffix is None else image_suffix,
        mask_suffix=layout.mask_suffix if mask_suffix is None else mask_suffix,
    )
    images, masks = root / layout.images, root / layout.masks
    for folder in (images, masks):
        if not folder.is_dir():
            raise ValueError(f"data.source: expected a folder, got none at {_said(folder)}")
    names = (split,) if split else PARTS[part]
    if form == "voc":
        return _listed(root, layout, names)
    name = next((name for name in names if (images / name).is_dir()), None)
    if name is None:
        divided = any((images / name).is_dir() for names in PARTS.values() for name in names)
        if part != "train" or divided or split:
            return None
        name = "."  # all of it is for training
    elif not (masks / name).is_dir():
        if part == "test":
            return None
        raise ValueError(
            f"data.source: expected masks of {name} in {_said(masks / name)}, got no folder"
        )
    return _matched(images / name, masks / name, layout)


def _listed(root: Path, layout: Layout, names: tuple[str, ...]) -> Pairs | None:
    """Those that VOC's text files name."""
    file = next((f for name in names if (f := root / LISTS / f"{name}.txt").is_file()), None)
    if file is None:
        return None
    found = Pairs([], [])
    for line in filter(str.strip, file.read_text().splitlines()):
        stem = line.split()[0]
        image = str(root / layout.images / f"{stem}{layout.image_suffix}")
        mask = str(root / layout.masks / f"{stem}{layout.mask_suffix}")
        missing = next((path for path in (image, mask) if not os.path.exists(path)), None)
        if missing is None:
            found.pairs.append(Pair(image, mask))
        else:
            found.alone.append(f"{_said(file)}, {stem}: expected {_said(missing)}, got no file")
    return found


def _matched(images: Path, masks: Path, layout: Layout) -> Pairs:
    """Those whose names are alike before the suffix."""
    of_image = _by_stem(images, layout.image_suffix)
    of_mask = _by_stem(masks, layout.mask_suffix)
    found = Pairs([], [])
    for stem, path in of_image.items():
        if stem in of_mask:
            found.pairs.append(Pair(path, of_mask[stem]))
        else:
            wanted = masks / f"{stem}{layout.mask_suffix or '.png'}"
            found.alone.append(f"{_said(path)}: expected a mask {_said(wanted)}, got no file")
    for stem, path in of_mask.items():
        if stem not in of_image:
            wanted = images / f"{stem}{layout.image_suffix or '.jpg'}"
            found.alone.append(f"{_said(path)}: expected an image {_said(wanted)}, got no file")
    return found


def _by_stem(folder: Path, suffix: str) -> dict[str, str]:
    """Paths of the images below a folder that end so, by what stands before; in natural order."""
    return {
        os.path.relpath(path[: -len(suffix)] if suffix else os.path.splitext(path)[0], folder): path
        for path in find_images(folder).images
        if path.endswith(suffix)
    }


def find_class_names(root: Path, form: str, given: list[str] | None) -> list[str]:
    """Those given, else of a file in the folder, else of the form.

    Raises:
        ValueError: If there are none, fewer than two, or two alike.
    """
    names, where = list(given or LAYOUTS[form].names), "data.classes"
    if not given and (file := root / CLASSES).is_file():
        names, where = [line.strip() for line in _lines(file)], _said(file)
    elif not given and (file := root / ADE20K_CLASSES).is_file():
        names, where = [line.split("\t")[-1].strip() for line in _lines(file)[1:]], _said(file)
    if not names:
        raise ValueError(
            f"data.classes: expected names, or {CLASSES} in {_said(root)} with a name a line, "
            "got neither"
        )
    if len(names) < 2:
        raise ValueError(f"{where}: expected 2 classes or more, got {names}")
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        raise ValueError(f"{where}: expected names of their own, got {twice[0]!r} twice")
    return names


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def _said(path: str | Path) -> str:
    return printable(str(path))
