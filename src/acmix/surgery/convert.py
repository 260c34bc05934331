"""ACmix in a network of one's own: its 3x3 convolutions and Swin blocks swapped in place."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from acmix.layers import ACmix2d, PairwiseAttention, PatchwiseACmix, ReducedACmix, WindowACmix
from acmix.models import resnet, swin
from acmix.models._registry import check_kwargs
from acmix.models.swin import ACmixSwinBlock, AttentionBlock
from acmix.ops._checks import check_choice, check_positive
from acmix.surgery._progress import track
from acmix.surgery.warm_start import copy_attention, fit_convolution

PATHS = ("acmix", "attn")
IMAGE_CHANNELS = (1, 3)
STEM = "the stem, which sees the image at its full size: name it in `where` to swap it"
OPERATORS = (ACmix2d, PairwiseAttention, PatchwiseACmix, ReducedACmix, WindowACmix)

Wanted = str | nn.Module | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    swapped: by name, how far the layer's start is from what it replaces: the relative residual of
        the fitted kernel, 0 for an attention that computes the same, None for a start anew.
    skipped: by name, why a convolution or attention stays although it was meant.
    """

    swapped: Mapping[str, float | None]
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} swapped"]
        for name, residual in self.swapped.items():
            start = "starts anew" if residual is None else f"relative residual {residual:.3f}"
            lines.append(f"  {name}: {start}")
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            by_reason.setdefault(reason, []).append(name)
        lines.append(f"{len(self.skipped)} kept")
        lines.extend(f"  {reason}: {', '.join(names)}" for reason, names in by_reason.items())
        return "\n".join(lines)


def convert(
    model: nn.Module,
    where: Wanted | Iterable[Wanted] | None = None,
    *,
    path: str = "acmix",
    warm: bool = True,
    **acmix_kwargs: Any,
) -> Conversion:
    """Swap 3x3 convolutions and the window attentions of timm's Swin for ACmix, in place.

    A convolution of one group, zero padding equal to its dilation and without hooks,
    parametrizations or a weight that another module has, too, is swapped for the `ACmix2d` of its
    channels, stride and dilation, whose maps have the same size. Of the attentions, that of timm's
    `SwinTransformerBlock` is swapped, for a `WindowACmix`, and its block is rebuilt around it.
    Device, dtype, mode and whether the layer is trained stay; a layer of two names is swapped once
    and keeps both.

    The new layers have parameters of their own: make the optimizer afterwards, and before
    `load_state_dict` of a converted model's weights convert the model again.

    Args:
        model: of any modules; left as it is where an error is raised.
        where: what is meant. A pattern of qualified names as in a shell ("layer3.*.conv2"), a
            module of the model, a predicate of name and module, or several of these. Names and
            modules mean all that they hold, too. None means the whole model but its stem, the first
            convolution where it takes an image.
        path: "acmix", or "attn" for attention alone in place of convolutions.
        warm: whether a layer starts from what it replaces: `warm_start` for one layer. Attention
            alone cannot start from a convolution, nor convolution from an attention.
        acmix_kwargs: arguments of every operator that takes them: heads, kernel_att, position,
            backend, kernel_conv, mix, shift and shift_init in place of convolutions; kernel_conv,
            mix, shift, shift_init and roll_convolution in place of window attentions.

    Raises:
        ValueError: for a pattern, module or predicate that means no convolution and no attention,
            where nothing can be swapped, and for arguments that the operators do not take.
        TypeError: for a model or a `where` of another type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    check_choice("path", path, PATHS)
    if warm and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("warm: expected False on the meta device, which has no values, got True")
    heads = acmix_kwargs.get("heads", 4)
    check_positive("heads", heads)
    candidates = dict(find_candidates(model))
    if isinstance(model, (nn.Conv2d, SwinTransformerBlock)):
        raise ValueError(
            "model: expected a module that holds what is to be swapped, "
            f"got a {type(model).__name__} itself"
        )
    # What is exchanged: a convolution, or the block that holds an attention.
    olds = {name: model.get_submodule(target(name, candidates[name])) for name in candidates}
    users = Counter(p for module in model.modules() for p in module._parameters.values())
    kept = {name: kept_elsewhere(model, old) for name, old in olds.items()}
    reasons = {
        name: why_not(candidates[name], olds[name], path, heads)
        or why_not_tied(olds[name], users)
        or kept[name]
        for name in choose(model, candidates, where)
    }
    if where is None:
        reasons.update({name: STEM for name in stem_of(candidates) if reasons[name] is None})
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    names = [name for name in reasons if name not in skipped]
    if not names:
        some = (f"{name} ({reason})" for name, reason in list(skipped.items())[:3])
        got = ", ".join(some) or "a model without any convolution or attention"
        got += already(model)
        raise ValueError(f"where: expected a 3x3 convolution or a window attention, got {got}")

    known = dict.fromkeys(key for name in names for key in arguments_of(olds[name], path))
    check_kwargs("acmix_kwargs", acmix_kwargs, tuple(known))
    made: dict[nn.Module, tuple[nn.Module, float | None]] = {}
    for name in track(names, "converting"):
        if olds[name] not in made:
            taken = arguments_of(olds[name], path)
            own = {key: value for key, value in acmix_kwargs.items() if key in taken}
            made[olds[name]] = replacement(olds[name], path, warm, own)
    swapped = {}
    for name, old in olds.items():  # under every name, meant or not
        if old in made:
            new, swapped[name] = made[old]
            model.set_submodule(target(name, candidates[name]), new)
    exchange_in_containers(model, {old: new for old, (new, _) in made.items()})
    return Conversion(swapped, skipped)


def find_candidates(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Convolutions and attentions by name, but for those within ACmix operators."""
    if isinstance(module, OPERATORS):
        return
    attends = "Attention" in type(module).__name__ and any(True for _ in module.parameters())
    if isinstance(module, nn.Conv2d) or attends:
        yield name, module
    for child_name, child in module._modules.items():  # a child of two names twice
        if child is not None:
            yield from find_candidates(child, f"{name}.{child_name}" if name else child_name)


def stem_of(candidates: Mapping[str, nn.Module]) -> list[str]:
    """The first convolution, where it takes an image."""
    first = next(((n, m) for n, m in candidates.items() if isinstance(m, nn.Conv2d)), None)
    if first is None or first[1].in_channels not in IMAGE_CHANNELS:
        return []
    return [first[0]]


def already(model: nn.Module, wanted: Wanted = "*") -> str:
    """Said of a model that was converted before."""
    done = [
        name
        for name, module in model.named_modules()
        if isinstance(module, OPERATORS) and means(wanted, name, module)
    ]
    return f"; {len(done)} layers are ACmix already" if done else ""


def choose(
    model: nn.Module,
    candidates: Mapping[str, nn.Module],
    where: Wanted | Iterable[Wanted] | None,
) -> list[str]:
    """Names of the candidates that are meant; each of what is wanted has to mean one."""
    if where is None:
        return list(candidates)
    several = isinstance(where, Iterable) and not isinstance(where, (str, nn.Module))
    each: Any = where if several else [where]
    each = list(each)
    if not each:
        raise ValueError("where: expected patterns, modules or predicates, got none")
    chosen: set[str] = set()
    for wanted in each:
        found = {name for name, module in candidates.items() if means(wanted, name, module)}
        if not found:
            raise ValueError(nothing_found(candidates, wanted) + already(model, wanted))
        chosen |= found
    return [name for name in candidates if name in chosen]


def means(wanted: Wanted, name: str, module: nn.Module) -> bool:
    if isinstance(wanted, nn.Module):
        return module in set(wanted.modules())
    if isinstance(wanted, str):
        parts = name.split(".")
        holders = (".".join(parts[: end + 1]) for end in range(len(parts)))
        return any(fnmatchcase(holder, wanted) for holder in holders)
    if callable(wanted):
        return bool(wanted(name, module))
    raise TypeError(f"where: expected patterns, modules or predicates, got {type(wanted).__name__}")


def nothing_found(candidates: Mapping[str, nn.Module], wanted: Wanted) -> str:
    expected = "where: expected what means a convolution or attention of the model"
    if isinstance(wanted, nn.Module):
        return f"{expected}, got a {type(wanted).__name__} that has or is none of them"
    if isinstance(wanted, str):
        near = difflib.get_close_matches(wanted, candidates, n=3, cutoff=0.3)
        such = f", such as {', '.join(near)}" if near else ""
        return f"{expected}{such}; got {wanted!r}"
    return f"{expected}, got a predicate that is true of none"


def target(name: str, module: nn.Module) -> str:
    """The name of what is exchanged for a candidate."""
    return name if isinstance(module, nn.Conv2d) else name.rpartition(".")[0]


def why_not(module: Any, block: Any, path: str, heads: int) -> str | None:
    """Why a convolution, or an attention in its block, cannot be swapped."""
    if isinstance(module, nn.Conv2d):
        return why_not_convolution(module, heads)
    if type(block) not in (SwinTransformerBlock, AttentionBlock) or block.attn is not module:
        return "not the attention of a block of timm's Swin"
    if path == "attn":
        return "attention already"
    if module.proj.in_features != block.dim:
        return f"heads {module.proj.in_features} channels wide together, not {block.dim}"
    return why_not_plain(module) or why_not_plain(block)


def why_not_convolution(conv: nn.Conv2d, heads: int) -> str | None:
    if is_lazy(conv.weight):
        return "channels that only an input tells"
    kind, dilation = type(conv), conv.dilation[0]
    forwards = (kind.forward, kind._conv_forward)
    conditions = {
        f"kernel {'x'.join(map(str, conv.kernel_size))}, not 3x3": conv.kernel_size == (3, 3),
        f"a forward of {kind.__name__}'s own": forwards
        == (nn.Conv2d.forward, nn.Conv2d._conv_forward),
        f"{conv.groups} groups, not one": conv.groups == 1,
        f"stride {conv.stride}": conv.stride[0] == conv.stride[1],
        f"dilation {conv.dilation}": dilation == conv.dilation[1],
        f"padding {conv.padding}, not its dilation, {dilation}": conv.padding
        in ("same", (dilation, dilation)),
        f"padding mode {conv.padding_mode!r}, not 'zeros'": conv.padding_mode == "zeros",
        f"{conv.out_channels} channels, no multiple of {heads} heads": conv.out_channels % heads
        == 0,
        f"dtype {conv.weight.dtype}": conv.weight.is_floating_point(),
    }
    return next((reason for reason, met in conditions.items() if not met), why_not_plain(conv))


def why_not_tied(module: nn.Module, users: Mapping[nn.Parameter | None, int]) -> str | None:
    """users: how many modules have a parameter as their own."""
    tied = any(users[parameter] > 1 for parameter in module.parameters())
    return "a weight that another module has, too" if tied else None


def arguments_of(old: nn.Module, path: str) -> tuple[str, ...]:
    """Names of the arguments of the operator that takes its place."""
    return resnet.ACMIX_KWARGS[path] if isinstance(old, nn.Conv2d) else swin.ACMIX_KWARGS


def kept_elsewhere(model: nn.Module, old: nn.Module) -> str | None:
    """Why an exchange would leave the old module in use: an attribute has a method of it."""
    for name, module in model.named_modules():
        for key, value in plain_attributes(module):
            if getattr(value, "__self__", None) is old:
                return f"a method of it is kept as {f'{name}.{key}' if name else key}"
    return None


def plain_attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """What a module has beside its parameters, buffers, hooks and children."""
    of_torch = vars(nn.Module())
    return [(key, value) for key, value in vars(module).items() if key not in of_torch]


def exchange_in_containers(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """What is registered may stand in a plain list as well, from which `forward` takes it."""

    def exchanged(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return new.get(value, value)
        if isinstance(value, list):
            value[:] = map(exchanged, value)
        elif isinstance(value, dict):
            value.update({key: exchanged(item) for key, item in value.items()})
        elif type(value) is tuple:
            return tuple(map(exchanged, value))
        return value

    for module in model.modules():
        for key, value in plain_attributes(module):
            vars(module)[key] = exchanged(value)


def why_not_plain(module: nn.Module) -> str | None:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "hooks"
    return "parametrizations" if is_parametrized(module) else None


def replacement(
    old: Any, path: str, warm: bool, acmix_kwargs: Mapping[str, Any]
) -> tuple[nn.Module, float | None]:
    """A layer or block in place of the old one, and how far its start is from it."""
    if isinstance(old, nn.Conv2d):
        layer = resnet.replace_convolution(old, path, acmix_kwargs)
        residual = None
        if warm and layer.has_convolution:
            residual = fit_convolution(layer, old)
        layer.requires_grad_(old.weight.requires_grad).train(old.training)
        return layer, residual
    block = ACmixSwinBlock(old, **acmix_kwargs)
    warm = warm and block.attn.proj is not None
    if warm:
        copy_attention(block.attn, old.attn)
    block.attn.requires_grad_(old.attn.qkv.weight.requires_grad).train(old.attn.training)
    block.training = old.training
    return block, 0.0 if warm else None
