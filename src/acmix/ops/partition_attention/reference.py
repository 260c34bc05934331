"""Attention within windows as Swin defines it (Liu et al., ICCV 2021, Eq. 4):

    out_i = sum_j softmax_j(d^-0.5 q_i . k_j + bias_ij) v_j

over the pixels of the window that i is in. A map that was rolled by `shift` holds, in its last
windows, pixels that are no neighbours: APART is added to their logits. Half-precision tensors are
computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

APART = -100.0


def forward(pieces: Tensor, bias: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """pieces (B, 3N, d, H, W) of q, k and v, bias (N, T, T) of query and key -> (B, N, d, H, W).

    H and W are multiples of the window's sides, whose product is T.
    """
    dtype = pieces.dtype
    if dtype in (torch.float16, torch.bfloat16):
        pieces = pieces.float()
    q, k, v = cut(pieces, window).chunk(3, 3)  # (B, down, across, N, T, d)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
    if any(shift):
        apart = apart_in_windows(q.shape[1], q.shape[2], window, shift, q.device)
        logits = logits + APART * apart[:, :, None].to(logits.dtype)
    return join(logits.softmax(-1) @ v, window).to(dtype)


def cut(x: Tensor, window: Sequence[int]) -> Tensor:
    """(B, N, d, H, W) -> (B, down, across, N, T, d)."""
    rows, columns = window
    x = x.unflatten(4, (-1, columns)).unflatten(3, (-1, rows))
    return x.permute(0, 3, 5, 1, 4, 6, 2).flatten(4, 5)


def join(x: Tensor, window: Sequence[int]) -> Tensor:
    """(B, down, across, N, T, d) -> (B, N, d, H, W), the channels of a pixel side by side."""
    rows, columns = window
    x = x.unflatten(4, (rows, columns)).permute(0, 1, 4, 2, 5, 3, 6)
    return x.flatten(3, 4).flatten(1, 2).permute(0, 3, 4, 1, 2)


def apart_in_windows(
    down: int, across: int, window: Sequence[int], shift: Sequence[int], device: torch.device
) -> Tensor:
    """Which pixels of a window only rolling has brought together: (down, across, T, T)."""
    rows, columns = (
        part_of_side(*side, device) for side in zip((down, across), window, shift, strict=True)
    )
    part = 2 * rows[:, None, :, None] + columns[:, None]
    part = part.flatten(2)
    return part[..., :, None] != part[..., None, :]


def part_of_side(count: int, window: int, shift: int, device: torch.device) -> Tensor:
    """1 where a rolled side, cut into windows, holds what was at its start, 0 elsewhere: (count,
    window). That is the last `shift` of the last window."""
    last = torch.arange(count, device=device)[:, None] == count - 1
    start = torch.arange(window, device=device) >= window - shift
    return (last & start).long()
