"""ACmix by its definition: the projections, the two paths each by its own definition, the mix."""

from __future__ import annotations

from torch import Tensor

from acmix.ops.acmix import _plan
from acmix.ops.acmix._plan import Folded, Sizes, Weights
from acmix.ops.shift_convolution import reference as convolution
from acmix.ops.window_attention import reference as attention


def forward(x: Tensor, weights: Weights, sizes: Sizes) -> Tensor:
    """x (B, C_in, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))."""
    pieces = _plan.project_pieces(x, weights.qkv_weight, weights.qkv_bias, sizes)
    out: Tensor | None = None
    if weights.alpha is not None:
        qkv = _plan.split(pieces, sizes.stride)
        out = attention.forward(*qkv, weights.position, *_plan.of_attention(sizes)).flatten(1, 2)
        out = weights.alpha * out
    if weights.beta is not None:
        path = weights.beta * _convolution(pieces, weights, sizes)
        out = path if out is None else out + path
    assert out is not None
    return out


def _convolution(pieces: Tensor, weights: Weights, sizes: Sizes) -> Tensor:
    fc, kernels, steps = weights.fc_weight, weights.kernels, _plan.of_convolution(sizes)
    assert fc is not None
    if kernels is None:
        return convolution.shift_tensors(pieces, fc, sizes.heads, None, *steps)
    return convolution.forward(pieces, fc, kernels, None, *steps)


def run(x: Tensor, weights: Folded, sizes: Sizes) -> Tensor:
    return _plan.run(x, weights, sizes, _plan.mixed(attention.forward), convolution.convolve)
