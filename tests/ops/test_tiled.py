"""The portable implementations at their edges: dilations and windows larger than the map, and NaNs
and infinities, which stand where the reference has them."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import TOLERANCE, assert_all_close, shapes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from acmix.ops import weighted_aggregation, window_attention
from acmix.ops.weighted_aggregation import tiled as tiled_aggregation
from acmix.ops.window_attention import exact, tiled

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Shape = tuple[int, ...]


def shape_id(shape: Shape) -> str:
    return "{}x{}-window{}-stride{}-dilation{}".format(*shape)


def attention(shape: Shape, backend: str) -> Callable[..., Tensor]:
    window, stride, dilation = shape[2:]

    def function(q: Tensor, k: Tensor, v: Tensor, position: Tensor | None = None) -> Tensor:
        sizes = {"window": window, "stride": stride, "dilation": dilation}
        return window_attention(q, k, v, heads=2, position=position, backend=backend, **sizes)

    return function


def aggregation(shape: Shape, backend: str) -> Callable[..., Tensor]:
    window, stride, dilation = shape[2:]

    def function(weight: Tensor, v: Tensor) -> Tensor:
        sizes = {"window": window, "stride": stride, "dilation": dilation}
        return weighted_aggregation(weight, v, backend=backend, **sizes)

    return function


def attention_inputs(shape: Shape, dtype: torch.dtype, batch: int = 1) -> list[Tensor]:
    height, width, _, stride, _ = shape
    k, v = torch.randn(2, batch, 4, height, width, dtype=dtype)
    q = torch.randn_like(k)[..., ::stride, ::stride].contiguous()
    return [q, k, v, torch.randn(2, 2, dtype=dtype)]


def aggregation_inputs(shape: Shape, dtype: torch.dtype, batch: int = 1) -> list[Tensor]:
    height, width, window, stride, _ = shape
    out_size = math.ceil(height / stride), math.ceil(width / stride)
    weight = torch.randn(batch, 2, window**2, *out_size, dtype=dtype)
    return [weight, torch.randn(batch, 4, height, width, dtype=dtype)]


OPERATORS = pytest.mark.parametrize(
    ("operator", "make_inputs"),
    [(attention, attention_inputs), (aggregation, aggregation_inputs)],
    ids=["attention", "aggregation"],
)


def run(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output and the gradient of every input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def output_like(inputs: list[Tensor]) -> Tensor:
    """A random gradient of the output, which is as large as q or as the map of the weights."""
    first, second, *_ = inputs
    return torch.randn(*second.shape[:2], *first.shape[-2:], dtype=first.dtype)


# (H, W, window, stride, dilation): past the map and the period of reflection, on the period, with
# factors that stride and dilation share, windows far apart, windows larger than the map.
FAR = shapes(
    "9 12 3 1 1000, 9 12 7 2 999, 5 9 3 1 8, 5 9 3 2 16, 1 7 5 1 40, 7 1 3 3 2147483647, "
    "13 12 5 6 4, 12 11 3 10 15, 20 23 3 7 7, 40 31 3 30 1, 17 19 1 1 1, 33 30 5 4 1, "
    "3 4 41 1 1, 4 7 41 2 3, 1 1 21 1 5, 19 5 25 1 2"
)


@OPERATORS
@pytest.mark.parametrize("shape", FAR, ids=shape_id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_any_dilation_window_and_stride(
    operator: Callable, make_inputs: Callable, shape: Shape, dtype: torch.dtype
) -> None:
    inputs = make_inputs(shape, dtype)
    grad = output_like(inputs)
    wide = [x.double() for x in inputs]
    expected = run(operator(shape, "reference"), wide, grad.double())
    actual = run(operator(shape, "tiled"), inputs, grad)
    assert_all_close(actual, expected, TOLERANCE[dtype] * 4)


@pytest.mark.parametrize("stride", [1, 2, 10, 39, 60])
@pytest.mark.parametrize("dilation", [1, 30, 39, 40, 78, 1000, 2**31 - 1])
@pytest.mark.parametrize("window", [1, 7, 401])
def test_attention_works_on_little_more_than_its_queries(
    stride: int, dilation: int, window: int
) -> None:
    """Whatever the dilation and the stride: neither more tiles than queries, nor more keys than
    windows unfolded, nor more than reflection tells apart."""
    size, out_size = 40, math.ceil(40 / stride)
    side = tiled._Side(size, out_size, window, stride, dilation)
    assert out_size <= side.padded < 2 * out_size + tiled.TILE
    assert side.tiles * side.keys <= 2 * out_size * window
    assert side.keys <= 2 * (size - 1)
    assert side.positions(torch.device("cpu")).shape == (side.tiles, side.keys)


@pytest.mark.parametrize("dilation", [1, 3, 39, 40, 1000, 2**31 - 1])
def test_aggregation_pads_no_more_than_unfolded_windows(dilation: int) -> None:
    v, _ = tiled_aggregation._padded(torch.empty(1, 1, 40, 1), -2, 39, 7, dilation)
    assert v.shape[-2] == min(40 + 6 * dilation, 7 * 40)


def test_memory_of_gradients_does_not_grow_with_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a row of tiles and heads are split as well."""
    sizes = []

    def gradients(mask: Tensor, grad: Tensor, *keys: Tensor) -> tuple[Tensor, ...]:
        sizes.append(len(grad) * mask.numel())
        return keys

    monkeypatch.setattr(tiled, "_tile_gradients", gradients)
    monkeypatch.setattr(tiled, "CHUNK", 2**17)
    inputs = [
        x.unflatten(1, (4, 1)) for x in attention_inputs((9, 200, 7, 1, 1), torch.float32)[:3]
    ]
    tiled._gradients_by_tiles(inputs[0], *inputs, None, 7, 1, 1)
    assert len(sizes) > 1
    assert max(sizes) <= tiled.CHUNK


# Maps of every kind: odd, with stride and dilation, smaller than the window, larger than a tile.
SHAPES = shapes("9 11 3 1 1, 9 11 3 2 1, 10 9 3 1 2, 11 10 5 2 3, 3 2 7 1 1, 17 18 3 1 1")
VALUES = {"nan": (NAN,), "inf": (INF,), "-inf": (-INF,), "inf, -inf": (INF, -INF)}


def placed(shape: Shape) -> Iterator[tuple[tuple[float, ...], tuple[int, int]]]:
    """Each of VALUES at a corner, on the border and in the middle of a map."""
    height, width = shape
    for values in VALUES.values():
        for place in ((0, 0), (height // 2, width - 1), (height // 2, width // 2)):
            yield values, place


def put(x: Tensor, values: tuple[float, ...], place: tuple[int, int]) -> None:
    """One after the other into a map (C, H, W): in one channel, from a place on."""
    row, col = place
    for step, value in enumerate(values):
        x[1, row, (col + step) % x.shape[-1]] = value


def assert_same_kinds(actual: list[Tensor], expected: list[Tensor]) -> None:
    """NaNs and infinities in the same places."""
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        a, e = (torch.where(x.isfinite(), 0, x) for x in (a, e))
        torch.testing.assert_close(
            a, e, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=index: f"tensor {i}: {m}"
        )


def assert_same_as_reference(operator: Callable, shape: Shape, inputs: list, grad: Tensor) -> None:
    actual = run(operator(shape, "tiled"), inputs, grad)
    expected = run(operator(shape, "reference"), inputs, grad)
    assert_same_kinds(actual, expected)
    actual, expected = ([x.nan_to_num(0, 0, 0) for x in xs] for xs in (actual, expected))
    assert_all_close(actual, expected, TOLERANCE[grad.dtype] * 4)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tensor", ["q", "k", "v", "grad"])
def test_attention_has_the_reference_s_nans(tensor: str, dtype: torch.dtype, shape: Shape) -> None:
    """Each image has another, the last none."""
    inputs = attention_inputs(shape, dtype, batch=13)
    names = dict(zip(("q", "k", "v", "grad"), [*inputs[:3], output_like(inputs)], strict=True))
    x = names[tensor]
    for image, (values, place) in zip(x, placed(x.shape[-2:]), strict=False):
        put(image, values, place)
    assert_same_as_reference(attention, shape, inputs, names["grad"])


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tensor", ["weight", "v", "grad"])
def test_aggregation_has_the_reference_s_nans(
    tensor: str, dtype: torch.dtype, shape: Shape
) -> None:
    inputs = aggregation_inputs(shape, dtype, batch=13)
    names = dict(zip(("weight", "v", "grad"), [*inputs, output_like(inputs)], strict=True))
    x = names[tensor]
    for image, (values, place) in zip(x, placed(x.shape[-2:]), strict=False):
        put(image.flatten(0, -3), values, place)
    assert_same_as_reference(aggregation, shape, inputs, names["grad"])


@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize("tensor", ["q", "k", "v", "grad", "position"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[4]], ids=shape_id)
def test_the_position_s_gradient_has_the_reference_s_nans(
    shape: Shape, tensor: str, value: str
) -> None:
    """It sums over all images; with one image each kind of its NaNs is seen."""
    inputs = attention_inputs(shape, torch.float32)
    q, k, v, position = inputs
    grad = output_like(inputs)
    maps = {"q": q, "k": k, "v": v, "grad": grad, "position": position[None, :, None]}
    put(maps[tensor].flatten(0, 1), VALUES[value], (0, 0))
    assert_same_as_reference(attention, shape, inputs, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_nan_reaches_the_nine_windows_that_show_it(dtype: torch.dtype) -> None:
    q, k, v, _ = attention_inputs((24, 24, 3, 1, 1), dtype)
    v[0, 0, 12, 12] = NAN
    out = attention((24, 24, 3, 1, 1), "tiled")(q, k, v)
    assert out.isnan().sum() == 9
    assert out[0, 0, 11:14, 11:14].isnan().all()


@pytest.mark.parametrize("sign", [1, -1], ids=["inf", "-inf"])
@pytest.mark.parametrize("size", [1e30, 1.9e19], ids=["far", "before-scaling"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_that_overflow(dtype: torch.dtype, size: float, sign: int) -> None:
    """Finite inputs whose logits are not: a window of nothing but -inf has no softmax."""
    shape = (9, 11, 3, 1, 1)
    inputs = attention_inputs(shape, dtype)
    q, k, _, _ = inputs
    q[:, 0, 3, 4] = size
    k[:, 0, 2:5, 3:6] = sign * size
    grad = output_like(inputs)
    expected = run(attention(shape, "reference"), inputs, grad)
    assert expected[0].isnan().any()
    assert_same_kinds(run(attention(shape, "tiled"), inputs, grad), expected)


@pytest.mark.parametrize("value", [0, NAN], ids=["finite", "nan"])
def test_half_precision_overflows_where_the_reference_does(value: float) -> None:
    """The reference's logits and gradients are float32: only what it returns may overflow."""
    shape = (9, 11, 3, 1, 1)
    inputs = attention_inputs(shape, torch.float16)
    q, k, v, _ = inputs
    q *= 200
    k *= 200
    v[0, 0, 0, 0] = value
    grad = torch.full_like(output_like(inputs), 6e4)
    out, *grads = expected = run(attention(shape, "reference"), inputs, grad)
    assert out[:, 1:].isfinite().all()
    assert any(x.isinf().any() for x in grads)
    assert_same_kinds(run(attention(shape, "tiled"), inputs, grad), expected)


def test_a_gradient_that_overflows() -> None:
    """That of one key does, not those of its neighbours, and so that of p_ij, which sums them."""
    shape = (9, 11, 3, 1, 1)
    inputs = attention_inputs(shape, torch.float32)
    q, k, v, _ = inputs
    q.fill_(1e10), k.zero_(), v.zero_()
    grad = torch.zeros_like(q)
    grad[0, 0, 2, 3] = v[0, 0, 2, 4] = 1e15
    inputs[3].zero_()
    expected = run(attention(shape, "reference"), inputs, grad)
    assert expected[2].isinf().sum() == 2  # both channels of the head
    assert_same_kinds(run(attention(shape, "tiled"), inputs, grad), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finite_images_stay_on_tiles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only images with a NaN are computed again."""
    inputs = attention_inputs((9, 11, 3, 1, 1), dtype, batch=3)
    grad, v = output_like(inputs), inputs[2]
    again = []

    def record(name: str) -> None:
        function = getattr(exact, name)

        def recorded(*args: Tensor | int) -> object:
            again.append(name)
            assert args[-5].isnan().any()  # v
            return function(*args)

        monkeypatch.setattr(exact, name, recorded)

    record("forward"), record("backward")
    run(attention((9, 11, 3, 1, 1), "tiled"), inputs, grad)
    assert again == []
    v[1, 0, 0, 0] = NAN
    run(attention((9, 11, 3, 1, 1), "tiled"), inputs, grad)
    assert again == ["forward", "backward"]


def test_exact_works_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is bounded: more rows at a time only where they fit."""
    shape = (9, 11, 3, 2, 2)
    inputs = attention_inputs(shape, torch.float64)
    inputs[2][0, 0, 4, 4] = NAN
    grad = output_like(inputs)
    expected = run(attention(shape, "tiled"), inputs, grad)
    monkeypatch.setattr(exact, "UNFOLDED", 1)
    actual = run(attention(shape, "tiled"), inputs, grad)
    assert [len(rows) for _, rows, _ in exact._parts(*inputs[:2], 3, 2, 2)] == [1] * 5
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)


def test_a_cuda_graph_waits_for_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is captured every image is computed exactly; a fake GPU has no results to read."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode():
        out = torch.empty(3, 2, device="cuda")
        assert list(tiled._not_finite(out)) == [0, 1, 2]
