"""Attention of every pixel to the window around it, borders reflected."""

from __future__ import annotations

from torch import Tensor

from acmix.ops import _checks, _flops
from acmix.ops._autocast import autocast
from acmix.ops._dispatch import choose
from acmix.ops._windows import output_size
from acmix.ops.window_attention import _fused, native, reference, tiled

IMPLEMENTATIONS = {"reference": reference, "tiled": tiled, "native": native, "triton": _fused}


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    heads: int,
    window: int = 7,
    stride: int = 1,
    dilation: int = 1,
    position: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of each query to the `window` x `window` pixels around it.

    For head n and the query at pixel ij, with ab running over the window:
    `out_ij = sum_ab softmax_ab(d^-0.5 * q_ij . (k_ab + p_ij - p_ab)) * v_ab`
    (Pan et al., CVPR 2022, Eq. 8). Beyond the border, pixels are reflected as by
    `numpy.pad(mode="reflect")`: again and again where a window is larger than the map, and a side
    of 1 repeats its only row.

    Args:
        q: queries (B, C, ceil(H / stride), ceil(W / stride)), one for each output: given a whole
            map of them, pass `q[..., ::stride, ::stride]`. Channels are head-major: head n holds
            channels n * d to n * d + d - 1, where d = C / heads.
        k, v: keys and values (B, C, H, W), of the same dtype and device.
        heads: number of heads N; divides C.
        window: side of the window, odd.
        stride: step between windows, in pixels.
        dilation: step between the taps of a window, in pixels.
        position: weight (d, 2) of the linear position term p = position @ (x, y), shared by the
            heads; x and y run from -1 to 1 over the map. None leaves the term out.
        backend: "auto", "reference", "tiled", "native" or "triton"; see `acmix.ops.backends`.

    Returns:
        (B, C, ceil(H / stride), ceil(W / stride)), head-major like q.

    Raises:
        ValueError: for a wrong rank, shape, window, stride, dilation or backend, and for a forced
            backend that cannot run here.
        TypeError: for integer or complex tensors and mixed dtypes.
    """
    _checks.check_positive("heads", heads)
    _checks.check_sizes(window, stride, dilation)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _checks.check_dtype(name, tensor)
    q, k, v = autocast(q, k, v)
    _checks.check_map("k", k)
    _checks.check_divisible("k: channels", k.shape[1], "heads", heads)
    batch, channels, height, width = k.shape
    _checks.check_shape("v", v, k.shape)
    _checks.check_shape(
        "q", q, (batch, channels, output_size(height, stride), output_size(width, stride))
    )
    _checks.check_same_kind(k=k, q=q, v=v)
    if position is not None:
        _checks.check_shape("position", position, (channels // heads, 2))
        _checks.check_device("position", position, "k", k)
    q, k, v = (x.unflatten(1, (heads, channels // heads)) for x in (q, k, v))
    implementation = choose(backend, IMPLEMENTATIONS, q, k, v, head_dim=q.shape[2])
    product = 2 * window**2 * q.numel()
    return _flops.counted(
        lambda *inputs: implementation.forward(*inputs, window, stride, dilation).flatten(1, 2),
        lambda: (2 * product, 5 * product),
        q,
        k,
        v,
        position,
    )
