"""What the decoders are built of: convolutions with a norm, and maps brought to a size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch.distributed
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Norm = Literal["batch", "group", "layer", "sync"]
Size = tuple[int, int]
GROUPS = 32


class _OfOneValue(_BatchNorm):
    """A batch norm that bears one value a channel, of which there is no variance.

    A pyramid pooling has such maps: bin 1 of one image. There it normalises by its running
    statistics, as in eval mode, and leaves them as they are.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1] and not self._has_others():
            statistics = self.running_mean, self.running_var
            return F.batch_norm(x, *statistics, self.weight, self.bias, eps=self.eps)
        return super().forward(x)

    def _has_others(self) -> bool:
        """Whether values of other processes count too."""
        return False


class BatchNorm2d(_OfOneValue, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` that bears one value a channel, see `_OfOneValue`."""


class SyncBatchNorm(_OfOneValue, nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` that bears one value a channel, see `_OfOneValue`."""

    def _has_others(self) -> bool:
        there = torch.distributed.is_available() and torch.distributed.is_initialized()
        return there and torch.distributed.get_world_size() > 1


def group_norm(channels: int) -> nn.GroupNorm:
    """Of 32 groups, or fewer: of four channels or more, as at one pixel one channel becomes 0."""
    return nn.GroupNorm(math.gcd(GROUPS, max(1, channels // 4), channels), channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": BatchNorm2d,
    "group": group_norm,
    "layer": LayerNorm2d,
    "sync": SyncBatchNorm,
}


def norm_layer(name: str) -> Callable[[int], nn.Module]:
    """A norm of maps by its name, to be made for a number of channels."""
    if name not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(get_args(Norm))}, got {name!r}")
    return NORMS[name]


class ConvNorm(nn.Sequential):
    """Convolution, norm, ReLU: (B, in_channels, H, W) -> (B, channels, H, W)."""

    def __init__(self, in_channels: int, channels: int, kernel: int, norm: str) -> None:
        conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(conv, norm_layer(norm)(channels), nn.ReLU(inplace=True))


class Classifier(nn.Sequential):
    """Dropout of whole channels, and a class for each pixel: (B, C, H, W) -> (B, classes, H, W)."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        conv = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(conv.weight, std=0.01)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        super().__init__(nn.Dropout2d(dropout), conv)


def size_of(x: Tensor) -> Size:
    """Height and width of a map."""
    return x.shape[-2], x.shape[-1]


def resize(x: Tensor, size: Size, align_corners: bool = False) -> Tensor:
    """A map (B, C, H, W) at another size, bilinear."""
    if size_of(x) == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)
