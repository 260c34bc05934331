"""What follows a layer may change its output in place, as nn.ReLU(inplace=True) does."""

from collections.abc import Callable

import pytest
import torch
from helpers import DEVICE, TOLERANCE, assert_all_close
from torch import Tensor, nn

from acmix import ACmix2d, ops
from acmix.layers import PatchwiseACmix, ReducedACmix, WindowACmix

MAP = (2, 8, 5, 6)
REDUCED = ReducedACmix(8, heads=2).to(DEVICE)
CASES: dict[str, tuple[nn.Module | Callable[..., Tensor], tuple[int, ...]]] = {
    "ACmix2d": (ACmix2d(8, 8, heads=2), MAP),
    "attention": (ACmix2d(8, 8, heads=2, mix="attention"), MAP),
    "convolution": (ACmix2d(8, 8, heads=2, mix="convolution"), MAP),
    "tiled": (ACmix2d(8, 8, heads=2, stride=2, backend="tiled"), MAP),
    "WindowACmix": (WindowACmix(8, heads=2, window_size=4), (2, 5, 6, 8)),
    "PatchwiseACmix": (PatchwiseACmix(16, 16), (2, 16, 5, 6)),
    "ReducedACmix": (lambda x: REDUCED(x, (5, 6)), (2, 30, 8)),
    "window_attention": (lambda x: ops.window_attention(x, 2 * x, 3 * x, heads=2), MAP),
    "weighted_aggregation": (
        lambda x: ops.weighted_aggregation(x[:, :2, None].expand(-1, -1, 49, -1, -1), x),
        MAP,
    ),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_in_place(name: str, memory_format: torch.memory_format) -> None:
    layer, shape = CASES[name]
    if isinstance(layer, nn.Module):
        layer = layer.to(DEVICE)
    x = torch.randn(shape, device=DEVICE)
    if x.dim() == 4:
        x = x.to(memory_format=memory_format)
    results = []
    for relu in (torch.relu_, torch.relu):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        out = relu(layer(leaf))
        results.append([out.detach(), *torch.autograd.grad(out.sum(), leaf)])
    assert_all_close(*results, TOLERANCE[torch.float32])
