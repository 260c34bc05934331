"""What the package's operators share in their registration with `torch.library`.

`torch.ops.acmix.<name>` has one schema, fake, autograd, autocast and FLOP formula, written in the
operator's _fused.py, and one kernel a device, written in native.py (CPU) and triton.py (GPU).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Triton runs its kernels on the CPU, step by step, for tests: they stand in for the CPU kernel.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_library = torch.library.Library("acmix", "FRAGMENT")


def define(name: str, schema: str) -> None:
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))


def register_cpu(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorates the operator's kernel for the CPU."""
    if INTERPRETED:
        return lambda kernel: kernel
    return torch.library.impl(f"acmix::{name}", "cpu")


def register_gpu(name: str, module: str, function: str) -> None:
    """A function of a module of Triton kernels, which is imported at the first call: `import acmix`
    loads no Triton."""

    def kernel(first: Tensor, *others: Any) -> Any:
        device = first.device
        run = getattr(importlib.import_module(module), function)
        if device.type == "cpu":
            return run(first, *others)
        # Triton launches on the current device, which another of several may be.
        with torch.get_device_module(device).device(device):
            return run(first, *others)

    for key in ("CUDA", "XPU", *(["CPU"] if INTERPRETED else [])):
        _library.impl(name, kernel, key)


def register_autocast(name: str, tensors: int) -> None:
    """Under autocast the first `tensors` arguments, where given, take the device's dtype for it."""
    for device in ("cpu", "cuda"):
        key = f"Autocast{device.upper()}"
        _library.impl(name, _autocast(name, tensors, device, key), key)


def _autocast(name: str, tensors: int, device: str, key: str) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.device.type != device or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(torch.get_autocast_dtype(device))

    def call(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            cast_args = (cast(arg) for arg in args[:tensors])
            return getattr(torch.ops.acmix, name)(*cast_args, *args[tensors:])

    return call


def empty_output(like: Tensor, size: tuple[int, ...]) -> Tensor:
    """Uninitialised (B, ..., Ho, Wo), in the layout of `output_strides`. It is no view of another
    tensor: autograd refuses to change such an output of an operator in place."""
    return like.new_empty_strided(size, output_strides(like, size))


def output_strides(like: Tensor, size: tuple[int, ...]) -> tuple[int, ...]:
    """Of (B, ..., Ho, Wo), with the channels of a pixel side by side where those of `like`, (B, N,
    d, H, W), lie closer together than its pixels, else row by row.
    """
    last, first = list(range(1, len(size) - 2)), [0, len(size) - 2, len(size) - 1]
    order = list(range(len(size)))
    if min(like.stride(1), like.stride(2)) < like.stride(4):
        order = first + last
    strides, step = [0] * len(size), 1
    for dimension in reversed(order):
        strides[dimension] = step
        step *= size[dimension]
    return tuple(strides)


def refuse_second_derivative(name: str) -> None:
    """Make a backward operator raise where its result is differentiated; by default PyTorch goes
    on with wrong numbers."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"acmix::{name} has no derivative: use backend='reference' for second derivatives"
        )

    torch.library.register_autograd(f"acmix::{name}", refuse)
