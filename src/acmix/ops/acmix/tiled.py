"""ACmix in plain PyTorch, on any device: on a CPU from one set of pieces, else the convolution path
as a dense convolution of x."""

from __future__ import annotations

from torch import Tensor

from acmix.ops.acmix import _plan
from acmix.ops.acmix._plan import Folded, Sizes, Weights
from acmix.ops.shift_convolution import tiled as convolution
from acmix.ops.window_attention import tiled as attention

OPAQUE = True
_attend = _plan.mixed(attention.forward)


def forward(x: Tensor, weights: Weights, sizes: Sizes) -> Tensor:
    return run(x, fold(x, weights, sizes), sizes)


def fold(like: Tensor, weights: Weights, sizes: Sizes) -> Folded:
    return _plan.fold(weights, sizes, convolution.dense(like))


def run(x: Tensor, weights: Folded, sizes: Sizes) -> Tensor:
    return _plan.run(x, weights, sizes, _attend, convolution.convolve)
