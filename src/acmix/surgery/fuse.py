"""The inference form of a network: batch norms folded, operators reduced to what they compute."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized
from torchvision.ops import FrozenBatchNorm2d

from acmix.layers import fused
from acmix.layers.acmix import ACmix2d
from acmix.layers.patchwise import PairwiseAttention, PatchwiseACmix
from acmix.layers.reduced import ReducedACmix
from acmix.layers.window import WindowACmix

logger = logging.getLogger(__name__)

Fuse = Callable[[Any, Tensor | None, Tensor | None], nn.Module]

# Operators that may take a norm in, (scale, shift) or None, and those that have none after them.
WITH_NORM: dict[type[nn.Module], Fuse] = {
    ACmix2d: fused.FusedACmix2d,
    PatchwiseACmix: fused.FusedPatchwiseACmix,
    PairwiseAttention: fused.fuse_pairwise,
}
WITHOUT_NORM: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    WindowACmix: fused.FusedWindowACmix,
    ReducedACmix: fused.FusedReducedACmix,
}
OPERATORS = (*WITH_NORM, *WITHOUT_NORM)
# No linear layer: a norm after it is over its outputs in (B, C), but not in (B, L, C).
LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
NORMS = (_BatchNorm, nn.SyncBatchNorm, BatchNormAct2d, FrozenBatchNorm2d)


def fuse(model: nn.Module) -> nn.Module:
    """A copy of the model for inference: the same outputs up to rounding, in fewer operations.

    Batch norms are folded into the convolution or the ACmix operator before them, and the
    convolution path of each operator (fc, kernels, beta) into one kernel, in the form that is
    faster on the device that holds the model: move it there first. Either form runs anywhere.

    The copy is in eval mode, and nothing in it requires a gradient. Its state dict has names and
    shapes of its own, for inference alone: it loads into a model that was fused the same way.

    A batch norm stays where it does not directly follow a layer whose output nothing else reads,
    where either has hooks or parametrizations or is used twice, and where `torch.fx` cannot trace
    the `forward` that calls them, for any optional arguments (logged, level INFO). Operators are
    folded everywhere.

    Args:
        model: of any modules, in training mode or eval mode; it is left as it is.

    Raises:
        TypeError: for anything but a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    uses = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    for layer_name, norm_name in list(norms_after_layers(model)):
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        if uses[layer] == uses[norm] == 1 and can_fold(layer, norm):
            model.set_submodule(layer_name, fold(layer, norm))
            model.set_submodule(norm_name, getattr(norm, "act", nn.Identity()))
    fused_operators: dict[nn.Module, nn.Module] = {}  # one for a layer that is used twice, too
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) in OPERATORS and not is_hooked(module):
            if module not in fused_operators:
                fused_operators[module] = fuse_operator(module)
            if not name:
                return fused_operators[module]
            model.set_submodule(name, fused_operators[module])
    return model.eval()


def norms_after_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names of each batch norm and of the layer whose output it alone reads, as (layer, norm)."""
    if not any(is_norm(child) for child in module.modules()) or type(module) in OPERATORS:
        return
    # Whoever cannot be traced may take what is between the entries of its nn.Sequential.
    opaque = bool(prefix) and type(module) is nn.Sequential
    graphs = [] if opaque else traced(module, prefix.rstrip("."))
    if not graphs:
        for name, child in module.named_children():
            yield from norms_after_layers(child, f"{prefix}{name}.")
        return
    for layer, norm in sorted(set.intersection(*(pairs(module, graph) for graph in graphs))):
        yield f"{prefix}{layer}", f"{prefix}{norm}"


def pairs(module: nn.Module, graph: fx.Graph) -> set[tuple[str, str]]:
    """Each batch norm and the layer whose output, and whose weights, nothing else reads."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    found = set()
    for node in graph.nodes:
        if node.op != "call_module" or not is_norm(module.get_submodule(node.target)):
            continue
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        both = (str(before.target), str(node.target))
        if all(calls[name] == 1 and name not in read for name in both) and len(before.users) == 1:
            found.add(both)
    return found


def traced(module: nn.Module, name: str) -> list[fx.Graph]:
    """The calls of `forward` with its optional arguments at their defaults, with each switch
    turned, and with any others; nothing where fx cannot trace one of these."""
    arguments = inspect.signature(module.forward).parameters.values()
    defaults = {a.name: a.default for a in arguments if a.default is not a.empty}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ways: list[dict[str, Any]] = [defaults, {}] if defaults else [{}]
            # To `is True` a proxy says no, so that each switch is turned as well.
            ways += [{**defaults, k: not v} for k, v in defaults.items() if isinstance(v, bool)]
            return [Tracer().trace(module, given) for given in ways]
    except Exception as error:  # whatever a user's forward raises for a proxy of a tensor
        logger.info("%s: torch.fx cannot trace it: %s", name or "the model", error)
        return []


class Tracer(fx.Tracer):
    """Of calls of layers, norms and operators, and of what timm says is not to be traced."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.leaves = (*LAYERS, *NORMS, *OPERATORS, *get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)


def is_norm(module: nn.Module) -> bool:
    return has_forward_of(module, NORMS) and module.running_mean is not None


def has_forward_of(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether it is one of the kinds, or a subclass that computes the same."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of it runs more than `forward` on its parameters."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or is_parametrized(module)


def can_fold(layer: nn.Module, norm: nn.Module) -> bool:
    if is_hooked(layer) or is_hooked(norm):
        return False
    if isinstance(layer, _ConvTransposeNd) and layer.groups > 1:
        return False  # no function of the library folds it
    return type(layer) in WITH_NORM or has_forward_of(layer, LAYERS)


def fold(layer: Any, norm: Any) -> nn.Module:
    """The layer, which the copy owns, with the norm in its weights."""
    if type(layer) in WITH_NORM:
        variance = norm.running_var.float() if norm.running_var.itemsize < 4 else norm.running_var
        scale = torch.rsqrt(variance + norm.eps)
        if norm.weight is not None:
            scale = norm.weight * scale
        shift = -norm.running_mean * scale
        return fuse_operator(layer, scale, shift if norm.bias is None else shift + norm.bias)
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    transpose = isinstance(layer, _ConvTransposeNd)
    weights = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics, transpose)
    layer.weight, layer.bias = (weight.requires_grad_(False) for weight in weights)
    return layer


def fuse_operator(
    layer: nn.Module, scale: Tensor | None = None, shift: Tensor | None = None
) -> nn.Module:
    if type(layer) in WITH_NORM:
        operator = WITH_NORM[type(layer)](layer, scale, shift)
    else:
        operator = WITHOUT_NORM[type(layer)](layer)
    return operator.eval().requires_grad_(False)
