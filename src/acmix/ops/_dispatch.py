"""Which implementation of an operator runs, and for each that cannot, why.

An implementation is a module with `forward`; one that is not for every tensor also has
`why_not(*tensors)`, which returns a one-line reason or None. `"auto"` takes the first of AUTO that
has no reason against it; the reference comes last, for the transforms of torch.func. A backend
named by the caller runs or raises: nothing falls back silently.

The kernels for the GPU are tried on each before their first use there: a warning tells where they
are not used.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType

import torch
from torch import Tensor

from acmix.ops import _native
from acmix.ops._checks import check_choice
from acmix.ops._library import INTERPRETED, why_not_transformed

AUTO = ("native", "triton", "tiled", "reference")
BACKENDS = ("auto", "reference", "tiled", "native", "triton")


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


def resolve(backend: str, implementations: dict[str, ModuleType], *tensors: Tensor) -> str:
    """The name of the implementation that `backend` means for tensors like these.

    Raises ValueError for an unknown backend, and for a forced one that cannot run here.
    """
    if backend == "auto":
        return next(name for name in AUTO if _why_not(name, implementations, *tensors) is None)
    check_choice("backend", backend, BACKENDS)
    reason = _why_not(backend, implementations, *tensors)
    if reason is not None:
        raise ValueError(f"backend: {backend!r} cannot run here: {reason}")
    return backend


def choose(backend: str, implementations: dict[str, ModuleType], *tensors: Tensor) -> ModuleType:
    """The implementation that `resolve` names."""
    return implementations[resolve(backend, implementations, *tensors)]


def _why_not(name: str, implementations: dict[str, ModuleType], *tensors: Tensor) -> str | None:
    if name not in implementations:
        return f"the operator has no {name} kernel"
    if name == "triton":
        return _triton_why_not(*tensors)
    why_not = getattr(implementations[name], "why_not", None)
    return why_not(*tensors) if why_not else None


@torch.compiler.assume_constant_result
def _triton_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if INTERPRETED or torch.cuda.is_available() or torch.xpu.is_available():
        return None
    return "PyTorch finds no GPU"


_faults: dict[tuple[torch.device, torch.dtype], str | None] = {}


@torch.compiler.assume_constant_result
def _triton_fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a GPU cannot run the kernels, tried once a process; None where it can."""
    if (device, dtype) not in _faults:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # a CUDA graph takes nothing else, and was warmed up before
        trial = importlib.import_module("acmix.ops.window_attention._trial")
        _faults[device, dtype] = reason = trial.fault(device, dtype)
        if reason is not None:
            message = f"the GPU kernels are not used for {dtype}: {reason}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
    return _faults[device, dtype]


def _triton_why_not(tensor: Tensor, *others: Tensor) -> str | None:
    if transformed := why_not_transformed(tensor, *others):
        return transformed
    on_gpu = tensor.device.type in ("cuda", "xpu")
    if not on_gpu and not INTERPRETED:
        return _triton_reason() or f"the GPU kernels take no tensors on {tensor.device.type}"
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the GPU kernels compute in float32, which is too narrow for {tensor.dtype}"
    reason = _triton_reason()
    return _triton_fault(tensor.device, tensor.dtype) if on_gpu and reason is None else reason
