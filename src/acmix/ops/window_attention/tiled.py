"""Windowed attention on tiles of queries, in plain PyTorch: runs on every device.

The map of queries is cut into tiles of up to TILE x TILE. All windows of a tile lie in one block
of keys (the tile and its halo), so a tile is one small dense attention under a mask that is the
same for every tile. Keys are copied about three times (8 x 8 queries share 14 x 14 keys for a
window of 7) instead of window^2 times. Reflected keys stand in the halo as often as the windows
see them, so the border needs no case of its own.

The position term uses that q . p_ij is the same for every key of a window and cancels in the
softmax: what is left is plain attention with the keys k - p.

Under a mask 0 * NaN is NaN, so one NaN would spread over its tile: an image whose results are not
finite is computed again by `exact`.

It is an operator of its own to torch.compile and torch.export, since guards on the number of
tiles would bind a graph to few sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from acmix.ops import _library
from acmix.ops._windows import position_map, reflect, unit_coordinate
from acmix.ops.window_attention import exact

TILE = 8
CHUNK = 2**22  # logits held at once in the backward pass
ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? position, SymInt window, SymInt stride, SymInt dilation"
)


OPAQUE = True


@torch.library.custom_op(
    "acmix::tiled_window_attention", mutates_args=(), schema=f"({ARGUMENTS}) -> Tensor"
)
def forward(q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, *sizes: int) -> Tensor:
    tiles = _Tiles(q, k, *sizes)
    shifted = _positioned(k, position)
    out = F.scaled_dot_product_attention(
        tiles.of_queries(q),
        tiles.of_keys(shifted),
        tiles.of_keys(v),
        attn_mask=tiles.mask(q.dtype),
    )
    out = tiles.queries_from(out)
    # Logits are looked at as well: scaled_dot_product_attention makes zeros of a window in which
    # they are all -inf.
    for image in _not_finite(_logit_bound(q, shifted), out):
        one = slice(image, image + 1)
        out[one] = exact.forward(q[one], k[one], v[one], position, *sizes)
    return out


@torch.library.custom_op(
    "acmix::tiled_window_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, *sizes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = _gradients_by_tiles(grad, q, k, v, position, *sizes)
    grad_own = k.new_zeros((), dtype=grads[1].dtype)  # of p_ij, which cancels where all is finite
    for image in _not_finite(_logit_bound(q, _positioned(k, position)), *grads):
        one = slice(image, image + 1)
        *exact_grads, own = exact.backward(grad[one], q[one], k[one], v[one], position, *sizes)
        for all_images, this in zip(grads, exact_grads, strict=True):
            all_images[one] = this
        grad_own = grad_own + own
    grad_position = _position_gradient(grads[1], grad_own, position)
    grad_q, grad_k, grad_v = (x.to(q.dtype) for x in grads)
    return grad_q, grad_k, grad_v, grad_position


def _gradients_by_tiles(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, *sizes: int
) -> list[Tensor]:
    """Gradients of q, and in float32 at least of k and v."""
    tiles = _Tiles(q, k, *sizes)
    mask = tiles.mask(torch.promote_types(q.dtype, torch.float32))
    inputs = [tiles.of_queries(grad), tiles.of_queries(q)]
    inputs += [tiles.of_keys(_positioned(k, position)), tiles.of_keys(v)]
    some = max(1, CHUNK // mask.numel())
    chunks = zip(*(x.flatten(0, 1).split(some) for x in inputs), strict=True)
    grads = zip(*(_tile_gradients(mask, *chunk) for chunk in chunks), strict=True)
    grad_q, grad_k, grad_v = (torch.cat(chunk) for chunk in grads)
    return [tiles.queries_from(grad_q), tiles.keys_from(grad_k), tiles.keys_from(grad_v)]


def _tile_gradients(
    mask: Tensor, grad: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v for some tiles, each (tiles * heads, queries or keys of a tile, d)."""
    scale = q.shape[-1] ** -0.5
    q = q * scale
    weights = ((q @ k.mT).to(mask.dtype) + mask).softmax(-1)
    grad_weights = (grad @ v.mT).to(mask.dtype)
    grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    weights, grad_logits = weights.to(q.dtype), grad_logits.to(q.dtype)
    return grad_logits @ k * scale, grad_logits.mT @ q, weights.mT @ grad


def _logit_bound(q: Tensor, k: Tensor) -> Tensor:
    """The product of their norms, (B, 1), which no logit exceeds; not finite where one might not be
    in float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q_norm, k_norm = (torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=wide) for x in (q, k))
    return (q_norm * k_norm)[:, None]


def _not_finite(*by_image: Tensor) -> Iterable[int]:
    """The images for which one of the tensors, (B, ...), holds a NaN or an infinity.

    To know them a GPU has to be waited for, which a CUDA graph does not allow: there, all images.
    """
    first, *_ = by_image
    if first.is_cuda and torch.cuda.is_current_stream_capturing():
        return range(len(first))
    wide = torch.promote_types(first.dtype, torch.float32)
    # Sums keep NaNs and infinities, and need no second map to count in.
    sums = [x.flatten(1).sum(1, dtype=wide) for x in by_image]
    return (~torch.stack(sums).isfinite().all(0)).nonzero().flatten().tolist()


@forward.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    grad_position = q.new_empty(0) if position is None else torch.empty_like(position)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_position


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.window, ctx.stride, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    q, k, v, position = ctx.saved_tensors
    grads = _backward(grad, q, k, v, position, ctx.window, ctx.stride, ctx.dilation)
    return *grads[:3], grads[3] if position is not None else None, None, None, None


forward.register_autograd(_gradients, setup_context=_save)
_library.refuse_second_derivative("tiled_window_attention_backward")


@register_flop_formula(torch.ops.acmix.tiled_window_attention)
def _flops(q: torch.Size, *others: Any, **_: Any) -> int:
    """Those of the definition, not of the tiles: two products with the window^2 taps."""
    window = others[3]
    return 2 * 2 * window**2 * q.numel()


@register_flop_formula(torch.ops.acmix.tiled_window_attention_backward)
def _flops_backward(grad: torch.Size, *others: Any, **_: Any) -> int:
    window = others[4]
    return 5 * 2 * window**2 * grad.numel()


class _Side:
    """How one side of the map is cut: `tiles` tiles of `queries` queries and `keys` keys.

    The queries of a tile lie `step` apart, so far that their keys lie on one grid of the
    dilation: a tile holds no key between the taps. Where reflection shows a tile the same keys
    again, they are counted instead of copied.
    """

    def __init__(self, size: int, out_size: int, window: int, stride: int, dilation: int) -> None:
        common = math.gcd(stride, dilation)
        self.step, self.shift = min(dilation // common, out_size), stride // common
        of_a_step = -(-out_size // self.step)
        self.repeats = -(-of_a_step // _tile(window, self.shift))
        self.queries = -(-of_a_step // self.repeats)
        self.tiles = self.repeats * self.step
        self.taps = (self.queries - 1) * self.shift + window
        period = max(2 * (size - 1), 1)
        self.keys = min(self.taps, period // math.gcd(period, dilation))
        self.size, self.out_size = size, out_size
        self.window, self.stride, self.dilation = window, stride, dilation

    @property
    def padded(self) -> int:
        return self.tiles * self.queries

    def positions(self, device: torch.device) -> Tensor:
        """Row or column of every key of every tile, borders reflected: (tiles, keys)."""
        first = torch.arange(self.repeats, device=device) * (self.queries * self.step)
        first = first[:, None] + torch.arange(self.step, device=device)  # (repeats, step)
        tap = torch.arange(self.keys, device=device) - self.window // 2
        return reflect(first.flatten()[:, None] * self.stride + tap * self.dilation, self.size)

    def counts(self, device: torch.device) -> Tensor:
        """How often a query of a tile has a key in its window: (queries, keys)."""
        query = torch.arange(self.queries, device=device) * self.shift
        tap = torch.arange(self.taps, device=device) - query[:, None]
        sees = (tap >= 0) & (tap < self.window)
        return F.pad(sees, (0, -self.taps % self.keys)).unflatten(1, (-1, self.keys)).sum(1)


def _tile(window: int, shift: int) -> int:
    """Most queries along a tile's side, whose windows lie `shift` keys apart: only windows that
    overlap share keys, and of those far apart few do."""
    return 1 if shift >= window else min(TILE, 1 + 2 * (TILE - 1) // shift)


class _Tiles:
    """Maps as batches of tiles for attention, and back."""

    def __init__(self, q: Tensor, k: Tensor, window: int, stride: int, dilation: int) -> None:
        self.batch, self.heads, self.head_dim, out_height, out_width = q.shape
        self.device = q.device
        self.y = _Side(k.shape[-2], out_height, window, stride, dilation)
        self.x = _Side(k.shape[-1], out_width, window, stride, dilation)
        rows, cols = self.y.positions(q.device), self.x.positions(q.device)
        pixels = rows[:, None, :, None] * self.x.size + cols[None, :, None, :]
        self.pixels = pixels.flatten()  # of every key of every tile, in the flat map

    def mask(self, dtype: torch.dtype) -> Tensor:
        """The log of how often a query of a tile sees a key: 0 for once, -inf for never."""
        y, x = self.y.counts(self.device), self.x.counts(self.device)
        counts = (y[:, None, :, None] * x[None, :, None, :]).flatten(2).flatten(0, 1)
        return counts.to(torch.promote_types(dtype, torch.float32)).log().to(dtype)

    def of_queries(self, q: Tensor) -> Tensor:
        """(B, N, d, Ho, Wo) -> (B * tiles down, tiles across * N, queries of a tile, d)"""
        y, x = self.y, self.x
        q = F.pad(q, (0, x.padded - x.out_size, 0, y.padded - y.out_size))
        q = q.unflatten(-1, (x.repeats, x.queries, x.step))
        q = q.unflatten(3, (y.repeats, y.queries, y.step))  # (B, N, d, y's three, x's three)
        return self._attention_shape(q.permute(0, 3, 5, 6, 8, 1, 4, 7, 2), y.queries * x.queries)

    def queries_from(self, tiles: Tensor) -> Tensor:
        """The reverse of `of_queries`."""
        y, x = self.y, self.x
        shape = (self.batch, y.repeats, y.step, x.repeats, x.step, self.heads)
        q = tiles.reshape(*shape, y.queries, x.queries, self.head_dim)
        q = q.permute(0, 5, 8, 1, 6, 2, 3, 7, 4).flatten(6).flatten(3, 5)
        return q[..., : y.out_size, : x.out_size].contiguous()

    def of_keys(self, k: Tensor) -> Tensor:
        """(B, N, d, H, W) -> (B * tiles down, tiles across * N, keys of a tile, d)"""
        rows = k.flatten(3).permute(0, 3, 1, 2).index_select(1, self.pixels)
        shape = (self.batch, self.y.tiles, self.x.tiles, self.y.keys * self.x.keys)
        rows = rows.reshape(*shape, self.heads, self.head_dim).transpose(3, 4)
        return self._attention_shape(rows, shape[-1])

    def keys_from(self, tiles: Tensor) -> Tensor:
        """The adjoint of `of_keys`: what every tile adds to each pixel, summed.

        In float32 at least: tiles overlap, so half precision would round many times.
        """
        y, x = self.y, self.x
        shape = (self.batch, y.tiles, x.tiles, self.heads, y.keys * x.keys, self.head_dim)
        rows = tiles.reshape(shape).transpose(3, 4).flatten(1, 3)
        wide = torch.promote_types(tiles.dtype, torch.float32)
        k = rows.new_zeros((self.batch, y.size * x.size, self.heads, self.head_dim), dtype=wide)
        k = k.index_add_(1, self.pixels, rows.to(wide))
        return k.permute(0, 2, 3, 1).unflatten(3, (y.size, x.size)).contiguous()

    def _attention_shape(self, tiles: Tensor, tokens: int) -> Tensor:
        """Tiles spread over both leading dimensions, since a GPU grid bounds each at 65,535."""
        shape = (self.batch * self.y.tiles, self.x.tiles * self.heads, tokens, self.head_dim)
        return tiles.reshape(shape)


def _positioned(k: Tensor, position: Tensor | None) -> Tensor:
    return k if position is None else k - position_map(position, like=k)


def _position_gradient(grad_k: Tensor, grad_own: Tensor, position: Tensor | None) -> Tensor:
    if position is None:
        return grad_k.new_empty(0)
    grad_p = grad_own - grad_k.sum((0, 1))  # (d, H, W)
    x, y = (unit_coordinate(size, grad_p) for size in (grad_k.shape[-1], grad_k.shape[-2]))
    grad = torch.stack([(grad_p * x).sum((1, 2)), (grad_p * y[:, None]).sum((1, 2))], 1)
    return grad.to(position.dtype)
