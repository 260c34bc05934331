"""The 1,797 handwritten digits (8 x 8 pixels) that scikit-learn ships: real data, no download.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from acmix.data.base import ClassifiedData, Sample
from acmix.data.survey import Picture
from acmix.ranges import Count, PositiveCount, PositivePartBelowOne, check_ranges


class Digits(ClassifiedData):
    """Handwritten digits 0 to 9, one channel of 8 x 8; a stratified part is held out."""

    in_chans: ClassVar[int] = 1
    mean: tuple[float, ...] = (0.305,)
    std: tuple[float, ...] = (0.376,)

    def __init__(
        self,
        val_fraction: PositivePartBelowOne = 0.2,
        split_seed: Count = 0,
        max_shift: Count = 1,
        batch_size: PositiveCount = 64,
        num_workers: Count = 0,
    ) -> None:
        """Keep the options.

        Args:
            val_fraction: Part of every class that is held out.
            split_seed: Seed of the choice of held-out images; apart from the training seed, so
                that runs with different seeds are measured on the same images.
            max_shift: Training images are moved by up to this many pixels each way.
            batch_size: Images a step on each device.
            num_workers: Processes that load images; 0 loads in the training process.
        """
        check_ranges(Digits.__init__, locals(), "data.")
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        self.class_names = [str(digit) for digit in range(10)]
        self.input_config = {"input_size": (1, 8, 8), "crop_pct": 1.0, "interpolation": "bicubic"}
        self.input_config |= {"mean": self.mean, "std": self.std}
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.max_shift = max_shift

    def train_set(self) -> Dataset[Sample]:
        return DigitImages(*self._split()[0], max_shift=self.max_shift)

    def val_set(self) -> Dataset[Sample]:
        return DigitImages(*self._split()[1])

    def pictures(self, part: str) -> Iterable[Picture] | None:
        parts = dict(zip(("train", "val"), self._split(), strict=True))
        return self._pictures(part, *parts[part]) if part in parts else None

    def _pictures(self, part: str, images: Tensor, classes: Tensor) -> Iterator[Picture]:
        pixels = self.to_pixels(images).mul(255).round().byte().squeeze(1).numpy()
        for index, label in enumerate(classes.tolist()):
            name = f"image {index} of {part}"
            yield Picture(name, (self.class_names[label],), partial(Image.fromarray, pixels[index]))

    def _split(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """((training images, classes), (held-out images, classes)), images (B, 1, 8, 8)."""
        from sklearn.datasets import load_digits  # half a second, which no other command needs
        from sklearn.model_selection import train_test_split

        pixels, classes = load_digits(return_X_y=True)
        train, val = train_test_split(
            range(len(classes)),
            test_size=self.val_fraction,
            random_state=self.split_seed,
            stratify=classes,
        )
        images = (torch.from_numpy(pixels / 16).float() - self.mean[0]) / self.std[0]
        images, labels = images.view(-1, 1, 8, 8), torch.from_numpy(classes)
        return (images[train], labels[train]), (images[val], labels[val])


class DigitImages(Dataset[Sample]):
    """Images (B, 1, H, W) and classes (B,), each image moved at random by up to `max_shift`."""

    def __init__(self, images: Tensor, classes: Tensor, max_shift: int = 0) -> None:
        background = images.amin()
        self.height, self.width = images.shape[-2:]
        self.images = F.pad(images, (max_shift,) * 4, value=float(background))
        self.classes = classes.tolist()
        self.max_shift = max_shift

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> Sample:
        top, left = torch.randint(0, 2 * self.max_shift + 1, (2,)).tolist()
        image = self.images[index, :, top : top + self.height, left : left + self.width]
        return image, self.classes[index]
