"""One number of operations for an operator, whichever backend computes it, to PyTorch's counter.

Under `FlopCounterMode`, what a backend calls is hidden from the counter, which is told the
operator's own number instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils.flop_counter import _FlopCounterMode, register_flop_formula

from acmix.ops import _library

_library.define("operations", "(Tensor x, SymInt count) -> Tensor")


@torch.library.impl("acmix::operations", "CompositeExplicitAutograd")
def _operations(x: Tensor, count: int) -> Tensor:
    return x.new_empty(0)


@register_flop_formula(torch.ops.acmix.operations)
def _count(x: Any, count: int, **_: Any) -> int:
    return count


def is_counted() -> bool:
    if torch.compiler.is_compiling():
        return False
    return any(isinstance(mode, _FlopCounterMode) for mode in _get_current_dispatch_mode_stack())


def of_products(multiply_adds: int) -> tuple[int, int]:
    """2 operations each, and as many again for the gradient of each factor."""
    return 2 * multiply_adds, 4 * multiply_adds


def counted(
    run: Callable[..., Tensor], operations: Callable[[], tuple[int, int]], *inputs: Any
) -> Tensor:
    """run(*inputs), to a counter the operations given, forward and backward for all gradients."""
    return _Counted.apply(run, *operations(), *inputs) if is_counted() else run(*inputs)


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Tensor], forward: int, backward: int, *inputs: Any
    ) -> Tensor:
        with _disable_current_modes(), torch.enable_grad():
            leaves = [
                x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
                for x in inputs
            ]
            out = run(*leaves)
        torch.ops.acmix.operations(out.detach(), forward)
        ctx.leaves, ctx.out, ctx.operations = leaves, out, backward
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [x for x in ctx.leaves if isinstance(x, Tensor) and x.requires_grad]
        with _disable_current_modes():
            found = iter(torch.autograd.grad(ctx.out, wanted, grads, allow_unused=True))
        torch.ops.acmix.operations(grads[0], ctx.operations)
        gradients = [
            next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in ctx.leaves
        ]
        return None, None, None, *gradients
