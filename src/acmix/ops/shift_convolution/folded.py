"""The algebra of the convolution path (derivation in docs/operator.md).

Everything from the pieces to the output is linear, so `fc` and the group convolution are one
group convolution G of the pieces, and with the projection that made the pieces, one dense
convolution of x. The folds are products of small weight tensors and part of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from acmix.ops import _half
from acmix.ops._autocast import without_autocast

Projection = tuple[Tensor, Tensor | None]  # to pieces: weight (J, d, C_in) and bias (J, d)


def fold_fc(fc_weight: Tensor, shift_weight: Tensor) -> Tensor:
    """G[o, j, u, v] = sum_t shift[o, t, u, v] fc[t, j]: (C, J, k, k), in the weights' precision."""
    taps = shift_weight.transpose(0, 1)  # (k^2, C, k, k): faster than einsum, which copies more
    with without_autocast(fc_weight):
        folded = fc_weight.t() @ taps.flatten(1)
    return folded.unflatten(1, taps.shape[1:]).transpose(0, 1)


def fewest_operations(
    fc_weight: Tensor, shift_weight: Tensor, outputs: int
) -> tuple[Tensor, Tensor | None]:
    """The kernel of a group convolution and, where two steps have fewer multiply-adds than their
    fold, the fc before it: for each pixel of a group, with M `outputs`, k^2 J + M k^4 and not J M
    k^2."""
    taps, inputs = fc_weight.shape
    if inputs * outputs > inputs + outputs * taps:
        return shift_weight, fc_weight
    return fold_fc(fc_weight, shift_weight), None


def fold_dense(
    projections: Sequence[Projection],
    fc_weight: Tensor,
    shift_weight: Tensor,
    fc_bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The dense kernel (C, C_in, k, k) and its bias of each tap (C, k, k), None without biases.

    Of several projections, each of a map of its own to the next of the pieces, the kernel takes the
    maps one after the other. Zero padding comes after the biases, so an output sees the bias of a
    tap only where that tap lies inside the map.
    """
    with without_autocast(fc_weight):
        # Output channels are d-major, c * M + m, since group c of the convolution holds channel c.
        groups = projections[0][0].shape[1]
        folded = fold_fc(fc_weight, shift_weight).unflatten(0, (groups, -1))  # (d, M, J, k, k)
        parts = folded.split([len(weight) for weight, _ in projections], 2)
        kernels, taps = [], []
        if fc_bias is not None:
            taps.append(tap_bias(shift_weight, fc_bias))
        for part, (weight, bias) in zip(parts, projections, strict=True):
            kernels.append(torch.einsum("cmjuv,jci->cmiuv", part, weight).flatten(0, 1))
            if bias is not None:
                taps.append(torch.einsum("cmjuv,jc->cmuv", part, bias).flatten(0, 1))
        kernel = kernels[0] if len(kernels) == 1 else torch.cat(kernels, 1)
        return kernel, sum(taps[1:], taps[0]) if taps else None


def tap_bias(shift_weight: Tensor, fc_bias: Tensor) -> Tensor:
    """What fc's bias adds to each output through each tap inside the map: (C, k, k)."""
    with without_autocast(fc_bias):
        return torch.einsum("otuv,t->ouv", shift_weight, fc_bias)


def border_bias(taps: Tensor, out: Tensor, x: Tensor, stride: int, dilation: int) -> Tensor:
    """Sum of the bias of the taps inside the map x, (1, C, Ho, Wo); constant away from borders.

    In float32 at least, since its gradient is a sum over the map, and then in the dtype of `out`.
    """
    dtype = torch.promote_types(taps.dtype, torch.float32)
    ones = torch.ones(1, 1, *x.shape[-2:], dtype=dtype, device=taps.device)
    with without_autocast(x):
        bias = convolve(ones, taps[:, None].to(dtype), stride, dilation)
    return bias.to(out.dtype)


def convolve(x: Tensor, weight: Tensor, stride: int, dilation: int, groups: int = 1) -> Tensor:
    """Convolution with the zero padding that keeps ceil(size / stride) outputs."""
    padding = weight.shape[-1] // 2 * dilation
    return _half.convolve(x, weight, stride, padding, dilation, groups)
