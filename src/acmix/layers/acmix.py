"""The operator of the paper as a layer, in place of a k x k convolution."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from acmix.layers.convolution_path import ConvolutionPath
from acmix.layers.mix import MIXES
from acmix.layers.shift import check_shift
from acmix.ops import _checks, acmix
from acmix.ops._dispatch import BACKENDS
from acmix.ops.shift_convolution import Projection

torch.fx.wrap("acmix")  # a trace has the call of the operator, whose sizes it does not know


class ACmix2d(ConvolutionPath):
    """Convolution and self-attention from one set of projections: use it for `nn.Conv2d(c, c, 3)`.

    Three 1x1 projections q, k, v of x (Stage I) feed windowed attention and a shift convolution
    (Stage II), and `out = alpha * attention + beta * convolution`. Pan et al., "On the Integration
    of Self-Attention and Convolution", CVPR 2022, Eq. 9.

    Shapes: (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)), or both
    without B, any H, W >= 1, in any floating-point dtype and memory format.
    `acmix.ops.acmix` is the layer as a function.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; a multiple of `heads`.
        heads: attention heads N, of head_dim = out_channels / N channels each.
        kernel_att: side of the attention window in pixels, odd. Beyond the border pixels are
            reflected, repeatedly where the map is smaller than the window.
        kernel_conv: side of the convolution kernel in pixels, odd. Its border is padded by zeros.
        stride: step between outputs in pixels, for both paths.
        dilation: step between the taps of the window and of the kernel in pixels, for both paths.
        mix: "learned" (alpha and beta, both from 0.5), "convex" (alpha and 1 - alpha), "sum" (both
            1), "attention" or "convolution" (that path alone; the other is not computed, has no
            parameters, and its arguments have no effect).
        shift: "learned" (a kernel set for each output channel: the method), "learned_shared" (one
            set for all heads), "fixed" (one-hot kernels) or "tensor" (tensor shifts).
        shift_init: start of learned kernels, "shift" or "kaiming" (random, as `nn.Conv2d`).
        position: whether attention has the linear position term.
        backend: "auto", "reference", "tiled", "native" or "triton"; see `acmix.ops.backends`.
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
        heads: int = 4,
        kernel_att: int = 7,
        kernel_conv: int = 3,
        stride: int = 1,
        dilation: int = 1,
        mix: str = "learned",
        shift: str = "learned",
        shift_init: str = "shift",
        position: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.check_positive("in_channels", in_channels)
        _checks.check_positive("out_channels", out_channels)
        _checks.check_positive("heads", heads)
        _checks.check_divisible("out_channels", out_channels, "heads", heads)
        _checks.check_window("kernel_att", kernel_att)
        _checks.check_positive("stride", stride)
        _checks.check_positive("dilation", dilation)
        _checks.check_choice("mix", mix, MIXES)
        check_shift(kernel_conv, shift, shift_init)
        _checks.check_choice("backend", backend, BACKENDS)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.heads, self.head_dim = heads, out_channels // heads
        self.kernel_att, self.kernel_conv = kernel_att, kernel_conv
        self.stride, self.dilation = stride, dilation
        self.backend = backend

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        # Plain parameters: a network's loop over its nn.Conv2d modules leaves their start alone.
        # Rows of the projections are d-major, c * 3N + j with j over the heads of q, of k and of
        # v, which is the order of the folded group convolution: no copy on the way to it.
        self.qkv_weight = parameter(3 * out_channels, in_channels)
        self.qkv_bias = parameter(3 * out_channels)
        self._create_mix(mix, device, dtype)
        if self.has_attention:
            self.position_weight = parameter(self.head_dim, 2) if position else None
        if self.has_convolution:
            path = out_channels, heads, 3 * heads, shift, shift_init
            self._create_path(*path, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start again: projections and fc as `nn.Conv2d` starts, kernels and mix as constructed."""
        bound = 1 / math.sqrt(self.in_channels)
        nn.init.uniform_(self.qkv_weight, -bound, bound)
        nn.init.uniform_(self.qkv_bias, -bound, bound)
        if self.has_attention and self.position_weight is not None:
            nn.init.kaiming_uniform_(self.position_weight, a=math.sqrt(5))
        self._reset_path()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)); or
        both without B."""
        position = self.position_weight if self.has_attention else None
        convolution: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.has_convolution:
            convolution = self.fc_weight, self.shift.kernels(like=self.fc_weight)
        return acmix(
            x,
            self.qkv_weight,
            self.qkv_bias,
            position,
            *convolution,
            *self.mix.weights(),
            heads=self.heads,
            window=self.kernel_att,
            stride=self.stride,
            dilation=self.dilation,
            backend=self.backend,
        )

    def _projections(self) -> list[Projection]:
        by_piece = (self.head_dim, 3 * self.heads)
        weight = self.qkv_weight.unflatten(0, by_piece).transpose(0, 1)
        return [(weight, self.qkv_bias.view(by_piece).t())]

    def extra_repr(self) -> str:
        """The arguments of the paths that are there; mix and shift print themselves."""
        shown = [f"{self.in_channels}, {self.out_channels}, heads={self.heads}"]
        if self.has_attention:
            position = self.position_weight is not None
            shown.append(f"kernel_att={self.kernel_att}, position={position}")
        if self.has_convolution:
            shown.append(f"kernel_conv={self.kernel_conv}")
        shown.append(f"stride={self.stride}, dilation={self.dilation}, backend={self.backend!r}")
        return ", ".join(shown)
