"""Stage II as the two operators apart: attention by its definition, then the convolution."""

from __future__ import annotations

from torch import Tensor

from acmix.ops.shift_convolution.folded import convolve
from acmix.ops.window_attention import reference


def forward(
    pieces: Tensor,
    position: Tensor | None,
    weight: Tensor,
    alpha: Tensor | float,
    window: int,
    stride: int,
    dilation: int,
) -> Tensor:
    """pieces (B, 3N, d, H, W), weight (d * N, 3N, k, k) -> (B, d * N, Ho, Wo)."""
    q, k, v = pieces.chunk(3, 1)
    q = q[..., ::stride, ::stride]
    attention = reference.forward(q, k, v, position, window, stride, dilation).flatten(1, 2)
    channels = pieces.transpose(1, 2).flatten(1, 2)
    convolution = convolve(channels, weight, stride, dilation, groups=pieces.shape[2])
    return alpha * attention + convolution
