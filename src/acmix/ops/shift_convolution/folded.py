"""The convolution path folded to one convolution (derivation in docs/operator.md).

Everything from the pieces to the output is linear, so `fc` and the group convolution are one
group convolution G of the pieces, and with the projection that made the pieces, one dense
convolution of x. The folds are products of small weight tensors and part of the graph.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    pieces: Tensor,
    fc_weight: Tensor,
    shift_weight: Tensor,
    fc_bias: Tensor | None,
    stride: int,
    dilation: int,
) -> Tensor:
    """pieces (B, J, d, H, W), fc_weight (k^2, J), shift_weight (C, k^2, k, k) -> (B, C, Ho, Wo)."""
    with without_autocast(pieces):
        weight = fold_fc(fc_weight, shift_weight)
    out = convolve(
        pieces.transpose(1, 2).flatten(1, 2), weight, stride, dilation, groups=pieces.shape[2]
    )
    return with_fc_bias(out, shift_weight, fc_bias, pieces, stride, dilation)


def with_fc_bias(
    out: Tensor,
    shift_weight: Tensor,
    fc_bias: Tensor | None,
    pieces: Tensor,
    stride: int,
    dilation: int,
) -> Tensor:
    """The convolution of the pieces and what fc's bias adds to it."""
    if fc_bias is None:
        return out
    return out + border_bias(tap_bias(shift_weight, fc_bias), out, pieces, stride, dilation)


def forward_dense(x: Tensor, *arguments: Any) -> Tensor:
    """The path from x itself, (B, C, Ho, Wo), by the arguments of `dense_parts`."""
    return with_bias(*dense_parts(x, *arguments))


def dense_parts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    fc_weight: Tensor,
    shift_weight: Tensor,
    fc_bias: Tensor | None,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor | None]:
    """The path from x (B, C_in, H, W) and the projection to the pieces, weight (J, d, C_in) with
    bias (J, d): the convolution (B, C, Ho, Wo), and what the biases add to it, (1, C, Ho, Wo)."""
    with without_autocast(x):
        dense, taps = fold_dense(weight, bias, fc_weight, shift_weight, fc_bias)
    out = convolve(x, dense, stride, dilation, groups=1)
    return out, None if taps is None else border_bias(taps, out, x, stride, dilation)


def with_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + bias


def fold_fc(fc_weight: Tensor, shift_weight: Tensor) -> Tensor:
    """G[o, j, u, v] = sum_t shift[o, t, u, v] fc[t, j]: (C, J, k, k)."""
    taps = shift_weight.transpose(0, 1)  # (k^2, C, k, k): faster than einsum, which copies more
    folded = fc_weight.t() @ taps.flatten(1)
    return folded.unflatten(1, taps.shape[1:]).transpose(0, 1)


def fold_dense(
    weight: Tensor,
    bias: Tensor | None,
    fc_weight: Tensor,
    shift_weight: Tensor,
    fc_bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The dense kernel (C, C_in, k, k) and its bias of each tap (C, k, k), None without biases.

    Zero padding comes after the biases, so an output sees the bias of a tap only where that tap
    lies inside the map.
    """
    # Output channels are d-major, c * M + m, since group c of the convolution holds channel c.
    folded = fold_fc(fc_weight, shift_weight).unflatten(0, (weight.shape[1], -1))  # (d, M, J, k, k)
    dense = torch.einsum("cmjuv,jci->cmiuv", folded, weight)
    taps = None
    if bias is not None:
        taps = torch.einsum("cmjuv,jc->cmuv", folded, bias).flatten(0, 1)
    if fc_bias is not None:
        fc_taps = tap_bias(shift_weight, fc_bias)
        taps = fc_taps if taps is None else taps + fc_taps
    return dense.flatten(0, 1), taps


def tap_bias(shift_weight: Tensor, fc_bias: Tensor) -> Tensor:
    """What fc's bias adds to each output through each tap inside the map: (C, k, k)."""
    return torch.einsum("otuv,t->ouv", shift_weight, fc_bias)


def border_bias(taps: Tensor, out: Tensor, x: Tensor, stride: int, dilation: int) -> Tensor:
    """Sum of the bias of the taps inside the map x, (1, C, Ho, Wo); constant away from borders.

    In float32 at least, since its gradient is a sum over the map, and then in the dtype of `out`.
    """
    dtype = torch.promote_types(taps.dtype, torch.float32)
    ones = torch.ones(1, 1, *x.shape[-2:], dtype=dtype, device=taps.device)
    with without_autocast(x):
        bias = convolve(ones, taps[:, None].to(dtype), stride, dilation, groups=1)
    return bias.to(out.dtype)


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """The folds keep the parameters' precision: they are small, and an error in them stays."""
    if like.is_meta:  # has no autocast to leave
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)


def convolve(x: Tensor, weight: Tensor, stride: int, dilation: int, groups: int) -> Tensor:
    """Convolution with the zero padding that keeps ceil(size / stride) outputs."""
    padding = weight.shape[-1] // 2 * dilation
    return F.conv2d(x, weight, None, stride, padding, dilation, groups)
