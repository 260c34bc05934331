"""What several test files share: one table of tolerances, gradients of a random loss, operators by
a backend, a layer as a function, and the two forms of its convolution path."""

from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from acmix.ops import weighted_aggregation, window_attention
from acmix.ops._library import INTERPRETED
from acmix.ops.window_attention import reference

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
    weights = torch.arange(out.numel(), dtype=torch.float64).cos().view_as(out)
    return (out * weights.to(out)).sum()


def attention(shape: Shape, backend: str, heads: int = 2) -> Callable[..., Tensor]:
    """The public operator on maps of that shape."""
    _, _, window, stride, dilation = shape

    def function(q: Tensor, k: Tensor, v: Tensor, position: Tensor | None = None) -> Tensor:
        return window_attention(
            q,
            k,
            v,
            heads=heads,
            window=window,
            stride=stride,
            dilation=dilation,
            position=position,
            backend=backend,
        )

    return function


def aggregation(shape: Shape, backend: str) -> Callable[..., Tensor]:
    """The public operator on maps of that shape."""
    _, _, window, stride, dilation = shape
    return lambda weight, v: weighted_aggregation(
        weight, v, window=window, stride=stride, dilation=dilation, backend=backend
    )


def mixed_attention(shape: Shape) -> Callable[..., Tensor]:
    """What the fused operators compute, by the reference: base + bias + alpha * attention."""

    def function(
        q: Tensor, k: Tensor, v: Tensor, position: Tensor, base: Tensor, alpha: Tensor, bias: Tensor
    ) -> Tensor:
        return base + bias + alpha * reference.forward(q, k, v, position, *shape[2:])

    return function


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


def as_function(layer: nn.Module) -> Callable[..., Tensor]:
    """The layer as a function of x and its parameters, for the gradient of each."""
    names = [name for name, _ in layer.named_parameters()]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    return function


def convolution_forms(layers: ModuleType) -> Callable[..., str]:
    """A fixture: both forms of the folded convolution path of a file's layers, on any device."""

    @pytest.fixture(params=["pieces", "dense"])
    def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        dense = request.param == "dense"
        monkeypatch.setattr(layers, "prefers_dense", lambda x: dense)
        return request.param

    return form
