"""PatchwiseACmix and PairwiseAttention: their equations step by step, and what they must take."""

import pytest
import torch
from helpers import TOLERANCE, assert_all_close, set_form
from torch import Tensor, nn

from acmix.layers import PairwiseAttention, PatchwiseACmix
from acmix.layers import patchwise as patchwise_layer
from acmix.layers.mix import MIXES
from acmix.layers.shift import SHIFTS
from acmix.ops import shift_convolution, shift_kernels

CHANNELS = 16
# Of maps with a border only, smaller than the window, of one row, and with an inside.
SIZES = [(6, 7), (2, 3), (1, 5), (1, 1)]


def randomised(layer: nn.Module) -> nn.Module:
    """Away from every special value, the running statistics too."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in layer.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + (0.5 if name.endswith("var") else -0.5))
    return layer.eval()


def make_layer(**arguments: object) -> PatchwiseACmix:
    defaults = {"kernel_att": 5, "dtype": torch.float64}
    return randomised(PatchwiseACmix(8, CHANNELS, **{**defaults, **arguments}))


def make_pairwise(**arguments: object) -> PairwiseAttention:
    defaults = {"kernel_att": 5, "dtype": torch.float64}
    return randomised(PairwiseAttention(8, CHANNELS, **{**defaults, **arguments}))


MAKERS = pytest.mark.parametrize("make", [make_layer, make_pairwise], ids=["patchwise", "pairwise"])


def reflected(index: int, size: int) -> int:
    """One step at a time, as often as it takes."""
    while not 0 <= index < size:
        index = 0 if size == 1 else -index if index < 0 else 2 * (size - 1) - index
    return index


def taps_of(i: int, j: int, side: int, size: tuple[int, int]) -> list[tuple[int, int]]:
    steps = range(-(side // 2), side // 2 + 1)
    return [(reflected(i + u, size[0]), reflected(j + v, size[1])) for u in steps for v in steps]


def aggregate(weights: Tensor, v: Tensor, taps: list[tuple[int, int]]) -> Tensor:
    """weights (C / 8, taps) of one pixel: channel c takes those of c mod C / 8."""
    values = torch.stack([v[:, a, b] for a, b in taps], 1)
    return torch.stack([values[c] @ weights[c % len(weights)] for c in range(len(values))])


def patchwise(layer: PatchwiseACmix, x: Tensor) -> Tensor:
    """One image (C, H, W), a pixel at a time: Zhao et al., Eq. 4."""
    q, k, v = (conv(x[None])[0] for conv in (layer.conv1, layer.conv2, layer.conv3))
    out = torch.empty_like(v)
    size, side = tuple(x.shape[1:]), layer.kernel_att
    for i in range(size[0]):
        for j in range(size[1]):
            taps = taps_of(i, j, side, size)
            keys = [k[c, a, b] for c in range(len(k)) for a, b in taps]
            both = torch.cat([q[:, i, j], torch.stack(keys)])
            weights = layer.conv_w(both[None, :, None, None]).view(-1, len(taps))
            out[:, i, j] = aggregate(weights, v, taps)
    return out


def pairwise(layer: PairwiseAttention, x: Tensor) -> Tensor:
    """One image (C, H, W), a pair of pixels at a time: Zhao et al., Eq. 2."""
    q, k, v = (conv(x[None])[0] for conv in (layer.conv1, layer.conv2, layer.conv3))
    height, width = x.shape[1:]
    lengths = [torch.linspace(-1, 1, n, dtype=x.dtype) for n in (width, height)]
    matrix = layer.conv_p.weight[:, :, 0, 0]
    out = torch.empty_like(v)
    for i in range(height):
        for j in range(width):
            taps = taps_of(i, j, layer.kernel_att, (height, width))
            weights = []
            for a, b in taps:
                apart = torch.stack([lengths[0][j] - lengths[0][b], lengths[1][i] - lengths[1][a]])
                both = torch.cat([q[:, i, j] - k[:, a, b], matrix @ apart])
                weights.append(layer.conv_w(both[None, :, None, None]).flatten())
            out[:, i, j] = aggregate(torch.stack(weights, 1).softmax(1), v, taps)
    return out


def convolution(layer: PatchwiseACmix, x: Tensor) -> Tensor:
    """fc of the six pieces q, k and the quarters of v, then shifted and summed."""
    projected = torch.cat([layer.conv1(x), layer.conv2(x), layer.conv3(x)], 1)
    pieces = torch.stack(projected.split(CHANNELS // 4, 1), 1)
    assert pieces.shape[1] == 6
    kernels = layer.shift.kernels(like=x)
    if kernels is None:
        kernels = shift_kernels(CHANNELS, layer.kernel_conv, dtype=x.dtype)
    return shift_convolution(pieces, layer.fc_weight, kernels, backend="reference")


@pytest.mark.parametrize("size", SIZES, ids=str)
@MAKERS
def test_is_the_equation(make, size: tuple[int, int]) -> None:
    layer = make() if make is make_pairwise else make(mix="attention")
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    by_pixel = pairwise if make is make_pairwise else patchwise
    expected = torch.stack([by_pixel(layer, image) for image in x])
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("shift", SHIFTS)
def test_is_the_sum_of_its_paths(mix: str, shift: str, form: str) -> None:
    layer = make_layer(mix=mix, shift=shift, kernel_att=3)
    x = torch.randn(2, 8, 4, 5, dtype=torch.float64)
    alpha, beta = layer.mix.weights()
    expected = torch.zeros(2, CHANNELS, 4, 5, dtype=x.dtype)
    if alpha is not None:
        expected = expected + alpha * torch.stack([patchwise(layer, image) for image in x])
    if beta is not None:
        expected = expected + beta * convolution(layer, x)
    out = layer(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@MAKERS
def test_one_projection_is_three_convolutions(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form of a GPU, which calls none of them."""
    layer, x = make(), torch.randn(2, 8, 4, 5, dtype=torch.float64)
    expected = layer(x)
    monkeypatch.setattr(patchwise_layer, "one_for_all", lambda x: True)
    set_form(monkeypatch, "dense")
    for conv in (layer.conv1, layer.conv2, layer.conv3):
        monkeypatch.setattr(conv, "forward", None)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("backend", ["reference", "tiled", "native"])
@MAKERS
def test_backends(make, backend: str) -> None:
    layer = make(dtype=torch.float32)
    x = torch.randn(2, 8, 6, 7)
    expected = layer(x)
    layer.backend = backend
    try:
        actual = layer(x)
    except ValueError as reason:
        pytest.skip(str(reason))
    assert_all_close([actual], [expected], TOLERANCE[torch.float32])


def test_other_sharing_and_parts() -> None:
    layer = make_layer(reduction=2, share_planes=16, kernel_conv=5)
    assert layer.conv1.out_channels == 8
    assert layer.fc_weight.shape == (25, 4)
    assert layer.conv_w[-1].out_channels == 25
    x = torch.randn(1, 8, 3, 4, dtype=torch.float64)
    alone = patchwise(layer, x[0])
    layer.mix.beta.data.zero_()
    torch.testing.assert_close(layer(x)[0], layer.mix.alpha * alone)


def test_names_are_those_of_san() -> None:
    names = {name.split(".")[0] for name in make_layer(mix="attention").state_dict()}
    assert names == {"conv1", "conv2", "conv3", "conv_w"}
    names = {name.split(".")[0] for name in make_pairwise().state_dict()}
    assert names == {"conv1", "conv2", "conv3", "conv_w", "conv_p"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@MAKERS
def test_dtypes(make, dtype: torch.dtype) -> None:
    layer = make()
    x = torch.randn(2, 8, 4, 5, dtype=torch.float64)
    expected = layer(x)
    actual = layer.to(dtype)(x.to(dtype))
    assert actual.dtype == dtype
    assert_all_close([actual], [expected], TOLERANCE[dtype])


@MAKERS
def test_batches_and_memory_formats(make) -> None:
    layer = make()
    x = torch.randn(3, 8, 4, 5, dtype=torch.float64)
    expected = layer(x)
    torch.testing.assert_close(layer(x[1:2]), expected[1:2])
    assert layer(x[:0]).shape == (0, CHANNELS, 4, 5)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected)
    torch.testing.assert_close(layer(x.transpose(2, 3).contiguous().transpose(2, 3)), expected)


def test_initialisation() -> None:
    torch.manual_seed(1)
    layer = PatchwiseACmix(8, CHANNELS)
    fresh = {key: value.clone() for key, value in layer.state_dict().items()}
    assert torch.equal(layer.shift.weight, shift_kernels(CHANNELS, 3))
    assert layer.mix.alpha.item() == layer.mix.beta.item() == 0.5
    randomised(layer)
    torch.manual_seed(1)
    layer.reset_parameters()
    for key, value in layer.state_dict().items():
        assert torch.equal(value, fresh[key]), key


@MAKERS
def test_compile(make) -> None:
    layer = make(dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(2, 8, 4, 5)
    torch.testing.assert_close(compiled(x), layer(x))
