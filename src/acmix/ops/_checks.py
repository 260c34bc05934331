"""Argument checks shared by the operators and the layers: every message names the argument,
what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Proxy


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected one of {expected}, got {value!r}")


def check_positive(name: str, value: int) -> None:
    # bool is an int to Python, and never what a caller means by a size.
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} ({value!r})")
    if value < 1:
        raise ValueError(f"{name}: expected a positive int, got {value}")
    if value >= 2**31:
        raise ValueError(f"{name}: expected an int below 2^31, got {value}")


def check_window(name: str, value: int) -> None:
    check_positive(name, value)
    if value % 2 == 0:
        raise ValueError(f"{name}: expected an odd window side, got {value}")


def check_sizes(window: int, stride: int, dilation: int) -> None:
    check_window("window", window)
    check_positive("stride", stride)
    check_positive("dilation", dilation)


def check_divisible(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{name}: expected a multiple of {divisor_name} ({divisor}), got {value}")


def check_dtype(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")


def check_map(name: str, tensor: Tensor, channels: int | None = None) -> None:
    """A floating-point (B, C, H, W) tensor with H, W >= 1 and, where given, C channels."""
    if isinstance(tensor, Proxy):
        return  # a trace of torch.fx knows no shapes
    check_dtype(name, tensor)
    if tensor.dim() != 4:
        raise ValueError(
            f"{name}: expected 4 dimensions (B, C, H, W), got {tensor.dim()} "
            f"with shape {tuple(tensor.shape)}"
        )
    if channels is not None and tensor.shape[1] != channels:
        raise ValueError(
            f"{name}: expected {channels} channels, got {tensor.shape[1]} "
            f"with shape {tuple(tensor.shape)}"
        )
    if tensor.shape[2] < 1 or tensor.shape[3] < 1:
        raise ValueError(f"{name}: expected a map of 1x1 or more, got {tuple(tensor.shape)}")
    if channels is None and tensor.shape[1] < 1:
        raise ValueError(f"{name}: expected a channel or more, got {tuple(tensor.shape)}")


def as_batch(name: str, tensor: Tensor, channels: int | None = None) -> Tensor:
    """A (B, C, H, W) map, or a (C, H, W) one with a batch of 1 before it, checked."""
    batch = tensor[None] if isinstance(tensor, Tensor) and tensor.dim() == 3 else tensor
    check_map(name, batch, channels)
    return batch


def check_shape(name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    check_dtype(name, tensor)
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)}, got {tuple(tensor.shape)}")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name}: expected the device of {other_name} ({other.device}), got {tensor.device}"
        )


def check_same_device(**tensors: Tensor) -> None:
    """All tensors on one device: that of the first."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        check_device(name, tensor, first_name, first)


def check_same_kind(**tensors: Tensor) -> None:
    """All tensors on one device and of one dtype: that of the first."""
    check_same_device(**tensors)
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{name}: expected the dtype of {first_name} ({first.dtype}), got {tensor.dtype}"
            )
