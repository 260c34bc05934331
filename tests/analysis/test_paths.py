"""alpha and beta by layer."""

import pytest
from torch import nn

import acmix
from acmix.analysis.paths import PathWeights, path_weights


@pytest.mark.parametrize(
    ("mix", "alpha", "beta"),
    [
        ("learned", 0.5, 0.5),
        ("convex", 0.5, 0.5),
        ("sum", 1.0, 1.0),
        ("attention", 1.0, None),
        ("convolution", None, 1.0),
    ],
)
def test_path_weights(mix, alpha, beta):
    network = nn.Sequential(nn.Conv2d(1, 8, 1), acmix.ACmix2d(8, 8, mix=mix))
    assert path_weights(network) == [PathWeights("1", alpha, beta)]


def test_a_network_without_such_layers():
    assert path_weights(nn.Conv2d(1, 1, 1)) == []
