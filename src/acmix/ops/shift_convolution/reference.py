"""The convolution path step by step, as the paper describes it (Sec. 4.2): a linear map `fc` over
the pieces of a channel, then a group convolution that shifts and sums its k^2 results, as a sum
over its taps.

Half-precision tensors are computed in float32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix.ops._autocast import HALF, dtype_of_kernels, without_autocast
from acmix.ops.shift_convolution.folded import convolve as convolve_map


def dense(x: Tensor) -> bool:
    return False


def forward(
    pieces: Tensor,
    fc_weight: Tensor,
    shift_weight: Tensor,
    fc_bias: Tensor | None,
    stride: int,
    dilation: int,
) -> Tensor:
    """pieces (B, J, d, H, W), fc_weight (k^2, J), shift_weight (C, k^2, k, k) -> (B, C, Ho, Wo)."""
    features = project(pieces, fc_weight, fc_bias)
    kernels = shift_weight.to(features.dtype).unflatten(0, (pieces.shape[2], -1))
    out = torch.zeros((), dtype=features.dtype, device=features.device)
    with without_autocast(pieces):
        for (row, column), shifted in shifts(features, shift_weight.shape[-1], stride, dilation):
            kernel = kernels[..., row, column]  # (d, M, k^2)
            out = out + torch.einsum("cmt,btchw->bcmhw", kernel, shifted)
    return out.flatten(1, 2).to(dtype_of_kernels(pieces))


def convolve(
    pieces: Tensor, kernel: Tensor, fc_weight: Tensor | None, stride: int, dilation: int
) -> Tensor:
    """The same of weights that may be folded: kernel (C, J, k, k), or (C, k^2, k, k) after fc."""
    if fc_weight is not None:
        return forward(pieces, fc_weight, kernel, None, stride, dilation)
    channels = pieces.transpose(1, 2).flatten(1, 2)
    return convolve_map(channels, kernel, stride, dilation, groups=pieces.shape[2])


def shift_tensors(
    pieces: Tensor,
    fc_weight: Tensor,
    out_per_group: int,
    fc_bias: Tensor | None,
    stride: int,
    dilation: int,
) -> Tensor:
    """The same with the kernels at their shift start, as slices: no kernel, no convolution."""
    features = project(pieces, fc_weight, fc_bias)
    out = torch.zeros((), dtype=features.dtype, device=features.device)
    side = math.isqrt(len(fc_weight))
    for (row, column), shifted in shifts(features, side, stride, dilation):
        out = out + shifted[:, row * side + column]
    return out.repeat_interleave(out_per_group, 1).to(dtype_of_kernels(pieces))


def shifts(
    features: Tensor, side: int, stride: int, dilation: int
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Each tap of a kernel, and what it sees of (..., H, W), zeros beyond: (..., Ho, Wo)."""
    height, width = features.shape[-2:]
    features = F.pad(features, (side // 2 * dilation,) * 4)
    for row, column in itertools.product(range(side), repeat=2):
        top, left = row * dilation, column * dilation
        yield (
            (row, column),
            features[..., top : top + height : stride, left : left + width : stride],
        )


def project(pieces: Tensor, fc_weight: Tensor, fc_bias: Tensor | None) -> Tensor:
    """fc: the J values of every pixel and channel to k^2 values, (B, k^2, d, H, W)."""
    if dtype_of_kernels(pieces) in HALF:
        pieces, fc_weight = pieces.float(), fc_weight.float()
    with without_autocast(pieces):
        features = torch.einsum("tj,bjdhw->btdhw", fc_weight, pieces)
    return features if fc_bias is None else features + fc_bias[:, None, None, None]
