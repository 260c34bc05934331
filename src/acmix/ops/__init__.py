"""Functions on tensors: ACmix, its two paths and the aggregation of SAN, each usable alone."""

from acmix.ops._dispatch import backends
from acmix.ops.acmix import acmix
from acmix.ops.shift_convolution import shift_convolution, shift_kernels
from acmix.ops.weighted_aggregation import weighted_aggregation
from acmix.ops.window_attention import window_attention

__all__ = [
    "acmix",
    "backends",
    "shift_convolution",
    "shift_kernels",
    "weighted_aggregation",
    "window_attention",
]
