"""A NaN or an infinity reaches what the reference lets it reach and nothing else, forward and
backward, though a tile's matrix products multiply pixels that do not see each other, too."""

import math
from collections.abc import Callable

import pytest
import torch
from helpers import DEVICE, Shape, aggregation, attention, mixed_attention
from torch import Tensor

from acmix.ops import backends
from acmix.ops._library import INTERPRETED
from acmix.ops.window_attention import _fused
from acmix.ops.window_attention import triton as kernels

REASON = backends()["triton"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

NAMES = ["q", "k", "v", "position", "base", "alpha", "bias", "grad_out"]
VALUES = [math.nan, math.inf, -math.inf]
PLACES = {"corner": (-1, -1), "border": (0, 1), "middle": (1, 2)}
SHAPES: list[Shape] = [(3, 4, 3, 1, 1), (3, 4, 3, 2, 1), (1, 5, 3, 1, 2), (2, 3, 5, 1, 1)]
CASES = [
    (name, value, place, shape)
    for name in NAMES
    for value in VALUES
    for place in PLACES
    for shape in SHAPES
]
if INTERPRETED:  # which is slow, and slowest where not all is finite: a case in eleven
    CASES = CASES[::11]


def fused_attention(shape: Shape) -> Callable[..., Tensor]:
    return lambda q, k, v, p, *mix: _fused.forward(q, k, v, p, *shape[2:], *mix)


def out_side(shape: Shape) -> tuple[int, int]:
    height, width, _, stride, _ = shape
    return math.ceil(height / stride), math.ceil(width / stride)


def attention_inputs(
    shape: Shape, heads: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Of heads of two channels, with the gradient of what comes out."""
    maps, out = (1, heads, 2, *shape[:2]), (1, heads, 2, *out_side(shape))
    sizes = [out, maps, maps, (2, 2), out, (1,), out, out]
    tensors = [torch.randn(size).to(DEVICE, dtype) for size in sizes]
    return dict(zip(NAMES, tensors, strict=True))


def spoil(tensor: Tensor, value: float, place: str) -> None:
    """One number of the first channel, at that place of the map or the nearest there is."""
    channel = tensor.view(-1, *(tensor.shape[-2:] if tensor.dim() > 2 else (1, 1)))[0]
    y, x = (min(at, side - 1) for at, side in zip(PLACES[place], channel.shape, strict=True))
    channel[y, x] = value


def kinds(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the output and every gradient: 1, 2, 3 where inf, -inf, NaN."""
    *leaves, grad_out = (x.clone().requires_grad_() for x in inputs.values())
    out = function(*leaves)
    results = out.detach(), *torch.autograd.grad(out, leaves, grad_out.detach())
    kinds = [x.isposinf() + 2 * x.isneginf() + 3 * x.isnan() for x in results]
    return dict(zip(("out", *inputs), kinds, strict=False))


def check(
    function: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: dict[str, Tensor]
) -> None:
    actual, expected = kinds(function, inputs), kinds(reference, inputs)
    assert any(kind.any() for kind in expected.values())
    for name, kind in expected.items():
        assert torch.equal(actual[name], kind), f"{name}: {actual[name]} against {kind}"


@pytest.mark.parametrize(("name", "value", "place", "shape"), CASES)
def test_attention(
    name: str, value: float, place: str, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "choose_tile", lambda *_: kernels.Tile(4, 4, 16, 4))
    inputs = attention_inputs(shape)
    spoil(inputs[name], value, place)
    check(fused_attention(shape), mixed_attention(shape), inputs)


def test_one_head_of_a_larger_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pixels are taken in parts; the other head stays on matrix products."""
    shape = (1, 6, 3, 1, 1)
    monkeypatch.setattr(kernels, "choose_tile", lambda *_: kernels.Tile(4, 8, 16, 4, heads=2))
    inputs = attention_inputs(shape, heads=2)
    inputs["v"][0, 1, 0, 0, 5] = math.nan
    check(fused_attention(shape), mixed_attention(shape), inputs)


def test_half_precision_overflows_where_the_reference_does() -> None:
    """Its sums are float32, whatever is rounded for the matrix products."""
    shape = (1, 6, 3, 1, 1)
    q, k, v, grad_out = torch.randn(4, 1, 2, 1, 6).to(DEVICE, torch.float16)
    inputs = {"q": q, "k": k / 100, "v": v * 100, "grad_out": grad_out.fill_(6e4)}
    check(attention(shape, "triton", 1), attention(shape, "reference", 1), inputs)


@pytest.mark.skipif(not INTERPRETED, reason="what is compiled cannot be replaced")
def test_finite_tiles_stay_on_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_forward_exactly", "_query_gradient_exactly", "_key_gradient_exactly"):
        assert hasattr(kernels, name)
        monkeypatch.setattr(kernels, name, None)
    shape = (5, 9, 3, 2, 1)
    kinds(fused_attention(shape), attention_inputs(shape))


@pytest.mark.parametrize(
    ("name", "value"), [("weight", math.nan), ("v", math.inf), ("grad_out", -math.inf)]
)
def test_aggregation(name: str, value: float) -> None:
    shape = (3, 4, 3, 2, 1)
    sizes = (1, 2, 9, *out_side(shape)), (1, 4, *shape[:2]), (1, 4, *out_side(shape))
    tensors = (torch.randn(size, device=DEVICE) for size in sizes)
    inputs = dict(zip(("weight", "v", "grad_out"), tensors, strict=True))
    spoil(inputs[name], value, "middle")
    check(aggregation(shape, "triton"), aggregation(shape, "reference"), inputs)
