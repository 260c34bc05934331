"""What several families share: of what timm asks of a network, and of what ACmix does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed, is_scriptable
from timm.models import build_model_with_cfg, register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from acmix.layers import ACmix2d, PairwiseAttention, PatchwiseACmix, ReducedACmix, WindowACmix
from acmix.layers._sizes import pad_to_multiple
from acmix.ops._checks import check_choice, check_map

LAST_STRIDE = 32
Network = TypeVar("Network", bound=nn.Module)

for layer in (ACmix2d, PairwiseAttention, PatchwiseACmix, ReducedACmix, WindowACmix):
    register_notrace_module(layer)  # to timm's feature extraction by torch.fx they are one step


def default_cfg(**kwargs: Any) -> dict[str, Any]:
    """timm's description of a network for ImageNet at 224 px, and what is different in it."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "license": "apache-2.0",
        "paper_ids": "arXiv:2111.14556",
        **kwargs,
    }


def build(
    kind: type[Network], variant: str, pretrained: bool, arguments: Mapping[str, Any]
) -> Network:
    """timm's `build_model_with_cfg`, with the arguments that no network of ours takes refused.

    Raises:
        ValueError: for `scriptable=True`, and for an `output_stride` where it cannot be chosen.
    """
    if is_scriptable():
        raise ValueError(
            "scriptable: expected False, since torch.jit.script compiles none of these networks: "
            "use torch.export or torch.jit.trace; got True"
        )
    arguments = dict(arguments)
    stride = arguments.get("output_stride")
    if stride is not None and "output_stride" not in inspect.signature(kind).parameters:
        if stride != LAST_STRIDE:
            raise ValueError(
                f"output_stride: expected {LAST_STRIDE}, the only one of {variant} (the resnet "
                f"networks have others), got {stride}"
            )
        del arguments["output_stride"]
    return build_model_with_cfg(kind, variant, pretrained, **arguments)


def build_stages(
    kind: type[Network],
    variant: str,
    pretrained: bool,
    checkpoint_filter_fn: Callable[..., Mapping[str, Any]],
    arguments: Mapping[str, Any],
) -> Network:
    """`build` for a `StagedNetwork` of `depths`."""
    features = {"out_indices": tuple(range(len(arguments["depths"]))), "feature_cls": "getter"}
    timm_arguments = {"pretrained_filter_fn": checkpoint_filter_fn, "feature_cfg": features}
    return build(kind, variant, pretrained, {**timm_arguments, **arguments})


def mixing_weights(model: nn.Module) -> set[str]:
    """Names of alpha and beta: weight decay would pull both paths towards nothing."""
    names = (name for name, _ in model.named_parameters())
    return {name for name in names if name.endswith((".mix.alpha", ".mix.beta"))}


@register_notrace_module
class PaddedPatchEmbed(PatchEmbed):
    """timm's patch embedding for images of any size, padded by zeros at their end.

    timm's own padding is the same, but symbolic sizes grow through it until export takes minutes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_chans, H, W) -> (B, ceil(H / patch), ceil(W / patch), C)."""
        check_map("x", x, self.proj.in_channels)
        return super().forward(pad_to_multiple(x, *self.patch_size))


class StagedNetwork(nn.Module):
    """timm's interface to a network of stages, whose modules and parameters have the stage's number
    at the end of their names.

    A subclass has `_stages`, `forward_features`, `forward_head` and `reset_classifier`. The map of
    a stage goes through the module `out` of its number, where hooks and traces find it.
    """

    parts: tuple[str, ...]  # names of what a stage has, without the number
    first_stage: int
    depths: tuple[int, ...]
    in_chans: int
    grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of chosen stages; arguments as timm's, `norm` for one that only heads need."""
        check_choice("output_fmt", output_fmt, ("NCHW",))
        taken, last = feature_take_indices(len(self.depths), indices)
        out, maps = self._stages(x, last + 1 if stop_early else len(self.depths), norm)
        maps = [maps[index] for index in taken]
        return maps if intermediates_only else (out, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`, and the head."""
        taken, last = feature_take_indices(len(self.depths), indices)
        pruned = last + 1 < len(self.depths)
        for stage in range(last + 1, len(self.depths)):
            for part in self.parts:
                delattr(self, f"{part}{self.first_stage + stage}")
        self.depths = self.depths[: last + 1]
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return taken

    def _run_block(self, block: nn.Module, *args: Any) -> Tensor:
        if self.grad_checkpointing:
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _stages(self, x: Tensor, stop: int, norm: bool = False) -> tuple[Tensor, list[Tensor]]:
        """What `forward_features` returns, after the stages up to `stop`, and the map of each."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        raise NotImplementedError

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        raise NotImplementedError
