"""Images of a Hugging Face data set: of the hub, or of a local folder that `datasets` reads."""

from __future__ import annotations

import io
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from PIL import Image

from acmix.errors import one_line, printable


class HubImages:
    """One split of a Hugging Face data set."""

    def __init__(self, data: Any, image_key: str, label_key: str, title: str) -> None:
        self.data, self.image_key, self.title = data, image_key, title
        self.class_names: list[str] = list(data.features[label_key].names)
        self.labels: list[int] = list(data[label_key])

    def load(self, index: int) -> Image.Image:
        value = self.data[index][self.image_key]
        if value is None:
            raise ValueError("no image in its row")
        with io.BytesIO(value["bytes"]) if value["bytes"] else open(value["path"], "rb") as file:
            image = Image.open(file)
            image.load()
        return image

    def name(self, index: int) -> str:
        value = self.data[index][self.image_key]
        path = value and value["path"]
        return printable(path) if path else f"image {index} of {self.title}"


def open_hub(
    name: str,
    names: tuple[str, ...],
    root: str | None,
    image_key: str | None,
    label_key: str | None,
) -> HubImages | None:
    """The first split of `names`, or None. Without keys, the columns are found by their kinds.

    Raises:
        ValueError: If there is no such data set, or no column of images or of classes.
        ImportError: If `datasets` is not installed.
    """
    if find_spec("datasets") is None:
        raise ImportError("data.source: hfds/ needs datasets: pip install 'acmix[hf]'")
    datasets: Any = import_module("datasets")  # which has no types
    for split in names:
        try:
            data = datasets.load_dataset(name, split=split, cache_dir=root)
        except Exception as error:  # of the network, the hub, or the files
            if isinstance(error, ValueError) and "split" in str(error):
                continue
            raise ValueError(f"data.source: hfds/{name}: {one_line(error)}") from error
        return _with_columns(data, image_key, label_key, f"{split} of hfds/{name}")
    return None


def _with_columns(data: Any, image_key: str | None, label_key: str | None, title: str) -> HubImages:
    datasets: Any = import_module("datasets")
    label = find_column(data.features, datasets.ClassLabel, "label", label_key, title)
    if image_key and image_key in data.features:  # which may be cast, such as one of paths
        image = image_key
    else:
        image = find_column(data.features, datasets.Image, "image", image_key, title)
    try:
        data = data.cast_column(image, datasets.Image(decode=False))
    except Exception as error:  # of Arrow's many
        why = one_line(error)
        raise ValueError(
            f"data.image_key: expected a column of images in {title}, got {image!r} ({why})"
        ) from error
    images = HubImages(data, image, label, title)
    for index, number in enumerate(images.labels):
        if number is None or number < 0:  # as parts without labels have it
            raise ValueError(
                f"data.source: expected a class of every image in {title}, got none of {index}"
            )
    return images


def hub_splits(name: str, root: str | None) -> tuple[str, ...]:
    """The splits that a data set has, for messages; none where they cannot be learnt."""
    try:
        return tuple(import_module("datasets").get_dataset_split_names(name, cache_dir=root))
    except Exception:  # of the network, the hub, or the files
        return ()


def find_column(features: Any, kind: type, usual: str, chosen: str | None, title: str) -> str:
    """The chosen column, or the only one of a kind, or among several that of the usual name.

    Raises:
        ValueError: If there is none, or the chosen one is of another kind.
    """
    fitting = [name for name, feature in features.items() if isinstance(feature, kind)]
    wanted = chosen or (fitting[0] if len(fitting) == 1 else usual)
    if wanted in fitting:
        return wanted
    there = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
    raise ValueError(
        f"data.{usual}_key: expected a column of {kind.__name__} in {title}, "
        f"got {repr(chosen) if chosen else f'{len(fitting)} of them'} among {there}"
    )
