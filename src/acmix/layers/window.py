"""ACmix in place of the (shifted) window attention of Swin."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix.layers._sizes import crop
from acmix.layers.convolution_path import ConvolutionPath, check_kind
from acmix.layers.mix import MIXES, weigh
from acmix.layers.shift import check_shift
from acmix.ops import _checks
from acmix.ops.partition_attention import partition_attention
from acmix.ops.shift_convolution import Projection


class WindowACmix(ConvolutionPath):
    """Attention within windows and a shift convolution from one set of projections.

    `out = alpha * proj(attention) + beta * convolution`: Pan et al., "On the Integration of
    Self-Attention and Convolution", CVPR 2022, on Liu et al., "Swin Transformer", ICCV 2021. Names
    and shapes of the attention's parameters are those of timm's `WindowAttention`.

    Shapes: (B, H, W, dim) -> (B, H, W, dim), any H, W >= 1. As in timm, a map that is no multiple
    of the window is padded by zero tokens at its end for attention; the convolution sees the map.

    Args:
        dim: channels; a multiple of `heads`.
        heads: attention heads N, of head_dim = dim / N channels each.
        window_size: side of the windows in tokens, or (height, width).
        shift_size: how far the map is rolled before it is cut into windows, in tokens, or (rows,
            columns); less than the window.
        kernel_conv: side of the convolution kernel in tokens, odd.
        mix, shift, shift_init: as in `ACmix2d`.
        pad_first: whether a map is padded before it is rolled, and not rolled along a side that one
            window covers, as in torchvision's Swin. timm and Swin's release roll first.
        roll_convolution: whether the convolution runs on the rolled map too, where opposite borders
            touch: what released checkpoints were trained with. False runs it on the map itself.
        qkv_bias: whether the projections have biases.
        attn_drop: dropout of attention weights.
        proj_drop: dropout of the output.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: for an argument out of its range, and in `forward` for an input of
            wrong rank, channels or dtype.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        window_size: int | tuple[int, int] = 7,
        shift_size: int | tuple[int, int] = 0,
        kernel_conv: int = 3,
        mix: str = "learned",
        shift: str = "learned",
        shift_init: str = "shift",
        roll_convolution: bool = True,
        pad_first: bool = False,
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
        _checks.check_choice("mix", mix, MIXES)
        check_shift(kernel_conv, shift, shift_init)
        self.dim, self.heads, self.head_dim = dim, heads, dim // heads
        self.window_size, self.shift_size = check_windows(window_size, shift_size)
        self.kernel_conv, self.roll_convolution = kernel_conv, roll_convolution
        self.pad_first = pad_first

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self._create_mix(mix, device, dtype)
        self.proj: nn.Linear | None = None
        if self.has_attention:
            height, width = self.window_size
            offsets = (2 * height - 1) * (2 * width - 1)
            self.relative_position_bias_table = parameter(offsets, heads)
            self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        if self.has_convolution:
            path = dim, heads, 3 * heads, shift, shift_init
            self._create_path(*path, device, dtype, bias=True)
        self.attn_drop = attn_drop
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start again: attention as Swin starts, fc as `nn.Conv2d`, kernels as constructed."""
        for linear in (self.qkv, self.proj):
            if linear is not None:
                nn.init.trunc_normal_(linear.weight, std=0.02)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        if self.proj is not None:
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self._reset_path()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, dim) -> (B, H, W, dim)."""
        _checks.check_dtype("x", x)
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x: expected (B, H, W, {self.dim}), got shape {tuple(x.shape)}")
        check_kind(self, x)
        shift = self._shift(x)
        rolled = roll(x, shift, -1)
        if self.proj is None:
            on = rolled if self.roll_convolution else x
            out = self._path(on, self.qkv(on))
            return self.proj_drop(roll(out, shift, 1) if self.roll_convolution else out)
        size = x.shape[1], x.shape[2]
        if self.pad_first:
            qkv = self.qkv(self._pad(x))
            attention = self.proj(self._attention(roll(qkv, shift, -1), shift))
            attention = roll(crop(roll(attention, shift, 1), size, dim=1), shift, -1)
            qkv = roll(crop(qkv, size, dim=1), shift, -1)
        else:
            qkv = self.qkv(self._pad(rolled))
            attention = crop(self.proj(self._attention(qkv, shift)), size, dim=1)
            qkv = crop(qkv, size, dim=1)
        out = weigh(self.mix.weights()[0], attention)
        if not self.has_convolution:
            out = roll(out, shift, 1)
        elif self.roll_convolution:
            out = roll(out + self._path(rolled, qkv), shift, 1)
        else:
            out = roll(out, shift, 1) + self._path(x, roll(qkv, shift, 1))
        return self.proj_drop(out)

    def _shift(self, x: Tensor) -> tuple[int, int]:
        """How far a map (B, H, W, dim) is rolled."""
        if not self.pad_first:
            return self.shift_size
        rows, columns = (
            shift if count > 1 else 0
            for shift, count in zip(self.shift_size, self._counts(x), strict=True)
        )
        return rows, columns

    def _pad(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) with zeros at its end, up to whole windows."""
        (rows, columns), (down, across) = self.window_size, self._counts(x)
        return F.pad(x, (0, 0, 0, across * columns - x.shape[2], 0, down * rows - x.shape[1]))

    def _counts(self, x: Tensor) -> tuple[int, int]:
        """How many windows cover a map (B, H, W, dim), along each side."""
        (height, width), (rows, columns) = x.shape[1:3], self.window_size
        return (height + rows - 1) // rows, (width + columns - 1) // columns

    def _attention(self, qkv: Tensor, shift: tuple[int, int]) -> Tensor:
        """Attention within each window of a map that they divide: (B, H, W, 3 dim) -> (B, H, W,
        dim)."""
        pieces = qkv.unflatten(-1, (3 * self.heads, self.head_dim)).permute(0, 3, 4, 1, 2)
        windows = (self._position_bias(), self.window_size, shift)
        dropout = self.attn_drop if self.training else 0.0
        out = partition_attention(pieces, *windows, dropout)
        return out.permute(0, 3, 4, 1, 2).flatten(3)

    def _position_bias(self) -> Tensor:
        """The bias of each pair of tokens in a window, by their offset: (N, tokens, tokens)."""
        rows, columns = self.window_size
        device = self.relative_position_bias_table.device
        # Made anew each time: a buffer would be lost by `to_empty` after the meta device.
        y = torch.arange(rows, device=device)
        x = torch.arange(columns, device=device)
        y = y[:, None] - y + rows - 1
        x = x[:, None] - x + columns - 1
        index = y[:, None, :, None] * (2 * columns - 1) + x[:, None]
        tokens = rows * columns
        bias = self.relative_position_bias_table[index.reshape(-1)]
        return bias.view(tokens, tokens, self.heads).permute(2, 0, 1)

    def _path(self, x: Tensor, qkv: Tensor) -> Tensor:
        """beta times the convolution path, from the map x or its projections qkv: (B, H, W, dim).

        Its channels are d-major; the attention's are head-major before `proj`.
        """

        def read(dense: bool) -> Tensor:
            if dense:
                return x.permute(0, 3, 1, 2)
            return qkv.unflatten(-1, (3 * self.heads, -1)).permute(0, 3, 4, 1, 2)

        return self._convolve(x, read).permute(0, 2, 3, 1)

    def _projections(self) -> list[Projection]:
        by_piece = (3 * self.heads, self.head_dim)
        bias = None if self.qkv.bias is None else self.qkv.bias.unflatten(0, by_piece)
        return [(self.qkv.weight.unflatten(0, by_piece), bias)]

    @torch.no_grad()
    def set_window_size(
        self, window_size: int | tuple[int, int], shift_size: int | tuple[int, int] = 0
    ) -> None:
        """Change the windows; the position biases are interpolated (bicubic) to the new offsets."""
        old = self.window_size
        self.window_size, self.shift_size = check_windows(window_size, shift_size)
        if self.proj is None or self.window_size == old:
            return
        table = self.relative_position_bias_table
        grid = table.t().reshape(1, self.heads, 2 * old[0] - 1, 2 * old[1] - 1)
        size = [2 * side - 1 for side in self.window_size]
        grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False)
        self.relative_position_bias_table = nn.Parameter(
            grid.flatten(2)[0].t().contiguous(), requires_grad=table.requires_grad
        )

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, heads={self.heads}, window_size={self.window_size}, "
            f"shift_size={self.shift_size}, kernel_conv={self.kernel_conv}, "
            f"roll_convolution={self.roll_convolution}, pad_first={self.pad_first}"
        )


def roll(x: Tensor, shift: tuple[int, int], sign: int) -> Tensor:
    """A map (B, H, W, dim) rolled by rows and columns, backwards where the sign is negative."""
    if not any(shift):
        return x
    return torch.roll(x, (sign * shift[0], sign * shift[1]), (1, 2))


def check_windows(
    window_size: int | tuple[int, int], shift_size: int | tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    windows, shifts = pair("window_size", window_size), pair("shift_size", shift_size)
    for window, shift in zip(windows, shifts, strict=True):
        _checks.check_positive("window_size", window)
        if not 0 <= shift < window:
            raise ValueError(
                f"shift_size: expected 0 or more and less than the window {windows}, got {shifts}"
            )
    return windows, shifts


def pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name}: expected an int or (height, width), got {value}")
    return value[0], value[1]
