"""Pyramid Vision Transformer, version 1, whose reduced attention may be ACmix.

Pan et al., "On the Integration of Self-Attention and Convolution", CVPR 2022, arXiv 2111.14556:
PVT-T and -S, supplementary table 4. Wang et al., "Pyramid Vision Transformer: A Versatile Backbone
for Dense Prediction without Convolutions", ICCV 2021, arXiv 2102.12122.

timm has version 2 only. Parameters have the names of the first version's release
(`patch_embed1`, `pos_embed1`, `block1.0.attn.q`, ...), so that its checkpoints load into
`path="attn"`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from acmix.layers.reduced import ReducedACmix
from acmix.models import checkpoints
from acmix.models._network import (
    PaddedPatchEmbed,
    StagedNetwork,
    build_stages,
    default_cfg,
    mixing_weights,
)
from acmix.models._registry import check_kwargs, register_model
from acmix.ops._checks import check_choice

PATHS = ("attn", "acmix")
ACMIX_KWARGS = ("kernel_conv", "mix", "shift", "shift_init")


class ACmixPVTBlock(nn.Module):
    """Reduced attention or ACmix, then an MLP, each before a skip."""

    def __init__(
        self,
        dim: int,
        heads: int,
        reduction: int,
        mlp_ratio: float,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        **acmix_kwargs: Any,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ReducedACmix(
            dim,
            heads=heads,
            reduction=reduction,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            **acmix_kwargs,
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ACmixPVT(StagedNetwork):
    """PVT v1, the attention of every block as `path` says.

    Shapes: (B, in_chans, H, W) -> (B, num_classes), any H, W >= 1: patches are padded by zeros and
    position embeddings interpolated (bilinear).

    Args:
        depths, embed_dims, heads, reductions, mlp_ratios: of each stage.
        path: "attn" (PVT) or "acmix".
        acmix_kwargs: arguments of `ReducedACmix` for every operator, of kernel_conv, mix, shift and
            shift_init; its own defaults for the rest.
        img_size: whose position embeddings are learned.
        num_classes: of the classifier; 0 for none.
        in_chans: channels of the image.
        global_pool: "token" (the class token of the last stage), "avg" (the mean of the others) or
            "" (all tokens).
        drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: of the head, the projections and
            position embeddings, the attention weights and the blocks (linearly from 0).

    Raises:
        ValueError: for an unknown path or pooling, acmix_kwargs that `ReducedACmix` does not take
            or the path has no use for, other than one number a stage, and a reduction in the last
            stage, which has a class token.
    """

    parts, first_stage = ("patch_embed", "pos_embed", "block", "out"), 1

    def __init__(
        self,
        depths: Sequence[int],
        *,
        path: str = "acmix",
        acmix_kwargs: Mapping[str, Any] | None = None,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        heads: Sequence[int] = (1, 2, 5, 8),
        reductions: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        img_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ) -> None:
        super().__init__()
        check_choice("path", path, PATHS)
        check_kwargs("acmix_kwargs", acmix_kwargs or {}, ACMIX_KWARGS if path == "acmix" else ())
        check_stages(depths, embed_dims, heads, reductions, mlp_ratios)
        operator = dict(acmix_kwargs or {}) if path == "acmix" else {"mix": "attention"}
        self.path, self.in_chans, self.depths = path, in_chans, tuple(depths)
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.feature_info = []
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid_sizes = []
        for index in range(len(depths)):
            stage, dim = index + 1, embed_dims[index]
            patch = 4 if index == 0 else 2
            embed = PaddedPatchEmbed(
                (height, width),
                patch,
                in_chans if index == 0 else embed_dims[index - 1],
                dim,
                norm_layer=nn.LayerNorm,
                output_fmt="NHWC",
                strict_img_size=False,
            )
            height, width = -(-height // patch), -(-width // patch)
            self.grid_sizes.append((height, width))
            tokens = height * width + (stage == len(depths))
            self.add_module(f"patch_embed{stage}", embed)
            self.register_parameter(f"pos_embed{stage}", nn.Parameter(torch.empty(1, tokens, dim)))
            blocks = [
                ACmixPVTBlock(
                    dim,
                    heads[index],
                    reductions[index],
                    mlp_ratios[index],
                    rate,
                    proj_drop_rate,
                    attn_drop_rate,
                    **operator,
                )
                for rate in rates[index]
            ]
            self.add_module(f"block{stage}", nn.ModuleList(blocks))
            reduction = 4 * 2**index
            self.add_module(f"out{stage}", nn.Identity())
            info = {"num_chs": dim, "reduction": reduction, "module": f"out{stage}"}
            self.feature_info.append(info)
        self.pos_drop = nn.Dropout(proj_drop_rate)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dims[-1]))
        self.norm: nn.Module = nn.LayerNorm(embed_dims[-1], eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    def init_weights(self) -> None:
        """Normal (0.02) linears and embeddings, as PVT; the operators keep their own start."""
        for name, parameter in self.named_parameters():
            if name.startswith("pos_embed") or name == "cls_token":
                trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Embeddings; alpha and beta."""
        names = (name for name, _ in self.named_parameters())
        embeddings = {name for name in names if name.startswith(("pos_embed", "cls_token"))}
        return embeddings | mixing_weights(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the layers, for layer-wise learning rates."""
        stages = r"^(?:patch_embed|pos_embed|block)(\d+)"
        blocks = [
            (r"^(?:patch_embed|pos_embed)(\d+)", (0,)),
            (r"^block(\d+)\.(\d+)", None),
            (r"^norm|^cls_token", (99999,)),
        ]
        return {"stem": r"^(?:patch|pos)_embed1", "blocks": stages if coarse else blocks}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            check_choice("global_pool", global_pool, ("token", "avg", ""))
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            like = self.cls_token
            head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
            self.head = head

    def forward_features(self, x: Tensor) -> Tensor:
        """The tokens of the last stage, class token first: (B, 1 + H * W, C)."""
        return self._stages(x, len(self.depths))[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, 1:].mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`, the final norm and the head."""
        stages = len(self.depths)
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_norm or len(self.depths) < stages:
            self.norm = nn.Identity()
        return taken

    def _stages(self, x: Tensor, stop: int, norm: bool = False) -> tuple[Tensor, list[Tensor]]:
        maps = []
        tokens = x
        for index in range(stop):
            tokens, size = self._stage(x, index)
            final = index == len(self.grid_sizes) - 1
            normed = self.norm(tokens) if final else tokens
            of_map = (normed if norm else tokens)[:, 1 if final else 0 :]
            x = self.get_submodule(f"out{index + 1}")(of_map.transpose(1, 2).unflatten(2, size))
            maps.append(x)
            tokens = normed
        return tokens, maps

    def _stage(self, x: Tensor, index: int) -> tuple[Tensor, tuple[int, int]]:
        stage = index + 1
        x = self.get_submodule(f"patch_embed{stage}")(x)
        size = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        final = index == len(self.grid_sizes) - 1
        if final:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        position = getattr(self, f"pos_embed{stage}")
        x = self.pos_drop(x + resize_position(position, self.grid_sizes[index], size))
        for block in self.get_submodule(f"block{stage}").children():
            x = self._run_block(block, x, size)
        return x, size


def check_stages(depths: Sequence[int], *others: Sequence[float]) -> None:
    if any(len(other) != len(depths) for other in others):
        raise ValueError(
            "depths, embed_dims, heads, reductions, mlp_ratios: expected one number a stage, got "
            f"{', '.join(str(tuple(numbers)) for numbers in (depths, *others))}"
        )
    reductions = others[2]
    if reductions[-1] != 1:
        raise ValueError(f"reductions: expected 1 in the last stage, got {tuple(reductions)}")


torch.fx.wrap("resize_position")  # a trace knows no sizes


def resize_position(position: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embeddings (1, [1 +] tokens, C) of a grid for another; a class token's stays."""
    # Compared with an exported graph's symbolic size, it would exclude the old one from the graph.
    if not isinstance(new[0], torch.SymInt) and old == new:
        return position
    extra = position.shape[1] - old[0] * old[1]
    grid = position[:, extra:].transpose(1, 2).unflatten(2, old)
    grid = F.interpolate(grid, size=new, mode="bilinear").flatten(2).transpose(1, 2)
    return torch.cat([position[:, :extra], grid], 1)


def checkpoint_filter_fn(
    state_dict: Mapping[str, Any],
    model: nn.Module,
    old_sizes: Sequence[tuple[int, int]] | None = None,
) -> dict[str, Any]:
    """PVT's release, or ours at another img_size: position embeddings at the model's size.

    old_sizes: of the grids; where they are not known, those of as many tokens as the model's are
    the model's, and others square.
    """
    state_dict = checkpoints.unwrap(state_dict)
    grid_sizes: Any = model.grid_sizes
    for index, size in enumerate(grid_sizes):
        key = f"pos_embed{index + 1}"
        if key not in state_dict:
            continue
        tokens = state_dict[key].shape[1] - int(index == len(grid_sizes) - 1)
        side = round(tokens**0.5)
        old = size if tokens == size[0] * size[1] else (side, side)
        if old_sizes is not None and index < len(old_sizes):
            old = old_sizes[index]
        if tokens == old[0] * old[1]:
            state_dict[key] = resize_position(state_dict[key], old, size)
    return state_dict


VARIANTS: dict[str, dict[str, Any]] = {
    "pvt_tiny": {"depths": (2, 2, 2, 2)},
    "pvt_small": {"depths": (3, 4, 6, 3)},
}


def _create_pvt(variant: str, pretrained: bool, **kwargs: Any) -> ACmixPVT:
    base, path = variant.rsplit("_", 1)
    arguments = {**VARIANTS[base], "path": path, **kwargs}
    return build_stages(ACmixPVT, variant, pretrained, checkpoint_filter_fn, arguments)


def _cfg() -> dict[str, Any]:
    return default_cfg(
        crop_pct=0.9,
        interpolation="bicubic",
        first_conv="patch_embed1.proj",
        classifier="head",
    )


default_cfgs = generate_default_cfgs(
    {f"{base}_{path}": _cfg() for base in VARIANTS for path in PATHS}
)


@register_model
def pvt_tiny_attn(pretrained: bool = False, **kwargs: Any) -> ACmixPVT:
    """PVT-T: 13.2 M parameters, 1.93 GMACs at 224 px."""
    return _create_pvt("pvt_tiny_attn", pretrained, **kwargs)


@register_model
def pvt_tiny_acmix(pretrained: bool = False, **kwargs: Any) -> ACmixPVT:
    """PVT-T-ACmix: 13.4 M parameters, 2.00 GMACs at 224 px."""
    return _create_pvt("pvt_tiny_acmix", pretrained, **kwargs)


@register_model
def pvt_small_attn(pretrained: bool = False, **kwargs: Any) -> ACmixPVT:
    """PVT-S: 24.5 M parameters, 3.82 GMACs at 224 px."""
    return _create_pvt("pvt_small_attn", pretrained, **kwargs)


@register_model
def pvt_small_acmix(pretrained: bool = False, **kwargs: Any) -> ACmixPVT:
    """PVT-S-ACmix: 24.8 M parameters, 3.95 GMACs at 224 px."""
    return _create_pvt("pvt_small_acmix", pretrained, **kwargs)
