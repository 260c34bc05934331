"""How much each layer of a network uses its two paths: alpha (attention) and beta (convolution)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class PathWeights(NamedTuple):
    """alpha and beta of one layer; None where the layer has no such path."""

    layer: str
    alpha: float | None
    beta: float | None


def path_weights(network: nn.Module) -> list[PathWeights]:
    """alpha and beta of every layer that mixes the two paths, in the order of the modules."""
    found = []
    for name, module in network.named_modules():
        weights = getattr(getattr(module, "mix", None), "weights", None)
        if callable(weights):
            alpha, beta = weights()
            found.append(PathWeights(name, _number(alpha), _number(beta)))
    return found


def _number(weight: Tensor | float | None) -> float | None:
    return weight.item() if isinstance(weight, Tensor) else weight
