"""How a fast backend goes about it: which weights it folds into which, and then x through them.

The convolution path reads either the pieces that attention reads, or x itself in one dense
convolution; attention then has projections of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from acmix.ops._project import project
from acmix.ops.shift_convolution import _path


class Sizes(NamedTuple):
    heads: int
    window: int
    stride: int
    dilation: int


class Weights(NamedTuple):
    """What the function is given."""

    qkv_weight: Tensor
    qkv_bias: Tensor
    position: Tensor | None
    fc_weight: Tensor | None
    kernels: Tensor | None
    alpha: Tensor | float | None
    beta: Tensor | float | None


class Folded(NamedTuple):
    """What a plan reads: projections d-major where the convolution reads the pieces, head-major
    where attention alone reads them, and None where nothing does."""

    qkv_weight: Any
    qkv_bias: Any
    position: Tensor | None
    alpha: Tensor | float | None
    path: _path.Folded | None


# Functions, since PyTorch 2.8 compiles neither methods nor slices of such tuples.
def of_attention(sizes: Sizes) -> tuple[int, int, int]:
    return sizes.window, sizes.stride, sizes.dilation


def of_convolution(sizes: Sizes) -> tuple[int, int]:
    return sizes.stride, sizes.dilation


def has_pieces(weights: Folded) -> bool:
    return weights.path is not None and not weights.path.dense


def forward(plan: ModuleType, x: Tensor, weights: Weights, sizes: Sizes) -> Tensor:
    """By a backend's plan, or by its own `forward`."""
    if hasattr(plan, "forward"):
        return plan.forward(x, weights, sizes)
    return plan.run(x, fold(weights, sizes, plan.convolution.dense(x)), sizes)


def fold(weights: Weights, sizes: Sizes, dense: bool) -> Folded:
    weight, bias, position, fc_weight, kernels, alpha, beta = weights
    path: _path.Folded | None = None
    if beta is not None:
        assert fc_weight is not None
        by_piece = (-1, 3 * sizes.heads)
        projection = weight.unflatten(0, by_piece).transpose(0, 1), bias.view(by_piece).t()
        path = _path.fold(
            [projection],
            beta * fc_weight,
            kernels,
            None,
            dense=dense,
            repeats=sizes.heads,
            one_kernel=alpha is not None,
        )
    folded = Folded(weight, bias, position, alpha, path)
    if has_pieces(folded):
        return folded
    if alpha is None:
        return Folded(None, None, None, None, path)
    return Folded(*head_major(weight, bias, sizes), position, alpha, path)


def head_major(weight: Tensor, bias: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """The rows of the projections in the order of attention: q, k, v, and then head by head."""
    by_piece = (-1, 3 * sizes.heads)
    weight = weight.unflatten(0, by_piece).transpose(0, 1).flatten(0, 1)
    return weight, bias.view(by_piece).t().flatten()


def run(
    x: Tensor,
    weights: Folded,
    sizes: Sizes,
    attend: Callable[..., Tensor],
    convolve: Callable[..., Tensor],
) -> Tensor:
    """x (B, C_in, H, W) -> (B, C, Ho, Wo). attend: q, k, v, position, the sizes, and what its
    result is mixed with -> (B, C, Ho, Wo)."""
    qkv_weight, qkv_bias, position, alpha, path_weights = weights
    pieces: Tensor | None = None
    if has_pieces(weights):
        pieces = project_pieces(x, qkv_weight, qkv_bias, sizes)
    path: Tensor | None = None
    bias: Tensor | None = None
    if path_weights is not None:
        source = x if pieces is None else pieces
        path, bias = _path.run(path_weights, convolve, lambda _: source, *of_convolution(sizes))
    if alpha is None:
        assert path is not None
        return path if bias is None else path + bias
    if pieces is not None:
        qkv = split(pieces, sizes.stride)
    else:
        qkv = project_for_attention(x, qkv_weight, qkv_bias, sizes)
    return attend(*qkv, position, *of_attention(sizes), path, alpha, bias)


def project_pieces(x: Tensor, weight: Tensor, bias: Tensor, sizes: Sizes) -> Tensor:
    """Stage I: the 3N pieces of x, (B, 3N, d, H, W)."""
    pieces = project(x, weight, bias)
    return pieces.unflatten(1, (-1, 3 * sizes.heads)).transpose(1, 2)


def split(pieces: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, where windows stand, of k and of v."""
    q, k, v = pieces.chunk(3, 1)
    return q[..., ::stride, ::stride], k, v


def project_for_attention(
    x: Tensor, weight: Tensor, bias: Tensor, sizes: Sizes
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage I where no convolution reads q, k, v: q only where windows stand."""
    stride = sizes.stride
    if stride == 1:
        q, k, v = project(x, weight, bias).chunk(3, 1)
    else:
        channels = len(bias) // 3
        q = project(x[..., ::stride, ::stride], weight[:channels], bias[:channels])
        k, v = project(x, weight[channels:], bias[channels:]).chunk(2, 1)
    q, k, v = (part.unflatten(1, (sizes.heads, -1)) for part in (q, k, v))
    return q, k, v


def mixed(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A backend's attention, and its mix with the other path in a pass of its own."""

    def attend(*inputs: Any) -> Tensor:
        *qkv_and_sizes, path, alpha, bias = inputs
        out = attention(*qkv_and_sizes).flatten(1, 2)
        if isinstance(alpha, Tensor):
            alpha = alpha.to(out.dtype)
        if path is None:
            return out if isinstance(alpha, float) and alpha == 1 else alpha * out
        if bias is not None:
            path = path + bias
        if isinstance(alpha, Tensor):
            return torch.addcmul(path, alpha, out)
        return torch.add(path, out, alpha=alpha)

    return attend
