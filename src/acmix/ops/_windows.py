"""Index arithmetic of a sliding window with reflected borders."""

from __future__ import annotations

import torch
from torch import Tensor


def output_size(size: int, stride: int) -> int:
    """Number of windows along a side: one at every `stride`-th position."""
    return (size - 1) // stride + 1  # as PyTorch writes it: no guard has to compare the two


def reflect(index: Tensor, size: int) -> Tensor:
    """Map any integer position to one inside 0..size-1 as `numpy.pad(mode="reflect")` does.

    A position further out than the map is wide is reflected again; a side of 1 repeats its row.
    """
    period = 2 * (size - 1) + 1 // size  # 1 for a side of 1, without a branch on a symbolic size
    index = index.abs().remainder(period)
    return torch.where(index < size, index, period - index)


def tap_index(size: int, window: int, stride: int, dilation: int, device: torch.device) -> Tensor:
    """Reflected position of every tap of every window along a side, (size / stride, window)."""
    centre = torch.arange(output_size(size, stride), device=device) * stride
    offset = (torch.arange(window, device=device) - window // 2) * dilation
    return reflect(centre[:, None] + offset, size)


def pad_reflect(x: Tensor, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
    """Rows and columns `first..last` (inclusive, inside the map or out) of (..., H, W)."""
    height, width = x.shape[-2:]
    row_index = torch.arange(rows[0], rows[1] + 1, device=x.device)
    col_index = torch.arange(cols[0], cols[1] + 1, device=x.device)
    x = x.index_select(-2, reflect(row_index, height))
    return x.index_select(-1, reflect(col_index, width))


def unit_coordinate(size: int, like: Tensor) -> Tensor:
    """linspace(-1, 1, size), written out because torch.linspace fixes the size under export."""
    steps = torch.arange(size, device=like.device, dtype=like.dtype)
    return steps.mul(2 / (size - 1 + 1 // size)).sub(1)


def position_map(position: Tensor, like: Tensor) -> Tensor:
    """The linear position term `position @ (x, y)` of a map and in a dtype as those of `like`:
    (d, 2) -> (d, H, W).

    Computed in float32 at least, since bf16 coordinates would collide on maps over 128 wide.
    """
    if like.dtype in (torch.float16, torch.bfloat16):
        position = position.float()
    else:
        position = position.to(like.dtype)
    height, width = like.shape[-2:]
    x, y = unit_coordinate(width, position), unit_coordinate(height, position)
    # A sum of two products, not a matmul: autocast leaves it in float32.
    term = position[:, :1, None] * x + position[:, 1:, None] * y[:, None]
    return term.to(like.dtype)
