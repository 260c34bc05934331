"""The maps that a detector or a segmenter works on, from any network of ours or of timm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import timm
import torch
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from torch import Tensor, nn

Made = TypeVar("Made")
STRIDES = (4, 8, 16, 32)
RIGID = "strict_img_size"  # of timm's Swin: whether it takes images of one size alone


class Features(nn.Module):
    """Maps of a network at chosen strides, (B, C, H, W) each, the finest first.

    Attributes:
        body: The network, `features_only`, without the stages after the last map.
        strides: Of the maps, in pixels of the image.
        channels: Of the maps.
    """

    def __init__(
        self,
        body: Any,
        norm: bool,
        undecayed: Iterable[str] = (),
        layers: Mapping[str, int] | None = None,
    ) -> None:
        """Take a network over.

        Args:
            body: With timm's `feature_info`.
            norm: Whether each map goes through a LayerNorm.
            undecayed: Names of the body's parameters that go without weight decay.
            layers: Number of the layer, from the images on, of the body's parameters by name.
        """
        super().__init__()
        self.body = body
        self.strides: list[int] = body.feature_info.reduction()
        self.channels: list[int] = body.feature_info.channels()
        self._undecayed = frozenset(f"body.{name}" for name in undecayed)
        self._layers = {f"body.{name}": number for name, number in (layers or {}).items()}
        self.is_last = is_channels_last(body)
        self.norms = nn.ModuleList(LayerNorm2d(width) for width in self.channels if norm)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that go without weight decay, as `timm.optim` asks."""
        return set(self._undecayed)

    def layer_of(self, key: str) -> float:
        """Of a parameter by its name, for rates by layer; infinite for what is not the body's."""
        return self._layers.get(key, math.inf)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: (B, in_chans, H, W), of any size."""
        maps = self.body(images)
        if self.is_last:
            maps = [of.permute(0, 3, 1, 2) for of in maps]
        if self.norms:
            maps = [norm(of) for norm, of in zip(self.norms, maps, strict=True)]
        return maps


def create_features(
    name: str,
    in_chans: int = 3,
    strides: Sequence[int] = STRIDES,
    model_kwargs: dict[str, Any] | None = None,
    norm: bool | None = None,
) -> Features:
    """The maps of a network at chosen strides.

    Args:
        name: Network, as `timm.create_model` knows it.
        in_chans: Channels of the images.
        strides: Of the maps, ascending.
        model_kwargs: Further arguments of the network's constructor.
        norm: Whether each map goes through a LayerNorm of its own; by default where the network
            gives maps that were not normalised, (B, H, W, C), as Swin does (Liu et al., "Swin
            Transformer", ICCV 2021, whose detectors do so).

    Raises:
        ValueError: If the network has no map of one of the strides.
    """
    whole, kwargs = on_meta(lambda: _create_for_any_size(name, model_kwargs or {}))
    there = whole.feature_info.reduction()
    if missing := [stride for stride in strides if stride not in there]:
        raise ValueError(
            f"name: expected a network with maps of strides {_words(strides)}, "
            f"got {name}, which has none of {_words(missing)} (but {_words(sorted(set(there)))})"
        )
    taken = [len(there) - 1 - there[::-1].index(stride) for stride in strides]
    indices = [whole.feature_info.out_indices[index] for index in taken]
    body = timm.create_model(
        name, features_only=True, in_chans=in_chans, out_indices=indices, **kwargs
    )
    norm = is_channels_last(body) if norm is None else norm
    net = on_meta(lambda: timm.create_model(name, **kwargs))
    keys = {_alike(key): key for key, _ in body.named_parameters()}
    spared = [_alike(key) for key in getattr(net, "no_weight_decay", set)()]
    layers = {_alike(key): number for key, number in layers_of(net).items()}
    return Features(
        body,
        norm,
        [keys[key] for key in spared if key in keys],
        {keys[key]: number for key, number in layers.items() if key in keys},
    )


def on_meta(make: Callable[[], Made]) -> Made:
    """A network without numbers, where its constructor does not read any."""
    try:
        with torch.device("meta"):
            return make()
    except (NotImplementedError, RuntimeError):
        return make()


def layers_of(net: Any) -> dict[str, int]:
    """Numbers of the layers of a network that knows them, by the names of its parameters."""
    if not hasattr(net, "group_matcher"):
        return {}
    return group_parameters(net, net.group_matcher(coarse=False), reverse=True)


def _alike(key: str) -> str:
    """A name that timm's two kinds of extractors and the network have in common."""
    return key.removeprefix("model.").replace(".", "_")


def _create_for_any_size(name: str, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The network with all its maps, and the arguments with which it takes images of any size."""
    any_size = {RIGID: False, **kwargs}
    try:
        return timm.create_model(name, features_only=True, **any_size), any_size
    except TypeError:  # which has no such argument
        return timm.create_model(name, features_only=True, **kwargs), kwargs


def is_channels_last(body: nn.Module) -> bool:
    """Whether the maps are (B, H, W, C)."""
    return str(getattr(body, "output_fmt", "NCHW")).rpartition(".")[2] == "NHWC"


def _words(strides: Sequence[int]) -> str:
    return ", ".join(map(str, strides))
