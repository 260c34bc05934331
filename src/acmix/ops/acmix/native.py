"""ACmix by the C++ kernels for the CPU: Stage II, both paths and their mix, is one operator, in
which attention writes and the convolution adds.

Both read the pieces where they are, and write the gradients of the pieces to one tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from acmix.ops import _native
from acmix.ops._native import float_sums, floats, why_not, write_sums
from acmix.ops.acmix import _plan
from acmix.ops.acmix._fused import empty_gradients, empty_outputs, stage2
from acmix.ops.acmix._plan import Folded, Sizes
from acmix.ops.shift_convolution import native as convolution
from acmix.ops.window_attention import native as attention

__all__ = ["convolution", "run", "why_not"]

OPAQUE = True
_attend = _plan.mixed(attention.forward)


def run(x: Tensor, weights: Folded, sizes: Sizes) -> Tensor:
    alpha, path = weights.alpha, weights.path
    if alpha is None or path is None or path.dense or path.kernel is None:
        return _plan.run(x, weights, sizes, _attend, convolution.convolve)
    pieces = _plan.project_pieces(x, weights.qkv_weight, weights.qkv_bias, sizes)
    return stage2(pieces, weights.position, path.kernel, alpha, *_plan.of_attention(sizes))


@torch.library.impl("acmix::stage2", "cpu")
def _forward(
    pieces: Tensor,
    position: Tensor | None,
    weight: Tensor,
    alpha: Tensor | None,
    window: int,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    out, lse = empty_outputs(pieces, weight, stride)
    _native.attention_forward(
        *_plan.split(pieces, stride),
        floats(position),
        (window, stride, dilation),
        _by_head(out, pieces),
        lse,
        floats(alpha),
    )
    _native.shift_forward(pieces, floats(weight), stride, dilation, out, accumulate=True)
    return out, lse


@torch.library.impl("acmix::stage2_backward", "cpu")
def _backward(
    grad_out: Tensor,
    pieces: Tensor,
    position: Tensor | None,
    weight: Tensor,
    alpha: Tensor | None,
    lse: Tensor,
    window: int,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = grad_pieces, *small = empty_gradients(pieces, position, weight, alpha)
    sums = grad_position, grad_weight, grad_alpha = float_sums(position, weight, alpha)
    if stride > 1:
        grad_pieces[:, : pieces.shape[1] // 3].zero_()  # no query stands between the strides
    _native.attention_backward(
        _by_head(grad_out, pieces),
        *_plan.split(pieces, stride),
        floats(position),
        lse,
        (window, stride, dilation),
        *_plan.split(grad_pieces, stride),
        grad_position,
        floats(alpha),
        grad_alpha,
    )
    steps = floats(weight), stride, dilation
    _native.shift_backward(grad_out, pieces, *steps, grad_pieces, grad_weight, accumulate=True)
    write_sums(small, sums)
    return grads


def _by_head(x: Tensor, pieces: Tensor) -> Tensor:
    return x.unflatten(1, (-1, pieces.shape[2]))
