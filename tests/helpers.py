"""What several test files share: one table of tolerances, gradients of a random loss, a layer as a
function, the forms of its convolution path, and memory that nothing wrote."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from acmix.ops import weighted_aggregation, window_attention
from acmix.ops._library import INTERPRETED
from acmix.ops.shift_convolution import IMPLEMENTATIONS as CONVOLUTION
from acmix.ops.window_attention import reference

Layer = TypeVar("Layer", bound=nn.Module)
Shape = tuple[int, int, int, int, int]  # H, W, window, stride, dilation

# Of what may run on a GPU; in Triton's interpreter that is the CPU.
DEVICE = torch.device("cpu")
if not INTERPRETED:
    DEVICE = torch.accelerator.current_accelerator(check_available=True) or DEVICE

# Largest error relative to the largest magnitude of the expected tensor, or to 0.1 where that is
# larger: a gradient that is zero comes out as the rounding of its terms, which are of order 1.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def outputs_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None]
) -> list[Tensor]:
    """function(*inputs) and the gradient of a fixed weighted sum of it for every input."""
    leaves = [x.detach().clone().requires_grad_() if x is not None else None for x in inputs]
    out = function(*leaves)
    gradients = torch.autograd.grad(weighted_sum(out), [x for x in leaves if x is not None])
    return [out.detach(), *gradients]


def weighted_sum(out: Tensor) -> Tensor:
    """A loss. Its weights are no slow wave: sums over the map, as the position weight's gradient,
    would cancel to noise."""
    places = torch.arange(out.numel(), dtype=torch.float64, device="cpu")
    weights = places.cos().view_as(out)
    return (out * weights.to(out)).sum()


def assert_all_close(
    actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, what: str = ""
) -> None:
    assert len(actual) == len(expected)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape, f"{what} tensor {index}: {a.shape} against {e.shape}"
        if e.numel() == 0:
            continue
        a, e = a.double(), e.double()
        error = ((a - e).abs().max() / e.abs().max().clamp_min(0.1)).item()
        assert error <= tolerance, f"{what} tensor {index}: relative error {error:.2e}"


def assert_threads_agree(function: Callable[[], list[Tensor]]) -> None:
    """The same bits with any number of threads."""
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(function())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def run_script(script: str, **environment: str) -> str:
    """What a Python script printed, in a process of its own that must end well."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def shapes(text: str) -> list[Shape]:
    """Of "H W window stride dilation, ...": tables of them are read more easily so."""
    read = (tuple(map(int, shape.split())) for shape in text.split(","))
    return [(h, w, window, stride, dilation) for h, w, window, stride, dilation in read]


def each_shape(shapes: Sequence[Shape]) -> pytest.MarkDecorator:
    """A test for each shape, named by it."""
    return pytest.mark.parametrize(
        "shape", shapes, ids=lambda s: "{}x{}-window{}-stride{}-dilation{}".format(*s)
    )


def attention_inputs(
    shape: Shape,
    head_dim: int = 3,
    dtype: torch.dtype = torch.float32,
    heads: int = 2,
    batch: int = 2,
) -> list[Tensor]:
    """q (B, C, Ho, Wo), k and v (B, C, H, W), position (d, 2)."""
    height, width, _, stride, _ = shape
    out_size = math.ceil(height / stride), math.ceil(width / stride)
    channels = heads * head_dim
    q = torch.randn(batch, channels, *out_size, dtype=dtype)
    k, v = torch.randn(2, batch, channels, height, width, dtype=dtype)
    return [q, k, v, torch.randn(head_dim, 2, dtype=dtype)]


def attention(shape: Shape, backend: str, heads: int = 2) -> Callable[..., Tensor]:
    """Window attention of one shape by one backend, as a function of the tensors."""
    _, _, window, stride, dilation = shape
    sizes = {"heads": heads, "window": window, "stride": stride, "dilation": dilation}

    def function(q: Tensor, k: Tensor, v: Tensor, position: Tensor | None = None) -> Tensor:
        return window_attention(q, k, v, position=position, backend=backend, **sizes)

    return function


def aggregation(shape: Shape, backend: str) -> Callable[..., Tensor]:
    """Weighted aggregation of one shape by one backend, as a function of the tensors."""
    _, _, window, stride, dilation = shape
    sizes = {"window": window, "stride": stride, "dilation": dilation}
    return partial(weighted_aggregation, backend=backend, **sizes)


def mixed_attention(shape: Shape) -> Callable[..., Tensor]:
    """What the fused operators compute, by the reference: base + bias + alpha * attention."""

    def function(q: Tensor, k: Tensor, v: Tensor, position: Tensor, *mix: Tensor) -> Tensor:
        base, alpha, bias = mix
        return base + bias + alpha * reference.forward(q, k, v, position, *shape[2:])

    return function


def assert_mixes(
    forward: Callable[..., Tensor], inputs: Sequence[Tensor], shape: Shape, tolerance: float
) -> None:
    """base + bias + alpha * attention, and every gradient, of (q, k, v, position, base, alpha,
    bias)."""

    def actual(q: Tensor, k: Tensor, v: Tensor, p: Tensor, *mix: Tensor) -> Tensor:
        return forward(q, k, v, p, *shape[2:], *mix)

    assert_all_close(
        outputs_and_gradients(actual, inputs),
        outputs_and_gradients(mixed_attention(shape), [x.double() for x in inputs]),
        tolerance,
    )


def as_function(layer: nn.Module) -> Callable[..., Tensor]:
    """The layer as a function of x and its parameters, for the gradient of each."""
    names = [name for name, _ in layer.named_parameters()]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    return function


def set_form(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Every backend but the reference takes that form, "pieces" or "dense"."""
    for backend in ("tiled", "native"):
        monkeypatch.setattr(CONVOLUTION[backend], "dense", lambda x: form == "dense")


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """In the folders whose conftest.py imports it: what nothing wrote is NaN, not a lucky zero."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


def slow_but(fast: Iterable[str], names: Iterable[str]) -> list[Any]:
    """Parameters of a test: `make test-fast` takes the fast ones."""
    slow = pytest.mark.slow
    return [name if name in fast else pytest.param(name, marks=slow) for name in names]


def perturbed(layer: Layer, by: float = 0.3) -> Layer:
    """With parameters away from every special value."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return layer
