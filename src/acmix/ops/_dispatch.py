"""Which implementation of an operator runs, and for each that cannot, why.

An implementation is a module with `forward`. One made of operators of ours, which nothing outside
PyTorch's eager mode and compiler can see into, says so by `OPAQUE = True`. One that is not for
every tensor has `why_not(*tensors)`, which returns a one-line reason or None, and one whose kernels
are tried first on a GPU `trial(device, dtype)`, their error there. `"auto"` takes the first of AUTO
that has no reason against it. A backend named by the caller runs or raises: nothing falls back
silently.

The kernels for the GPU are tried on each before an operator's first use there: a warning tells
where they are not used.
"""

from __future__ import annotations

import importlib.util
import threading
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from acmix.ops import _native, _trial
from acmix.ops._autocast import dtype_of_kernels
from acmix.ops._checks import check_choice
from acmix.ops._library import INTERPRETED

AUTO = ("native", "triton", "tiled", "reference")
BACKENDS = ("auto", "reference", "tiled", "native", "triton")
Trial = Callable[[torch.device, torch.dtype], float]
LARGEST_HEAD = 256  # of the GPU kernels: more does not fit a GPU's shared memory


def backends() -> dict[str, str | None]:
    """Every backend's name, with None where it can run on this machine, else the reason why not.

    reference: the definition, unfolded windows, any device and dtype. tiled: portable PyTorch,
    any device and dtype. native: the C++ kernel for the CPU. triton: the kernels for the GPU, and
    its convolution for the shift convolution; whether a GPU runs them is seen at the first use.
    """
    return {
        "reference": None,
        "tiled": None,
        "native": _native.reason(),
        "triton": _triton_reason(),
    }


def resolve(
    backend: str, implementations: dict[str, ModuleType], *tensors: Tensor, head_dim: int = 1
) -> str:
    """The name of the implementation that `backend` means for tensors like these.

    Raises ValueError for an unknown backend, and for a forced one that cannot run here.
    """

    def why_not(name: str) -> str | None:
        return _why_not(name, implementations, tensors, head_dim)

    if backend == "auto":
        return next(name for name in AUTO if why_not(name) is None)
    check_choice("backend", backend, BACKENDS)
    reason = why_not(backend)
    if reason is not None:
        raise ValueError(f"backend: {backend!r} cannot run here: {reason}")
    return backend


def choose(
    backend: str, implementations: dict[str, ModuleType], *tensors: Tensor, head_dim: int = 1
) -> ModuleType:
    """The implementation that `resolve` names."""
    return implementations[resolve(backend, implementations, *tensors, head_dim=head_dim)]


def why_portable() -> str | None:
    """Why an operator is to be made of PyTorch's own, in one line; None where it need not."""
    if torch.onnx.is_in_onnx_export():
        return "ONNX has no such operator"
    if torch.jit.is_tracing():
        return "a trace runs where acmix is not installed"
    if _transforms():
        return "it has no rule for forward-mode derivatives and the transforms of torch.func"
    return None


@torch.compiler.assume_constant_result  # a compiler has entered the transforms that it traces
def _transforms() -> bool:
    """Whether a transform of torch.func (grad, jvp, vmap, ...) or a dual level is entered."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def _why_not(
    name: str, implementations: dict[str, ModuleType], tensors: tuple[Tensor, ...], head_dim: int
) -> str | None:
    if name not in implementations:
        return f"the operator has no {name} kernel"
    implementation = implementations[name]
    if getattr(implementation, "OPAQUE", False) and (reason := why_portable()):
        return reason
    if name == "triton":
        if head_dim > LARGEST_HEAD:
            return f"the GPU kernels take heads of {LARGEST_HEAD} channels at most, got {head_dim}"
        return _triton_why_not(implementation, *tensors)
    why_not = getattr(implementation, "why_not", None)
    return why_not(*tensors) if why_not else None


@torch.compiler.assume_constant_result
def _triton_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if INTERPRETED or torch.cuda.is_available() or torch.xpu.is_available():
        return None
    return "PyTorch finds no GPU"


_faults: dict[tuple[Trial, torch.device, torch.dtype], str | None] = {}
_trying = threading.Lock()


@torch.compiler.assume_constant_result
def _triton_fault(trial: Trial, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a GPU cannot run an operator's kernels, tried once a process; None where it can."""
    key = trial, device, dtype
    with _trying:
        if key not in _faults:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return None  # a CUDA graph takes nothing else, and was warmed up before
            _faults[key] = reason = _trial.fault(trial, device, dtype)
            if reason is not None:
                message = f"the GPU kernels are not used for {dtype}: {reason}"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
        return _faults[key]


def _triton_why_not(kernels: ModuleType, tensor: Tensor, *_: Tensor) -> str | None:
    on_gpu = tensor.device.type in ("cuda", "xpu")
    if not on_gpu and not INTERPRETED:
        return _triton_reason() or f"the GPU kernels take no tensors on {tensor.device.type}"
    dtype = dtype_of_kernels(tensor)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the GPU kernels compute in float32, which is too narrow for {dtype}"
    reason = _triton_reason()
    if reason is None and on_gpu and hasattr(kernels, "trial"):
        return _triton_fault(kernels.trial, tensor.device, dtype)
    return reason
