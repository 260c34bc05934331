"""Weights that the paper's authors released, for our modules.

Their ResNet-ACmix has torchvision's names, their Swin-ACmix those of Swin's own release, and an
operator has the keys of `operator_shapes` or `window_shapes`. Our modules hold the same numbers in
another order, so that a state dict of gradients converts as well.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from acmix.layers.acmix import ACmix2d
from acmix.layers.window import WindowACmix

Shapes = dict[str, tuple[int, ...]]

WRAPPERS = ("model", "state_dict")
PREFIXES = r"^((module|_orig_mod)\.)+"
# Constants that Swin's release stores and our modules compute.
IGNORED = (".attn_mask", ".relative_position_index")


def from_released(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict with the released keys as one for our modules.

    Args:
        state_dict: of one operator of ResNet-ACmix, for `ACmix2d`; of a ResNet-ACmix, for
            `resnet*_acmix`; or of a Swin-ACmix, for `swin_*_acmix`. Which, and of what depths and
            widths, is read from the keys. It may lie under "model" or "state_dict", and keys may
            have the prefix "module.".

    Returns:
        A new dict, whose tensors may share memory with those given. `conv_p.bias` is left out: it
        cancels in the softmax. BatchNorm's counters are added as zeros where they are missing.

    Raises:
        TypeError: for what is no dict from names to tensors.
        ValueError: for keys that are unknown, missing or of the wrong shape; it lists them all.
    """
    released = unwrap(state_dict)
    network = _network_like(released)
    expected = released_shapes(network)
    for key in expected:
        if key.endswith(".num_batches_tracked"):
            released.setdefault(key, torch.tensor(0))
    _check(released, expected, type(network).__name__)
    operators = _operators(network)
    converted = {
        key: released[_released_name(key, network)]
        for key in network.state_dict()
        if not _inside(key, operators)
    }
    for name, operator in operators.items():
        prefix = _join(name, "")
        own = {k.removeprefix(prefix): v for k, v in released.items() if k.startswith(prefix)}
        convert = convert_operator if isinstance(operator, ACmix2d) else convert_window
        converted.update({prefix + key: value for key, value in convert(own).items()})
    return converted


def is_released(state_dict: Mapping[str, Any]) -> bool:
    """Whether a state dict has keys of the released operators."""
    return any(key.rpartition(".")[2] in ("rate1", "rate2") for key in unwrap(state_dict))


def operator_shapes(operator: ACmix2d) -> Shapes:
    """Keys of the released operator of ResNet: q, k, v, position, fc, shift kernels and mix."""
    weight, bias = (operator.out_channels, operator.in_channels, 1, 1), (operator.out_channels,)
    taps = operator.kernel_conv**2
    shapes: Shapes = {}
    for name in ("conv1", "conv2", "conv3"):
        shapes.update({f"{name}.weight": weight, f"{name}.bias": bias})
    return {
        **shapes,
        "conv_p.weight": (operator.head_dim, 2, 1, 1),
        "conv_p.bias": (operator.head_dim,),
        "fc.weight": (taps, 3 * operator.heads, 1, 1),
        "dep_conv.weight": (operator.out_channels, taps, *(operator.kernel_conv,) * 2),
        "rate1": (1,),
        "rate2": (1,),
    }


def convert_operator(released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The released operator's tensors as those of `ACmix2d`."""
    heads = released["fc.weight"].shape[1] // 3
    weight, bias = (
        torch.stack([released[f"conv{i}.{name}"] for i in (1, 2, 3)])  # (3, N d, ...)
        .unflatten(1, (heads, -1))
        .permute(2, 0, 1, *trailing)
        .flatten(0, 2)
        for name, trailing in (("weight", (3, 4, 5)), ("bias", ()))
    )
    return {
        "qkv_weight": weight.flatten(1),
        "qkv_bias": bias,
        "position_weight": released["conv_p.weight"].flatten(1),
        "fc_weight": released["fc.weight"].flatten(1),
        "shift.weight": released["dep_conv.weight"],
        "mix.alpha": released["rate1"].squeeze(0),
        "mix.beta": released["rate2"].squeeze(0),
    }


def window_shapes(operator: WindowACmix) -> Shapes:
    """Keys of the released operator of Swin."""
    dim, taps = operator.dim, operator.kernel_conv**2
    return {
        "relative_position_bias_table": tuple(operator.relative_position_bias_table.shape),
        "qkv.weight": (3 * dim, dim),
        "qkv.bias": (3 * dim,),
        "proj.weight": (dim, dim),
        "proj.bias": (dim,),
        "fc.weight": (taps, 3 * operator.heads, 1, 1),
        "fc.bias": (taps,),
        "dep_conv.weight": (dim, taps, operator.kernel_conv, operator.kernel_conv),
        "rate1": (1,),
        "rate2": (1,),
    }


def convert_window(released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The released operator's tensors as those of `WindowACmix`."""
    same = ("relative_position_bias_table", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias")
    return {
        **{key: released[key] for key in same},
        "fc_weight": released["fc.weight"].flatten(1),
        "fc_bias": released["fc.bias"],
        "shift.weight": released["dep_conv.weight"],
        "mix.alpha": released["rate1"].squeeze(0),
        "mix.beta": released["rate2"].squeeze(0),
    }


def released_shapes(network: nn.Module) -> Shapes:
    """Keys and shapes of the released state dict for one of our modules."""
    operators = _operators(network)
    shapes = {
        _released_name(key, network): tuple(tensor.shape)
        for key, tensor in network.state_dict().items()
        if not _inside(key, operators)
    }
    for name, operator in operators.items():
        if isinstance(operator, ACmix2d):
            own = operator_shapes(operator)
        else:
            own = window_shapes(operator)
        shapes.update({_join(name, key): shape for key, shape in own.items()})
    return shapes


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of a checkpoint, without the prefixes of wrapping modules.

    Raises:
        TypeError: for what maps no names to tensors.
        ValueError: for keys that are the same without their prefixes.
    """
    for wrapper in WRAPPERS:
        if isinstance(state_dict, Mapping) and isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
    if not isinstance(state_dict, Mapping) or not all(isinstance(key, str) for key in state_dict):
        raise TypeError(
            "state_dict: expected a dict from names to tensors, as torch.load or "
            f"safetensors.torch.load_file return, got {type(state_dict).__name__}"
        )
    unwrapped: dict[str, Any] = {}
    for key, value in state_dict.items():
        name = re.sub(PREFIXES, "", key)
        if name in unwrapped:
            raise ValueError(f"state_dict: expected {name!r} once, got it with a prefix as well")
        unwrapped[name] = value
    return unwrapped


def _operators(network: nn.Module) -> dict[str, ACmix2d | WindowACmix]:
    modules = network.named_modules()
    return {name: m for name, m in modules if isinstance(m, (ACmix2d, WindowACmix))}


def _inside(key: str, operators: Iterable[str]) -> bool:
    return any(key.startswith(_join(name, "")) for name in operators)


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _released_name(key: str, network: nn.Module) -> str:
    """Swin's release merges patches at the end of a stage, timm at the start of the next."""
    if not hasattr(network, "patch_embed"):
        return key
    key = key.replace("head.fc.", "head.")
    return re.sub(
        r"^layers\.(\d+)\.downsample", lambda stage: f"layers.{int(stage[1]) - 1}.downsample", key
    )


def _check(released: Mapping[str, Any], expected: Shapes, name: str) -> None:
    """Raise one ValueError that lists every key which does not fit."""
    problems = [
        f"unknown: {key}" for key in released if key not in expected and not key.endswith(IGNORED)
    ]
    problems += [f"missing: {key}" for key in expected if key not in released]
    for key, shape in expected.items():
        if key not in released:
            continue
        value = released[key]
        if not isinstance(value, Tensor):
            problems.append(f"no tensor: {key}, {type(value).__name__}")
        elif tuple(value.shape) != shape:
            problems.append(f"wrong shape: {key}, expected {shape}, got {tuple(value.shape)}")
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(
            f"state_dict: expected the released keys of {name}, got {len(problems)} that do not "
            f"fit:\n  {lines}"
        )


def _network_like(released: Mapping[str, Any]) -> nn.Module:
    """Our module, on the meta device, that the keys and shapes of a released one point to."""
    with torch.device("meta"):
        if any(re.match(r"layers\.\d\.blocks\.\d", key) for key in released):
            return _swin_like(released)
        if any(re.match(r"layer[1-4]\.\d", key) for key in released):
            return _resnet_like(released)
        if any(re.match(r"(rate\d$|conv_p\.|dep_conv\.)", key) for key in released):
            return _operator_like(released)
    raise ValueError(
        "state_dict: expected the keys of a released operator ('dep_conv.weight'), ResNet-ACmix "
        "('layer1.0.conv2.dep_conv.weight') or Swin-ACmix "
        f"('layers.0.blocks.0.attn.dep_conv.weight'), got {', '.join(list(released)[:5])} ..."
    )


def _operator_like(released: Mapping[str, Any]) -> ACmix2d:
    out_channels = _size(released, "conv1.weight", 0, 64)
    return ACmix2d(
        _size(released, "conv1.weight", 1, 64),
        out_channels,
        heads=_heads(released, [""], out_channels),
        kernel_conv=_kernel(released, [""]),
    )


def _resnet_like(released: Mapping[str, Any]) -> nn.Module:
    from acmix.models.resnet import ACmixResNet  # it imports this module

    depths = _depths(released, r"layer([1-4])\.(\d+)\.", first=1, least_stages=3)
    stages = range(1, len(depths) + 1)
    widths = [_size(released, f"layer{i}.0.conv1.weight", 0, 32 * 2**i) for i in stages]
    operators = [
        f"layer{stage}.{block}.conv2"
        for stage, depth in zip(stages, depths, strict=True)
        for block in range(depth)
    ]
    return ACmixResNet(
        depths,
        channels=widths,
        in_chans=_size(released, "conv1.weight", 1, 3),
        num_classes=_size(released, "fc.weight", 0, 1000),
        acmix_kwargs={
            "heads": _heads(released, operators, math.gcd(*widths)),
            "kernel_conv": _kernel(released, operators),
        },
    )


def _swin_like(released: Mapping[str, Any]) -> nn.Module:
    from acmix.models.swin import ACmixSwin  # it imports this module

    depths = _depths(released, r"layers\.(\d)\.blocks\.(\d+)\.", first=0, least_stages=1)
    stages = [
        [f"layers.{stage}.blocks.{block}.attn" for block in range(depth)]
        for stage, depth in enumerate(depths)
    ]
    operators = [name for names in stages for name in names]
    width = _size(released, "patch_embed.proj.weight", 0, 96)
    tables = [f"{name}.relative_position_bias_table" for name in operators]
    table = _usual((_size(released, key, 0, 0) for key in tables), 13**2)
    patch = _size(released, "patch_embed.proj.weight", 2, 4)
    window = (math.isqrt(table) + 1) // 2
    return ACmixSwin(
        # Large enough for every stage to hold a window.
        img_size=patch * window * 2 ** len(depths),
        patch_size=patch,
        in_chans=_size(released, "patch_embed.proj.weight", 1, 3),
        num_classes=_size(released, "head.weight", 0, 1000),
        embed_dim=width,
        depths=depths,
        num_heads=[_heads(released, names, width * 2**stage) for stage, names in enumerate(stages)],
        window_size=window,
        acmix_kwargs={"kernel_conv": _kernel(released, operators)},
    )


def _depths(released: Mapping[str, Any], block: str, first: int, least_stages: int) -> list[int]:
    """Blocks of each stage, one at least."""
    found = [re.match(block, key) for key in released]
    blocks = {(int(match[1]) - first, int(match[2])) for match in found if match}
    stages = max(least_stages, 1 + max(stage for stage, _ in blocks))
    return [
        1 + max((index for stage, index in blocks if stage == this), default=0)
        for this in range(stages)
    ]


def _size(released: Mapping[str, Any], key: str, dimension: int, default: int) -> int:
    """A size from the shape of a tensor; `default` where `_check` will find the tensor wrong."""
    shape = getattr(released.get(key), "shape", ())
    return shape[dimension] if len(shape) > dimension and shape[dimension] > 0 else default


def _usual(sizes: Iterable[int], default: int) -> int:
    """The most frequent size, so that `_check` blames the tensors that differ; 0 is none."""
    counts = Counter(size for size in sizes if size > 0)
    return counts.most_common(1)[0][0] if counts else default


def _heads(released: Mapping[str, Any], operators: Iterable[str], channels: int) -> int:
    """The heads of operators of one kind, as most of their tensors tell."""
    found = []
    for name in operators:
        width = _size(released, _join(name, "conv1.weight"), 0, 0)
        found.append(width // _size(released, _join(name, "conv_p.weight"), 0, width + 1))
        found.append(_size(released, _join(name, "relative_position_bias_table"), 1, 0))
        found.append(_size(released, _join(name, "fc.weight"), 1, 0) // 3)
    return _usual((heads for heads in found if heads and channels % heads == 0), 1)


def _kernel(released: Mapping[str, Any], operators: Iterable[str]) -> int:
    sides = (_size(released, _join(name, "dep_conv.weight"), 2, 0) for name in operators)
    return _usual((side for side in sides if side % 2), 3)
