"""Weights that the paper's authors released, for our modules.

Their ResNet-ACmix has torchvision's names, their Swin-ACmix those of Swin's own release, and an
operator has the keys of `operator_shapes` or `window_shapes`. Our modules hold the same numbers in
another order, so that a state dict of gradients converts as well.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
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
        "mix.alpha": released["rate1"].view(1),
        "mix.beta": released["rate2"].view(1),
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
        "mix.alpha": released["rate1"].view(1),
        "mix.beta": released["rate2"].view(1),
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


Like = Callable[["Released"], nn.Module]
_networks: dict[str, Like] = {}  # by a pattern of a released key


def released_network(key: str) -> Callable[[Like], Like]:
    """Decorates a family's function that builds, on the meta device, the network which released
    keys like that and their shapes point to."""

    def register(build: Like) -> Like:
        _networks[key] = build
        return build

    return register


def _network_like(released: Mapping[str, Any]) -> nn.Module:
    """Our module, on the meta device, that the keys and shapes of a released one point to."""
    networks = {**_networks, r"(rate\d$|conv_p\.|dep_conv\.)": _operator_like}
    for pattern, build in networks.items():
        if any(re.match(pattern, key) for key in released):
            with torch.device("meta"):
                return build(Released(released))
    raise ValueError(
        "state_dict: expected the keys of a released operator ('dep_conv.weight'), ResNet-ACmix "
        "('layer1.0.conv2.dep_conv.weight') or Swin-ACmix "
        f"('layers.0.blocks.0.attn.dep_conv.weight'), got {', '.join(list(released)[:5])} ..."
    )


def _operator_like(released: Released) -> ACmix2d:
    out_channels = released.size("conv1.weight", 0, 64)
    return ACmix2d(
        released.size("conv1.weight", 1, 64),
        out_channels,
        heads=released.heads([""], out_channels),
        kernel_conv=released.kernel([""]),
    )


class Released:
    """What a released state dict tells of the network that it is of."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.tensors = tensors

    def depths(self, block: str, first: int, least_stages: int) -> list[int]:
        """Blocks of each stage, one at least; `block` matches a key's stage and block."""
        found = [re.match(block, key) for key in self.tensors]
        blocks = {(int(match[1]) - first, int(match[2])) for match in found if match}
        stages = max(least_stages, 1 + max(stage for stage, _ in blocks))
        return [
            1 + max((index for stage, index in blocks if stage == this), default=0)
            for this in range(stages)
        ]

    def size(self, key: str, dimension: int, default: int) -> int:
        """A size from the shape of a tensor; `default` where `_check` will find it wrong."""
        shape = getattr(self.tensors.get(key), "shape", ())
        return shape[dimension] if len(shape) > dimension and shape[dimension] > 0 else default

    def heads(self, operators: Iterable[str], channels: int) -> int:
        """The heads of operators of one kind, as most of their tensors tell."""
        found = []
        for name in operators:
            width = self.size(_join(name, "conv1.weight"), 0, 0)
            found.append(width // self.size(_join(name, "conv_p.weight"), 0, width + 1))
            found.append(self.size(_join(name, "relative_position_bias_table"), 1, 0))
            found.append(self.size(_join(name, "fc.weight"), 1, 0) // 3)
        return usual((heads for heads in found if heads and channels % heads == 0), 1)

    def kernel(self, operators: Iterable[str]) -> int:
        sides = (self.size(_join(name, "dep_conv.weight"), 2, 0) for name in operators)
        return usual((side for side in sides if side % 2), 3)


def usual(sizes: Iterable[int], default: int) -> int:
    """The most frequent size, so that `_check` blames the tensors that differ; 0 is none."""
    counts = Counter(size for size in sizes if size > 0)
    return counts.most_common(1)[0][0] if counts else default
