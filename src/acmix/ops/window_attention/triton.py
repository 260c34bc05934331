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
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from acmix.ops._checks import check_shape
from acmix.ops._triton import (
    SEARCH,
    At,
    Sizes,
    Tile,
    View,
    least_dilation,
    load,
    padded_channels,
    precision,
    search,
    store,
    times_seen,
    unit,
    view,
)
from acmix.ops._windows import output_size
from acmix.ops.window_attention._fused import empty_gradients, empty_outputs

Opt = Tensor | None
LOG2_E = math.log2(math.e)
SHAPES = [(4, 4, 128, 2), (4, 4, 128, 4), (4, 4, 64, 1), (4, 8, 32, 4), (8, 8, 64, 4)]
CANDIDATES = [
    Tile(rows, columns, block, warps, heads=heads)
    for rows, columns, block, warps in SHAPES
    for heads in (1, 4)
]


@dataclass(frozen=True)
class Constants:
    """What a kernel is compiled for: the operator's sizes and, from ROWS on, those of a tile."""

    D: int
    BLOCK_D: int  # a head's channels and their padding
    WINDOW: int
    STRIDE: int
    DILATION: int
    ONCE: bool
    SCALE: float  # 1 / sqrt(d)
    SCALE_2: float  # of logits of base 2: log2(e) / sqrt(d)
    PRECISION: str
    ROWS: int = 0
    COLUMNS: int = 0
    HALO_ROWS: int = 0
    HALO_COLUMNS: int = 0
    HEADS: int = 0
    PIXELS: int = 0  # of the tile, at a time
    BLOCK: int = 0  # pixels of the halo, at a time; 1: without matrix products

    @property
    def parts(self) -> int:
        return self.ROWS * self.COLUMNS // self.PIXELS

    @property
    def halo(self) -> int:
        return self.HALO_ROWS * self.HALO_COLUMNS

    @property
    def exactly(self) -> Constants:
        return replace(self, PIXELS=16, BLOCK=1)


class Pixels(NamedTuple):
    """Where pixels stand, and which of them there are."""

    y: Any
    x: Any
    there: Any


class Program(NamedTuple):
    """What a program works on: an image, a head, its own pixels, the first pixel of the halo around
    its tile, and what bounds the queries among both."""

    batch: Any
    head: Any
    own: Pixels
    top: Any
    left: Any
    first_y: Any
    last_y: Any
    first_x: Any
    last_x: Any


class Keys(NamedTuple):
    """With their values."""

    k: View
    v: View
    position: Any


class Queries(NamedTuple):
    """With what the backward pass knows of them."""

    q: View
    grad_out: View
    lse: Any
    delta: Any


@triton.jit
def _around(start, side, out_side, OWN, HALO, OF_KEYS: tl.constexpr, C: tl.constexpr):
    """Along a side: where the halo of OWN pixels from `start` on begins, and the first and the last
    query. Queries that see a key by reflection stand no farther from it than those that see it
    directly."""
    reach: tl.constexpr = C.WINDOW // 2 * C.DILATION
    if OF_KEYS:
        halo = tl.minimum(tl.cdiv(tl.maximum(start - reach, 0), C.STRIDE), out_side - HALO)
        first, last = halo * C.STRIDE, (halo + HALO - 1) * C.STRIDE
    else:
        first, last = start * C.STRIDE, (start + OWN - 1) * C.STRIDE
        halo = tl.maximum(tl.minimum(first - reach, side - HALO), 0)
    return halo, first, last


@triton.jit
def _program(i, part, size, OF_KEYS: tl.constexpr, C: tl.constexpr):
    """The i-th head and a part of a tile: of keys, with the queries whose windows reach it in its
    halo, or of queries, with the keys that their windows reach. Neighbours in memory run together:
    heads, then tiles, then the batch."""
    if OF_KEYS:
        height, width = size.height, size.width
    else:
        height, width = size.out_height, size.out_width
    head_groups = tl.cdiv(size.heads, C.HEADS)
    down, across = tl.cdiv(height, C.ROWS), tl.cdiv(width, C.COLUMNS)
    head = tl.program_id(0) % head_groups * C.HEADS + i
    tile = tl.program_id(0) // head_groups
    batch = tile // (down * across)
    tile = tile % (down * across)
    row, column = tile // across * C.ROWS, tile % across * C.COLUMNS
    top, first_y, last_y = _around(
        row, size.height, size.out_height, C.ROWS, C.HALO_ROWS, OF_KEYS, C
    )
    left, first_x, last_x = _around(
        column, size.width, size.out_width, C.COLUMNS, C.HALO_COLUMNS, OF_KEYS, C
    )
    pixel = part * C.PIXELS + tl.arange(0, C.PIXELS)
    y, x = row + pixel // C.COLUMNS, column + pixel % C.COLUMNS
    own = Pixels(y, x, (y < height) & (x < width))
    return Program(batch, head, own, top, left, first_y, last_y, first_x, last_x)


@triton.jit
def _halo(program, start, C: tl.constexpr):
    """A block of the halo's pixels, from `start` on."""
    j = start + tl.arange(0, C.BLOCK)
    y, x = program.top + j // C.HALO_COLUMNS, program.left + j % C.HALO_COLUMNS
    return Pixels(y, x, j < C.halo)


@triton.jit
def _by_pixel(program, pixels, C: tl.constexpr):
    """Where a matrix of the head stands with a row a pixel and a column a channel."""
    c = tl.arange(0, C.BLOCK_D)[None, :]
    mask = pixels.there[:, None] & (c < C.D)
    return At(program.batch, program.head, c, pixels.y[:, None], pixels.x[:, None], mask)


@triton.jit
def _by_channel(program, pixels, C: tl.constexpr):
    """The same with a row a channel and a column a pixel."""
    c = tl.arange(0, C.BLOCK_D)[:, None]
    mask = (c < C.D) & pixels.there[None, :]
    return At(program.batch, program.head, c, pixels.y[None, :], pixels.x[None, :], mask)


@triton.jit
def _of_query(program, pixels, size):
    """Where the numbers of queries stand in lse and delta."""
    map_index = (program.batch.to(tl.int64) * size.heads + program.head) * size.out_height
    return (map_index + pixels.y) * size.out_width + pixels.x


@triton.jit
def _times(program, query_y, query_x, key_y, key_x, size, C: tl.constexpr):
    """How often queries see keys, pixels of the map both; a float."""
    down = times_seen(query_y, key_y, size.height, program.first_y, program.last_y, C)
    across = times_seen(query_x, key_x, size.width, program.first_x, program.last_x, C)
    return down * across


@triton.jit
def _load_keys(keys, at, size, C: tl.constexpr):
    """Keys less the position term, which is all of it that the softmax does not cancel."""
    k = load(keys.k, at)
    if keys.position is not None:
        weight, inside = keys.position + 2 * at.channel, at.channel < C.D
        px = tl.load(weight, mask=inside, other=0).to(tl.float32)
        py = tl.load(weight + 1, mask=inside, other=0).to(tl.float32)
        moved = k.to(tl.float32) - px * unit(at.column, size.width) - py * unit(at.row, size.height)
        k = moved.to(k.dtype)
    return k


@triton.jit
def _pairs(a, b, C: tl.constexpr):
    """a @ b: a number for each pair of a query and a key."""
    if C.BLOCK == 1:
        pairs = tl.sum(a.to(tl.float32) * tl.trans(b).to(tl.float32), 1)[:, None]
    else:
        pairs = tl.dot(a, b, input_precision=C.PRECISION)
    return pairs


@triton.jit
def _gather(sums, factors, times, b, C: tl.constexpr):
    """sums + factors @ b, of the pairs that see each other: of others the factor is 0, and blocks
    of 1 leave them out."""
    if C.BLOCK == 1:
        sums += tl.where(times > 0, factors * b.to(tl.float32), 0.0)
    else:
        sums = tl.dot(factors.to(b.dtype), b, sums, input_precision=C.PRECISION)
    return sums


@triton.jit
def _is_right(sums, C: tl.constexpr):
    """Not where a pair that does not see each other may have added 0 times infinity or NaN."""
    if C.BLOCK == 1:
        right: tl.constexpr = True
    else:
        right = tl.sum(sums * 0) == 0
    return right


@triton.jit
def _logits(program, q, keys, start, size, C: tl.constexpr):
    """A block of the halo's keys: their pixels, they, how often the queries see them, logits."""
    own, block = program.own, _halo(program, start, C)
    times = _times(
        program,
        (own.y * C.STRIDE)[:, None],
        (own.x * C.STRIDE)[:, None],
        tl.where(block.there, block.y, -(2**30))[None, :],
        block.x[None, :],
        size,
        C,
    )
    k = _load_keys(keys, _by_channel(program, block, C), size, C)
    return block, k, times, _pairs(q, k, C) * C.SCALE_2


@triton.jit
def _factor(alpha):
    return 1.0 if alpha is None else tl.load(alpha).to(tl.float32)


@triton.jit
def _attend(program, q, keys, size, C: tl.constexpr):
    """For each query its largest logit, the sum of the weights 2^(logit - largest), and that of
    their products with v."""
    largest = tl.full((C.PIXELS,), float("-inf"), tl.float32)
    total = tl.zeros((C.PIXELS,), tl.float32)
    sums = tl.zeros((C.PIXELS, C.BLOCK_D), tl.float32)
    for start in range(0, C.halo, C.BLOCK):
        block, _, times, logits = _logits(program, q, keys, start, size, C)
        logits = tl.where(times > 0, logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # no key yet
        weights = tl.exp2(logits - shift[:, None]) * times
        shrink = tl.exp2(largest - shift)
        values = load(keys.v, _by_pixel(program, block, C))
        total = total * shrink + tl.sum(weights, 1)
        sums = _gather(sums * shrink[:, None], weights, times, values, C)
        largest = larger
    return largest, total, sums


@triton.jit
def _forward(i, part, q, keys, mix, out, lse, size, C: tl.constexpr):
    program = _program(i, part, size, False, C)
    base, bias, alpha = mix
    own = _by_pixel(program, program.own, C)
    largest, total, sums = _attend(program, load(q, own), keys, size, C)
    right = _is_right(sums, C)
    if right:
        sums *= _factor(alpha) / total[:, None]
        if base is not None:
            sums += load(base, own).to(tl.float32)
        if bias is not None:
            sums += load(bias, own).to(tl.float32)
        store(out, own, sums)
        at = _of_query(program, program.own, size)
        tl.store(lse + at, largest + tl.log2(total), mask=program.own.there)
    return right


@triton.jit(noinline=True)
def _forward_exactly(i, q, keys, mix, out, lse, size, C: tl.constexpr):
    E: tl.constexpr = C.exactly
    for part in range(E.parts):
        _forward(i, part, q, keys, mix, out, lse, size, E)


@triton.jit
def _forward_kernel(q, keys, mix, out, lse, size, C: tl.constexpr):
    """out = base + bias + alpha * softmax(q k^T / sqrt(d), keys counted `times`) v."""
    for i in range(C.HEADS):
        if not _forward(i, 0, q, keys, mix, out, lse, size, C):
            _forward_exactly(i, q, keys, mix, out, lse, size, C)


@triton.jit
def _weights(times, logits, log_total):
    return tl.exp2(tl.where(times > 0, logits - log_total, float("-inf"))) * times


@triton.jit
def _probabilities(program, q, grads, log_total, keys, start, size, C: tl.constexpr):
    """A block of keys and values, how often and how much the queries look at each, and the
    gradients of that."""
    block, k, times, logits = _logits(program, q, keys, start, size, C)
    v = load(keys.v, _by_channel(program, block, C))
    weights = _weights(times, logits, log_total[:, None])
    grad_weights = _pairs(grads, v, C)
    if C.BLOCK == 1:
        grad_weights = tl.where(times > 0, grad_weights, 0.0)
    return k, v, times, weights, grad_weights


@triton.jit
def _query_sums(program, q, grads, log_total, keys, size, C: tl.constexpr):
    """For each query the average of its probabilities' gradients, the attention (by a block of 1
    only), and the sum of its logits' gradients times k."""
    ONE_BLOCK: tl.constexpr = C.BLOCK > 1 and C.halo <= C.BLOCK
    mean = tl.zeros((C.PIXELS,), tl.float32)
    attention = tl.zeros((C.PIXELS, C.BLOCK_D), tl.float32)
    if not ONE_BLOCK:  # the average comes first, in a loop of its own
        for start in range(0, C.halo, C.BLOCK):
            _, v, times, weights, grad_weights = _probabilities(
                program, q, grads, log_total, keys, start, size, C
            )
            mean += tl.sum(weights * grad_weights, 1)
            if C.BLOCK == 1:
                attention = _gather(attention, weights, times, tl.trans(v), C)
    sums = tl.zeros((C.PIXELS, C.BLOCK_D), tl.float32)
    for start in range(0, C.halo, C.BLOCK):
        k, _, times, weights, grad_weights = _probabilities(
            program, q, grads, log_total, keys, start, size, C
        )
        if ONE_BLOCK:
            mean = tl.sum(weights * grad_weights, 1)
        grad_logits = weights * (grad_weights - mean[:, None])
        sums = _gather(sums, grad_logits, times, tl.trans(k), C)
    return mean, attention, sums


@triton.jit
def _query_gradient(i, part, queries, keys, alpha, grad_q, size, C: tl.constexpr):
    program = _program(i, part, size, False, C)
    own, at = _by_pixel(program, program.own, C), _of_query(program, program.own, size)
    q, grads = load(queries.q, own), load(queries.grad_out, own)
    log_total = tl.load(queries.lse + at, mask=program.own.there, other=float("inf"))
    factor = _factor(alpha)
    if C.BLOCK == 1:
        scaled = grads.to(tl.float32) * factor
        _, attention, sums = _query_sums(program, q, scaled, log_total, keys, size, C)
        delta = tl.sum(attention * grads.to(tl.float32), 1)  # as alpha's gradient has it
        sums *= C.SCALE
    else:
        delta, _, sums = _query_sums(program, q, grads, log_total, keys, size, C)
        sums *= factor * C.SCALE
    right = _is_right(sums, C)
    if right:
        tl.store(queries.delta + at, delta, mask=program.own.there)
        store(grad_q, own, sums)
    return right


@triton.jit(noinline=True)
def _query_gradient_exactly(i, queries, keys, alpha, grad_q, size, C: tl.constexpr):
    E: tl.constexpr = C.exactly
    for part in range(E.parts):
        _query_gradient(i, part, queries, keys, alpha, grad_q, size, E)


@triton.jit
def _query_gradient_kernel(queries, keys, alpha, grad_q, size, C: tl.constexpr):
    """Fills grad_q and delta, in the tiles of the forward. delta is what the probabilities'
    gradients are on average for an alpha of 1, and so a query's part of alpha's gradient."""
    for i in range(C.HEADS):
        if not _query_gradient(i, 0, queries, keys, alpha, grad_q, size, C):
            _query_gradient_exactly(i, queries, keys, alpha, grad_q, size, C)


@triton.jit
def _key_sums(program, k, v, queries, factor, size, C: tl.constexpr):
    """For each key the sums of its logits' gradients times q, and of its probabilities times the
    output's gradients; for an alpha of 1, or by a block of 1 for this `factor`."""
    own = program.own
    sums_k = tl.zeros((C.PIXELS, C.BLOCK_D), tl.float32)
    sums_v = tl.zeros((C.PIXELS, C.BLOCK_D), tl.float32)
    for start in range(0, C.halo, C.BLOCK):
        block = _halo(program, start, C)
        times = _times(
            program,
            (block.y * C.STRIDE)[None, :],
            (block.x * C.STRIDE)[None, :],
            own.y[:, None],
            own.x[:, None],
            size,
            C,
        )
        by_pixel, at = _by_pixel(program, block, C), _of_query(program, block, size)
        q, grads = load(queries.q, by_pixel), load(queries.grad_out, by_pixel)
        log_total = tl.load(queries.lse + at, mask=block.there, other=float("inf"))
        mean = tl.load(queries.delta + at, mask=block.there, other=0)
        if C.BLOCK == 1:
            grads = grads.to(tl.float32) * factor
            mean = mean * factor + tl.sum(grads * 0, 1)  # no average of infinite gradients
        logits = _pairs(k, tl.trans(q), C) * C.SCALE_2
        weights = _weights(times, logits, log_total[None, :])
        sums_v = _gather(sums_v, weights, times, grads, C)
        grad_weights = _pairs(v, tl.trans(grads), C)
        grad_logits = weights * (grad_weights - mean[None, :])
        sums_k = _gather(sums_k, grad_logits, times, q, C)
    return sums_k, sums_v


@triton.jit
def _key_gradient(i, part, queries, keys, alpha, grad_k, grad_v, size, C: tl.constexpr):
    """With what the position weight's gradient is for these keys."""
    program = _program(i, part, size, True, C)
    own = _by_pixel(program, program.own, C)
    k, v = _load_keys(keys, own, size, C), load(keys.v, own)
    factor = _factor(alpha)
    sums_k, sums_v = _key_sums(program, k, v, queries, factor, size, C)
    if C.BLOCK > 1:
        sums_k *= factor
        sums_v *= factor
    right = _is_right(sums_k + sums_v, C)
    sums_k *= C.SCALE
    if right:
        store(grad_k, own, sums_k)
        store(grad_v, own, sums_v)
    grad_x = -tl.sum(sums_k * unit(own.column, size.width), 0)
    grad_y = -tl.sum(sums_k * unit(own.row, size.height), 0)
    return right, grad_x, grad_y


@triton.jit
def _store_position(grad_position, i, grad_x, grad_y, C: tl.constexpr):
    if grad_position is not None:
        c = tl.arange(0, C.BLOCK_D)
        part = tl.program_id(0).to(tl.int64) * C.HEADS + i
        at = grad_position + (part * C.D + c) * 2
        tl.store(at, grad_x, mask=c < C.D)
        tl.store(at + 1, grad_y, mask=c < C.D)


@triton.jit(noinline=True)
def _key_gradient_exactly(
    i, queries, keys, alpha, grad_k, grad_v, grad_position, size, C: tl.constexpr
):
    E: tl.constexpr = C.exactly
    grad_x = tl.zeros((C.BLOCK_D,), tl.float32)
    grad_y = tl.zeros((C.BLOCK_D,), tl.float32)
    for part in range(E.parts):
        _, x, y = _key_gradient(i, part, queries, keys, alpha, grad_k, grad_v, size, E)
        grad_x += x
        grad_y += y
    _store_position(grad_position, i, grad_x, grad_y, C)


@triton.jit
def _key_gradient_kernel(
    queries, keys, alpha, grad_k, grad_v, grad_position, size, C: tl.constexpr
):
    """Fills grad_k, grad_v and, for each program and head, a part of the position weight's
    gradient."""
    for i in range(C.HEADS):
        right, grad_x, grad_y = _key_gradient(i, 0, queries, keys, alpha, grad_k, grad_v, size, C)
        if right:
            _store_position(grad_position, i, grad_x, grad_y, C)
        else:
            _key_gradient_exactly(i, queries, keys, alpha, grad_k, grad_v, grad_position, size, C)


def choose_tile(bytes_of_pixel: int, size: Sizes, constants: Constants) -> Tile:
    """The tile for a head's (padded) bytes a pixel.

    Small tiles waste the least of a tile's dense products; a map of 8x8 or less is one tile. All
    keys of a window of 7 (10 x 10) stand in one block of 128 where registers and the 99 KiB of
    shared memory of an Ada GPU allow: the gradient of queries makes the probabilities once then,
    not twice. Chosen by the compiler's word, not yet by the clock; ACMIX_TRITON_SEARCH=1 times
    CANDIDATES beside them.
    """
    if bytes_of_pixel <= 256 and size.height <= 8 and size.width <= 8:
        return Tile(8, 8, 64, warps=8 if bytes_of_pixel == 256 else 4)
    if bytes_of_pixel <= 256:
        side = 3 * constants.STRIDE + (constants.WINDOW - 1) * constants.DILATION + 1
        keys = min(side, size.height) * min(side, size.width)
        warps = {32: 2, 64: 4, 128: 4, 256: 8}[bytes_of_pixel]
        # TF32 operands take more room than others of as many bytes.
        fits = keys <= 128 and (bytes_of_pixel < 256 or constants.PRECISION != "tf32")
        return Tile(4, 4, 128 if fits else 64, warps)
    return Tile(4, 4, 32 if bytes_of_pixel <= 512 else 16, warps=8)


def candidates(bytes_of_pixel: int) -> list[Tile]:
    """What a search tries: no blocks beyond 32 KiB, over which the compiler takes minutes."""
    return [t for t in CANDIDATES if max(t.rows * t.columns, t.block) * bytes_of_pixel <= 2**15]


def _describe(
    k: Tensor, out_size: torch.Size, window: int, stride: int, dilation: int
) -> tuple[Sizes, Constants]:
    """What every kernel is told of the operator."""
    size = Sizes(*k.shape[1:], *out_size)
    dilation = least_dilation(dilation, size.height, size.width)
    scale = 1 / math.sqrt(size.channels)
    return size, Constants(
        D=size.channels,
        BLOCK_D=padded_channels(size.channels),
        WINDOW=window,
        STRIDE=stride,
        DILATION=dilation,
        ONCE=window // 2 * dilation < min(size.height, size.width),
        SCALE=scale,
        SCALE_2=LOG2_E * scale,
        PRECISION=precision(k.dtype),
    )


def _tiling(tile: Tile, size: Sizes, constants: Constants, of_keys: bool) -> tuple[int, Constants]:
    """The number of programs an image, and the constants with a tile's, of keys or of queries."""
    reach, stride = constants.WINDOW // 2 * constants.DILATION, constants.STRIDE
    sides = tile.rows, tile.columns
    maps = (size.height, size.width), (size.out_height, size.out_width)
    if of_keys:
        own, around = maps
        halo = [(side - 1 + 2 * reach) // stride + 1 for side in sides]
    else:
        around, own = maps
        halo = [(side - 1) * stride + 2 * reach + 1 for side in sides]
    halo = [min(side, length) for side, length in zip(halo, around, strict=True)]
    heads = math.gcd(tile.heads, size.heads)
    constants = replace(
        constants,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        HALO_ROWS=halo[0],
        HALO_COLUMNS=halo[1],
        BLOCK=min(tile.block, max(16, triton.next_power_of_2(halo[0] * halo[1]))),
        HEADS=heads,
        PIXELS=tile.rows * tile.columns,
    )
    tiles = triton.cdiv(own[0], tile.rows) * triton.cdiv(own[1], tile.columns)
    return tiles * (size.heads // heads), constants


def _check(k: Tensor, sizes: tuple[int, ...], alpha: Opt, **tensors: Opt) -> None:
    """An operator may be called by itself: ValueError for what does not fit, nothing is read."""
    batch, heads, head_dim, *side = k.shape
    _, stride, _ = sizes
    out_side = [output_size(length, stride) for length in side]
    by_query = (batch, heads, head_dim, *out_side)
    shapes = {
        **dict.fromkeys(("q", "base", "grad_out"), by_query),
        "v": k.shape,
        "position": (head_dim, 2),
        "alpha": (1,) * (alpha is not None and alpha.dim() > 0),
        "lse": (batch, heads, *out_side),
    }
    for name, tensor in {**tensors, "alpha": alpha}.items():
        if tensor is not None:
            check_shape(name, tensor, shapes[name])


def forward(
    q: Tensor, k: Tensor, v: Tensor, base: Opt, bias: Opt, position: Opt, alpha: Opt, *sizes: int
) -> tuple[Tensor, Tensor]:
    """The kernel of acmix::window_attention: out (B, N, d, Ho, Wo) and lse (B, N, Ho, Wo)."""
    out, lse = empty_outputs(q, v)
    if out.numel() == 0:
        return out, lse
    _check(k, sizes, alpha, q=q, v=v, base=base, position=position)
    weight = None if position is None else position.contiguous()
    bias = None if bias is None else bias.expand(q.shape)
    size, constants = _describe(k, q.shape[3:], *sizes)
    keys = Keys(view(k), view(v), weight)
    mix = *(None if x is None else view(x) for x in (base, bias)), alpha

    def run(tile: Tile) -> None:
        programs, tiled = _tiling(tile, size, constants, of_keys=False)
        _forward_kernel[(programs * len(q),)](
            view(q), keys, mix, view(out), lse, size, tiled, **tile.options
        )

    _with_tile(run, "forward", k, size, constants)
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Opt,
    alpha: Opt,
    lse: Tensor,
    *sizes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernels of acmix::window_attention_backward."""
    grads = empty_gradients(q, k, v, position, alpha)
    grad_q, grad_k, grad_v, grad_position, grad_alpha = grads
    if q.numel() == 0:
        grad_position.zero_()
        grad_alpha.zero_()
        return grads
    _check(k, sizes, alpha, q=q, v=v, grad_out=grad_out, position=position, lse=lse)
    weight = None if position is None else position.contiguous()
    size, constants = _describe(k, q.shape[3:], *sizes)
    delta = torch.empty_like(lse)
    inputs = Queries(view(q), view(grad_out), lse, delta), Keys(view(k), view(v), weight), alpha

    def of_queries(tile: Tile) -> None:
        programs, tiled = _tiling(tile, size, constants, of_keys=False)
        _query_gradient_kernel[(programs * len(q),)](
            *inputs, view(grad_q), size, tiled, **tile.options
        )

    def of_keys(tile: Tile) -> None:
        programs, tiled = _tiling(tile, size, constants, of_keys=True)
        programs *= len(q)
        heads = programs * tiled.HEADS
        parts = None if weight is None else lse.new_empty((heads, *weight.shape))
        _key_gradient_kernel[(programs,)](
            *inputs, view(grad_k), view(grad_v), parts, size, tiled, **tile.options
        )
        if parts is not None:
            grad_position.copy_(parts.sum(0))

    _with_tile(of_queries, "queries", k, size, constants)
    _with_tile(of_keys, "keys", k, size, constants)
    if alpha is not None:
        grad_alpha.copy_(delta.sum())
    return grads


def _with_tile(
    run: Callable[[Tile], None], name: str, k: Tensor, size: Sizes, constants: Constants
) -> None:
    bytes_of_pixel = constants.BLOCK_D * k.element_size()
    tile = choose_tile(bytes_of_pixel, size, constants)
    if SEARCH:
        key = (name, k.device, k.dtype, k.stride(4) == 1, size, constants)
        tile = search(key, [tile, *candidates(bytes_of_pixel)], run)
    run(tile)
