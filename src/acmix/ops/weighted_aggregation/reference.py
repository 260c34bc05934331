"""Aggregation of a window with given weights (SAN, Zhao et al. 2020, Eq. 2), windows unfolded:

out[b, c, i, j] = sum_t weight[b, c mod Cw, t, i, j] * v[b, c, tap t of the window around ij]
"""

from __future__ import annotations

import torch
from torch import Tensor

from acmix.ops._windows import tap_index


def forward(weight: Tensor, v: Tensor, window: int, stride: int, dilation: int) -> Tensor:
    """weight (B, Cw, window^2, Ho, Wo), v (B, C, H, W) -> (B, C, Ho, Wo)."""
    dtype = v.dtype
    if dtype in (torch.float16, torch.bfloat16):
        weight, v = weight.float(), v.float()
    rows = tap_index(v.shape[-2], window, stride, dilation, v.device)
    cols = tap_index(v.shape[-1], window, stride, dilation, v.device)
    taps = v[..., rows[:, None, :, None], cols[None, :, None, :]].flatten(-2)
    repeats = v.shape[1] // weight.shape[1]
    weight = weight.permute(0, 1, 3, 4, 2).repeat(1, repeats, 1, 1, 1)
    return (weight * taps).sum(-1).to(dtype)
