"""Loaders for training that can go on anywhere.

The order of an epoch follows from (seed, epoch) and the augmentation of an image from (seed, epoch,
index): neither depends on what ran before, on the number of workers, or on how the images are
divided among processes. So a position within an epoch is all that a checkpoint needs.
"""
# ruff: noqa: NPY002 - augmentations, timm's too, draw from NumPy's global generator

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

Sample = tuple[Tensor, Any]
Collate = Callable[[list[Sample]], Any]
Keys = list[tuple[int, int]]  # (epoch, index) of every image of a batch


def make_loader(
    dataset: Dataset[Sample],
    *,
    batch_size: int,
    num_workers: int = 0,
    train: bool,
    collate: Collate = default_collate,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[Any]:
    """Batches of this process's share of a map-style dataset.

    Args:
        dataset: Draws randomness from the global CPU generators of Python, NumPy and PyTorch only.
            Where it has `groups`, a number for each image, training batches are of one group.
        batch_size: Images a step of one process.
        num_workers: Processes that load images; 0 loads in the calling process.
        train: Shuffled and augmented anew every epoch, full batches only (one smaller batch where
            there are too few images for a full one); else in order, every image once.
        collate: Makes a batch of samples.
        seed: Of order and augmentation.
        rank: This process, from 0.
        world_size: Processes that share the images.

    Raises:
        ValueError: If there are fewer images than processes.
    """
    size = len(dataset)  # type: ignore[arg-type]
    if size < world_size:
        kind = "training" if train else "held-out"
        raise ValueError(f"data: expected an image a process, got {size} {kind} of {world_size}")
    options: dict[str, Any] = {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),  # else it draws a number from the global one
    }
    if train:
        groups = getattr(dataset, "groups", None)
        order = EpochOrder(size, batch_size, groups, seed=seed, rank=rank, world_size=world_size)
        return TrainLoader(dataset, order, collate, **options)
    share = range(rank, size, world_size)
    batch_size = even_batch_size(size, batch_size, world_size)
    return DataLoader(dataset, batch_size=batch_size, sampler=share, collate_fn=collate, **options)


def even_batch_size(size: int, batch_size: int, world_size: int) -> int:
    """The nearest batch size at which every process has the same number of batches.

    Processes that compute together (FSDP) would wait for ever for the one with a batch less.
    """
    smaller = size // world_size
    if size % world_size == 0 or smaller % batch_size:
        return batch_size
    return next(b for b in (*range(batch_size - 1, 1, -1), smaller + 1) if smaller % b)


class EpochOrder(Sampler[Keys]):
    """Which images make a batch: a permutation that follows from (seed, epoch).

    Every `world_size`-th image is this process's, so the batches of all processes together are
    those of one process with `world_size` times the batch size.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        groups: Sequence[int] | None = None,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.size, self.seed, self.rank, self.world_size = size, seed, rank, world_size
        self.groups = None if groups is None else np.asarray(groups)
        self.batch_size = min(batch_size, size // world_size)
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.size // (self.world_size * self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Name the epoch that comes next; the one that is under way goes on where it was."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[Keys]:
        epoch, start, self.start = self.epoch, self.start, 0
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self.size)
        if self.groups is not None:
            order = self._grouped(order, self.groups[order], generator)
        share = order[self.rank :: self.world_size].tolist()
        for batch in range(start, len(self)):
            first = batch * self.batch_size
            yield [(epoch, index) for index in share[first : first + self.batch_size]]

    def _grouped(
        self, order: np.ndarray, groups: np.ndarray, generator: np.random.Generator
    ) -> np.ndarray:
        """The order in which the batches of all processes together are of one group each.

        What the groups leave over makes the last batches, which are mixed; then all are shuffled.
        """
        together = self.batch_size * self.world_size
        whole, over = [], []
        for group in np.unique(groups):
            members = order[groups == group]
            full = len(members) // together * together
            whole += list(members[:full].reshape(-1, together))
            over.append(members[full:])
        rest = np.concatenate(over)
        full = len(rest) // together * together
        whole += list(rest[:full].reshape(-1, together))
        generator.shuffle(whole)
        return np.concatenate([*whole, rest[full:]])


class TrainLoader(DataLoader[Any]):
    """A loader whose `state_dict` is the place within the epoch, counted in batches handed out."""

    def __init__(
        self, dataset: Dataset[Sample], order: EpochOrder, collate: Collate, **options: Any
    ) -> None:
        # Without batch_size, each item of the sampler goes to the dataset whole: a batch.
        super().__init__(
            SeededBatches(dataset, order.seed, collate),  # type: ignore[arg-type]
            batch_size=None,
            sampler=order,
            **options,
        )
        self.order = order
        self.given = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.given = self.order.start
        for batch in super().__iter__():
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        order = self.order
        images = order.batch_size * order.world_size
        return {"epoch": order.epoch, "batches": self.given, "images_per_batch": images}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches of `state`.

        Raises:
            ValueError: If those batches, over all processes, were of another size.
        """
        here = self.state_dict()["images_per_batch"]
        if state["images_per_batch"] != here:
            raise ValueError(
                "data.batch_size: expected batch_size times processes to be "
                f"{state['images_per_batch']}, as in the checkpoint within an epoch, got {here}"
            )
        self.order.epoch, self.order.start = state["epoch"], state["batches"]


class SeededBatches:
    """The images of a dataset by lists of (epoch, index), each drawn with a seed of its own."""

    def __init__(self, dataset: Dataset[Sample], seed: int, collate: Collate) -> None:
        self.dataset = dataset
        self.seed = seed
        self.collate = collate

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, keys: Keys) -> Any:
        with kept_random_state():
            return self.collate([self._sample(*key) for key in keys])

    def _sample(self, epoch: int, index: int) -> Sample:
        seed_generators(self.seed, epoch, index)
        image, label = self.dataset[index]
        if not image.sum().isfinite():
            raise ValueError(f"data: expected finite pixels, got NaN or infinity in image {index}")
        return image, label


def seed_generators(*key: int) -> None:
    """Seed the CPU generators of Python, NumPy and PyTorch from whole numbers."""
    random.seed(" ".join(map(str, key)))  # hashed, so that near keys give unlike streams
    np.random.seed(random.getrandbits(32))
    torch.default_generator.manual_seed(random.getrandbits(63))


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Whatever is drawn within leaves the CPU generators as they were."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
