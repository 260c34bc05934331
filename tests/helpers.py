"""What several test files share: one table of tolerances, gradients of a random loss, a layer as a
function, and the forms of its convolution path."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from acmix.ops._library import INTERPRETED
from acmix.ops.shift_convolution import IMPLEMENTATIONS as CONVOLUTION

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
