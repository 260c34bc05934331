"""Sum of every window with weights that the caller gives: SAN's aggregation."""

from __future__ import annotations

from torch import Tensor

from acmix.ops import _checks, _flops
from acmix.ops._autocast import autocast
from acmix.ops._dispatch import choose
from acmix.ops._windows import output_size
from acmix.ops.weighted_aggregation import _fused, native, reference, tiled

IMPLEMENTATIONS = {"reference": reference, "tiled": tiled, "native": native, "triton": _fused}


def weighted_aggregation(
    weight: Tensor,
    v: Tensor,
    *,
    window: int = 7,
    stride: int = 1,
    dilation: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Weighted sum of the `window` x `window` pixels around each output position.

    `out[b, c, i, j] = sum_t weight[b, c mod Cw, t, i, j] * v[b, c, tap t of the window around ij]`
    (Zhao et al., "Exploring Self-attention for Image Recognition", CVPR 2020, Eq. 2, with weights
    shared by C / Cw channels). Taps run row by row; borders are reflected as in
    `window_attention`.

    Args:
        weight: (B, Cw, window^2, ceil(H / stride), ceil(W / stride)).
        v: (B, C, H, W), C a multiple of Cw, of the same dtype and device.
        window: side of the window, odd.
        stride: step between windows, in pixels.
        dilation: step between the taps of a window, in pixels.
        backend: "auto", "reference", "tiled", "native" or "triton"; see `acmix.ops.backends`.

    Returns:
        (B, C, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: for a wrong rank, shape, window, stride, dilation or backend, and for a forced
            backend that cannot run here.
        TypeError: for integer or complex tensors and mixed dtypes.
    """
    _checks.check_sizes(window, stride, dilation)
    _checks.check_dtype("weight", weight)
    _checks.check_dtype("v", v)
    weight, v = autocast(weight, v)
    _checks.check_map("v", v)
    if weight.dim() != 5 or weight.shape[1] < 1:
        raise ValueError(
            "weight: expected 5 dimensions (B, Cw, window^2, H, W), "
            f"got shape {tuple(weight.shape)}"
        )
    batch, channels, height, width = v.shape
    shared = weight.shape[1]
    out_size = (output_size(height, stride), output_size(width, stride))
    _checks.check_shape("weight", weight, (batch, shared, window * window, *out_size))
    _checks.check_divisible("v: channels", channels, "the weights' channels", shared)
    _checks.check_same_kind(v=v, weight=weight)
    implementation = choose(backend, IMPLEMENTATIONS, weight, v)
    return _flops.counted(
        lambda weight, v: implementation.forward(weight, v, window, stride, dilation),
        lambda: _flops.of_products(weight[:, 0].numel() * channels),
        weight,
        v,
    )
