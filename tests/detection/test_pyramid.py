"""The pyramid, what brings images into a batch, and norms in place of others."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from acmix.detection.heads import Pool
from acmix.detection.pyramid import Pyramid, Resize, batch_norms, group_norm, norm_layer, with_norm
from acmix.models.features import create_features

SMALL = {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128), "path": "conv"}


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ((480, 640), (800, 1067)),
        ((640, 480), (1067, 800)),
        ((800, 1333), (800, 1333)),
        ((300, 1000), (400, 1333)),
        ((2000, 500), (1333, 333)),
        ((10, 10), (800, 800)),
        ((3000, 2000), (1200, 800)),
        ((1, 4000), (1, 1333)),
    ],
    ids=lambda size: "x".join(map(str, size)),
)
def test_size_of_the_test(given, seen):
    """800 pixels of the shorter side, or 1333 of the longer one, whichever comes first."""
    resized, _ = Resize(800, 1333, 1).eval().resize(torch.zeros(1, *given))
    assert tuple(resized.shape) == (1, *seen)


def test_images_are_smoothed_where_they_become_smaller():
    stripes = (torch.arange(64) % 2).float().expand(1, 64, 64)
    resized, _ = Resize(12, 100, 1).eval().resize(stripes)
    assert resized.shape == (1, 12, 12)
    torch.testing.assert_close(resized, torch.full_like(resized, 0.5), atol=0.05, rtol=0)


def test_sides_of_the_image_stay_its_sides():
    image = torch.zeros(2, 10, 20)
    image[0, :, 10:], image[1, 5:] = 1, 1
    resized, _ = Resize(20, 100, 2).eval().resize(image)
    assert resized[0, :, :18].max() == 0
    assert resized[0, :, 22:].min() == 1
    assert resized[1, :8].max() == 0
    assert resized[1, 12:].min() == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_images_keep_their_type(dtype):
    image = torch.rand(3, 20, 30, dtype=torch.float64)
    resized, _ = Resize(50, 60, 3).eval().resize(image.to(dtype))
    expected = nn.functional.interpolate(image[None], (40, 60), mode="bilinear", antialias=True)[0]
    assert resized.dtype == dtype
    close = {torch.float64: 0, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(resized.double(), expected, atol=close, rtol=0)


def test_training_images_are_left_alone():
    images = [torch.randn(3, 33, 40), torch.randn(3, 20, 70)]
    target = {"boxes": torch.tensor([[1.0, 2.0, 3.0, 4.0]])}
    batch, targets = Resize(800, 1333, 3).train()(images, [target, target])
    assert batch.image_sizes == [(33, 40), (20, 70)]
    assert batch.tensors.shape == (2, 3, 64, 96)
    for image, padded in zip(images, batch.tensors, strict=True):
        height, width = image.shape[1:]
        assert torch.equal(padded[:, :height, :width], image)
        assert not padded[:, height:].any()
        assert not padded[:, :, width:].any()
    assert torch.equal(targets[0]["boxes"], target["boxes"])


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        ((4, 8, 16, 32), {"0": 24, "1": 12, "2": 6, "3": 3, "pool": 2}),
        ((8, 16, 32), {"0": 12, "1": 6, "2": 3, "p6": 2, "p7": 1}),
    ],
    ids=["two stages", "retinanet"],
)
def test_maps_of_the_pyramid(strides, expected):
    features = create_features("resnet26_acmix", strides=strides, model_kwargs=SMALL)
    coarser = LastLevelP6P7(features.channels[-1], 8) if len(strides) == 3 else LastLevelMaxPool()
    pyramid = Pyramid(features, 8, coarser)
    maps = pyramid(torch.randn(2, 3, 96, 96))
    assert {name: of.shape for name, of in maps.items()} == {
        name: (2, 8, side, side) for name, side in expected.items()
    }
    if len(strides) == 3:  # P6 is made from the network's last map, not from P5
        assert pyramid.fpn.extra_blocks.p6.in_channels == features.channels[-1]


def test_a_pyramid_has_norms_where_asked():
    features = create_features("resnet26_acmix", model_kwargs=SMALL)
    for name, kind in (("group", nn.GroupNorm), ("batch", nn.BatchNorm2d), (None, ())):
        fpn = Pyramid(features, 8, LastLevelMaxPool(), norm_layer(name)).fpn
        assert sum(isinstance(module, kind) for module in fpn.modules()) == (8 if name else 0)


@pytest.mark.parametrize("side", [20, 40, 64])
def test_boxes_are_pooled_at_the_strides_of_the_maps(side):
    """From maps of the image's x coordinate; sides under 46 of 64 padded ones misled torchvision.

    The first images that a pool sees are no reason to pool otherwise from then on.
    """
    pool = Pool(7)
    for pixels in (side, 256):
        padded = -(-pixels // 32) * 32
        maps = {
            str(level): (torch.arange(0, padded, stride) + stride / 2 - 0.5)
            .expand(1, 1, padded // stride, padded // stride)
            .contiguous()
            for level, stride in enumerate((4, 8, 16, 32))
        }
        box = torch.tensor([[4.0, 4.0, 18.0, 18.0]])
        pooled = pool(maps, [box], [(pixels, pixels)])
        # Without half a pixel's offset, as is torchvision's default.
        expected = 4 + (torch.arange(7) + 0.5) * 2 + 1.5
        torch.testing.assert_close(pooled[0, 0, 3], expected)


def test_large_boxes_are_pooled_from_coarse_maps():
    maps = {str(level): torch.full((1, 1, 256 >> level, 256 >> level), level) for level in range(4)}
    maps = {name: of.float() for name, of in maps.items()}
    sides = torch.tensor([50.0, 111, 113, 223, 225, 447, 449])
    boxes = torch.stack([torch.zeros(7), torch.zeros(7), sides, sides], 1)
    assert Pool(7)(maps, [boxes], [(1024, 1024)])[:, 0, 3, 3].tolist() == [0, 0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("channels", "groups"), [(256, 32), (64, 8), (96, 8), (8, 1), (24, 2), (7, 1)], ids=str
)
def test_groups_have_eight_channels_at_least(channels, groups):
    norm = group_norm(channels)
    assert (norm.num_groups, norm.num_channels) == (groups, channels)


def net() -> nn.Sequential:
    """Norms of both kinds, one of them deeper down; with weights and statistics."""
    inner = nn.Sequential(nn.Conv2d(16, 16, 1), BatchNormAct2d(16, act_layer=nn.ReLU))
    made = nn.Sequential(nn.BatchNorm2d(16), nn.ModuleDict({"a": inner})["a"])
    for module in batch_norms(made):
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
        nn.init.normal_(module.running_mean)
    return made


def test_group_norm_keeps_activations_and_weights():
    before = net()
    after = with_norm(copy.deepcopy(before), "group")
    assert not batch_norms(after)
    x = torch.randn(2, 16, 5, 5)
    first, (conv, second) = before
    y = nn.functional.group_norm(x, 2, first.weight, first.bias)
    y = nn.functional.group_norm(conv(y), 2, second.weight, second.bias).relu()
    torch.testing.assert_close(after(x), y)
    with_norm(nn.Sequential(nn.BatchNorm2d(4, affine=False)), "group")(torch.randn(1, 4, 2, 2))


def test_sync_norms_keep_activations_weights_and_statistics():
    before = net().eval()
    after = with_norm(copy.deepcopy(before), "sync").eval()
    assert all(isinstance(module, nn.SyncBatchNorm) for module in batch_norms(after))
    assert len(batch_norms(after)) == 2
    x = torch.randn(2, 16, 5, 5)
    torch.testing.assert_close(after(x), before(x))


@pytest.mark.parametrize("name", ["batch", "frozen"])
def test_other_norms_stay(name):
    before = net()
    assert with_norm(before, name) is before
    assert {type(module) for module in batch_norms(before)} == {nn.BatchNorm2d, BatchNormAct2d}
