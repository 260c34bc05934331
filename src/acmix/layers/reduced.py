"""ACmix in place of the spatially reduced attention of PVT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix.layers._sizes import crop, multiple, pad_to_multiple
from acmix.layers.convolution_path import ConvolutionPath, check_kind
from acmix.layers.mix import MIXES, weigh
from acmix.layers.shift import check_shift
from acmix.ops import _checks
from acmix.ops._dispatch import why_portable
from acmix.ops._half import convolve_patches
from acmix.ops.shift_convolution import Projection


class ReducedACmix(ConvolutionPath):
    """Attention to a map of fewer keys and a shift convolution from one set of projections.

    `out = alpha * proj(attention) + beta * convolution`: Pan et al., "On the Integration of
    Self-Attention and Convolution", CVPR 2022, on Wang et al., "Pyramid Vision Transformer", ICCV
    2021. k and v are projected from the map reduced by a strided convolution and enter the
    convolution enlarged again (nearest). Names of the attention's parameters are PVT's.

    Shapes: (B, L, dim) and the map's size (H, W) -> (B, L, dim), any H, W >= 1. L is H * W, or one
    more where a class token comes first; that token gets attention alone. A map that is no
    multiple of `reduction` is padded by zeros at its end before it is reduced.

    Args:
        dim: channels; a multiple of `heads`.
        heads: attention heads N, of head_dim = dim / N channels each.
        reduction: by how much the sides of the map of keys are smaller.
        kernel_conv: side of the convolution kernel in tokens, odd.
        mix, shift, shift_init: as in `ACmix2d`.
        qkv_bias: whether the projections have biases.
        attn_drop: dropout of attention weights.
        proj_drop: dropout of the output.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: for an argument out of its range, and in `forward` for an input of
            wrong rank, channels, tokens or dtype.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        reduction: int = 1,
        kernel_conv: int = 3,
        mix: str = "learned",
        shift: str = "learned",
        shift_init: str = "shift",
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.check_positive("dim", dim)
        _checks.check_positive("heads", heads)
        _checks.check_divisible("dim", dim, "heads", heads)
        _checks.check_positive("reduction", reduction)
        _checks.check_choice("mix", mix, MIXES)
        check_shift(kernel_conv, shift, shift_init)
        self.dim, self.heads, self.head_dim = dim, heads, dim // heads
        self.reduction, self.kernel_conv = reduction, kernel_conv
        self.q = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.sr: nn.Conv2d | None = None
        if reduction > 1:
            self.sr = Reduction(dim, dim, reduction, reduction, device=device, dtype=dtype)
            self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self._create_mix(mix, device, dtype)
        self.proj: nn.Linear | None = None
        if self.has_attention:
            self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        if self.has_convolution:
            self._create_path(dim, heads, 3 * heads, shift, shift_init, device, dtype)
        self.attn_drop = attn_drop
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start again: attention as PVT starts, fc as `nn.Conv2d`, kernels as constructed."""
        for linear in (self.q, self.kv, self.proj):
            if linear is not None:
                nn.init.trunc_normal_(linear.weight, std=0.02)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        self._reset_path()
        if self.sr is not None:
            self.sr.reset_parameters()
            self.norm.reset_parameters()

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x (B, L, dim), of which the last H * W tokens are a map of `size` -> (B, L, dim)."""
        extra = self._check(x, size)
        reduced = self._reduce(x, size)
        q, kv = self.q(x), self.kv(reduced)
        out: Tensor | None = None
        if self.proj is not None:
            out = weigh(self.mix.weights()[0], self.proj(self._attention(q, kv)))
        if self.has_convolution:
            maps = (x[:, extra:], reduced[:, extra:]), (q[:, extra:], kv[:, extra:])
            convolution = F.pad(self._path(*maps, size), (0, 0, extra, 0))
            out = convolution if out is None else out + convolution
        assert out is not None
        return self.proj_drop(out)

    def _check(self, x: Tensor, size: tuple[int, int]) -> int:
        """How many tokens come before the map, 0 or 1."""
        _checks.check_dtype("x", x)
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x: expected (B, L, {self.dim}), got shape {tuple(x.shape)}")
        extra = x.shape[1] - size[0] * size[1]
        if extra not in ((0, 1) if self.sr is None else (0,)):
            one_more = ", or one more" if self.sr is None else ""
            raise ValueError(
                f"x: expected {size[0]} * {size[1]} tokens{one_more}, got {x.shape[1]}"
            )
        check_kind(self, x)
        return extra

    def _reduced(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = (multiple(side, self.reduction) // self.reduction for side in size)
        return height, width

    def _reduce(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The tokens that keys and values are made from."""
        if self.sr is None:
            return x
        image = self._as_map(x, size)
        image = pad_to_multiple(image, self.reduction, self.reduction)
        return self.norm(self.sr(image).flatten(2).transpose(1, 2))

    def _attention(self, q: Tensor, kv: Tensor) -> Tensor:
        q = q.unflatten(2, (self.heads, self.head_dim)).transpose(1, 2)
        k, v = kv.unflatten(2, (2, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        dropout = self.attn_drop if self.training else 0.0
        if why_portable():  # PyTorch's own has no forward-mode derivative
            weights = (q @ k.mT * self.head_dim**-0.5).softmax(-1)
            out = F.dropout(weights, dropout) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return out.transpose(1, 2).flatten(2)

    def _path(
        self, source: tuple[Tensor, Tensor], qkv: tuple[Tensor, Tensor], size: tuple[int, int]
    ) -> Tensor:
        """beta times the convolution path, (B, H * W, dim), from x and its reduced tokens or from
        their projections; d-major."""

        def read(dense: bool) -> Tensor:
            tokens, reduced = source if dense else qkv
            maps = torch.cat([self._as_map(tokens, size), self._enlarged(reduced, size)], 1)
            return maps if dense else maps.unflatten(1, (3 * self.heads, self.head_dim))

        return self._convolve(source[0], read).flatten(2).transpose(1, 2)

    def _projections(self) -> list[Projection]:
        return [
            tuple(None if x is None else x.unflatten(0, (-1, self.head_dim)) for x in pair)
            for pair in ((self.q.weight, self.q.bias), (self.kv.weight, self.kv.bias))
        ]

    def _as_map(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, H * W, C) -> (B, C, H, W)."""
        return tokens.transpose(1, 2).unflatten(2, size)

    def _enlarged(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Reduced tokens as a map of `size`; fc and projections are linear, so that enlarging what
        they take is enlarging what they give."""
        image = self._as_map(tokens, self._reduced(size))
        if self.sr is None:
            return image
        enlarged = [multiple(side, self.reduction) for side in size]
        return crop(F.interpolate(image, size=enlarged, mode="nearest"), size, dim=2)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, heads={self.heads}, reduction={self.reduction}, "
            f"kernel_conv={self.kernel_conv}"
        )


class Reduction(nn.Conv2d):
    """A convolution whose stride is its kernel's side, right in half precision too."""

    def forward(self, x: Tensor) -> Tensor:
        return convolve_patches(x, self.weight, self.bias)
