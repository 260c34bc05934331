"""`torch.ops.acmix.weighted_aggregation`: one operator with a kernel a device.

The operator sees the channels that share a weight as the channels of a head: weight
(B, Cw, window^2, Ho, Wo), v (B, Cw, C / Cw, H, W) -> (B, Cw, C / Cw, Ho, Wo).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from acmix.ops import _library, _trial
from acmix.ops.weighted_aggregation import reference

OPAQUE = True

_library.define(
    "weighted_aggregation",
    "(Tensor weight, Tensor v, SymInt window, SymInt stride, SymInt dilation) -> Tensor",
)
_library.define(
    "weighted_aggregation_backward",
    "(Tensor grad_out, Tensor weight, Tensor v, SymInt window, SymInt stride, SymInt dilation) "
    "-> (Tensor grad_weight, Tensor grad_v)",
)
_library.register_autocast("weighted_aggregation", tensors=2)
_library.register_gpu("weighted_aggregation", "acmix.ops.weighted_aggregation.triton", "forward")
_library.register_gpu(
    "weighted_aggregation_backward", "acmix.ops.weighted_aggregation.triton", "backward"
)


def forward(weight: Tensor, v: Tensor, window: int, stride: int, dilation: int) -> Tensor:
    """weight (B, Cw, window^2, Ho, Wo), v (B, C, H, W) -> (B, C, Ho, Wo)."""
    by_weight = v.unflatten(1, (-1, weight.shape[1])).transpose(1, 2)
    out = torch.ops.acmix.weighted_aggregation(weight, by_weight, window, stride, dilation)
    return out.transpose(1, 2).flatten(1, 2)


def trial(device: torch.device, dtype: torch.dtype) -> float:
    """The largest error of a device's kernels on a small map with borders, for the dispatch."""

    def actual(v: Tensor, weight: Tensor) -> Tensor:
        return forward(weight, v, 3, 1, 1)

    def exact(v: Tensor, weight: Tensor) -> Tensor:
        return reference.forward(weight, v, 3, 1, 1)

    sizes = [(1, 4, 5, 6), (1, 2, 9, 5, 6)]
    return _trial.largest_error(actual, exact, sizes, device, dtype)


def empty_output(weight: Tensor, v: Tensor) -> Tensor:
    """Room for (B, Cw, C / Cw, Ho, Wo), such that (B, C, Ho, Wo) is a view of it."""
    batch, shared, each, _, _ = v.shape
    height, width = weight.shape[3:]
    strides = _library.output_strides(v, (batch, each, shared, height, width))
    by_weight = (strides[0], strides[2], strides[1], *strides[3:])
    return v.new_empty_strided((batch, shared, each, height, width), by_weight)


@torch.library.register_fake("acmix::weighted_aggregation")
def _fake(weight: Tensor, v: Tensor, *_: Any) -> Tensor:
    return empty_output(weight, v)


@torch.library.register_fake("acmix::weighted_aggregation_backward")
def _fake_backward(grad_out: Tensor, weight: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, v, *ctx.sizes = inputs
    ctx.save_for_backward(weight, v)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.acmix.weighted_aggregation_backward(grad_out, *ctx.saved_tensors, *ctx.sizes)
    return *grads, None, None, None


torch.library.register_autograd("acmix::weighted_aggregation", _backward, setup_context=_save)
_library.refuse_second_derivative("weighted_aggregation_backward")


@register_flop_formula(torch.ops.acmix.weighted_aggregation)
def _flops(
    weight: torch.Size,
    v: torch.Size,
    window: int,
    *_: Any,
    out_shape: torch.Size,
    **__: Any,
) -> int:
    """A multiply-add, 2 operations, for each tap of each output."""
    return 2 * window**2 * out_shape.numel()


@register_flop_formula(torch.ops.acmix.weighted_aggregation_backward)
def _flops_backward(
    grad_out: torch.Size, weight: Any, v: Any, window: int, *_: Any, **__: Any
) -> int:
    return 2 * 2 * window**2 * grad_out.numel()
