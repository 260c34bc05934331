"""How the convolution path shifts and sums: the paper's second ablation, one class a row of it.

`kernels(like)` returns the k^2 kernels of every output channel, (C, k^2, k, k), those that are not
learned on the device and in the dtype of `like`; None where the shifts are slices of tensors.
Weights are plain parameters of classes of our own, so that a network's loop over its `nn.Conv2d`
modules cannot overwrite their start.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from acmix.ops import _checks
from acmix.ops.shift_convolution import shift_kernels


class FixedShift(nn.Module):
    """A group convolution with the one-hot shift kernels, not learned."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.channels, self.kernel_size = channels, kernel_size

    def as_kernels(self, like: Tensor) -> Tensor:
        # Made anew each time: a buffer would be lost by `to_empty` after the meta device.
        return shift_kernels(self.channels, self.kernel_size, like.device, like.dtype)

    def kernels(self, like: Tensor) -> Tensor | None:
        return self.as_kernels(like)

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}"


class TensorShift(FixedShift):
    """Tensor shifts: slices of the padded pieces, summed."""

    def kernels(self, like: Tensor) -> None:
        return None


class LearnedShift(nn.Module):
    """Learned kernels: `kernel_sets` of them for each channel of a piece, repeated over the
    `channels` outputs. The method has one set for each output."""

    def __init__(
        self,
        channels: int,
        head_dim: int,
        kernel_sets: int,
        kernel_size: int,
        init: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.init = init
        self.repeats = channels // (head_dim * kernel_sets)
        shape = (head_dim * kernel_sets, kernel_size**2, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init == "shift":
            sets, _, side, _ = self.weight.shape
            with torch.no_grad():
                self.weight.copy_(shift_kernels(sets, side, self.weight.device, self.weight.dtype))
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Conv2d starts

    def kernels(self, like: Tensor) -> Tensor:
        if self.repeats == 1:
            return self.weight
        return self.weight.repeat_interleave(self.repeats, 0)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, repeats={self.repeats}, init={self.init!r}"


torch.fx.wrap("shift_kernels")

SHIFTS = ("learned", "learned_shared", "fixed", "tensor")
SHIFT_INITS = ("shift", "kaiming")


def check_shift(kernel_conv: int, shift: str, init: str) -> None:
    _checks.check_window("kernel_conv", kernel_conv)
    _checks.check_choice("shift", shift, SHIFTS)
    _checks.check_choice("shift_init", init, SHIFT_INITS)
    if init != "shift" and not shift.startswith("learned"):
        raise ValueError(
            f"shift_init: expected 'shift' with shift={shift!r}, whose kernels are not learned, "
            f"got {init!r}"
        )


def make_shift(
    shift: str,
    channels: int,
    heads: int,
    kernel_size: int,
    init: str = "shift",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> TensorShift | FixedShift | LearnedShift:
    if shift == "tensor":
        return TensorShift(channels, kernel_size)
    if shift == "fixed":
        return FixedShift(channels, kernel_size)
    sets = heads if shift == "learned" else 1
    return LearnedShift(channels, channels // heads, sets, kernel_size, init, device, dtype)
