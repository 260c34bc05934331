"""`torch.ops.acmix.window_attention`: windowed attention as one operator with a kernel a device.

out = base + bias + alpha * attention, where the bias is the same for all images: the mix of two
paths costs no pass over memory of its own, nor does the convolution's bias at the border.

The forward pass keeps the log2-sum-exp2 of every window; the backward pass computes the
probabilities again from it, so nothing of window^2 times the channels is ever stored, nor the
output, which may be changed in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from acmix.ops import _library, _trial
from acmix.ops.window_attention import reference

OPAQUE = True

_library.define(
    "window_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? base, Tensor? bias, Tensor? position, Tensor? alpha, "
    "SymInt window, SymInt stride, SymInt dilation) -> (Tensor out, Tensor lse)",
)
_library.define(
    "window_attention_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? position, Tensor? alpha, Tensor lse, "
    "SymInt window, SymInt stride, SymInt dilation) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_position, Tensor grad_alpha)",
)
_library.register_autocast("window_attention", tensors=5)
_library.register_gpu("window_attention", "acmix.ops.window_attention.triton", "forward")
_library.register_gpu("window_attention_backward", "acmix.ops.window_attention.triton", "backward")


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor | None,
    window: int,
    stride: int,
    dilation: int,
    base: Tensor | None = None,
    alpha: Tensor | float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """q (B, N, d, Ho, Wo), k and v (B, N, d, H, W), position (d, 2) -> (B, N, d, Ho, Wo): base, of
    that shape, plus bias (1, N, d, Ho, Wo) plus the attention times the scalar alpha.
    """
    factor: Tensor | None = None
    if isinstance(alpha, Tensor):
        factor = alpha
    elif alpha != 1:
        factor = q.new_full((1,), alpha, dtype=torch.float32)
    sizes = window, stride, dilation
    return torch.ops.acmix.window_attention(q, k, v, base, bias, position, factor, *sizes)[0]


def trial(device: torch.device, dtype: torch.dtype) -> float:
    """The largest error of a device's kernels on a small map with borders, for the dispatch."""

    def actual(
        v: Tensor, q: Tensor, k: Tensor, base: Tensor, bias: Tensor, p: Tensor, alpha: Tensor
    ) -> Tensor:
        return forward(q, k, v, p, 3, 1, 1, base, alpha, bias)

    def exact(
        v: Tensor, q: Tensor, k: Tensor, base: Tensor, bias: Tensor, p: Tensor, alpha: Tensor
    ) -> Tensor:
        return base + bias + alpha * reference.forward(q, k, v, p, 3, 1, 1)

    sizes = [*[(2, 2, 8, 5, 6)] * 4, (1, 2, 8, 5, 6), (8, 2), ()]
    return _trial.largest_error(actual, exact, sizes, device, dtype)


def empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Room for out (B, N, d, Ho, Wo) and lse (B, N, Ho, Wo): log2 of the sum, over a window, of
    2^(logit * log2(e)), in float32.
    """
    batch, heads, _, height, width = q.shape
    out = _library.empty_output(v, tuple(q.shape))
    return out, q.new_empty((batch, heads, height, width), dtype=torch.float32)


def empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, alpha: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for the gradients, laid out like the tensors; that of an absent one has no elements."""

    def empty(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    maps = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    return *maps, empty(position), empty(alpha)


@torch.library.register_fake("acmix::window_attention")
def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(q, v)


@torch.library.register_fake("acmix::window_attention_backward")
def _fake_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor | None,
    alpha: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty_gradients(q, k, v, position, alpha)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, base, bias, position, alpha, *ctx.sizes = inputs
    _, lse = output
    ctx.has_base, ctx.has_bias = base is not None, bias is not None
    ctx.save_for_backward(q, k, v, position, alpha, lse)
    ctx.mark_non_differentiable(lse)


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *_, position, alpha, _ = saved = ctx.saved_tensors
    *grads, grad_position, grad_alpha = torch.ops.acmix.window_attention_backward(
        grad_out, *saved, *ctx.sizes
    )
    return (
        *grads,
        grad_out if ctx.has_base else None,
        grad_out.sum(0, keepdim=True) if ctx.has_bias else None,
        None if position is None else grad_position,
        None if alpha is None else grad_alpha,
        *[None] * 3,
    )


torch.library.register_autograd("acmix::window_attention", _backward, setup_context=_save)
_library.refuse_second_derivative("window_attention_backward")


@register_flop_formula(torch.ops.acmix.window_attention)
def _flops(
    q: torch.Size,
    k: Any,
    v: Any,
    base: Any,
    bias: Any,
    position: Any,
    alpha: Any,
    window: int,
    *_: Any,
    **__: Any,
) -> int:
    """Two products of every query with the window^2 taps, 2 operations a multiply-add."""
    return 2 * 2 * window**2 * q.numel()


@register_flop_formula(torch.ops.acmix.window_attention_backward)
def _flops_backward(
    grad_out: torch.Size,
    q: Any,
    k: Any,
    v: Any,
    position: Any,
    alpha: Any,
    lse: Any,
    window: int,
    *_: Any,
    **__: Any,
) -> int:
    """Five: the logits again, the gradients of probabilities, queries, keys and values."""
    return 5 * 2 * window**2 * grad_out.numel()
