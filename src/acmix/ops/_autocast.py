"""Which dtype tensors take under `torch.autocast`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from acmix.ops import _checks

HALF = (torch.float16, torch.bfloat16)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast where it is on for the device."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def dtype_of_kernels(tensor: Tensor) -> torch.dtype:
    """In which the operators take a tensor: that of autocast where it is on; float64 stays."""
    dtype = autocast_dtype(tensor.device)
    return tensor.dtype if dtype is None or tensor.dtype == torch.float64 else dtype


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of autocast where that is on."""
    if autocast_dtype(tensors[0].device) is None:
        return tensors
    return tuple(t.to(dtype_of_kernels(t)) for t in tensors)


def check_kinds(**tensors: Tensor) -> None:
    """All tensors on the device of the first and of its dtype; autocast joins all dtypes but
    float64."""
    (_, first), *_ = tensors.items()
    if autocast_dtype(first.device) is None:
        _checks.check_same_kind(**tensors)
        return
    _checks.check_same_device(**tensors)
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        _checks.check_same_kind(**tensors)


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """For what keeps the dtype that it is given."""
    if like.is_meta:  # has no autocast to leave
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)
