"""The folded convolution path by the C++ kernel for the CPU (src/acmix/csrc/shift.h).

Pieces in float32, bfloat16 or float16 and any strides, with weight and arithmetic in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from acmix.ops import _native
from acmix.ops._native import why_not
from acmix.ops.shift_convolution._fused import empty_gradients, empty_output, forward

__all__ = ["forward", "why_not"]


@torch.library.impl("acmix::shift_convolution", "cpu")
def _forward(
    pieces: Tensor, weight: Tensor, stride: int, dilation: int, fc_weight: Tensor | None = None
) -> Tensor:
    out = empty_output(pieces, weight, stride)
    _native.shift_forward(
        pieces, _floats(weight), stride, dilation, out, False, _floats_or_none(fc_weight)
    )
    return out


@torch.library.impl("acmix::shift_convolution_backward", "cpu")
def _backward(
    grad_out: Tensor,
    pieces: Tensor,
    weight: Tensor,
    stride: int,
    dilation: int,
    fc_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = empty_gradients(pieces, weight, fc_weight)
    grad_weight, grad_fc = (
        None if x is None else torch.empty(x.shape) for x in (weight, fc_weight)
    )
    _native.shift_backward(
        grad_out,
        pieces,
        _floats(weight),
        stride,
        dilation,
        grads[0],
        grad_weight,
        False,
        _floats_or_none(fc_weight),
        grad_fc,
    )
    for to, floats in zip(grads[1:], (grad_weight, grad_fc), strict=True):
        if floats is not None:
            to.copy_(floats)
    return grads


def _floats(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


def _floats_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _floats(tensor)
