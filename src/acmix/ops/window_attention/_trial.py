"""Whether a GPU runs the kernels, and rightly: found by running them on a small map."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from acmix.ops.window_attention import _fused, reference

CAPABILITY = (7, 5)  # of NVIDIA's GPUs, the least that Triton compiles for
TOLERANCE = 3e-2  # relative to the largest value: bfloat16's, and no mistake's


def fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels are not to be used on a GPU, in one line; None where they are right.

    Output and gradients of a map with borders against the reference. Takes seconds where the
    kernels are not in Triton's cache.
    """
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < CAPABILITY:
            return f"they need compute capability {CAPABILITY}, {device} has {capability}"
    # In a thread of its own no mode of the caller's is on: autocast, inference, tracing.
    with ThreadPoolExecutor(1) as thread:
        try:
            error = thread.submit(_largest_error, device, dtype).result()
        except Exception as raised:  # whatever a compiler or a driver may raise
            line = str(raised).strip().partition("\n")[0]
            return f"they do not run on {device}: {type(raised).__name__}: {line}"
    if not error <= TOLERANCE:
        return f"on {device} they differ from the reference by {error:.1e}"
    return None


def _largest_error(device: torch.device, dtype: torch.dtype) -> float:
    """Of the output and every gradient, relative to the largest value of each."""
    sizes = [(1, 2, 8, 5, 6)] * 4 + [(8, 2), ()]  # q, k, v, base; position, alpha
    leaves = [
        (torch.arange(1.0, 1 + torch.Size(size).numel()) * (i + 1)).sin().view(size).to(dtype)
        for i, size in enumerate(sizes)
    ]

    def results(*inputs: Tensor, exact: bool) -> list[Tensor]:
        inputs = tuple(x.requires_grad_() for x in inputs)
        q, k, v, base, position, alpha = inputs
        if exact:
            out = base + alpha * reference.forward(q, k, v, position, 3, 1, 1)
        else:
            out = _fused.forward(q, k, v, position, 3, 1, 1, base, alpha)
        weights = torch.arange(out.numel()).cos().view(out.shape).to(out)
        return [out.detach(), *torch.autograd.grad(out, inputs, weights)]

    actual = results(*(x.to(device, copy=True) for x in leaves), exact=False)
    expected = results(*(x.double() for x in leaves), exact=True)
    return max(
        ((a.cpu().double() - e).abs().max() / e.abs().max()).item()
        for a, e in zip(actual, expected, strict=True)
    )
