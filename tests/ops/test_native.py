"""The CPU kernel against the reference, in and around its limits."""

import math
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import helpers
import pytest
import torch
from helpers import (
    TOLERANCE,
    Shape,
    assert_all_close,
    assert_mixes,
    assert_threads_agree,
    each_shape,
    outputs_and_gradients,
    run_script,
    shapes,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from acmix.ops import _native, weighted_aggregation, window_attention
from acmix.ops.weighted_aggregation import native as aggregation_native
from acmix.ops.weighted_aggregation import reference as aggregation_reference
from acmix.ops.window_attention import native, reference

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(_native.reason() is not None, reason=str(_native.reason()))

# (H, W, window, stride, dilation)
GRID = shapes(
    "1 1 1 1 1, 1 1 7 2 3, 1 9 7 1 1, 1 40 3 3 2, 9 1 5 1 1, 12 1 13 2 2, 2 2 7 1 1, "
    "2 2 13 3 3, 3 5 13 1 1, 3 5 5 2 1, 4 4 3 1 5, 5 3 9 3 2, 7 7 7 1 1, 8 8 7 2 1, "
    "7 8 11 1 2, 14 14 7 1 1, 14 15 7 2 1, 13 17 5 3 1, 16 16 1 2 1, 10 33 3 1 1, "
    "9 70 7 1 1, 9 70 7 2 1, 9 70 5 3 2, 11 25 9 1 3, 31 12 7 1 1, 40 9 3 3 1, "
    "6 24 13 1 1"
)
grid = each_shape(GRID)


def attention_inputs(
    shape: Shape, head_dim: int = 3, dtype: torch.dtype = torch.float32, heads: int = 2
) -> list[Tensor]:
    """As the kernel takes them, heads apart; the position in float32."""
    *maps, position = helpers.attention_inputs(shape, head_dim, dtype, heads)
    return [*(x.unflatten(1, (heads, head_dim)) for x in maps), position.float()]


def aggregation_inputs(
    shape: Shape, shared: int = 2, each: int = 3, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    height, width, window, stride, _ = shape
    out_size = math.ceil(height / stride), math.ceil(width / stride)
    weight = torch.randn(2, shared, window * window, *out_size, dtype=dtype)
    return [weight, torch.randn(2, shared * each, height, width, dtype=dtype)]


def run(forward: Callable[..., Tensor], shape: Shape) -> Callable[..., Tensor]:
    return lambda *tensors: forward(*tensors, *shape[2:])


def check_attention(shape: Shape, inputs: list[Tensor | None], tolerance: float) -> None:
    if inputs[3] is None:
        inputs = inputs[:3]
    fill = [None] * (4 - len(inputs))
    actual = outputs_and_gradients(lambda *x: run(native.forward, shape)(*x, *fill), inputs)
    doubles = [x.double() for x in inputs]
    truth = outputs_and_gradients(lambda *x: run(reference.forward, shape)(*x, *fill), doubles)
    assert_all_close(actual, truth, tolerance)


def check_aggregation(shape: Shape, inputs: list[Tensor], tolerance: float) -> None:
    actual = outputs_and_gradients(run(aggregation_native.forward, shape), inputs)
    doubles = [x.double() for x in inputs]
    truth = outputs_and_gradients(run(aggregation_reference.forward, shape), doubles)
    assert_all_close(actual, truth, tolerance)


@pytest.fixture(params=["torch", "own"])
def threads_of(request: pytest.FixtureRequest) -> Iterator[None]:
    """PyTorch's threads, and the kernel's own for where those are not to be had."""
    library = _native._library()
    if request.param == "own":
        library.acmix_lend_threads(None)
    yield
    library.acmix_lend_threads(_native._parallel_region())


@pytest.fixture
def poison() -> Iterator[Callable[[], None]]:
    """New tensors are full of NaN; so is the kernel's scratch after a call of the result."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    assert torch.empty(3).isnan().all()

    def fill_scratch() -> None:
        shape = (16, 80, 13, 1, 1)
        nan = [x * math.nan for x in attention_inputs(shape, 8)]
        outputs_and_gradients(run(native.forward, shape), nan)

    yield fill_scratch
    torch.use_deterministic_algorithms(False)


@grid
def test_grid_attention(shape: Shape) -> None:
    check_attention(shape, attention_inputs(shape), TOLERANCE[torch.float32])


@grid
def test_grid_aggregation(shape: Shape) -> None:
    check_aggregation(shape, aggregation_inputs(shape), TOLERANCE[torch.float32])


@pytest.mark.parametrize("head_dim", [1, 2, 8, 16, 31, 64, 256])
def test_grid_head_dim(head_dim: int) -> None:
    shape = (6, 19, 5, 1, 1)
    check_attention(shape, attention_inputs(shape, head_dim), TOLERANCE[torch.float32])


@pytest.mark.parametrize("window", [1, 3, 5, 7, 9, 11, 13])
def test_grid_window(window: int) -> None:
    shape = (8, 21, window, 1, 1)
    check_attention(shape, attention_inputs(shape), TOLERANCE[torch.float32])
    check_aggregation(shape, aggregation_inputs(shape), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(7, 7, 7, 1, 1), (9, 21, 5, 2, 2)], ids=str)
def test_half_precision(shape: Shape, dtype: torch.dtype) -> None:
    inputs = attention_inputs(shape, 8, dtype)
    check_attention(shape, inputs, TOLERANCE[dtype])
    check_aggregation(shape, aggregation_inputs(shape, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_conversions_are_exact(dtype: torch.dtype) -> None:
    """A window of one tap copies the values: every finite number of the type comes back, and
    float32 sums round as PyTorch rounds them."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    v = bits.view(dtype)
    v = v[v.isfinite()].reshape(1, 1, 1, 1, -1)
    v = v[..., : v.shape[-1] // 2 * 2]
    out = native.forward(v * 0, v * 0, v, None, 1, 1, 1)
    assert torch.equal(out, v)
    pairs = v.reshape(1, 1, 1, 2, -1)
    weight = torch.full((1, 1, 9, *pairs.shape[-2:]), 0.25, dtype=dtype)
    weight[:, :, [0, 1, 2, 3, 5, 6, 8]] = 0
    out = aggregation_native.forward(weight, pairs[0], 3, 1, 1)
    # Tap 4 is the pixel, tap 7 the row below or, from the last, the one above.
    expected = (pairs.float() * 0.25 + pairs.flip(-2).float() * 0.25).to(dtype)
    assert torch.equal(out, expected[0])


def fused_views(layout: str, fused: Tensor) -> tuple[Tensor, ...]:
    """q, k, v in one tensor of (B, H, W, 3C) or (B, 3C, H, W), heads or channels first."""
    dim = 3 if "channels_last" in layout else 1
    if "head_major" in layout:
        parts = fused.unflatten(dim, (3, 4, 8)).unbind(dim)
    else:
        parts = [x.transpose(dim, dim + 1) for x in fused.unflatten(dim, (8, 12)).split(4, dim + 1)]
    return tuple(x.permute(0, 3, 4, 1, 2) if dim == 3 else x for x in parts)


@pytest.mark.parametrize("order", ["head_major", "channel_major"])
@pytest.mark.parametrize("memory", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(7, 7), (10, 37)], ids=str)
def test_layouts(memory: str, order: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    layout = f"{memory} {order}"
    map_size = (2, *size, 96) if memory == "channels_last" else (2, 96, *size)
    fused, position = torch.randn(map_size).to(dtype), torch.randn(8, 2)
    results = []
    for module, x in ((native, fused), (reference, fused.double())):
        results.append(
            outputs_and_gradients(
                lambda x, p, m=module: m.forward(*fused_views(layout, x), p, 7, 1, 1),
                [x, position.to(torch.promote_types(x.dtype, torch.float32))],
            )
        )
    assert_all_close(*results, TOLERANCE[dtype])
    out = native.forward(*fused_views(layout, fused), position, 7, 1, 1)
    assert (out.stride(2) == 1) == (memory == "channels_last")
    assert (out.stride(4) == 1) == (memory == "nchw")


def test_strided_and_expanded_inputs() -> None:
    big = torch.randn(2, 2, 5, 18, 40)
    q = big[..., ::2, 1::4]
    k = torch.randn(2, 1, 5, 9, 1).expand(2, 2, 5, 9, 10)
    v = big.flip(3)[..., ::2, ::4].transpose(0, 1)
    grad = torch.ones(()).expand(2, 2, 5, 9, 10)
    results = []
    for forward, cast in (
        (native.forward, torch.Tensor.float),
        (reference.forward, torch.Tensor.double),
    ):
        leaves = [cast(x).requires_grad_() for x in (q, k, v)]
        out = forward(*leaves, None, 5, 1, 1)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, cast(grad))])
    assert_all_close(*results, TOLERANCE[torch.float32])


def test_empty_batch() -> None:
    shape = (5, 6, 3, 1, 1)
    inputs = [x[:0] for x in attention_inputs(shape)[:3]]
    out, *gradients = outputs_and_gradients(
        lambda q, k, v, p: native.forward(q, k, v, p, *shape[2:]), [*inputs, torch.ones(3, 2)]
    )
    assert out.shape == (0, 2, 3, 5, 6)
    assert torch.equal(gradients[3], torch.zeros(3, 2))
    weight, v = (x[:0] for x in aggregation_inputs(shape))
    outputs_and_gradients(run(aggregation_native.forward, shape), [weight, v])


@pytest.mark.parametrize("shape", GRID[::3], ids=str)
def test_poisoned_memory(shape: Shape, poison: Callable[[], None]) -> None:
    """Nothing is read before it is written: neither new tensors nor what earlier calls left."""
    inputs, aggregation = attention_inputs(shape, 5), aggregation_inputs(shape)
    poison()
    actual = outputs_and_gradients(run(native.forward, shape), inputs)
    poison()
    actual += outputs_and_gradients(run(aggregation_native.forward, shape), aggregation)
    assert all(x.isfinite().all() for x in actual)


@pytest.mark.parametrize("size", [(7, 7), (33, 20)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_threads_agree_to_the_bit(size: tuple[int, int], stride: int, threads_of: None) -> None:
    shape = (*size, 7, stride, 1)
    inputs, aggregation = attention_inputs(shape, 8), aggregation_inputs(shape)
    assert_threads_agree(
        lambda: (
            outputs_and_gradients(run(native.forward, shape), inputs)
            + outputs_and_gradients(run(aggregation_native.forward, shape), aggregation)
        )
    )


def test_mix() -> None:
    shape = (9, 20, 5, 1, 1)
    q, k, v, position = attention_inputs(shape)
    inputs = [q, k, v, position, torch.randn_like(q), torch.tensor(-0.7), torch.randn_like(q[:1])]

    assert_mixes(native.forward, inputs, shape, TOLERANCE[torch.float32])


def test_extreme_logits() -> None:
    """Logits of +-1e5 neither overflow nor leave a window without weight; NaN stays NaN."""
    shape = (6, 20, 5, 1, 1)
    q, k, v, position = attention_inputs(shape)
    check_attention(shape, [q * 10, k * 10, v, position], 1e-3)
    inputs = [q * 1000, k * 100, v, position]
    actual = outputs_and_gradients(run(native.forward, shape), inputs)
    assert all(x.isfinite().all() for x in actual)
    assert actual[0].abs().max() <= v.abs().max()
    out = native.forward(q * math.nan, k, v, position, *shape[2:])
    assert out.isnan().all()


def test_large_dilation_and_stride() -> None:
    """Beyond the map a step of the reflection's period is no step."""
    for shape in [(5, 6, 3, 1, 10**6), (5, 6, 3, 10**6, 1), (5, 6, 7, 4, 999)]:
        check_attention(shape, attention_inputs(shape), TOLERANCE[torch.float32])


maps = st.tuples(
    st.integers(1, 20),
    st.integers(1, 40),
    st.sampled_from([1, 3, 5, 7, 9]),
    st.integers(1, 4),
    st.integers(1, 4),
)


@given(
    shape=maps,
    heads=st.integers(1, 5),
    head_dim=st.integers(1, 9),
    order=st.permutations(range(5)),
    position=st.booleans(),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
def test_any_attention(
    shape: Shape, heads: int, head_dim: int, order: list[int], position: bool
) -> None:
    *tensors, weight = attention_inputs(shape, head_dim, heads=heads)
    back = torch.tensor(order).argsort().tolist()
    tensors = [x.permute(order).contiguous().permute(back) for x in tensors]
    check_attention(shape, [*tensors, weight if position else None], 2e-5)


@given(shape=maps, shared=st.integers(1, 5), each=st.integers(1, 5))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
def test_any_aggregation(shape: Shape, shared: int, each: int) -> None:
    check_aggregation(shape, aggregation_inputs(shape, shared, each), 2e-5)


def test_python_threads_at_once(threads_of: None) -> None:
    torch.set_num_threads(2)
    shape = (14, 30, 7, 1, 1)
    inputs = attention_inputs(shape, 8)
    expected = outputs_and_gradients(run(native.forward, shape), inputs)
    results: list[list[Tensor]] = []

    def work() -> None:
        for _ in range(20):
            results.append(outputs_and_gradients(run(native.forward, shape), inputs))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 80
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.slow
def test_after_fork() -> None:
    """A child finds a pool without threads and starts its own."""
    script = """
import os, torch
from acmix.ops.window_attention import native
q = torch.randn(4, 4, 8, 14, 14)
torch.set_num_threads(3)
before = native.forward(q, q, q, None, 7, 1, 1)
child = os.fork()
if child == 0:
    same = all(torch.equal(before, native.forward(q, q, q, None, 7, 1, 1)) for _ in range(5))
    os._exit(0 if same else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(before, native.forward(q, q, q, None, 7, 1, 1))
"""
    run_script(script)


@pytest.mark.slow
def test_unknown_instructions() -> None:
    script = """
from acmix.ops import backends
assert backends()["native"] == "ACMIX_SIMD: expected plain, avx2, avx512, got 'sse'"
"""
    run_script(script, ACMIX_SIMD="sse")


@pytest.mark.slow
def test_import_loads_no_library() -> None:
    script = """
from acmix.ops import _native
assert _native._load.cache_info().currsize == 0
"""
    run_script(script)


def samples() -> Iterator[tuple[torch._ops.OpOverload, tuple]]:
    shape = (6, 9, 3, 2, 1)
    q, k, v, position = (x.requires_grad_() for x in attention_inputs(shape, 4))
    last = [
        x.detach().permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2).requires_grad_()
        for x in (q, k, v)
    ]
    attention = torch.ops.acmix.window_attention.default
    alpha = torch.tensor(0.7, requires_grad=True)
    base = torch.randn(q.shape, requires_grad=True)
    bias = torch.randn(q[:1].shape, requires_grad=True)
    mix = base, bias, position, alpha
    yield attention, (q, k, v, *mix, *shape[2:])
    yield attention, (*last, None, None, None, None, *shape[2:])
    out, lse = (x.detach() for x in attention(q, k, v, *mix, *shape[2:]))
    detached = [x.detach() for x in (out, q, k, v, position, alpha, lse)]
    yield torch.ops.acmix.window_attention_backward.default, (*detached, *shape[2:])
    weight, v = (x.requires_grad_() for x in aggregation_inputs(shape))
    v = v.unflatten(1, (3, 2)).transpose(1, 2).detach().requires_grad_()
    aggregation = torch.ops.acmix.weighted_aggregation.default
    yield aggregation, (weight, v, *shape[2:])
    out = aggregation(weight, v, *shape[2:]).detach()
    arguments = (out, weight.detach(), v.detach(), *shape[2:])
    yield torch.ops.acmix.weighted_aggregation_backward.default, arguments


@pytest.mark.parametrize("index", range(5))
def test_opcheck(index: int) -> None:
    operator, arguments = list(samples())[index]
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.slow
def test_compile(dynamic: bool) -> None:
    def both(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        out = window_attention(q * 2, k, v, heads=2, window=3, backend="native")
        return weighted_aggregation(weight, out, window=3, backend="native") + 1

    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in [(6, 7), (9, 12)]:
        inputs = [torch.randn(2, 8, *size) for _ in range(3)]
        inputs[2] = inputs[2].to(memory_format=torch.channels_last)
        inputs.append(torch.randn(2, 4, 9, *size))
        eager = outputs_and_gradients(both, inputs)
        assert_all_close(outputs_and_gradients(compiled, inputs), eager, 1e-6)


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return window_attention(x, x, x, heads=2, window=3, backend="native")

    x = torch.randn(2, 4, 6, 7)
    size = {2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)}
    program = torch.export.export(Module(), (x,), dynamic_shapes=({**size},))
    other = torch.randn(2, 4, 9, 5)
    assert torch.equal(program.module()(other), Module()(other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    shape = (6, 7, 3, 1, 1)
    inputs, aggregation = attention_inputs(shape), aggregation_inputs(shape)
    with torch.autocast("cpu", dtype=dtype):
        out = native.forward(*inputs, *shape[2:], base=torch.zeros_like(inputs[0]))
        aggregated = aggregation_native.forward(*aggregation, *shape[2:])
    assert out.dtype == aggregated.dtype == dtype
    assert_all_close([out], [reference.forward(*inputs, *shape[2:])], TOLERANCE[dtype])


def test_flop_formulas() -> None:
    shape = (6, 7, 3, 1, 1)
    q, k, v, position = (x.requires_grad_() for x in attention_inputs(shape))
    with FlopCounterMode(display=False) as counter:
        native.forward(q, k, v, position, *shape[2:]).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * 9 * q.numel()
    weight, v = (x.requires_grad_() for x in aggregation_inputs(shape))
    with FlopCounterMode(display=False) as counter:
        aggregation_native.forward(weight, v, *shape[2:]).sum().backward()
    assert counter.get_total_flops() == (1 + 2) * 2 * 9 * v.numel()


def test_why_not() -> None:
    assert native.why_not(torch.ones(1)) is None
    assert "float64" in native.why_not(torch.ones(1, dtype=torch.float64))


def test_internal_errors_are_raised() -> None:
    """Sizes that the Python side got wrong never reach memory."""
    q, k, v, _ = attention_inputs((5, 6, 3, 1, 1))
    out, lse = torch.empty_like(q), q.new_empty(2, 2, 5, 6)
    with pytest.raises(RuntimeError, match="internal error: a size out of range"):
        _native.attention_forward(q, k, v, None, (4, 1, 1), out, lse)
    with pytest.raises(RuntimeError, match="internal error: a tensor that does not fit"):
        _native.attention_forward(q[..., :-1], k, v, None, (3, 1, 1), out, lse)
    with pytest.raises(RuntimeError, match="internal error: a tensor that does not fit"):
        _native.attention_forward(q, k, v, None, (3, 2, 1), out, lse)


def build_wheel(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A wheel from a copy of the sources, which leaves this checkout alone."""
    source = folder / "source"
    ignore = shutil.ignore_patterns("_kernel*", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "src", source / "src", ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("ACMIX_")}
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q"]
    return subprocess.run(
        [*command, "-w", str(folder), str(source)],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_no_compiler(tmp_path: Path) -> None:
    """The install goes on without the kernel and the reason is told; or it fails when asked to."""
    done = build_wheel(tmp_path, CC="/nonexistent", CXX="/nonexistent")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        assert not [name for name in names if name.endswith((".so", ".pyd", ".o"))]
        assert b"/nonexistent" in wheel.read("acmix/_kernel_missing.txt")
        wheel.extractall(tmp_path / "installed")
    script = """
import acmix.ops._native as native
assert "could not be compiled" in native.reason(), native.reason()
"""
    run_script(script, PYTHONPATH=str(tmp_path / "installed"))


def test_no_compiler_where_one_is_required(tmp_path: Path) -> None:
    done = build_wheel(tmp_path, CXX="/nonexistent", CC="/nonexistent", ACMIX_REQUIRE_NATIVE="1")
    assert done.returncode != 0


def test_no_native(tmp_path: Path) -> None:
    done = build_wheel(tmp_path, ACMIX_NO_NATIVE="1")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        assert b"ACMIX_NO_NATIVE" in wheel.read("acmix/_kernel_missing.txt")


SIZES = 3, 1, 1  # window, stride, dilation
WRONG = {
    "position": lambda o, x: o.window_attention(
        x, x, x, None, None, torch.ones(1, 2), None, *SIZES
    ),
    "alpha": lambda o, x: o.window_attention(x, x, x, None, None, None, torch.ones(0), *SIZES),
    "lse": lambda o, x: o.window_attention_backward(x, x, x, x, None, None, x[0, 0, 0], *SIZES),
    "bias": lambda o, x: o.partition_attention(
        x.repeat(1, 3, 1, 1, 1), x[0, :1, 0], [2, 3], [0, 0]
    ),
    "dtype": lambda o, x: o.window_attention(*[x.double()] * 3, *[None] * 4, *SIZES),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_pointer_is_checked_before_it_is_passed_on(name: str) -> None:
    """An operator may be called by itself, or by a program that was edited."""
    with pytest.raises((ValueError, NotImplementedError)):
        WRONG[name](torch.ops.acmix, torch.randn(1, 2, 4, 4, 6))
