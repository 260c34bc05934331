"""What every kind of data gives: sets of images, the class names, and loaders around them."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from acmix.data.loading import Sample, make_loader
from acmix.data.survey import Picture
from acmix.ranges import Count, PositiveCount, check_ranges


class ImageData(LightningDataModule):
    """Images and what is known of each. A kind of data is a subclass that names classes and sets.

    `class_names` must be known once the object is made: the network's head is built from it.
    `mean` and `std` (one number a channel) are what the images were normalised with;
    `input_config`, which goes into the checkpoint, is how `acmix predict` prepares an image.
    """

    in_chans: ClassVar[int] = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    class_names: list[str]
    # Arguments of timm.data.create_transform, and `background`, the colour beneath transparency.
    input_config: dict[str, Any] | None = None
    leave_out: ClassVar[str] = "on_error skip"  # option that goes on without broken files
    looks_early: bool = False  # whether `acmix fit` looks for broken files before it starts
    collate: Callable[[list[Sample]], Any] = staticmethod(default_collate)  # samples -> a batch
    seed: int = 0  # of the order and augmentation of training images; `acmix fit` sets it

    def __init__(self, batch_size: PositiveCount = 64, num_workers: Count = 0) -> None:
        """Keep the loader options.

        Args:
            batch_size: Images a step on each device.
            num_workers: Processes that load images; 0 loads in the training process.
        """
        super().__init__()
        check_ranges(ImageData.__init__, locals(), "data.")
        self.batch_size = batch_size
        self.num_workers = num_workers

    @abstractmethod
    def train_set(self) -> Dataset[Sample]:
        """Images to learn from, augmented, as pairs: image (C, H, W), and what is known of it."""

    @abstractmethod
    def val_set(self) -> Dataset[Sample]:
        """Held-out images, as pairs like training ones, but not augmented."""

    def test_set(self) -> Dataset[Sample] | None:
        """Images for `acmix test`, as training ones, where there are others."""
        return None

    @abstractmethod
    def pictures(self, part: str) -> Iterable[Picture] | None:
        """Every image of a part (train, val, test) as it is stored, to look at before training.

        None where there are no test images.

        Raises:
            ValueError: If the part cannot be had, as in training.
        """

    def faults(self, part: str) -> list[str]:
        """What is wrong with what is known of the images of a part: file, record and fault."""
        return []

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train_set(), train=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.val_set())

    def test_dataloader(self) -> DataLoader[Any]:
        images = self.test_set()
        if images is None:
            raise ValueError(
                "data: expected test images, got none; acmix validate measures the held-out ones"
            )
        return self._loader(images)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.test_set() or self.val_set())

    def to_pixels(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) -> the same in [0, 1], for pictures."""
        shape = (1, -1, 1, 1)
        mean, std = torch.tensor(self.mean).view(shape), torch.tensor(self.std).view(shape)
        return (images.float().cpu() * std + mean).clamp(0, 1)

    def _loader(self, data: Dataset[Sample], train: bool = False) -> DataLoader[Any]:
        return make_loader(data, train=train, collate=self.collate, **self.loader_options())

    def loader_options(self) -> dict[str, int]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "seed": self.seed,
            "rank": self.trainer.global_rank if self.trainer else 0,
            "world_size": self.trainer.world_size if self.trainer else 1,
        }


class ClassifiedData(ImageData):
    """Images with a class each: a sample is (image (C, H, W), index of the class)."""

    def class_counts(self) -> list[int]:
        """Training images of each class."""
        classes = getattr(self.train_set(), "classes", None)
        if classes is None:
            raise ValueError("model.class_weights: expected numbers with shards, got balanced")
        counts = Counter(classes)
        return [counts[index] for index in range(len(self.class_names))]


class DetectionData(ImageData):
    """Images with objects: a sample is (image (C, H, W), target), a dict of tensors.

    Of N objects: boxes (N, 4) as left, top, right, bottom in pixels, labels (N,) from 0, area (N,),
    iscrowd (N,) and, `with_masks`, masks (N, H, W); image_id is a number. Held-out images have the
    size that they are stored in. A batch is (list of images, list of targets).
    """

    with_masks: bool = False  # the task sets it
    test_size: int  # shorter side to which the detector brings held-out images, in pixels
    max_size: int  # most that their longer side may then have


class SegmentationData(ImageData):
    """Images with a class a pixel: a sample is (image (C, H, W), mask (H, W) of int64).

    A mask holds indices of classes, or `ignore_index`. Training images are of one size, and so is
    the mask of each; a batch is a pair of stacks. A held-out image is as the network is to see it,
    its mask as it is stored; a batch is (list of images, list of masks).
    """

    ignore_index: int = 255  # of pixels that no class is known of

    @abstractmethod
    def class_counts(self) -> list[int]:
        """Pixels of each class in the training images as they are stored."""

    def _loader(self, data: Dataset[Sample], train: bool = False) -> DataLoader[Any]:
        collate = default_collate if train else in_lists
        return make_loader(data, train=train, collate=collate, **self.loader_options())


def in_lists(samples: list[Sample]) -> tuple[list[Tensor], list[Any]]:
    """A batch of images of any size: images, and what is known of each."""
    images, known = zip(*samples, strict=True)
    return list(images), list(known)
