"""The convolution path step by step, as the paper describes it (Sec. 4.2): a linear map `fc` over
the pieces of a channel, then a group convolution that shifts and sums its k^2 results.

Half-precision tensors are computed in float32.
"""

from __future__ import annotations

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
    with without_autocast(pieces):
        out = convolve(features, shift_weight.to(features.dtype), None, stride, dilation)
    return out.to(dtype_of_kernels(pieces))


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
    height, width = features.shape[-2:]
    side = int(features.shape[1] ** 0.5)
    reach = side // 2 * dilation
    features = F.pad(features, (reach,) * 4)
    out = torch.zeros((), dtype=features.dtype, device=features.device)
    for tap in range(side * side):
        top, left = tap // side * dilation, tap % side * dilation
        out = out + features[:, tap, :, top : top + height : stride, left : left + width : stride]
    return out.repeat_interleave(out_per_group, 1).to(dtype_of_kernels(pieces))


def project(pieces: Tensor, fc_weight: Tensor, fc_bias: Tensor | None) -> Tensor:
    """fc: the J values of every pixel and channel to k^2 values, (B, k^2, d, H, W)."""
    if dtype_of_kernels(pieces) in HALF:
        pieces, fc_weight = pieces.float(), fc_weight.float()
    with without_autocast(pieces):
        features = torch.einsum("tj,bjdhw->btdhw", fc_weight, pieces)
    return features if fc_bias is None else features + fc_bias[:, None, None, None]
