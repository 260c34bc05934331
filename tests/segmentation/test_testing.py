"""Windows, scales and mirror images against plain definitions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from acmix.segmentation.testing import Views, log_probabilities, over_windows, rescale, starts


class Network:
    """Logits that depend on the place and the size of what is seen; counts the calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, images):
        self.calls.append(tuple(images.shape))
        height, width = images.shape[2:]
        across = torch.linspace(0, 1, width).expand(height, width)
        return torch.stack([images[:, 0], images[:, 1] * across, images.mean(1) + height / 9], 1)


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [
        (10, 4, 3, [0, 3, 6]),
        (10, 4, 4, [0, 4, 6]),
        (11, 4, 3, [0, 3, 6, 7]),
        (4, 4, 2, [0]),
        (3, 4, 2, [0]),
    ],
)
def test_windows_cover_a_length(length, window, stride, expected):
    assert starts(length, window, stride) == expected


@pytest.mark.parametrize("size", [(13, 17), (6, 20), (5, 4)], ids=str)
def test_sliding_window(size):
    net, images = Network(), torch.randn(2, 3, *size)
    found = over_windows(net, images, Views(window=6, stride=4))
    total, counts = np.zeros((2, 3, *size)), np.zeros(size)
    tops, lefts = (sorted({*range(0, max(1, side - 5), 4), max(0, side - 6)}) for side in size)
    for top in tops:
        for left in lefts:
            part = Network()(images[:, :, top : top + 6, left : left + 6]).numpy()
            total[:, :, top : top + 6, left : left + 6] += part
            counts[top : top + 6, left : left + 6] += 1
    assert counts.min() > 0
    assert len(net.calls) == len(tops) * len(lefts)
    np.testing.assert_allclose(found.numpy(), total / counts, rtol=1e-5, atol=1e-6)


def test_windows_are_two_thirds_apart():
    net = Network()
    over_windows(net, torch.randn(1, 3, 6, 18), Views(window=6))
    assert len(net.calls) == len(starts(18, 6, 4)) == 4


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 1.75)], ids=str)
def test_scales_and_mirror_images(scales, flip):
    images = torch.randn(2, 3, 8, 12)
    found = log_probabilities(Network(), images, (16, 23), Views(scales, flip))
    views = []
    for scale in scales:
        given = images
        if scale != 1:
            size = (round(8 * scale), round(12 * scale))
            given = F.interpolate(images, size, mode="bilinear", antialias=True)
        for mirror in (False, True)[: 1 + flip]:
            logits = Network()(given.flip(3)).flip(3) if mirror else Network()(given)
            resized = F.interpolate(logits, (16, 23), mode="bilinear")
            views.append(resized.softmax(1))
    expected = torch.stack(views).mean(0)
    torch.testing.assert_close(found.exp(), expected)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(2, 16, 23))


def test_windows_and_scales_together():
    images = torch.randn(1, 3, 8, 12)
    found = log_probabilities(Network(), images, (8, 12), Views((2.0,), window=8, stride=4))
    expected = over_windows(Network(), rescale(images, 2.0), Views(window=8, stride=4))
    expected = F.interpolate(expected, (8, 12), mode="bilinear")
    torch.testing.assert_close(found, expected.log_softmax(1))
