"""Attention within windows by scaled_dot_product_attention: portable, any device and dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from acmix.ops.partition_attention.reference import APART, apart_in_windows, cut, join

OPAQUE = True  # to ONNX, which lays out what scaled_dot_product_attention returns in another way


def forward(
    pieces: Tensor,
    bias: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    dropout: float = 0.0,
) -> Tensor:
    """As the reference; `dropout` is the probability that a weight becomes zero."""
    windows = cut(pieces, window)  # (B, down, across, 3N, T, d)
    batch, down, across, triples, *tokens_and_channels = windows.shape
    # Batch and windows make one dimension; where windows have masks of their own, windows and heads
    # do, so that the masks are not repeated for each image of the batch.
    q, k, v = windows.flatten(1, 2).chunk(3, 2)
    first = 0
    if any(shift):
        apart = apart_in_windows(down, across, window, shift, pieces.device).flatten(0, 1)
        bias, first = (bias + APART * apart[:, None].to(bias.dtype)).flatten(0, 1), 1
    q, k, v = (x.flatten(first, first + 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype)[None], dropout)
    return join(out.reshape(batch, down, across, triples // 3, *tokens_and_channels), window)
