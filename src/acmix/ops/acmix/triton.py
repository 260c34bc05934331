"""ACmix on a GPU: the convolution path as the GPU's own dense convolution of x, and attention by
our kernel, which adds the other path and its bias as it writes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from acmix.ops.acmix import _plan
from acmix.ops.acmix._plan import Folded, Sizes, Weights
from acmix.ops.shift_convolution import tiled as convolution
from acmix.ops.window_attention import _fused as attention
from acmix.ops.window_attention._fused import trial

__all__ = ["fold", "forward", "run", "trial"]

OPAQUE = True


def forward(x: Tensor, weights: Weights, sizes: Sizes) -> Tensor:
    return run(x, fold(x, weights, sizes), sizes)


def fold(like: Tensor, weights: Weights, sizes: Sizes) -> Folded:
    return _plan.fold(weights, sizes, convolution.dense(like))


def run(x: Tensor, weights: Folded, sizes: Sizes) -> Tensor:
    return _plan.run(x, weights, sizes, _attend, convolution.convolve)


def _attend(q: Tensor, *others: Any) -> Tensor:
    """The kernel takes the other path and its bias, (., C, Ho, Wo), head by head."""
    k, v, position, window, stride, dilation, path, alpha, bias = others
    path, bias = (x if x is None else x.unflatten(1, q.shape[1:3]) for x in (path, bias))
    sizes = window, stride, dilation
    return attention.forward(q, k, v, position, *sizes, path, alpha, bias).flatten(1, 2)
