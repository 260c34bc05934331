"""`torch.ops.acmix.shift_convolution`: the folded convolution of the pieces as one operator with a
kernel a device.

It reads the pieces where they are: group c of the convolution takes channel c of every piece, in
any layout. The fold of its weight (folded.fold_fc) is left to autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from acmix.ops import _library
from acmix.ops._windows import output_size
from acmix.ops.shift_convolution.folded import border_bias, fold_fc, tap_bias, without_autocast

_library.define(
    "shift_convolution",
    "(Tensor pieces, Tensor weight, SymInt stride, SymInt dilation) -> Tensor",
)
_library.define(
    "shift_convolution_backward",
    "(Tensor grad_out, Tensor pieces, Tensor weight, SymInt stride, SymInt dilation) "
    "-> (Tensor grad_pieces, Tensor grad_weight)",
)
_library.register_autocast("shift_convolution", tensors=1)


def forward(
    pieces: Tensor,
    fc_weight: Tensor,
    shift_weight: Tensor,
    fc_bias: Tensor | None,
    stride: int,
    dilation: int,
) -> Tensor:
    """pieces (B, J, d, H, W), fc_weight (k^2, J), shift_weight (C, k^2, k, k) -> (B, C, Ho, Wo)."""
    with without_autocast(pieces):
        weight = fold_fc(fc_weight, shift_weight)
    out = torch.ops.acmix.shift_convolution(pieces, weight, stride, dilation)
    if fc_bias is None:
        return out
    return out + border_bias(tap_bias(shift_weight, fc_bias), pieces, stride, dilation)


def empty_output(pieces: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Room for (B, C, Ho, Wo), with the channels of a pixel together where those of pieces are."""
    batch, _, groups, height, width = pieces.shape
    by_group = (groups, weight.shape[0] // groups)
    size = (batch, *by_group, output_size(height, stride), output_size(width, stride))
    return _library.empty_output(pieces, size).flatten(1, 2)


@torch.library.register_fake("acmix::shift_convolution")
def _fake(pieces: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    return empty_output(pieces, weight, stride)


@torch.library.register_fake("acmix::shift_convolution_backward")
def _fake_backward(
    grad_out: Tensor, pieces: Tensor, weight: Tensor, stride: int, dilation: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(pieces), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pieces, weight, *ctx.sizes = inputs
    ctx.save_for_backward(pieces, weight)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.acmix.shift_convolution_backward(grad_out, *ctx.saved_tensors, *ctx.sizes)
    return *grads, None, None


torch.library.register_autograd("acmix::shift_convolution", _backward, setup_context=_save)
_library.refuse_second_derivative("shift_convolution_backward")


@register_flop_formula(torch.ops.acmix.shift_convolution)
def _flops(pieces: Any, weight: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    """k^2 taps of each of the J pieces for every output, 2 operations a multiply-add."""
    return 2 * weight[1:].numel() * out_shape.numel()


@register_flop_formula(torch.ops.acmix.shift_convolution_backward)
def _flops_backward(
    grad_out: torch.Size, pieces: Any, weight: torch.Size, *_: Any, **__: Any
) -> int:
    """As many for the gradient of the pieces and for that of the weight."""
    return 2 * 2 * weight[1:].numel() * grad_out.numel()
