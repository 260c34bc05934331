"""Windowed attention by Triton kernels: float16, bfloat16 and float32 of any strides.

A program takes a tile of pixels of one map and, one after the other, `HEADS` of its heads; the
pixels that its windows reach stand in a block around it, so that a tile is a small dense attention.
`times` says who sees whom: how often a window shows a key, which is more than once where the
border is reflected. It is the same for all heads. No key is ever copied.

Sums are in float32. The forward pass keeps the log2-sum-exp2 of every window; the backward pass
makes the probabilities again, once a query for its gradient and once a key for those of k and v:
every sum is gathered in a fixed order, so that results repeat to the bit. Derivations are in
docs/operator.md, choices and their reasons in docs/gpu.md.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from acmix.ops._checks import check_shape
from acmix.ops._triton import (
    SEARCH,
    Tile,
    least_dilation,
    load,
    padded_channels,
    precision,
    search,
    store,
    strides,
    times_seen,
    unit,
)
from acmix.ops._windows import output_size
from acmix.ops.window_attention._fused import empty_gradients, empty_outputs

LOG2_E = math.log2(math.e)
SHAPES = [(4, 4, 128, 2), (4, 4, 128, 4), (4, 4, 64, 1), (4, 8, 32, 4), (8, 8, 64, 4)]
CANDIDATES = [
    Tile(rows, columns, block, warps, heads=heads)
    for rows, columns, block, warps in SHAPES
    for heads in (1, 4)
]


@triton.jit
def _times(
    query_row,
    query_column,
    key_row,
    key_column,
    height,
    width,
    first_row,
    last_row,
    first_column,
    last_column,
    WINDOW: tl.constexpr,
    DILATION: tl.constexpr,
    ONCE: tl.constexpr,
):
    """How often queries see keys, pixels both; a float."""
    down = times_seen(query_row, key_row, height, first_row, last_row, WINDOW, DILATION, ONCE)
    across = times_seen(
        query_column, key_column, width, first_column, last_column, WINDOW, DILATION, ONCE
    )
    return down * across


@triton.jit
def _positioned(k, position, channel, row, column, height, width, D: tl.constexpr):
    """Keys less the position term, which is all of it that the softmax does not cancel."""
    inside = channel < D
    px = tl.load(position + 2 * channel, mask=inside, other=0).to(tl.float32)
    py = tl.load(position + 2 * channel + 1, mask=inside, other=0).to(tl.float32)
    return (k.to(tl.float32) - px * unit(column, width) - py * unit(row, height)).to(k.dtype)


@triton.jit
def _halo(start, top, left, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A block of the pixels around a tile: rows, columns and which of them there are."""
    j = start + tl.arange(0, BLOCK)
    return top + j // COLUMNS, left + j % COLUMNS, j < ROWS * COLUMNS


@triton.jit
def _tile_of(program, height, width, heads, ROWS, COLUMNS, HEADS):
    """A program's first row and column, batch and first head. Neighbours in memory run together:
    heads, then tiles, then the batch."""
    head_groups = tl.cdiv(heads, HEADS)
    down, across = tl.cdiv(height, ROWS), tl.cdiv(width, COLUMNS)
    head = program % head_groups * HEADS
    tile = program // head_groups
    batch = tile // (down * across)
    tile = tile % (down * across)
    return tile // across * ROWS, tile % across * COLUMNS, batch, head


@triton.jit
def _forward_kernel(
    q,
    k,
    v,
    base,
    bias,
    position,
    alpha,
    out,
    lse,
    q_strides,
    k_strides,
    v_strides,
    base_strides,
    bias_strides,
    out_strides,
    scale,
    heads,
    height,
    width,
    out_height,
    out_width,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ONCE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALO_ROWS: tl.constexpr,
    HALO_COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out (ROWS * COLUMNS queries) = base + alpha * softmax(q k^T / sqrt(d), keys counted `times`)
    v; scale = log2(e) / sqrt(d)."""
    row, column, batch, first_head = _tile_of(
        tl.program_id(0), out_height, out_width, heads, ROWS, COLUMNS, HEADS
    )
    reach: tl.constexpr = WINDOW // 2 * DILATION
    top = tl.maximum(tl.minimum(row * STRIDE - reach, height - HALO_ROWS), 0)
    left = tl.maximum(tl.minimum(column * STRIDE - reach, width - HALO_COLUMNS), 0)
    first_y, last_y = row * STRIDE, (row + ROWS - 1) * STRIDE
    first_x, last_x = column * STRIDE, (column + COLUMNS - 1) * STRIDE

    pixel = tl.arange(0, ROWS * COLUMNS)
    qy, qx = row + pixel // COLUMNS, column + pixel % COLUMNS
    in_map = (qy < out_height) & (qx < out_width)
    c = tl.arange(0, BLOCK_D)
    in_head = c < D
    loaded = in_map[:, None] & in_head[None, :]

    for i in range(HEADS):
        n = first_head + i
        queries = load(q, q_strides, batch, n, c[None, :], qy[:, None], qx[:, None], loaded)
        largest = tl.full((ROWS * COLUMNS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS * COLUMNS,), tl.float32)
        sums = tl.zeros((ROWS * COLUMNS, BLOCK_D), tl.float32)
        for start in range(0, HALO_ROWS * HALO_COLUMNS, BLOCK):
            ky, kx, in_halo = _halo(start, top, left, BLOCK, HALO_ROWS, HALO_COLUMNS)
            times = _times(
                (qy * STRIDE)[:, None],
                (qx * STRIDE)[:, None],
                tl.where(in_halo, ky, -(2**30))[None, :],
                kx[None, :],
                height,
                width,
                first_y,
                last_y,
                first_x,
                last_x,
                WINDOW,
                DILATION,
                ONCE,
            )
            keys = load(
                k,
                k_strides,
                batch,
                n,
                c[:, None],
                ky[None, :],
                kx[None, :],
                in_head[:, None] & in_halo[None, :],
            )
            if position is not None:
                keys = _positioned(
                    keys, position, c[:, None], ky[None, :], kx[None, :], height, width, D
                )
            logits = tl.dot(queries, keys, input_precision=PRECISION) * scale
            logits = tl.where(times > 0, logits, float("-inf"))
            larger = tl.maximum(largest, tl.max(logits, 1))
            shift = tl.where(larger == float("-inf"), 0.0, larger)  # no key yet
            weights = tl.exp2(logits - shift[:, None]) * times
            shrink = tl.exp2(largest - shift)
            values = load(
                v,
                v_strides,
                batch,
                n,
                c[None, :],
                ky[:, None],
                kx[:, None],
                in_halo[:, None] & in_head[None, :],
            )
            total = total * shrink + tl.sum(weights, 1)
            sums = sums * shrink[:, None]
            sums = tl.dot(weights.to(values.dtype), values, sums, input_precision=PRECISION)
            largest = larger
        sums /= total[:, None]
        if alpha is not None:
            sums *= tl.load(alpha).to(tl.float32)
        if base is not None:
            add = load(base, base_strides, batch, n, c[None, :], qy[:, None], qx[:, None], loaded)
            sums += add.to(tl.float32)
        if bias is not None:
            add = load(bias, bias_strides, batch, n, c[None, :], qy[:, None], qx[:, None], loaded)
            sums += add.to(tl.float32)
        store(out, out_strides, batch, n, c[None, :], qy[:, None], qx[:, None], sums, loaded)
        map_index = (batch.to(tl.int64) * heads + n) * out_height
        at_lse = (map_index + qy) * out_width + qx
        tl.store(lse + at_lse, largest + tl.log2(total), mask=in_map)


@triton.jit
def _probabilities(
    tile,
    maps,
    start,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    DILATION: tl.constexpr,
    ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
    HALO_ROWS: tl.constexpr,
    HALO_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of keys, how much the queries of a tile look at each, and the gradients of that."""
    queries, grads, log_total, qy, qx, seen = tile
    top, left, first_y, last_y, first_x, last_x = seen
    k, v, position, k_strides, v_strides, batch, n, height, width = maps
    c = tl.arange(0, BLOCK_D)
    in_head = c < D
    ky, kx, in_halo = _halo(start, top, left, BLOCK, HALO_ROWS, HALO_COLUMNS)
    times = _times(
        qy[:, None],
        qx[:, None],
        tl.where(in_halo, ky, -(2**30))[None, :],
        kx[None, :],
        height,
        width,
        first_y,
        last_y,
        first_x,
        last_x,
        WINDOW,
        DILATION,
        ONCE,
    )
    keys = load(
        k,
        k_strides,
        batch,
        n,
        c[:, None],
        ky[None, :],
        kx[None, :],
        in_head[:, None] & in_halo[None, :],
    )
    if position is not None:
        keys = _positioned(keys, position, c[:, None], ky[None, :], kx[None, :], height, width, D)
    values = load(
        v,
        v_strides,
        batch,
        n,
        c[:, None],
        ky[None, :],
        kx[None, :],
        in_head[:, None] & in_halo[None, :],
    )
    logits = tl.dot(queries, keys, input_precision=PRECISION) * scale
    logits = tl.where(times > 0, logits - log_total[:, None], float("-inf"))
    weights = tl.exp2(logits) * times
    grad_weights = tl.dot(grads, values, input_precision=PRECISION)
    return keys, weights, grad_weights


@triton.jit
def _query_gradient_kernel(
    grad_out,
    q,
    k,
    v,
    position,
    alpha,
    lse,
    delta,
    grad_q,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    grad_q_strides,
    scale,
    heads,
    height,
    width,
    out_height,
    out_width,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ONCE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALO_ROWS: tl.constexpr,
    HALO_COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fills grad_q and delta, what the probabilities' gradients are on average, in the tiles of the
    forward. delta, and all that is summed, is for an alpha of 1."""
    row, column, batch, first_head = _tile_of(
        tl.program_id(0), out_height, out_width, heads, ROWS, COLUMNS, HEADS
    )
    reach: tl.constexpr = WINDOW // 2 * DILATION
    ONE_BLOCK: tl.constexpr = HALO_ROWS * HALO_COLUMNS <= BLOCK
    top = tl.maximum(tl.minimum(row * STRIDE - reach, height - HALO_ROWS), 0)
    left = tl.maximum(tl.minimum(column * STRIDE - reach, width - HALO_COLUMNS), 0)
    first_y, last_y = row * STRIDE, (row + ROWS - 1) * STRIDE
    first_x, last_x = column * STRIDE, (column + COLUMNS - 1) * STRIDE

    pixel = tl.arange(0, ROWS * COLUMNS)
    qy, qx = row + pixel // COLUMNS, column + pixel % COLUMNS
    in_map = (qy < out_height) & (qx < out_width)
    c = tl.arange(0, BLOCK_D)
    in_head = c < D
    loaded = in_map[:, None] & in_head[None, :]

    for i in range(HEADS):
        n = first_head + i
        queries = load(q, q_strides, batch, n, c[None, :], qy[:, None], qx[:, None], loaded)
        grads = load(grad_out, grad_strides, batch, n, c[None, :], qy[:, None], qx[:, None], loaded)
        map_index = (batch.to(tl.int64) * heads + n) * out_height
        at_lse = (map_index + qy) * out_width + qx
        log_total = tl.load(lse + at_lse, mask=in_map, other=float("inf"))
        seen = top, left, first_y, last_y, first_x, last_x
        tile = queries, grads, log_total, qy * STRIDE, qx * STRIDE, seen
        maps = k, v, position, k_strides, v_strides, batch, n, height, width
        mean = tl.zeros((ROWS * COLUMNS,), tl.float32)
        if not ONE_BLOCK:  # the average comes first, in a loop of its own
            for start in range(0, HALO_ROWS * HALO_COLUMNS, BLOCK):
                _, weights, grad_weights = _probabilities(
                    tile,
                    maps,
                    start,
                    scale,
                    D,
                    BLOCK_D,
                    WINDOW,
                    DILATION,
                    ONCE,
                    BLOCK,
                    HALO_ROWS,
                    HALO_COLUMNS,
                    PRECISION,
                )
                mean += tl.sum(weights * grad_weights, 1)
        sums = tl.zeros((ROWS * COLUMNS, BLOCK_D), tl.float32)
        for start in range(0, HALO_ROWS * HALO_COLUMNS, BLOCK):
            keys, weights, grad_weights = _probabilities(
                tile,
                maps,
                start,
                scale,
                D,
                BLOCK_D,
                WINDOW,
                DILATION,
                ONCE,
                BLOCK,
                HALO_ROWS,
                HALO_COLUMNS,
                PRECISION,
            )
            if ONE_BLOCK:
                mean = tl.sum(weights * grad_weights, 1)
            grad_logits = (weights * (grad_weights - mean[:, None])).to(keys.dtype)
            sums = tl.dot(grad_logits, tl.trans(keys), sums, input_precision=PRECISION)
        tl.store(delta + at_lse, mean, mask=in_map)
        sums *= scale * 0.6931471805599453  # ln 2
        if alpha is not None:
            sums *= tl.load(alpha).to(tl.float32)
        store(grad_q, grad_q_strides, batch, n, c[None, :], qy[:, None], qx[:, None], sums, loaded)


@triton.jit
def _key_gradient_kernel(
    grad_out,
    q,
    k,
    v,
    position,
    alpha,
    lse,
    delta,
    grad_k,
    grad_v,
    grad_position,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    grad_k_strides,
    grad_v_strides,
    scale,
    heads,
    height,
    width,
    out_height,
    out_width,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ONCE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALO_ROWS: tl.constexpr,
    HALO_COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fills grad_k, grad_v and the program's part of the position weight's gradient.

    A tile of keys, and in its halo the queries whose windows reach it: those that see a key by
    reflection stand no farther from it than those that see it directly.
    """
    row, column, batch, first_head = _tile_of(
        tl.program_id(0), height, width, heads, ROWS, COLUMNS, HEADS
    )
    reach: tl.constexpr = WINDOW // 2 * DILATION
    top = tl.minimum(tl.cdiv(tl.maximum(row - reach, 0), STRIDE), out_height - HALO_ROWS)
    left = tl.minimum(tl.cdiv(tl.maximum(column - reach, 0), STRIDE), out_width - HALO_COLUMNS)
    first_y, last_y = top * STRIDE, (top + HALO_ROWS - 1) * STRIDE
    first_x, last_x = left * STRIDE, (left + HALO_COLUMNS - 1) * STRIDE

    pixel = tl.arange(0, ROWS * COLUMNS)
    ky, kx = row + pixel // COLUMNS, column + pixel % COLUMNS
    in_map = (ky < height) & (kx < width)
    c = tl.arange(0, BLOCK_D)
    in_head = c < D
    loaded = in_map[:, None] & in_head[None, :]
    factor = 1.0 if alpha is None else tl.load(alpha).to(tl.float32)
    natural = factor * scale * 0.6931471805599453  # ln 2
    grad_x = tl.zeros((BLOCK_D,), tl.float32)
    grad_y = tl.zeros((BLOCK_D,), tl.float32)

    for i in range(HEADS):
        n = first_head + i
        keys = load(k, k_strides, batch, n, c[None, :], ky[:, None], kx[:, None], loaded)
        if position is not None:
            keys = _positioned(
                keys, position, c[None, :], ky[:, None], kx[:, None], height, width, D
            )
        values = load(v, v_strides, batch, n, c[None, :], ky[:, None], kx[:, None], loaded)
        sums_k = tl.zeros((ROWS * COLUMNS, BLOCK_D), tl.float32)
        sums_v = tl.zeros((ROWS * COLUMNS, BLOCK_D), tl.float32)
        for start in range(0, HALO_ROWS * HALO_COLUMNS, BLOCK):
            qy, qx, in_halo = _halo(start, top, left, BLOCK, HALO_ROWS, HALO_COLUMNS)
            times = _times(
                (qy * STRIDE)[None, :],
                (qx * STRIDE)[None, :],
                ky[:, None],
                kx[:, None],
                height,
                width,
                first_y,
                last_y,
                first_x,
                last_x,
                WINDOW,
                DILATION,
                ONCE,
            )
            read = in_halo[:, None] & in_head[None, :]
            queries = load(q, q_strides, batch, n, c[None, :], qy[:, None], qx[:, None], read)
            grads = load(
                grad_out, grad_strides, batch, n, c[None, :], qy[:, None], qx[:, None], read
            )
            map_index = (batch.to(tl.int64) * heads + n) * out_height
            at_lse = (map_index + qy) * out_width + qx
            log_total = tl.load(lse + at_lse, mask=in_halo, other=float("inf"))
            mean = tl.load(delta + at_lse, mask=in_halo, other=0)
            logits = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
            logits = tl.where(times > 0, logits - log_total[None, :], float("-inf"))
            weights = tl.exp2(logits) * times
            sums_v = tl.dot(weights.to(grads.dtype), grads, sums_v, input_precision=PRECISION)
            grad_weights = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
            grad_logits = (weights * (grad_weights - mean[None, :])).to(queries.dtype)
            sums_k = tl.dot(grad_logits, queries, sums_k, input_precision=PRECISION)
        sums_k *= natural
        sums_v *= factor
        store(
            grad_k, grad_k_strides, batch, n, c[None, :], ky[:, None], kx[:, None], sums_k, loaded
        )
        store(
            grad_v, grad_v_strides, batch, n, c[None, :], ky[:, None], kx[:, None], sums_v, loaded
        )
        if position is not None:
            grad_x -= tl.sum(sums_k * unit(kx, width)[:, None], 0)
            grad_y -= tl.sum(sums_k * unit(ky, height)[:, None], 0)
    if position is not None:
        at = grad_position + (tl.program_id(0).to(tl.int64) * D + c) * 2
        tl.store(at, grad_x, mask=in_head)
        tl.store(at + 1, grad_y, mask=in_head)


def choose_tile(bytes_of_pixel: int, sizes: dict[str, Any]) -> Tile:
    """The tile for a head's (padded) bytes a pixel, and the arguments of `_sizes`.

    Small tiles waste the least of a tile's dense products; a map of 8x8 or less is one tile. All
    keys of a window of 7 (10 x 10) stand in one block of 128 where registers and the 99 KiB of
    shared memory of an Ada GPU allow: the gradient of queries makes the probabilities once then,
    not twice. Chosen by the compiler's word, not yet by the clock; ACMIX_TRITON_SEARCH=1 times
    CANDIDATES beside them.
    """
    height, width = sizes["height"], sizes["width"]
    if bytes_of_pixel <= 256 and height <= 8 and width <= 8:
        return Tile(8, 8, 64, warps=8 if bytes_of_pixel == 256 else 4)
    if bytes_of_pixel <= 256:
        side = 3 * sizes["STRIDE"] + (sizes["WINDOW"] - 1) * sizes["DILATION"] + 1
        keys = min(side, height) * min(side, width)
        warps = {32: 2, 64: 4, 128: 4, 256: 8}[bytes_of_pixel]
        # TF32 operands take more room than others of as many bytes.
        fits = keys <= 128 and (bytes_of_pixel < 256 or sizes["PRECISION"] != "tf32")
        return Tile(4, 4, 128 if fits else 64, warps)
    return Tile(4, 4, 32 if bytes_of_pixel <= 512 else 16, warps=8)


def candidates(bytes_of_pixel: int) -> list[Tile]:
    """What a search tries: no blocks beyond 32 KiB, over which the compiler takes minutes."""
    return [t for t in CANDIDATES if max(t.rows * t.columns, t.block) * bytes_of_pixel <= 2**15]


def _sizes(
    k: Tensor, out_size: torch.Size, window: int, stride: int, dilation: int
) -> dict[str, Any]:
    """Arguments that every kernel takes."""
    heads, head_dim, height, width = k.shape[1:]
    dilation = least_dilation(dilation, height, width)
    return {
        "scale": LOG2_E / math.sqrt(head_dim),
        "heads": heads,
        "height": height,
        "width": width,
        "out_height": out_size[0],
        "out_width": out_size[1],
        "D": head_dim,
        "BLOCK_D": padded_channels(head_dim),
        "WINDOW": window,
        "STRIDE": stride,
        "DILATION": dilation,
        "ONCE": window // 2 * dilation < min(height, width),
        "PRECISION": precision(k.dtype),
    }


def _tiling(tile: Tile, sizes: dict[str, Any], of_keys: bool) -> tuple[int, dict[str, Any]]:
    """The number of programs, and the arguments of a tile of keys or of queries."""
    reach, stride = sizes["WINDOW"] // 2 * sizes["DILATION"], sizes["STRIDE"]
    rows, columns = tile.rows, tile.columns
    if of_keys:
        own, around = ("height", "width"), ("out_height", "out_width")
        halo = [(side - 1 + 2 * reach) // stride + 1 for side in (rows, columns)]
    else:
        own, around = ("out_height", "out_width"), ("height", "width")
        halo = [(side - 1) * stride + 2 * reach + 1 for side in (rows, columns)]
    halo = [min(side, sizes[name]) for side, name in zip(halo, around, strict=True)]
    tiles = triton.cdiv(sizes[own[0]], rows) * triton.cdiv(sizes[own[1]], columns)
    heads = math.gcd(tile.heads, sizes["heads"])
    arguments = {
        "ROWS": rows,
        "COLUMNS": columns,
        "BLOCK": min(tile.block, max(16, triton.next_power_of_2(halo[0] * halo[1]))),
        "HALO_ROWS": halo[0],
        "HALO_COLUMNS": halo[1],
        "HEADS": heads,
        **tile.options,
    }
    return tiles * triton.cdiv(sizes["heads"], heads), arguments


def _check(k: Tensor, stride: int, **tensors: Tensor | None) -> None:
    """An operator may be called by itself: ValueError for what does not fit, nothing is read."""
    batch, heads, head_dim, *side = k.shape
    out_side = [output_size(length, stride) for length in side]
    by_query = (batch, heads, head_dim, *out_side)
    shapes = {
        **dict.fromkeys(("q", "base", "grad_out"), by_query),
        "v": k.shape,
        "position": (head_dim, 2),
        "alpha": (),
        "lse": (batch, heads, *out_side),
    }
    for name, tensor in tensors.items():
        if tensor is not None:
            check_shape(name, tensor, shapes[name])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: Tensor | None,
    bias: Tensor | None,
    position: Tensor | None,
    alpha: Tensor | None,
    window: int,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    """The kernel of acmix::window_attention: out (B, N, d, Ho, Wo) and lse (B, N, Ho, Wo)."""
    out, lse = empty_outputs(q, v)
    if out.numel() == 0:
        return out, lse
    _check(k, stride, q=q, v=v, base=base, position=position, alpha=alpha)
    weight = None if position is None else position.contiguous()
    bias = None if bias is None else bias.expand(q.shape)
    sizes = _sizes(k, q.shape[3:], window, stride, dilation)

    def run(tile: Tile) -> None:
        programs, tiling = _tiling(tile, sizes, of_keys=False)
        tensors = (q, k, v, base, bias, weight, alpha, out, lse)
        layouts = map(strides, (q, k, v, base, bias, out))
        _forward_kernel[(programs * len(q),)](*tensors, *layouts, **sizes, **tiling)

    _with_tile(run, "forward", k, sizes)
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor | None,
    alpha: Tensor | None,
    lse: Tensor,
    window: int,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernels of acmix::window_attention_backward."""
    grads = empty_gradients(q, k, v, position, alpha)
    grad_q, grad_k, grad_v, grad_position, grad_alpha = grads
    if q.numel() == 0:
        grad_position.zero_()
        grad_alpha.zero_()
        return grads
    _check(k, stride, q=q, v=v, grad_out=grad_out, position=position, alpha=alpha, lse=lse)
    weight = None if position is None else position.contiguous()
    sizes = _sizes(k, q.shape[3:], window, stride, dilation)
    delta = torch.empty_like(lse)

    def queries(tile: Tile) -> None:
        programs, tiling = _tiling(tile, sizes, of_keys=False)
        tensors = (grad_out, q, k, v, weight, alpha, lse, delta, grad_q)
        layouts = map(strides, (grad_out, q, k, v, grad_q))
        _query_gradient_kernel[(programs * len(q),)](*tensors, *layouts, **sizes, **tiling)

    def keys(tile: Tile) -> None:
        programs, tiling = _tiling(tile, sizes, of_keys=True)
        programs *= len(q)
        parts = None if weight is None else lse.new_empty((programs, *weight.shape))
        tensors = (grad_out, q, k, v, weight, alpha, lse, delta, grad_k, grad_v, parts)
        layouts = map(strides, (grad_out, q, k, v, grad_k, grad_v))
        _key_gradient_kernel[(programs,)](*tensors, *layouts, **sizes, **tiling)
        if parts is not None:
            grad_position.copy_(parts.sum(0))

    _with_tile(queries, "queries", k, sizes)
    _with_tile(keys, "keys", k, sizes)
    if alpha is not None:
        grad_alpha.copy_(delta.sum())
    return grads


def _with_tile(run: Callable[[Tile], None], name: str, k: Tensor, sizes: dict[str, Any]) -> None:
    bytes_of_pixel = sizes["BLOCK_D"] * k.element_size()
    tile = choose_tile(bytes_of_pixel, sizes)
    if SEARCH:
        key = (name, k.device, k.dtype, k.stride(4) == 1, *sizes.values())
        tile = search(key, [tile, *candidates(bytes_of_pixel)], run)
    run(tile)
