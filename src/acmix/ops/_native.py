"""The CPU kernel's library: loaded at its first use, called with tensors.

The library is a plain C one (src/acmix/csrc/api.cpp), built by setup.py beside this package. A call
through ctypes lets go of Python's lock. `ACMIX_SIMD=plain|avx2|avx512`, read at the first use,
forbids wider instructions than the one named.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from acmix.ops._library import INTERPRETED

INTERFACE = 3  # acmix_interface() of the library that these declarations describe
FOLDER = Path(__file__).parents[1]
SIMD = ("plain", "avx2", "avx512")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ERRORS = {
    1: "a size out of range",
    2: "a tensor that does not fit its description",
    3: "not enough memory for the tiles",
}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("extent", ctypes.c_int64),
        ("size", ctypes.c_int64 * 5),
        ("stride", ctypes.c_int64 * 5),
        ("dtype", ctypes.c_int32),
    )


def _numbers(names: str) -> tuple[tuple[str, type[ctypes.c_int64]], ...]:
    return tuple((name, ctypes.c_int64) for name in names.split())


class _Problem(ctypes.Structure):
    _fields_ = _numbers("batch heads channels height width window stride dilation")


class _ShiftProblem(ctypes.Structure):
    _fields_ = _numbers(
        "batch groups pieces inputs outputs height width window stride dilation accumulate"
    )


class _PartitionProblem(ctypes.Structure):
    _fields_ = _numbers("batch heads channels height width rows columns row_shift column_shift")


@torch.compiler.assume_constant_result
def reason() -> str | None:
    """Why the kernel cannot run here, in one line; None where it can."""
    if INTERPRETED:
        return "TRITON_INTERPRET=1 gives the CPU to the Triton kernels"
    return _load()[1]


def simd() -> str:
    """The instructions that the kernel uses: "avx512", "avx2", "neon" or "plain"."""
    return _library().acmix_simd().decode()


def why_not(tensor: Tensor, *_: Tensor) -> str | None:
    """Why the kernel cannot take tensors like these; None where it can."""
    if tensor.device.type not in ("cpu", "meta"):
        return f"the CPU kernel takes tensors on the CPU, not on {tensor.device.type}"
    if tensor.dtype not in DTYPES:
        return f"the CPU kernel computes in float32, which is too narrow for {tensor.dtype}"
    return reason()


@overload
def floats(tensor: Tensor) -> Tensor: ...
@overload
def floats(tensor: None) -> None: ...
def floats(tensor: Tensor | None) -> Tensor | None:
    """A small tensor as the kernel reads it, by a bare pointer."""
    return None if tensor is None else tensor.float().contiguous()


def float_sums(*like: Tensor | None) -> list[Tensor | None]:
    """Room for the gradients of small tensors, which the kernel sums in float32."""
    return [None if x is None else x.new_empty(x.shape, dtype=torch.float32) for x in like]


def write_sums(gradients: Sequence[Tensor], sums: Sequence[Tensor | None]) -> None:
    for gradient, found in zip(gradients, sums, strict=True):
        if found is not None:
            gradient.copy_(found)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor | None,
    sizes: Sequence[int],
    out: Tensor,
    lse: Tensor,
    alpha: Tensor | None = None,
) -> None:
    """Fills `out` (B, N, d, Ho, Wo), the attention times alpha, and the contiguous `lse`
    (B, N, Ho, Wo); sizes: window, stride and dilation.
    """
    _call(
        "acmix_attention_forward",
        _Problem(*k.shape, *sizes),
        q,
        k,
        v,
        _Floats(position, k.shape[2], 2),
        _one_float(alpha),
        out,
        _Floats(lse, *_without_channels(out)),
    )


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor | None,
    lse: Tensor,
    sizes: Sequence[int],
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_position: Tensor | None,
    alpha: Tensor | None = None,
    grad_alpha: Tensor | None = None,
) -> None:
    """Fills the gradients of q, k, v and, where given, of the contiguous float32 position and of
    the output's factor alpha.
    """
    _call(
        "acmix_attention_backward",
        _Problem(*k.shape, *sizes),
        grad_out,
        q,
        k,
        v,
        _Floats(position, k.shape[2], 2),
        _one_float(alpha),
        _Floats(lse, *_without_channels(q)),
        grad_q,
        grad_k,
        grad_v,
        _Floats(grad_position, k.shape[2], 2),
        _one_float(grad_alpha),
    )


def aggregation_forward(weight: Tensor, v: Tensor, sizes: Sequence[int], out: Tensor) -> None:
    """weight (B, Cw, window^2, Ho, Wo), v (B, Cw, C / Cw, H, W); fills `out` of q's kind."""
    _call("acmix_aggregation_forward", _Problem(*v.shape, *sizes), weight, v, out)


def aggregation_backward(
    grad_out: Tensor,
    weight: Tensor,
    v: Tensor,
    sizes: Sequence[int],
    grad_weight: Tensor,
    grad_v: Tensor,
) -> None:
    _call(
        "acmix_aggregation_backward",
        _Problem(*v.shape, *sizes),
        grad_out,
        weight,
        v,
        grad_weight,
        grad_v,
    )


def shift_forward(
    pieces: Tensor,
    weight: Tensor,
    stride: int,
    dilation: int,
    out: Tensor,
    accumulate: bool,
    fc_weight: Tensor | None = None,
) -> None:
    """pieces (B, J, d, H, W), weight (d * M, J, k, k), or fc_weight (I, J) and weight (d * M, I, k,
    k); fills `out` (B, d * M, Ho, Wo), or adds."""
    _call(
        "acmix_shift_forward",
        _shift_problem(pieces, fc_weight, weight, stride, dilation, accumulate),
        pieces.transpose(1, 2),
        *_shift_floats(fc_weight, weight, fc_weight, weight),
        _by_group(out, pieces),
    )


def shift_backward(
    grad_out: Tensor,
    pieces: Tensor,
    weight: Tensor,
    stride: int,
    dilation: int,
    grad_pieces: Tensor,
    grad_weight: Tensor | None,
    accumulate: bool,
    fc_weight: Tensor | None = None,
    grad_fc: Tensor | None = None,
) -> None:
    """Fills the gradients of the pieces, or adds to them, and of the weights where given."""
    _call(
        "acmix_shift_backward",
        _shift_problem(pieces, fc_weight, weight, stride, dilation, accumulate),
        _by_group(grad_out, pieces),
        pieces.transpose(1, 2),
        *_shift_floats(fc_weight, weight, fc_weight, weight),
        grad_pieces.transpose(1, 2),
        *reversed(_shift_floats(grad_fc, grad_weight, fc_weight, weight)),
    )


def partition_forward(
    pieces: Tensor,
    bias: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    out: Tensor,
    lse: Tensor,
) -> None:
    """pieces (B, 3N, d, H, W), bias (N, T, T) of key and query; fills `out` (B, N, d, H, W) and
    the contiguous `lse` (B, N, down, across, T).
    """
    _call(
        "acmix_partition_forward",
        _PartitionProblem(*out.shape, *window, *shift),
        *pieces.chunk(3, 1),
        _Floats(bias, *_bias_shape(out, window)),
        out,
        _Floats(lse, *_without_channels(out)),
    )


def partition_backward(
    grad_out: Tensor,
    pieces: Tensor,
    bias: Tensor,
    lse: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    grad_pieces: Tensor,
    grad_bias: Tensor,
) -> None:
    _call(
        "acmix_partition_backward",
        _PartitionProblem(*grad_out.shape, *window, *shift),
        grad_out,
        *pieces.chunk(3, 1),
        _Floats(bias, *_bias_shape(grad_out, window)),
        _Floats(lse, *_without_channels(grad_out)),
        *grad_pieces.chunk(3, 1),
        _Floats(grad_bias, *_bias_shape(grad_out, window)),
    )


class _Floats:
    """A contiguous float32 tensor of known shape passed as a bare pointer, or none."""

    def __init__(self, tensor: Tensor | None, *shape: int) -> None:
        if tensor is not None and (tensor.dtype != torch.float32 or not tensor.is_contiguous()):
            raise AssertionError("a bare pointer must be to contiguous float32")
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"expected a tensor of {shape}, got shape {tuple(tensor.shape)}")
        self.pointer = ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _one_float(tensor: Tensor | None) -> _Floats:
    """Of a tensor of one element, a scalar or not."""
    return _Floats(tensor, *(() if tensor is None or tensor.dim() == 0 else (1,)))


def _without_channels(x: Tensor) -> tuple[int, ...]:
    return *x.shape[:2], *x.shape[3:]


def _shift_floats(
    fc: Tensor | None, weight: Tensor | None, fc_weight: Tensor | None, like: Tensor
) -> tuple[_Floats, _Floats]:
    """fc and weight, or their gradients, of the shapes that fc_weight and `like` have."""
    shape = () if fc_weight is None else tuple(fc_weight.shape)
    return _Floats(fc, *shape), _Floats(weight, *like.shape)


def _bias_shape(out: Tensor, window: Sequence[int]) -> tuple[int, int, int]:
    tokens = window[0] * window[1]
    return out.shape[1], tokens, tokens


def _shift_problem(
    pieces: Tensor,
    fc_weight: Tensor | None,
    weight: Tensor,
    stride: int,
    dilation: int,
    accumulate: bool,
) -> _ShiftProblem:
    batch, count, groups, *size = pieces.shape
    channels, inputs, kernel, columns = weight.shape
    made = (inputs, count) if fc_weight is None else tuple(fc_weight.shape)
    if channels % groups or made != (inputs, count) or kernel != columns:
        raise AssertionError("weights of other sizes than the pieces")
    if fc_weight is None and inputs != count:
        raise AssertionError("a weight of other sizes than the pieces")
    outputs = channels // groups
    return _ShiftProblem(
        batch, groups, count, inputs, outputs, *size, kernel, stride, dilation, accumulate
    )


def _by_group(x: Tensor, pieces: Tensor) -> Tensor:
    """(B, d * M, Ho, Wo) with the M channels of a group apart, (B, d, M, Ho, Wo)."""
    return x.unflatten(1, (pieces.shape[2], -1))


def _describe(tensor: Tensor) -> _Tensor:
    if tensor.device.type != "cpu" or tensor.dtype not in DTYPES:
        raise ValueError(f"expected tensors on the CPU, got {tensor.dtype} on {tensor.device}")
    size = tensor.element_size()
    extent = tensor.untyped_storage().nbytes() // size - tensor.storage_offset()
    return _Tensor(
        tensor.data_ptr(),
        extent,
        tuple(tensor.shape),
        tensor.stride(),
        DTYPES[tensor.dtype],
    )


def _call(
    name: str,
    problem: _Problem | _ShiftProblem | _PartitionProblem,
    *tensors: Tensor | _Floats,
) -> None:
    arguments = [
        t.pointer if isinstance(t, _Floats) else ctypes.byref(_describe(t)) for t in tensors
    ]
    status = getattr(_library(), name)(
        ctypes.byref(problem), *arguments, ctypes.c_int64(torch.get_num_threads())
    )
    if status != 0:
        raise RuntimeError(f"{name}: internal error: {ERRORS.get(status, status)}")


def _library() -> ctypes.CDLL:
    library, why = _load()
    if library is None:
        raise RuntimeError(f"the CPU kernel is not available: {why}")
    return library


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    if (wish := os.environ.get("ACMIX_SIMD", "")) not in ("", *SIMD):
        return None, f"ACMIX_SIMD: expected {', '.join(SIMD)}, got {wish!r}"
    paths = sorted(FOLDER.glob("_kernel*.so")) + sorted(FOLDER.glob("_kernel*.pyd"))
    if not paths:
        return None, _why_missing()
    try:
        library = ctypes.CDLL(str(paths[0]))
        interface = library.acmix_interface()
    except (OSError, AttributeError) as error:
        return None, f"the CPU kernel could not be loaded: {error}"
    if interface != INTERFACE:
        return None, "the CPU kernel was built for another version of acmix: install again"
    library.acmix_simd.restype = ctypes.c_char_p
    library.acmix_lend_threads(_parallel_region())
    return library, None


def _parallel_region() -> ctypes.c_void_p:
    """The entry point of PyTorch's own OpenMP runtime where that is libgomp, or one like it.

    The kernel runs on PyTorch's threads then: they spin for some milliseconds after each operator,
    and threads of the kernel's own would wait for a core all that time.
    """
    try:
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_library.GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError):
        return ctypes.c_void_p(None)


def _why_missing() -> str:
    note = FOLDER / "_kernel_missing.txt"
    why = note.read_text().strip() if note.exists() else "this installation has no library"
    return f"no CPU kernel: {why}"
