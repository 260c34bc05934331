"""Whether a GPU runs an operator's kernels, and rightly: found by running them on a small map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

CAPABILITY = (7, 5)  # of NVIDIA's GPUs, the least that Triton compiles for
TOLERANCE = 3e-2  # relative to the largest value: bfloat16's, and no mistake's


def fault(
    error: Callable[[torch.device, torch.dtype], float], device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why kernels are not to be used on a GPU, in one line; None where their `error` is small.

    Takes seconds where the kernels are not in Triton's cache. Raises torch.OutOfMemoryError, which
    says nothing about them.
    """
    # In a thread of its own no mode of the caller's is on: autocast, inference, tracing.
    with ThreadPoolExecutor(1) as thread:
        try:
            if old := _too_old(device):
                return old
            found = thread.submit(error, device, dtype).result()
        except torch.OutOfMemoryError:
            raise
        except Exception as raised:  # whatever a compiler or a driver may raise
            line = str(raised).strip().partition("\n")[0]
            return f"they do not run on {device}: {type(raised).__name__}: {line}"
    if not found <= TOLERANCE:
        return f"on {device} they differ from the reference by {found:.1e}"
    return None


def _too_old(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= CAPABILITY:
        return None
    return f"they need compute capability {CAPABILITY}, {device} has {capability}"


def largest_error(
    actual: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    sizes: Sequence[tuple[int, ...]],
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Of the output and of every gradient, relative to the largest value of each, for arguments of
    these sizes, the values first; `exact` computes in float64 on the CPU."""

    def draw(size: tuple[int, ...], frequency: float) -> Tensor:
        places = torch.arange(1.0, 1 + torch.Size(size).numel())
        return (places * frequency).sin().view(size).to(dtype)

    leaves = [draw(size, i + 1) for i, size in enumerate(sizes)]

    def results(function: Callable[..., Tensor], like: Tensor) -> list[Tensor]:
        inputs = [x.to(like, copy=True).requires_grad_() for x in leaves]
        out = function(*inputs)
        # In step with the values, so that the sum that is alpha's gradient does not cancel.
        weights = draw(tuple(out.shape), 1).to(out)
        return [out.detach(), *torch.autograd.grad(out, inputs, weights)]

    on_gpu = results(actual, torch.empty(0, device=device, dtype=dtype))
    expected = results(exact, torch.empty(0, dtype=torch.float64))
    return max(
        ((a.cpu().double() - e).abs().max() / e.abs().max()).item()
        for a, e in zip(on_gpu, expected, strict=True)
    )
