"""The operators as they run in inference: what their parameters alone decide is computed once.

`acmix.fuse` makes them, from a layer and the batch norm after it as an affine map of its channels,
(scale, shift), each None where there is no norm:

    scale * (alpha * attention + beta * convolution) + shift

beta, and scale for the convolution, go into its folded kernel. Attention is linear in v, so alpha
and scale go into the projection that makes v; where the convolution reads the same v, its kernel is
divided by them. In Swin and PVT alpha goes into the projection after attention.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from acmix.layers.acmix import ACmix2d
from acmix.layers.convolution_path import (
    FoldedPath,
    check_kind,
    constant,
    constant_or_none,
    fold_path,
    scaled_kernels,
    wide,
)
from acmix.layers.mix import FixedMix, Weight
from acmix.layers.patchwise import PairwiseAttention, PatchwiseACmix, joined
from acmix.layers.reduced import ReducedACmix
from acmix.layers.window import WindowACmix
from acmix.ops import _checks
from acmix.ops._project import project
from acmix.ops.acmix import Folded, Sizes, Weights, fold, folded_acmix
from acmix.ops.acmix._plan import has_pieces

torch.fx.wrap("folded_acmix")


class FusedACmix2d(ACmix2d):
    """`ACmix2d` in inference, in the form for the device that holds it; any form runs on any."""

    bias: nn.Parameter | None

    @torch.no_grad()
    def __init__(self, layer: ACmix2d, scale: Tensor | None, shift: Tensor | None) -> None:
        start_as(self, layer)
        like = layer.qkv_weight
        weights = fold(weights_of(layer, scale), self._sizes(), self.backend, like)
        path = weights.path
        if self.has_attention:
            alpha, channels = layer.mix.weights()[0], weights.qkv_bias[: self.out_channels]
            self._scale_v(weights, product(alpha, scale, channels), like.dtype)
        if shift is not None and path is not None and path.taps is not None:
            centre = self.kernel_conv // 2
            path.taps[:, centre, centre] += shift  # this tap is never outside the map
            shift = None
        elif shift is not None and path is None:
            weights.qkv_bias[-self.out_channels :] += shift  # the weights of a window sum to 1
            shift = None
        kept = {
            "qkv_weight": weights.qkv_weight,
            "qkv_bias": weights.qkv_bias,
            "position_weight": weights.position,
            "bias": shift,
        }
        for name, tensor in kept.items():
            setattr(self, name, constant_or_none(tensor, like))
        self.convolution = None if path is None else FoldedPath(path, like)

    def _scale_v(self, weights: Folded, factor: Tensor, dtype: torch.dtype) -> None:
        """Multiply v, and so attention, by factor (C), in place."""
        if has_pieces(weights) and weights.path is not None:
            factor = away_from_zero(factor, dtype)
            divide_by_v(weights.path.kernel, factor, self.head_dim)
        by_channel = factor.unflatten(0, (self.heads, self.head_dim)).t()
        for rows in (weights.qkv_weight, weights.qkv_bias):
            if has_pieces(weights):
                v = rows.unflatten(0, (self.head_dim, -1))[:, 2 * self.heads :]
            else:
                v = rows[-self.out_channels :].unflatten(0, (self.heads, -1)).transpose(0, 1)
            v *= by_channel.view(*by_channel.shape, *[1] * (v.dim() - 2))

    def forward(self, x: Tensor) -> Tensor:
        weights = Folded(
            self.qkv_weight,
            self.qkv_bias,
            self.position_weight,
            1.0 if self.has_attention else None,
            None if self.convolution is None else self.convolution.weights(),
        )
        out = folded_acmix(x, weights, self._sizes(), self.backend)
        return out if self.bias is None else out + self.bias[:, None, None]

    def _sizes(self) -> Sizes:
        return Sizes(self.heads, self.kernel_att, self.stride, self.dilation)


class FusedPatchwiseACmix(PatchwiseACmix):
    """`PatchwiseACmix` in inference: q, k and v by one convolution."""

    @torch.no_grad()
    def __init__(self, layer: PatchwiseACmix, scale: Tensor | None, shift: Tensor | None) -> None:
        start_as(self, layer)
        like = layer.conv1.weight
        weight, bias = map(wide, joined(layer.conv1, layer.conv2, layer.conv3))
        v = slice(-self.out_channels, None)
        factor = product(layer.mix.weights()[0], scale, bias[v])
        self.convolution = None
        if self.has_convolution:
            path = fold_path(layer, like, scale, one_kernel=True)
            if self.has_attention and not path.dense:
                factor = away_from_zero(factor, like.dtype)
                divide_by_v(path.kernel, factor, self.out_channels // self.reduction)
            self.convolution = FoldedPath(path, like, self.backend)
        if self.has_attention:
            weight[v] *= factor[:, None]
            bias[v] *= factor
        self.conv_w = None if layer.conv_w is None else fuse_weight_layers(layer.conv_w)
        self.qkv_weight, self.qkv_bias = constant(weight, like), constant(bias, like)
        self.bias = constant_or_none(shift, like)

    def forward(self, x: Tensor) -> Tensor:
        batch = _checks.as_batch("x", x, self.in_channels)
        check_kind(self, batch)
        pieces = project(batch, self.qkv_weight, self.qkv_bias)
        related = self.out_channels // self.reduction
        out: Tensor | None = None
        if self.conv_w is not None:
            out = self._attention(*pieces.split([related, related, self.out_channels], 1))
        if self.convolution is not None:
            apart = pieces.unflatten(1, (2 + self.reduction, -1))
            path = self._convolve(batch, lambda dense: batch if dense else apart)
            out = path if out is None else out + path
        assert out is not None
        out = out if self.bias is None else out + self.bias[:, None, None]
        return out if x.dim() == 4 else out[0]


class FusedWindowACmix(WindowACmix):
    """`WindowACmix` in inference."""

    @torch.no_grad()
    def __init__(self, layer: WindowACmix) -> None:
        start_as(self, layer)
        self.qkv = layer.qkv
        fuse_projected(self, layer, layer.qkv.weight)
        if layer.proj is not None:
            self.relative_position_bias_table = layer.relative_position_bias_table


class FusedReducedACmix(ReducedACmix):
    """`ReducedACmix` in inference."""

    @torch.no_grad()
    def __init__(self, layer: ReducedACmix) -> None:
        start_as(self, layer)
        self.q, self.kv, self.sr = layer.q, layer.kv, layer.sr
        if self.sr is not None:
            self.norm = layer.norm
        fuse_projected(self, layer, layer.q.weight)


def fuse_projected(
    fused: WindowACmix | ReducedACmix, layer: WindowACmix | ReducedACmix, like: Tensor
) -> None:
    """alpha in the projection after attention, beta in the kernel of the convolution."""
    alpha, beta = layer.mix.weights()
    fused.mix = FixedMix(None if alpha is None else 1.0, None if beta is None else 1.0)
    fused.proj = None if layer.proj is None else multiplied(layer.proj, alpha)
    fused.proj_drop = layer.proj_drop
    fused.convolution = None if beta is None else FoldedPath(fold_path(layer, like), like)


def weights_of(layer: ACmix2d, scale: Tensor | None) -> Weights:
    """The layer's parameters, beta and scale in those of the convolution, for a plan to fold."""
    beta = layer.mix.weights()[1]
    return Weights(
        wide(layer.qkv_weight),
        wide(layer.qkv_bias),
        layer.position_weight if layer.has_attention else None,
        None if beta is None else wide(beta * layer.fc_weight),
        None if beta is None else scaled_kernels(layer, scale),
        1.0 if layer.has_attention else None,
        None if beta is None else 1.0,
    )


@torch.no_grad()
def fuse_pairwise(
    layer: PairwiseAttention, scale: Tensor | None, shift: Tensor | None
) -> PairwiseAttention:
    """The same layer with the norm inside it and the one after it folded; its weights of a window
    sum to 1."""
    layer = copy.deepcopy(layer)
    layer.conv_w = fuse_weight_layers(layer.conv_w)
    v: Any = layer.conv3
    if scale is not None and shift is not None:
        v.weight.mul_(scale[:, None, None, None])
        v.bias.mul_(scale).add_(shift)
    return layer


def fuse_weight_layers(layers: nn.Sequential) -> nn.Sequential:
    """`weight_layers` with their second norm folded; the first stands before a ReLU."""
    kept: list[Any] = list(copy.deepcopy(layers).eval())
    if isinstance(kept[3], nn.BatchNorm2d):
        kept[2:4] = [fuse_conv_bn_eval(kept[2], kept[3])]
    return nn.Sequential(*kept).requires_grad_(False)


def divide_by_v(kernel: Tensor | None, factor: Tensor, head_dim: int) -> None:
    """Undo in the kernel (d * M, J, k, k) that v, the last pieces, is multiplied by factor (C)."""
    assert kernel is not None
    by_channel = factor.unflatten(0, (-1, head_dim)).t()  # (d, pieces of v)
    pieces = by_channel.shape[1]
    by_group = kernel.unflatten(0, (head_dim, -1))  # (d, M, J, k, k)
    by_group[:, :, -pieces:] /= by_channel[:, None, :, None, None]


def away_from_zero(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor with what is nothing beside its largest, in the dtype, at that distance from 0."""
    largest = factor.abs().amax()
    least = torch.finfo(dtype).eps * torch.where(largest > 0, largest, 1)
    return torch.where(factor.abs() < least, least, factor)


def product(alpha: Weight, scale: Tensor | None, like: Tensor) -> Tensor:
    """alpha * scale for every channel, (C), as `like`."""
    factor = wide(torch.ones_like(like))
    for weight in (alpha, scale):
        if weight is not None:
            factor *= weight
    return factor


def multiplied(linear: nn.Linear, factor: Weight) -> nn.Linear:
    """A copy of the layer with its output multiplied."""
    linear = copy.deepcopy(linear)
    assert factor is not None
    for parameter in linear.parameters():
        parameter.copy_(factor * wide(parameter))
    return linear


def start_as(module: nn.Module, layer: nn.Module) -> None:
    """Begin a module with the settings of the layer, but no parameter or module."""
    nn.Module.__init__(module)
    settings = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
    vars(module).update(settings)
