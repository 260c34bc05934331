"""Functions on tensors: the two paths of ACmix and the aggregation of SAN, usable alone."""

from acmix.ops._dispatch import backends
from acmix.ops.shift_convolution import shift_convolution, shift_kernels
from acmix.ops.weighted_aggregation import weighted_aggregation
from acmix.ops.window_attention import window_attention

__all__ = [
    "backends",
    "shift_convolution",
    "shift_kernels",
    "weighted_aggregation",
    "window_attention",
]
