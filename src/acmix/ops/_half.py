"""PyTorch's own convolution in half precision on a CPU, where it is right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix.ops._autocast import HALF, dtype_of_kernels, without_autocast


def convolve(x: Tensor, weight: Tensor, *sizes: int) -> Tensor:
    """`F.conv2d` without a bias, on a CPU computed in float32 at least.

    oneDNN's bfloat16 convolution writes garbage where its output is one column wide and its stride
    is not 1 (PyTorch 2.14, processors with AMX), and so does the gradient of its weight on others.
    """
    dtype = dtype_of_kernels(x)
    if torch.jit.is_tracing():  # where shapes are tensors
        sizes = tuple(map(int, sizes))
    if x.device.type != "cpu" or dtype not in HALF:
        return F.conv2d(x, weight, None, *sizes)
    with without_autocast(x):
        return F.conv2d(x.float(), weight.float(), None, *sizes).to(dtype)


def convolve_patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.conv2d` with a stride of the kernel's side k: (B, C_in, H, W) -> (B, C, H / k, W / k)."""
    side = weight.shape[-1]
    if x.device.type != "cpu" or dtype_of_kernels(x) not in HALF:
        return F.conv2d(x, weight, bias, side)
    patches = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, C_in, h, k, w, k)
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
    return F.linear(patches, weight.flatten(1), bias).permute(0, 3, 1, 2)
