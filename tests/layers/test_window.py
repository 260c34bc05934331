"""WindowACmix: against timm's attention, against the paths one by one, and what it must work
under."""

import copy
import math

import pytest
import torch
from helpers import (
    TOLERANCE,
    as_function,
    assert_all_close,
    outputs_and_gradients,
    perturbed,
    set_form,
)
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor
from torch.export import Dim
from torch.torch_version import TorchVersion

from acmix.layers.mix import MIXES
from acmix.layers.shift import SHIFTS
from acmix.layers.window import WindowACmix
from acmix.ops import shift_convolution
from acmix.ops._dispatch import choose
from acmix.ops.partition_attention import IMPLEMENTATIONS as ATTENTION

# (map, window, shift): whole windows, padded ones, windows larger than the map, and rectangles.
GRIDS = [
    ((8, 8), 4, 0),
    ((8, 12), 4, 2),
    ((7, 5), 4, 2),
    ((3, 2), 7, 3),
    ((1, 1), 3, 1),
    ((6, 9), (2, 3), (1, 1)),
    ((6, 9), (2, 3), (0, 1)),
]
grids = pytest.mark.parametrize(("size", "window", "shift"), GRIDS, ids=str)


def make_layer(**arguments: object) -> WindowACmix:
    defaults = {"heads": 2, "window_size": 4, "dtype": torch.float64}
    return perturbed(WindowACmix(8, **{**defaults, **arguments}))


def timm_attention(layer: WindowACmix, x: Tensor) -> Tensor:
    """alpha = 1 and beta = 0, by timm's block."""
    block = SwinTransformerBlock(
        layer.dim,
        x.shape[1:3],
        layer.heads,
        window_size=layer.window_size,
        shift_size=layer.shift_size,
        always_partition=True,
    )
    block = block.to(x.dtype)
    block.attn.load_state_dict(layer.state_dict(), strict=False)
    return block._attn(x)


def convolution(layer: WindowACmix, x: Tensor) -> Tensor:
    """The convolution path step by step on an unrolled map, (B, H, W, dim)."""
    pieces = layer.qkv(x).unflatten(-1, (3 * layer.heads, layer.head_dim)).permute(0, 3, 4, 1, 2)
    kernels = layer.shift.kernels(like=x)
    if kernels is None:
        kernels = shift_one_hot(layer).to(x.dtype)
    out = shift_convolution(
        pieces, layer.fc_weight, kernels, fc_bias=layer.fc_bias, backend="reference"
    )
    return out.permute(0, 2, 3, 1)


def shift_one_hot(layer: WindowACmix) -> Tensor:
    side = layer.kernel_conv
    return torch.eye(side * side).view(1, side * side, side, side).repeat(layer.dim, 1, 1, 1)


@grids
def test_attention_is_timms(
    size: tuple[int, int], window: int | tuple[int, int], shift: int | tuple[int, int]
) -> None:
    layer = make_layer(window_size=window, shift_size=shift, mix="attention")
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), timm_attention(layer, x))


@grids
@pytest.mark.parametrize("roll", [True, False], ids=["rolled", "unrolled"])
def test_is_the_sum_of_its_paths(
    form: str,
    roll: bool,
    size: tuple[int, int],
    window: int | tuple[int, int],
    shift: int | tuple[int, int],
) -> None:
    layer = make_layer(window_size=window, shift_size=shift, roll_convolution=roll)
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    rows, columns = layer.shift_size if roll else (0, 0)
    rolled = convolution(layer, torch.roll(x, (-rows, -columns), (1, 2)))
    expected = layer.mix.alpha * timm_attention(layer, x)
    expected = expected + layer.mix.beta * torch.roll(rolled, (rows, columns), (1, 2))
    torch.testing.assert_close(layer(x), expected)


def test_rolled_convolution_lets_borders_touch() -> None:
    """Its output at a border reads the opposite one, the unrolled form's does not."""
    x = torch.randn(1, 8, 8, 8, dtype=torch.float64, requires_grad=True)
    for roll, touches in [(True, True), (False, False)]:
        layer = make_layer(shift_size=2, roll_convolution=roll, mix="convolution")
        (gradient,) = torch.autograd.grad(layer(x)[0, 0, 4].sum(), x)
        assert bool(gradient[0, -1].any()) == touches


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("roll", [True, False], ids=["rolled", "unrolled"])
def test_mixes_and_shifts(form: str, mix: str, shift: str, roll: bool) -> None:
    layer = make_layer(mix=mix, shift=shift, roll_convolution=roll, shift_size=2)
    x = torch.randn(2, 6, 7, 8, dtype=torch.float64)
    alpha, beta = layer.mix.weights()
    rows = columns = 2 if roll else 0
    expected = 0
    if alpha is not None:
        expected = expected + alpha * timm_attention(layer, x)
    if beta is not None:
        rolled = convolution(layer, torch.roll(x, (-rows, -columns), (1, 2)))
        expected = expected + beta * torch.roll(rolled, (rows, columns), (1, 2))
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_unused_path_has_no_parameters() -> None:
    attention, conv = make_layer(mix="attention"), make_layer(mix="convolution")
    names = {name.split(".")[0] for name, _ in attention.named_parameters()}
    assert names == {"qkv", "proj", "relative_position_bias_table"}
    names = {name.split(".")[0] for name, _ in conv.named_parameters()}
    assert names == {"qkv", "fc_weight", "fc_bias", "shift"}


def test_gradients() -> None:
    layer = WindowACmix(2, heads=1, window_size=2, shift_size=1, dtype=torch.float64)
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    inputs = [x, *layer.parameters()]
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(as_function(layer), inputs)


def test_forms_have_equal_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(shift_size=1)
    inputs = [torch.randn(2, 5, 6, 8, dtype=torch.float64), *layer.parameters()]
    results = []
    for form in ("pieces", "dense"):
        set_form(monkeypatch, form)
        results.append(outputs_and_gradients(as_function(layer), inputs))
    assert_all_close(*results, TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(form: str, dtype: torch.dtype) -> None:
    layer = make_layer(shift_size=1)
    x = torch.randn(2, 5, 6, 8, dtype=torch.float64)
    expected = layer(x)
    actual = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    assert actual.dtype == dtype
    assert_all_close([actual], [expected], TOLERANCE[dtype])


def test_autocast(form: str) -> None:
    layer = make_layer(shift_size=1).float()
    x = torch.randn(2, 5, 6, 8)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = layer(x)
    actual.sum().backward()
    assert_all_close([actual], [expected], TOLERANCE[torch.bfloat16])


def test_batches_and_strides() -> None:
    layer = make_layer(shift_size=1)
    x = torch.randn(3, 8, 5, 6, dtype=torch.float64).permute(0, 2, 3, 1)  # (B, C, H, W) in memory
    expected = layer(x.contiguous())
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x[1:2]), expected[1:2])
    assert layer(x[:0]).shape == (0, 5, 6, 8)


def test_initialisation() -> None:
    layer = WindowACmix(8, heads=2)
    assert layer.mix.alpha.item() == layer.mix.beta.item() == 0.5
    assert torch.equal(layer.shift.weight, shift_one_hot(layer))
    assert layer.qkv.weight.std() < 0.03
    assert not layer.qkv.bias.any()
    assert layer.fc_weight.abs().max() <= 1 / math.sqrt(6)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.slow
def test_compile(dynamic: bool) -> None:
    layer = make_layer(shift_size=1).float()
    backend = "eager" if dynamic else "aot_eager"
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=backend)
    for size in [(5, 6), (9, 7)]:
        x = torch.randn(2, *size, 8)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("arguments", [{}, {"shift_size": 1}, {"mix": "attention"}], ids=str)
@pytest.mark.parametrize("roll", [True, False], ids=["rolled", "unrolled"])
@pytest.mark.slow
def test_export(arguments: dict, roll: bool) -> None:
    """One program for maps of any size; the portable form takes more than a window a side."""
    layer = make_layer(roll_convolution=roll, **arguments).float()
    native = choose("auto", ATTENTION, torch.zeros(1)) is ATTENTION["native"]
    if native and torch.__version__ >= TorchVersion("2.9"):  # 2.8 cannot prove a stride's size
        sides = {1: Dim("height", min=1), 2: Dim("width", min=1)}
    else:
        sides = {1: Dim.AUTO, 2: Dim.AUTO}
    dynamic = ({0: Dim("batch"), **sides},)
    program = torch.export.export(
        layer, (torch.randn(2, 11, 6, 8),), dynamic_shapes=dynamic
    ).module()
    small = [(1, 4, 4), (3, 1, 3)] if native else []
    for shape in [(2, 11, 6), (3, 8, 20), *small]:
        x = torch.randn(*shape, 8)
        torch.testing.assert_close(program(x), layer(x))


def test_meta_device() -> None:
    layer = WindowACmix(8, heads=2, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(torch.randn(1, 8, 8, 8)).isfinite().all()


def test_set_window_size() -> None:
    layer = make_layer(window_size=4)
    table = layer.relative_position_bias_table
    layer.set_window_size(4, 2)
    assert layer.relative_position_bias_table is table
    layer.set_window_size((7, 3), (3, 1))
    assert layer.relative_position_bias_table.shape == (13 * 5, 2)
    centre = layer.relative_position_bias_table[13 * 5 // 2]
    torch.testing.assert_close(centre, table[7 * 7 // 2])
    assert layer(torch.randn(1, 9, 9, 8, dtype=torch.float64)).isfinite().all()


def test_position_bias_is_by_offset() -> None:
    layer = make_layer(window_size=(2, 3))
    bias = layer._position_bias()
    table = layer.relative_position_bias_table.t().view(2, 3, 5)
    for query in range(6):
        for key in range(6):
            rows, columns = query // 3 - key // 3, query % 3 - key % 3
            assert torch.equal(bias[:, query, key], table[:, rows + 1, columns + 2])


def test_attention_dropout_is_for_training() -> None:
    layer = make_layer(attn_drop=0.5)
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
