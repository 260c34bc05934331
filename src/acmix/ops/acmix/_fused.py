"""`torch.ops.acmix.stage2`: both paths of the same pieces and their mix as one operator, by the
CPU kernel alone so far.

Done apart, the two paths leave two maps to be added, and autograd joins the gradients of q, k, v
and of the convolution's pieces in copies of the size of all of them. The backward pass keeps the
pieces and the log2-sum-exp2 of every window. It needs the output of neither path: the gradient of
alpha comes from what attention's backward pass sums for each query anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from acmix.ops import _library
from acmix.ops.shift_convolution import _fused as convolution

_library.define(
    "stage2",
    "(Tensor pieces, Tensor? position, Tensor weight, Tensor? alpha, SymInt window, "
    "SymInt stride, SymInt dilation) -> (Tensor out, Tensor lse)",
)
_library.define(
    "stage2_backward",
    "(Tensor grad_out, Tensor pieces, Tensor? position, Tensor weight, Tensor? alpha, Tensor lse, "
    "SymInt window, SymInt stride, SymInt dilation) "
    "-> (Tensor grad_pieces, Tensor grad_position, Tensor grad_weight, Tensor grad_alpha)",
)
_library.register_autocast("stage2", tensors=1)


def stage2(
    pieces: Tensor,
    position: Tensor | None,
    weight: Tensor,
    alpha: Tensor | float,
    window: int,
    stride: int,
    dilation: int,
) -> Tensor:
    """pieces (B, 3N, d, H, W), weight (d * N, 3N, k, k) -> (B, d * N, Ho, Wo)."""
    factor: Tensor | None = None
    if isinstance(alpha, Tensor):
        factor = alpha
    elif alpha != 1:
        factor = weight.new_full((1,), alpha)
    return torch.ops.acmix.stage2(pieces, position, weight, factor, window, stride, dilation)[0]


def empty_outputs(pieces: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Room for out (B, C, Ho, Wo) and, in float32, lse (B, N, Ho, Wo) as in window_attention."""
    out = convolution.empty_output(pieces, weight, stride)
    size = (pieces.shape[0], pieces.shape[1] // 3, *out.shape[2:])
    return out, pieces.new_empty(size, dtype=torch.float32)


def empty_gradients(
    pieces: Tensor, position: Tensor | None, weight: Tensor, alpha: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the gradients; that of an absent tensor has no elements."""

    def empty(x: Tensor | None) -> Tensor:
        return weight.new_empty((0,)) if x is None else x.new_empty(x.shape)

    return torch.empty_like(pieces), empty(position), empty(weight), empty(alpha)


@torch.library.register_fake("acmix::stage2")
def _fake(
    pieces: Tensor, position: Any, weight: Tensor, alpha: Any, window: int, stride: int, *_: Any
) -> tuple[Tensor, Tensor]:
    return empty_outputs(pieces, weight, stride)


@torch.library.register_fake("acmix::stage2_backward")
def _fake_backward(
    grad_out: Tensor,
    pieces: Tensor,
    position: Tensor | None,
    weight: Tensor,
    alpha: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_gradients(pieces, position, weight, alpha)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    pieces, position, weight, alpha, *ctx.sizes = inputs
    ctx.save_for_backward(pieces, position, weight, alpha, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads = torch.ops.acmix.stage2_backward(grad_out, *saved, *ctx.sizes)
    present = [g if x is not None else None for g, x in zip(grads, saved[:4], strict=True)]
    return *present, None, None, None


torch.library.register_autograd("acmix::stage2", _backward, setup_context=_save)
_library.refuse_second_derivative("stage2_backward")


@register_flop_formula(torch.ops.acmix.stage2)
def _flops(
    pieces: Any,
    position: Any,
    weight: torch.Size,
    alpha: Any,
    window: int,
    *_: Any,
    out_shape: tuple[torch.Size, torch.Size],
    **__: Any,
) -> int:
    """The formulas of the two paths; that of the mix is left out, as elementwise work is."""
    return (2 * 2 * window**2 + 2 * weight[1:].numel()) * out_shape[0].numel()


@register_flop_formula(torch.ops.acmix.stage2_backward)
def _flops_backward(
    grad_out: torch.Size,
    pieces: Any,
    position: Any,
    weight: torch.Size,
    alpha: Any,
    lse: Any,
    window: int,
    *_: Any,
    **__: Any,
) -> int:
    return (5 * 2 * window**2 + 2 * 2 * weight[1:].numel()) * grad_out.numel()
