"""The definition a few rows at a time, with its gradients: what `tiled` computes where numbers are
not finite.

Unlike a tile under a mask, where 0 * NaN is NaN, it multiplies only what a window sees. NaNs and
infinities come out where the reference has them, in memory that does not grow with the map.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from acmix.ops._windows import tap_index
from acmix.ops.window_attention.reference import attend, keys_and_weights, unfold

UNFOLDED = 2**22  # numbers of unfolded keys held at once


def forward(q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, *sizes: int) -> Tensor:
    """As the reference, in float32 at least."""
    q, k, v = _widened(q, k, v)
    parts = _parts(q, k, *sizes)
    return torch.cat([attend(q[..., at, :], k, v, position, *taps) for at, *taps in parts], 3)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, *sizes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and (d, H, W) that of the queries' own positions p_ij, summed."""
    grad, q, k, v = _widened(grad, q, k, v)
    scale = q.shape[2] ** -0.5
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    grad_own = k.new_zeros(k.shape[2:])
    for at, rows, cols in _parts(q, k, *sizes):
        keys, weights = keys_and_weights(q[..., at, :], k, position, rows, cols)
        out = grad[..., at, :, None]
        grad_weights = (out * unfold(v, rows, cols)).sum(2)
        grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
        grad_logits = grad_logits[:, :, None] * scale
        grad_q[..., at, :] = (grad_logits * keys).sum(-1)
        grad_keys = grad_logits * q[..., at, :, None]
        _fold(grad_keys, rows, cols, into=grad_k)
        _fold(weights[:, :, None] * out, rows, cols, into=grad_v)
        row, col = rows[:, None, rows.shape[1] // 2], cols[None, :, cols.shape[1] // 2]
        grad_own[:, row, col] += grad_keys.sum((0, 1, -1))
    return grad_q, grad_k, grad_v, grad_own


def _widened(*tensors: Tensor) -> list[Tensor]:
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def _parts(
    q: Tensor, k: Tensor, window: int, stride: int, dilation: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some rows of queries at a time: which, and the rows and columns of their taps."""
    rows = tap_index(k.shape[-2], window, stride, dilation, k.device)
    cols = tap_index(k.shape[-1], window, stride, dilation, k.device)
    of_a_row = q[..., 0, :].numel() * window**2
    step = max(1, UNFOLDED // max(1, of_a_row))
    for first in range(0, len(rows), step):
        at = slice(first, first + step)
        yield at, rows[at], cols


def _fold(unfolded: Tensor, rows: Tensor, cols: Tensor, into: Tensor) -> None:
    """The adjoint of `unfold`: what every window adds to each pixel, summed."""
    pixels = rows[:, None, :, None] * into.shape[-1] + cols[None, :, None, :]
    into.flatten(-2).index_add_(-1, pixels.flatten(), unfolded.flatten(-3))
