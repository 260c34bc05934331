"""Windowed attention by the C++ kernel for the CPU (src/acmix/csrc).

float32, bfloat16 and float16 tensors of any strides, with arithmetic in float32.
"""

from __future__ import annotations

from torch import Tensor

from acmix.ops import _library, _native
from acmix.ops._native import float_sums, floats, why_not, write_sums
from acmix.ops.window_attention._fused import empty_gradients, empty_outputs, forward

__all__ = ["forward", "why_not"]

OPAQUE = True


@_library.register_cpu("window_attention")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: Tensor | None,
    bias: Tensor | None,
    position: Tensor | None,
    alpha: Tensor | None,
    *sizes: int,
) -> tuple[Tensor, Tensor]:
    out, lse = empty_outputs(q, v)
    _native.attention_forward(q, k, v, floats(position), sizes, out, lse, floats(alpha))
    for term in (base, bias):
        if term is not None:
            out.add_(term)
    return out, lse


@_library.register_cpu("window_attention_backward")
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor | None,
    alpha: Tensor | None,
    lse: Tensor,
    *sizes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = grad_q, grad_k, grad_v, *small = empty_gradients(q, k, v, position, alpha)
    sums = float_sums(position, alpha)
    _native.attention_backward(
        grad_out,
        q,
        k,
        v,
        floats(position),
        lse,
        sizes,
        grad_q,
        grad_k,
        grad_v,
        sums[0],
        floats(alpha),
        sums[1],
    )
    write_sums(small, sums)
    return grads
