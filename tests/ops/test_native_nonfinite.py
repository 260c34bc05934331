"""One NaN or infinity in any argument: the CPU kernel's outputs and gradients are NaN, and
infinite, exactly where the definition's are, whatever the instruction set."""

import ctypes
import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import TOLERANCE, Shape, assert_all_close, shapes
from torch import Tensor

from acmix.ops import _native, shift_convolution
from acmix.ops.partition_attention import native as partition
from acmix.ops.partition_attention import reference as partition_reference
from acmix.ops.shift_convolution import reference as convolution_reference
from acmix.ops.weighted_aggregation import native as aggregation
from acmix.ops.weighted_aggregation import reference as aggregation_reference
from acmix.ops.window_attention import native as attention
from acmix.ops.window_attention import reference as attention_reference

pytestmark = pytest.mark.skipif(_native.reason() is not None, reason=str(_native.reason()))

# A NaN whose bits are all ones, as memory that was never written may hold.
ODD_NAN = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32).item()
VALUES = [(math.nan,), (math.inf,), (-math.inf,), (math.inf, -math.inf), (math.inf, math.inf)]
VALUES += [(math.nan, -math.inf), (ODD_NAN,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float32, torch.float16]

# (H, W, window, stride, dilation)
SHAPES = shapes("5 7 3 1 1, 9 7 5 2 1, 7 9 3 2 2, 2 3 7 1 1, 1 9 3 1 1, 13 19 3 1 2")


class Case(NamedTuple):
    """Two forms of an operator and the arguments of both, the gradient of the output the last."""

    native: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    arguments: dict[str, Tensor]


@pytest.fixture(autouse=True, scope="module", params=["plain", "avx2", "avx512"])
def simd(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """The kernel with one instruction set after the other: a copy of the library chooses anew."""
    source = next(path for path in _native.FOLDER.glob("_kernel*") if path.suffix != ".txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACMIX_SIMD", request.param)
        library = ctypes.CDLL(shutil.copy(source, tmp_path_factory.mktemp(request.param)))
        library.acmix_simd.restype = ctypes.c_char_p
        chosen = library.acmix_simd().decode().replace("neon", "plain")
        if chosen != request.param:
            pytest.skip(f"this machine has no {request.param}")
        library.acmix_lend_threads(_native._parallel_region())
        patch.setattr(_native, "_library", lambda: library)
        yield


def lay_out(x: Tensor, last: bool) -> Tensor:
    """(B, N, d, H, W) with the channels of a pixel side by side, or row by row."""
    return x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) if last else x


def out_size(shape: Shape) -> tuple[int, int]:
    return -(-shape[0] // shape[3]), -(-shape[1] // shape[3])


def attention_case(shape: Shape, dtype: torch.dtype, last: bool) -> Case:
    q, grad = (lay_out(torch.randn(2, 2, 3, *out_size(shape)), last).to(dtype) for _ in range(2))
    k, v = (lay_out(torch.randn(2, 2, 3, *shape[:2]), last).to(dtype) for _ in range(2))
    arguments = {"q": q, "k": k, "v": v, "position": torch.randn(3, 2), "grad_out": grad}
    return Case(
        lambda q, k, v, p: attention.forward(q, k, v, p, *shape[2:]),
        lambda q, k, v, p: attention_reference.forward(q, k, v, p, *shape[2:]),
        arguments,
    )


def aggregation_case(shape: Shape, dtype: torch.dtype, last: bool) -> Case:
    weight = lay_out(torch.randn(2, 2, shape[2] ** 2, *out_size(shape)), last)
    memory = torch.channels_last if last else torch.contiguous_format
    v, grad = torch.randn(2, 4, *shape[:2]), torch.randn(2, 4, *out_size(shape))
    arguments = {"weight": weight, "v": v.to(memory_format=memory), "grad_out": grad}
    return Case(
        lambda weight, v: aggregation.forward(weight, v, *shape[2:]),
        lambda weight, v: aggregation_reference.forward(weight, v, *shape[2:]),
        {name: x.to(dtype) for name, x in arguments.items()},
    )


def convolution_case(shape: Shape, dtype: torch.dtype, last: bool, fc: bool) -> Case:
    """The operator with a weight of each piece, or with `fc` apart. The reference pads by itself:
    whether PyTorch's convolution multiplies its padding depends on the sizes."""
    *size, kernel, stride, dilation = shape
    pieces, grad = (torch.randn(2, 4, 3, *size), torch.randn(2, 6, *out_size(shape)))
    arguments = {"pieces": lay_out(pieces, last).to(dtype)}
    arguments["weight"] = torch.randn(6, 3 if fc else 4, kernel, kernel)
    if fc:
        arguments["fc"] = torch.randn(3, 4)

    def reference(pieces: Tensor, weight: Tensor, *fc: Tensor) -> Tensor:
        x = pieces.float()
        for matrix in fc:
            x = convolution_reference.project(x, matrix, None)
        x = F.pad(x.transpose(1, 2).flatten(1, 2), (kernel // 2 * dilation,) * 4)
        return F.conv2d(x, weight, None, stride, 0, dilation, groups=3).to(pieces.dtype)

    def native(pieces: Tensor, weight: Tensor, *fc: Tensor) -> Tensor:
        return torch.ops.acmix.shift_convolution(pieces, weight, stride, dilation, *fc)

    return Case(native, reference, {**arguments, "grad_out": grad.to(dtype)})


def partition_case(shift: list[int], dtype: torch.dtype, last: bool) -> Case:
    pieces, grad = torch.randn(2, 6, 3, 4, 6), torch.randn(2, 2, 3, 4, 6)
    arguments = {"pieces": lay_out(pieces, last).to(dtype), "bias": torch.randn(2, 6, 6)}
    return Case(
        lambda pieces, bias: partition.forward(pieces, bias, [2, 3], shift),
        lambda pieces, bias: partition_reference.forward(pieces, bias, [2, 3], shift),
        {**arguments, "grad_out": grad.to(dtype)},
    )


def poisoned(case: Case) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The arguments with each of VALUES in each of them, at a corner, the other one, a border or
    the middle; a pair side by side."""
    for name, x in case.arguments.items():
        middle = [size // 2 for size in x.shape]
        ends = [size - 1 for size in x.shape]
        places = [[0] * x.dim(), ends, [*middle[:-2], 0, middle[-1]], middle]
        for values, place in zip(VALUES, itertools.cycle(places), strict=False):
            changed = x.clone(memory_format=torch.preserve_format)
            for step, value in enumerate(values):
                changed[(*place[:-1], (place[-1] + step) % x.shape[-1])] = value
            what = f"{values} at {place} of {name}"
            yield what, {**case.arguments, name: changed}


def outputs_and_gradients(
    function: Callable[..., Tensor], arguments: dict[str, Tensor]
) -> dict[str, Tensor]:
    *inputs, grad_out = arguments.values()
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, grad_out)
    return {"out": out.detach(), **dict(zip(arguments, gradients, strict=False))}


def check(case: Case, only: str | None = None) -> None:
    """`only` names the one argument that is poisoned."""
    for what, arguments in poisoned(case):
        if only and not what.endswith(f" of {only}"):
            continue
        actual = outputs_and_gradients(case.native, arguments)
        expected = outputs_and_gradients(case.reference, arguments)
        for name, x in actual.items():
            truth = expected[name]
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(x), kind(truth)), f"{kind.__name__} of {name}: {what}"
            finite = [torch.where(t.isfinite(), t, 0).float() for t in (x, truth)]
            assert_all_close(finite[:1], finite[1:], TOLERANCE[x.dtype], f"{name}: {what}")


# Types and layouts in turn, each with several shapes.
def forms(count: int) -> list[tuple[torch.dtype, bool]]:
    return [(DTYPES[i % 4], i // 2 % 2 == 1) for i in range(count)]


sizes = pytest.mark.parametrize("index", range(len(SHAPES)), ids=lambda i: str(SHAPES[i]))


@sizes
@pytest.mark.slow
def test_window_attention(index: int) -> None:
    for dtype, last in forms(4)[index % 2 :: 2]:
        check(attention_case(SHAPES[index], dtype, last))


@sizes
def test_weighted_aggregation(index: int) -> None:
    for dtype, last in forms(4)[index % 2 :: 2]:
        check(aggregation_case(SHAPES[index], dtype, last))


@pytest.mark.parametrize("fc", [False, True], ids=["folded", "apart"])
@pytest.mark.parametrize(
    "shape",
    [(5, 7, 3, 1, 1), (9, 7, 5, 2, 1), (13, 19, 3, 1, 2), (7, 8, 3, 3, 1), (6, 5, 1, 1, 1)],
    ids=str,
)
@pytest.mark.slow
def test_shift_convolution(shape: Shape, fc: bool) -> None:
    for dtype, last in forms(4)[fc::2]:
        check(convolution_case(shape, dtype, last, fc))


@pytest.mark.parametrize("shape", [(7, 9, 3, 2, 2), (2, 3, 7, 1, 1), (1, 9, 3, 1, 1)], ids=str)
def test_shift_convolution_of_pieces_that_few_taps_meet(shape: Shape) -> None:
    """Some taps meet padding alone, whose product with an infinite weight nobody defines."""
    check(convolution_case(shape, torch.float32, False, fc=False), only="pieces")


@pytest.mark.parametrize("outputs", [1, 9], ids=["folded", "apart"])
def test_convolution_path(outputs: int) -> None:
    """A NaN comes through the fold of fc and the kernels as through both of them."""
    arguments = {"pieces": torch.randn(2, 6, 3, 7, 9), "fc": torch.randn(9, 6)}
    arguments["kernels"] = torch.randn(3 * outputs, 9, 3, 3)
    arguments["grad_out"] = torch.randn(2, 3 * outputs, 4, 5)
    case = Case(
        lambda *x: shift_convolution(*x, stride=2, backend="native"),
        lambda *x: shift_convolution(*x, stride=2, backend="reference"),
        arguments,
    )
    for what, changed in poisoned(case):
        if what.startswith("(nan,)") and what.endswith("of pieces"):
            actual = outputs_and_gradients(case.native, changed)
            expected = outputs_and_gradients(case.reference, changed)
            for name, x in actual.items():
                assert torch.equal(x.isnan(), expected[name].isnan()), f"{name}: {what}"


@pytest.mark.parametrize("batch", [1, 40])
def test_shift_convolution_in_several_tasks(batch: int) -> None:
    """Chunks of rows meet where no border is; small images lie in one plane, one after another."""
    size = (70, 60) if batch == 1 else (5, 6)
    pieces, weight = torch.randn(batch, 12, 1, *size), torch.randn(4, 12, 3, 3)
    grad_out = torch.randn(batch, 4, *size)
    for row in (0, size[0] // 2, size[0] - 1):
        for column in (0, size[1] - 1):
            changed = pieces.clone()
            changed[batch // 2, 5, 0, row, column] = math.inf
            arguments = {"pieces": changed, "weight": weight, "grad_out": grad_out}
            actual, expected = (
                outputs_and_gradients(function, arguments)
                for function in (
                    lambda p, w: torch.ops.acmix.shift_convolution(p, w, 1, 1),
                    lambda p, w: F.conv2d(p.flatten(1, 2), w, padding=1),
                )
            )
            for name in actual:
                for kind in (torch.isnan, torch.isfinite):
                    assert torch.equal(kind(actual[name]), kind(expected[name])), name


@pytest.mark.parametrize("shift", [[0, 0], [1, 1], [0, 2]], ids=str)
def test_partition_attention(shift: list[int]) -> None:
    for dtype, last in forms(4):
        check(partition_case(shift, dtype, last))


def test_a_masked_key_weighs_nothing() -> None:
    """0 times the infinite value of a key that is masked out is NaN, in every backend."""
    q = torch.randn(1, 1, 2, 1, 3).abs()
    k, v = q.clone(), q.clone()
    k[..., 1], v[..., 1] = -math.inf, math.inf
    for form in (attention, attention_reference):
        out = form.forward(q, k, v, None, 3, 1, 1)
        assert out.isnan().all()
    k[..., 1] = -1e5
    for form in (attention, attention_reference):
        assert form.forward(q, k, v, None, 3, 1, 1)[..., [0, 2]].isnan().all()
