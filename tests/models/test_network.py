"""What the families share: the padding of patches."""

import pytest
import torch
from timm.layers import PatchEmbed

from acmix.models._network import PaddedPatchEmbed


@pytest.mark.parametrize("size", [(8, 12), (7, 9), (1, 3)], ids=str)
def test_padding_is_timms(size: tuple[int, int]) -> None:
    arguments = {"img_size": 8, "patch_size": (4, 3), "in_chans": 2, "embed_dim": 5}
    arguments.update(output_fmt="NHWC", strict_img_size=False)
    padded = PaddedPatchEmbed(**arguments)
    timms = PatchEmbed(**arguments, dynamic_img_pad=True)
    timms.load_state_dict(padded.state_dict())
    x = torch.randn(1, 2, *size)
    assert torch.equal(padded(x), timms(x))
