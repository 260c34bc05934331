"""Stage II by the C++ kernels for the CPU: attention writes, the convolution adds.

Both read the pieces where they are, and write the gradients of the pieces to one tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from acmix.ops import _native
from acmix.ops._native import why_not
from acmix.ops.stage2._fused import empty_gradients, empty_outputs, forward

__all__ = ["forward", "why_not"]


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
        *_split(pieces, stride),
        _floats_or_none(position),
        window,
        stride,
        dilation,
        _by_head(out, pieces),
        lse,
        _floats_or_none(alpha),
    )
    _native.shift_forward(pieces, _floats(weight), stride, dilation, out, accumulate=True)
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
    grads = empty_gradients(pieces, position, weight, alpha)
    grad_pieces = grads[0]
    grad_position, grad_weight, grad_alpha = (
        None if x is None else torch.empty(x.shape) for x in (position, weight, alpha)
    )
    if stride > 1:
        grad_pieces[:, : pieces.shape[1] // 3].zero_()  # no query stands between the strides
    _native.attention_backward(
        _by_head(grad_out, pieces),
        *_split(pieces, stride),
        _floats_or_none(position),
        lse,
        window,
        stride,
        dilation,
        *_split(grad_pieces, stride),
        grad_position,
        _floats_or_none(alpha),
        grad_alpha,
    )
    _native.shift_backward(
        grad_out,
        pieces,
        _floats(weight),
        stride,
        dilation,
        grad_pieces,
        grad_weight,
        accumulate=True,
    )
    for to, floats in zip(grads[1:], (grad_position, grad_weight, grad_alpha), strict=True):
        if floats is not None:
            to.copy_(floats)
    return grads


def _split(pieces: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, where windows stand, of k and of v."""
    q, k, v = pieces.chunk(3, 1)
    return q[..., ::stride, ::stride], k, v


def _by_head(x: Tensor, pieces: Tensor) -> Tensor:
    return x.unflatten(1, (-1, pieces.shape[2]))


def _floats(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


def _floats_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _floats(tensor)
