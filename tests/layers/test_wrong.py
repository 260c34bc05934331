"""What the layers beside ACmix2d refuse: arguments and inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from acmix.layers import PairwiseAttention, PatchwiseACmix, ReducedACmix, WindowACmix


def window(**arguments: object) -> WindowACmix:
    return WindowACmix(8, **{"heads": 2, **arguments})


def reduced(**arguments: object) -> nn.Module:
    return ReducedACmix(8, **{"heads": 2, "reduction": 2, **arguments})


def patchwise(out_channels: int = 16, **arguments: object) -> PatchwiseACmix:
    return PatchwiseACmix(8, out_channels, **arguments)


def pairwise(out_channels: int = 16, **arguments: object) -> PairwiseAttention:
    return PairwiseAttention(8, out_channels, **arguments)


CONVOLUTION = [
    ({"kernel_conv": 2}, "kernel_conv: expected an odd"),
    ({"mix": "mean"}, "mix: expected one of"),
    ({"shift": "none"}, "shift: expected one of"),
    ({"shift_init": "zero"}, "shift_init: expected one of"),
    ({"shift": "tensor", "shift_init": "kaiming"}, "shift_init: expected 'shift' with"),
]
AGGREGATION = [
    ({"out_channels": 12}, "out_channels: expected a multiple of share_planes"),
    ({"out_channels": 8, "reduction": 3}, "out_channels: expected a multiple of reduction"),
    ({"kernel_att": 4}, "kernel_att: expected an odd"),
    ({"backend": "cuda"}, "backend: expected one of"),
]
ARGUMENTS = {
    window: [
        ({"heads": 3}, "dim: expected a multiple of heads"),
        ({"window_size": 0}, "window_size: expected a positive int"),
        ({"window_size": (2, 3, 4)}, "window_size: expected an int or"),
        ({"shift_size": 7}, "shift_size: expected 0 or more and less than the window"),
        ({"shift_size": -1}, "shift_size: expected 0 or more"),
        *CONVOLUTION,
    ],
    reduced: [
        ({"heads": 3}, "dim: expected a multiple of heads"),
        ({"reduction": 0}, "reduction: expected a positive int"),
        *CONVOLUTION,
    ],
    patchwise: [*AGGREGATION, *CONVOLUTION],
    pairwise: AGGREGATION,
}
INPUTS = {
    window: [(1, 4, 8), (1, 8, 4, 4)],
    reduced: [(1, 4, 5, 8), (1, 20, 9), (1, 21, 8)],
    patchwise: [(4, 5), (1, 9, 4, 5), (1, 8, 0, 5)],
    pairwise: [(4, 5), (1, 9, 4, 5), (1, 8, 0, 5)],
}
RIGHT = {
    window: (1, 4, 4, 8),
    reduced: (1, 20, 8),
    patchwise: (1, 8, 4, 5),
    pairwise: (1, 8, 4, 5),
}


def run(make: Callable[..., nn.Module], x: torch.Tensor) -> torch.Tensor:
    return make()(x, (4, 5)) if make is reduced else make()(x)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [(make, *case) for make, cases in ARGUMENTS.items() for case in cases],
)
def test_arguments(make: Callable[..., nn.Module], arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize(
    ("make", "shape"), [(make, shape) for make, shapes in INPUTS.items() for shape in shapes]
)
def test_inputs(make: Callable[..., nn.Module], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="x: expected"):
        run(make, torch.zeros(shape))


@pytest.mark.parametrize("make", RIGHT)
def test_integers(make: Callable[..., nn.Module]) -> None:
    run(make, torch.zeros(RIGHT[make]))
    with pytest.raises(TypeError, match="x: expected"):
        run(make, torch.zeros(RIGHT[make], dtype=torch.int64))
