"""Weighted aggregation by the C++ kernel for the CPU (src/acmix/csrc).

float32, bfloat16 and float16 tensors of any strides, with arithmetic in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from acmix.ops import _library, _native
from acmix.ops._native import why_not
from acmix.ops.weighted_aggregation._fused import empty_output, forward

__all__ = ["forward", "why_not"]

OPAQUE = True


@_library.register_cpu("weighted_aggregation")
def _forward(weight: Tensor, v: Tensor, *sizes: int) -> Tensor:
    out = empty_output(weight, v)
    _native.aggregation_forward(weight, v, sizes, out)
    return out


@_library.register_cpu("weighted_aggregation_backward")
def _backward(grad_out: Tensor, weight: Tensor, v: Tensor, *sizes: int) -> tuple[Tensor, Tensor]:
    grad_weight, grad_v = torch.empty_like(weight), torch.empty_like(v)
    _native.aggregation_backward(grad_out, weight, v, sizes, grad_weight, grad_v)
    return grad_weight, grad_v
