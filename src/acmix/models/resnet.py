"""ResNet whose 3x3 convolutions are convolution, stand-alone self-attention or ACmix.

Pan et al., "On the Integration of Self-Attention and Convolution", CVPR 2022, arXiv 2111.14556:
ResNet-26, -38 and -50, supplementary table 2. He et al., "Deep Residual Learning for Image
Recognition", CVPR 2016, with the stride on the 3x3 (v1.5). Ramachandran et al., "Stand-Alone
Self-Attention in Vision Models", NeurIPS 2019, for `path="attn"`.

The network is timm's ResNet, and so are its parameter names, which are torchvision's: the operator
of block B in stage L is `layerL.B.conv2`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import generate_default_cfgs
from timm.models._features import feature_take_indices
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from acmix.layers import ACmix2d
from acmix.models import checkpoints
from acmix.models._network import build, default_cfg, mixing_weights
from acmix.models._registry import check_kwargs, register_model
from acmix.ops._checks import check_choice, check_map

PATHS = ("conv", "attn", "acmix")
STEMS = ("imagenet", "small")
ATTN_KWARGS = ("heads", "kernel_att", "position", "backend")
ACMIX_KWARGS = {
    "conv": (),
    "attn": ATTN_KWARGS,
    "acmix": (*ATTN_KWARGS, "kernel_conv", "mix", "shift", "shift_init"),
}


class ACmixBottleneck(Bottleneck):
    """timm's bottleneck with its 3x3 convolution replaced as `path` says."""

    def __init__(
        self,
        *args: Any,
        path: str = "acmix",
        acmix_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if path != "conv":
            self.add_module("conv2", replace_convolution(self.conv2, path, acmix_kwargs or {}))


def replace_convolution(conv: nn.Conv2d, path: str, acmix_kwargs: Mapping[str, Any]) -> ACmix2d:
    """ACmix of the widths, stride, dilation, device and dtype of `conv`."""
    if conv.groups != 1:
        raise ValueError(f"cardinality: expected 1 with path={path!r}, got {conv.groups}")
    if path == "attn":
        acmix_kwargs = {**acmix_kwargs, "mix": "attention"}
    return ACmix2d(
        conv.in_channels,
        conv.out_channels,
        stride=conv.stride[0],
        dilation=conv.dilation[0],
        device=conv.weight.device,
        dtype=conv.weight.dtype,
        **acmix_kwargs,
    )


class ACmixResNet(ResNet):
    """timm's ResNet of bottlenecks, every 3x3 of which is replaced as `path` says.

    Shapes: (B, in_chans, H, W) -> (B, num_classes), any H, W >= 1.

    Args:
        layers: bottlenecks of each stage; three stages or four.
        path: "conv" (the baseline), "attn" (self-attention alone) or "acmix".
        acmix_kwargs: arguments of `ACmix2d` for every operator, of heads, kernel_att, kernel_conv,
            mix, shift, shift_init, position and backend; its own defaults for the rest.
        channels: width of the 3x3 of each stage; its output is four times as wide.
        stem: "imagenet" (7x7 of stride 2 and max pool) or "small" (3x3 of stride 1, no pool) for
            images of 32x32 and below.
        output_stride: of the last stage; later stages are dilated instead of strided to keep it.
            8, 16 or 32, and 2, 4 or 8 with the small stem. None is the largest.
        in_chans: channels of the image.
        kwargs: as timm's `ResNet` takes them.

    Raises:
        ValueError: for an unknown path or stem, acmix_kwargs that `ACmix2d` does not take or the
            path has no use for, and another number of stages.
    """

    def __init__(
        self,
        layers: Sequence[int],
        path: str = "acmix",
        *,
        acmix_kwargs: Mapping[str, Any] | None = None,
        channels: Sequence[int] = (64, 128, 256, 512),
        stem: str = "imagenet",
        output_stride: int | None = None,
        in_chans: int = 3,
        **kwargs: Any,
    ) -> None:
        check_choice("path", path, PATHS)
        check_choice("stem", stem, STEMS)
        check_kwargs("acmix_kwargs", acmix_kwargs or {}, ACMIX_KWARGS[path])
        if len(layers) not in (3, 4) or len(layers) != len(channels):
            raise ValueError(
                "layers, channels: expected three stages or four, as many in both, "
                f"got {tuple(layers)} and {tuple(channels)}"
            )
        # timm counts the stride of the ImageNet stem, 4.
        stem_stride = {"imagenet": 4, "small": 1}[stem]
        strides = (2 * stem_stride, 4 * stem_stride, 8 * stem_stride)
        output_stride = strides[-1] if output_stride is None else output_stride
        if output_stride not in strides:
            expected = ", ".join(map(str, strides))
            raise ValueError(f"output_stride: expected one of {expected}, got {output_stride}")
        block: Any = ACmixBottleneck  # timm's annotation asks for an instance
        super().__init__(
            block,
            tuple(layers),
            channels=tuple(channels),
            in_chans=in_chans,
            output_stride=output_stride * 4 // stem_stride,
            block_args={"path": path, "acmix_kwargs": acmix_kwargs},
            **kwargs,
        )
        self.path, self.in_chans = path, in_chans
        if len(layers) == 3:
            self.layer4 = nn.Sequential()  # timm's forward names four stages
        if stem == "small":
            self._make_stem_small()

    def _make_stem_small(self) -> None:
        imagenet: Any = self.conv1
        conv = nn.Conv2d(
            imagenet.in_channels,
            imagenet.out_channels,
            3,
            padding=1,
            bias=False,
            device=imagenet.weight.device,
            dtype=imagenet.weight.dtype,
        )
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.add_module("conv1", conv)
        self.add_module("maxpool", nn.Identity())
        features: Any = self.feature_info
        for feature, stride in zip(features, (2, 4, 4, 4, 4), strict=False):
            feature["reduction"] //= stride

    def no_weight_decay(self) -> set[str]:
        return mixing_weights(self)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `nn.Module.load_state_dict`, for our keys and those of released checkpoints."""
        return super().load_state_dict(checkpoint_filter_fn(state_dict, self), strict, assign)

    def forward_features(self, x: Tensor) -> Tensor:
        """The map of the last stage, (B, C, H / output_stride, W / output_stride)."""
        check_map("x", x, self.in_chans)
        return super().forward_features(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """As timm's; an empty fourth stage is not counted."""
        check_map("x", x, self.in_chans)
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        return super().forward_intermediates(
            x, taken, norm, stop_early, output_fmt, intermediates_only
        )

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm's; an empty fourth stage is not counted."""
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        return super().prune_intermediate_layers(taken, prune_norm, prune_head)


@checkpoints.released_network(r"layer[1-4]\.\d")
def _resnet_like(released: checkpoints.Released) -> nn.Module:
    depths = released.depths(r"layer([1-4])\.(\d+)\.", first=1, least_stages=3)
    stages = range(1, len(depths) + 1)
    widths = [released.size(f"layer{i}.0.conv1.weight", 0, 32 * 2**i) for i in stages]
    operators = [
        f"layer{stage}.{block}.conv2"
        for stage, depth in zip(stages, depths, strict=True)
        for block in range(depth)
    ]
    return ACmixResNet(
        depths,
        channels=widths,
        in_chans=released.size("conv1.weight", 1, 3),
        num_classes=released.size("fc.weight", 0, 1000),
        acmix_kwargs={
            "heads": released.heads(operators, math.gcd(*widths)),
            "kernel_conv": released.kernel(operators),
        },
    )


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Released ResNet-ACmix weights with our names; others as they are."""
    if checkpoints.is_released(state_dict):
        return checkpoints.from_released(state_dict)
    return state_dict


VARIANTS: dict[str, dict[str, Any]] = {
    "resnet26": {"layers": (1, 2, 4, 1)},
    "resnet38": {"layers": (2, 3, 5, 2)},
    "resnet50": {"layers": (3, 4, 6, 3)},
    "resnet26_small": {"layers": (1, 2, 4, 1), "stem": "small"},
    "resnet11_tiny": {"layers": (1, 1, 1), "channels": (16, 32, 64), "stem": "small"},
}
# The paper's window of 7 would be nearly all of the tiny network's first map, 8x8.
ACMIX_DEFAULTS: dict[str, dict[str, Any]] = {"resnet11_tiny": {"kernel_att": 5}}


def _create_resnet(variant: str, pretrained: bool, **kwargs: Any) -> ACmixResNet:
    base, path = variant.rsplit("_", 1)
    arguments = {**VARIANTS[base], "path": path, **kwargs}
    if arguments["path"] != "conv":
        acmix_kwargs = arguments.get("acmix_kwargs") or {}
        arguments["acmix_kwargs"] = {**ACMIX_DEFAULTS.get(base, {}), **acmix_kwargs}
    timm_arguments = {
        "pretrained_filter_fn": checkpoint_filter_fn,
        "feature_cfg": {"out_indices": tuple(range(len(arguments["layers"]) + 1))},
    }
    return build(ACmixResNet, variant, pretrained, {**timm_arguments, **arguments})


def _cfg(**kwargs: Any) -> dict[str, Any]:
    defaults = {"crop_pct": 0.875, "interpolation": "bilinear"}
    return default_cfg(first_conv="conv1", classifier="fc", **{**defaults, **kwargs})


_SMALL = {"num_classes": 10, "input_size": (3, 32, 32), "pool_size": (4, 4), "crop_pct": 1.0}
_TINY = {
    "num_classes": 10,
    "input_size": (1, 8, 8),
    "pool_size": (2, 2),
    "crop_pct": 1.0,
    "mean": (0.5,),
    "std": (0.5,),
}
_SIZES = {"resnet26_small": _SMALL, "resnet11_tiny": _TINY}

default_cfgs = generate_default_cfgs(
    {f"{base}_{path}": _cfg(**_SIZES.get(base, {})) for base in VARIANTS for path in PATHS}
)


@register_model
def resnet26_conv(pretrained: bool = False, **kwargs: Any) -> ACmixResNet:
    """ResNet-26, convolution: 13.7 M parameters, 2.34 GMACs at 224 px."""
    return _create_resnet("resnet26_conv", pretrained, **kwargs)


@register_model
def resnet26_attn(pretrained: bool = False, **kwargs: Any) -> ACmixResNet:
    """ResNet-26, self-attention: 10.3 M parameters, 2.19 GMACs at 224 px."""
    return _create_resnet("resnet26_attn", pretrained, **kwargs)


@register_model
def resnet26_acmix(pretrained: bool = False, **kwargs: Any) -> ACmixResNet:
    """ResNet-26, ACmix: 10.5 M parameters, 2.27 GMACs at 224 px."""
    return _create_resnet("resnet26_acmix", pretrained, **kwargs)


@register_model
def resnet38_conv(pretrained: bool = False, **kwargs: Any) -> ACmixResNet:
    """ResNet-38, convolution: 19.6 M parameters, 3.22 GMACs at 224 px."""
    return _create_resnet("resnet38_conv", pretrained, **kwargs)


@register_model
def resnet38_attn(pretrained: bool = False, **kwargs: Any) -> ACmixResNet:
    """ResNet-38, self-attention: 14.2 M parameters, 2.79 GMACs at 224 px."""
    return _create_resnet("resnet38_attn", pretrained, **kwargs)


@register_model
def resnet38_acmix(pretrained: bool = False, **kwargs: Any) -> ACmixResNet:
    """ResNet-38, ACmix: 14.4 M parameters, 2.91 GMACs at 224 px."""
    return _create_resnet("resnet38_acmix", pretrained, **kwargs)


@register_model
def resnet50_conv(pretrained: bool = False, **kwargs: Any) -> ACmixResNet:
    """ResNet-50, convolution: 25.6 M parameters, 4.09 GMACs at 224 px."""
    return _create_resnet("resnet50_conv", pretrained, **kwargs)


@register_model
def resnet50_attn(pretrained: bool = False, **kwargs: Any) -> ACmixResNet:
    """ResNet-50, self-attention: 18.0 M parameters, 3.39 GMACs at 224 px."""
    return _create_resnet("resnet50_attn", pretrained, **kwargs)


@register_model
def resnet50_acmix(pretrained: bool = False, **kwargs: Any) -> ACmixResNet:
    """ResNet-50, ACmix: 18.3 M parameters, 3.55 GMACs at 224 px."""
    return _create_resnet("resnet50_acmix", pretrained, **kwargs)


@register_model
def resnet26_small_conv(pretrained: bool = False, **kwargs: Any) -> ACmixResNet:
    """ResNet-26 with a 3x3 stem, for images of 32x32, convolution."""
    return _create_resnet("resnet26_small_conv", pretrained, **kwargs)


@register_model
def resnet26_small_attn(pretrained: bool = False, **kwargs: Any) -> ACmixResNet:
    """ResNet-26 with a 3x3 stem, for images of 32x32, self-attention."""
    return _create_resnet("resnet26_small_attn", pretrained, **kwargs)


@register_model
def resnet26_small_acmix(pretrained: bool = False, **kwargs: Any) -> ACmixResNet:
    """ResNet-26 with a 3x3 stem, for images of 32x32, ACmix."""
    return _create_resnet("resnet26_small_acmix", pretrained, **kwargs)


@register_model
def resnet11_tiny_conv(pretrained: bool = False, **kwargs: Any) -> ACmixResNet:
    """ResNet-11 of three narrow stages, for one-channel images of 8x8, convolution."""
    return _create_resnet("resnet11_tiny_conv", pretrained, **kwargs)


@register_model
def resnet11_tiny_attn(pretrained: bool = False, **kwargs: Any) -> ACmixResNet:
    """ResNet-11 of three narrow stages, for one-channel images of 8x8, self-attention."""
    return _create_resnet("resnet11_tiny_attn", pretrained, **kwargs)


@register_model
def resnet11_tiny_acmix(pretrained: bool = False, **kwargs: Any) -> ACmixResNet:
    """ResNet-11 of three narrow stages, for one-channel images of 8x8, ACmix."""
    return _create_resnet("resnet11_tiny_acmix", pretrained, **kwargs)
