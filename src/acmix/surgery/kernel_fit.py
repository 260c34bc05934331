"""A convolution kernel as the convolution path of ACmix: least squares in closed form.

With o = (c, m) an output of head m in channel c of the heads, the path computes the kernel

    K[o, :, tap] = sum_t shift[o, t, tap] F[c, t, :],    F[c] = fc @ projections[c]

(derivation in docs/operator.md). One channel c never sees another's projections, and where
kernels are learned one semi-orthogonal fc serves all: what remains is, for each c, the best
approximation of its outputs' taps by a matrix of rank min(k^2, 3N), the truncated SVD (Eckart and
Young, "The approximation of one matrix by another of lower rank", Psychometrika 1936). Where
kernels are one-hot, fc is what all c share, and the truncated SVD is over them together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix.ops.shift_convolution import folded, shift_kernels

# How much more the bias away from borders counts than that of each tap, which borders see: nearly
# all outputs of a map are such.
INTERIOR = 100.0
# Directions weaker than this part of the strongest are scaled as if they were as strong, so that
# kernels of a direction are not zero where its projections are, and gradients reach them.
WEAKEST = 1e-2


class KernelFit(NamedTuple):
    """Parameters of `ACmix2d` in float64; `shift_weight` is None where kernels are not learned."""

    qkv_weight: Tensor
    qkv_bias: Tensor
    fc_weight: Tensor
    shift_weight: Tensor | None
    residual: float


def fit_kernel(
    kernel: Tensor, bias: Tensor | None, fc_weight: Tensor, kernel_sets: int
) -> KernelFit:
    """The convolution path, at beta = 1, that is nearest to a convolution.

    A bias is met away from borders, as nearly as one bias of each projection can; at borders, where
    taps are outside the map, the path sees a part of it.

    Args:
        kernel: (C, C_in, k, k).
        bias: (C,), or None for biases of zero.
        fc_weight: (k^2, 3N), a start of it, of which the directions are kept.
        kernel_sets: learned kernel sets for each of the C / N channels of the heads: N or 1; 0 for
            the one-hot kernels.

    Returns:
        Its parameters, balanced between projections and kernels, and the relative residual
        ||path - kernel|| / ||kernel||, 0 for a kernel of zeros.
    """
    kernel, fc = kernel.detach().cpu().double(), orthogonal(fc_weight.detach().cpu().double())
    heads, side = fc.shape[1] // 3, kernel.shape[-1]
    shared = kernel.unflatten(0, (-1, max(kernel_sets, 1), heads // max(kernel_sets, 1))).mean(2)
    target = shared.flatten(3).transpose(2, 3).flatten(1, 2)  # (d, sets * k^2, C_in)
    shift_weight = None
    if kernel_sets:
        rank = min(fc.shape)
        left, right = factors(target, rank)
        if fc.shape[0] > rank:
            left = left @ fc.t()
        else:
            right = fc.t() @ right
        shift_weight = left.unflatten(1, (kernel_sets, -1)).transpose(2, 3).flatten(0, 1)
        shift_weight = shift_weight.unflatten(2, (side, side)).contiguous()
        shifts = shift_weight.repeat_interleave(heads // kernel_sets, 0)
    else:
        if fc.shape[0] > fc.shape[1]:
            fc = principal(torch.einsum("cti,csi->ts", target, target), fc.shape[1])
        right = fc.t() @ target
        shifts = shift_kernels(len(kernel), side, kernel.device, kernel.dtype)
    weight = right.transpose(0, 1)  # (3N, d, C_in)
    folded_kernel, _ = folded.fold_dense([(weight, None)], fc, shifts, None)
    norm = kernel.norm()
    residual = ((folded_kernel - kernel).norm() / norm).item() if norm > 0 else 0.0
    qkv_bias = torch.zeros_like(right[..., 0])
    if bias is not None:
        path = folded.fold_fc(fc, shifts).flatten(2).unflatten(0, (-1, heads))
        qkv_bias = fit_bias(path, bias.detach().cpu().double())
    return KernelFit(right.flatten(0, 1), qkv_bias.flatten(), fc, shift_weight, residual)


def orthogonal(matrix: Tensor) -> Tensor:
    """The semi-orthogonal matrix nearest to a matrix: its polar factor."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def principal(gram: Tensor, rank: int) -> Tensor:
    """Orthonormal eigenvectors of the largest eigenvalues, the largest last: (..., n, rank)."""
    return torch.linalg.eigh(gram).eigenvectors[..., -rank:]


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a given rank: (..., n, m) -> (..., n, rank), (..., rank, m)."""
    left = principal(matrix @ matrix.mT, rank)
    right = left.mT @ matrix
    strength = right.norm(dim=-1, keepdim=True)
    strongest = strength.amax((-2, -1), keepdim=True)
    scale = strength.maximum(WEAKEST * strongest).where(strongest > 0, 1.0).sqrt()
    return left * scale.mT, right / scale


def fit_bias(path: Tensor, bias: Tensor) -> Tensor:
    """Biases of the projections (d, 3N), from what the path makes of them at each tap (d, N, 3N,
    k^2): nothing but at the central tap, which all outputs see, and their sum above all."""
    taps = path.shape[-1]
    wanted = F.one_hot(torch.tensor(taps // 2), taps).to(bias) * bias.view(*path.shape[:2], 1)
    rows = torch.cat([path, INTERIOR * path.sum(-1, keepdim=True)], -1).transpose(2, 3)
    wanted = torch.cat([wanted, INTERIOR * wanted.sum(-1, keepdim=True)], -1)
    solution = torch.linalg.lstsq(
        rows.flatten(1, 2), wanted.flatten(1, 2)[..., None], driver="gelsd"
    )
    return solution.solution[..., 0]
