"""The maps that a detector or a segmenter works on, from any network of ours or of timm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

STRIDES = (4, 8, 16, 32)
RIGID = "strict_img_size"  # of timm's Swin: whether it takes images of one size alone


class Features(nn.Module):
    """Maps of a network at chosen strides, (B, C, H, W) each, the finest first.

    Attributes:
        body: The network, `features_only`, without the stages after the last map.
        strides: Of the maps, in pixels of the image.
        channels: Of the maps.
    """

    def __init__(self, body: Any, norm: bool, undecayed: Iterable[str] = ()) -> None:
        """Take a network over.

        Args:
            body: With timm's `feature_info`.
            norm: Whether each map goes through a LayerNorm.
            undecayed: Names of the body's parameters that go without weight decay.
        """
        super().__init__()
        self.body = body
        self.strides: list[int] = body.feature_info.reduction()
        self.channels: list[int] = body.feature_info.channels()
        self._undecayed = frozenset(f"body.{name}" for name in undecayed)
        self.is_last = is_channels_last(body)
        self.norms = nn.ModuleList(LayerNorm2d(width) for width in self.channels if norm)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that go without weight decay, as `timm.optim` asks."""
        return set(self._undecayed)

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
    kwargs = dict(model_kwargs or {})
    with torch.device("meta"):
        whole, kwargs = _create_for_any_size(name, kwargs)
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
    return Features(body, norm, undecayed(name, kwargs, body))


def undecayed(name: str, kwargs: dict[str, Any], body: nn.Module) -> Iterator[str]:
    """Names in the body of what the whole network names in `no_weight_decay`."""
    with torch.device("meta"):
        net = timm.create_model(name, **kwargs)
    named = {alike(key) for key in getattr(net, "no_weight_decay", set)()}
    return (key for key, _ in body.named_parameters() if alike(key) in named)


def alike(key: str) -> str:
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
