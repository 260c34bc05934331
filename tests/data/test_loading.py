"""Order and randomness of training images: functions of (seed, epoch, index) and nothing else."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from acmix.data.loading import EpochOrder, even_batch_size, make_loader, seed_generators


class Noise(Dataset):
    """Each image is its index and what the three global generators gave."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        drawn = [random.random(), np.random.rand(), float(torch.rand(()))]  # noqa: NPY002
        return torch.tensor([index, *drawn]).view(1, 2, 2), index


def loader(size=20, batch_size=4, train=True, **options):
    return make_loader(Noise(size), batch_size=batch_size, train=train, **options)


def epochs(loader, number=2):
    """The batches of some epochs in a row, (images, classes) each."""
    found = []
    for epoch in range(number):
        loader.sampler.set_epoch(epoch)
        found.append([tuple(batch) for batch in loader])
    return found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("size", [7, 20, 41])
def test_batches_are_of_one_group(size, world_size):
    """But for what the groups leave over; every image at most once, and the same number of them."""
    groups = [index % 3 == 0 for index in range(size)]
    for epoch in (0, 1):
        orders = [
            EpochOrder(size, 3, groups, seed=5, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for order in orders:
            order.set_epoch(epoch)
        together = [
            [key for batch in batches for _, key in batch] for batches in zip(*orders, strict=True)
        ]
        plain = EpochOrder(size, 3, seed=5, world_size=world_size)
        assert len(together) == len(plain)
        seen = [key for batch in together for key in batch]
        assert len(set(seen)) == len(seen) == len(plain) * 3 * world_size
        mixed = [batch for batch in together if len({groups[key] for key in batch}) > 1]
        assert len(mixed) <= 1


def test_a_grouped_order_follows_from_seed_and_epoch():
    groups = [index % 2 for index in range(20)]

    def keys(epoch, start=0, seed=0):
        order = EpochOrder(20, 4, groups, seed=seed)
        order.epoch, order.start = epoch, start
        return list(order)

    assert keys(1) == keys(1)
    assert keys(1)[2:] == keys(1, start=2)
    assert keys(1) != [[(1, key) for _, key in batch] for batch in keys(0)]
    assert keys(1) != keys(1, seed=1)


def assert_same(one, two):
    assert len(one) == len(two)
    for (images, classes), (others, other_classes) in zip(one, two, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(classes, other_classes)


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    first, second = ([int(c) for _, cs in epoch for c in cs] for epoch in epochs(loader()))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second != list(range(20))


def test_every_image_draws_anew_every_epoch_and_for_every_seed():
    drawn = [images[:, 0, 0, 1] for epoch in epochs(loader()) for images, _ in epoch]
    drawn += [images[:, 0, 0, 1] for images, _ in epochs(loader(seed=1))[0]]
    for part in range(3):
        assert len({float(x) for x in torch.cat(drawn)}) == 60, part


@pytest.mark.parametrize("workers", [0, 2])
def test_what_ran_before_and_the_workers_do_not_matter(workers):
    expected = epochs(loader())
    seed_generators(5)
    for one, two in zip(epochs(loader(num_workers=workers)), expected, strict=True):
        assert_same(one, two)


def test_loading_leaves_the_generators_as_they_were():
    seed_generators(3)
    expected = random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002
    seed_generators(3)
    next(iter(loader()))
    assert (random.random(), np.random.rand(), torch.rand(())) == expected  # noqa: NPY002


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_loader_goes_on_within_an_epoch(taken, workers):
    expected = epochs(loader())
    stopped = loader(num_workers=workers)
    stopped.sampler.set_epoch(1)
    batches = iter(stopped)
    for _ in range(taken):
        next(batches)
    fresh = loader(num_workers=workers)
    fresh.load_state_dict(stopped.state_dict())
    fresh.sampler.set_epoch(1)
    assert len(fresh) == 5
    assert_same(list(fresh), expected[1][taken:])
    fresh.sampler.set_epoch(0)
    assert_same(list(fresh), expected[0])


def test_a_state_of_another_batch_size_is_refused():
    with pytest.raises(ValueError, match=r"batch_size times processes to be 4, .* got 8"):
        loader(batch_size=8).load_state_dict(loader().state_dict())


@pytest.mark.parametrize(("size", "batch_size"), [(20, 4), (23, 4), (7, 2)])
def test_two_processes_have_the_batches_of_one(size, batch_size):
    one = epochs(loader(size, 2 * batch_size))[1]
    ranks = [loader(size, batch_size, rank=rank, world_size=2) for rank in (0, 1)]
    for (images, classes), *shares in zip(one, *(epochs(rank)[1] for rank in ranks), strict=True):
        order = torch.cat([share[1] for share in shares])
        assert sorted(order.tolist()) == sorted(classes.tolist())
        both = torch.cat([share[0] for share in shares])
        assert torch.equal(both[order.argsort()], images[classes.argsort()])


@pytest.mark.parametrize(("size", "world_size", "batches"), [(3, 1, 1), (9, 2, 1), (8, 2, 1)])
def test_fewer_images_than_a_batch_make_one_smaller_batch(size, world_size, batches):
    order = EpochOrder(size, 64, world_size=world_size)
    assert len(order) == batches
    assert len(next(iter(order))) == size // world_size


@pytest.mark.parametrize("size", [5, 8, 9, 12, 17])
@pytest.mark.parametrize("world_size", [1, 2, 4, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_held_out_images_come_once_in_as_many_batches_everywhere(size, world_size, batch_size):
    ranks = [
        list(loader(size, batch_size, False, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [int(c) for batches in ranks for _, classes in batches for c in classes]
    assert sorted(seen) == list(range(size))
    assert 1 <= even_batch_size(size, batch_size, world_size) <= max(batch_size, size)


def test_fewer_images_than_processes_are_refused():
    with pytest.raises(ValueError, match="got 3 held-out of 4"):
        loader(3, train=False, world_size=4)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_are_named(bad, workers):
    images = torch.zeros(6, 1, 2, 2)
    images[4, 0, 1, 1] = bad
    pairs = list(zip(images, range(6), strict=True))
    with pytest.raises(ValueError, match="expected finite pixels, got NaN or infinity in image 4"):
        list(make_loader(pairs, batch_size=3, num_workers=workers, train=True))
