"""Windowed attention on tiles of queries, in plain PyTorch: runs on every device.

The map of queries is cut into tiles of TILE x TILE. All windows of a tile lie in one block of
keys (the tile and its halo), so a tile is one small dense attention under a mask that is the
same for every tile. Keys are copied about three times (8 x 8 queries share 14 x 14 keys for a
window of 7) instead of window^2 times. Reflected keys stand in the halo as often as the windows
see them, so the border needs no case of its own.

The position term uses that q . p_ij is the same for every key of a window and cancels in the
softmax: what is left is plain attention with the keys k - p.

It is an operator of its own to torch.compile and torch.export, since guards on the number of
tiles would bind a graph to few sizes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix.ops._windows import position_map, reflect, unit_coordinate

TILE = 8
CHUNK = 2**22  # logits held at once in the backward pass


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor | None,
    window: int,
    stride: int,
    dilation: int,
) -> Tensor:
    """q (B, N, d, Ho, Wo), k and v (B, N, d, H, W), position (d, 2) -> (B, N, d, Ho, Wo)."""
    return _attention(q, k, v, position, window, stride, dilation)


@torch.library.custom_op("acmix::tiled_window_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor | None,
    window: int,
    stride: int,
    dilation: int,
) -> Tensor:
    tiles = _Tiles(q, k, window, stride, dilation)
    mask = tiles.mask(q.dtype)
    k = _positioned(k, position)
    out = F.scaled_dot_product_attention(
        tiles.of_queries(q), tiles.of_keys(k), tiles.of_keys(v), attn_mask=mask
    )
    return tiles.queries_from(out)


@torch.library.custom_op("acmix::tiled_window_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor | None,
    window: int,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tiles = _Tiles(q, k, window, stride, dilation)
    mask = tiles.mask(torch.promote_types(q.dtype, torch.float32))
    inputs = [tiles.of_queries(grad), tiles.of_queries(q)]
    inputs += [tiles.of_keys(_positioned(k, position)), tiles.of_keys(v)]
    rows = max(1, CHUNK // (inputs[0].shape[1] * mask.numel()))
    chunks = zip(*(x.split(rows) for x in inputs), strict=True)
    grads = zip(*(_tile_gradients(g, q, k, v, mask) for g, q, k, v in chunks), strict=True)
    grad_q, grad_k, grad_v = (torch.cat(chunk) for chunk in grads)
    grad_k, grad_v = tiles.keys_from(grad_k), tiles.keys_from(grad_v)
    return tiles.queries_from(grad_q), grad_k, grad_v, _position_gradient(grad_k, position)


def _tile_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v for some tiles, each (tiles, heads, TILE^2 or halo^2, d)."""
    scale = q.shape[-1] ** -0.5
    q = q * scale
    weights = ((q @ k.mT).to(mask.dtype) + mask).softmax(-1)
    grad_weights = (grad @ v.mT).to(mask.dtype)
    grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    weights, grad_logits = weights.to(q.dtype), grad_logits.to(q.dtype)
    return grad_logits @ k * scale, grad_logits.mT @ q, weights.mT @ grad


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor | None,
    window: int,
    stride: int,
    dilation: int,
) -> Tensor:
    return q.new_empty(q.shape)


@_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor | None,
    window: int,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_position = q.new_empty(0) if position is None else torch.empty_like(position)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_position


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.window, ctx.stride, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    q, k, v, position = ctx.saved_tensors
    grads = _attention_backward(grad, q, k, v, position, ctx.window, ctx.stride, ctx.dilation)
    return *grads[:3], grads[3] if position is not None else None, None, None, None


_attention.register_autograd(_gradients, setup_context=_save)


class _Tiles:
    """How maps are cut into tiles: `down` x `across` of them, with a halo for the keys."""

    def __init__(self, q: Tensor, k: Tensor, window: int, stride: int, dilation: int) -> None:
        self.batch, self.heads, self.head_dim, self.out_height, self.out_width = q.shape
        self.height, self.width = k.shape[-2:]
        self.window, self.stride, self.dilation = window, stride, dilation
        self.down, self.across = -(-self.out_height // TILE), -(-self.out_width // TILE)
        self.halo = (TILE - 1) * stride + (window - 1) * dilation + 1
        self.device = q.device
        self.pixels = self._pixels()

    def _pixels(self) -> Tensor:
        """Index into the flat map of every key of every tile, row by row, borders reflected."""

        def positions(tiles: int, size: int) -> Tensor:
            first = torch.arange(tiles, device=self.device) * (TILE * self.stride)
            first = first - self.window // 2 * self.dilation
            return reflect(first[:, None] + torch.arange(self.halo, device=self.device), size)

        rows, cols = positions(self.down, self.height), positions(self.across, self.width)
        return (rows[:, None, :, None] * self.width + cols[None, :, None, :]).flatten()

    def mask(self, dtype: torch.dtype) -> Tensor:
        """0 where a query of a tile sees a key of its halo, -inf elsewhere: (TILE^2, halo^2)."""
        query = torch.arange(TILE, device=self.device) * self.stride
        offset = torch.arange(self.halo, device=self.device) - query[:, None]
        inside = (offset >= 0) & (offset <= (self.window - 1) * self.dilation)
        sees = inside & (offset % self.dilation == 0)
        sees = (sees[:, None, :, None] & sees[None, :, None, :]).flatten(2).flatten(0, 1)
        return torch.zeros(sees.shape, dtype=dtype, device=self.device).masked_fill_(
            ~sees, float("-inf")
        )

    def of_queries(self, q: Tensor) -> Tensor:
        """(B, N, d, Ho, Wo) -> (B * down, across * N, TILE^2, d)"""
        bottom = self.down * TILE - self.out_height
        right = self.across * TILE - self.out_width
        q = F.pad(q, (0, right, 0, bottom)).unflatten(-1, (self.across, TILE))
        q = q.unflatten(-3, (self.down, TILE)).permute(0, 3, 5, 1, 4, 6, 2)
        return self._attention_shape(q, TILE)

    def queries_from(self, tiles: Tensor) -> Tensor:
        """The reverse of `of_queries`."""
        shape = (self.batch, self.down, self.across, self.heads, TILE, TILE, self.head_dim)
        q = tiles.reshape(shape).permute(0, 3, 6, 1, 4, 2, 5)
        q = q.flatten(5, 6).flatten(3, 4)
        return q[..., : self.out_height, : self.out_width].contiguous()

    def of_keys(self, k: Tensor) -> Tensor:
        """(B, N, d, H, W) -> (B * down, across * N, halo^2, d)"""
        rows = k.flatten(3).permute(0, 3, 1, 2).index_select(1, self.pixels)
        shape = (self.batch, self.down, self.across, self.halo, self.halo)
        rows = rows.reshape(*shape, self.heads, self.head_dim)
        return self._attention_shape(rows.permute(0, 1, 2, 5, 3, 4, 6), self.halo)

    def keys_from(self, tiles: Tensor) -> Tensor:
        """The adjoint of `of_keys`: what every tile adds to each pixel, summed."""
        shape = (self.batch, self.down, self.across, self.heads, self.halo**2, self.head_dim)
        rows = tiles.reshape(shape).transpose(3, 4).flatten(1, 3)
        # Tiles overlap, so half precision would round many times.
        exact = torch.promote_types(tiles.dtype, torch.float32)
        k = rows.new_zeros(
            (self.batch, self.height * self.width, self.heads, self.head_dim), dtype=exact
        )
        k = k.index_add_(1, self.pixels, rows.to(exact)).to(tiles.dtype)
        return k.permute(0, 2, 3, 1).unflatten(3, (self.height, self.width)).contiguous()

    def _attention_shape(self, tiles: Tensor, side: int) -> Tensor:
        """Tiles spread over both leading dimensions, since a GPU grid bounds each at 65,535."""
        shape = (self.batch * self.down, self.across * self.heads, side * side, self.head_dim)
        return tiles.reshape(shape)


def _positioned(k: Tensor, position: Tensor | None) -> Tensor:
    return k if position is None else k - position_map(position, like=k)


def _position_gradient(grad_k: Tensor, position: Tensor | None) -> Tensor:
    if position is None:
        return grad_k.new_empty(0)
    exact = torch.promote_types(grad_k.dtype, torch.float32)
    grad_p = -grad_k.sum((0, 1), dtype=exact)  # (d, H, W)
    x, y = (unit_coordinate(size, grad_p) for size in (grad_k.shape[-1], grad_k.shape[-2]))
    grad = torch.stack([(grad_p * x).sum((1, 2)), (grad_p * y[:, None]).sum((1, 2))], 1)
    return grad.to(position.dtype)
