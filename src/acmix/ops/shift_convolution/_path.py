"""The convolution path of a layer, whose pieces are projections of a map: its weights folded as a
backend reads them, from the pieces or from that map itself.

`read(dense)` gives the map, (B, C_in, H, W), or its projections, (B, J, d, H, W): what is not read
is not made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from acmix.ops._windows import output_size
from acmix.ops.shift_convolution import folded
from acmix.ops.shift_convolution.folded import Projection
from acmix.ops.shift_convolution.reference import shift_tensors

Read = Callable[[bool], Tensor]


class Folded(NamedTuple):
    """kernel: (C, J, k, k) of the pieces, (C, k^2, k, k) after fc_weight (k^2, J), dense (C, C_in,
    k, k), or None where slices are shifted, each `repeats` times. taps (C, k, k): what a tap inside
    the map adds."""

    kernel: Tensor | None
    fc_weight: Tensor | None = None
    taps: Tensor | None = None
    dense: bool = False
    repeats: int = 1


def fold(
    projections: Sequence[Projection],
    fc_weight: Tensor,
    kernels: Tensor | None,
    fc_bias: Tensor | None,
    *,
    dense: bool,
    repeats: int,
    one_kernel: bool = False,
) -> Folded:
    """one_kernel: fc is folded even where two steps take fewer operations."""
    if kernels is None:
        side = math.isqrt(len(fc_weight))
        taps = None if fc_bias is None else fc_bias.view(1, side, side)
        return Folded(None, fc_weight, taps, repeats=repeats)
    if dense:
        kernel, taps = folded.fold_dense(projections, fc_weight, kernels, fc_bias)
        return Folded(kernel, None, taps, dense=True)
    taps = None if fc_bias is None else folded.tap_bias(kernels, fc_bias)
    if one_kernel:
        return Folded(folded.fold_fc(fc_weight, kernels), None, taps)
    return Folded(*folded.fewest_operations(fc_weight, kernels, repeats), taps)


def multiply_adds(
    maps: Tensor,
    head_dim: int,
    repeats: int,
    fc_weight: Tensor,
    kernels: Tensor | None,
    stride: int,
) -> int:
    """Of the definition on maps like these: fc, and each kernel on each tap's map."""
    batch, side = len(maps), maps.shape[-2:]
    taps, pieces = fc_weight.shape
    outputs = batch * math.prod(output_size(length, stride) for length in side)
    combined = taps * pieces * head_dim * batch * math.prod(side)
    return combined + taps * head_dim * repeats * outputs * (1 if kernels is None else taps)


def run(
    weights: Folded,
    convolve: Callable[..., Tensor],
    read: Read,
    stride: int = 1,
    dilation: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """The path, (B, C, Ho, Wo), and what the biases add to it, (1, C or 1, Ho, Wo)."""
    x = read(weights.dense)
    if weights.kernel is None:
        assert weights.fc_weight is not None
        out = shift_tensors(x, weights.fc_weight, weights.repeats, None, stride, dilation)
    elif weights.dense:
        out = folded.convolve(x, weights.kernel, stride, dilation)
    else:
        out = convolve(x, weights.kernel, weights.fc_weight, stride, dilation)
    if weights.taps is None:
        return out, None
    return out, folded.border_bias(weights.taps, out, x, stride, dilation)
