"""Segmenters of every family: logits of the size of the image, and a gradient for every weight."""

import pytest
import torch
from segmentation.small import NETWORKS, segmenter
from timm.optim import create_optimizer_v2

from acmix.segmentation import DECODERS, create_segmenter
from acmix.segmentation.blocks import NORMS


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_family_gives_every_pixel_a_class(name, decoder):
    net = segmenter(name, decoder)
    images = torch.randn(2, 3, 45, 38)
    logits, auxiliary = net(images)
    assert logits.shape == (2, 5, 45, 38)
    (logits.square().mean() + (0 if auxiliary is None else auxiliary.square().mean())).backward()
    assert [key for key, weight in net.named_parameters() if weight.grad is None] == []
    net.eval()
    assert net(images).shape == (2, 5, 45, 38)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("size", [(64, 96), (33, 31), (17, 129), (9, 20), (1, 1)], ids=str)
def test_images_of_any_size(decoder, size):
    net = segmenter(decoder=decoder).eval()
    assert net(torch.randn(1, 3, *size)).shape == (1, 5, *size)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("align_corners", [False, True])
def test_one_small_image_trains(decoder, norm, align_corners):
    """Its maps have one pixel, and so has the first bin of a pyramid pooling at any size."""
    net = segmenter("swin_tiny_acmix", decoder, norm=norm, align_corners=align_corners)
    for size in ((20, 28), (64, 64)):
        logits, _ = net(torch.randn(1, 3, *size))
        logits.square().mean().backward()
        assert logits.isfinite().all()
    assert all(weight.isfinite().all() for weight in net.state_dict().values())


def test_the_auxiliary_head_works_on_the_map_of_stride_16():
    net = segmenter(decoder="upernet")
    seen = []
    net.auxiliary.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    _, auxiliary = net(torch.randn(2, 3, 48, 80))
    assert seen == [(2, net.features.channels[2], 3, 5)]
    assert auxiliary.shape == (2, 5, 48, 80)
    net.eval()
    net(torch.randn(1, 3, 48, 80))
    assert len(seen) == 1
    assert segmenter(decoder="upernet", auxiliary=False)(torch.randn(2, 3, 48, 80))[1] is None


@pytest.mark.parametrize(
    ("name", "decoder", "millions"),
    [
        ("resnet18", "semantic_fpn", 15.5),  # Wang et al., ICCV 2021, table 4
        ("pvt_tiny_attn", "semantic_fpn", 17.0),
        ("pvt_small_attn", "semantic_fpn", 28.2),
        ("swin_tiny_attn", "upernet", 60),  # Liu et al., ICCV 2021, table 3
        ("swin_small_attn", "upernet", 81),
    ],
)
def test_parameters_are_the_published_ones(name, decoder, millions):
    with torch.device("meta"):
        net = create_segmenter(name, decoder)
    found = sum(weight.numel() for weight in net.parameters()) / 1e6
    assert found == pytest.approx(millions, abs=0.1 if decoder == "semantic_fpn" else 0.5)


@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("name", NETWORKS)
def test_optimizer_spares_and_slows_what_the_network_names(name, layer_decay):
    net = segmenter(name, "upernet")
    groups = create_optimizer_v2(
        net, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=layer_decay
    ).param_groups
    of = {id(weight): group for group in groups for weight in group["params"]}
    weights = dict(net.named_parameters())
    assert len(of) == len(weights)
    spared = {key for key in weights if key.endswith((".mix.alpha", ".mix.beta"))}
    assert spared
    assert spared <= net.no_weight_decay() <= set(weights)
    assert {of[id(weights[key])]["weight_decay"] for key in net.no_weight_decay()} == {0.0}
    if layer_decay:
        scales = {key: of[id(weight)]["lr_scale"] for key, weight in weights.items()}
        body = [key for key in weights if key.startswith("features.body.")]
        assert {scales[key] for key in weights if key not in body} == {1.0}
        assert scales[body[0]] < scales[body[-1]] < 1.0
        assert len({scales[key] for key in body}) >= 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decoder": "unet"}, "decoder: expected one of semantic_fpn, upernet, got 'unet'"),
        ({"norm": "instance"}, "norm: expected one of batch, group, layer, sync, got 'instance'"),
    ],
)
def test_what_there_is_not_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        segmenter(**options)


@pytest.mark.parametrize("decoder", DECODERS)
def test_dropout_is_that_of_the_option(decoder):
    images = torch.randn(2, 3, 64, 64)
    torch.manual_seed(0)
    net = segmenter(decoder=decoder, norm="group", dropout=0.5)
    assert not torch.equal(net(images)[0], net(images)[0])
    net.eval()
    assert torch.equal(net(images), net(images))
