"""The digits: which images are held out, and what training does to the others."""

import pytest
import torch

from acmix.data import Digits
from acmix.data.digits import DigitImages


def images_of(dataset):
    return torch.stack([dataset[index][0] for index in range(len(dataset))])


def test_split_is_a_stratified_fifth():
    data = Digits()
    train, val = data.train_set(), data.val_set()
    assert (len(train), len(val)) == (1437, 360)
    counts = torch.bincount(torch.tensor(val.classes))
    assert counts.min() >= 34
    assert counts.max() <= 38


def test_split_is_disjoint():
    data = Digits(max_shift=0)
    train, val = data.train_set(), data.val_set()
    seen = {image.numpy().tobytes() for image in images_of(train)}
    assert not any(image.numpy().tobytes() in seen for image in images_of(val))


def test_split_depends_on_its_seed_only():
    torch.manual_seed(1)
    first = images_of(Digits(split_seed=3).val_set())
    torch.manual_seed(2)
    assert torch.equal(first, images_of(Digits(split_seed=3).val_set()))
    assert not torch.equal(first, images_of(Digits(split_seed=4).val_set()))


def test_training_images_are_moved_and_held_out_images_are_not():
    data = Digits()
    train, val = data.train_set(), data.val_set()
    torch.manual_seed(0)
    assert any(not torch.equal(train[0][0], train[0][0]) for _ in range(20))
    assert torch.equal(val[0][0], val[0][0])


def test_a_shift_moves_the_image_by_whole_pixels():
    image = torch.zeros(1, 1, 8, 8)
    image[..., 4, 4] = 1.0
    moved = DigitImages(image, torch.tensor([7]), max_shift=1)
    torch.manual_seed(0)
    places = {tuple(moved[0][0].nonzero()[0].tolist()) for _ in range(200)}
    assert places == {(0, row, col) for row in (3, 4, 5) for col in (3, 4, 5)}


def test_pixels_are_normalised_and_back():
    data = Digits()
    images = images_of(data.val_set())
    assert abs(images.mean()) < 0.05
    assert abs(images.std() - 1) < 0.05
    pixels = data.to_pixels(images)
    assert pixels.min() == 0
    assert pixels.max() == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("val_fraction", 0.0),
        ("val_fraction", 1.0),
        ("max_shift", -1),
        ("batch_size", 0),
        ("num_workers", -1),
    ],
)
def test_bad_options_are_named(option, value):
    with pytest.raises(ValueError, match=option):
        Digits(**{option: value})
