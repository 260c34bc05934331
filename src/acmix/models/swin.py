"""Swin Transformer whose (shifted) window attention may be ACmix.

Pan et al., "On the Integration of Self-Attention and Convolution", CVPR 2022, arXiv 2111.14556:
Swin-T and -S, supplementary table 5. Liu et al., "Swin Transformer: Hierarchical Vision Transformer
using Shifted Windows", ICCV 2021, arXiv 2103.14030.

The network is timm's Swin, and so are its parameter names; the operator of block B in stage L is
`layers.L.blocks.B.attn`, which has the names of timm's attention and the convolution path's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from timm.layers import PatchEmbed
from timm.models import generate_default_cfgs, register_notrace_module
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer import checkpoint_filter_fn as timm_filter_fn
from torch import Tensor, nn

from acmix.layers.window import WindowACmix
from acmix.models import checkpoints
from acmix.models._network import PaddedPatchEmbed, build, default_cfg, mixing_weights
from acmix.models._registry import check_kwargs, register_model
from acmix.ops._checks import check_choice

PATHS = ("attn", "acmix")
ACMIX_KWARGS = ("kernel_conv", "mix", "shift", "shift_init", "roll_convolution")
NETWORK_KWARGS = (*ACMIX_KWARGS, "pad_first")  # a block of timm's does not pad first


@register_notrace_module
class AttentionBlock(SwinTransformerBlock):
    """timm's block as one step to timm's feature extraction: its masks depend on the map's size."""


class ACmixSwinBlock(nn.Module):
    """timm's Swin block around `WindowACmix`, made from a block of timm's."""

    def __init__(
        self, block: SwinTransformerBlock, pad_first: bool = False, **acmix_kwargs: Any
    ) -> None:
        super().__init__()
        attention = block.attn
        if attention.proj.in_features != block.dim:
            raise ValueError(
                "head_dim: expected all heads together as wide as the stage with path='acmix', "
                f"{block.dim} channels, got {attention.proj.in_features}"
            )
        self.always_partition = block.always_partition
        self.shifted = any(block.target_shift_size)
        self.norm1 = block.norm1
        self.attn = WindowACmix(
            block.dim,
            heads=attention.num_heads,
            window_size=block.window_size,
            shift_size=block.target_shift_size if pad_first else block.shift_size,
            pad_first=pad_first,
            qkv_bias=attention.qkv.bias is not None,
            attn_drop=attention.attn_drop.p,
            proj_drop=attention.proj_drop.p,
            device=attention.proj.weight.device,
            dtype=attention.proj.weight.dtype,
            **acmix_kwargs,
        )
        self.drop_path1 = block.drop_path1
        self.norm2, self.mlp, self.drop_path2 = block.norm2, block.mlp, block.drop_path2

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, dim) -> (B, H, W, dim)."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def set_input_size(
        self,
        feat_size: tuple[int, int],
        window_size: tuple[int, int],
        always_partition: bool | None = None,
    ) -> None:
        """As timm's: a window is no larger than the map, and one as large is not shifted."""
        if always_partition is not None:
            self.always_partition = always_partition
        always = self.always_partition or self.attn.pad_first
        if not self.always_partition:
            window_size = (min(feat_size[0], window_size[0]), min(feat_size[1], window_size[1]))
        rows, columns = (
            window // 2 if self.shifted and (always or size > window) else 0
            for size, window in zip(feat_size, window_size, strict=True)
        )
        self.attn.set_window_size(window_size, (rows, columns))


class ACmixSwin(SwinTransformer):
    """timm's Swin, the window attention of every block replaced as `path` says.

    Shapes: (B, in_chans, H, W) -> (B, num_classes), any H, W >= 1: patches and windows are padded.

    Args:
        path: "attn" (timm's Swin) or "acmix".
        acmix_kwargs: arguments of `WindowACmix` for every operator, of kernel_conv, mix, shift,
            shift_init, roll_convolution and pad_first; its own defaults for the rest.
        strict_img_size: whether to refuse images that are not of `img_size`.
        kwargs: as timm's `SwinTransformer` takes them. `img_size` is what a window larger than the
            map is reduced for.

    Raises:
        ValueError: for an unknown path, and acmix_kwargs that `WindowACmix` does not take or the
            path has no use for.
    """

    def __init__(
        self,
        *,
        path: str = "acmix",
        acmix_kwargs: Mapping[str, Any] | None = None,
        strict_img_size: bool = False,
        **kwargs: Any,
    ) -> None:
        check_choice("path", path, PATHS)
        check_kwargs("acmix_kwargs", acmix_kwargs or {}, NETWORK_KWARGS if path == "acmix" else ())
        kwargs.setdefault("embed_layer", PatchEmbed if strict_img_size else PaddedPatchEmbed)
        super().__init__(strict_img_size=strict_img_size, **kwargs)
        self.path = path
        stage: Any
        for stage in self.layers:
            if path == "acmix":
                blocks = (ACmixSwinBlock(block, **(acmix_kwargs or {})) for block in stage.blocks)
                stage.blocks = nn.Sequential(*blocks)
            else:
                for block in stage.blocks:
                    block.__class__ = AttentionBlock  # timm's network has no say in its blocks

    def no_weight_decay(self) -> set[str]:
        """Position biases; alpha and beta."""
        return super().no_weight_decay() | mixing_weights(self)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `nn.Module.load_state_dict`, for timm's keys and those of released checkpoints."""
        if is_foreign(state_dict):
            state_dict = checkpoint_filter_fn(state_dict, self)
        return super().load_state_dict(state_dict, strict, assign)


@checkpoints.released_network(r"layers\.\d\.blocks\.\d")
def _swin_like(released: checkpoints.Released) -> nn.Module:
    depths = released.depths(r"layers\.(\d)\.blocks\.(\d+)\.", first=0, least_stages=1)
    stages = [
        [f"layers.{stage}.blocks.{block}.attn" for block in range(depth)]
        for stage, depth in enumerate(depths)
    ]
    operators = [name for names in stages for name in names]
    width = released.size("patch_embed.proj.weight", 0, 96)
    tables = [f"{name}.relative_position_bias_table" for name in operators]
    table = checkpoints.usual((released.size(key, 0, 0) for key in tables), 13**2)
    patch = released.size("patch_embed.proj.weight", 2, 4)
    window = (math.isqrt(table) + 1) // 2
    return ACmixSwin(
        # Large enough for every stage to hold a window.
        img_size=patch * window * 2 ** len(depths),
        patch_size=patch,
        in_chans=released.size("patch_embed.proj.weight", 1, 3),
        num_classes=released.size("head.weight", 0, 1000),
        embed_dim=width,
        depths=depths,
        num_heads=[released.heads(names, width * 2**stage) for stage, names in enumerate(stages)],
        window_size=window,
        acmix_kwargs={"kernel_conv": released.kernel(operators)},
    )


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Released Swin and Swin-ACmix weights with our names, position biases at the model's size."""
    state_dict = checkpoints.unwrap(state_dict)
    if checkpoints.is_released(state_dict):
        state_dict = checkpoints.from_released(state_dict)
    return timm_filter_fn(state_dict, model)


def is_foreign(state_dict: Mapping[str, Any]) -> bool:
    """Whether keys are those of a release, where stage 0 ends with a downsampling."""
    keys = checkpoints.unwrap(state_dict)
    return "layers.0.downsample.reduction.weight" in keys or checkpoints.is_released(keys)


VARIANTS: dict[str, dict[str, Any]] = {
    "swin_tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "swin_small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
}


def _create_swin(variant: str, pretrained: bool, **kwargs: Any) -> ACmixSwin:
    base, path = variant.rsplit("_", 1)
    arguments = {**VARIANTS[base], "path": path, **kwargs}
    out_indices = arguments.pop("out_indices", tuple(range(len(arguments["depths"]))))
    timm_arguments = {
        "pretrained_filter_fn": checkpoint_filter_fn,
        "feature_cfg": {"flatten_sequential": True, "out_indices": out_indices},
    }
    return build(ACmixSwin, variant, pretrained, {**timm_arguments, **arguments})


def _cfg() -> dict[str, Any]:
    return default_cfg(
        crop_pct=0.9, interpolation="bicubic", first_conv="patch_embed.proj", classifier="head.fc"
    )


default_cfgs = generate_default_cfgs(
    {f"{base}_{path}": _cfg() for base in VARIANTS for path in PATHS}
)


@register_model
def swin_tiny_attn(pretrained: bool = False, **kwargs: Any) -> ACmixSwin:
    """Swin-T: 28.3 M parameters, 4.49 GMACs at 224 px."""
    return _create_swin("swin_tiny_attn", pretrained, **kwargs)


@register_model
def swin_tiny_acmix(pretrained: bool = False, **kwargs: Any) -> ACmixSwin:
    """Swin-T-ACmix: 28.6 M parameters, 4.65 GMACs at 224 px."""
    return _create_swin("swin_tiny_acmix", pretrained, **kwargs)


@register_model
def swin_small_attn(pretrained: bool = False, **kwargs: Any) -> ACmixSwin:
    """Swin-S: 49.6 M parameters, 8.75 GMACs at 224 px."""
    return _create_swin("swin_small_attn", pretrained, **kwargs)


@register_model
def swin_small_acmix(pretrained: bool = False, **kwargs: Any) -> ACmixSwin:
    """Swin-S-ACmix: 50.3 M parameters, 9.00 GMACs at 224 px."""
    return _create_swin("swin_small_acmix", pretrained, **kwargs)
