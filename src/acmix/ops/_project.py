"""A 1x1 convolution by whichever of PyTorch's operators is the fastest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, C_in, H, W), weight (C, C_in), bias (C) -> (B, C, H, W); see docs/backends.md."""
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


def one_for_all(x: Tensor) -> bool:
    """Whether one projection of a map beats several. On a CPU it does not, and the meta device,
    where costs are counted, goes module by module."""
    return x.device.type not in ("cpu", "meta")
