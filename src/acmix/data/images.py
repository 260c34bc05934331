"""Images with a class each, from one of several sources, cropped and augmented by timm."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal

from PIL.Image import Image
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from acmix.data.base import ClassifiedData
from acmix.data.loading import Sample
from acmix.data.shards import (
    Shards,
    ShardStream,
    make_shard_loader,
    open_shards,
    shard_pictures,
    shard_splits,
)
from acmix.data.sources import (
    SPLITS,
    Labelled,
    as_rgb,
    check_colour,
    locate,
    open_split,
    split_names,
    why_unreadable,
)
from acmix.data.survey import Picture, in_threads
from acmix.errors import printable
from acmix.ranges import (
    Count,
    NonNegative,
    Number,
    Part,
    PartBelowOne,
    Positive,
    PositiveCount,
    PositivePart,
    check_ranges,
)

Transform = Callable[[Image], Tensor]


class Images(ClassifiedData):
    """Colour images with a class each, from one of several sources."""

    leave_out = "max_corrupt"

    def __init__(
        self,
        source: str,
        root: str | None = None,
        download: bool = False,
        train_split: str | None = None,
        val_split: str | None = None,
        test_split: str | None = None,
        val_fraction: PartBelowOne = 0.0,
        split_seed: Count = 0,
        image_key: str | None = None,
        label_key: str | None = None,
        like: str | None = None,
        img_size: PositiveCount | None = None,
        crop_pct: PositivePart | None = None,
        interpolation: Literal["nearest", "bilinear", "bicubic", "random"] | None = None,
        mean: tuple[Number, Number, Number] | None = None,
        std: tuple[Positive, Positive, Positive] | None = None,
        background: str = "white",
        crop_padding: Count = 0,
        scale: tuple[PositivePart, PositivePart] = (0.08, 1.0),
        hflip: Part = 0.5,
        color_jitter: NonNegative = 0.0,
        auto_augment: str | None = None,
        re_prob: Part = 0.0,
        transform_kwargs: dict[str, Any] | None = None,
        max_corrupt: Count = 0,
        shuffle_buffer: Count = 2000,
        batch_size: PositiveCount = 64,
        num_workers: Count = 0,
    ) -> None:
        """Open the source: its classes are known then.

        Args:
            source: A folder with CLASS/IMAGE in it (the class is the first folder, deeper ones
                are looked through), or with train/, val/ and test/ of that form;
                `torchvision/cifar10` and the like; `hfds/NAME` of the Hugging Face hub, or a
                folder that its library reads; `wds/PATH` with WebDataset shards.
            root: Folder of torchvision's files (`data` by default), or of Hugging Face's cache.
            download: Let torchvision download what is not there.
            train_split: Name of the part to learn from; by default train, training or trainval.
            val_split: Name of the held-out part; by default val, valid, validation or eval.
            test_split: Name of the part for `acmix test`; by default test.
            val_fraction: Hold out this part of every class of the training images instead.
            split_seed: Seed of the choice of held-out images; apart from the training seed.
            image_key: Column of the images of a Hugging Face data set, if there are several.
            label_key: Column of their classes, if there are several.
            like: Network of timm whose input size, crop, interpolation, mean and std are the
                defaults; without one 224 pixels, 0.875, bicubic, and those of ImageNet.
            img_size: Height and width in pixels.
            crop_pct: Part of a resized held-out image that its centre crop keeps.
            interpolation: Of resizing; random is bilinear or bicubic in training.
            mean: Of red, green and blue, to normalise with.
            std: Of red, green and blue.
            background: Colour beneath transparent images, a name or #rrggbb.
            crop_padding: Train on crops of the whole image padded by this many pixels, as is the
                custom for CIFAR, and keep held-out images whole; 0 for crops of any size.
            scale: Range of the area of training crops, as a part of the image.
            hflip: Probability of a mirrored training image.
            color_jitter: Strength of colour jitter; timm applies none beside `auto_augment`.
            auto_augment: RandAugment and others as timm spells them, such as rand-m9-mstd0.5-inc1.
            re_prob: Probability of random erasing.
            transform_kwargs: Further arguments of `timm.data.create_transform` in training.
            max_corrupt: Unreadable images that are named and left out of a split; above 0, every
                image is read once before the first step. Shards leave out as they go, and count
                by epoch and process.
            shuffle_buffer: Images among which each process that reads shards shuffles.
            batch_size: Images a step on each device.
            num_workers: Processes that load images; 0 loads in the training process.
        """
        check_ranges(Images.__init__, locals(), "data.")
        if scale[0] > scale[1]:
            raise ValueError(f"data.scale: expected the smaller area first, got {scale}")
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        check_colour(background)
        self.source, self.root = locate(source, root)
        check_effect(self.source, image_key=image_key, label_key=label_key, download=download)
        self.background = background
        self.val_fraction, self.split_seed = val_fraction, split_seed
        self.max_corrupt, self.shuffle_buffer = max_corrupt, shuffle_buffer
        self.open_kwargs: dict[str, Any] = {"root": self.root, "download": download}
        self.open_kwargs |= {"image_key": image_key, "label_key": label_key}
        chosen = {"train": train_split, "val": val_split, "test": test_split}
        self.splits = {part: (name,) if name else SPLITS[part] for part, name in chosen.items()}

        given: dict[str, Any] = {"img_size": img_size, "interpolation": interpolation}
        given |= {"crop_pct": 1.0 if crop_padding and crop_pct is None else crop_pct}
        config = input_config(like, {**given, "mean": mean, "std": std})
        self.input_config = {**config, "background": background}
        self.mean, self.std = config["mean"], config["std"]
        self.eval_transform: Transform = create_transform(**config)
        augmentation = {"scale": scale, "hflip": hflip, "color_jitter": color_jitter or None}
        augmentation |= {"auto_augment": auto_augment, "re_prob": re_prob}
        self.train_transform: Transform = train_transform(
            config, crop_padding, {**augmentation, **(transform_kwargs or {})}
        )

        self.train_images = self._open("train")
        self.class_names = self.train_images.class_names
        self.looks_early = not max_corrupt and not isinstance(self.train_images, Shards)
        if len(self.class_names) < 2:
            raise ValueError(
                f"data.source: expected 2 classes or more in {printable(self.source)}, "
                f"got {self.class_names}"
            )

    def train_set(self) -> Dataset[Sample]:
        if isinstance(self.train_images, Shards):
            return self._stream(self.train_images, train=True)
        train, _ = self._divided(self.train_images)
        return self._image_set(self.train_images, train, self.train_transform)

    def val_set(self) -> Dataset[Sample]:
        if not self.val_fraction:
            return self._whole("val")
        if isinstance(self.train_images, Shards):
            raise ValueError(f"data.val_fraction: expected 0 with wds/, got {self.val_fraction}")
        return self._image_set(
            self.train_images, self._divided(self.train_images)[1], self.eval_transform
        )

    def test_set(self) -> Dataset[Sample] | None:
        return self._whole("test") if self._find("test") else None

    def pictures(self, part: str) -> Iterable[Picture] | None:
        if part == "train" or (part == "val" and self.val_fraction):
            divided = dict(zip(("train", "val"), self._divided(self.train_images), strict=True))
            return pictures_of(self.train_images, divided[part])
        images = self._find("test") if part == "test" else self._open(part)
        if images is None:
            return None
        check_classes(images, self.class_names, part)
        return pictures_of(images, range(count_of(images)))

    def _whole(self, part: str) -> Dataset[Sample]:
        images = self._open(part)
        check_classes(images, self.class_names, part)
        if isinstance(images, Shards):
            return self._stream(images, train=False)
        return self._image_set(images, range(len(images.labels)), self.eval_transform)

    def _open(self, part: str) -> Labelled | Shards:
        if images := self._find(part):
            return images
        there = self._part_names()
        found = ", ".join(map(printable, there)) or "no split of another name"
        raise ValueError(
            f"data.source: expected a split {' or '.join(self.splits[part])} in "
            f"{printable(self.source)}, got {found}; {self._offer(part, there)}"
        )

    def _find(self, part: str) -> Labelled | Shards | None:
        kind, _, path = self.source.partition("/")
        if kind == "wds":
            return open_shards(path, self.splits[part])
        return open_split(self.source, self.splits[part], part == "train", **self.open_kwargs)

    def _part_names(self) -> tuple[str, ...]:
        kind, _, path = self.source.partition("/")
        return shard_splits(path) if kind == "wds" else split_names(self.source, self.root)

    def _offer(self, part: str, there: Sequence[str]) -> str:
        """What to name the part with, and the nearest of the names that are no other part's."""
        others = {name for names in SPLITS.values() for name in names} - set(SPLITS[part])
        free = [name for name in there if name not in others]
        near = [match for name in self.splits[part] for match in get_close_matches(name, free, 1)]
        question = f"did you mean {printable(near[0])}? Name" if near else "name"
        fraction = " or --data.val_fraction 0.1" if part == "val" else ""
        name = f" {shlex.quote(near[0])}" if near else ""
        return f"{question} it with --data.{part}_split{name}{fraction}"

    def _divided(self, images: Labelled | Shards) -> tuple[list[int], list[int]]:
        """Indices (learned from, held out), every class in proportion."""
        if not self.val_fraction or isinstance(images, Shards):
            return list(range(count_of(images))), []
        labels = images.labels
        check_pairs(images)
        from sklearn.model_selection import train_test_split  # half a second

        try:
            train, val = train_test_split(
                range(len(labels)),
                test_size=self.val_fraction,
                random_state=self.split_seed,
                stratify=labels,
            )
        except ValueError as error:
            raise ValueError(
                "data.val_fraction: expected an image of every class in both parts, got "
                f"{self.val_fraction} of {len(labels)} images for {len(set(labels))} classes"
            ) from error
        return sorted(train), sorted(val)

    def _image_set(
        self, images: Labelled, indices: Sequence[int], transform: Transform
    ) -> ImageSet:
        if self.max_corrupt:
            indices = readable(images, indices, self.max_corrupt, self.background)
        return ImageSet(images, indices, self.class_names, transform, self.background)

    def _stream(self, shards: Shards, train: bool) -> ShardStream:
        return ShardStream(
            shards,
            self.class_names,
            self.train_transform if train else self.eval_transform,
            shuffle_buffer=self.shuffle_buffer if train else 0,
            max_corrupt=self.max_corrupt,
            background=self.background,
        )

    def _loader(self, data: Dataset[Sample], train: bool = False) -> Any:
        if isinstance(data, ShardStream):
            return make_shard_loader(data, train=train, **self.loader_options())
        return super()._loader(data, train)


class ImageSet(Dataset[Sample]):
    """Images (3, H, W) of some indices of a source, with classes by the order of `class_names`."""

    def __init__(
        self,
        images: Labelled,
        indices: Sequence[int],
        class_names: list[str],
        transform: Transform,
        background: str,
    ) -> None:
        places = [class_names.index(name) for name in images.class_names]
        self.images, self.indices = images, indices
        self.transform, self.background = transform, background
        self.classes = [places[images.labels[index]] for index in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.images.name(self.indices[index])

    def __getitem__(self, index: int) -> Sample:
        image = load(self.images, self.indices[index], self.background)
        return self.transform(image), self.classes[index]


def check_effect(source: str, **options: Any) -> None:
    """ValueError for an option that only another kind of source takes."""
    of = {"image_key": "hfds", "label_key": "hfds", "download": "torchvision"}
    for name, value in options.items():
        if value and source.partition("/")[0] != of[name]:
            raise ValueError(
                f"data.{name}: expected with data.source {of[name]}/NAME, got {printable(source)}"
            )


def check_classes(images: Labelled | Shards, names: list[str], part: str) -> None:
    """ValueError for a class of a part that training does not have."""
    unknown = sorted(set(images.class_names) - set(names))
    if unknown:
        raise ValueError(
            f"data.source: expected the classes of training in {part}, got {unknown[0]!r} too"
        )


def count_of(images: Labelled | Shards) -> int:
    return sum(images.lengths) if isinstance(images, Shards) else len(images.labels)


def pictures_of(images: Labelled | Shards, indices: Sequence[int]) -> Iterator[Picture]:
    """Images to look at, of some indices; of shards all."""
    if isinstance(images, Shards):
        yield from shard_pictures(images)
        return
    for index in indices:
        classes = (images.class_names[images.labels[index]],)
        yield Picture(images.name(index), classes, partial(images.load, index))


def check_pairs(images: Labelled) -> None:
    """ValueError for a class of one image, of which none can be held out."""
    for label, count in Counter(images.labels).items():
        if count < 2:
            only = images.name(images.labels.index(label))
            raise ValueError(
                "data.val_fraction: expected 2 images or more of every class, got 1 of "
                f"{images.class_names[label]!r} ({only})"
            )


def load(images: Labelled, index: int, background: str) -> Image:
    """One image.

    Raises:
        ValueError: If it cannot be read; the message names it.
    """
    try:
        return as_rgb(images.load(index), background)
    except Exception as error:  # of a broken file, Pillow raises anything
        raise ValueError(
            f"data.source: cannot read {images.name(index)}: {why_unreadable(error)}"
        ) from error


def readable(images: Labelled, indices: Sequence[int], limit: int, background: str) -> list[int]:
    """The indices of images that can be read; the others are named.

    Raises:
        ValueError: If more than `limit` cannot.
    """

    def complaint(index: int) -> str | None:
        try:
            load(images, index, background)
        except ValueError as error:
            return str(error)
        return None

    good, bad = [], 0
    for index, said in zip(indices, in_threads(complaint, indices), strict=True):
        if said is None:
            good.append(index)
            continue
        bad += 1
        if bad > limit:
            raise ValueError(f"{said} (data.max_corrupt: expected {limit} at most)")
        print(f"skipped {bad} of at most {limit}: {said}", file=sys.stderr)
    return good


def input_config(like: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Size, crop, interpolation, mean and std: those given, else of a network, else timm's."""
    pretrained = get_pretrained_cfg(like) if like else None
    if like and pretrained is None:
        raise ValueError(f"data.like: expected a network with settings in timm, got {like!r}")
    return resolve_data_config(given, pretrained.to_dict() if pretrained else {})


def train_transform(
    config: dict[str, Any], crop_padding: int, augmentation: dict[str, Any]
) -> Transform:
    try:
        parts = create_transform(**{**config, **augmentation}, is_training=True, separate=True)
    except (TypeError, AssertionError, KeyError) as error:
        kind = augmentation["auto_augment"]
        raise ValueError(
            "data.auto_augment, data.transform_kwargs: expected what timm.data.create_transform "
            f"takes, got {kind!r} ({error or type(error).__name__})"
        ) from error
    crop, colours, tensor = parts
    if crop_padding:
        size = config["input_size"][-2:]
        resize = transforms.Resize(size, transforms.InterpolationMode(config["interpolation"]))
        flip = transforms.RandomHorizontalFlip(augmentation["hflip"])
        crop = transforms.Compose([resize, transforms.RandomCrop(size, crop_padding), flip])
    return transforms.Compose([crop, colours, tensor])
