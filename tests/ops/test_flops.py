"""PyTorch's counter of operations sees one number, whichever backend computes an operator."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from acmix import ACmix2d, ops
from acmix.layers import PairwiseAttention, PatchwiseACmix, WindowACmix

BACKENDS = ["reference", "tiled", "native"]


def counted(run: Callable[[], Tensor]) -> tuple[int, int]:
    """Forward, and backward for all gradients."""
    with FlopCounterMode(display=False) as forward:
        out = run()
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
def test_window_attention(backend: str) -> None:
    q, k, v = inputs((2, 8, 5, 4), (2, 8, 9, 7), (2, 8, 9, 7))
    size = {"heads": 2, "window": 5, "stride": 2, "backend": backend}
    product = 2 * 25 * q.numel()
    assert counted(lambda: ops.window_attention(q, k, v, **size)) == (2 * product, 5 * product)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weighted_aggregation(backend: str) -> None:
    weight, v = inputs((2, 2, 9, 5, 4), (2, 6, 9, 7))
    products = 2 * 9 * 2 * 6 * 5 * 4
    found = counted(
        lambda: ops.weighted_aggregation(weight, v, window=3, stride=2, backend=backend)
    )
    assert found == (products, 2 * products)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shift_convolution(backend: str) -> None:
    pieces, fc, kernels = inputs((2, 6, 4, 9, 7), (9, 6), (8, 9, 3, 3))
    products = 2 * (9 * pieces.numel() + 9 * 9 * 2 * 8 * 5 * 4)
    found = counted(lambda: ops.shift_convolution(pieces, fc, kernels, stride=2, backend=backend))
    assert found == (products, 2 * products)


@pytest.mark.parametrize("kind", [ACmix2d, PatchwiseACmix, PairwiseAttention])
def test_layers(kind: type) -> None:
    (x,) = inputs((2, 16, 14, 13))
    layers = [kind(16, 16, backend=backend) for backend in BACKENDS]
    first, *others = [counted(lambda layer=layer: layer(x)) for layer in layers]
    assert others == [first, first]
    assert min(first) > 0


def test_windows_of_swin() -> None:
    """By the CPU kernel and, in float64, without."""
    found = set()
    for dtype in (torch.float32, torch.float64):
        layer = WindowACmix(8, heads=2, window_size=3, shift_size=1, dtype=dtype)
        x = torch.randn(2, 5, 6, 8, dtype=dtype, requires_grad=True)
        found.add(counted(lambda layer=layer, x=x: layer(x)))
    assert len(found) == 1


def test_gradients_are_those_that_are_not_counted() -> None:
    layer = PatchwiseACmix(8, 16).eval()
    (x,) = inputs((2, 8, 5, 6))
    parameters = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).square().sum(), parameters)
    with FlopCounterMode(display=False):
        layer(x).square().sum().backward()
    for parameter, exact in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, exact)
