"""Windowed attention as the paper defines it (Eq. 8 with the position term of its code):

    out_ij = sum_ab softmax_ab(d^-0.5 q_ij . (k_ab + p_ij - p_ab)) v_ab

over the window around ij, with every window unfolded. Slow, and the truth that the fast paths
are held against. Half-precision tensors are computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from acmix.ops._windows import position_map, tap_index


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor | None,
    window: int,
    stride: int,
    dilation: int,
) -> Tensor:
    """q (B, N, d, Ho, Wo), k and v (B, N, d, H, W), position (d, 2) -> (B, N, d, Ho, Wo)."""
    dtype = q.dtype
    if dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
    height, width = k.shape[-2:]
    rows = tap_index(height, window, stride, dilation, k.device)
    cols = tap_index(width, window, stride, dilation, k.device)
    return attend(q, k, v, position, rows, cols).to(dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, rows: Tensor, cols: Tensor
) -> Tensor:
    """The attention of queries whose taps lie at `rows` (Ho, window) and `cols` (Wo, window)."""
    _, weights = keys_and_weights(q, k, position, rows, cols)
    return (weights[:, :, None] * unfold(v, rows, cols)).sum(-1)


def keys_and_weights(
    q: Tensor, k: Tensor, position: Tensor | None, rows: Tensor, cols: Tensor
) -> tuple[Tensor, Tensor]:
    """k_ab + p_ij - p_ab (B, N, d, Ho, Wo, window^2) and its softmax (B, N, Ho, Wo, window^2)."""
    keys = unfold(k, rows, cols)
    if position is not None:
        p = unfold(position_map(position, like=k), rows, cols)
        own = p[..., p.shape[-1] // 2, None]  # the middle tap
        keys = keys + own - p
    logits = (q[..., None] * keys).sum(2) * q.shape[2] ** -0.5
    return keys, logits.softmax(-1)


def unfold(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """(..., H, W) -> (..., Ho, Wo, window^2)"""
    return x[..., rows[:, None, :, None], cols[None, :, None, :]].flatten(-2)
