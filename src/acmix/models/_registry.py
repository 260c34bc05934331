"""Our entry points in timm's registry, which would overwrite a name without a word said."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import timm
from timm.models import is_model, model_entrypoint
from timm.models import register_model as register_with_timm
from torch import nn

Entrypoint = TypeVar("Entrypoint", bound=Callable[..., nn.Module])

_names: list[str] = []


def register_model(entrypoint: Entrypoint) -> Entrypoint:
    """Make `timm.create_model` know an entry point by its name.

    Raises:
        ValueError: for a name that another module registered.
    """
    name = entrypoint.__name__
    if is_model(name):
        owner = model_entrypoint(name).__module__
        if owner != entrypoint.__module__:
            raise ValueError(
                f"{name}: expected a name that is not in timm's registry, but {owner} has "
                "registered it; import acmix before that module or rename its model"
            )
        return entrypoint  # the module is imported again
    _names.append(name)
    register_with_timm(entrypoint)
    return entrypoint


def list_models() -> list[str]:
    """Names of all models of this package, for `create_model` here and in timm."""
    return sorted(_names)


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model` for the models of this package; an unknown name suggests near ones.

    Raises:
        ValueError: for a name that `list_models` does not have.
    """
    if name.split(".")[0] not in _names:
        near = difflib.get_close_matches(name, _names) or list_models()
        raise ValueError(
            f"name: expected a model of acmix, such as {', '.join(near)}; got {name!r}"
        )
    return timm.create_model(name, **kwargs)


def check_kwargs(name: str, given: Iterable[str], taken: Sequence[str]) -> None:
    """Raise ValueError for arguments that what they are passed on to does not take."""
    unknown = sorted(set(given) - set(taken))
    if unknown:
        expected = f"some of {', '.join(taken)}" if taken else "none for this path"
        raise ValueError(f"{name}: expected {expected}, got {', '.join(unknown)}")
