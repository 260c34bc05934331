"""Each decoder against the plain sequence of its paper, where sides are divisible by 32."""

import pytest
import torch
import torch.nn.functional as F

from acmix.segmentation.blocks import BatchNorm2d, SyncBatchNorm, group_norm
from acmix.segmentation.semantic_fpn import SemanticFPN
from acmix.segmentation.upernet import PyramidPooling, UPerNet

CHANNELS = (4, 6, 8, 10)


def maps(height=64, width=96, batch=2):
    return [
        torch.randn(batch, channels, height // stride, width // stride)
        for channels, stride in zip(CHANNELS, (4, 8, 16, 32), strict=True)
    ]


def double(x, align_corners=False):
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=align_corners)


@pytest.mark.parametrize("align_corners", [False, True])
def test_semantic_fpn(align_corners):
    net = SemanticFPN(CHANNELS, 3, 16, 8, align_corners=align_corners).eval()
    given = maps()
    levels, above = [], None
    for of, lateral, output in reversed(
        list(zip(given, net.pyramid.inner_blocks, net.pyramid.layer_blocks, strict=True))
    ):
        level = lateral(of)
        above = level if above is None else level + F.interpolate(above, scale_factor=2.0)
        levels.insert(0, output(above))
    total = net.branches[0][0](levels[0])
    for doublings, branch, of in zip((1, 2, 3), net.branches[1:], levels[1:], strict=True):
        assert len(branch) == doublings
        for conv in branch:
            of = double(conv(of), align_corners)
        total = total + of
    torch.testing.assert_close(net(given), net.classifier(total))


def test_upernet():
    net = UPerNet(CHANNELS, 3, 16).eval()
    given = maps()
    level = net.pooling(given[3])
    levels = [level]
    for place in (2, 1, 0):
        level = net.laterals[place](given[place]) + double(level)
        levels.insert(0, net.outputs[place](level))
    size = given[0].shape[2:]
    same = [F.interpolate(of, size, mode="bilinear") for of in levels]
    expected = net.classifier(net.fuse(torch.cat(same, 1)))
    torch.testing.assert_close(net(given), expected)


def test_pyramid_pooling_takes_means_over_its_bins():
    net = PyramidPooling(4, 2, "batch", bins=(1, 3)).eval()
    x = torch.randn(1, 4, 6, 9)
    one = net.branches[0](x.mean((2, 3), keepdim=True)).expand(-1, -1, 6, 9)
    three = net.branches[1](x.view(1, 4, 3, 2, 3, 3).mean((3, 5)))
    parts = [x, one, F.interpolate(three, (6, 9), mode="bilinear")]
    torch.testing.assert_close(net(x), net.fuse(torch.cat(parts, 1)))


@pytest.mark.parametrize("kind", [BatchNorm2d, SyncBatchNorm])
def test_a_batch_norm_over_one_value_takes_its_running_statistics(kind):
    norm, one = kind(3), torch.randn(1, 3, 1, 1)
    norm.running_mean += 1
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    torch.testing.assert_close(norm(one), (one - 1) / (1 + norm.eps) ** 0.5)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())
    norm(torch.randn(2, 3, 1, 1))  # of two values there is a variance
    assert not torch.equal(norm.running_mean, before["running_mean"])
    torch.testing.assert_close(norm.eval()(one), kind.__bases__[-1].forward(norm, one))


@pytest.mark.parametrize(
    ("channels", "groups"), [(256, 32), (128, 32), (64, 16), (32, 8), (40, 2), (7, 1), (2, 1)]
)
def test_groups_have_several_channels(channels, groups):
    norm = group_norm(channels)
    assert norm.num_groups == groups
    assert norm(torch.randn(1, channels, 1, 1)).abs().max() > 0
