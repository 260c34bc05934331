"""ACmix as a function, and Stage II in one operator against its two paths apart."""

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import TOLERANCE, Shape, assert_all_close, outputs_and_gradients, shapes
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import acmix
from acmix import ops
from acmix.ops import _native
from acmix.ops.acmix._fused import stage2
from acmix.ops.shift_convolution.folded import convolve
from acmix.ops.window_attention import reference

needs_kernel = pytest.mark.skipif(_native.reason() is not None, reason=str(_native.reason()))
OPERATOR = torch.ops.acmix.stage2

# (H, W, window, stride, dilation)
GRID = shapes(
    "1 1 7 1 1, 1 9 7 2 1, 12 1 3 1 3, 2 3 13 1 1, 5 3 9 3 2, 7 7 7 1 1, 14 14 7 1 1, "
    "14 15 7 2 1, 13 17 5 3 1, 9 70 7 1 1, 9 70 5 2 3, 11 25 3 1 3"
)
LAYOUTS = {"nchw": (0, 2, 1, 3, 4), "channels_last": (0, 3, 4, 2, 1), "pieces": (0, 1, 2, 3, 4)}


def make_inputs(
    shape: Shape,
    heads: int = 4,
    head_dim: int = 3,
    kernel: int = 3,
    layout: str = "nchw",
    batch: int = 2,
    alpha: float = 0.7,
) -> list[Tensor]:
    order = LAYOUTS[layout]
    pieces = torch.randn(batch, 3 * heads, head_dim, *shape[:2])
    back = torch.tensor(order).argsort().tolist()
    return [
        pieces.permute(order).contiguous().permute(back),
        torch.randn(head_dim, 2),
        torch.randn(heads * head_dim, 3 * heads, kernel, kernel),
        torch.tensor(alpha),
    ]


def apart(
    pieces: Tensor, position: Tensor | None, weight: Tensor, alpha: Tensor | float, *sizes: int
) -> Tensor:
    """The two paths one after the other, and their sum."""
    _, stride, dilation = sizes
    q, k, v = pieces.chunk(3, 1)
    q = q[..., ::stride, ::stride]
    attention = reference.forward(q, k, v, position, *sizes).flatten(1, 2)
    channels = pieces.transpose(1, 2).flatten(1, 2)
    return alpha * attention + convolve(channels, weight, stride, dilation, groups=pieces.shape[2])


def run(operator: Callable[..., Tensor], shape: Shape) -> Callable[..., Tensor]:
    return lambda *x: operator(*x, *shape[2:])


def check(shape: Shape, inputs: list[Tensor], tolerance: float) -> None:
    actual = outputs_and_gradients(run(stage2, shape), inputs)
    expected = outputs_and_gradients(run(apart, shape), [x.double() for x in inputs])
    assert_all_close(actual, expected, tolerance)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", GRID, ids=str)
def test_grid(shape: Shape, layout: str) -> None:
    for heads, head_dim, kernel in [(4, 3, 3), (1, 8, 5), (2, 5, 1)]:
        inputs = make_inputs(shape, heads, head_dim, kernel, layout)
        check(shape, inputs, TOLERANCE[torch.float32])


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision(layout: str, dtype: torch.dtype) -> None:
    for shape in [(7, 7, 7, 1, 1), (9, 21, 5, 2, 2)]:
        pieces, *small = make_inputs(shape, layout=layout)
        check(shape, [pieces.to(dtype), *small], TOLERANCE[dtype])
        check(shape, [x.to(dtype) for x in (pieces, *small)], TOLERANCE[dtype])


@needs_kernel
@pytest.mark.parametrize("alpha", [0.0, -2.5])
def test_alpha(alpha: float) -> None:
    """At zero too its gradient is the product of the attention with the output's gradient."""
    shape = (6, 9, 5, 1, 1)
    check(shape, make_inputs(shape, alpha=alpha), TOLERANCE[torch.float32])


@needs_kernel
@pytest.mark.parametrize("stride", [1, 2])
def test_without_alpha_and_position(stride: int) -> None:
    shape = (6, 9, 5, stride, 1)
    pieces, _, weight, _ = make_inputs(shape)
    for alpha in (1.0, 0.25):
        results = [
            outputs_and_gradients(
                lambda p, w, m=module, a=alpha: m(p, None, w, a, *shape[2:]), inputs
            )
            for module, inputs in (
                (stage2, [pieces, weight]),
                (apart, [pieces.double(), weight.double()]),
            )
        ]
        assert_all_close(*results, TOLERANCE[torch.float32])


@needs_kernel
def test_strided_and_expanded_inputs() -> None:
    shape = (9, 10, 5, 1, 1)
    _, *small = make_inputs(shape, heads=2, head_dim=3)
    for pieces in (
        torch.randn(2, 6, 3, 18, 40)[..., ::2, 1::4],
        torch.randn(2, 1, 3, 9, 1).expand(2, 6, 3, 9, 10),
    ):
        grad = torch.ones(()).expand(2, 6, 9, 10)
        results = []
        for module, cast in ((stage2, torch.Tensor.float), (apart, torch.Tensor.double)):
            leaves = [cast(x).requires_grad_() for x in (pieces, *small)]
            out = run(module, shape)(*leaves)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, cast(grad))])
        assert_all_close(*results, TOLERANCE[torch.float32])


@needs_kernel
def test_empty_batch() -> None:
    shape = (5, 6, 3, 1, 1)
    inputs = make_inputs(shape, batch=0)
    out, _, *small = outputs_and_gradients(run(stage2, shape), inputs)
    assert out.shape == (0, 12, 5, 6)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in small)


@needs_kernel
@pytest.mark.parametrize("shape", GRID[::2], ids=str)
def test_poisoned_memory(shape: Shape, threads: None) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        for layout in LAYOUTS:
            large = (30, 30, 9, 1, 1)
            nan = [x * math.nan for x in make_inputs(large)]
            outputs_and_gradients(run(stage2, large), nan)
            actual = outputs_and_gradients(run(stage2, shape), make_inputs(shape, layout=layout))
            assert all(x.isfinite().all() for x in actual)
    finally:
        torch.use_deterministic_algorithms(False)


@needs_kernel
@pytest.mark.parametrize("layout", list(LAYOUTS)[:2])
@pytest.mark.parametrize("stride", [1, 2])
def test_threads_agree_to_the_bit(stride: int, layout: str, threads: None) -> None:
    for size, batch in itertools.product([(7, 7), (33, 20)], [1, 5]):
        shape = (*size, 7, stride, 1)
        inputs = make_inputs(shape, layout=layout, batch=batch)
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(run(stage2, shape), inputs))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernel
@pytest.mark.parametrize("layout", list(LAYOUTS)[:2])
def test_opcheck(layout: str) -> None:
    shape = (6, 9, 3, 2, 1)
    inputs = [x.requires_grad_() for x in make_inputs(shape, layout=layout)]
    torch.library.opcheck(OPERATOR.default, (*inputs, *shape[2:]))
    pieces, position, weight, alpha = (x.detach() for x in inputs)
    torch.library.opcheck(OPERATOR.default, (pieces, None, weight, None, *shape[2:]))
    out, lse = OPERATOR(pieces, position, weight, alpha, *shape[2:])
    backward = torch.ops.acmix.stage2_backward.default
    torch.library.opcheck(backward, (out, pieces, position, weight, alpha, lse, *shape[2:]))


@needs_kernel
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic: bool) -> None:
    def function(*inputs: Tensor) -> Tensor:
        return stage2(inputs[0] * 2, *inputs[1:], 3, 1, 1) + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in [(6, 7), (9, 12)]:
        inputs = make_inputs((*size, 3, 1, 1))
        eager = outputs_and_gradients(function, inputs)
        assert_all_close(outputs_and_gradients(compiled, inputs), eager, 1e-6)


@needs_kernel
def test_autocast() -> None:
    shape = (6, 7, 3, 1, 1)
    inputs = make_inputs(shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(stage2, shape)(*inputs)
    assert out.dtype == torch.bfloat16
    assert_all_close([out], [run(apart, shape)(*inputs)], TOLERANCE[torch.bfloat16])


@needs_kernel
def test_flop_formulas() -> None:
    shape = (6, 7, 3, 1, 1)
    inputs = [x.requires_grad_() for x in make_inputs(shape)]
    with FlopCounterMode(display=False) as counter:
        out = run(stage2, shape)(*inputs)
        out.sum().backward()
    attention, convolution = (2 + 5) * 2 * 9, 3 * 2 * 12 * 9
    assert counter.get_total_flops() == (attention + convolution) * out.numel()


@needs_kernel
@pytest.mark.parametrize("mix", ["learned", "convex", "sum"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layer(memory_format: torch.memory_format, stride: int, mix: str) -> None:
    """The layer on the kernel against the layer on the reference, every parameter's gradient."""
    layers = [
        acmix.ACmix2d(6, 8, stride=stride, mix=mix, backend=backend, dtype=dtype)
        for backend, dtype in (("native", torch.float32), ("reference", torch.float64))
    ]
    layers[1].load_state_dict({k: v.double() for k, v in layers[0].state_dict().items()})
    x = torch.randn(2, 6, 9, 11).to(memory_format=memory_format)
    results = []
    for layer, leaf in zip(layers, (x, x.double()), strict=True):
        leaf = leaf.detach().requires_grad_()
        out = layer(leaf)
        seed = torch.linspace(0, 9, out.numel(), dtype=torch.float64).sin().view_as(out)
        out.backward(seed.to(out.dtype))
        results.append([out.detach(), leaf.grad, *(p.grad for p in layer.parameters())])
    assert_all_close(*results, TOLERANCE[torch.float32])


def function_inputs(stride: int = 1) -> tuple[acmix.ACmix2d, dict]:
    layer = acmix.ACmix2d(6, 8, heads=2, kernel_att=5, stride=stride, dtype=torch.float64)
    return layer, {
        "x": torch.randn(2, 6, 7, 5, dtype=torch.float64),
        "qkv_weight": layer.qkv_weight,
        "qkv_bias": layer.qkv_bias,
        "position": layer.position_weight,
        "fc_weight": layer.fc_weight,
        "kernels": layer.shift.weight,
        "alpha": layer.mix.alpha,
        "beta": layer.mix.beta,
        "heads": 2,
        "window": 5,
        "stride": stride,
    }


@pytest.mark.parametrize("backend", ["auto", "reference", "tiled"])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_function_is_the_layer(stride: int, backend: str) -> None:
    layer, arguments = function_inputs(stride)
    out = ops.acmix(**arguments, backend=backend)
    torch.testing.assert_close(out, layer(arguments["x"]), rtol=0, atol=1e-12)
    torch.testing.assert_close(ops.acmix(**{**arguments, "x": arguments["x"][0]}), out[0])


def test_factors_and_paths_of_the_function() -> None:
    """Numbers or tensors; what is None is left out."""
    _, arguments = function_inputs()
    attention = ops.acmix(**{**arguments, "alpha": 1.0, "beta": None, "fc_weight": None})
    convolution = ops.acmix(**{**arguments, "alpha": None, "beta": 1.0, "position": None})
    for alpha, beta in ((0.3, -2.0), (torch.tensor(0.3).double(), torch.tensor([-2.0]).double())):
        for backend in ("reference", "tiled"):
            out = ops.acmix(**{**arguments, "alpha": alpha, "beta": beta, "backend": backend})
            torch.testing.assert_close(out, 0.3 * attention - 2 * convolution)
    half = ops.acmix(**{**arguments, "alpha": 0.5, "beta": None})
    torch.testing.assert_close(half, 0.5 * attention)


def test_kernels_of_the_function_may_be_shifts() -> None:
    _, arguments = function_inputs()
    kernels = ops.shift_kernels(8, 3, dtype=torch.float64)
    for backend in ("reference", "tiled"):
        out = ops.acmix(**{**arguments, "kernels": None, "backend": backend})
        torch.testing.assert_close(out, ops.acmix(**{**arguments, "kernels": kernels}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(1, 5, 7, 7).double()}, ValueError, "x: expected 6 channels, got 5"),
        ({"x": torch.ones(7, 7).double()}, ValueError, "x: expected 4 dimensions"),
        ({"x": torch.ones(1, 6, 7, 7)}, TypeError, "x: expected the dtype of parameters"),
        (
            {"qkv_weight": torch.ones(20, 6)},
            ValueError,
            r"qkv_weight: expected \(3C, C_in\)",
        ),
        ({"qkv_bias": torch.ones(23)}, ValueError, r"qkv_bias: expected shape \(24,\)"),
        ({"position": torch.ones(8, 2)}, ValueError, r"position: expected shape \(4, 2\)"),
        ({"fc_weight": None}, ValueError, "fc_weight: expected"),
        ({"fc_weight": torch.ones(4, 6)}, ValueError, "fc_weight: expected .* with k odd"),
        ({"fc_weight": torch.ones(9, 7)}, ValueError, r"fc_weight: expected shape \(9, 6\)"),
        ({"kernels": torch.ones(8, 9, 3, 2)}, ValueError, "kernels: expected shape"),
        ({"kernels": torch.ones(8, 9, 3, 3)}, TypeError, "kernels: expected the dtype"),
        ({"qkv_bias": torch.ones(24)}, TypeError, "qkv_bias: expected the dtype"),
        ({"beta": torch.ones(1, device="meta")}, ValueError, "beta: expected the device"),
        ({"alpha": torch.ones(2)}, ValueError, "alpha: expected one element"),
        ({"alpha": None, "beta": None}, ValueError, "alpha, beta: expected one of them"),
        ({"heads": 5}, ValueError, "qkv_weight: expected .* multiple of heads"),
        ({"window": 4}, ValueError, "window: expected an odd"),
        ({"stride": 0}, ValueError, "stride: expected a positive int"),
        ({"backend": "fast"}, ValueError, "backend: expected one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments(change: dict, error: type[Exception], message: str) -> None:
    _, arguments = function_inputs()
    with pytest.raises(error, match=message):
        ops.acmix(**{**arguments, **change})


@pytest.mark.parametrize("heads", [1, 4, 8])
@pytest.mark.parametrize("mix", ["learned", "attention", "convolution"])
def test_one_number_of_operations(mix: str, heads: int) -> None:
    """Whatever computes it, forward and backward, the definition's: 2 a multiply-add."""
    counts, results = {}, {}
    for backend in (name for name, reason in ops.backends().items() if reason is None):
        torch.manual_seed(0)
        layer = acmix.ACmix2d(8, 16, heads=heads, kernel_att=3, mix=mix, backend=backend)
        x = torch.randn(2, 8, 6, 7, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            out = layer(x)
            forward = counter.get_total_flops()
            out.square().sum().backward()
        counts[backend] = forward, counter.get_total_flops() - forward
        results[backend] = [out, x.grad, *(p.grad for p in layer.parameters())]
        assert_all_close(results[backend], results["reference"], TOLERANCE[torch.float32])
        plain = layer(x)
        torch.testing.assert_close(plain, out)
    assert len(set(counts.values())) == 1
    projections, attention = 3 * 16 * 8 * 84, 9 * 16 * 84 if mix != "convolution" else 0
    convolution = 9 * 48 * 84 + 81 * 16 * 84 if mix != "attention" else 0
    assert counts["reference"][0] == 2 * (projections + 2 * attention + convolution)
    assert counts["reference"][1] == 2 * (2 * projections + 5 * attention + 2 * convolution)
