"""ACmix around the patchwise self-attention of SAN, and SAN's pairwise attention beside it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix.layers.convolution_path import ConvolutionPath, check_kind
from acmix.layers.mix import MIXES, weigh
from acmix.layers.shift import check_shift
from acmix.ops import _checks, weighted_aggregation
from acmix.ops._dispatch import BACKENDS
from acmix.ops._project import one_for_all, project
from acmix.ops._windows import pad_reflect, unit_coordinate
from acmix.ops.shift_convolution import Projection


class PatchwiseACmix(ConvolutionPath):
    """Patchwise self-attention and a shift convolution from one set of projections.

    `out = alpha * attention + beta * convolution`: Pan et al., "On the Integration of
    Self-Attention and Convolution", CVPR 2022, on Zhao et al., "Exploring Self-attention for Image
    Recognition", CVPR 2020, Eq. 4. The weights of a window are made from its query and all of its
    keys at once by two 1x1 convolutions, and are not normalised. q, k and the equal parts of v are
    the pieces that the convolution reads. Names of the attention's parameters are SAN's.

    Shapes: (B, in_channels, H, W) -> (B, out_channels, H, W), any H, W >= 1, in any floating-point
    dtype and memory format.

    Args:
        in_channels: channels of the input.
        out_channels: channels C of v and of the output; a multiple of `reduction` and of
            `share_planes`.
        kernel_att: side of the attention window in pixels, odd. Beyond the border pixels are
            reflected, repeatedly where the map is smaller than the window.
        kernel_conv: side of the convolution kernel in pixels, odd. Its border is padded by zeros.
        reduction: q and k have C / reduction channels.
        share_planes: how many channels of v share a weight: c and c' where they are equal modulo
            C / share_planes.
        mix, shift, shift_init: as in `ACmix2d`.
        backend: of the aggregation; see `acmix.ops.backends`.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: for an argument out of its range, and in `forward` for an input of
            wrong rank, channels or dtype and for a forced backend that cannot run on it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_att: int = 7,
        kernel_conv: int = 3,
        reduction: int = 4,
        share_planes: int = 8,
        mix: str = "learned",
        shift: str = "learned",
        shift_init: str = "shift",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_attention(in_channels, out_channels, kernel_att, reduction, share_planes, backend)
        _checks.check_choice("mix", mix, MIXES)
        check_shift(kernel_conv, shift, shift_init)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_att, self.kernel_conv = kernel_att, kernel_conv
        self.reduction, self.share_planes = reduction, share_planes
        self.backend = backend
        related = out_channels // reduction
        self.conv1 = nn.Conv2d(in_channels, related, 1, device=device, dtype=dtype)  # q
        self.conv2 = nn.Conv2d(in_channels, related, 1, device=device, dtype=dtype)  # k
        self.conv3 = nn.Conv2d(in_channels, out_channels, 1, device=device, dtype=dtype)  # v
        self._create_mix(mix, device, dtype)
        self.conv_w: nn.Sequential | None = None
        if self.has_attention:
            taps, weights = kernel_att**2, out_channels // share_planes
            self.conv_w = weight_layers(
                related * (taps + 1), weights, taps * weights, device=device, dtype=dtype
            )
        if self.has_convolution:
            pieces = 2 + reduction
            path = out_channels, reduction, pieces, shift, shift_init
            self._create_path(*path, device, dtype)
            self._reset_path()

    def reset_parameters(self) -> None:
        """Start again: attention and fc as `nn.Conv2d`, kernels and mix as constructed."""
        for layer in (self.conv1, self.conv2, self.conv3, *(self.conv_w or ())):
            reset = getattr(layer, "reset_parameters", None)
            if reset is not None:
                reset()
        self._reset_path()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) -> (B, out_channels, H, W), or both without B."""
        batch = _checks.as_batch("x", x, self.in_channels)
        check_kind(self, batch)
        q, k, v = self._project(batch)
        out: Tensor | None = None
        if self.conv_w is not None:
            out = weigh(self.mix.weights()[0], self._attention(q, k, v))
        if self.has_convolution:
            convolution = self._path(batch, (q, k, v))
            out = convolution if out is None else out + convolution
        assert out is not None
        return out if x.dim() == 4 else out[0]

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return project_together(x, self.conv1, self.conv2, self.conv3)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.conv_w is not None
        keys = windows(k, self.kernel_att).flatten(1, 2)
        weight = self.conv_w(torch.cat([q, keys], 1)).unflatten(1, (-1, self.kernel_att**2))
        return weighted_aggregation(weight, v, window=self.kernel_att, backend=self.backend)

    def _path(self, x: Tensor, qkv: tuple[Tensor, ...]) -> Tensor:
        """beta times the convolution path, (B, C, H, W), from the map x or its projections; its
        channels are d-major, those of the attention are not, and the two are added as they are."""

        def read(dense: bool) -> Tensor:
            return x if dense else torch.cat(qkv, 1).unflatten(1, (2 + self.reduction, -1))

        return self._convolve(x, read)

    def _projections(self) -> list[Projection]:
        weight, bias = joined(self.conv1, self.conv2, self.conv3)
        pieces = (2 + self.reduction, -1)
        return [(weight.unflatten(0, pieces), bias.unflatten(0, pieces))]

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_att={self.kernel_att}, "
            f"kernel_conv={self.kernel_conv}, reduction={self.reduction}, "
            f"share_planes={self.share_planes}, backend={self.backend!r}"
        )


class PairwiseAttention(nn.Module):
    """SAN's other self-attention: a weight of a window is made from one query and one key.

    Zhao et al., "Exploring Self-attention for Image Recognition", CVPR 2020, Eq. 2: two 1x1
    convolutions of the difference q - k and of the difference of the learned positions, then
    softmax over the window. The biases of `conv_p` and of the last convolution cancel; they are
    here because SAN's releases have them.

    Shapes: (B, in_channels, H, W) -> (B, out_channels, H, W), any H, W >= 1.

    Args and Raises: as those of `PatchwiseACmix`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_att: int = 7,
        reduction: int = 4,
        share_planes: int = 8,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_attention(in_channels, out_channels, kernel_att, reduction, share_planes, backend)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_att, self.reduction, self.share_planes = kernel_att, reduction, share_planes
        self.backend = backend
        related = out_channels // reduction
        self.conv1 = nn.Conv2d(in_channels, related, 1, device=device, dtype=dtype)  # q
        self.conv2 = nn.Conv2d(in_channels, related, 1, device=device, dtype=dtype)  # k
        self.conv3 = nn.Conv2d(in_channels, out_channels, 1, device=device, dtype=dtype)  # v
        self.conv_p = nn.Conv2d(2, 2, 1, device=device, dtype=dtype)
        self.conv_w = weight_layers(
            related + 2, related, out_channels // share_planes, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) -> (B, out_channels, H, W), or both without B."""
        maps = _checks.as_batch("x", x, self.in_channels)
        check_kind(self, maps)
        batch, _, height, width = maps.shape
        columns = unit_coordinate(width, maps).expand(height, width)
        rows = unit_coordinate(height, maps)[:, None].expand(height, width)
        positions = self.conv_p(torch.stack([columns, rows])[None]).expand(batch, -1, -1, -1)
        q, k, v = project_together(maps, self.conv1, self.conv2, self.conv3)
        queries = torch.cat([q, positions], 1)
        keys = torch.cat([k, positions], 1)
        apart = queries[:, :, None] - windows(keys, self.kernel_att)
        weight = self.conv_w(apart.flatten(3)).softmax(2).unflatten(3, (height, width))
        out = weighted_aggregation(
            weight.to(v.dtype), v, window=self.kernel_att, backend=self.backend
        )
        return out if x.dim() == 4 else out[0]

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_att={self.kernel_att}, "
            f"reduction={self.reduction}, share_planes={self.share_planes}, "
            f"backend={self.backend!r}"
        )


def project_together(x: Tensor, *convs: Any) -> tuple[Tensor, ...]:
    """The results of some 1x1 convolutions of x; where a linear is faster, by one of them all."""
    if not one_for_all(x):
        return tuple(conv(x) for conv in convs)
    weight, bias = joined(*convs)
    return project(x, weight, bias).split([len(conv.weight) for conv in convs], 1)


def joined(*convs: Any) -> tuple[Tensor, Tensor]:
    """Weight (C, in_channels) and bias (C) of the convolutions, one after the other."""
    weights, biases = zip(*((conv.weight, conv.bias) for conv in convs), strict=True)
    return torch.cat(weights).flatten(1), torch.cat(biases)


def check_attention(
    in_channels: int,
    out_channels: int,
    kernel_att: int,
    reduction: int,
    share_planes: int,
    backend: str,
) -> None:
    _checks.check_positive("in_channels", in_channels)
    _checks.check_positive("out_channels", out_channels)
    _checks.check_window("kernel_att", kernel_att)
    _checks.check_positive("reduction", reduction)
    _checks.check_divisible("out_channels", out_channels, "reduction", reduction)
    _checks.check_positive("share_planes", share_planes)
    _checks.check_divisible("out_channels", out_channels, "share_planes", share_planes)
    _checks.check_choice("backend", backend, BACKENDS)


def weight_layers(
    before: int,
    between: int,
    after: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """The network that makes the weights, of 1x1 convolutions each after a norm and a ReLU."""
    return nn.Sequential(
        nn.BatchNorm2d(before, device=device, dtype=dtype),
        nn.ReLU(),
        nn.Conv2d(before, between, 1, bias=False, device=device, dtype=dtype),
        nn.BatchNorm2d(between, device=device, dtype=dtype),
        nn.ReLU(),
        nn.Conv2d(between, after, 1, device=device, dtype=dtype),
    )


def windows(x: Tensor, side: int) -> Tensor:
    """The reflected window around each pixel: (B, C, H, W) -> (B, C, side^2, H, W)."""
    height, width = x.shape[-2:]
    reach = side // 2
    padded = pad_reflect(x, (-reach, height - 1 + reach), (-reach, width - 1 + reach))
    taps = F.unfold(padded, side)
    return taps.unflatten(2, (height, width)).unflatten(1, (-1, side * side))
