"""ReducedACmix: its paths step by step, and what it must work under."""

import pytest
import torch
from helpers import (
    TOLERANCE,
    assert_all_close,
    perturbed,
)
from torch import Tensor, nn
from torch.export import Dim

from acmix.layers.mix import MIXES
from acmix.layers.reduced import ReducedACmix
from acmix.layers.shift import SHIFTS
from acmix.ops import shift_convolution, shift_kernels


def make_layer(**arguments: object) -> ReducedACmix:
    defaults = {"heads": 2, "reduction": 2, "dtype": torch.float64}
    return perturbed(ReducedACmix(8, **{**defaults, **arguments}))


def keys_from(layer: ReducedACmix, x: Tensor, size: tuple[int, int]) -> Tensor:
    if layer.reduction == 1:
        return x
    step = layer.reduction
    image = x.transpose(1, 2).reshape(-1, layer.dim, *size)
    padded = image.new_zeros(len(x), layer.dim, *(-(-side // step) * step for side in size))
    padded[:, :, : size[0], : size[1]] = image
    return layer.norm(layer.sr(padded).flatten(2).transpose(1, 2))


def attention(layer: ReducedACmix, x: Tensor, size: tuple[int, int]) -> Tensor:
    """proj of attention, a head at a time."""
    q = layer.q(x)
    k, v = layer.kv(keys_from(layer, x, size)).chunk(2, 2)
    width = layer.head_dim
    heads = []
    for head in range(layer.heads):
        own = slice(head * width, (head + 1) * width)
        weights = (q[..., own] @ k[..., own].transpose(1, 2) * width**-0.5).softmax(2)
        heads.append(weights @ v[..., own])
    return layer.proj(torch.cat(heads, 2))


def convolution(layer: ReducedACmix, x: Tensor, size: tuple[int, int]) -> Tensor:
    """fc of q at full resolution and of k, v at the reduced one, enlarged, added, shifted."""
    heads, width = layer.heads, layer.head_dim
    x = x[:, x.shape[1] - size[0] * size[1] :]
    q = layer.q(x).unflatten(2, (heads, width))
    kv = layer.kv(keys_from(layer, x, size)).unflatten(2, (2 * heads, width))
    small = tuple(-(-side // layer.reduction) for side in size)
    of_q = torch.einsum("tj,bljd->btdl", layer.fc_weight[:, :heads], q).unflatten(3, size)
    of_kv = torch.einsum("tj,bljd->btdl", layer.fc_weight[:, heads:], kv).unflatten(3, small)
    for dimension in (3, 4):
        of_kv = of_kv.repeat_interleave(layer.reduction, dimension)
    pieces = of_q + of_kv[..., : size[0], : size[1]]
    kernels = layer.shift.kernels(like=x)
    if kernels is None:
        kernels = shift_kernels(layer.dim, layer.kernel_conv, dtype=x.dtype)
    eye = torch.eye(layer.kernel_conv**2, dtype=x.dtype)
    out = shift_convolution(pieces, eye, kernels, backend="reference")
    return out.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize(
    ("size", "reduction", "extra"),
    [((4, 6), 2, 0), ((5, 3), 2, 0), ((1, 1), 4, 0), ((3, 4), 1, 0), ((3, 4), 1, 1)],
    ids=str,
)
def test_is_the_sum_of_its_paths(
    mix: str,
    shift: str,
    size: tuple[int, int],
    reduction: int,
    extra: int,
    form: str,
) -> None:
    layer = make_layer(mix=mix, shift=shift, reduction=reduction)
    x = torch.randn(2, extra + size[0] * size[1], 8, dtype=torch.float64)
    alpha, beta = layer.mix.weights()
    expected = torch.zeros_like(x)
    if alpha is not None:
        expected = expected + alpha * attention(layer, x, size)
    if beta is not None:
        map_only = beta * convolution(layer, x, size)
        expected = expected + torch.nn.functional.pad(map_only, (0, 0, extra, 0))
    out = layer(x, size)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_names_are_those_of_pvt() -> None:
    names = {name.split(".")[0] for name in make_layer(mix="attention").state_dict()}
    assert names == {"q", "kv", "sr", "norm", "proj"}
    names = {name.split(".")[0] for name in make_layer(mix="attention", reduction=1).state_dict()}
    assert names == {"q", "kv", "proj"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    layer = make_layer()
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    expected = layer(x, (4, 5))
    actual = layer.to(dtype)(x.to(dtype), (4, 5))
    assert actual.dtype == dtype
    assert_all_close([actual], [expected], TOLERANCE[dtype])


def test_batches() -> None:
    layer = make_layer()
    x = torch.randn(3, 20, 8, dtype=torch.float64)
    expected = layer(x, (4, 5))
    torch.testing.assert_close(layer(x[1:2], (4, 5)), expected[1:2])
    assert layer(x[:0], (4, 5)).shape == (0, 20, 8)


def test_initialisation() -> None:
    layer = ReducedACmix(8, heads=2)
    assert torch.equal(layer.shift.weight, shift_kernels(8, 3))
    assert layer.mix.alpha.item() == layer.mix.beta.item() == 0.5
    assert layer.q.weight.std() < 0.03


def test_compile() -> None:
    layer = make_layer().float()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(2, 20, 8)
    torch.testing.assert_close(compiled(x, (4, 5)), layer(x, (4, 5)))


class OfMap(nn.Module):
    """The layer on a map (B, H, W, dim)."""

    def __init__(self, layer: ReducedACmix) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1, 2), (x.shape[1], x.shape[2]))


@pytest.mark.parametrize("reduction", [1, 2])
@pytest.mark.slow
def test_export(reduction: int) -> None:
    """One program for maps of any size over the reduction."""
    layer = OfMap(make_layer(reduction=reduction).float())
    least = reduction + 1
    dynamic = ({0: Dim("batch"), 1: Dim("height", min=least), 2: Dim("width", min=least)},)
    program = torch.export.export(
        layer, (torch.randn(2, 7, 6, 8),), dynamic_shapes=dynamic
    ).module()
    for shape in [(2, 7, 6), (3, 4, 9), (1, least, least)]:
        x = torch.randn(*shape, 8)
        torch.testing.assert_close(program(x), layer(x))
