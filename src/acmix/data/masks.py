"""Images with a class for every pixel, in masks: pairs of files in one of several layouts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from acmix.data.base import SegmentationData
from acmix.data.loading import Sample
from acmix.data.mask_layouts import (
    FORMS,
    PARTS,
    Form,
    Pair,
    Pairs,
    find_class_names,
    find_form,
    find_pairs,
)
from acmix.data.mask_transforms import Normalise, Resized, Training
from acmix.data.sources import absolute, as_rgb, check_colour, why_unreadable
from acmix.data.survey import Picture, in_threads
from acmix.errors import few, printable
from acmix.ranges import (
    Count,
    Number,
    Part,
    PartBelowOne,
    Positive,
    PositiveCount,
    PositivePart,
    check_ranges,
)

Transform = Callable[[Image.Image, np.ndarray], Sample]
CODES = 1 << 16  # of 16 bits
NO_CLASS = -1
LOOKING = 5.0  # seconds, in which masks are looked at before the first step
ONE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")


class Masks(SegmentationData):
    """Colour images with a class for every pixel: pairs of an image and a mask of its size."""

    def __init__(
        self,
        source: str,
        form: Form | None = None,
        train_split: str | None = None,
        val_split: str | None = None,
        test_split: str | None = None,
        val_fraction: PartBelowOne = 0.0,
        split_seed: Count = 0,
        image_suffix: str | None = None,
        mask_suffix: str | None = None,
        classes: list[str] | None = None,
        ignore_index: Count = 255,
        reduce_zero_label: bool | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        resize: PositiveCount = 512,
        scale: tuple[Positive, Positive] = (0.5, 2.0),
        crop: PositiveCount | tuple[PositiveCount, PositiveCount] = 512,
        class_share: PositivePart = 0.75,
        hflip: Part = 0.5,
        distortion: Part = 0.5,
        test_size: PositiveCount | None = None,
        mean: tuple[Number, Number, Number] = (0.485, 0.456, 0.406),
        std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225),
        background: str = "white",
        batch_size: PositiveCount = 16,
        num_workers: Count = 0,
    ) -> None:
        """Find the training pairs: the classes are known then.

        Args:
            source: Folder of images and masks. A mask is a file of one channel, of 8 or 16 bits or
                with a palette, that holds the number of a class at every pixel.
            form: Of the folder: images/PART and masks/PART (folders); ADE20K's (ade20k); Pascal
                VOC's (voc); Cityscapes' (cityscapes). By default that which its folders tell.
            train_split: Name of the part to learn from; by default train or training.
            val_split: Name of the held-out part; by default val, valid or validation.
            test_split: Name of the part for `acmix test`; by default test.
            val_fraction: Hold out this part of the training images instead.
            split_seed: Seed of the choice of held-out images; apart from the training seed.
            image_suffix: End of the name of an image; what stands before it is the same in the
                name of the mask. By default that of the form, or any suffix of an image.
            mask_suffix: End of the name of a mask.
            classes: Names of the classes, in the order of their numbers; by default the lines of
                classes.txt, or those of the form.
            ignore_index: Number in the masks of pixels that are neither learned nor measured; a
                class of this number is not either.
            reduce_zero_label: Whether 0 in a mask is such a pixel too, and 1 the first class; by
                default of ADE20K.
            on_error: What becomes of pairs that cannot be used: raise ends the run with the name
                of the first; skip reads every pair once before the first step, leaves them out and
                counts them.
            resize: Shorter side of training images in pixels, before `scale`.
            scale: Range of a random factor of that size.
            crop: Height and width of training images in pixels, one number or both; smaller ones
                are padded with pixels of no class.
            class_share: The most of the labelled pixels of a crop that may be of one class: up to
                ten crops are tried.
            hflip: Probability of a mirrored training image.
            distortion: Probability of each of a change of brightness, contrast, saturation, hue.
            test_size: Shorter side of held-out images as the network sees them; by default that of
                `resize`. They are measured at the size of their masks.
            mean: Of red, green and blue, to normalise with.
            std: Of red, green and blue.
            background: Colour beneath transparent images, a name or #rrggbb.
            batch_size: Images a step on each device.
            num_workers: Processes that load images; 0 loads in the training process.
        """
        check_ranges(Masks.__init__, locals(), "data.")
        if scale[0] > scale[1]:
            raise ValueError(f"data.scale: expected the smaller factor first, got {scale}")
        if form is not None and form not in FORMS:
            raise ValueError(f"data.form: expected one of {', '.join(FORMS)}, got {form!r}")
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        check_colour(background)
        self.source, self.mean, self.std, self.background = absolute(source), mean, std, background
        self.form = form or find_form(Path(self.source))
        self.splits = {"train": train_split, "val": val_split, "test": test_split}
        self.suffixes = image_suffix, mask_suffix
        self.val_fraction, self.split_seed, self.on_error = val_fraction, split_seed, on_error
        self.looks_early = on_error == "raise"
        self.class_names = find_class_names(Path(self.source), self.form, classes)
        self.ignore_index = ignore_index
        reduce = self.form == "ade20k" if reduce_zero_label is None else reduce_zero_label
        self.coding = coding(len(self.class_names), ignore_index, reduce)

        normalise = Normalise(mean, std)
        crop = (crop, crop) if isinstance(crop, int) else crop
        self.train_transform: Transform = Training(
            resize, scale, crop, class_share, hflip, distortion, normalise, ignore_index
        )
        self.test_size = test_size or resize
        self.eval_transform: Transform = Resized(self.test_size, normalise)
        self.input_config = {
            "test_size": self.test_size,
            "mean": mean,
            "std": std,
            "background": background,
        }
        self._usable: dict[str, list[Pair]] = {}
        self._pairs("train")

    def train_set(self) -> Dataset[Sample]:
        return self._set("train", self.train_transform)

    def val_set(self) -> Dataset[Sample]:
        return self._set("val", self.eval_transform)

    def test_set(self) -> Dataset[Sample] | None:
        return self._set("test", self.eval_transform) if self._find("test") else None

    def pictures(self, part: str) -> Iterable[Picture] | None:
        if part == "test" and not self._find("test"):
            return None
        return self._pictures(self._pairs(part).pairs)

    def faults(self, part: str) -> list[str]:
        if part == "test" and not self._find("test"):
            return []
        pairs, alone = self._pairs(part)
        return [*alone, *filter(None, in_threads(self._fault_of_mask, pairs))]

    def class_counts(self) -> list[int]:
        counts = np.zeros(len(self.class_names), np.int64)
        for mask in in_threads(self.load_mask, self._usable_pairs("train")):
            counts += np.bincount(mask[self._labelled(mask)], minlength=len(counts))
        return counts.tolist()

    def load(self, pair: Pair) -> tuple[Image.Image, np.ndarray]:
        """An image in RGB, and its mask (H, W), of classes or `ignore_index`.

        Raises:
            ValueError: If one cannot be used; the message names it.
        """
        return self.load_image(pair), self.load_mask(pair)

    def load_image(self, pair: Pair) -> Image.Image:
        try:
            return as_rgb(open_image(pair.image), self.background)
        except Exception as error:  # of a broken file, Pillow raises anything
            raise ValueError(
                f"cannot read {printable(pair.image)}: {why_unreadable(error)}"
            ) from error

    def load_mask(self, pair: Pair) -> np.ndarray:
        name = printable(pair.mask)
        try:
            codes = read_codes(pair.mask)
        except Exception as error:
            raise ValueError(f"cannot read {name}: {why_unreadable(error)}") from error
        size = size_of(pair.image)
        if size and size != (codes.shape[1], codes.shape[0]):
            raise ValueError(
                f"{name}: expected the size of its image, {size[0]} x {size[1]}, "
                f"got {codes.shape[1]} x {codes.shape[0]}"
            )
        mask = self.coding[codes]
        if (mask == NO_CLASS).any():
            raise ValueError(f"{name}: expected {self._known()}, got {self._unknown(codes, mask)}")
        return mask

    def _known(self) -> str:
        first = int(np.flatnonzero(self.coding == 0)[0])
        last = first + len(self.class_names) - 1
        ignored = few(np.flatnonzero(self.coding == self.ignore_index))
        return f"{first} to {last} of the {len(self.class_names)} classes named, or {ignored}"

    def _unknown(self, codes: np.ndarray, mask: np.ndarray) -> str:
        values, counts = np.unique(codes[mask == NO_CLASS], return_counts=True)
        return few(
            f"{value} in {'1 pixel' if count == 1 else f'{count:,} pixels'}"
            for value, count in zip(values, counts, strict=True)
        )

    def _labelled(self, mask: np.ndarray) -> np.ndarray:
        return mask != self.ignore_index

    def _fault_of_mask(self, pair: Pair) -> str | None:
        try:
            self.load_mask(pair)
        except ValueError as error:
            return str(error)
        return None

    def _fault(self, pair: Pair) -> str | None:
        try:
            self.load(pair)
        except ValueError as error:
            return str(error)
        return None

    def _pictures(self, pairs: Sequence[Pair]) -> Iterator[Picture]:
        for pair in pairs:
            yield Picture(
                printable(pair.image), self._classes_in(pair), partial(open_image, pair.image)
            )

    def _classes_in(self, pair: Pair) -> tuple[str, ...]:
        """Names of the classes of its pixels; none where the mask cannot be used, see `faults`."""
        try:
            mask = self.load_mask(pair)
        except ValueError:
            return ()
        there = np.bincount(mask[self._labelled(mask)], minlength=len(self.class_names))
        return tuple(self.class_names[index] for index in np.flatnonzero(there))

    def _find(self, part: str) -> Pairs | None:
        return find_pairs(Path(self.source), self.form, part, self.splits[part], *self.suffixes)

    def _pairs(self, part: str) -> Pairs:
        """Of a part that must be there, with an image or more."""
        of_training = part == "train" or (part == "val" and self.val_fraction > 0)
        found = self._find("train" if of_training else part)
        split = self.splits[part] or " or ".join(PARTS[part])
        if found is None:
            offer = ", or --data.val_fraction 0.1" if part == "val" else ""
            raise ValueError(
                f"data.source: expected a part {split} in {printable(self.source)}, got none "
                f"(--data.{part}_split names it{offer})"
            )
        if of_training and self.val_fraction:
            found = self._divided(found, part)
        if not found.pairs and not found.alone:
            raise ValueError(
                f"data.source: expected images of {split} in {printable(self.source)}, got none"
            )
        return found

    def _divided(self, found: Pairs, part: str) -> Pairs:
        """The share of a part in the training images."""
        count = len(found.pairs)
        held_out = max(1, round(count * self.val_fraction))
        if held_out >= count:
            raise ValueError(
                "data.val_fraction: expected images in both parts, got "
                f"{self.val_fraction} of {count}"
            )
        order = np.random.default_rng(self.split_seed).permutation(count)
        chosen = order[:held_out] if part == "val" else order[held_out:]
        alone = found.alone if part == "train" else []
        return Pairs([found.pairs[place] for place in sorted(chosen)], alone)

    def _set(self, part: str, transform: Transform) -> MaskSet:
        return MaskSet(self._usable_pairs(part), self.load, transform)

    def _usable_pairs(self, part: str) -> list[Pair]:
        if part not in self._usable:
            pairs, alone = self._pairs(part)
            if self.on_error == "skip":
                pairs = self._without_faults(part, pairs, alone)
            elif fault := next(iter(alone), None) or self._early_fault(pairs):
                raise ValueError(
                    f"data.source: {fault} (acmix check names all, --data.on_error skip goes on "
                    "without them)"
                )
            self._usable[part] = pairs
        return self._usable[part]

    def _early_fault(self, pairs: list[Pair]) -> str | None:
        """The first that is found within seconds; others end a run when they are come upon."""
        end = time.monotonic() + LOOKING
        for fault in in_threads(self._fault_of_mask, pairs):
            if fault or time.monotonic() > end:
                return fault
        return None

    def _without_faults(self, part: str, pairs: list[Pair], alone: list[str]) -> list[Pair]:
        said = list(in_threads(self._fault, pairs))
        if left_out := [*alone, *filter(None, said)]:
            of = f"{len(left_out)} of {len(pairs) + len(alone)} in {part}"
            print(f"data.source: left out {of}, such as {left_out[0]}", file=sys.stderr)
        if all(said):
            raise ValueError(f"data.source: expected images of {part} that can be used, got none")
        return [pair for pair, fault in zip(pairs, said, strict=True) if fault is None]


class MaskSet(Dataset[Sample]):
    """Images and masks of some pairs."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        load: Callable[[Pair], tuple[Image.Image, np.ndarray]],
        transform: Transform,
    ) -> None:
        self.pairs, self.load, self.transform = pairs, load, transform

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return printable(self.pairs[index].image)

    def __getitem__(self, index: int) -> Sample:
        try:
            image, mask = self.load(self.pairs[index])
        except ValueError as error:
            raise ValueError(f"data.source: {error}") from error
        return self.transform(image, mask)


def coding(classes: int, ignore_index: int, reduce_zero_label: bool) -> np.ndarray:
    """Number in a mask -> index of the class, `ignore_index`, or NO_CLASS for any other.

    Raises:
        ValueError: If a class would have the index of ignored pixels.
    """
    if ignore_index >= CODES:
        raise ValueError(f"data.ignore_index: expected below {CODES}, got {ignore_index}")
    if reduce_zero_label and ignore_index < classes:
        raise ValueError(
            f"data.ignore_index: expected {classes} or more with data.reduce_zero_label, as "
            f"there are {classes} classes, got {ignore_index}"
        )
    codes = np.full(CODES, NO_CLASS, np.int32)
    first = int(reduce_zero_label)
    codes[first : first + classes] = range(classes)
    codes[ignore_index] = ignore_index
    if reduce_zero_label:
        codes[0] = ignore_index
    return codes


def open_image(path: str) -> Image.Image:
    with open(path, "rb") as file:
        image = Image.open(file)
        image.load()
    return image


def size_of(path: str) -> tuple[int, int] | None:
    """Width and height, by the head of the file; None where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return Image.open(file).size
    except Exception:  # of a broken file, Pillow raises anything
        return None


def read_codes(path: str) -> np.ndarray:
    """The numbers in a mask, (H, W).

    Raises:
        ValueError: If it holds colours, or numbers of more than 16 bits.
    """
    image = open_image(path)
    if image.mode not in ONE_CHANNEL:
        raise ValueError(
            "expected numbers of classes, in one channel of 8 or 16 bits or with a palette, "
            f"got colours ({image.mode})"
        )
    codes = np.asarray(image)
    if codes.dtype == bool:
        return codes.astype(np.uint8)
    if codes.size and not 0 <= codes.min() <= codes.max() < CODES:
        raise ValueError(
            f"expected numbers from 0 to {CODES - 1}, got {codes.min()} to {codes.max()}"
        )
    return codes
