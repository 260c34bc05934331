"""Attention within each of the windows that a map is cut into: Swin's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from acmix.ops import _flops
from acmix.ops._dispatch import choose
from acmix.ops.partition_attention import native, reference, tiled

IMPLEMENTATIONS = {"reference": reference, "tiled": tiled, "native": native}


def partition_attention(
    pieces: Tensor,
    bias: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    dropout: float = 0.0,
) -> Tensor:
    """pieces (B, 3N, d, H, W) of q, k, v, bias (N, tokens, tokens) -> (B, N, d, H, W).

    dropout: the probability that a weight becomes zero, of the portable form alone.
    """

    def run(pieces: Tensor, bias: Tensor) -> Tensor:
        if dropout > 0:
            return tiled.forward(pieces, bias, window, shift, dropout)
        return choose("auto", IMPLEMENTATIONS, pieces).forward(pieces, bias, window, shift)

    product = 2 * bias.shape[-1] * pieces.numel() // 3
    return _flops.counted(run, lambda: (2 * product, 5 * product), pieces, bias)
