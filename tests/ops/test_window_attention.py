"""Windowed attention: the reference against loops over numpy's padding, the rest against it."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers import (
    TOLERANCE,
    assert_all_close,
    attention,
    attention_inputs,
    each_shape,
    outputs_and_gradients,
    shapes,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from acmix.ops import backends, window_attention
from acmix.ops.window_attention import tiled

HERE = [name for name, reason in backends().items() if reason is None]
FAST = [name for name in HERE if name != "reference"]

# (H, W, window, stride, dilation): odd, tiny, no multiple of a tile, smaller than the window.
SHAPES = shapes(
    "7 9 7 1 1, 1 1 7 1 1, 1 6 5 1 1, 5 1 3 2 1, 2 2 13 1 1, 9 13 3 2 1, 10 8 7 3 1, "
    "11 12 5 1 2, 6 19 3 2 3, 4 3 5 2 4, 17 16 1 1 1"
)
GRID = each_shape(SHAPES)


make_inputs = partial(attention_inputs, dtype=torch.float64)


def attention_by_loops(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, shape: tuple[int, ...], heads: int
) -> np.ndarray:
    """The equation, one window at a time, on maps padded by numpy."""
    height, width, window, stride, dilation = shape
    head_dim = q.shape[1] // heads
    reach = window // 2 * dilation
    y, x = np.linspace(-1, 1, height), np.linspace(-1, 1, width)
    p = position.numpy()[:, 0, None, None] * x + position.numpy()[:, 1, None, None] * y[:, None]
    pad = ((0, 0), (reach, reach), (reach, reach))
    p_pad = np.pad(p, pad, mode="reflect")
    out = np.zeros(q.shape)
    for b, n in np.ndindex(q.shape[0], heads):
        channels = slice(n * head_dim, (n + 1) * head_dim)
        k_pad = np.pad(k[b, channels].numpy(), pad, mode="reflect")
        v_pad = np.pad(v[b, channels].numpy(), pad, mode="reflect")
        for i, j in np.ndindex(*q.shape[2:]):
            rows = slice(i * stride, i * stride + 2 * reach + 1, dilation)
            cols = slice(j * stride, j * stride + 2 * reach + 1, dilation)
            keys = k_pad[:, rows, cols] + p[:, i * stride, j * stride, None, None]
            keys = keys - p_pad[:, rows, cols]
            query = q[b, channels, i, j].numpy()
            logits = np.einsum("c,cuv->uv", query, keys) / math.sqrt(head_dim)
            weights = np.exp(logits - logits.max())
            weights /= weights.sum()
            out[b, channels, i, j] = np.einsum("uv,cuv->c", weights, v_pad[:, rows, cols])
    return out


@GRID
def test_reference_is_the_equation(shape: tuple[int, ...]) -> None:
    q, k, v, position = make_inputs(shape)
    expected = attention_by_loops(q, k, v, position, shape, heads=2)
    actual = attention(shape, "reference")(q, k, v, position)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 3, 1, 1), (1, 4, 5, 2, 1), (3, 2, 3, 1, 2)], ids=str)
def test_reference_gradients(shape: tuple[int, ...]) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(shape, heads=1, head_dim=2, batch=1)]
    function = attention(shape, "reference", heads=1)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@GRID
@pytest.mark.parametrize("position", [True, False], ids=["position", "no-position"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tiled_is_the_reference(shape: tuple[int, ...], position: bool, dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, dtype=dtype)[: 4 if position else 3]
    exact = [x.double() for x in inputs]
    expected = outputs_and_gradients(attention(shape, "reference"), exact)
    actual = outputs_and_gradients(attention(shape, "tiled"), inputs)
    assert all(a.dtype == dtype for a in actual)
    assert_all_close(actual, expected, TOLERANCE[dtype] * 4)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("head_dim", [1, 5, 64])
def test_head_sizes_and_empty_batch(backend: str, head_dim: int) -> None:
    shape = (9, 8, 7, 1, 1)
    for batch in (0, 1):
        inputs = make_inputs(shape, head_dim, heads=3, batch=batch, dtype=torch.float32)
        actual = outputs_and_gradients(attention(shape, backend, heads=3), inputs)
        exact = [x.double() for x in inputs]
        expected = outputs_and_gradients(attention(shape, "reference", heads=3), exact)
        assert_all_close(actual, expected, TOLERANCE[torch.float32], f"batch {batch}")


@pytest.mark.parametrize("dilation", [1, 2, 5, 12])
@pytest.mark.parametrize("stride", [1, 2])
def test_tiled_copies_few_keys(stride: int, dilation: int) -> None:
    """Whatever the dilation; windows unfolded would copy 49 keys a query."""
    side = 96
    q = torch.empty(1, 1, 1, side // stride, side // stride)
    tiles = tiled._Tiles(q, torch.empty(1, 1, 1, side, side), 7, stride, dilation)
    assert tiles.pixels.numel() / q.numel() < {1: 5, 2: 12}[stride]


@pytest.mark.parametrize("backend", FAST)
def test_second_derivatives_are_refused(backend: str) -> None:
    shape = (5, 6, 3, 1, 1)
    q, k, v, position = (x.requires_grad_() for x in make_inputs(shape, dtype=torch.float32))
    out = attention(shape, backend)(q, k, v, position)
    [grad] = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        grad.square().sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_forward_mode_derivatives() -> None:
    q, k, v, direction = torch.randn(4, 1, 4, 5, 6, dtype=torch.float32)
    expected = torch.func.jvp(lambda q: window_attention(q, k, v, heads=2), (q,), (direction,))[1]
    with forward_ad.dual_level():
        out = window_attention(forward_ad.make_dual(q, direction), k, v, heads=2)
        tangent = forward_ad.unpack_dual(out).tangent
        with pytest.raises(ValueError, match=r"cannot run here: .*forward-mode"):
            window_attention(q, k, v, heads=2, backend="native")
    torch.testing.assert_close(tangent, expected)


def test_transforms_of_torch_func() -> None:
    """The fast paths have no rule for them: "auto" takes the reference, a forced one raises."""
    shape = (5, 6, 3, 1, 1)
    q, k, v, position = make_inputs(shape, dtype=torch.float32)

    def transformed(backend: str) -> list[Tensor]:
        function = attention(shape, backend)
        _, tangent = torch.func.jvp(lambda k: function(q, k, v, position), (k,), (v,))
        gradient = torch.func.grad(lambda q: function(q, k, v, position).sum())(q)
        batched = torch.func.vmap(lambda q: function(q, k, v, position))(torch.stack([q, v]))
        return [tangent, gradient, batched]

    for actual, expected in zip(transformed("auto"), transformed("reference"), strict=True):
        torch.testing.assert_close(actual, expected)
        assert expected.abs().sum() > 0
    for backend in FAST:
        with pytest.raises(ValueError, match=f"backend: '{backend}' cannot run here: .*torch.func"):
            transformed(backend)


@pytest.mark.parametrize("backend", HERE)
def test_autocast_gives_one_dtype(backend: str) -> None:
    shape = (5, 6, 3, 1, 1)
    q, k, v, position = make_inputs(shape, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(shape, backend)(q.bfloat16(), k, v, position)
    assert out.dtype == torch.bfloat16
    expected = attention(shape, "reference")(q, k, v, position)
    assert_all_close([out], [expected], TOLERANCE[torch.bfloat16] * 2)


@pytest.mark.parametrize("backend", FAST)
def test_flops_are_counted(backend: str) -> None:
    shape = (5, 6, 3, 1, 1)
    inputs = [x.requires_grad_() for x in make_inputs(shape, dtype=torch.float32)]
    with FlopCounterMode(display=False) as counter:
        attention(shape, backend)(*inputs).sum().backward()
    products = 2 + 5  # forward and backward
    assert counter.get_total_flops() == products * 2 * 3**2 * inputs[0].numel()


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_large_logits_stay_finite(backend: str) -> None:
    shape = (6, 7, 3, 1, 1)
    q, k, v, _ = make_inputs(shape, dtype=torch.float32)
    out = attention(shape, backend)(q * 1e4, k * 1e4, v)
    assert out.isfinite().all()
    assert out.abs().max() <= v.abs().max() + 1e-4


def test_attention_reads_tensors_of_any_strides() -> None:
    shape = (6, 9, 5, 1, 1)
    q, k, v, position = make_inputs(shape)
    expected = attention(shape, "tiled")(q, k, v, position)
    q = q.transpose(2, 3).contiguous().transpose(2, 3)
    k = k.to(memory_format=torch.channels_last)
    v = torch.cat([v, v], 3)[..., : shape[1]]
    torch.testing.assert_close(attention(shape, "tiled")(q, k, v, position), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"heads": 4}, ValueError, r"k: channels: expected a multiple of heads \(4\), got 6"),
        ({"heads": 0}, ValueError, "heads: expected a positive int, got 0"),
        ({"window": 4}, ValueError, "window: expected an odd window side, got 4"),
        ({"window": -3}, ValueError, "window: expected a positive int, got -3"),
        ({"window": 3.0}, TypeError, "window: expected an int, got float"),
        ({"stride": 0}, ValueError, "stride: expected a positive int, got 0"),
        ({"dilation": 0}, ValueError, "dilation: expected a positive int, got 0"),
        (
            {"dilation": 2**40},
            ValueError,
            "dilation: expected an int below 2\\^31, got 1099511627776",
        ),
        ({"backend": "cuda"}, ValueError, "backend: expected one of 'auto', .*got 'cuda'"),
        ({"k": torch.randn(6, 7, 9)}, ValueError, "k: expected 4 dimensions"),
        ({"q": torch.randn(2, 6, 7, 8)}, ValueError, r"q: expected shape \(2, 6, 7, 9\), got"),
        ({"v": torch.ones(2, 6, 7, 9).int()}, TypeError, "v: expected a floating-point tensor"),
        ({"v": torch.ones(2, 6, 7, 9) * 1j}, TypeError, "v: expected a floating-point tensor"),
        ({"v": torch.ones(2, 6, 7, 9).half()}, TypeError, "v: expected the dtype of k"),
        ({"position": torch.ones(2, 2)}, ValueError, r"position: expected shape \(3, 2\)"),
        ({"k": torch.randn(2, 6, 0, 9)}, ValueError, "k: expected a map of 1x1 or more"),
        ({"k": torch.randn(2, 0, 7, 9)}, ValueError, "k: expected a channel or more"),
        (
            {"position": torch.ones(3, 2, device="meta")},
            ValueError,
            "position: expected the device",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments(change: dict, error: type[Exception], message: str) -> None:
    q, k, v, position = make_inputs((7, 9, 7, 1, 1), dtype=torch.float32)
    arguments = {"q": q, "k": k, "v": v, "position": position, "heads": 2, "window": 7}
    with pytest.raises(error, match=message):
        window_attention(**{**arguments, **change})
