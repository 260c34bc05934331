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

from acmix.layers.acmix import ACmix2d, prefers_dense, project
from acmix.layers.mix import FixedMix, Weight
from acmix.layers.patchwise import PairwiseAttention, PatchwiseACmix, joined
from acmix.layers.reduced import ReducedACmix
from acmix.layers.window import WindowACmix
from acmix.ops import _checks
from acmix.ops._dispatch import choose, resolve
from acmix.ops._library import autocast_dtype
from acmix.ops.shift_convolution import IMPLEMENTATIONS as CONVOLUTION
from acmix.ops.shift_convolution import folded, shift_kernels
from acmix.ops.shift_convolution._fused import prefers_fc_apart
from acmix.ops.stage2 import native as stage2
from acmix.ops.window_attention import IMPLEMENTATIONS as ATTENTION


class FusedConvolution(nn.Module):
    """The convolution path: a group convolution of the pieces, or a dense one of what they are
    projected from; fc is apart from its kernel only where that is fewer operations.

    Shapes: (B, J, d, H, W), or (B, C_in, H, W) -> (B, C, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        weight: Tensor,
        taps: Tensor | None = None,
        fc_weight: Tensor | None = None,
        *,
        like: Tensor,
        dense: bool = False,
        stride: int = 1,
        dilation: int = 1,
        backend: str = "auto",
    ) -> None:
        """weight (C, J, k, k), dense (C, C_in, k, k), or (C, k^2, k, k) after fc_weight (k^2, J);
        taps (C, k, k): what each tap inside the map adds. The dtype is that of `like`."""
        super().__init__()
        self.weight, self.taps = constant(weight, like), constant_or_none(taps, like)
        self.fc_weight = constant_or_none(fc_weight, like)
        self.dense, self.stride, self.dilation, self.backend = dense, stride, dilation, backend

    def forward(self, x: Tensor) -> Tensor:
        """The pieces, or what they are projected from -> (B, C, Ho, Wo)."""
        return folded.with_bias(*self.parts(x))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The convolution, and its bias (1, C, Ho, Wo)."""
        if self.dense:
            out = folded.convolve(x, self.weight, self.stride, self.dilation, groups=1)
        elif self.fc_weight is not None:
            convolve = choose(self.backend, CONVOLUTION, x, self.weight).forward
            out = convolve(x, self.fc_weight, self.weight, None, self.stride, self.dilation)
        elif resolve(self.backend, CONVOLUTION, x, self.weight) == "native":
            out = torch.ops.acmix.shift_convolution(x, self.weight, self.stride, self.dilation)
        else:
            channels = x.transpose(1, 2).flatten(1, 2)
            out = folded.convolve(channels, self.weight, self.stride, self.dilation, x.shape[2])
        if self.taps is None:
            return out, None
        return out, folded.border_bias(self.taps, out, x, self.stride, self.dilation)

    def extra_repr(self) -> str:
        return (
            f"{tuple(self.weight.shape)}, dense={self.dense}, stride={self.stride}, "
            f"dilation={self.dilation}, backend={self.backend!r}"
        )


class FusedACmix2d(ACmix2d):
    """`ACmix2d` in inference, its convolution one of the pieces: the form for a CPU."""

    @torch.no_grad()
    def __init__(self, layer: ACmix2d, scale: Tensor | None, shift: Tensor | None) -> None:
        start_as(self, layer)
        alpha, beta = layer.mix.weights()
        like = layer.qkv_weight
        weight, bias = wide(like), wide(layer.qkv_bias)
        path, fc = convolution_weights(layer, self.out_channels, beta, scale), None
        if alpha is None:
            kernel, fc = fewest_operations(*path, self.head_dim)
        else:
            kernel = folded.fold_fc(*path)
            factor = away_from_zero(product(alpha, scale, bias[: self.out_channels]), like.dtype)
            divide_by_v(kernel, factor, self.head_dim)
            # Rows are d-major: channel c of head n of v stands in row c * 3N + 2N + n.
            by_channel = factor.unflatten(0, (self.heads, self.head_dim)).t()
            rows = (self.head_dim, 3 * self.heads)
            weight.unflatten(0, rows)[:, 2 * self.heads :] *= by_channel[..., None]
            bias.unflatten(0, rows)[:, 2 * self.heads :] *= by_channel
            self.position_weight = constant_or_none(layer.position_weight, like)
        self.qkv_weight, self.qkv_bias = constant(weight, like), constant(bias, like)
        self.convolution = FusedConvolution(
            kernel,
            fc_weight=fc,
            like=like,
            stride=self.stride,
            dilation=self.dilation,
            backend=self.backend,
        )
        self.bias = constant_or_none(shift, like)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        check_input(self, x)
        pieces = self._project(x)
        if self.has_attention:
            backend = resolve(self.backend, ATTENTION, x, self.qkv_weight, head_dim=self.head_dim)
            out = self._mixed(pieces, backend)
        else:
            out = self.convolution(pieces)
        return out if self.bias is None else out + self.bias[:, None, None]

    def _mixed(self, pieces: Tensor, backend: str) -> Tensor:
        """Stage II: both paths of the pieces, summed."""
        if backend == "native":
            kernel, sizes = self.convolution.weight, (self.kernel_att, self.stride, self.dilation)
            return stage2.forward(pieces, self.position_weight, kernel, 1.0, *sizes)
        q, k, v = pieces.chunk(3, 1)
        q = q[..., :: self.stride, :: self.stride]
        return self._attention(q, k, v, backend, self.convolution(pieces))


class SplitACmix2d(ACmix2d):
    """`ACmix2d` in inference, its convolution a dense one of x, beside attention or alone: the form
    for a GPU, and of attention alone."""

    @torch.no_grad()
    def __init__(self, layer: ACmix2d, scale: Tensor | None, shift: Tensor | None) -> None:
        start_as(self, layer)
        alpha, beta = layer.mix.weights()
        like = layer.qkv_weight
        # Channel c of piece j of the projections: (3N, d, in_channels) and (3N, d).
        weight = wide(like).unflatten(0, (self.head_dim, -1)).transpose(0, 1).contiguous()
        bias = wide(layer.qkv_bias).unflatten(0, (self.head_dim, -1)).t().contiguous()
        if beta is not None:
            path = convolution_weights(layer, self.out_channels, beta, scale)
            kernel, taps = folded.fold_dense(weight, bias, *path, None)
            assert taps is not None
            if shift is not None:
                taps[:, taps.shape[1] // 2, taps.shape[2] // 2] += shift  # never outside the map
            self.convolution = FusedConvolution(
                kernel, taps, like=like, dense=True, stride=self.stride, dilation=self.dilation
            )
        if alpha is not None:
            weight, bias = weight.flatten(0, 1), bias.flatten()
            v = slice(-self.out_channels, None)
            factor = product(alpha, scale, bias[v])
            weight[v] *= factor[:, None]
            bias[v] *= factor
            if beta is None and shift is not None:
                bias[v] += shift  # and so does attention: the weights of a window sum to 1
            self.qkv_weight, self.qkv_bias = constant(weight, like), constant(bias, like)
            self.position_weight = constant_or_none(layer.position_weight, like)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        check_input(self, x)
        if not self.has_attention:
            return self.convolution(x)
        backend = resolve(self.backend, ATTENTION, x, self.qkv_weight, head_dim=self.head_dim)
        parts = self.convolution.parts(x) if self.has_convolution else ()
        return self._attention(*self._project_for_attention(x), backend, *parts)

    def _project_for_attention(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v: head-major, as the weights are; q only where windows are."""
        weight, bias = self.qkv_weight, self.qkv_bias
        if self.stride == 1:
            q, k, v = project(x, weight, bias).chunk(3, 1)
        else:
            strided, c = x[..., :: self.stride, :: self.stride], self.out_channels
            q = project(strided, weight[:c], bias[:c])
            k, v = project(x, weight[c:], bias[c:]).chunk(2, 1)
        heads_apart = (self.heads, self.head_dim)
        return q.unflatten(1, heads_apart), k.unflatten(1, heads_apart), v.unflatten(1, heads_apart)


class FusedPatchwiseACmix(PatchwiseACmix):
    """`PatchwiseACmix` in inference: q, k and v by one convolution."""

    @torch.no_grad()
    def __init__(self, layer: PatchwiseACmix, scale: Tensor | None, shift: Tensor | None) -> None:
        start_as(self, layer)
        alpha, beta = layer.mix.weights()
        like = layer.conv1.weight
        weight, bias = map(wide, joined(layer.conv1, layer.conv2, layer.conv3))
        factor = product(alpha, scale, bias[-self.out_channels :])
        self.convolution: FusedConvolution | None = None
        if beta is not None:
            path = convolution_weights(layer, self.out_channels, beta, scale)
            taps, dense = None, prefers_dense(like)
            if dense:
                shape = (2 + self.reduction, -1)
                of_x = (weight.unflatten(0, shape), bias.unflatten(0, shape))
                kernel, taps = folded.fold_dense(*of_x, *path, None)
            else:
                kernel = folded.fold_fc(*path)
            if alpha is not None and not dense:
                factor = away_from_zero(factor, like.dtype)
                divide_by_v(kernel, factor, self.out_channels // self.reduction)
            self.convolution = FusedConvolution(
                kernel, taps, like=like, backend=self.backend, dense=dense
            )
        if alpha is not None:
            weight[-self.out_channels :] *= factor[:, None]
            bias[-self.out_channels :] *= factor
        self.conv_w = None if layer.conv_w is None else fuse_weight_layers(layer.conv_w)
        self.qkv_weight, self.qkv_bias = constant(weight, like), constant(bias, like)
        self.bias = constant_or_none(shift, like)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) -> (B, out_channels, H, W)."""
        _checks.check_map("x", x, self.in_channels)
        pieces = project(x, self.qkv_weight, self.qkv_bias)
        related = self.out_channels // self.reduction
        out: Tensor | None = None
        if self.conv_w is not None:
            out = self._attention(*pieces.split([related, related, self.out_channels], 1))
        if self.convolution is not None:
            apart = pieces.unflatten(1, (2 + self.reduction, -1))
            convolution = self.convolution(x if self.convolution.dense else apart)
            out = convolution if out is None else out + convolution
        assert out is not None
        return out if self.bias is None else out + self.bias[:, None, None]


class FusedWindowACmix(WindowACmix):
    """`WindowACmix` in inference."""

    @torch.no_grad()
    def __init__(self, layer: WindowACmix) -> None:
        start_as(self, layer)
        self.qkv, self.proj_drop = layer.qkv, layer.proj_drop
        alpha, beta = layer.mix.weights()
        self.mix = FixedMix(None if alpha is None else 1.0, None if beta is None else 1.0)
        self.proj = None
        if layer.proj is not None:
            self.proj = multiplied(layer.proj, alpha)
            self.relative_position_bias_table = layer.relative_position_bias_table
        if beta is not None:
            like = layer.qkv.weight
            fc_weight, kernels = convolution_weights(layer, self.dim, beta)
            fc_bias = wide(beta * layer.fc_bias)
            dense = prefers_dense(like)
            if dense:
                pieces = (3 * self.heads, self.head_dim)
                weight = wide(like).unflatten(0, pieces)
                bias = None if layer.qkv.bias is None else wide(layer.qkv.bias).unflatten(0, pieces)
                kernel, taps = folded.fold_dense(weight, bias, fc_weight, kernels, fc_bias)
                fc = None
            else:
                kernel, fc = fewest_operations(fc_weight, kernels, self.head_dim)
                taps = folded.tap_bias(kernels, fc_bias)
            self.convolution = FusedConvolution(kernel, taps, fc, like=like, dense=dense)

    def _convolution(self, x: Tensor, qkv: Tensor, beta: Weight) -> Tensor:
        if self.convolution.dense:
            out = self.convolution(x.permute(0, 3, 1, 2))
        else:
            pieces = qkv.unflatten(-1, (3 * self.heads, self.head_dim))
            out = self.convolution(pieces.permute(0, 3, 4, 1, 2))
        return out.permute(0, 2, 3, 1)


class FusedReducedACmix(ReducedACmix):
    """`ReducedACmix` in inference."""

    @torch.no_grad()
    def __init__(self, layer: ReducedACmix) -> None:
        start_as(self, layer)
        self.q, self.kv, self.sr, self.proj_drop = layer.q, layer.kv, layer.sr, layer.proj_drop
        if self.sr is not None:
            self.norm = layer.norm
        alpha, beta = layer.mix.weights()
        self.mix = FixedMix(None if alpha is None else 1.0, None if beta is None else 1.0)
        self.proj = None if layer.proj is None else multiplied(layer.proj, alpha)
        if beta is not None:
            like, path = layer.q.weight, convolution_weights(layer, self.dim, beta)
            if prefers_dense(like):
                self.convolution = None
                self.of_q = self._dense_of(layer.q, path[0][:, : self.heads], path[1])
                self.of_kv = self._dense_of(layer.kv, path[0][:, self.heads :], path[1])
            else:
                kernel, fc = fewest_operations(*path, self.head_dim)
                self.convolution = FusedConvolution(kernel, None, fc, like=like)

    def _dense_of(self, linear: nn.Linear, fc_weight: Tensor, kernels: Tensor) -> FusedConvolution:
        heads_apart = (-1, self.head_dim)
        weight = wide(linear.weight).unflatten(0, heads_apart)
        bias = None if linear.bias is None else wide(linear.bias).unflatten(0, heads_apart)
        kernel, taps = folded.fold_dense(weight, bias, fc_weight, kernels, None)
        return FusedConvolution(kernel, taps, like=linear.weight, dense=True)

    def _convolution(
        self,
        x: Tensor,
        reduced: Tensor,
        q: Tensor,
        kv: Tensor,
        size: tuple[int, int],
        beta: Weight,
    ) -> Tensor:
        if self.convolution is None:
            out = self.of_q(self._as_map(x, size)) + self.of_kv(self._enlarged(reduced, size))
        else:
            out = self.convolution(self._pieces(q, kv, size))
        return out.flatten(2).transpose(1, 2)


def fuse_acmix2d(layer: ACmix2d, scale: Tensor | None, shift: Tensor | None) -> ACmix2d:
    """In the form for the device that holds the layer; both forms run on any."""
    if layer.has_convolution and not prefers_dense(layer.qkv_weight):
        return FusedACmix2d(layer, scale, shift)
    return SplitACmix2d(layer, scale, shift)


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


def convolution_weights(
    layer: ACmix2d | PatchwiseACmix | WindowACmix | ReducedACmix,
    channels: int,
    beta: Weight,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """beta * fc, (k^2, J), and scale * kernels, (C, k^2, k, k), for the folds."""
    assert beta is not None
    fc_weight = wide(beta * layer.fc_weight)
    kernels = layer.shift.kernels(like=fc_weight)
    if kernels is None:
        kernels = shift_kernels(channels, layer.kernel_conv, fc_weight.device, fc_weight.dtype)
    kernels = wide(kernels)
    return fc_weight, kernels if scale is None else scale[:, None, None, None] * kernels


def fewest_operations(
    fc_weight: Tensor, kernels: Tensor, head_dim: int
) -> tuple[Tensor, Tensor | None]:
    """The weight and, where it is apart, the fc of `FusedConvolution` of the pieces."""
    if prefers_fc_apart(fc_weight, kernels, head_dim):
        return kernels, fc_weight
    return folded.fold_fc(fc_weight, kernels), None


def divide_by_v(kernel: Tensor, factor: Tensor, head_dim: int) -> None:
    """Undo in the kernel (d * M, J, k, k) that v, the last pieces, is multiplied by factor (C)."""
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


def wide(tensor: Tensor) -> Tensor:
    """A copy in float32 at least, for the folds."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def constant(tensor: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(like.dtype).contiguous(), requires_grad=False)


def constant_or_none(tensor: Tensor | None, like: Tensor) -> nn.Parameter | None:
    return None if tensor is None else constant(tensor, like)


def start_as(module: nn.Module, layer: nn.Module) -> None:
    """Begin a module with the settings of the layer, but no parameter or module."""
    nn.Module.__init__(module)
    settings = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
    vars(module).update(settings)


def check_input(layer: ACmix2d, x: Tensor) -> None:
    _checks.check_map("x", x, layer.in_channels)
    if autocast_dtype(x.device) is None:
        _checks.check_same_kind(parameters=next(layer.parameters()), x=x)
