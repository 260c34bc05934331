"""Layers inside the transforms of torch.func and forward-mode derivatives, compiled or not."""

from collections.abc import Callable

import pytest
import torch
from helpers import slow_but
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.torch_version import TorchVersion

from acmix import ACmix2d
from acmix.layers import PatchwiseACmix, ReducedACmix, WindowACmix

Function = Callable[[Tensor], Tensor]


class Reduced(ReducedACmix):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, (3, 4))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (lambda: ACmix2d(4, 4, heads=2, kernel_att=3), (1, 4, 3, 4)),
    "swin": (lambda: WindowACmix(4, heads=2, window_size=2, shift_size=1), (1, 3, 4, 4)),
    "pvt": (lambda: Reduced(4, heads=2, reduction=2), (1, 12, 4)),
    "san": (lambda: PatchwiseACmix(4, 8, kernel_att=3).eval(), (1, 4, 3, 4)),
}


def scalar(f: Function) -> Function:
    return lambda x: f(x).square().sum()


def tangent_of_a_dual(f: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent


TRANSFORMS: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),))[1],
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "dual": tangent_of_a_dual,
    "grad": lambda f, x: grad(scalar(f))(x),
    "jacrev": lambda f, x: jacrev(f)(x),
    "vmap of grad": lambda f, x: vmap(grad(scalar(f)))(torch.stack([x, -x])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform(transform: str) -> None:
    """The derivative of the definition, never zeros."""
    check("resnet", transform, compiled=False)


@pytest.mark.parametrize("transform", slow_but(["jvp"], TRANSFORMS))
def test_compiled_transform(transform: str) -> None:
    if transform == "jacrev" and torch.__version__ < TorchVersion("2.9"):
        pytest.skip("AOTAutograd of PyTorch 2.8 is wrong, the compiler's own trace is right")
    check("resnet", transform, compiled=True)


@pytest.mark.parametrize("transform", ["jvp", "grad"])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "resnet"])
@pytest.mark.slow
def test_transform_of_other_layers(name: str, transform: str) -> None:
    # torch.compile fails on PyTorch's own norms inside a transform, those of SAN and PVT.
    check(name, transform, compiled=name == "swin")


def check(name: str, transform: str, compiled: bool) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(1)
    layer, x = make().requires_grad_(False), torch.randn(shape)

    def run(x: Tensor) -> Tensor:
        return TRANSFORMS[transform](layer, x)

    torch._dynamo.reset()
    actual = (torch.compile(run, backend="aot_eager") if compiled else run)(x)
    wanted = by_reverse_mode(transform, layer.double(), x.double())
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-5)


def by_reverse_mode(transform: str, layer: nn.Module, x: Tensor) -> Tensor:
    """The same without a transform."""
    if "grad" in transform:
        leaves = [y.requires_grad_() for y in ([x] if transform == "grad" else [x, -x])]
        gradients = [torch.autograd.grad(scalar(layer)(y), y)[0] for y in leaves]
        return gradients[0] if transform == "grad" else torch.stack(gradients)
    jacobian = torch.autograd.functional.jacobian(layer, x)
    if transform.startswith("jac"):
        return jacobian
    return (jacobian * x.cos()).flatten(-x.dim()).sum(-1)


@pytest.mark.parametrize("backend", ["tiled", "native"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_backend_by_name_is_refused(backend: str, compiled: bool) -> None:
    layer = ACmix2d(4, 4, heads=2, kernel_att=3, backend=backend)

    def run(x: Tensor) -> Tensor:
        return jvp(layer, (x,), (x,))[1]

    torch._dynamo.reset()
    with pytest.raises(Exception, match="cannot run here: it has no rule for forward-mode"):
        (torch.compile(run, backend="aot_eager") if compiled else run)(torch.randn(1, 4, 3, 4))


def test_a_compiled_layer_inside_a_transform() -> None:
    """What was compiled outside of one is not taken inside, nor the converse."""
    layer, x = ACmix2d(4, 4, heads=2, kernel_att=3), torch.randn(1, 4, 3, 4)
    compiled = torch.compile(layer, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), layer(x))
        tangent = jvp(compiled, (x,), (x,))[1]
        torch.testing.assert_close(tangent, jvp(layer, (x,), (x,))[1])
