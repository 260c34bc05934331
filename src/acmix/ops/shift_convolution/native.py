"""The folded convolution path by the C++ kernel for the CPU (src/acmix/csrc/shift.h).

Pieces in float32, bfloat16 or float16 and any strides, with weight and arithmetic in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from acmix.ops import _native
from acmix.ops._native import why_not
from acmix.ops.shift_convolution._fused import empty_output, forward

__all__ = ["forward", "why_not"]


@torch.library.impl("acmix::shift_convolution", "cpu")
def _forward(pieces: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    out = empty_output(pieces, weight, stride)
    floats = weight.float().contiguous()
    _native.shift_forward(pieces, floats, stride, dilation, out, accumulate=False)
    return out


@torch.library.impl("acmix::shift_convolution_backward", "cpu")
def _backward(
    grad_out: Tensor, pieces: Tensor, weight: Tensor, stride: int, dilation: int
) -> tuple[Tensor, Tensor]:
    grad_pieces = torch.empty_like(pieces)
    grad_weight = torch.empty(weight.shape)
    _native.shift_backward(
        grad_out,
        pieces,
        weight.float().contiguous(),
        stride,
        dilation,
        grad_pieces,
        grad_weight,
        accumulate=False,
    )
    return grad_pieces, grad_weight.to(weight.dtype)
