"""ACmix in plain PyTorch, on any device: on a CPU from one set of pieces, else the convolution path
as a dense convolution of x."""

from __future__ import annotations

from torch import Tensor

from acmix.ops.acmix import _plan
from acmix.ops.acmix._plan import Folded, Sizes
from acmix.ops.shift_convolution import tiled as convolution
from acmix.ops.window_attention import tiled as attention

__all__ = ["convolution", "run"]

OPAQUE = True
_attend = _plan.mixed(attention.forward)


def run(x: Tensor, weights: Folded, sizes: Sizes) -> Tensor:
    return _plan.run(x, weights, sizes, _attend, convolution.convolve)
