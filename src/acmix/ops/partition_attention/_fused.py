"""`torch.ops.acmix.partition_attention`: attention within windows as one operator with a kernel a
device. It reads the projections where they are, and writes their gradients to one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from acmix.ops import _library

_library.define(
    "partition_attention",
    "(Tensor pieces, Tensor bias, SymInt[] window, SymInt[] shift) -> (Tensor out, Tensor lse)",
)
_library.define(
    "partition_attention_backward",
    "(Tensor grad_out, Tensor pieces, Tensor bias, Tensor lse, SymInt[] window, SymInt[] shift) "
    "-> (Tensor grad_pieces, Tensor grad_bias)",
)
_library.register_autocast("partition_attention", tensors=1)


def forward(pieces: Tensor, bias: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """pieces (B, 3N, d, H, W), bias (N, T, T) -> (B, N, d, H, W)."""
    return torch.ops.acmix.partition_attention(pieces, bias, window, shift)[0]


def empty_outputs(pieces: Tensor) -> tuple[Tensor, Tensor]:
    """Room for out (B, N, d, H, W) and for lse in float32: log2 of the sum, over a window, of
    2^(logit * log2(e)). lse is laid out as (B, N, down, across, T) and has the shape of the map,
    since guards on the number of windows would bind a graph to few sizes."""
    batch, triples, head_dim, height, width = pieces.shape
    heads = triples // 3
    out = _library.empty_output(pieces, (batch, heads, head_dim, height, width))
    return out, pieces.new_empty((batch, heads, height, width), dtype=torch.float32)


@torch.library.register_fake("acmix::partition_attention")
def _fake(pieces: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(pieces)


@torch.library.register_fake("acmix::partition_attention_backward")
def _fake_backward(
    grad_out: Tensor, pieces: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(pieces), bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    pieces, bias, *ctx.sizes = inputs
    ctx.save_for_backward(pieces, bias, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.acmix.partition_attention_backward(grad_out, *ctx.saved_tensors, *ctx.sizes)
    return *grads, None, None


torch.library.register_autograd("acmix::partition_attention", _backward, setup_context=_save)
_library.refuse_second_derivative("partition_attention_backward")


@register_flop_formula(torch.ops.acmix.partition_attention)
def _flops(pieces: torch.Size, bias: torch.Size, *_: Any, **__: Any) -> int:
    """Two products of every query with the tokens of its window, 2 operations a multiply-add."""
    return 2 * 2 * bias[-1] * pieces.numel() // 3


@register_flop_formula(torch.ops.acmix.partition_attention_backward)
def _flops_backward(grad_out: torch.Size, pieces: Any, bias: torch.Size, *_: Any, **__: Any) -> int:
    """Five: the logits again, the gradients of weights, queries, keys and values."""
    return 5 * 2 * bias[-1] * grad_out.numel()
