"""The CPU kernel of the convolution path against its definition."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from helpers import TOLERANCE, assert_all_close, assert_threads_agree, outputs_and_gradients
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from acmix.ops import _native, shift_convolution
from acmix.ops.shift_convolution import _path, folded, reference

pytestmark = pytest.mark.skipif(_native.reason() is not None, reason=str(_native.reason()))
OPERATOR = torch.ops.acmix.shift_convolution

# The order of (B, J, d, H, W) in memory.
LAYOUTS = {
    "nchw channel_major": (0, 2, 1, 3, 4),
    "nchw piece_major": (0, 1, 2, 3, 4),
    "channels_last channel_major": (0, 3, 4, 2, 1),
    "channels_last piece_major": (0, 3, 4, 1, 2),
    "none of these": (4, 1, 3, 0, 2),
}
SIZES = [(1, 1), (1, 40), (9, 1), (2, 3), (7, 7), (14, 14), (9, 70)]
STEPS = [(1, 1), (1, 2), (1, 3), (2, 1), (2, 3), (3, 1), (3, 2)]


def lay_out(x: Tensor, layout: str) -> Tensor:
    order = LAYOUTS[layout]
    back = torch.tensor(order).argsort().tolist()
    return x.permute(order).contiguous().permute(back)


def make_inputs(
    size: tuple[int, int],
    kernel: int = 3,
    pieces: int = 12,
    outputs: int = 4,
    groups: int = 3,
    batch: int = 2,
    layout: str = "nchw channel_major",
) -> list[Tensor]:
    x = torch.randn(batch, pieces, groups, *size)
    return [lay_out(x, layout), torch.randn(groups * outputs, pieces, kernel, kernel)]


def run(
    pieces: Tensor, weight: Tensor, stride: int, dilation: int, fc: Tensor | None = None
) -> Tensor:
    return OPERATOR(pieces, weight, stride, dilation, fc)


def plainly(
    pieces: Tensor, weight: Tensor, stride: int, dilation: int, fc: Tensor | None = None
) -> Tensor:
    if fc is not None:
        pieces = torch.einsum("ij,bjdhw->bidhw", fc, pieces)
    channels = pieces.transpose(1, 2).flatten(1, 2)
    return folded.convolve(channels, weight, stride, dilation, groups=pieces.shape[2])


def both_ways(inputs: list[Tensor], stride: int, dilation: int) -> tuple[list[Tensor], ...]:
    """`inputs` are pieces and weight and, where fc is apart, fc."""
    doubles = [x.double() for x in inputs]
    return (
        outputs_and_gradients(lambda p, w, *fc: run(p, w, stride, dilation, *fc), inputs),
        outputs_and_gradients(lambda p, w, *fc: plainly(p, w, stride, dilation, *fc), doubles),
    )


def with_fc(inputs: list[Tensor], made: int) -> list[Tensor]:
    """The same with an fc that makes `made` inputs of the pieces."""
    pieces, weight = inputs
    return [
        pieces,
        torch.randn(len(weight), made, *weight.shape[2:]),
        torch.randn(made, pieces.shape[1]),
    ]


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize(("stride", "dilation"), STEPS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_grid(size: tuple[int, int], stride: int, dilation: int, kernel: int) -> None:
    for layout in LAYOUTS:
        inputs = make_inputs(size, kernel, layout=layout)
        assert_all_close(*both_ways(inputs, stride, dilation), TOLERANCE[torch.float32], layout)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(("stride", "dilation"), STEPS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_grid_with_fc(size: tuple[int, int], stride: int, dilation: int, kernel: int) -> None:
    for layout, made in itertools.product(LAYOUTS, (1, 9)):
        inputs = with_fc(make_inputs(size, kernel, layout=layout), made)
        assert_all_close(*both_ways(inputs, stride, dilation), 2e-5, layout)


@pytest.mark.parametrize("pieces", [1, 3, 6, 12])
@pytest.mark.parametrize("outputs", [1, 2, 4, 5])
def test_grid_channels(pieces: int, outputs: int) -> None:
    for groups, (stride, layout) in itertools.product(
        [1, 3, 16, 64], [(1, "nchw channel_major"), (2, "channels_last piece_major")]
    ):
        inputs = make_inputs((6, 9), 3, pieces, outputs, groups, layout=layout)
        assert_all_close(*both_ways(inputs, stride, 1), TOLERANCE[torch.float32])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "batch"), [((60, 70), 1), ((5, 5), 40)], ids=str)
def test_several_tasks(size: tuple[int, int], batch: int, layout: str) -> None:
    """Images beyond one chunk of rows, and more small images than go together."""
    inputs = make_inputs(size, 5, groups=5, batch=batch, layout=layout)
    # Many terms: their rounding errors add up.
    assert_all_close(*both_ways(inputs, 1, 2), 3e-5)
    assert_all_close(*both_ways(with_fc(inputs, 9), 1, 2), 3e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_half_precision(stride: int, dtype: torch.dtype, layout: str) -> None:
    pieces, weight = make_inputs((9, 21), layout=layout)
    inputs = [pieces.to(dtype), weight.to(dtype)]
    assert_all_close(*both_ways(inputs, stride, 1), TOLERANCE[dtype])
    apart = [x.to(dtype) for x in with_fc(inputs, 9)]
    assert_all_close(*both_ways(apart, stride, 1), TOLERANCE[dtype])
    out = run(inputs[0], weight, stride, 1)
    assert out.dtype == dtype
    exact = plainly(inputs[0].double(), weight.double(), stride, 1)
    assert_all_close([out], [exact], TOLERANCE[dtype])


def test_layout_of_results() -> None:
    for layout in LAYOUTS:
        pieces, weight = make_inputs((6, 9), layout=layout)
        out = run(pieces, weight, 1, 1)
        last = "channels_last" in layout
        form = torch.channels_last if last else torch.contiguous_format
        if layout in LAYOUTS and layout != "none of these":
            assert out.is_contiguous(memory_format=form)
        gradient = torch.ops.acmix.shift_convolution_backward(out, pieces, weight, 1, 1)[0]
        assert gradient.stride() == pieces.stride()


def test_strided_and_expanded_inputs() -> None:
    big = torch.randn(2, 6, 3, 18, 40)
    pieces = big[..., ::2, 1::4]
    shared = torch.randn(2, 1, 3, 9, 1).expand(2, 6, 3, 9, 10)
    weight = torch.randn(6, 3, 3, 6).permute(0, 3, 1, 2)
    grad = torch.ones(()).expand(2, 6, 9, 10)
    for x in (pieces, shared):
        results = []
        for function, cast in ((run, torch.Tensor.float), (plainly, torch.Tensor.double)):
            leaves = [cast(t).requires_grad_() for t in (x, weight)]
            out = function(*leaves, 1, 1)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, cast(grad))])
        assert_all_close(*results, TOLERANCE[torch.float32])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 2)])
def test_forward_is_the_reference(stride: int, dilation: int, bias: bool) -> None:
    """With fc, its bias, and the gradients through the fold."""
    inputs = [torch.randn(2, 6, 4, 7, 9), torch.randn(9, 6), torch.randn(8, 9, 3, 3)]
    inputs += [torch.randn(9)] if bias else []

    def path(backend: str) -> Callable[..., Tensor]:
        sizes = {"stride": stride, "dilation": dilation, "backend": backend}
        return lambda *x: shift_convolution(*x[:3], fc_bias=x[3] if bias else None, **sizes)

    results = [
        outputs_and_gradients(path(backend), [cast(x) for x in inputs])
        for backend, cast in (("native", Tensor.float), ("reference", Tensor.double))
    ]
    assert_all_close(*results, TOLERANCE[torch.float32])


def test_empty_batch() -> None:
    pieces, weight = make_inputs((5, 6))
    out, _, gradient = outputs_and_gradients(lambda p, w: run(p, w, 1, 1), [pieces[:0], weight])
    assert out.shape == (0, 12, 5, 6)
    assert torch.equal(gradient, torch.zeros_like(weight))


def test_dilation_beyond_the_map() -> None:
    """Taps that never meet the map cost nothing and have no gradient."""
    inputs = make_inputs((5, 6), 5)
    for stride in (1, 10**6):
        actual, expected = both_ways(inputs, stride, 5)
        far = outputs_and_gradients(lambda p, w, s=stride: run(p, w, s, 10**6), inputs)
        assert_all_close(actual, expected, TOLERANCE[torch.float32])
        assert torch.equal(far[2][..., :2, :], torch.zeros(12, 12, 2, 5))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.slow
def test_poisoned_memory(size: tuple[int, int], layout: str) -> None:
    """Nothing is read before it is written: neither new tensors nor what earlier calls left."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        for stride in (1, 2):
            nan = [x * math.nan for x in make_inputs((40, 40), groups=8)]
            outputs_and_gradients(lambda p, w: run(p, w, 1, 1), nan)
            inputs = make_inputs(size, layout=layout)
            actual = outputs_and_gradients(lambda p, w, s=stride: run(p, w, s, 1), inputs)
            assert all(x.isfinite().all() for x in actual)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", list(LAYOUTS)[:3])
@pytest.mark.parametrize(("size", "batch"), [((60, 40), 2), ((7, 7), 33)], ids=str)
def test_threads_agree_to_the_bit(
    size: tuple[int, int], batch: int, layout: str, stride: int
) -> None:
    inputs = make_inputs(size, groups=5, batch=batch, layout=layout)
    assert_threads_agree(lambda: outputs_and_gradients(lambda p, w: run(p, w, stride, 1), inputs))


@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 40)),
    sizes=st.tuples(*[st.integers(1, 7)] * 3),
    kernel=st.sampled_from([1, 3, 5, 7]),
    stride=st.integers(1, 5),
    dilation=st.integers(1, 5),
    layout=st.sampled_from(list(LAYOUTS)),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
def test_any(
    size: tuple[int, int],
    sizes: tuple[int, int, int],
    kernel: int,
    stride: int,
    dilation: int,
    layout: str,
) -> None:
    inputs = make_inputs(size, kernel, *sizes, layout=layout)
    assert_all_close(*both_ways(inputs, stride, dilation), 2e-5)


@pytest.mark.parametrize("layout", ["nchw channel_major", "channels_last channel_major"])
@pytest.mark.slow
def test_opcheck(layout: str) -> None:
    pieces, weight = make_inputs((6, 9), layout=layout)
    leaves = pieces.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(OPERATOR.default, (*leaves, 2, 1))
    pieces, weight = (x.detach() for x in leaves)
    backward = torch.ops.acmix.shift_convolution_backward.default
    torch.library.opcheck(backward, (run(pieces, weight, 2, 1), pieces, weight, 2, 1))
    leaves = [x.requires_grad_() for x in with_fc([pieces, weight], 5)]
    torch.library.opcheck(OPERATOR.default, (*leaves[:2], 2, 1, leaves[2]))
    pieces, weight, fc = (x.detach() for x in leaves)
    out = run(pieces, weight, 2, 1, fc)
    torch.library.opcheck(backward, (out, pieces, weight, 2, 1, fc))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.slow
def test_compile(dynamic: bool) -> None:
    def function(pieces: Tensor, fc: Tensor, shift: Tensor) -> Tensor:
        return shift_convolution(pieces * 2, fc, shift, backend="native") + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in [(6, 7), (9, 12)]:
        inputs = [torch.randn(2, 6, 4, *size), torch.randn(9, 6), torch.randn(8, 9, 3, 3)]
        eager = outputs_and_gradients(function, inputs)
        assert_all_close(outputs_and_gradients(compiled, inputs), eager, 1e-6)


def test_autocast_keeps_the_weight() -> None:
    inputs = [torch.randn(2, 6, 4, 5, 7), torch.randn(9, 6), torch.randn(8, 9, 3, 3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = shift_convolution(*inputs, backend="native")
    assert out.dtype == torch.bfloat16
    rounded = [inputs[0].bfloat16().double(), inputs[1].double(), inputs[2].double()]
    assert_all_close([out], [reference.forward(*rounded, None, 1, 1)], 4e-3)


def test_flop_formulas() -> None:
    pieces, weight = (x.requires_grad_() for x in make_inputs((6, 7)))
    with FlopCounterMode(display=False) as counter:
        out = run(pieces, weight, 1, 1)
        out.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 12 * 9 * out.numel()


@pytest.mark.parametrize(("heads", "apart"), [(4, False), (5, True), (12, True)])
def test_the_form_with_fewer_operations_runs(heads: int, apart: bool) -> None:
    inputs = make_inputs((6, 7), pieces=3 * heads, outputs=9)[:1]
    inputs += [torch.randn(9, 3 * heads), torch.randn(3 * heads, 9, 3, 3)]
    folded_cost, cost = 9 * 3 * heads * heads, 9 * 3 * heads + 81 * heads
    assert apart == (cost < folded_cost)
    weights = _path.fold([], *inputs[1:], None, dense=False, repeats=heads)
    assert apart == (weights.fc_weight is not None)
    out = shift_convolution(*inputs, backend="native")
    expected = reference.forward(*(x.double() for x in inputs), None, 1, 1)
    assert_all_close([out], [expected], TOLERANCE[torch.float32])


def test_internal_errors_are_raised() -> None:
    """Sizes that the Python side got wrong never reach memory."""
    pieces, weight = make_inputs((5, 6))
    out = pieces.new_empty(2, 12, 5, 6)
    with pytest.raises(RuntimeError, match="internal error: a size out of range"):
        _native.shift_forward(pieces, weight[..., :2, :2].contiguous(), 1, 1, out, False)
    with pytest.raises(RuntimeError, match="internal error: a tensor that does not fit"):
        _native.shift_forward(pieces, weight, 2, 1, out, False)
    with pytest.raises(RuntimeError, match="internal error: a tensor that does not fit"):
        _native.shift_backward(out, pieces, weight, 1, 1, pieces[..., 1:], None, False)
    with pytest.raises(AssertionError, match="other sizes than the pieces"):
        _native.shift_forward(pieces, weight[:-1], 1, 1, out, False)
