"""Weighted aggregation by Triton kernels: float16, bfloat16 and float32 of any strides.

A program takes a tile of pixels, `GROUP` weights of each and the channels that share them, `EACH`
at a time, and goes over the taps. There is nothing here for a matrix unit: the bound is the memory,
where the weights, window^2 a pixel, are the most of it; each is read once for up to 8 channels,
those of SAN. Sums are in float32; the gradient of v is gathered, over the windows that show a
pixel, in a fixed order.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from acmix.ops._checks import check_shape
from acmix.ops._triton import At, Sizes, least_dilation, load, reflect, store, view
from acmix.ops._windows import output_size
from acmix.ops.weighted_aggregation._fused import empty_output

ELEMENTS = 1024  # of a program's block


@dataclass(frozen=True)
class Constants:
    """What a kernel is compiled for: the operator's sizes and those of a program's block."""

    WINDOW: int
    STRIDE: int
    DILATION: int
    ROWS: int
    COLUMNS: int
    GROUP: int  # weights
    EACH: int  # channels that share one

    @property
    def PIXELS(self) -> int:
        return self.ROWS * self.COLUMNS


class Block(NamedTuple):
    """A program's image and, in the shape (pixels, weights, channels) of a block, its weights, rows
    and columns, and which of them there are."""

    batch: Any
    group: Any
    row: Any
    column: Any
    there: Any


@triton.jit
def _block(height, width, size, C: tl.constexpr):
    """A program's block of a map."""
    program = tl.program_id(0)
    groups = tl.cdiv(size.heads, C.GROUP)
    down, across = tl.cdiv(height, C.ROWS), tl.cdiv(width, C.COLUMNS)
    tile = program // groups
    batch = tile // (down * across)
    tile = tile % (down * across)
    pixel = tl.arange(0, C.PIXELS)[:, None, None]
    row = tile // across * C.ROWS + pixel // C.COLUMNS
    column = tile % across * C.COLUMNS + pixel % C.COLUMNS
    group = program % groups * C.GROUP + tl.arange(0, C.GROUP)[None, :, None]
    there = (row < height) & (column < width) & (group < size.heads)
    return Block(batch, group, row, column, there)


@triton.jit
def _weights(block, tap):
    """Where a block's weights for a tap stand, and their gradients."""
    tap += tl.zeros((1, 1, 1), tl.int32)
    return At(block.batch, block.group, tap, block.row, block.column, block.there)


@triton.jit
def _channels(block, start, size, C: tl.constexpr):
    """Where a block's outputs stand, of the channels from `start` on."""
    channel = start + tl.arange(0, C.EACH)[None, None, :]
    there = block.there & (channel < size.channels)
    return At(block.batch, block.group, channel, block.row, block.column, there)


@triton.jit
def _shown(at, tap, size, C: tl.constexpr):
    """Where stands what the windows around a block's outputs show at a tap."""
    y = at.row * C.STRIDE + (tap // C.WINDOW - C.WINDOW // 2) * C.DILATION
    x = at.column * C.STRIDE + (tap % C.WINDOW - C.WINDOW // 2) * C.DILATION
    y, x = reflect(y, size.height), reflect(x, size.width)
    return At(at.batch, at.head, at.channel, y, x, at.mask)


@triton.jit
def _forward_kernel(weight, v, out, size, C: tl.constexpr):
    block = _block(size.out_height, size.out_width, size, C)
    for start in range(0, size.channels, C.EACH):
        at = _channels(block, start, size, C)
        sums = tl.full((C.PIXELS, C.GROUP, C.EACH), 0.0, tl.float32)
        for tap in range(C.WINDOW * C.WINDOW):
            factors = load(weight, _weights(block, tap))
            values = load(v, _shown(at, tap, size, C))
            sums += factors.to(tl.float32) * values.to(tl.float32)
        store(out, at, sums)


@triton.jit
def _weight_gradient_kernel(grad_out, v, grad_weight, size, C: tl.constexpr):
    block = _block(size.out_height, size.out_width, size, C)
    for tap in range(C.WINDOW * C.WINDOW):
        sums = tl.full((C.PIXELS, C.GROUP, 1), 0.0, tl.float32)
        for start in range(0, size.channels, C.EACH):
            at = _channels(block, start, size, C)
            grads, values = load(grad_out, at), load(v, _shown(at, tap, size, C))
            products = grads.to(tl.float32) * values.to(tl.float32)
            sums += tl.sum(products, 2, keep_dims=True)
        store(grad_weight, _weights(block, tap), sums)


@triton.jit
def _image(pixel, number, size):
    """Where a pixel's `number`-th reflection stands beyond the map (0: itself), and whether that is
    another place than those of the even numbers."""
    last = tl.maximum(size - 1, 1)
    single = tl.where(size == 1, 1, 0)
    odd = (number & 1) == 1
    at = tl.where(odd, (number + 1) * last - pixel - single, number * last + pixel)
    return at, ~odd | (size == 1) | ((pixel > 0) & (pixel < size - 1))


@triton.jit
def _images(first, last, size, reach):
    """The least and the largest number of a reflection that windows show of pixels first..last."""
    most = reach // tl.maximum(size - 1, 1) + 1
    return tl.where(first <= reach, -most, 0), tl.where(last >= size - 1 - reach, most, 0)


@triton.jit
def _shows(first, last, number, size, offset, end):
    """Whether a window on 0..end may have that reflection of pixels first..last at its offset."""
    at_first, _ = _image(first, number, size)
    at_last, _ = _image(last, number, size)
    at_first, at_last = at_first - offset, at_last - offset
    return (tl.maximum(at_first, at_last) >= 0) & (tl.minimum(at_first, at_last) <= end)


@triton.jit
def _window(pixel, number, size, offset, end, C: tl.constexpr):
    """The window on 0..end that has that reflection of a pixel at its offset, and whether there is
    one."""
    at, other = _image(pixel, number, size)
    at -= offset
    return at // C.STRIDE, other & (at >= 0) & (at <= end) & (at % C.STRIDE == 0)


@triton.jit
def _value_gradient_kernel(grad_out, weight, grad_v, size, C: tl.constexpr):
    """Over a pixel's reflections, and for each over the taps: the window that has it there."""
    block = _block(size.height, size.width, size, C)
    reach: tl.constexpr = C.WINDOW // 2 * C.DILATION
    top, bottom = tl.min(block.row), tl.minimum(tl.max(block.row), size.height - 1)
    left, right = tl.min(block.column), tl.minimum(tl.max(block.column), size.width - 1)
    end_y, end_x = (size.out_height - 1) * C.STRIDE, (size.out_width - 1) * C.STRIDE
    least_y, most_y = _images(top, bottom, size.height, reach)
    least_x, most_x = _images(left, right, size.width, reach)
    for start in range(0, size.channels, C.EACH):
        at = _channels(block, start, size, C)
        sums = tl.full((C.PIXELS, C.GROUP, C.EACH), 0.0, tl.float32)
        for i in range((most_y - least_y + 1) * C.WINDOW):
            image_y, dy = least_y + i // C.WINDOW, i % C.WINDOW
            offset_y = (dy - C.WINDOW // 2) * C.DILATION
            if _shows(top, bottom, image_y, size.height, offset_y, end_y):
                y, shown_y = _window(block.row, image_y, size.height, offset_y, end_y, C)
                for j in range((most_x - least_x + 1) * C.WINDOW):
                    image_x, dx = least_x + j // C.WINDOW, j % C.WINDOW
                    offset_x = (dx - C.WINDOW // 2) * C.DILATION
                    if _shows(left, right, image_x, size.width, offset_x, end_x):
                        x, shown_x = _window(block.column, image_x, size.width, offset_x, end_x, C)
                        there = block.there & shown_y & shown_x
                        window = Block(block.batch, block.group, y, x, there)
                        factors = load(weight, _weights(window, dy * C.WINDOW + dx))
                        grads = load(grad_out, _channels(window, start, size, C))
                        sums += factors.to(tl.float32) * grads.to(tl.float32)
        store(grad_v, at, sums)


def _launch(
    kernel: Any, of_output: bool, v: Tensor, out: Tensor, sizes: tuple[int, ...], *tensors: Tensor
) -> None:
    """Runs a kernel on tiles of output pixels or of v's, whichever it fills."""
    window, stride, dilation = sizes
    batch, shared, channels, height, width = v.shape
    filled = out if of_output else v
    # Weights side by side in memory share a program; in a row-major map, pixels do.
    group = 16 if filled.stride(1) < filled.stride(4) else 1
    each = min(triton.next_power_of_2(channels), 8)
    columns = 16 if group == 1 else 4
    rows = max(1, ELEMENTS // (group * each * columns))
    programs = triton.cdiv(filled.shape[3], rows) * triton.cdiv(filled.shape[4], columns)
    programs *= batch * triton.cdiv(shared, group)
    size = Sizes(*v.shape[1:], *out.shape[3:])
    dilation = least_dilation(dilation, height, width)
    constants = Constants(window, stride, dilation, rows, columns, group, each)
    kernel[(programs,)](*map(view, tensors), size, constants, num_warps=4)


def _check(weight: Tensor, v: Tensor, out: Tensor, window: int, stride: int) -> None:
    """An operator may be called by itself: ValueError for what does not fit, nothing is read."""
    batch, shared, channels, *side = v.shape
    out_side = [output_size(length, stride) for length in side]
    check_shape("weight", weight, (batch, shared, window**2, *out_side))
    check_shape("grad_out", out, (batch, shared, channels, *out_side))


def forward(weight: Tensor, v: Tensor, window: int, stride: int, dilation: int) -> Tensor:
    """The kernel of acmix::weighted_aggregation: (B, Cw, C / Cw, Ho, Wo)."""
    out = empty_output(weight, v)
    _check(weight, v, out, window, stride)
    if out.numel():
        _launch(_forward_kernel, True, v, out, (window, stride, dilation), weight, v, out)
    return out


def backward(
    grad_out: Tensor, weight: Tensor, v: Tensor, window: int, stride: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """The kernel of acmix::weighted_aggregation_backward: the gradients of weight and v."""
    _check(weight, v, grad_out, window, stride)
    grad_weight, grad_v = torch.empty_like(weight), torch.empty_like(v)
    sizes = (window, stride, dilation)
    if v.numel():
        tensors = grad_out, v, grad_weight
        _launch(_weight_gradient_kernel, True, v, grad_out, sizes, *tensors)
        _launch(_value_gradient_kernel, False, v, grad_out, sizes, grad_out, weight, grad_v)
    return grad_weight, grad_v
