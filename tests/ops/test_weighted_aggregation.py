"""Weighted aggregation: the reference against loops over numpy's padding, the rest against it."""

import math

import numpy as np
import pytest
import torch
from helpers import TOLERANCE, aggregation, assert_all_close, outputs_and_gradients
from torch import Tensor

from acmix.ops import weighted_aggregation

# (H, W, window, stride, dilation)
SHAPES = [(7, 9, 7, 1, 1), (1, 1, 5, 1, 1), (1, 4, 3, 2, 1), (9, 6, 3, 2, 1), (5, 8, 5, 1, 2)]
GRID = pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda s: "{}x{}-window{}-stride{}-dilation{}".format(*s)
)


def make_inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float64, batch: int = 2
) -> list[Tensor]:
    height, width, window, stride, _ = shape
    out_size = math.ceil(height / stride), math.ceil(width / stride)
    weight = torch.randn(batch, 3, window**2, *out_size, dtype=dtype)
    return [weight, torch.randn(batch, 6, height, width, dtype=dtype)]


@GRID
def test_reference_is_the_equation(shape: tuple[int, ...]) -> None:
    _, _, window, stride, dilation = shape
    weight, v = make_inputs(shape)
    reach = window // 2 * dilation
    v_pad = np.pad(v.numpy(), ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="reflect")
    expected = np.zeros((*v.shape[:2], *weight.shape[3:]))
    for b, c, i, j in np.ndindex(*expected.shape):
        rows = slice(i * stride, i * stride + 2 * reach + 1, dilation)
        cols = slice(j * stride, j * stride + 2 * reach + 1, dilation)
        taps = v_pad[b, c, rows, cols].reshape(-1)
        expected[b, c, i, j] = weight[b, c % 3, :, i, j].numpy() @ taps
    actual = aggregation(shape, "reference")(weight, v)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-12)


def test_reference_gradients() -> None:
    shape = (3, 4, 3, 2, 1)
    inputs = [x.requires_grad_() for x in make_inputs(shape, batch=1)]
    assert torch.autograd.gradcheck(aggregation(shape, "reference"), inputs)
    assert torch.autograd.gradgradcheck(aggregation(shape, "reference"), inputs)


@GRID
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tiled_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, dtype)
    expected = outputs_and_gradients(aggregation(shape, "reference"), [x.double() for x in inputs])
    actual = outputs_and_gradients(aggregation(shape, "tiled"), inputs)
    assert all(a.dtype == dtype for a in actual)
    assert_all_close(actual, expected, TOLERANCE[dtype] * 2)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_empty_batch(backend: str) -> None:
    out = aggregation(SHAPES[0], backend)(*make_inputs(SHAPES[0], batch=0))
    assert out.shape == (0, 6, 7, 9)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window": 2}, ValueError, "window: expected an odd window side, got 2"),
        ({"weight": torch.ones(2, 3, 9, 7, 9)}, ValueError, "weight: expected shape"),
        ({"weight": torch.ones(2, 4, 49, 7, 9)}, ValueError, "v: channels: expected a multiple"),
        ({"weight": torch.ones(2, 3, 49, 7)}, ValueError, "weight: expected 5 dimensions"),
        ({"v": torch.ones(2, 6, 7, 9).long()}, TypeError, "v: expected a floating-point tensor"),
        ({"backend": "fast"}, ValueError, "backend: expected one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments(change: dict, error: type[Exception], message: str) -> None:
    weight, v = make_inputs(SHAPES[0], torch.float32)
    with pytest.raises(error, match=message):
        weighted_aggregation(**{"weight": weight, "v": v, "window": 7, **change})
