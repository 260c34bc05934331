"""Attention within windows by the C++ kernel for the CPU (src/acmix/csrc)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from acmix.ops import _native
from acmix.ops._native import why_not
from acmix.ops.partition_attention._fused import empty_outputs, forward

__all__ = ["forward", "why_not"]

OPAQUE = True


@torch.library.impl("acmix::partition_attention", "cpu")
def _forward(
    pieces: Tensor, bias: Tensor, window: Sequence[int], shift: Sequence[int]
) -> tuple[Tensor, Tensor]:
    out, lse = empty_outputs(pieces)
    _native.partition_forward(pieces, _key_by_query(bias), window, shift, out, lse)
    return out, lse


@torch.library.impl("acmix::partition_attention_backward", "cpu")
def _backward(
    grad_out: Tensor,
    pieces: Tensor,
    bias: Tensor,
    lse: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
) -> tuple[Tensor, Tensor]:
    grad_pieces = torch.empty_like(pieces)
    bias_rows = _key_by_query(bias)
    grad_rows = torch.empty_like(bias_rows)
    _native.partition_backward(
        grad_out, pieces, bias_rows, lse, window, shift, grad_pieces, grad_rows
    )
    return grad_pieces, bias.new_empty(bias.shape).copy_(grad_rows.transpose(1, 2))


def _key_by_query(bias: Tensor) -> Tensor:
    """The order of the kernel, whose lanes are queries."""
    return bias.transpose(1, 2).float().contiguous()
