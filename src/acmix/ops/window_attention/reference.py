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

    def unfold(x: Tensor) -> Tensor:
        """(..., H, W) -> (..., Ho, Wo, window * window)"""
        return x[..., rows[:, None, :, None], cols[None, :, None, :]].flatten(-2)

    keys = unfold(k)
    if position is not None:
        p = position_map(position, like=k)
        keys = keys + p[:, ::stride, ::stride, None] - unfold(p)
    logits = (q[..., None] * keys).sum(2) * q.shape[2] ** -0.5
    weights = logits.softmax(-1)
    return (weights[:, :, None] * unfold(v)).sum(-1).to(dtype)
