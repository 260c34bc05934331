"""What the Triton kernels share: places in 5-D tensors, windows along a side, sizes of tiles.

Written for Triton's own language, nothing of one vendor. What belongs together is one NamedTuple,
inside kernels and outside. Offsets are 64-bit: a batch may exceed 2^31 elements.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from acmix.ops._library import INTERPRETED

SEARCH = os.environ.get("ACMIX_TRITON_SEARCH") == "1" and not INTERPRETED
_found: dict[Hashable, Tile] = {}


@dataclass(frozen=True)
class Tile:
    """What a program works on: `rows` x `columns` of its own pixels, the pixels around them in
    blocks of `block`, one after the other for `heads` heads (or a divisor that divides theirs).

    Powers of two all; rows * columns and block are 16 at least, a matrix unit's side.
    """

    rows: int
    columns: int
    block: int
    warps: int
    stages: int = 2
    heads: int = 1

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


class Sizes(NamedTuple):
    """What a kernel learns of the maps when it runs: k's or v's without the batch, and the sides of
    the output."""

    heads: int
    channels: int  # of a head
    height: int
    width: int
    out_height: int
    out_width: int


class View(NamedTuple):
    """A tensor (B, N, d, H, W) as a kernel takes it."""

    pointer: Any
    strides: Any


class At(NamedTuple):
    """Indices into a View, which broadcast against one another, and which of them are meant."""

    batch: Any
    head: Any
    channel: Any
    row: Any
    column: Any
    mask: Any


@triton.jit
def _places(view, at):
    strides = view.strides
    start = view.pointer + at.batch.to(tl.int64) * strides[0] + at.head.to(tl.int64) * strides[1]
    pixel = at.row.to(tl.int64) * strides[3] + at.column.to(tl.int64) * strides[4]
    return start + (pixel + at.channel.to(tl.int64) * strides[2])


@triton.jit
def load(view, at):
    """Elements, zeros outside the mask."""
    return tl.load(_places(view, at), mask=at.mask, other=0)


@triton.jit
def store(view, at, values):
    tl.store(_places(view, at), values.to(view.pointer.dtype.element_ty), mask=at.mask)


@triton.jit
def reflect(index, size):
    """As `numpy.pad(mode="reflect")`: again and again where the map is small."""
    period = tl.maximum(2 * (size - 1), 1)
    index = tl.abs(index) % period
    return tl.where(index < size, index, period - index)


@triton.jit
def times_seen(query, key, size, first, last, C: tl.constexpr):
    """How often the window around pixel `query` shows `key`, along one side; C has its WINDOW,
    DILATION and ONCE.

    `first` and `last` bound the queries. Where no window of theirs leaves the map, that is a test;
    at the border the reflected taps are counted. `ONCE`: no tap is so far out that its reflection
    is reflected again, which spares a division.
    """
    WINDOW: tl.constexpr = C.WINDOW
    reach: tl.constexpr = WINDOW // 2 * C.DILATION
    if (first >= reach) & (last + reach < size):
        offset = key - query
        seen = (offset >= -reach) & (offset <= reach)
        if C.DILATION > 1:
            seen = seen & (offset % C.DILATION == 0)
        times = seen.to(tl.float32)
    else:
        times = (key - query).to(tl.float32) * 0
        for tap in tl.static_range(WINDOW):
            shown = query + (tap - WINDOW // 2) * C.DILATION
            if C.ONCE:
                shown = tl.abs(shown)
                shown = tl.minimum(shown, 2 * (size - 1) - shown)
            else:
                shown = reflect(shown, size)
            times += (shown == key).to(tl.float32)
    return times


@triton.jit
def unit(index, size):
    """The coordinate from -1 to 1 over the map; that of a single pixel is -1."""
    return index.to(tl.float32) * (2 / tl.maximum(size - 1, 1).to(tl.float32)) - 1


def view(tensor: Tensor) -> View:
    return View(tensor, tensor.stride())


def least_dilation(dilation: int, height: int, width: int) -> int:
    """The smallest dilation whose taps show the same pixels: reflection repeats itself."""
    period = math.lcm(max(2 * (height - 1), 1), max(2 * (width - 1), 1))
    return (dilation - 1) % period + 1


def padded_channels(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))


def precision(dtype: torch.dtype) -> str:
    """Of products: of float32 the user's choice for every other matrix product."""
    if dtype != torch.float32 or torch.version.hip:  # few of AMD's GPUs have TF32
        return "ieee"
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # from PyTorch 2.9, where reading the other may raise
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


def search(key: Hashable, tiles: list[Tile], run: Callable[[Tile], None]) -> Tile:
    """The fastest of the tiles, timed at the first call for a key; a second or two a tile, most of
    it the compiler's. A tile that does not compile, or asks for more than the GPU has, is left out.
    """
    if key not in _found:
        times = {}
        for tile in tiles:
            with contextlib.suppress(TritonError):
                times[tile] = triton.testing.do_bench(lambda tile=tile: run(tile), 2, 20)
        _found[key] = min(times, key=lambda tile: times[tile], default=tiles[0])
    return _found[key]
