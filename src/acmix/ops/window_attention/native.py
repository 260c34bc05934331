"""Windowed attention by the C++ kernel for the CPU (src/acmix/csrc).

float32, bfloat16 and float16 tensors of any strides, with arithmetic in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from acmix.ops import _library, _native
from acmix.ops._native import why_not
from acmix.ops.window_attention._fused import empty_gradients, empty_outputs, forward

__all__ = ["forward", "why_not"]


@_library.register_cpu("window_attention")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor | None,
    window: int,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    out, lse = empty_outputs(q, v)
    _native.attention_forward(q, k, v, _as_floats(position), window, stride, dilation, out, lse)
    return out, lse


@_library.register_cpu("window_attention_backward")
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    window: int,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`out` is for other devices: here a query's probabilities and their gradients are all at
    hand when their product is needed.
    """
    grad_q, grad_k, grad_v, grad_position = empty_gradients(q, k, v, position)
    floats = None if position is None else torch.empty(position.shape)
    _native.attention_backward(
        grad_out,
        q,
        k,
        v,
        _as_floats(position),
        lse,
        window,
        stride,
        dilation,
        grad_q,
        grad_k,
        grad_v,
        floats,
    )
    if floats is not None:
        grad_position.copy_(floats)
    return grad_q, grad_k, grad_v, grad_position


def _as_floats(position: Tensor | None) -> Tensor | None:
    return None if position is None else position.float().contiguous()
