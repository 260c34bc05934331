"""ACmix itself: Stage I and II in one function, the functional form of the layer."""

from __future__ import annotations

import math
from types import ModuleType

from torch import Tensor

from acmix.ops import _checks, _flops
from acmix.ops._autocast import check_kinds
from acmix.ops._dispatch import choose
from acmix.ops._windows import output_size
from acmix.ops.acmix import _plan, native, reference, tiled, triton
from acmix.ops.acmix._plan import Folded, Sizes, Weights
from acmix.ops.shift_convolution._path import multiply_adds

IMPLEMENTATIONS = {"reference": reference, "tiled": tiled, "native": native, "triton": triton}


def acmix(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    position: Tensor | None = None,
    fc_weight: Tensor | None = None,
    kernels: Tensor | None = None,
    alpha: Tensor | float | None = 0.5,
    beta: Tensor | float | None = 0.5,
    *,
    heads: int = 4,
    window: int = 7,
    stride: int = 1,
    dilation: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Convolution and self-attention from one set of projections: `acmix.ACmix2d` as a function.

    `out = alpha * window_attention(q, k, v) + beta * shift_convolution([q, k, v])` of the 1x1
    projections q, k, v of x (Pan et al., CVPR 2022, Eq. 9). The channels of attention are
    head-major and those of the convolution d-major, and the two are added as they are: released
    checkpoints depend on it.

    Args:
        x: (B, C_in, H, W), or (C_in, H, W).
        qkv_weight, qkv_bias: of the projections, (3C, C_in) and (3C). Rows are d-major: channel c
            of a head stands in rows 3N * c to 3N * c + 3N - 1, for the N heads of q, of k, of v.
        position: weight (d, 2) of the position term, d = C / N; None leaves it out.
        fc_weight: (k^2, 3N), of the convolution path.
        kernels: (C, k^2, k, k), k odd; None shifts and sums slices of tensors.
        alpha, beta: weights of attention and convolution, numbers or tensors of one element; None
            leaves a path out, and its arguments have no effect.
        heads: number of heads N; divides C.
        window: side of the attention window in pixels, odd; borders are reflected.
        stride, dilation: in pixels, of both paths.
        backend: "auto", "reference", "tiled", "native" or "triton"; see `acmix.ops.backends`.

    Returns:
        (B, C, ceil(H / stride), ceil(W / stride)), or the same without B.

    Raises:
        ValueError: for a wrong rank, shape, window, stride, dilation or backend, for no path at
            all, and for a forced backend that cannot run here.
        TypeError: for integer or complex tensors and mixed dtypes, which autocast joins, all but
            float64.
    """
    sizes = Sizes(heads, window, stride, dilation)
    weights = Weights(qkv_weight, qkv_bias, position, fc_weight, kernels, alpha, beta)
    _check_weights(weights, sizes)
    batch = _checks.as_batch("x", x, qkv_weight.shape[1])
    convolution = {"fc_weight": fc_weight, "kernels": kernels} if beta is not None else {}
    given = {name: tensor for name, tensor in convolution.items() if tensor is not None}
    check_kinds(parameters=qkv_weight, x=batch, qkv_bias=qkv_bias, **given)
    implementation = _choose(backend, batch, weights, sizes)
    out = _flops.counted(
        lambda x, *weights: _plan.forward(implementation, x, Weights(*weights), sizes),
        lambda: _operations(batch, weights, sizes),
        batch,
        *weights,
    )
    return out if x.dim() == 4 else out[0]


def _operations(x: Tensor, weights: Weights, sizes: Sizes) -> tuple[int, int]:
    """Of the definition, forward and backward, 2 a multiply-add: the projections, attention's two
    products (five in the backward pass), and fc and the group convolution."""
    _, window, stride, _ = sizes
    batch, in_channels, *side = x.shape
    channels = len(weights.qkv_bias) // 3
    pixels = batch * math.prod(side)
    outputs = batch * math.prod(output_size(length, stride) for length in side)
    products = 3 * channels * in_channels * pixels
    attention = window**2 * channels * outputs if weights.alpha is not None else 0
    if weights.beta is not None and weights.fc_weight is not None:
        head_dim, heads = channels // sizes.heads, sizes.heads
        path = x, head_dim, heads, weights.fc_weight, weights.kernels, stride
        products += multiply_adds(*path)
    return 2 * (products + 2 * attention), 2 * (2 * products + 5 * attention)


def folded_acmix(x: Tensor, weights: Folded, sizes: Sizes, backend: str = "auto") -> Tensor:
    """The same of weights that were folded once, for inference: their values are not checked."""
    batch = _checks.as_batch("x", x)
    check_kinds(parameters=_any(weights), x=batch)
    out = _choose(backend, batch, weights, sizes).run(batch, weights, sizes)
    return out if x.dim() == 4 else out[0]


def fold(weights: Weights, sizes: Sizes, backend: str, like: Tensor) -> Folded:
    """The weights as `folded_acmix` takes them, in the form for the device that holds `like`."""
    # Whether a backend that is named can run, x tells.
    plan = IMPLEMENTATIONS.get(backend) or _choose(backend, like, weights, sizes)
    return _plan.fold(weights, sizes, plan.convolution.dense(like))


def _choose(backend: str, x: Tensor, weights: Weights | Folded, sizes: Sizes) -> ModuleType:
    channels = 0 if weights.qkv_bias is None else len(weights.qkv_bias) // 3
    head_dim = channels // sizes.heads
    return choose(backend, IMPLEMENTATIONS, x, _any(weights), head_dim=head_dim)


def _any(weights: Weights | Folded) -> Tensor:
    """A tensor of the weights; of a convolution alone its kernel."""
    if weights.qkv_weight is not None:
        return weights.qkv_weight
    kernel = weights.path.kernel if isinstance(weights, Folded) and weights.path else None
    assert kernel is not None
    return kernel


def _check_weights(weights: Weights, sizes: Sizes) -> None:
    """The arguments but x: ValueError or TypeError for what does not fit."""
    qkv_weight, qkv_bias, position, fc_weight, kernels, alpha, beta = weights
    heads, window, stride, dilation = sizes
    _checks.check_positive("heads", heads)
    _checks.check_sizes(window, stride, dilation)
    _checks.check_dtype("qkv_weight", qkv_weight)
    if qkv_weight.dim() != 2 or len(qkv_weight) < 1 or len(qkv_weight) % (3 * heads):
        raise ValueError(
            f"qkv_weight: expected (3C, C_in) with C a multiple of heads ({heads}), "
            f"got shape {tuple(qkv_weight.shape)}"
        )
    rows = len(qkv_weight)
    _checks.check_shape("qkv_bias", qkv_bias, (rows,))
    _check_factor("alpha", alpha, qkv_weight)
    _check_factor("beta", beta, qkv_weight)
    if alpha is None and beta is None:
        raise ValueError("alpha, beta: expected one of them at least, got None and None")
    if alpha is not None and position is not None:
        _checks.check_shape("position", position, (rows // (3 * heads), 2))
    if beta is not None:
        _check_convolution(fc_weight, kernels, rows // 3, 3 * heads)


def _check_convolution(
    fc_weight: Tensor | None, kernels: Tensor | None, channels: int, pieces: int
) -> None:
    if fc_weight is None:
        raise ValueError("fc_weight: expected (k^2, 3N) for the convolution, got None")
    _checks.check_dtype("fc_weight", fc_weight)
    side = math.isqrt(len(fc_weight))
    if side**2 != len(fc_weight) or side % 2 == 0:
        raise ValueError(
            f"fc_weight: expected (k^2, 3N) with k odd, got shape {tuple(fc_weight.shape)}"
        )
    _checks.check_shape("fc_weight", fc_weight, (side * side, pieces))
    if kernels is not None:
        _checks.check_shape("kernels", kernels, (channels, side * side, side, side))


def _check_factor(name: str, factor: Tensor | float | None, like: Tensor) -> None:
    if isinstance(factor, Tensor):
        if factor.numel() != 1:
            raise ValueError(f"{name}: expected one element, got shape {tuple(factor.shape)}")
        _checks.check_device(name, factor, "qkv_weight", like)
