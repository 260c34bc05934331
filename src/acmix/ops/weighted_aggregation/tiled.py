"""Weighted aggregation in plain PyTorch: one multiply-add over the map for each tap.

The taps are views into one padded map, so no window is ever copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from acmix.ops._windows import pad_reflect


def forward(weight: Tensor, v: Tensor, window: int, stride: int, dilation: int) -> Tensor:
    """weight (B, Cw, window^2, Ho, Wo), v (B, C, H, W) -> (B, C, Ho, Wo)."""
    height, width = weight.shape[-2:]
    reach = window // 2 * dilation
    last_row, last_col = (height - 1) * stride, (width - 1) * stride
    v = pad_reflect(v, (-reach, last_row + reach), (-reach, last_col + reach))
    v = v.unflatten(1, (-1, weight.shape[1]))  # channel c = group * Cw + (c mod Cw)
    weight = weight[:, None]
    # Half-precision sums of window^2 terms keep a float32 accumulator.
    dtype = torch.float32 if v.dtype in (torch.float16, torch.bfloat16) else v.dtype
    out = torch.zeros((), device=v.device, dtype=dtype)
    for row in range(window):
        for col in range(window):
            top, left = row * dilation, col * dilation
            taps = v[..., top : top + last_row + 1 : stride, left : left + last_col + 1 : stride]
            out = out + weight[:, :, :, row * window + col].to(dtype) * taps
    return out.flatten(1, 2).to(v.dtype)
