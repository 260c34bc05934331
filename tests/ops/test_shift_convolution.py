"""The convolution path: two steps, folded to one, and folded into the projection."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_all_close, outputs_and_gradients
from torch import Tensor

from acmix.ops import shift_convolution, shift_kernels
from acmix.ops.shift_convolution import folded, reference

PIECES, HEAD_DIM, OUT = 6, 4, 2

CASES = pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation"),
    [
        ((5, 7), 3, 1, 1),
        ((1, 1), 3, 1, 1),
        ((1, 4), 5, 2, 1),
        ((6, 9), 3, 2, 2),
        ((8, 3), 1, 3, 1),
    ],
)


def make_inputs(size: tuple[int, int], kernel: int) -> list[Tensor]:
    taps = kernel**2
    shapes = [
        (2, PIECES, HEAD_DIM, *size),
        (taps, PIECES),
        (HEAD_DIM * OUT, taps, kernel, kernel),
        (taps,),
    ]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@CASES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_folded_is_the_reference(
    size: tuple[int, int], kernel: int, stride: int, dilation: int, bias: bool
) -> None:
    inputs = make_inputs(size, kernel)[: 4 if bias else 3]

    def run(backend: str):
        def function(
            pieces: Tensor, fc: Tensor, shift: Tensor, fc_bias: Tensor | None = None
        ) -> Tensor:
            return shift_convolution(
                pieces,
                fc,
                shift,
                fc_bias=fc_bias,
                stride=stride,
                dilation=dilation,
                backend=backend,
            )

        return function

    expected = outputs_and_gradients(run("reference"), inputs)
    assert_all_close(outputs_and_gradients(run("tiled"), inputs), expected, 1e-12)


@CASES
def test_dense_fold_has_the_exact_border(
    size: tuple[int, int], kernel: int, stride: int, dilation: int
) -> None:
    _, fc, shift, fc_bias = make_inputs(size, kernel)
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    weight = torch.randn(PIECES, HEAD_DIM, 5, dtype=torch.float64)
    bias = torch.randn(PIECES, HEAD_DIM, dtype=torch.float64)

    def two_steps(x: Tensor, weight: Tensor, bias: Tensor, *fold: Tensor) -> Tensor:
        pieces = torch.einsum("jci,bihw->bjchw", weight, x) + bias[:, :, None, None]
        return reference.forward(pieces, *fold, stride, dilation)

    def dense(x: Tensor, weight: Tensor, bias: Tensor, *fold: Tensor) -> Tensor:
        kernel, taps = folded.fold_dense([(weight, bias)], *fold)
        out = folded.convolve(x, kernel, stride, dilation)
        return out + folded.border_bias(taps, out, x, stride, dilation)

    inputs = [x, weight, bias, fc, shift, fc_bias]
    expected = outputs_and_gradients(two_steps, inputs)
    assert_all_close(outputs_and_gradients(dense, inputs), expected, 1e-12)


@CASES
def test_tensor_shifts_are_the_shift_kernels(
    size: tuple[int, int], kernel: int, stride: int, dilation: int
) -> None:
    pieces, fc, _, fc_bias = make_inputs(size, kernel)
    kernels = shift_kernels(HEAD_DIM * OUT, kernel, dtype=torch.float64)
    expected = reference.forward(pieces, fc, kernels, fc_bias, stride, dilation)
    actual = reference.shift_tensors(pieces, fc, OUT, fc_bias, stride, dilation)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", ["auto", "tiled"])
def test_bias_of_fc_has_a_gradient_in_half_precision(backend: str) -> None:
    """It is a sum over the map of numbers that mostly cancel."""
    pieces, fc = torch.randn(2, 6, 3, 31, 31), torch.randn(9, 6)
    kernels, bias = torch.randn(12, 9, 3, 3), torch.randn(9)
    seed = torch.randn(2, 12, 31, 31).bfloat16()
    gradients = []
    for dtype, name in ((torch.bfloat16, backend), (torch.float64, "reference")):
        leaf = bias.bfloat16().to(dtype).requires_grad_()
        inputs = [x.bfloat16().to(dtype) for x in (pieces, fc, kernels)]
        out = shift_convolution(*inputs, fc_bias=leaf, backend=name)
        assert out.dtype == dtype
        gradients.append(torch.autograd.grad(out, leaf, seed.to(dtype))[0])
    error = (gradients[0].double() - gradients[1]).abs().max() / gradients[1].abs().max()
    assert error < 0.02


@pytest.mark.parametrize("half", ["pieces", "weights"])
@pytest.mark.parametrize("backend", ["reference", "tiled", "auto"])
def test_autocast_takes_mixed_dtypes(backend: str, half: str) -> None:
    """The output of a half-precision layer meets the float32 parameters of the next, or the
    converse."""
    pieces, *weights = (x.bfloat16().float() for x in make_inputs((6, 7), 3))
    inputs = [pieces.bfloat16(), *weights]
    if half == "weights":
        inputs = [pieces, *(x.bfloat16() for x in weights)]
    *inputs, bias = inputs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = shift_convolution(*inputs, fc_bias=bias, backend=backend)
    assert out.dtype == torch.bfloat16
    expected = shift_convolution(pieces, *weights[:2], fc_bias=weights[2], backend="reference")
    assert_all_close([out.float()], [expected], 3e-2)


def test_a_convolution_is_shifted_pieces() -> None:
    """The paper's Eq. 4 to 6: k^2 1x1 convolutions, shifted and summed, are the convolution."""
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    pieces = torch.einsum("oiuv,bihw->buvohw", weight, x).flatten(1, 2)
    kernels = shift_kernels(4, 3, dtype=torch.float64)
    actual = shift_convolution(pieces, torch.eye(9, dtype=torch.float64), kernels)
    torch.testing.assert_close(actual, F.conv2d(x, weight, padding=1))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pieces": torch.ones(2, 6, 5, 5)}, ValueError, "pieces: expected 5 dimensions"),
        ({"fc_weight": torch.ones(9, 5)}, ValueError, r"fc_weight: expected shape \(9, 6\)"),
        ({"shift_weight": torch.ones(8, 4, 2, 2)}, ValueError, "shift_weight: k: expected an odd"),
        ({"shift_weight": torch.ones(8, 9, 3, 5)}, ValueError, "shift_weight: expected shape"),
        ({"shift_weight": torch.ones(7, 9, 3, 3)}, ValueError, "shift_weight: channels: expected"),
        ({"fc_bias": torch.ones(3)}, ValueError, r"fc_bias: expected shape \(9,\), got \(3,\)"),
        ({"backend": "fast"}, ValueError, "backend: expected one of"),
        ({"stride": 0}, ValueError, "stride: expected a positive int, got 0"),
        ({"fc_weight": torch.ones(9, 6).half()}, TypeError, "fc_weight: expected the dtype"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments(change: dict, error: type[Exception], message: str) -> None:
    pieces, fc, shift, _ = (x.float() for x in make_inputs((5, 5), 3))
    arguments = {"pieces": pieces, "fc_weight": fc, "shift_weight": shift, **change}
    with pytest.raises(error, match=message):
        shift_convolution(**arguments)
