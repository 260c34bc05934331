"""The operator of the paper as a layer, in place of a k x k convolution."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix.layers.mix import MIXES, ConvexMix, LearnedMix, make_mix
from acmix.layers.shift import LearnedShift, check_shift, make_shift
from acmix.ops import _checks
from acmix.ops._dispatch import BACKENDS, resolve
from acmix.ops._library import autocast_dtype
from acmix.ops.shift_convolution import IMPLEMENTATIONS as CONVOLUTION
from acmix.ops.shift_convolution import folded
from acmix.ops.shift_convolution import reference as unfolded
from acmix.ops.stage2 import native as stage2
from acmix.ops.window_attention import IMPLEMENTATIONS as ATTENTION


class ACmix2d(nn.Module):
    """Convolution and self-attention from one set of projections: use it for `nn.Conv2d(c, c, 3)`.

    Three 1x1 projections q, k, v of x (Stage I) feed windowed attention and a shift convolution
    (Stage II), and `out = alpha * attention + beta * convolution`. Pan et al., "On the Integration
    of Self-Attention and Convolution", CVPR 2022, Eq. 9.

    Shapes: (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)), any
    H, W >= 1, in any floating-point dtype and memory format.

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
        _checks.check_window("kernel_conv", kernel_conv)
        _checks.check_positive("stride", stride)
        _checks.check_positive("dilation", dilation)
        _checks.check_choice("mix", mix, MIXES)
        check_shift(shift, shift_init)
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
        self.mix = make_mix(mix, device, dtype)
        alpha, beta = self.mix.weights()
        self.has_attention, self.has_convolution = alpha is not None, beta is not None
        if self.has_attention:
            self.position_weight = parameter(self.head_dim, 2) if position else None
        if self.has_convolution:
            self.fc_weight = parameter(kernel_conv**2, 3 * heads)
            self.shift = make_shift(
                shift, out_channels, heads, kernel_conv, shift_init, device, dtype
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start again: projections and fc as `nn.Conv2d` starts, kernels and mix as constructed."""
        bound = 1 / math.sqrt(self.in_channels)
        nn.init.uniform_(self.qkv_weight, -bound, bound)
        nn.init.uniform_(self.qkv_bias, -bound, bound)
        for name in ("position_weight", "fc_weight"):
            weight = getattr(self, name, None)
            if weight is not None:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        for child in self.children():
            if isinstance(child, (LearnedMix, ConvexMix, LearnedShift)):
                child.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        _checks.check_map("x", x, self.in_channels)
        if autocast_dtype(x.device) is None:
            _checks.check_same_kind(parameters=self.qkv_weight, x=x)
        backend = resolve(self.backend, ATTENTION, x, self.qkv_weight, head_dim=self.head_dim)
        alpha, beta = self.mix.weights()
        if beta is None:
            return self._attention(*self._project_for_attention(x), backend)
        fc_weight = beta * self.fc_weight
        kernels = self.shift.kernels(like=fc_weight)
        if kernels is not None and backend != "reference" and prefers_dense(x):
            convolution, bias = self._dense_convolution(x, fc_weight, kernels)
            if alpha is None:
                return folded.with_bias(convolution, bias)
            q, k, v = self._project_for_attention(x)
        else:
            bias = None
            pieces = self._project(x)
            if backend == "native" and alpha is not None and kernels is not None:
                return self._stage2(pieces, fc_weight, kernels, alpha)
            convolution = self._convolution(pieces, fc_weight, kernels, backend)
            if alpha is None:
                return convolution
            q, k, v = pieces.chunk(3, 1)
            q = q[..., :: self.stride, :: self.stride]
        return self._attention(q, k, v, backend, convolution, bias, alpha)

    def _project(self, x: Tensor) -> Tensor:
        """Stage I: the 3N pieces of x, (B, 3N, d, H, W)."""
        pieces = project(x, self.qkv_weight, self.qkv_bias)
        return pieces.unflatten(1, (self.head_dim, 3 * self.heads)).transpose(1, 2)

    def _project_for_attention(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v where no convolution reads them: head-major, q only where windows are."""
        weight = self.qkv_weight.unflatten(0, (self.head_dim, 3, self.heads))
        weight = weight.permute(1, 2, 0, 3).flatten(1, 2)  # (3, C, in_channels)
        bias = self.qkv_bias.view(self.head_dim, 3, self.heads).permute(1, 2, 0).flatten(1)
        if self.stride == 1:
            q, k, v = project(x, weight.flatten(0, 1), bias.flatten()).chunk(3, 1)
        else:
            q = project(x[..., :: self.stride, :: self.stride], weight[0], bias[0])
            k, v = project(x, weight[1:].flatten(0, 1), bias[1:].flatten()).chunk(2, 1)
        heads_apart = (self.heads, self.head_dim)
        return q.unflatten(1, heads_apart), k.unflatten(1, heads_apart), v.unflatten(1, heads_apart)

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        backend: str,
        convolution: Tensor | None = None,
        bias: Tensor | None = None,
        alpha: Tensor | float = 1.0,
    ) -> Tensor:
        """Stage II, attention path, and where there is another, their mix: (B, C, Ho, Wo).

        The convolution may lack its `bias`, (1, C, Ho, Wo).

        The channels of the two are added as they are, although this one's are head-major and the
        convolution's d-major: released checkpoints depend on it.
        """
        attend = ATTENTION[backend].forward
        sizes = self.kernel_att, self.stride, self.dilation
        if convolution is not None and backend == "triton":  # whose kernel mixes, too
            apart = (self.heads, self.head_dim)
            base = convolution.unflatten(1, apart)
            bias = None if bias is None else bias.unflatten(1, apart)
            return attend(q, k, v, self.position_weight, *sizes, base, alpha, bias).flatten(1, 2)
        attention = attend(q, k, v, self.position_weight, *sizes).flatten(1, 2)
        if convolution is None:
            return attention
        convolution = folded.with_bias(convolution, bias)
        if isinstance(alpha, Tensor):
            return torch.addcmul(convolution, alpha.to(attention.dtype), attention)
        return torch.add(convolution, attention, alpha=alpha)

    def _convolution(
        self, pieces: Tensor, fc_weight: Tensor, kernels: Tensor | None, backend: str
    ) -> Tensor:
        """Stage II, convolution path from the pieces: (B, C, Ho, Wo), d-major."""
        if kernels is None:
            return unfolded.forward_tensor_shifts(
                pieces, fc_weight, self.heads, None, self.stride, self.dilation
            )
        convolve = CONVOLUTION[backend].forward
        return convolve(pieces, fc_weight, kernels, None, self.stride, self.dilation)

    def _stage2(
        self, pieces: Tensor, fc_weight: Tensor, kernels: Tensor, alpha: Tensor | float
    ) -> Tensor:
        """Stage II, both paths and their mix in one native operator: (B, C, Ho, Wo)."""
        with folded.without_autocast(pieces):
            weight = folded.fold_fc(fc_weight, kernels)
        return stage2.forward(
            pieces,
            self.position_weight,
            weight,
            alpha,
            self.kernel_att,
            self.stride,
            self.dilation,
        )

    def _dense_convolution(
        self, x: Tensor, fc_weight: Tensor, kernels: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Stage I and the convolution path as one dense convolution of x, and its bias."""
        weight = self.qkv_weight.unflatten(0, (self.head_dim, 3 * self.heads)).transpose(0, 1)
        bias = self.qkv_bias.view(self.head_dim, 3 * self.heads).t()
        return folded.dense_parts(
            x, weight, bias, fc_weight, kernels, None, self.stride, self.dilation
        )

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


def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 1x1 convolution by whichever operator is the fastest, see docs/backends.md."""
    channels_last = x.stride(1) < x.stride(3)
    # A compiled program depends on neither the threads nor the size.
    threads = 1 if torch.compiler.is_compiling() else torch.get_num_threads()
    if x.device.type != "cpu" or (channels_last and threads == 1):
        # Of strided pixels a copy; else PyTorch makes one too, and adds the bias afterwards.
        pixels = x.permute(0, 2, 3, 1).contiguous()
        return F.linear(pixels, weight, bias).permute(0, 3, 1, 2)
    if not channels_last and threads > 1 and x.shape[2] * x.shape[3] >= 32 * 32:
        pixels = torch.baddbmm(bias[:, None], weight.expand(len(x), -1, -1), x.flatten(2))
        return pixels.unflatten(2, x.shape[2:])
    return F.conv2d(x, weight[:, :, None, None], bias)


def prefers_dense(x: Tensor) -> bool:
    """Whether the convolution path runs as one dense convolution of x, not of the pieces.

    On a CPU the group convolution of the pieces costs 0.1 to 0.3 times the dense one (0.1 to 0.7
    without our kernel); cuDNN's costs 5 to 24 times as much. See docs/backends.md.
    """
    return x.device.type != "cpu"
