"""The inference form of a network: batch norms folded, operators reduced to what they compute."""

from __future__ import annotations

import ast
import copy
import inspect
import logging
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import is_lazy
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
DESCRIBING = ("feature_info",)  # of timm's blocks: it reads their sizes
NORMS = (_BatchNorm, nn.SyncBatchNorm, BatchNormAct2d, FrozenBatchNorm2d)


def fuse(model: nn.Module) -> nn.Module:
    """A copy of the model for inference: the same outputs up to rounding, in fewer operations.

    Batch norms are folded into the convolution or the ACmix operator before them, and the
    convolution path of each operator (fc, kernels, beta) into one kernel, in the form that is
    faster on the device that holds the model: move it there first. Either form runs anywhere.

    The copy is in eval mode, and nothing in it requires a gradient. Its state dict has names and
    shapes of its own, for inference alone: it loads into a model that was fused the same way.

    A batch norm stays where it does not directly follow a layer whose output nothing else reads,
    where either has hooks or parametrizations or is used twice, where a hook on a module around the
    layer or a public method other than `forward` may see that output, and where `torch.fx` cannot
    trace the `forward` that calls them, for any optional arguments (logged, level INFO). To trace
    is to run the code, its hooks too, on stand-ins for tensors. Operators are folded everywhere.

    Args:
        model: of any modules, in training mode or eval mode; it is left as it is.

    Raises:
        TypeError: for anything but a module.
        ValueError: for lazy modules that have not run yet, and for weights that a hook computes
            (weight_norm, spectral_norm and pruning in torch.nn.utils), which cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    check_parameters(model)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    uses = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    watch = Watch(model)
    for layer_name, norm_name in [p for p in norms_after_layers(model) if not watch.sees(*p)]:
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


def check_parameters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        what = f"model: {name or 'the model'} ({type(module).__name__}): expected"
        own = [*module._parameters.items(), *module._buffers.items()]
        for key, tensor in own:
            if is_lazy(tensor):
                raise ValueError(f"{what} {key} of a known shape, got none: run the model once")
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                raise ValueError(
                    f"{what} {key} as a parameter, got it computed by a hook: make it permanent by "
                    "remove_weight_norm, remove_spectral_norm or prune.remove of torch.nn.utils"
                )


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
    """The calls of `forward`; nothing where fx cannot trace it."""
    try:
        return graphs_of(module, "forward")
    except Exception as error:  # whatever a user's forward raises for a proxy of a tensor
        logger.info("%s: torch.fx cannot trace it: %s", name or "the model", error)
        return []


def graphs_of(module: nn.Module, method: str) -> list[fx.Graph]:
    """The calls of a method with its optional arguments at their defaults, with each switch turned,
    and, of `forward`, with any others."""
    arguments = inspect.signature(getattr(module, method)).parameters.values()
    defaults = {a.name: a.default for a in arguments if a.default is not a.empty}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ways: list[dict[str, Any]] = [defaults]
        if defaults and method == "forward":
            ways.append({})
        # To `is True` a proxy says no, so that each switch is turned as well.
        ways += [{**defaults, k: not v} for k, v in defaults.items() if isinstance(v, bool)]
        graphs = []
        for given in ways:
            try:
                graphs.append(Tracer(method).trace(module, given))
            except AssertionError:  # a method may refuse some arguments together
                if given is defaults or method == "forward":
                    raise
        return graphs


class Watch:
    """What else may see a layer's output before its norm: a hook on what holds but one of the two,
    another method of what holds both, or a `forward` that cannot be traced and reaches below its
    own children."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.graphs: dict[tuple[nn.Module, str], list[fx.Graph] | None] = {}

    def sees(self, layer: str, norm: str) -> bool:
        for name, parent in holders(self.model, layer, norm).items():
            witness = self.witness(parent, name, layer, norm)
            if witness is not None:
                where = name or "the model"
                logger.info("%s stays: %s of %s may see what is before it", norm, witness, where)
                return True
        return False

    def witness(self, parent: nn.Module, name: str, layer: str, norm: str) -> str | None:
        if not inside(layer, name) or not inside(norm, name):
            return "a hook" if is_hooked(parent) else None
        prefix = f"{name}." if name else ""
        both = layer.removeprefix(prefix), norm.removeprefix(prefix)
        parts = {part for path in both for part in path.split(".")}
        below = {part for path in both for part in path.split(".")[1:]}
        for method in methods(parent):
            graphs = self.traced(parent, method) if mentions(parent, method, parts) else []
            if graphs is None:  # its children may be called, but not what is in them
                if method != "forward" or mentions(parent, method, below, beyond_self=True):
                    return method
            elif any(both not in pairs(parent, graph) and touches(graph, both) for graph in graphs):
                return method
        return None

    def traced(self, module: nn.Module, method: str) -> list[fx.Graph] | None:
        """The graphs of a method, once; None where fx cannot trace it."""
        if (module, method) not in self.graphs:
            try:
                self.graphs[module, method] = graphs_of(module, method)
            except Exception:  # as in `traced`
                self.graphs[module, method] = None
        return self.graphs[module, method]


def holders(model: nn.Module, *paths: str) -> dict[str, nn.Module]:
    """The modules on the way to some, by name, the model first."""
    names = {""}
    for path in paths:
        parts = path.split(".")
        names |= {".".join(parts[:end]) for end in range(1, len(parts))}
    return {name: model.get_submodule(name) for name in sorted(names)}


def inside(path: str, name: str) -> bool:
    return not name or path.startswith(f"{name}.")


def methods(module: nn.Module) -> list[str]:
    """Names of what a user may give a tensor, of a class and its bases below PyTorch's."""
    found: dict[str, Callable[..., Any]] = {}
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torch.nn.modules"):
            break
        for name, function in vars(kind).items():
            if inspect.isfunction(function) and not name.startswith("_"):
                found.setdefault(name, function)
    return [name for name, f in found.items() if takes_tensor(f) and name not in DESCRIBING]


def takes_tensor(function: Callable[..., Any]) -> bool:
    """By the annotation of its first argument; without one, it may."""
    arguments = list(inspect.signature(function).parameters.values())[1:]
    if not arguments:
        return False
    kind = arguments[0].annotation
    return kind is inspect.Parameter.empty or kind is Any or "Tensor" in str(kind)


def mentions(module: nn.Module, method: str, parts: set[str], beyond_self: bool = False) -> bool:
    """Whether the code of a method, or of one of the same class that it calls, has one of the names
    as an attribute or in quotes; beyond_self: as an attribute of anything but `self`."""
    functions = [getattr(type(module), method)]
    for function in functions:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError):  # code without a source may do anything
            return True
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in parts:
                return True
            if not isinstance(node, ast.Attribute):
                continue
            own = isinstance(node.value, ast.Name) and node.value.id == "self"
            if node.attr in parts and not (own and beyond_self):
                return True
            called = getattr(type(module), node.attr, None) if own else None
            if inspect.isfunction(called) and called not in functions:
                functions.append(called)
    return False


def touches(graph: fx.Graph, names: tuple[str, ...]) -> bool:
    return any(str(node.target).startswith(names) for node in graph.nodes)


class Tracer(fx.Tracer):
    """Of calls of layers, norms and operators, and of what timm says is not to be traced."""

    def __init__(self, method: str) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.traced_func_name = method
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
