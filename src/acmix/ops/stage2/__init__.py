"""Stage II of ACmix in one step: attention and convolution of the same pieces, mixed.

For the layer. Done apart, the two paths leave two maps to be added, and autograd joins the
gradients of q, k, v and of the convolution's pieces in copies of the size of all of them.
"""

from __future__ import annotations

from torch import Tensor

from acmix.ops._dispatch import choose
from acmix.ops.stage2 import native, reference

IMPLEMENTATIONS = {"reference": reference, "native": native}


def stage2(
    pieces: Tensor,
    position: Tensor | None,
    weight: Tensor,
    alpha: Tensor | float,
    *,
    window: int,
    stride: int,
    dilation: int,
    backend: str,
) -> Tensor:
    """`alpha * attention + convolution`, both of the pieces; nothing is checked.

    Args:
        pieces: (B, 3N, d, H, W) of any strides: the N heads of q, of k and of v.
        position: (d, 2), or None; see `window_attention`.
        weight: (d * N, 3N, k, k), the folded convolution with beta in it.
        alpha: factor of the attention, a tensor of one element or a number.
        window, stride, dilation: in pixels; stride and dilation are those of both paths.
        backend: "reference" or "native".

    Returns:
        (B, d * N, Ho, Wo): head-major channels of the attention and d-major ones of the
        convolution, added as they are.
    """
    implementation = choose(backend, IMPLEMENTATIONS, pieces, weight)
    return implementation.forward(pieces, position, weight, alpha, window, stride, dilation)
