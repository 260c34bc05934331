"""The convolution path of a layer: its parameters, how it runs, and its form in inference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from acmix.layers.mix import ConvexMix, FixedMix, LearnedMix, make_mix
from acmix.layers.shift import FixedShift, LearnedShift, TensorShift, make_shift
from acmix.ops._autocast import check_kinds
from acmix.ops.shift_convolution import (
    Folded,
    Projection,
    Read,
    convolve_folded,
    convolve_projections,
    fold,
)


class ConvolutionPath(nn.Module):
    """Base of the layers: fc, the shift kernels, and beta, which `mix` holds beside alpha.

    The path reads J pieces of d channels, which are projections of a map, and has d * M channels,
    d-major. Its parameters are plain ones: a network's loop over its `nn.Conv2d` and `nn.Linear`
    modules leaves their start alone.
    """

    backend: str = "auto"
    kernel_conv: int
    repeats: int  # M
    has_attention: bool
    has_convolution: bool
    mix: LearnedMix | ConvexMix | FixedMix
    shift: TensorShift | FixedShift | LearnedShift
    fc_weight: nn.Parameter
    convolution: FoldedPath | None  # in inference, instead of the parameters

    def _create_mix(
        self, mix: str, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        self.mix = make_mix(mix, device, dtype)
        alpha, beta = self.mix.weights()
        self.has_attention, self.has_convolution = alpha is not None, beta is not None
        self.convolution = None

    def _create_path(
        self,
        channels: int,
        repeats: int,
        pieces: int,
        shift: str,
        shift_init: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        bias: bool = False,
    ) -> None:
        """fc, with a bias or none, and the kernels of `channels` outputs, d * `repeats`."""
        taps, self.repeats = self.kernel_conv**2, repeats
        self.fc_weight = nn.Parameter(torch.empty(taps, pieces, device=device, dtype=dtype))
        if bias:
            self.fc_bias = nn.Parameter(torch.empty(taps, device=device, dtype=dtype))
        sizes = channels, repeats, self.kernel_conv
        self.shift = make_shift(shift, *sizes, shift_init, device, dtype)

    def _reset_path(self) -> None:
        """Start again: fc as `nn.Conv2d` starts, kernels and mix as constructed."""
        if self.has_convolution:
            bound = self.fc_weight.shape[1] ** -0.5
            nn.init.uniform_(self.fc_weight, -bound, bound)
            if hasattr(self, "fc_bias"):
                nn.init.uniform_(self.fc_bias, -bound, bound)
        for child in (self.mix, getattr(self, "shift", None)):
            if isinstance(child, (LearnedMix, ConvexMix, LearnedShift)):
                child.reset_parameters()

    def _projections(self) -> list[Projection]:
        """Of each map to its pieces: weight (J, d, C_in) and bias (J, d) or None."""
        raise NotImplementedError

    def _convolve(self, x: Tensor, read: Read) -> Tensor:
        """beta times the path on maps like x, (B, C, H, W). read(dense): the maps, one after the
        other in the channels, or the pieces."""
        if self.convolution is not None:
            return self.convolution(x, read)
        beta = self.mix.weights()[1]
        assert beta is not None
        return convolve_projections(
            x,
            read,
            self._projections(),
            beta * self.fc_weight,
            self.shift.kernels(like=self.fc_weight),
            beta * self.fc_bias if hasattr(self, "fc_bias") else None,
            self.repeats,
            self.backend,
        )


class FoldedPath(nn.Module):
    """The path in inference: a group convolution of the pieces, or a dense one of what they are
    projected from; fc is apart from its kernel only where that is fewer operations."""

    def __init__(self, weights: Folded, like: Tensor, backend: str = "auto") -> None:
        """The parameters take the dtype of `like`."""
        super().__init__()
        assert weights.kernel is not None
        self.weight = constant(weights.kernel, like)
        self.fc_weight = constant_or_none(weights.fc_weight, like)
        self.taps = constant_or_none(weights.taps, like)
        self.dense, self.backend = weights.dense, backend

    def weights(self) -> Folded:
        return Folded(self.weight, self.fc_weight, self.taps, self.dense)

    def forward(self, x: Tensor, read: Read) -> Tensor:
        """As `ConvolutionPath._convolve`."""
        return convolve_folded(x, read, self.weights(), self.backend)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, dense={self.dense}, backend={self.backend!r}"


def fold_path(
    layer: ConvolutionPath, like: Tensor, scale: Tensor | None = None, one_kernel: bool = False
) -> Folded:
    """scale * beta times the path of a layer, in the form for the device that holds `like`."""
    beta = layer.mix.weights()[1]
    assert beta is not None
    return fold(
        layer.backend,
        like,
        [(wide(w), None if b is None else wide(b)) for w, b in layer._projections()],
        wide(beta * layer.fc_weight),
        scaled_kernels(layer, scale),
        wide(beta * layer.fc_bias) if hasattr(layer, "fc_bias") else None,
        layer.repeats,
        one_kernel,
    )


def scaled_kernels(layer: ConvolutionPath, scale: Tensor | None) -> Tensor:
    """scale * the kernels, (C, k^2, k, k); tensor shifts are kernels, too."""
    shift, like = layer.shift, layer.fc_weight
    kernels = shift.as_kernels(like) if isinstance(shift, TensorShift) else shift.kernels(like)
    assert kernels is not None
    return wide(kernels) if scale is None else scale[:, None, None, None] * wide(kernels)


def check_kind(layer: nn.Module, x: Tensor) -> None:
    """TypeError or ValueError for an input of another dtype or device than the parameters."""
    check_kinds(parameters=next(layer.parameters()), x=x)


def wide(tensor: Tensor) -> Tensor:
    """A copy in float32 at least, for the folds."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def constant(tensor: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(like.dtype).contiguous(), requires_grad=False)


def constant_or_none(tensor: Tensor | None, like: Tensor) -> nn.Parameter | None:
    return None if tensor is None else constant(tensor, like)
