"""`torch.ops.acmix.shift_convolution`: the convolution of the pieces as one operator with a kernel
a device.

It reads the pieces where they are: group c of the convolution takes channel c of every piece, in
any layout. Where fc is folded into the kernel, the pieces are the convolution's inputs; else the
operator combines them by fc first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from acmix.ops import _library
from acmix.ops._windows import output_size

_library.define(
    "shift_convolution",
    "(Tensor pieces, Tensor weight, SymInt stride, SymInt dilation, Tensor? fc_weight=None) "
    "-> Tensor",
)
_library.define(
    "shift_convolution_backward",
    "(Tensor grad_out, Tensor pieces, Tensor weight, SymInt stride, SymInt dilation, "
    "Tensor? fc_weight=None) -> (Tensor grad_pieces, Tensor grad_weight, Tensor grad_fc)",
)
_library.register_autocast("shift_convolution", tensors=1)


def convolve(
    pieces: Tensor, kernel: Tensor, fc_weight: Tensor | None, stride: int, dilation: int
) -> Tensor:
    """pieces (B, J, d, H, W), kernel (C, J, k, k), or (C, k^2, k, k) after fc_weight (k^2, J)."""
    return torch.ops.acmix.shift_convolution(pieces, kernel, stride, dilation, fc_weight)


def empty_output(pieces: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Room for (B, C, Ho, Wo), with the channels of a pixel together where those of pieces are."""
    height, width = (output_size(side, stride) for side in pieces.shape[3:])
    return _library.empty_output(pieces, (pieces.shape[0], weight.shape[0], height, width))


@torch.library.register_fake("acmix::shift_convolution")
def _fake(pieces: Tensor, weight: Tensor, stride: int, *_: Any) -> Tensor:
    return empty_output(pieces, weight, stride)


@torch.library.register_fake("acmix::shift_convolution_backward")
def _fake_backward(
    grad_out: Tensor,
    pieces: Tensor,
    weight: Tensor,
    stride: int,
    dilation: int,
    fc: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(pieces, weight, fc)


def empty_gradients(
    pieces: Tensor, weight: Tensor, fc_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients; without an fc its gradient has no rows."""
    grad_fc = weight.new_empty((0, 0)) if fc_weight is None else torch.empty_like(fc_weight)
    return torch.empty_like(pieces), weight.new_empty(weight.shape), grad_fc


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pieces, weight, *ctx.sizes, fc_weight = inputs
    ctx.save_for_backward(pieces, weight, fc_weight)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    pieces, weight, fc_weight = ctx.saved_tensors
    *grads, grad_fc = torch.ops.acmix.shift_convolution_backward(
        grad_out, pieces, weight, *ctx.sizes, fc_weight
    )
    return *grads, None, None, None if fc_weight is None else grad_fc


torch.library.register_autograd("acmix::shift_convolution", _backward, setup_context=_save)
_library.refuse_second_derivative("shift_convolution_backward")


@register_flop_formula(torch.ops.acmix.shift_convolution)
def _flops(
    pieces: torch.Size, weight: torch.Size, *sizes: Any, out_shape: torch.Size, **fc: Any
) -> int:
    """k^2 taps of each input for every output and, where fc is apart, each input from the pieces; 2
    operations a multiply-add."""
    return _operations(out_shape, pieces, weight, *sizes, **fc)


@register_flop_formula(torch.ops.acmix.shift_convolution_backward)
def _flops_backward(grad_out: torch.Size, *inputs: Any, **more: Any) -> int:
    """As many for the gradients of what is convolved and combined and for those of the weights."""
    return 2 * _operations(grad_out, *inputs, **more)


def _operations(
    out: torch.Size,
    pieces: torch.Size,
    weight: torch.Size,
    stride: int,
    dilation: int,
    fc_weight: torch.Size | None = None,
    **_: Any,
) -> int:
    combined = 0 if fc_weight is None else fc_weight[0] * pieces.numel()
    return 2 * (weight[1:].numel() * out.numel() + combined)
