"""Pretrained networks as the start of ACmix networks, of which few were ever published."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table
from timm.models._features import FeatureDictNet, FeatureGetterNet
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from acmix.layers import ACmix2d, PatchwiseACmix, ReducedACmix, WindowACmix
from acmix.layers.mix import ConvexMix, FixedMix, LearnedMix
from acmix.layers.shift import LearnedShift
from acmix.models import checkpoints, pvt
from acmix.surgery._progress import track
from acmix.surgery.kernel_fit import KernelFit, fit_kernel

# How much of a fitted layer's output is attention, whose weights were not trained; docs/warm_start.
ALPHA = 0.05

OPERATORS = (ACmix2d, PatchwiseACmix, ReducedACmix, WindowACmix)
# Of an operator, what plain attention does not have.
CONVOLUTION_KEYS = ("fc_weight", "fc_bias", "shift.weight", "mix.alpha", "mix.beta")
# torchvision's names of Swin's parts, and ours.
TORCHVISION_SWIN = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^head\.", "head.fc."),
)


@dataclass(frozen=True)
class WarmStart:
    """What `warm_start` did.

    copied: names of the tensors that are the source's, position tables interpolated where the
        sizes differ.
    fitted: by name of the layer, the relative residual ||path - kernel|| / ||kernel|| of its
        convolution path.
    exact: names of the operators that compute the source's attention, with a convolution path that
        starts from zero.
    kept: names of the tensors outside the operators that stay as the model has them.
    left: names of the source's tensors that a feature extractor has no place for.
    """

    copied: tuple[str, ...]
    fitted: Mapping[str, float]
    exact: tuple[str, ...]
    kept: tuple[str, ...]
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.copied)} tensors copied"]
        if self.exact:
            lines.append(f"{len(self.exact)} operators compute the source's attention")
        if self.fitted:
            lines.append(f"{len(self.fitted)} kernels fitted, relative residual")
            lines.extend(f"  {name or 'layer'}: {value:.3f}" for name, value in self.fitted.items())
        if self.kept:
            lines.append(f"{len(self.kept)} tensors kept: {', '.join(self.kept)}")
        if self.left:
            parts = dict.fromkeys(key.partition(".")[0] for key in self.left)
            lines.append(f"{len(self.left)} tensors of the source left out: {', '.join(parts)}")
        return "\n".join(lines)


def warm_start(model: nn.Module, source: nn.Module | Mapping[str, Any]) -> WarmStart:
    """Start a network of ACmix from a pretrained one of the same family, in place.

    Where the source has attention (Swin, PVT, SAN, a stand-alone attention), all of it is kept, and
    the last weights of the convolution path are zero while beta is not: the model computes what the
    source does, and the path receives gradients from the first step on. Where the source has a
    convolution (the 3x3 of a ResNet), the convolution path is the nearest that it can be in least
    squares, and attention gets the small weight alpha = 0.05; with mix="sum" it cannot be small.

    Everything else is copied, but for a classifier of other classes, which stays the model's.
    Position tables and embeddings of other sizes are interpolated.

    Args:
        model: a network of `acmix.models`, also with `features_only=True`, an operator alone, or
            any network whose names are the source's but for the operators; with its dtype, on its
            device.
        source: a network of timm or torchvision (`resnet50`, `swin_t`, ...), one of ours without
            convolution paths ("conv", "attn"), or the state dict of one, of PVT v1, Swin or SAN,
            also under "model" or "state_dict". For an `ACmix2d` alone a convolution, for a
            `WindowACmix` timm's `WindowAttention`.

    Returns:
        What was copied, fitted, kept and left out.

    Raises:
        ValueError: where anything does not fit: it lists what, and the model is left as it was.
        TypeError: for other types.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    if not isinstance(source, (nn.Module, Mapping)):
        raise TypeError(f"source: expected a module or a state dict, got {type(source).__name__}")
    if isinstance(model, ACmix2d) and isinstance(source, nn.Conv2d):
        check_geometry(model, source)
    extractor = isinstance(model, (FeatureDictNet, FeatureGetterNet))
    network: Any = model.model if isinstance(model, FeatureGetterNet) else model
    given = source.state_dict() if isinstance(source, nn.Module) else source
    if checkpoints.is_released(given):
        raise ValueError(
            "source: expected a network without convolution paths, got weights of the released "
            "ACmix, which acmix.models.checkpoints.from_released takes"
        )
    unwrapped = checkpoints.unwrap(given)
    check_padding(unwrapped, network)
    weights = our_names(unwrapped, network)
    left = take_out_what_is_not_there(weights, network) if extractor else ()
    weights = at_sizes(weights, network, getattr(source, "grid_sizes", None))
    operators = {name: m for name, m in network.named_modules() if isinstance(m, OPERATORS)}
    kernels = {
        name: (weights.pop(key), weights.pop(join(name, "bias"), None))
        for name, operator in operators.items()
        if isinstance(operator, ACmix2d) and (key := join(name, "weight")) in weights
    }
    attentions = {
        name: operator
        for name, operator in operators.items()
        if name not in kernels and operator.mix.weights()[1] is not None
    }
    state = network.state_dict()
    own = {join(name, key) for name in attentions for key in CONVOLUTION_KEYS}
    own |= {join(name, key) for name in kernels for key in operators[name].state_dict()}
    drop_other_head(weights, network)
    problems = [
        *problems_of_tensors(weights, state, own, head_name(network)),
        *(p for name in kernels for p in problems_of_kernel(name, operators[name], *kernels[name])),
        *(p for name, operator in attentions.items() for p in problems_of_mix(name, operator)),
        *(problems_of_geometry(network, source) if isinstance(source, nn.Module) else ()),
    ]
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(
            f"source: expected weights for {type(model).__name__}, got {len(problems)} that "
            f"do not fit:\n  {lines}"
        )
    fits = {name: fit(operators[name], *kernels[name]) for name in track([*kernels], "fitting")}
    with torch.no_grad():
        for key, tensor in weights.items():
            state[key].copy_(tensor)
        for operator in attentions.values():
            start_exactly(operator)
        for name, found in fits.items():
            start_near(operators[name], found)
    return WarmStart(
        copied=tuple(weights),
        fitted={name: found.residual for name, found in fits.items()},
        exact=tuple(attentions),
        kept=tuple(key for key in state if key not in weights and key not in own),
        left=left,
    )


def fit_convolution(layer: ACmix2d, conv: nn.Conv2d) -> float:
    """Start a layer from a convolution, in place: `warm_start` for a pair.

    Args:
        layer: of the convolution's channels, stride and dilation; its kernel may be larger.
        conv: (C, C_in, k, k), of one group and the padding that keeps the map's size.

    Returns:
        The relative residual ||path - kernel|| / ||kernel||.

    Raises:
        ValueError: where the two do not fit, and the layer has no convolution path.
    """
    return warm_start(layer, conv).fitted[""]


def copy_attention(layer: WindowACmix, attention: WindowAttention) -> None:
    """Start a layer from timm's window attention, in place; it computes the same.

    Raises:
        ValueError: where the two do not fit, and the layer has no attention.
    """
    warm_start(layer, attention)


def check_padding(weights: Mapping[str, Any], model: nn.Module) -> None:
    """torchvision's Swin pads a map before it shifts its windows, timm's afterwards, which is the
    same on maps of whole windows alone; and the map that it is run on decides its shifts."""
    if "features.1.0.attn.relative_position_bias_table" not in weights:
        return
    attentions = [m for m in model.modules() if isinstance(m, (WindowACmix, WindowAttention))]
    if all(getattr(attention, "pad_first", False) for attention in attentions):
        return
    raise ValueError(
        "source: torchvision's Swin pads maps before it shifts windows: expected a swin_*_acmix "
        "made with acmix_kwargs={'pad_first': True}, got one that shifts first, as timm's does"
    )


def our_names(weights: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Weights of torchvision's Swin, and of its first release, with timm's names; those of a
    feature extractor with its names."""
    weights = {key: v for key, v in weights.items() if not key.endswith(checkpoints.IGNORED)}
    extractor = isinstance(model, FeatureDictNet)
    windows = any(isinstance(module, WindowACmix) for module in model.modules())
    if isinstance(model, SwinTransformer) or (extractor and windows):
        if "features.0.0.weight" in weights:
            weights = {torchvision_name(key): value for key, value in weights.items()}
        elif "layers.0.downsample.reduction.weight" in weights:
            weights = {release_name(key): value for key, value in weights.items()}
    return {extractor_name(key, model): v for key, v in weights.items()} if extractor else weights


def extractor_name(key: str, model: nn.Module) -> str:
    """Where timm's extractor has it: of a Sequential's parts, one by one, as layers_0."""
    flat = key.replace(".", "_", 1)
    return flat if flat.partition(".")[0] in model._modules else key


def take_out_what_is_not_there(weights: dict[str, Any], model: nn.Module) -> tuple[str, ...]:
    """Remove from the weights of a whole network what a feature extractor of timm left away."""
    there = {key.partition(".")[0] for key in model.state_dict()}
    left = tuple(key for key in weights if key.partition(".")[0] not in there)
    for key in left:
        del weights[key]
    return left


def torchvision_name(key: str) -> str:
    for theirs, ours in TORCHVISION_SWIN:
        key = re.sub(theirs, ours, key)
    # After the patches, stages of blocks and the merging of patches before the next take turns.
    key = re.sub(r"^features\.(\d*[13579])\.", lambda m: f"layers.{int(m[1]) // 2}.blocks.", key)
    return re.sub(r"^features\.(\d+)\.", lambda m: f"layers.{int(m[1]) // 2}.downsample.", key)


def release_name(key: str) -> str:
    key = re.sub(r"^head\.", "head.fc.", key)
    return re.sub(
        r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", key
    )


def at_sizes(
    weights: dict[str, Any], model: nn.Module, grid_sizes: Sequence[tuple[int, int]] | None = None
) -> dict[str, Any]:
    """Position biases and embeddings interpolated to the model's windows and image; grid_sizes are
    those of PVT's embeddings, if known."""
    embeddings = [value for key, value in weights.items() if key.startswith("pos_embed")]
    if isinstance(model, pvt.ACmixPVT) and all(map(is_table, embeddings)):
        weights = pvt.checkpoint_filter_fn(weights, model, grid_sizes)
    for key, ours in model.state_dict().items():
        table: Any = weights.get(key)
        if not key.endswith("relative_position_bias_table") or not is_table(table):
            continue
        square = math.isqrt(len(table)) ** 2 == len(table)
        if square and len(table) != len(ours) and table.shape[1:] == ours.shape[1:]:
            attention: Any = model.get_submodule(key.rpartition(".")[0])
            window = attention.window_size
            weights[key] = resize_rel_pos_bias_table(table, window, tuple(ours.shape))
    return weights


def is_table(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta and value.dim() > 1


def head_name(model: nn.Module) -> str | None:
    """Where a network of timm's kind has its classifier."""
    network: Any = model
    head = network.get_classifier() if hasattr(network, "get_classifier") else None
    return next((name for name, module in network.named_modules() if module is head), None)


def drop_other_head(weights: dict[str, Any], model: nn.Module) -> None:
    """Leave out a classifier of other classes than the model's, or without a bias as it has."""
    name = head_name(model)
    if name is None:
        return
    prefix = f"{name}."
    shapes = {key: value.shape for key, value in model.get_submodule(name).state_dict().items()}
    theirs = {key for key in weights if key.startswith(prefix)}
    if {k.removeprefix(prefix): getattr(weights[k], "shape", None) for k in theirs} != shapes:
        for key in theirs:
            del weights[key]


def problems_of_tensors(
    weights: Mapping[str, Any], state: Mapping[str, Tensor], own: set[str], head: str | None
) -> Iterator[str]:
    """What does not fit, of all but the kernels; `own` is what no source has."""
    for key, value in weights.items():
        if key not in state or key in own:
            yield f"unknown: {key}"
        elif not isinstance(value, Tensor):
            yield f"no tensor: {key}, {type(value).__name__}"
        elif value.is_meta or state[key].is_meta:
            yield f"on the meta device: {key}"
        elif value.shape != state[key].shape:
            expected, got = tuple(state[key].shape), tuple(value.shape)
            yield f"wrong shape: {key}, expected {expected}, got {got}"
    for key in state:
        # Old checkpoints do not have BatchNorm's counters.
        optional = key.endswith("num_batches_tracked") or (head and key.startswith(f"{head}."))
        if key not in weights and key not in own and not optional:
            yield f"missing: {key}"


def problems_of_kernel(name: str, layer: Any, weight: Any, bias: Any) -> Iterator[str]:
    name = name or "the layer"
    if not layer.has_convolution:
        yield f"no convolution path in the model: {name}"
        return
    channels, side = (layer.out_channels, layer.in_channels), layer.kernel_conv
    expected = f"({channels[0]}, {channels[1]}, k, k) with odd k up to {side}"
    tensors = [weight] if bias is None else [weight, bias]
    if not all(isinstance(value, Tensor) for value in tensors):
        yield f"no tensor: weight or bias of {name}"
    elif any(value.is_meta for value in (*tensors, layer.qkv_weight)):
        yield f"on the meta device: {name}"
    elif (
        weight.dim() != 4
        or weight.shape[:2] != channels
        or weight.shape[2] != weight.shape[3]
        or weight.shape[2] not in range(1, side + 1, 2)
        or (bias is not None and bias.shape != channels[:1])
    ):
        yield f"wrong shape: kernel of {name}, expected {expected}, got {tuple(weight.shape)}"
    elif not all(value.isfinite().all() for value in tensors):
        yield f"not finite: kernel of {name}"


def problems_of_mix(name: str, operator: Any) -> Iterator[str]:
    if operator.mix.weights()[0] is None:
        yield f"no attention in the model: {name or 'the operator'}"


def problems_of_geometry(model: nn.Module, source: nn.Module) -> Iterator[str]:
    """What a network's modules do otherwise than the source's of their names, and no tensor tells:
    pools that smooth, strides elsewhere, dilated stages, other activations and epsilons."""
    ours = dict(model.named_modules())
    for name, theirs in source.named_modules():
        own = ours.get(name)
        # What is left out, in training or of a feature extractor, is an Identity.
        if own is None or own is model or nn.Identity in (type(own), type(theirs)):
            continue
        if isinstance(theirs, nn.Conv2d) and isinstance(own, (nn.Conv2d, ACmix2d)):
            keys: tuple[str, ...] = ("stride", "dilation")
            if isinstance(own, nn.Conv2d):
                keys += ("padding", "groups", "padding_mode")
        elif isinstance(theirs, (_NormBase, nn.LayerNorm)):
            keys = ("eps",)
        elif not [*theirs.parameters(), *own.parameters()] and type(theirs) is not type(own):
            yield f"{type(theirs).__name__}, not {type(own).__name__}: {name}"
            continue
        else:
            continue
        for key in keys:
            expected, got = (side(getattr(module, key, None)) for module in (own, theirs))
            if expected != got:
                yield f"{key}: {name}, expected {expected}, got {got}"


def side(value: Any) -> Any:
    """A size that is the same for both sides as a number."""
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def check_geometry(layer: ACmix2d, conv: nn.Conv2d) -> None:
    """A state dict does not tell these of a convolution; its channels and kernel it does."""
    reach = tuple(
        side // 2 * step for side, step in zip(conv.kernel_size, conv.dilation, strict=True)
    )
    same = conv.padding == "same" or conv.padding == reach
    for name, expected, got in (
        ("stride", (layer.stride,) * 2, conv.stride),
        # Of a single tap it is of no effect.
        ("dilation", (layer.dilation,) * 2, conv.dilation if any(reach) else None),
        ("groups", 1, conv.groups),
        ("padding", reach, reach if same else conv.padding),
        ("padding_mode", "zeros", conv.padding_mode),
    ):
        if got is not None and got != expected:
            raise ValueError(f"conv: expected {name} {expected} as the layer's, got {got}")


def fit(layer: Any, weight: Tensor, bias: Tensor | None) -> KernelFit:
    around = (layer.kernel_conv - weight.shape[-1]) // 2
    learned = isinstance(layer.shift, LearnedShift)
    sets = len(layer.shift.weight) // layer.head_dim if learned else 0
    return fit_kernel(F.pad(weight, (around,) * 4), bias, layer.fc_weight, sets)


def start_near(layer: Any, found: KernelFit) -> None:
    """Write a fit, with beta divided out, and make attention small where its weight is learned."""
    if not isinstance(layer.mix, FixedMix):
        layer.mix.alpha.fill_(ALPHA)
    if isinstance(layer.mix, LearnedMix):
        layer.mix.beta.fill_(1 - ALPHA)
    layer.qkv_weight.copy_(found.qkv_weight)
    layer.qkv_bias.copy_(found.qkv_bias)
    layer.fc_weight.copy_(found.fc_weight).div_(layer.mix.weights()[1])
    if found.shift_weight is not None:
        layer.shift.weight.copy_(found.shift_weight)


def start_exactly(layer: Any) -> None:
    """Compute the attention alone, whose weights are the source's already."""
    if not isinstance(layer.mix, FixedMix):
        layer.mix.reset_parameters()
    if isinstance(layer.mix, LearnedMix):
        layer.mix.alpha.fill_(1)
    if isinstance(layer.mix, ConvexMix):
        # beta = 1 - alpha must not be 0, or nothing of the convolution path were trained.
        for tensor in linear_outputs(layer):
            tensor /= layer.mix.alpha
    if isinstance(layer.shift, LearnedShift):
        layer.shift.weight.zero_()
    else:
        layer.fc_weight.zero_()
        if hasattr(layer, "fc_bias"):
            layer.fc_bias.zero_()


def linear_outputs(layer: Any) -> list[Tensor]:
    """The weights and biases that the attention's output is linear in."""
    if not isinstance(layer, ACmix2d):
        projection = layer.conv3 if isinstance(layer, PatchwiseACmix) else layer.proj
        return list(projection.parameters())
    values = slice(2 * layer.heads, None)
    return [
        parameter.unflatten(0, (layer.head_dim, 3 * layer.heads))[:, values]
        for parameter in (layer.qkv_weight, layer.qkv_bias)
    ]


def join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
