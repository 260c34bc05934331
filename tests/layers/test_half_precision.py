"""Half precision where PyTorch's own convolutions are wrong, and default dtypes and devices."""

from collections.abc import Iterator

import pytest
import torch
from helpers import TOLERANCE, as_function, assert_all_close, outputs_and_gradients
from torch import Tensor, nn

from acmix import ACmix2d
from acmix.layers import PatchwiseACmix, ReducedACmix, WindowACmix

HALF = [torch.bfloat16, torch.float16]


class Reduced(ReducedACmix):
    """On maps of 12 x 2."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, (12, 2))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("backend", ["reference", "tiled", "auto"])
def test_output_of_one_column_and_a_stride(
    backend: str, width: int, dtype: torch.dtype, form: str
) -> None:
    """oneDNN's bfloat16 convolution is garbage there where the processor has AMX."""
    layer = ACmix2d(16, 16, stride=2, mix="convolution", backend=backend)
    compare(layer, torch.randn(4, 16, 12, width), dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_reduction_to_one_column(dtype: torch.dtype) -> None:
    compare(Reduced(24, heads=3, reduction=2), torch.randn(4, 24, 24), dtype)


def compare(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """With the same layer in float64, on the same rounded numbers."""
    layer.to(dtype)
    half = [x.to(dtype), *layer.parameters()]
    actual = outputs_and_gradients(as_function(layer), half)
    layer.double()
    expected = outputs_and_gradients(as_function(layer), [tensor.double() for tensor in half])
    assert_all_close(actual, expected, 2 * TOLERANCE[dtype])  # a projection, then the operator


LAYERS = {
    "resnet": (lambda **kind: ACmix2d(8, 8, stride=2, **kind), (2, 8, 5, 6)),
    "swin": (lambda **kind: WindowACmix(8, heads=2, window_size=3, **kind), (2, 5, 6, 8)),
    "san": (lambda **kind: PatchwiseACmix(8, 16, kernel_att=3, **kind).eval(), (2, 8, 5, 6)),
    "pvt": (lambda **kind: Reduced(8, heads=2, reduction=2, **kind), (2, 24, 8)),
}


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16, "meta"], ids=str)
def default(request: pytest.FixtureRequest) -> Iterator[None]:
    """Another default dtype, or another default device."""
    if request.param == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(request.param)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("default")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "tiled", "reference"])
@pytest.mark.parametrize("name", LAYERS)
def test_defaults_do_not_matter(name: str, backend: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[name]
    kind = {"dtype": dtype, "device": "cpu"}
    layer, x = make(**kind), torch.randn(shape, **kind)
    layer.backend = backend
    out, *gradients = outputs_and_gradients(as_function(layer), [x, *layer.parameters()])
    assert out.dtype == dtype
    expected = as_function(layer.double())(*(t.double() for t in (x, *layer.parameters())))
    assert_all_close([out], [expected], 2 * TOLERANCE[dtype])
    assert all(gradient.isfinite().all() for gradient in gradients)
