"""A feature pyramid on the maps of a network, in the form that torchvision's detectors take.

Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from acmix.detection._torchvision import GeneralizedRCNNTransform
from acmix.models.features import Features

Norm = Literal["batch", "group", "sync"]
LEAST = 8  # channels of a group, which are normalised together


class Pyramid(nn.Module):
    """Maps of equal width at the strides of the features, and coarser ones."""

    def __init__(
        self,
        features: Features,
        width: int,
        coarser: ExtraFPNBlock,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.features = features
        self.fpn = FeaturePyramidNetwork(features.channels, width, coarser, norm_layer)
        self.out_channels = width

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """images (B, in_chans, H, W) -> maps (B, width, H / stride, W / stride), finest first."""
        maps = self.features(images)
        return self.fpn(OrderedDict((str(number), of) for number, of in enumerate(maps)))


class Resize(GeneralizedRCNNTransform):
    """Brings held-out images to the size of the test, and images of any size into one batch.

    Training images come as they are to be seen. Unlike torchvision's, it smooths before it makes an
    image smaller, as the transforms of training do, and leaves normalising to the data.
    """

    def __init__(self, size: int, max_size: int, in_chans: int) -> None:
        """size: shorter side in pixels, less where the longer one would exceed max_size."""
        super().__init__(size, max_size, [0.0] * in_chans, [1.0] * in_chans)

    def normalize(self, image: Tensor) -> Tensor:
        return image

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        if self.training:
            return image, target
        height, width = image.shape[-2:]
        scale = min(
            self.min_size[-1] / min(height, width),
            self.max_size / max(height, width),
        )
        size = [max(1, math.floor(side * scale + 0.5)) for side in (height, width)]
        kwargs: dict[str, Any] = {"mode": "bilinear", "antialias": True}
        resized = F.interpolate(at_least_float32(image[None]), size, **kwargs)[0]
        return resized.to(image.dtype), target


def at_least_float32(of: Tensor) -> Tensor:
    return of.to(torch.promote_types(of.dtype, torch.float32))


def norm_layer(name: Norm | None) -> Callable[..., nn.Module] | None:
    """A norm of maps by its name, to be made for a number of channels."""
    layers: dict[str | None, Callable[..., nn.Module]] = {
        "batch": nn.BatchNorm2d,
        "sync": nn.SyncBatchNorm,
        "group": group_norm,
    }
    return layers.get(name)


def group_norm(channels: int) -> nn.GroupNorm:
    """Of 32 groups, or of fewer where these would have less than eight channels each."""
    groups = (of for of in (32, 16, 8, 4, 2) if channels % of == 0 and channels >= LEAST * of)
    return nn.GroupNorm(next(groups, 1), channels)


def with_norm(net: nn.Module, name: Literal["batch", "frozen", "group", "sync"]) -> nn.Module:
    """The network with other norms in place of its batch norms.

    frozen: they stay, but keep weights and running statistics. group: with the weights of those
    they replace, some of which start as zeros.
    """
    if name == "sync":
        return timm.layers.convert_sync_batchnorm(net)
    if name == "group":
        return _with_group_norm(net)
    return net


def batch_norms(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, _BatchNorm)]


def _with_group_norm(net: nn.Module) -> nn.Module:
    if isinstance(net, _BatchNorm):
        group = group_norm(net.num_features)
        group.weight, group.bias = net.weight, net.bias
        if isinstance(net, BatchNormAct2d):
            return nn.Sequential(group, net.drop, net.act)
        return group
    for name, child in net.named_children():
        setattr(net, name, _with_group_norm(child))
    return net
