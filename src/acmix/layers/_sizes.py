"""Maps padded to a multiple of a step, and cut to their size again, of symbolic sizes too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def multiple(size: int, step: int) -> int:
    """The least multiple of `step` that is no less than `size`."""
    return (size + step - 1) // step * step


def pad_to_multiple(x: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros at the end of (B, C, H, W) up to multiples of `rows` and `columns`."""
    height, width = x.shape[2:]
    return F.pad(x, (0, multiple(width, columns) - width, 0, multiple(height, rows) - height))


def crop(x: Tensor, size: tuple[int, int], dim: int) -> Tensor:
    """The first rows and columns of a map; rows lie along `dim`, columns along the next.

    A slice of a symbolic size would bind an exported graph to maps that need it, or to those that
    do not, since one is contiguous and the other not. A copy is contiguous for all.
    """
    for axis, side in enumerate(size, dim):
        if isinstance(side, torch.SymInt):
            x = x.index_select(axis, torch.arange(side, device=x.device))
        else:
            x = x.narrow(axis, 0, side)
    return x
