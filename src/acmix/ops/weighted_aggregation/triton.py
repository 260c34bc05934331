"""Weighted aggregation by Triton kernels: float16, bfloat16 and float32 of any strides.

A program takes a tile of pixels, `GROUP` weights of each and the channels that share them, `EACH`
at a time, and goes over the taps. There is nothing here for a matrix unit: the bound is the memory,
where the weights, window^2 a pixel, are the most of it; each is read once for up to 8 channels,
those of SAN. Sums are in float32; the gradient of v is gathered, over the windows that show a
pixel, in a fixed order.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from acmix.ops._checks import check_shape
from acmix.ops._triton import least_dilation, load, reflect, store, strides
from acmix.ops._windows import output_size
from acmix.ops.weighted_aggregation._fused import empty_output

ELEMENTS = 1024  # of a program's block


@triton.jit
def _block(height, width, shared, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """A program's batch and, in the shape (pixels, weights, channels) of a block, its rows, columns
    and weights, and which of them there are."""
    program = tl.program_id(0)
    groups = tl.cdiv(shared, GROUP)
    down, across = tl.cdiv(height, ROWS), tl.cdiv(width, COLUMNS)
    tile = program // groups
    batch = tile // (down * across)
    tile = tile % (down * across)
    pixel = tl.arange(0, ROWS * COLUMNS)[:, None, None]
    row = tile // across * ROWS + pixel // COLUMNS
    column = tile % across * COLUMNS + pixel % COLUMNS
    group = program % groups * GROUP + tl.arange(0, GROUP)[None, :, None]
    return batch, row, column, group, (row < height) & (column < width) & (group < shared)


@triton.jit
def _forward_kernel(
    weight,
    v,
    out,
    weight_strides,
    v_strides,
    out_strides,
    shared,
    channels,
    height,
    width,
    out_height,
    out_width,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    EACH: tl.constexpr,
):
    batch, row, column, group, there = _block(out_height, out_width, shared, ROWS, COLUMNS, GROUP)
    for start in range(0, channels, EACH):
        channel = start + tl.arange(0, EACH)[None, None, :]
        filled = there & (channel < channels)
        sums = tl.zeros((ROWS * COLUMNS, GROUP, EACH), tl.float32)
        for t in range(WINDOW * WINDOW):
            tap = t + tl.zeros((1, 1, 1), tl.int32)
            y = reflect(row * STRIDE + (tap // WINDOW - WINDOW // 2) * DILATION, height)
            x = reflect(column * STRIDE + (tap % WINDOW - WINDOW // 2) * DILATION, width)
            factors = load(weight, weight_strides, batch, group, tap, row, column, there)
            values = load(v, v_strides, batch, group, channel, y, x, filled)
            sums += factors.to(tl.float32) * values.to(tl.float32)
        store(out, out_strides, batch, group, channel, row, column, sums, filled)


@triton.jit
def _weight_gradient_kernel(
    grad_out,
    v,
    grad_weight,
    grad_strides,
    v_strides,
    grad_weight_strides,
    shared,
    channels,
    height,
    width,
    out_height,
    out_width,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    EACH: tl.constexpr,
):
    batch, row, column, group, there = _block(out_height, out_width, shared, ROWS, COLUMNS, GROUP)
    for t in range(WINDOW * WINDOW):
        tap = t + tl.zeros((1, 1, 1), tl.int32)
        y = reflect(row * STRIDE + (tap // WINDOW - WINDOW // 2) * DILATION, height)
        x = reflect(column * STRIDE + (tap % WINDOW - WINDOW // 2) * DILATION, width)
        sums = tl.zeros((ROWS * COLUMNS, GROUP, 1), tl.float32)
        for start in range(0, channels, EACH):
            channel = start + tl.arange(0, EACH)[None, None, :]
            filled = there & (channel < channels)
            grads = load(grad_out, grad_strides, batch, group, channel, row, column, filled)
            values = load(v, v_strides, batch, group, channel, y, x, filled)
            products = grads.to(tl.float32) * values.to(tl.float32)
            sums += tl.sum(products, 2, keep_dims=True)
        store(grad_weight, grad_weight_strides, batch, group, tap, row, column, sums, there)


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
def _value_gradient_kernel(
    grad_out,
    weight,
    grad_v,
    grad_strides,
    weight_strides,
    grad_v_strides,
    shared,
    channels,
    height,
    width,
    out_height,
    out_width,
    WINDOW: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    EACH: tl.constexpr,
):
    """Over a pixel's reflections, and for each over the taps: the window that has it there."""
    batch, row, column, group, there = _block(height, width, shared, ROWS, COLUMNS, GROUP)
    reach: tl.constexpr = WINDOW // 2 * DILATION
    top, bottom = tl.min(row), tl.minimum(tl.max(row), height - 1)
    left, right = tl.min(column), tl.minimum(tl.max(column), width - 1)
    end_y, end_x = (out_height - 1) * STRIDE, (out_width - 1) * STRIDE
    least_y, most_y = _images(top, bottom, height, reach)
    least_x, most_x = _images(left, right, width, reach)
    for start in range(0, channels, EACH):
        channel = start + tl.arange(0, EACH)[None, None, :]
        filled = there & (channel < channels)
        sums = tl.zeros((ROWS * COLUMNS, GROUP, EACH), tl.float32)
        for i in range((most_y - least_y + 1) * WINDOW):
            image_y, dy = least_y + i // WINDOW, i % WINDOW
            offset_y = (dy - WINDOW // 2) * DILATION
            if _shows(top, bottom, image_y, height, offset_y, end_y):
                y, other_y = _image(row, image_y, height)
                y -= offset_y
                shown_y = other_y & (y >= 0) & (y <= end_y) & (y % STRIDE == 0)
                for j in range((most_x - least_x + 1) * WINDOW):
                    image_x, dx = least_x + j // WINDOW, j % WINDOW
                    offset_x = (dx - WINDOW // 2) * DILATION
                    if _shows(left, right, image_x, width, offset_x, end_x):
                        x, other_x = _image(column, image_x, width)
                        x -= offset_x
                        shown_x = other_x & (x >= 0) & (x <= end_x) & (x % STRIDE == 0)
                        tap = dy * WINDOW + dx + tl.zeros((1, 1, 1), tl.int32)
                        at_y, at_x = y // STRIDE, x // STRIDE
                        there_w, there_g = there & shown_y & shown_x, filled & shown_y & shown_x
                        factors = load(
                            weight, weight_strides, batch, group, tap, at_y, at_x, there_w
                        )
                        grads = load(
                            grad_out, grad_strides, batch, group, channel, at_y, at_x, there_g
                        )
                        sums += factors.to(tl.float32) * grads.to(tl.float32)
        store(grad_v, grad_v_strides, batch, group, channel, row, column, sums, filled)


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
    kernel[(programs,)](
        *tensors,
        *map(strides, tensors),
        shared,
        channels,
        height,
        width,
        *out.shape[3:],
        WINDOW=window,
        STRIDE=stride,
        DILATION=least_dilation(dilation, height, width),
        ROWS=rows,
        COLUMNS=columns,
        GROUP=group,
        EACH=each,
        num_warps=4,
    )


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
