"""The convolution path step by step, as the paper describes it (Sec. 4.2): a linear map `fc` over
the pieces of a channel, then a group convolution that shifts and sums its k^2 results.
"""

from __future__ import annotations

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
    features = project(pieces, fc_weight, fc_bias).transpose(1, 2).flatten(1, 2)
    padding = shift_weight.shape[-1] // 2 * dilation
    groups = pieces.shape[2]
    return F.conv2d(features, shift_weight, None, stride, padding, dilation, groups)


def forward_tensor_shifts(
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
    return out.repeat_interleave(out_per_group, 1)


def project(pieces: Tensor, fc_weight: Tensor, fc_bias: Tensor | None) -> Tensor:
    """fc: the J values of every pixel and channel to k^2 values, (B, k^2, d, H, W)."""
    features = torch.einsum("tj,bjdhw->btdhw", fc_weight, pieces)
    return features if fc_bias is None else features + fc_bias[:, None, None, None]
