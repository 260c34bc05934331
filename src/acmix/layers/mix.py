"""How the two paths are weighed: the paper's first ablation, one class a row of it.

`weights()` returns (alpha, beta); None stands for a path that is not there and is not computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Weight = Tensor | float | None


class _Learned(nn.Module):
    """Parameters of one element each, not scalars: FSDP splits along the first dimension."""

    NAMES: tuple[str, ...]
    alpha: nn.Parameter
    beta: nn.Parameter

    def __init__(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        for name in self.NAMES:
            setattr(self, name, nn.Parameter(torch.empty(1, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name in self.NAMES:
            nn.init.constant_(getattr(self, name), 0.5)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *others: Any, **more: Any
    ) -> None:
        for name in self.NAMES:
            key = prefix + name
            if key in state_dict:  # a scalar in early checkpoints
                state_dict[key] = torch.atleast_1d(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *others, **more)


class LearnedMix(_Learned):
    """alpha * attention + beta * convolution, both learned, both from 0.5: the method."""

    NAMES = ("alpha", "beta")

    def weights(self) -> tuple[Weight, Weight]:
        return self.alpha, self.beta


class ConvexMix(_Learned):
    """alpha * attention + (1 - alpha) * convolution, alpha learned from 0.5."""

    NAMES = ("alpha",)

    def weights(self) -> tuple[Weight, Weight]:
        return self.alpha, 1 - self.alpha


class FixedMix(nn.Module):
    """Weights that are not learned."""

    def __init__(self, alpha: float | None, beta: float | None) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta

    def weights(self) -> tuple[Weight, Weight]:
        return self.alpha, self.beta

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}"


FIXED_MIXES = {"sum": (1.0, 1.0), "attention": (1.0, None), "convolution": (None, 1.0)}
MIXES = ("learned", "convex", *FIXED_MIXES)


def make_mix(
    mix: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> LearnedMix | ConvexMix | FixedMix:
    if mix == "learned":
        return LearnedMix(device, dtype)
    if mix == "convex":
        return ConvexMix(device, dtype)
    return FixedMix(*FIXED_MIXES[mix])


def weigh(weight: Weight, path: Tensor) -> Tensor:
    """weight * path, without a pass over the map for the 1 of a fixed mix."""
    assert weight is not None
    return path if isinstance(weight, float) and weight == 1 else weight * path
