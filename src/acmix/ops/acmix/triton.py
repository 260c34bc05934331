"""ACmix on a GPU: the convolution path as the GPU's own dense convolution of x, and attention by
our kernel, which adds the other path and its bias as it writes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from acmix.ops.acmix import _plan
from acmix.ops.acmix._plan import Folded, Sizes
from acmix.ops.shift_convolution import tiled as convolution
from acmix.ops.window_attention import _fused as attention
from acmix.ops.window_attention._fused import trial

__all__ = ["convolution", "run", "trial"]

OPAQUE = True


def run(x: Tensor, weights: Folded, sizes: Sizes) -> Tensor:
    return _plan.run(x, weights, sizes, _attend, convolution.convolve)


def _attend(q: Tensor, *others: Any) -> Tensor:
    """The kernel takes the other path and its bias, (., C, Ho, Wo), head by head."""
    *inputs, path, alpha, bias = others
    path, bias = (x if x is None else x.unflatten(1, q.shape[1:3]) for x in (path, bias))
    inputs += path, alpha, bias
    return attention.forward(q, *inputs).flatten(1, 2)
