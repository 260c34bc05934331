"""The fixture that shows memory which nothing wrote does show it, for every way to allocate."""

from collections.abc import Callable
from threading import Thread

import pytest
import torch
from torch import Tensor

ALLOCATE: dict[str, Callable[[Tensor], Tensor]] = {
    "empty": lambda x: torch.empty(x.shape, dtype=x.dtype),
    "empty, channels_last": lambda x: torch.empty(
        x.shape, dtype=x.dtype, memory_format=torch.channels_last
    ),
    "empty_like": torch.empty_like,
    "empty_like, contiguous": lambda x: torch.empty_like(x, memory_format=torch.contiguous_format),
    "empty_strided": lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype),
    "empty_permuted": lambda x: torch.empty_permuted(x.shape, (0, 2, 3, 1), dtype=x.dtype),
    "new_empty": lambda x: x.new_empty(x.shape),
    "new_empty_strided": lambda x: x.new_empty_strided(x.shape, x.stride()),
    "resize_": lambda x: x.new_empty(0).resize_(x.shape),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ALLOCATE)
def test_unwritten_memory_is_nan(way: str, dtype: torch.dtype) -> None:
    x = torch.ones(2, 3, 4, 5, dtype=dtype)
    with torch.inference_mode():
        assert ALLOCATE[way](x).isnan().all()
    assert ALLOCATE[way](x).isnan().all()


def test_also_in_a_backward_pass_and_in_another_thread() -> None:
    """As autograd's threads run ours."""

    class Unwritten(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return torch.empty_like(grad)

    seen: list[Tensor] = []

    def run() -> None:
        x = torch.ones(3, requires_grad=True)
        seen.extend(torch.autograd.grad(Unwritten.apply(x).sum(), x))

    thread = Thread(target=run)
    thread.start()
    thread.join()
    assert seen[0].isnan().all()
