"""The GPU kernels against the reference, in all dtypes, before anything is timed."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import acmix
from acmix.ops import weighted_aggregation, window_attention

# Relative to the largest value of each result; products of float32 are exact.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 8e-3}
# batch, heads, head_dim, height, width, window, stride, dilation
ATTENTION = [
    (2, 4, 16, 17, 13, 7, 1, 1),
    (1, 2, 32, 14, 15, 7, 2, 1),
    (1, 4, 64, 9, 30, 7, 1, 2),
    (2, 1, 128, 7, 7, 7, 1, 1),
    (1, 3, 20, 11, 5, 3, 1, 1),
    (1, 1, 256, 8, 9, 5, 1, 1),
    (1, 2, 16, 30, 16, 13, 1, 1),
    (1, 2, 16, 1, 5, 7, 1, 1),
]
AGGREGATION = [(2, 16, 9, 11, 3), (1, 64, 17, 8, 7), (1, 24, 1, 4, 5)]  # B, C, H, W, window
LAYERS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((2, 64, 15, 13), {}),
    ((2, 64, 15, 13), {"stride": 2, "heads": 2}),
    ((1, 32, 14, 14), {"dilation": 2, "shift": "tensor"}),
    ((1, 32, 9, 8), {"mix": "convex", "position": False}),
    ((1, 48, 9, 8), {"mix": "attention", "kernel_att": 3}),
]


def faults(device: torch.device, backend: str) -> dict[torch.dtype, list[str]]:
    """For each dtype a line for each case whose output or gradients are off, or that fails."""
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # as products are; else convolutions are off by 1e-3
    try:
        found = {dtype: faults_in(dtype, device, backend) for dtype in TOLERANCE}
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    if device.type == "cuda":
        found[torch.bfloat16] += beyond_32_bits(device, backend)
    return found


def faults_in(dtype: torch.dtype, device: torch.device, backend: str) -> list[str]:
    found = [fault(*case, backend, dtype) for case in cases(device)]
    found += [layer_fault(size, arguments, device, backend, dtype) for size, arguments in LAYERS]
    return [line for line in found if line]


def fault(
    name: str,
    function: Any,
    inputs: list[Tensor],
    arguments: dict[str, Any],
    backend: str,
    dtype: torch.dtype,
) -> str | None:
    """What is wrong with an operator, None where nothing is."""

    def error() -> float:
        rounded = [x.to(dtype) for x in inputs]
        exact = results(function, [x.double() for x in rounded], backend="reference", **arguments)
        return worst(results(function, rounded, backend=backend, **arguments), exact)

    return judged(f"{name}, {dtype}", error, dtype)


def judged(name: str, error: Callable[[], float], dtype: torch.dtype) -> str | None:
    try:
        found = error()
    except Exception as raised:
        traceback.print_exc()
        return f"{name}: {line_of(raised)}"
    return None if found <= TOLERANCE[dtype] else f"{name}: error {found:.1e}"


def line_of(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def cases(device: torch.device) -> Iterator[tuple[str, Any, list[Tensor], dict[str, Any]]]:
    """(name, operator, its tensors in float64, its arguments)."""

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=torch.float64)

    for batch, heads, width, *side, window, stride, dilation in ATTENTION:
        maps = [-(-length // stride) for length in side]
        q, k, v = (draw(batch, heads * width, *size) for size in (maps, side, side))
        arguments = {"heads": heads, "window": window, "stride": stride, "dilation": dilation}
        name = f"attention {tuple(k.shape)} {arguments}"
        yield name, positioned, [q, k, v, draw(width, 2)], arguments
    for batch, channels, height, width, window in AGGREGATION:
        weight = draw(batch, channels // 8, window**2, height, width)
        v = draw(batch, channels, height, width)
        name = f"aggregation {tuple(v.shape)}, window {window}"
        yield name, weighted_aggregation, [weight, v], {"window": window}


def positioned(q: Tensor, k: Tensor, v: Tensor, position: Tensor, **arguments: Any) -> Tensor:
    return window_attention(q, k, v, position=position, **arguments)


def layer_fault(
    size: tuple[int, ...],
    arguments: dict[str, Any],
    device: torch.device,
    backend: str,
    dtype: torch.dtype,
) -> str | None:
    """The same of the layer, its parameters' gradients among what is compared."""

    def error() -> float:
        channels = size[1]
        layer = acmix.ACmix2d(channels, channels, backend=backend, **arguments).to(device, dtype)
        exact = acmix.ACmix2d(channels, channels, backend="reference", **arguments).to(device)
        exact.double().load_state_dict({k: v.double() for k, v in layer.state_dict().items()})
        x = torch.randn(size, device=device).to(dtype, memory_format=torch.channels_last)
        # In half precision sums over all pixels, as alpha's gradient, may cancel to mere noise.
        compared = None if dtype == torch.float32 else 2
        return worst(of_layer(layer, x)[:compared], of_layer(exact, x.double())[:compared])

    return judged(f"ACmix2d {size} {arguments}, {dtype}", error, dtype)


def of_layer(layer: nn.Module, x: Tensor) -> list[Tensor]:
    return results(lambda x, *_: layer(x), [x, *layer.parameters()])


def results(function: Any, inputs: list[Tensor], **arguments: Any) -> list[Tensor]:
    """The output, and the gradients of a weighted sum of it."""
    leaves = [x if isinstance(x, nn.Parameter) else x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, **arguments)
    weights = torch.arange(out.numel(), device=out.device).cos().view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def worst(actual: list[Tensor], exact: list[Tensor]) -> float:
    errors = [
        ((a.double() - e.double()).abs().max() / e.abs().max().clamp_min(0.1)).item()
        for a, e in zip(actual, exact, strict=True)
    ]
    return max(errors, key=lambda error: (error != error, error))  # NaN is the worst


def beyond_32_bits(device: torch.device, backend: str) -> list[str]:
    """Batches whose tensors exceed 2^31 elements: output and gradients, image by image alike."""
    free = torch.cuda.mem_get_info(device)[0]
    if free < 60 * 2**30:
        print(f"not run for want of memory ({free / 2**30:.0f} GiB free): more than 2^31 elements")
        return []
    like = {"device": device, "dtype": torch.bfloat16}
    attend = partial(window_attention, heads=4, backend=backend)
    aggregate = partial(weighted_aggregation, window=3, backend=backend)
    maps, weights = torch.randn(3, 64, 56, 56, **like), torch.randn(32, 9, 56, 56, **like)
    cases = (("attention", attend, maps), ("aggregation", aggregate, (weights, maps[0])))
    return [
        f"{name} of more than 2^31 elements: {wrong}"
        for name, function, one in cases
        if (wrong := unlike(function, [x[None] for x in one]))
    ]


def unlike(function: Callable[..., Tensor], one: list[Tensor]) -> str | None:
    """What differs between the images of a batch of one image again and again."""
    batch = 2**31 // one[0].numel() + 2
    try:
        leaves = [x.repeat(batch, *[1] * (x.dim() - 1)).requires_grad_() for x in one]
        out = function(*leaves)
        seed = torch.randn_like(out[:1]).expand_as(out)
        found = [out.detach(), *torch.autograd.grad(out, leaves, seed)]
        same = [all(torch.equal(x[0], x[i]) for i in (batch // 2, -1)) for x in found]
    except Exception as raised:
        traceback.print_exc()
        return line_of(raised)
    return None if all(same) else f"equal are, of output and gradients, {same}"
