"""Weighted aggregation in plain PyTorch: one multiply-add over the map for each tap.

The taps are views into one padded map, so no window is ever copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from acmix.ops._windows import reflect


def forward(weight: Tensor, v: Tensor, window: int, stride: int, dilation: int) -> Tensor:
    height, width = weight.shape[-2:]
    last_row, last_col = (height - 1) * stride, (width - 1) * stride
    v, down = _padded(v, -2, last_row, window, dilation)
    v, across = _padded(v, -1, last_col, window, dilation)
    v = v.unflatten(1, (-1, weight.shape[1]))  # channel c = group * Cw + (c mod Cw)
    weight = weight[:, None]
    # Half-precision sums of window^2 terms keep a float32 accumulator.
    dtype = torch.float32 if v.dtype in (torch.float16, torch.bfloat16) else v.dtype
    out = torch.zeros((), device=v.device, dtype=dtype)
    for row in range(window):
        for col in range(window):
            top, left = row * down, col * across
            taps = v[..., top : top + last_row + 1 : stride, left : left + last_col + 1 : stride]
            out = out + weight[:, :, :, row * window + col].to(dtype) * taps
    return out.flatten(1, 2).to(v.dtype)


def _padded(v: Tensor, dim: int, last: int, window: int, dilation: int) -> tuple[Tensor, int]:
    """v reflected along a side, and how far apart in it the taps of a window lie.

    That is the dilation, unless it is larger than the map: then what lies between the pixels that
    a tap shows (0 to `last`, plus the tap's offset) and those of the next is left out. A size that
    is not yet known, as in torch.export, is taken for large enough.
    """
    size = v.shape[dim]
    pitch = min(dilation, size) if isinstance(size, int) else dilation
    index = torch.arange((window - 1) * pitch + last + 1, device=v.device)
    shown = index // pitch * dilation + index % pitch - window // 2 * dilation
    return v.index_select(dim, reflect(shown, size)), pitch
