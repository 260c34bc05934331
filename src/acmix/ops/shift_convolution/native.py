"""The folded convolution path by the C++ kernel for the CPU (src/acmix/csrc).

Pieces in float32, bfloat16 or float16 and any strides, with weight and arithmetic in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from acmix.ops import _native
from acmix.ops._native import float_sums, floats, why_not, write_sums
from acmix.ops.shift_convolution._fused import convolve, empty_gradients, empty_output
from acmix.ops.shift_convolution.reference import dense

__all__ = ["convolve", "dense", "why_not"]

OPAQUE = True


@torch.library.impl("acmix::shift_convolution", "cpu")
def _forward(
    pieces: Tensor, weight: Tensor, stride: int, dilation: int, fc_weight: Tensor | None = None
) -> Tensor:
    out = empty_output(pieces, weight, stride)
    _native.shift_forward(pieces, floats(weight), stride, dilation, out, False, floats(fc_weight))
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
    sums = float_sums(weight, fc_weight)
    weights = floats(weight), stride, dilation
    fc = floats(fc_weight), sums[1]
    _native.shift_backward(grad_out, pieces, *weights, grads[0], sums[0], False, *fc)
    write_sums(grads[1:], sums)
    return grads
