"""Attention within windows: the definition against timm's, the fast forms against it."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import TOLERANCE, assert_all_close, assert_threads_agree, outputs_and_gradients
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from acmix.ops import _native
from acmix.ops.partition_attention import IMPLEMENTATIONS, native, reference, tiled

needs_kernel = pytest.mark.skipif(_native.reason() is not None, reason=str(_native.reason()))
OPERATOR = torch.ops.acmix.partition_attention

# (H, W), window, shift
GRID = [
    ((7, 7), (7, 7), (0, 0)),
    ((14, 14), (7, 7), (3, 3)),
    ((8, 12), (4, 3), (2, 1)),
    ((5, 6), (1, 2), (0, 1)),
    ((6, 4), (2, 4), (1, 0)),
    ((3, 5), (1, 1), (0, 0)),
    ((18, 9), (9, 9), (4, 0)),
]
Shape = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
LAYOUTS = {"pixels": (0, 3, 4, 1, 2), "rows": (0, 1, 2, 3, 4), "neither": (3, 2, 0, 4, 1)}


def make_inputs(
    shape: Shape, heads: int = 3, head_dim: int = 5, layout: str = "pixels", batch: int = 2
) -> list[Tensor]:
    (height, width), (rows, columns), _ = shape
    pieces = torch.randn(batch, 3 * heads, head_dim, height, width)
    order = LAYOUTS[layout]
    back = torch.tensor(order).argsort().tolist()
    tokens = rows * columns
    return [pieces.permute(order).contiguous().permute(back), torch.randn(heads, tokens, tokens)]


def run(name: str, shape: Shape) -> Callable[..., Tensor]:
    return lambda *inputs: IMPLEMENTATIONS[name].forward(*inputs, *shape[1:])


def check(name: str, shape: Shape, inputs: list[Tensor], tolerance: float) -> None:
    actual = outputs_and_gradients(run(name, shape), inputs)
    expected = outputs_and_gradients(run("reference", shape), [x.double() for x in inputs])
    assert_all_close(actual, expected, tolerance)


@pytest.mark.parametrize("shift", [0, 2])
def test_reference_is_timms(shift: int) -> None:
    block = SwinTransformerBlock(8, (8, 12), num_heads=2, window_size=4).double()
    block.shift_size = (shift, shift)
    mask = block.get_attn_mask()
    attention = block.attn.requires_grad_(False)
    if shift:
        assert mask is not None
    x = torch.randn(2, 8, 12, 8, dtype=torch.float64)
    windows = x.view(2, 2, 4, 3, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(12, 16, 8)
    out = attention(windows, None if mask is None else mask.double())
    expected = out.view(2, 2, 3, 4, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(2, 8, 12, 8)
    pieces = attention.qkv(x).unflatten(-1, (6, 4)).permute(0, 3, 4, 1, 2)
    bias = attention._get_rel_pos_bias()[0]
    got = reference.forward(pieces, bias, (4, 4), (shift, shift))
    got = attention.proj(got.permute(0, 3, 4, 1, 2).flatten(3))
    assert_all_close([got], [expected], TOLERANCE[torch.float64])


@pytest.mark.parametrize("shape", GRID, ids=str)
def test_tiled_is_the_reference(shape: Shape) -> None:
    inputs = [x.double() for x in make_inputs(shape)]
    check("tiled", shape, inputs, TOLERANCE[torch.float64])


def test_dropout() -> None:
    torch.manual_seed(0)
    pieces, bias = make_inputs(GRID[1])
    pieces[:, 6:] = 1  # outputs are the sums of the weights that are left, over 1 - p
    sums = tiled.forward(pieces, bias, *GRID[1][1:], dropout=0.5)
    assert sums.std() > 0.1
    assert abs(sums.mean().item() - 1) < 0.1


@needs_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", GRID, ids=str)
def test_grid(shape: Shape, layout: str) -> None:
    for heads, head_dim in [(3, 5), (1, 32), (2, 17), (5, 1)]:
        inputs = make_inputs(shape, heads, head_dim, layout)
        check("native", shape, inputs, TOLERANCE[torch.float32])


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    pieces, bias = make_inputs(GRID[1])
    for name in ("native", "tiled"):
        check(name, GRID[1], [pieces.to(dtype), bias.to(dtype)], TOLERANCE[dtype])
    out = native.forward(pieces.to(dtype), bias, *GRID[1][1:])
    assert out.dtype == dtype


@needs_kernel
def test_large_logits() -> None:
    """Differences of hundreds: a softmax without its maximum would overflow."""
    pieces, bias = make_inputs(GRID[1])
    check("native", GRID[1], [pieces, 300 * bias], 1e-4)


@needs_kernel
def test_more_rows_of_windows_than_parts() -> None:
    shape = ((26, 2), (2, 2), (1, 1))
    check("native", shape, make_inputs(shape, batch=11), TOLERANCE[torch.float32])


@needs_kernel
def test_empty_batch() -> None:
    inputs = make_inputs(GRID[1], batch=0)
    out, _, grad_bias = outputs_and_gradients(run("native", GRID[1]), inputs)
    assert out.shape == (0, 3, 5, 14, 14)
    assert torch.equal(grad_bias, torch.zeros_like(grad_bias))


@needs_kernel
@pytest.mark.parametrize("shape", GRID, ids=str)
def test_poisoned_memory(shape: Shape) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        large = ((20, 20), (10, 10), (5, 5))
        nan = [x * math.nan for x in make_inputs(large, 2, 40)]
        outputs_and_gradients(run("native", large), nan)
        for x in outputs_and_gradients(run("native", shape), make_inputs(shape)):
            assert x.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@needs_kernel
def test_threads_agree_to_the_bit() -> None:
    for shape, batch in itertools.product(GRID[:3], [1, 70]):
        inputs = make_inputs(shape, batch=batch)
        assert_threads_agree(partial(outputs_and_gradients, run("native", shape), inputs))


@needs_kernel
def test_opcheck() -> None:
    pieces, bias = make_inputs(GRID[2])
    windows = [list(x) for x in GRID[2][1:]]
    torch.library.opcheck(
        OPERATOR.default, (pieces.requires_grad_(), bias.requires_grad_(), *windows)
    )
    pieces, bias = pieces.detach(), bias.detach()
    out, lse = OPERATOR(pieces, bias, *windows)
    backward = torch.ops.acmix.partition_attention_backward.default
    torch.library.opcheck(backward, (out, pieces, bias, lse, *windows))


@needs_kernel
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic: bool) -> None:
    def function(pieces: Tensor, bias: Tensor) -> Tensor:
        return native.forward(pieces * 2, bias, (4, 3), (2, 1)) + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in [(8, 9), (12, 12)]:
        inputs = make_inputs((size, (4, 3), (2, 1)))
        eager = outputs_and_gradients(function, inputs)
        assert_all_close(outputs_and_gradients(compiled, inputs), eager, 1e-6)


@needs_kernel
def test_autocast_keeps_the_bias() -> None:
    pieces, bias = make_inputs(GRID[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = native.forward(pieces, bias, *GRID[1][1:])
    assert out.dtype == torch.bfloat16
    exact = reference.forward(pieces.bfloat16().double(), bias.double(), *GRID[1][1:])
    assert_all_close([out], [exact], TOLERANCE[torch.bfloat16])


@needs_kernel
def test_second_derivatives_are_refused() -> None:
    pieces, bias = (x.requires_grad_() for x in make_inputs(GRID[0]))
    (first,) = torch.autograd.grad(
        native.forward(pieces, bias, *GRID[0][1:]).sum(), pieces, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="has no derivative"):
        first.sum().backward()


@needs_kernel
def test_flop_formulas() -> None:
    pieces, bias = (x.requires_grad_() for x in make_inputs(GRID[1]))
    with FlopCounterMode(display=False) as counter:
        native.forward(pieces, bias, *GRID[1][1:]).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * 49 * pieces.numel() // 3
