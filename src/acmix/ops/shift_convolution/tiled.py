"""The folded convolution path in plain PyTorch; what the other operators call tiled.

On a GPU, PyTorch's own convolution is the best there is.
"""

from __future__ import annotations

from torch import Tensor

from acmix.ops.shift_convolution.reference import convolve

__all__ = ["convolve", "dense"]


def dense(x: Tensor) -> bool:
    """Whether the path runs as one dense convolution of x, not of the pieces.

    On a CPU the group convolution of the pieces costs 0.1 to 0.3 times the dense one (0.1 to 0.7
    without our kernel); cuDNN's costs 5 to 24 times as much. See docs/backends.md.
    """
    return x.device.type != "cpu"
