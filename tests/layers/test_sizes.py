"""Maps padded to a multiple and cut again."""

import pytest
import torch

from acmix.layers._sizes import crop, multiple, pad_to_multiple


def test_multiple() -> None:
    assert [multiple(size, 4) for size in (1, 4, 5, 8)] == [4, 4, 8, 8]


@pytest.mark.parametrize("size", [(3, 4), (5, 1)], ids=str)
def test_crop_undoes_padding(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    padded = pad_to_multiple(x, 2, 3)
    assert padded.shape[2:] == (multiple(size[0], 2), multiple(size[1], 3))
    assert padded.abs().sum() == x.abs().sum()
    assert torch.equal(crop(padded, size, dim=2), x)
    channels_last = padded.permute(0, 2, 3, 1)
    assert torch.equal(crop(channels_last, size, dim=1), x.permute(0, 2, 3, 1))
