"""The GPU kernels against the reference: on a GPU in all dtypes, else in float32 by Triton's
interpreter, in the process that test_interpreter.py starts."""

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import helpers
import pytest
import torch
from helpers import (
    DEVICE,
    TOLERANCE,
    Shape,
    aggregation,
    as_function,
    assert_all_close,
    assert_mixes,
    attention,
    each_shape,
    outputs_and_gradients,
    shapes,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import acmix
from acmix import ACmix2d
from acmix.layers.mix import MIXES
from acmix.ops import _trial, _triton, backends, weighted_aggregation, window_attention
from acmix.ops._library import INTERPRETED
from acmix.ops.weighted_aggregation import _fused as aggregation_operator
from acmix.ops.weighted_aggregation import triton as aggregation_kernels
from acmix.ops.window_attention import _fused, reference
from acmix.ops.window_attention import triton as kernels

# The interpreter is slow, and its products of bfloat16 are wrong.
HALF = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, *HALF]
BATCH = 1 if INTERPRETED else 2  # two images are in other tests
REASON = backends()["triton"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
on_gpu = pytest.mark.skipif(INTERPRETED, reason="not for the interpreter")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
half_too = pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default cuDNN's of float32 are of TF32, and off by 5e-4."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


SIZES = 3, 1, 1  # window, stride, dilation
SMALL = shapes(
    "1 1 1 1 1, 1 1 7 2 3, 1 9 7 1 1, 12 1 13 2 2, 2 2 13 3 3, 3 5 5 2 1, 5 3 9 3 2, "
    "7 7 7 1 1, 7 8 11 1 2, 6 5 3 1 999, 13 17 5 3 1, 12 17 3 1 2, 5 26 3 1 1, "
    "14 15 7 2 1"
)
LARGE = shapes(
    "56 56 7 1 1, 28 28 7 2 1, 14 14 7 1 1, 40 9 3 3 1, 9 70 7 2 1, 30 41 13 1 1, 33 50 5 2 3"
)
AGGREGATION = shapes("1 1 3 2 1, 1 6 5 1 1, 2 3 3 1 2, 5 6 3 1 1, 6 9 3 2 1, 5 8 3 1 2")


def sizes(shapes: list[Shape]) -> pytest.MarkDecorator:
    shapes = shapes if INTERPRETED else [*shapes, *LARGE]
    return each_shape(shapes)


def attention_inputs(
    shape: Shape, head_dim: int = 3, dtype: torch.dtype = torch.float32, batch: int = BATCH
) -> list[Tensor]:
    *maps, position = helpers.attention_inputs(shape, head_dim, batch=batch)
    return [*(x.to(DEVICE, dtype) for x in maps), position.to(DEVICE)]


def aggregation_inputs(shape: Shape, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    height, width, window, stride, _ = shape
    out_size = math.ceil(height / stride), math.ceil(width / stride)
    weight = torch.randn(BATCH, 2, window * window, *out_size).to(DEVICE, dtype)
    return [weight, torch.randn(BATCH, 6, height, width).to(DEVICE, dtype)]


def check(
    function: Callable[..., Callable[..., Tensor]], shape: Shape, inputs: list[Tensor]
) -> None:
    actual = outputs_and_gradients(function(shape, "triton"), inputs)
    exact = [x.double() for x in inputs]
    expected = outputs_and_gradients(function(shape, "reference"), exact)
    assert_all_close(actual, expected, TOLERANCE[inputs[0].dtype])


@sizes(SMALL)
@dtypes
def test_attention(shape: Shape, dtype: torch.dtype) -> None:
    check(attention, shape, attention_inputs(shape, dtype=dtype))


@sizes(AGGREGATION)
@dtypes
def test_aggregation(shape: Shape, dtype: torch.dtype) -> None:
    check(aggregation, shape, aggregation_inputs(shape, dtype))


@pytest.mark.parametrize("head_dim", [1, 20, 256] if INTERPRETED else [1, 16, 20, 33, 64, 128, 256])
@dtypes
def test_head_dim(head_dim: int, dtype: torch.dtype) -> None:
    shape = (5, 6, 5, 1, 1)
    check(attention, shape, attention_inputs(shape, head_dim, dtype))


@pytest.mark.parametrize(
    ("shape", "alpha", "batch"),
    [((5, 6, 3, 1, 1), (-0.7,), 2), ((9, 13, 5, 1, 2), -0.7, BATCH)],
    ids=str,
)
@half_too
def test_mix(shape: Shape, alpha: object, batch: int, dtype: torch.dtype) -> None:
    """base + bias + alpha * attention, and every gradient; once with all keys of a tile in one
    block and once in several, once with an alpha of shape (1,) and once with a scalar."""
    *tensors, position = attention_inputs(shape, 8, dtype, batch)
    inputs = [x.unflatten(1, (2, 8)) for x in tensors]
    base = torch.randn_like(inputs[0]).permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    inputs += [position, base, torch.tensor(alpha, device=DEVICE), torch.randn_like(base[:1])]

    assert_mixes(_fused.forward, inputs, shape, TOLERANCE[dtype])


def test_mix_with_a_number() -> None:
    shape = (5, 6, 3, 1, 1)
    q, k, v = (x.unflatten(1, (2, 3)) for x in attention_inputs(shape)[:3])
    out = _fused.forward(q, k, v, None, *shape[2:], q, 0.25)
    expected = q + 0.25 * reference.forward(q, k, v, None, *shape[2:])
    assert_all_close([out], [expected], TOLERANCE[torch.float32])


@pytest.mark.parametrize("window", [3, 9, 13])
def test_window(window: int) -> None:
    shape = (8, 7, window, 1, 1)
    check(attention, shape, attention_inputs(shape, batch=1)[:3])


def test_no_batch() -> None:
    shape = (5, 6, 3, 1, 1)
    check(attention, shape, attention_inputs(shape, batch=0))
    check(aggregation, shape, [x[:0] for x in aggregation_inputs(shape)])


def test_large_logits_stay_finite() -> None:
    shape = (6, 10, 5, 1, 1)
    q, k, v, position = attention_inputs(shape)
    actual = outputs_and_gradients(attention(shape, "triton"), [q * 1e3, k * 1e2, v, position])
    assert all(x.isfinite().all() for x in actual)
    assert actual[0].abs().max() <= v.abs().max() + 1e-5


@pytest.mark.parametrize("order", ["head_major", "channel_major"])
@pytest.mark.parametrize("memory", ["nchw", "channels_last"])
def test_attention_reads_one_projection_in_place(memory: str, order: str) -> None:
    dim = 3 if memory == "channels_last" else 1
    fused = torch.randn((2, 5, 9, 48) if dim == 3 else (2, 48, 5, 9), device=DEVICE)
    position = torch.randn(8, 2, device=DEVICE)

    def function(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, position: Tensor) -> Tensor:
            if order == "head_major":
                q, k, v = x.unflatten(dim, (3, 2, 8)).unbind(dim)
            else:
                parts = x.unflatten(dim, (8, 6)).split(2, dim + 1)
                q, k, v = (part.transpose(dim, dim + 1) for part in parts)
            if dim == 3:
                q, k, v = (part.permute(0, 3, 4, 1, 2) for part in (q, k, v))
            return forward(q, k, v, position, 3, 1, 1)

        return call

    actual = outputs_and_gradients(function(_fused.forward), [fused, position])
    exact = [fused.double(), position.double()]
    assert_all_close(actual, outputs_and_gradients(function(reference.forward), exact), 1e-5)


def test_strided_and_expanded_tensors() -> None:
    big = torch.randn(2, 4, 12, 20, device=DEVICE)
    q, v = big[..., ::2, 1::2], big.flip(2)[..., ::2, ::2]
    k = torch.randn(2, 1, 6, 1, device=DEVICE).expand(2, 4, 6, 10)
    shape = (6, 10, 3, 1, 1)
    out = attention(shape, "triton")(q, k, v)
    assert_all_close([out], [attention(shape, "reference")(q, k, v)], 1e-5)
    weight = torch.randn(2, 6, 10, 9, 2, device=DEVICE).permute(0, 4, 3, 1, 2)
    check(aggregation, shape, [weight, v.to(memory_format=torch.channels_last)])


def test_aggregation_of_channels_last_and_many_channels() -> None:
    weight = torch.randn(1, 4, 5, 9, 2, device=DEVICE).permute(0, 4, 3, 1, 2)
    v = torch.randn(1, 22, 4, 5, device=DEVICE).to(memory_format=torch.channels_last)
    check(aggregation, (4, 5, 3, 1, 1), [weight, v])


@on_gpu
def test_results_repeat_to_the_bit() -> None:
    shape = (29, 30, 5, 1, 1)
    inputs, pair = attention_inputs(shape), aggregation_inputs(shape)
    for function, x in ((attention(shape, "triton"), inputs), (aggregation(shape, "triton"), pair)):
        first, second = outputs_and_gradients(function, x), outputs_and_gradients(function, x)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("mix", MIXES)
@half_too
def test_layer(mix: str, dtype: torch.dtype) -> None:
    kind = {"device": DEVICE, "dtype": dtype}
    layer = ACmix2d(4, 4, heads=2, stride=2, kernel_att=3, mix=mix, backend="triton", **kind)
    exact = copy.deepcopy(layer).double()
    exact.backend = "reference"
    inputs = [torch.randn(1, 4, 7, 6, **kind), *layer.parameters()]
    actual = outputs_and_gradients(as_function(layer), inputs)
    expected = outputs_and_gradients(as_function(exact), [x.double() for x in inputs])
    # Here the pieces, the kernels and their fold are rounded, too.
    tolerance = TOLERANCE[dtype] * (1 if dtype == torch.float32 else 2)
    assert_all_close(actual, expected, tolerance)
    fused = acmix.fuse(layer.eval())
    assert_all_close([fused(inputs[0])], actual[:1], tolerance)


def test_the_layer_mixes_in_the_kernel() -> None:
    """The mix of the paths and the convolution's bias are part of the operator: nothing else
    multiplies or adds a map."""
    layer = ACmix2d(4, 4, heads=2, backend="triton", device=DEVICE)
    with torch.profiler.profile() as profile:
        layer(torch.randn(1, 4, 5, 5, device=DEVICE))
    names = {event.name for event in profile.events()}
    assert "acmix::window_attention" in names
    assert not {"aten::add", "aten::add_", "aten::addcmul"} & names


@pytest.mark.parametrize(("name", "tf32"), [("allow_tf32", True), ("fp32_precision", "tf32")])
def test_float32_products_are_as_exact_as_the_users(name: str, tf32: bool | str) -> None:
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, name):
        pytest.skip("this PyTorch has no such switch")
    before = getattr(matmul, name)
    assert _triton.precision(torch.float32) == "ieee"
    try:
        setattr(matmul, name, tf32)
        hip = torch.version.hip is not None
        assert _triton.precision(torch.float32) == ("ieee" if hip else "tf32")
        assert _triton.precision(torch.bfloat16) == "ieee"
    finally:
        setattr(matmul, name, before)


@pytest.mark.parametrize("operator", [_fused, aggregation_operator], ids=["attention", "san"])
@half_too
def test_trial(operator: ModuleType, dtype: torch.dtype) -> None:
    assert _trial.fault(operator.trial, DEVICE, dtype) is None


def test_trial_is_apart_from_the_callers_modes() -> None:
    with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16), FakeTensorMode():
        assert _trial.fault(_fused.trial, DEVICE, torch.float32) is None


def test_trial_of_kernels_that_do_not_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_key_gradient_kernel", None)
    assert "they do not run on" in _trial.fault(_fused.trial, DEVICE, torch.float32)


def test_trial_of_kernels_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LOG2_E", 1.0)
    assert "they differ from the reference by" in _trial.fault(_fused.trial, DEVICE, torch.float32)
    monkeypatch.setattr(aggregation_kernels, "least_dilation", lambda *_: 2)
    fault = _trial.fault(aggregation_operator.trial, DEVICE, torch.float32)
    assert "they differ from the reference by" in fault


def test_out_of_memory_is_no_fault_of_the_kernels() -> None:
    def full(*_: object) -> float:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        _trial.fault(full, DEVICE, torch.float32)


@pytest.mark.parametrize("tile", [kernels.Tile(4, 4, 128, 4, heads=4), kernels.CANDIDATES[-1]])
def test_tiles_of_several_heads(tile: kernels.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "choose_tile", lambda *_: tile)
    shape = (5, 9, 3, 1, 1)
    inputs = attention_inputs(shape, 4)  # as heads of 2 channels
    inputs[3] = inputs[3][:2]
    check(partial(attention, heads=4), shape, inputs)


def test_search_takes_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tiles that compile; once a shape."""
    milliseconds = {64: 3.0, 32: 1.0, 16: 2.0}
    runs = []

    def run(tile: kernels.Tile) -> None:
        runs.append(tile.block)
        if tile.block == 128:
            raise _triton.TritonError("too large")

    def timed(call: Callable[[], None], *_: float) -> float:
        call()
        return milliseconds[runs[-1]]

    monkeypatch.setattr(_triton.triton.testing, "do_bench", timed)
    monkeypatch.setattr(_triton, "_found", {})
    tiles = [kernels.Tile(4, 4, block, 4) for block in (128, 64, 32, 16)]
    for _ in range(2):
        assert _triton.search("shape", tiles, run).block == 32
    assert runs == [128, 64, 32, 16]
    assert _triton.search("hopeless", tiles[:1], run) == tiles[0]  # and then says why it fails


def test_search_is_bounded() -> None:
    for head_dim, size in ((16, 2), (64, 4), (256, 4)):
        tiles = kernels.candidates(head_dim * size)
        assert tiles
        largest = max(max(tile.rows * tile.columns, tile.block) for tile in tiles)
        assert largest * head_dim * size <= 32 * 1024


WRONG: dict[str, Callable[[Any, Tensor], object]] = {
    "v": lambda o, x: o.window_attention(x, x, x[:, :1], *[None] * 4, *SIZES),
    "q": lambda o, x: o.window_attention(x, x, x, *[None] * 4, 3, 2, 1),
    "base": lambda o, x: o.window_attention(x, x, x, x[:, :1], *[None] * 3, *SIZES),
    "position": lambda o, x: o.window_attention(x, x, x, None, None, x[0, 0, 0, :2], None, *SIZES),
    "alpha": lambda o, x: o.window_attention(x, x, x, *[None] * 3, x[0, 0, 0, 0], *SIZES),
    "lse": lambda o, x: o.window_attention_backward(*[x] * 4, None, None, x[0, 0, 0], *SIZES),
    "weight": lambda o, x: o.weighted_aggregation(x, x, *SIZES),
    "grad_out": lambda o, x: o.weighted_aggregation_backward(
        x[:, :1], x.new_ones(1, 2, 9, 5, 6), x, *SIZES
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_pointer_is_checked_before_it_is_passed_on(name: str) -> None:
    """An operator may be called by itself, or by a program that was edited."""
    with pytest.raises(ValueError, match=f"{name}: expected shape"):
        WRONG[name](torch.ops.acmix, torch.randn(1, 2, 4, 5, 6, device=DEVICE))


@pytest.mark.parametrize("fused", [False, True])
def test_heads_of_many_channels_are_refused(fused: bool) -> None:
    layer = ACmix2d(514, 514, heads=2, backend="triton", device=DEVICE).eval()
    layer = acmix.fuse(layer) if fused else layer
    x = torch.randn(1, 514, 2, 2, device=DEVICE)
    for function in (layer, lambda x: attention((2, 2, 3, 1, 1), "triton")(x, x, x)):
        with pytest.raises(ValueError, match=r"cannot run here: .* 256 channels at most, got 257"):
            function(x)


def test_what_is_refused() -> None:
    shape = (5, 6, 3, 1, 1)
    q, k, v, _ = (x.double() for x in attention_inputs(shape))
    with pytest.raises(ValueError, match=r"'triton' cannot run here: .*float64"):
        attention(shape, "triton")(q, k, v)
    with pytest.raises(ValueError, match=r"'triton' cannot run here: .*torch\.func"):
        torch.func.grad(lambda q: attention(shape, "triton")(q, k, v).sum())(q)


def samples() -> Iterator[tuple[torch._ops.OpOverload, tuple]]:
    shape = (6, 9, 3, 2, 1)
    *tensors, position = attention_inputs(shape, 4)
    q, k, v = (x.unflatten(1, (2, 4)).requires_grad_() for x in tensors)
    operator = torch.ops.acmix.window_attention.default
    alpha = torch.tensor(0.7, device=DEVICE, requires_grad=True)
    base = torch.randn_like(q).requires_grad_()
    bias = torch.randn_like(q[:1]).requires_grad_()
    yield operator, (q, k, v, base, bias, position.requires_grad_(), alpha, *shape[2:])
    yield operator, (q, k, v, None, None, None, None, *shape[2:])
    out, lse = operator(q, k, v, base, bias, position, alpha, *shape[2:])
    saved = [x.detach() for x in (out, q, k, v, position, alpha, lse)]
    yield torch.ops.acmix.window_attention_backward.default, (*saved, *shape[2:])
    weight, v = aggregation_inputs(shape)
    v = v.unflatten(1, (3, 2)).transpose(1, 2).detach()
    inputs = (weight.requires_grad_(), v.requires_grad_(), *shape[2:])
    yield torch.ops.acmix.weighted_aggregation.default, inputs


@on_gpu
@pytest.mark.parametrize("index", range(4))
def test_opcheck(index: int) -> None:
    operator, arguments = list(samples())[index]
    torch.library.opcheck(operator, arguments)


@on_gpu
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic: bool) -> None:
    def both(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        out = window_attention(q * 2, k, v, heads=2, window=3)
        return weighted_aggregation(weight, out, window=3) + 1

    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic)
    for size in [(6, 7), (9, 12)]:
        inputs = [torch.randn(2, 8, *size, device=DEVICE) for _ in range(3)]
        inputs[2] = inputs[2].to(memory_format=torch.channels_last)
        inputs.append(torch.randn(2, 4, 9, *size, device=DEVICE))
        eager = outputs_and_gradients(both, inputs)
        assert_all_close(outputs_and_gradients(compiled, inputs), eager, 1e-5)


@on_gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="of CUDA")
def test_cuda_graph() -> None:
    layer = ACmix2d(16, 16, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(2, 16, 14, 14, device=DEVICE, dtype=torch.bfloat16)
    eager = outputs_and_gradients(layer, [x])  # before the layer itself becomes the graph
    layer = torch.cuda.make_graphed_callables(layer, (torch.randn_like(x, requires_grad=True),))
    assert_all_close(outputs_and_gradients(layer, [x]), eager, TOLERANCE[torch.bfloat16])


@on_gpu
def test_export() -> None:
    layer = ACmix2d(8, 8, device=DEVICE).eval()
    x = torch.randn(2, 8, 9, 10, device=DEVICE)
    program = torch.export.export(layer, (x,))
    assert "acmix.window_attention" in str(program.graph)
    assert_all_close([program.module()(x)], [layer(x)], 1e-5)


@on_gpu
def test_autocast() -> None:
    layer = ACmix2d(8, 8, device=DEVICE)
    x = torch.randn(2, 8, 9, 10, device=DEVICE)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert_all_close([out], [layer(x)], TOLERANCE[torch.bfloat16])


@on_gpu
@pytest.mark.parametrize("operator", ["attention", "aggregation"])
def test_more_than_2_to_31_elements(operator: str) -> None:
    """The last image of a batch of more than 2^31 elements is right."""
    size, dtype = 64, torch.bfloat16
    maps = [(64, size, size)] * (3 if operator == "attention" else 1)
    weights = [(64, 9, size, size)] if operator == "aggregation" else []
    shapes = [*weights, *maps]
    batch = 2**31 // math.prod(shapes[0]) + 2
    needed = 6 * batch * sum(map(math.prod, shapes))  # tensors, gradients and room, 2 bytes each
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    run = (attention if operator == "attention" else aggregation)((size, size, 3, 1, 1), "triton")
    tensors = [torch.randn(batch, *shape, device=DEVICE, dtype=dtype) for shape in shapes]
    tensors = [x.requires_grad_() for x in tensors]
    out = run(*tensors)
    out.backward(torch.ones((), device=DEVICE, dtype=dtype).expand_as(out))
    last = [x.detach()[-1:].clone().requires_grad_() for x in tensors]
    expected = run(*last)
    expected.backward(torch.ones_like(expected))
    assert torch.equal(out[-1:], expected)
    for whole, alone in zip(tensors, last, strict=True):
        assert torch.equal(whole.grad[-1:], alone.grad)
