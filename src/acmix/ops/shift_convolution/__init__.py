"""A k x k convolution made of 1x1 pieces that are mixed, shifted and summed."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from acmix.ops import _checks, _flops
from acmix.ops._autocast import autocast, check_kinds
from acmix.ops._dispatch import choose
from acmix.ops.shift_convolution import _path, native, reference, tiled
from acmix.ops.shift_convolution._path import Folded, Read, multiply_adds
from acmix.ops.shift_convolution.folded import Projection

IMPLEMENTATIONS = {"reference": reference, "tiled": tiled, "native": native, "triton": tiled}


def shift_convolution(
    pieces: Tensor,
    fc_weight: Tensor,
    shift_weight: Tensor,
    *,
    fc_bias: Tensor | None = None,
    stride: int = 1,
    dilation: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Convolution path of ACmix: channel c of every piece is mixed by `fc`, shifted and summed.

    `f[t, c] = sum_j fc_weight[t, j] * pieces[j, c] + fc_bias[t]`, then a convolution with d groups
    (k^2 in, M out), zero padding (Pan et al., CVPR 2022, Sec. 4.2).

    Args:
        pieces: (B, J, d, H, W): J pieces of d channels, of any strides. The ResNet form of ACmix
            has J = 3N: the heads of q, of k and of v.
        fc_weight: (k^2, J), shared by pixels and channels.
        shift_weight: (d * M, k^2, k, k), k odd; `shift_kernels` gives the pure shifts.
        fc_bias: (k^2), or None.
        stride, dilation: of the group convolution, in pixels; padding is dilation * (k // 2).
        backend: "auto", "reference" (the two steps one after the other), "tiled" (folded into one
            group convolution, exactly and cheaper), "native" (the same by the CPU kernel) or
            "triton"; see `acmix.ops.backends`.

    Returns:
        (B, d * M, ceil(H / stride), ceil(W / stride)), d-major: channel c * M + m.

    Raises:
        ValueError: for a wrong rank, shape, stride, dilation or backend, and for a forced backend
            that cannot run here.
        TypeError: for integer or complex tensors and mixed dtypes; under autocast the pieces and
            the weights may differ.
    """
    _checks.check_positive("stride", stride)
    _checks.check_positive("dilation", dilation)
    _checks.check_dtype("pieces", pieces)
    if pieces.dim() != 5:
        raise ValueError(
            f"pieces: expected 5 dimensions (B, J, d, H, W), got shape {tuple(pieces.shape)}"
        )
    if min(pieces.shape[1:]) < 1:
        raise ValueError(f"pieces: expected no empty side, got shape {tuple(pieces.shape)}")
    _checks.check_dtype("shift_weight", shift_weight)
    if shift_weight.dim() != 4:
        raise ValueError(
            "shift_weight: expected 4 dimensions (d * M, k^2, k, k), "
            f"got shape {tuple(shift_weight.shape)}"
        )
    channels, _, side, _ = shift_weight.shape
    _checks.check_window("shift_weight: k", side)
    _checks.check_shape("shift_weight", shift_weight, (channels, side * side, side, side))
    _checks.check_divisible("shift_weight: channels", channels, "d", pieces.shape[2])
    _checks.check_shape("fc_weight", fc_weight, (side * side, pieces.shape[1]))
    weights = {"fc_weight": fc_weight, "shift_weight": shift_weight}
    if fc_bias is not None:
        _checks.check_shape("fc_bias", fc_bias, (side * side,))
        weights["fc_bias"] = fc_bias
    check_kinds(pieces=pieces, **weights)
    _checks.check_same_kind(**weights)
    (pieces,) = autocast(pieces)
    implementation = choose(backend, IMPLEMENTATIONS, pieces, fc_weight, shift_weight)
    repeats = channels // pieces.shape[2]

    def run(pieces: Tensor, fc_weight: Tensor, kernels: Tensor, fc_bias: Tensor | None) -> Tensor:
        if implementation is reference:
            return reference.forward(pieces, fc_weight, kernels, fc_bias, stride, dilation)
        path = _path.fold([], fc_weight, kernels, fc_bias, dense=False, repeats=repeats)
        return _run(path, implementation, lambda dense: pieces, stride, dilation)

    return _flops.counted(
        run,
        lambda: _flops.of_products(
            multiply_adds(pieces, pieces.shape[2], repeats, fc_weight, shift_weight, stride)
        ),
        pieces,
        fc_weight,
        shift_weight,
        fc_bias,
    )


def convolve_projections(
    x: Tensor,
    read: Read,
    projections: Sequence[Projection],
    fc_weight: Tensor,
    kernels: Tensor | None,
    fc_bias: Tensor | None,
    repeats: int,
    backend: str,
) -> Tensor:
    """The path of a layer on maps like x, in the form that the backend prefers: (B, C, H, W)."""
    implementation = choose(backend, IMPLEMENTATIONS, x, fc_weight)
    by_definition = implementation is reference and kernels is not None
    dense = kernels is not None and implementation.dense(x)

    def run(source: Tensor, fc_weight: Tensor, kernels: Any, fc_bias: Any, *parts: Any) -> Tensor:
        if by_definition:
            return reference.forward(source, fc_weight, kernels, fc_bias, 1, 1)
        pairs = list(zip(parts[::2], parts[1::2], strict=True))
        path = _path.fold(pairs, fc_weight, kernels, fc_bias, dense=dense, repeats=repeats)
        return _run(path, implementation, lambda _: source)

    parts = [part for pair in projections for part in pair]
    head_dim = projections[0][0].shape[1]
    source = read(dense)
    return _flops.counted(
        run,
        lambda: _flops.of_products(multiply_adds(source, head_dim, repeats, fc_weight, kernels, 1)),
        source,
        fc_weight,
        kernels,
        fc_bias,
        *parts,
    )


def convolve_folded(x: Tensor, read: Read, weights: Folded, backend: str) -> Tensor:
    """The same of weights that were folded once, for inference."""
    return _run(weights, choose(backend, IMPLEMENTATIONS, x), read)


def fold(
    backend: str,
    like: Tensor,
    projections: Sequence[Projection],
    fc_weight: Tensor,
    kernels: Tensor | None,
    fc_bias: Tensor | None,
    repeats: int,
    one_kernel: bool = False,
) -> Folded:
    """The weights of a layer's path in the form for the device that holds `like`.

    one_kernel: fc is folded even where two steps take fewer operations.
    """
    dense = choose(backend, IMPLEMENTATIONS, like).dense(like)
    weights = projections, fc_weight, kernels, fc_bias
    return _path.fold(*weights, dense=dense, repeats=repeats, one_kernel=one_kernel)


def _run(weights: Folded, implementation: ModuleType, read: Read, *steps: int) -> Tensor:
    out, bias = _path.run(weights, implementation.convolve, read, *steps)
    return out if bias is None else out + bias


def shift_kernels(
    channels: int,
    kernel_size: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Kernels that shift piece t by tap t and sum, for each of `channels` outputs.

    (channels, k^2, k, k): one-hot at `[:, u * k + v, u, v]`. Raises ValueError for an even k.
    """
    _checks.check_positive("channels", channels)
    _checks.check_window("kernel_size", kernel_size)
    taps = torch.eye(kernel_size * kernel_size, device=device, dtype=dtype)
    taps = taps.view(kernel_size * kernel_size, kernel_size, kernel_size)
    return taps.expand(channels, -1, -1, -1).clone()
