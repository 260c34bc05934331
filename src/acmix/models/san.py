"""SAN, a network of self-attention whose patchwise attention may be ACmix.

Pan et al., "On the Integration of Self-Attention and Convolution", CVPR 2022, arXiv 2111.14556:
SAN-10, -15 and -19, supplementary table 3. Zhao et al., "Exploring Self-attention for Image
Recognition", CVPR 2020, arXiv 2004.13621.

Parameters have the names of SAN's release (`conv0`, `layer0.0.sam.conv1`, `bn0`, ...), so that its
checkpoints load into `path="attn"` (patchwise) and `path="pairwise"`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.layers import DropPath, calculate_drop_path_rates, create_classifier
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from acmix.layers.patchwise import PairwiseAttention, PatchwiseACmix
from acmix.models import checkpoints
from acmix.models._network import StagedNetwork, build_stages, default_cfg, mixing_weights
from acmix.models._registry import check_kwargs, register_model
from acmix.ops._checks import check_choice, check_map

PATHS = ("pairwise", "attn", "acmix")
ACMIX_KWARGS = {
    "pairwise": ("share_planes", "backend"),
    "attn": ("share_planes", "backend"),
    "acmix": ("share_planes", "backend", "kernel_conv", "mix", "shift", "shift_init"),
}


class ACmixSANBlock(nn.Module):
    """Attention or ACmix on a quarter of the channels, and a 1x1 convolution, before a skip."""

    def __init__(
        self, width: int, kernel_att: int, path: str, drop_path: float = 0.0, **acmix_kwargs: Any
    ) -> None:
        super().__init__()
        inner = width // 4
        self.bn1 = nn.BatchNorm2d(width)
        self.sam: PatchwiseACmix | PairwiseAttention
        if path == "pairwise":
            self.sam = PairwiseAttention(width, inner, kernel_att=kernel_att, **acmix_kwargs)
        else:
            if path == "attn":
                acmix_kwargs["mix"] = "attention"
            self.sam = PatchwiseACmix(width, inner, kernel_att=kernel_att, **acmix_kwargs)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv = nn.Conv2d(inner, width, 1)
        self.relu = nn.ReLU()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, width, H, W) -> (B, width, H, W)."""
        out = self.sam(self.relu(self.bn1(x)))
        return x + self.drop_path(self.conv(self.relu(self.bn2(out))))


class ACmixSAN(StagedNetwork):
    """SAN, the self-attention of every block as `path` says.

    Shapes: (B, in_chans, H, W) -> (B, num_classes), any H, W >= 1: a pool of an odd side keeps its
    last row, where the release drops it. In training the last map needs more than one pixel in the
    batch, as any batch norm does.

    Args:
        depths, widths, kernels: blocks, channels and side of the attention window of each stage;
            widths are multiples of 4 * share_planes.
        path: "pairwise" or "attn" (SAN, of which the paper uses the second: patchwise), or "acmix".
        acmix_kwargs: arguments of `PatchwiseACmix` for every operator, of share_planes, backend,
            kernel_conv, mix, shift and shift_init; its own defaults for the rest.
        num_classes: of the classifier; 0 for none.
        in_chans: channels of the image.
        global_pool: "avg", "max", ... as timm's, or "" with num_classes=0 for the map.
        drop_rate, drop_path_rate: of the head and the blocks (linearly from 0).

    Raises:
        ValueError: for an unknown path, acmix_kwargs that `PatchwiseACmix` does not take or the
            path has no use for, other than one number a stage, and widths of another multiple.
    """

    parts, first_stage = ("conv", "layer", "bn", "out"), 0

    def __init__(
        self,
        depths: Sequence[int],
        *,
        path: str = "acmix",
        acmix_kwargs: Mapping[str, Any] | None = None,
        widths: Sequence[int] = (64, 256, 512, 1024, 2048),
        kernels: Sequence[int] = (3, 7, 7, 7, 7),
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("path", path, PATHS)
        check_kwargs("acmix_kwargs", acmix_kwargs or {}, ACMIX_KWARGS[path])
        check_stages(depths, widths, kernels)
        self.path, self.in_chans, self.depths = path, in_chans, tuple(depths)
        self.num_features = self.head_hidden_size = widths[-1]
        self.feature_info = []
        self.conv_in = nn.Conv2d(in_chans, widths[0], 1, bias=False)
        self.bn_in = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2, 2, ceil_mode=True)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        before = widths[0]
        for stage, (width, kernel) in enumerate(zip(widths, kernels, strict=True)):
            blocks = (
                ACmixSANBlock(width, kernel, path, rate, **(acmix_kwargs or {}))
                for rate in rates[stage]
            )
            self.add_module(f"conv{stage}", nn.Conv2d(before, width, 1, bias=False))
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            self.add_module(f"bn{stage}", nn.BatchNorm2d(width))
            self.add_module(f"out{stage}", nn.Identity())
            info = {"num_chs": width, "reduction": 2 ** (stage + 1), "module": f"out{stage}"}
            self.feature_info.append(info)
            before = width
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def no_weight_decay(self) -> set[str]:
        return mixing_weights(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the layers, for layer-wise learning rates."""
        stages = r"^(?:conv|layer|bn)(\d+)"
        # A transition goes with the first block of its stage, a norm at the end with the last.
        blocks = [(r"^conv(\d+)", (0,)), (r"^layer(\d+)\.(\d+)", None), (r"^bn(\d+)", (99999,))]
        return {"stem": r"^(?:conv|bn)_in", "blocks": stages if coarse else blocks}

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        pool, fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.global_pool: Any = pool
        like = self.conv_in.weight
        self.fc: nn.Module = fc.to(device=like.device, dtype=like.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """The map of the last stage, (B, C, H / 32, W / 32)."""
        return self._stages(x, len(self.depths))[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def _stages(self, x: Tensor, stop: int, norm: bool = False) -> tuple[Tensor, list[Tensor]]:
        check_map("x", x, self.in_chans)
        x = self.relu(self.bn_in(self.conv_in(x)))
        maps = []
        for stage in range(stop):
            x = self._stage(x, stage)
            maps.append(x)
        return x, maps

    def _stage(self, x: Tensor, stage: int) -> Tensor:
        x = self.get_submodule(f"conv{stage}")(self.pool(x))
        for block in self.get_submodule(f"layer{stage}").children():
            x = self._run_block(block, x)
        x = self.relu(self.get_submodule(f"bn{stage}")(x))
        return self.get_submodule(f"out{stage}")(x)


def check_stages(depths: Sequence[int], widths: Sequence[int], kernels: Sequence[int]) -> None:
    if not depths or len(widths) != len(depths) or len(kernels) != len(depths):
        raise ValueError(
            "depths, widths, kernels: expected one number a stage, got "
            f"{tuple(depths)}, {tuple(widths)}, {tuple(kernels)}"
        )
    if any(width % 4 for width in widths):
        raise ValueError(f"widths: expected multiples of 4, got {tuple(widths)}")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """SAN's release or ours, taken out of what they were saved in."""
    return checkpoints.unwrap(state_dict)


VARIANTS: dict[str, dict[str, Any]] = {
    "san10": {"depths": (2, 1, 2, 4, 1)},
    "san15": {"depths": (3, 2, 3, 5, 2)},
    "san19": {"depths": (3, 3, 4, 6, 3)},
}


def _create_san(variant: str, pretrained: bool, **kwargs: Any) -> ACmixSAN:
    base, path = variant.rsplit("_", 1)
    arguments = {**VARIANTS[base], "path": path, **kwargs}
    return build_stages(ACmixSAN, variant, pretrained, checkpoint_filter_fn, arguments)


def _cfg() -> dict[str, Any]:
    return default_cfg(
        crop_pct=0.875, interpolation="bilinear", first_conv="conv_in", classifier="fc"
    )


default_cfgs = generate_default_cfgs(
    {f"{base}_{path}": _cfg() for base in VARIANTS for path in PATHS}
)


@register_model
def san10_pairwise(pretrained: bool = False, **kwargs: Any) -> ACmixSAN:
    """SAN-10, pairwise attention: 10.5 M parameters, 2.16 GMACs at 224 px."""
    return _create_san("san10_pairwise", pretrained, **kwargs)


@register_model
def san10_attn(pretrained: bool = False, **kwargs: Any) -> ACmixSAN:
    """SAN-10, patchwise attention: 11.8 M parameters, 1.87 GMACs at 224 px."""
    return _create_san("san10_attn", pretrained, **kwargs)


@register_model
def san10_acmix(pretrained: bool = False, **kwargs: Any) -> ACmixSAN:
    """SAN-10-ACmix: 12.0 M parameters, 1.92 GMACs at 224 px."""
    return _create_san("san10_acmix", pretrained, **kwargs)


@register_model
def san15_pairwise(pretrained: bool = False, **kwargs: Any) -> ACmixSAN:
    """SAN-15, pairwise attention: 14.1 M parameters, 3.02 GMACs at 224 px."""
    return _create_san("san15_pairwise", pretrained, **kwargs)


@register_model
def san15_attn(pretrained: bool = False, **kwargs: Any) -> ACmixSAN:
    """SAN-15, patchwise attention: 16.2 M parameters, 2.58 GMACs at 224 px."""
    return _create_san("san15_attn", pretrained, **kwargs)


@register_model
def san15_acmix(pretrained: bool = False, **kwargs: Any) -> ACmixSAN:
    """SAN-15-ACmix: 16.4 M parameters, 2.68 GMACs at 224 px."""
    return _create_san("san15_acmix", pretrained, **kwargs)


@register_model
def san19_pairwise(pretrained: bool = False, **kwargs: Any) -> ACmixSAN:
    """SAN-19, pairwise attention: 17.6 M parameters, 3.84 GMACs at 224 px."""
    return _create_san("san19_pairwise", pretrained, **kwargs)


@register_model
def san19_attn(pretrained: bool = False, **kwargs: Any) -> ACmixSAN:
    """SAN-19, patchwise attention: 20.5 M parameters, 3.26 GMACs at 224 px."""
    return _create_san("san19_attn", pretrained, **kwargs)


@register_model
def san19_acmix(pretrained: bool = False, **kwargs: Any) -> ACmixSAN:
    """SAN-19-ACmix: 20.8 M parameters, 3.38 GMACs at 224 px."""
    return _create_san("san19_acmix", pretrained, **kwargs)
