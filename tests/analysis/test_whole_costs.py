"""Whole detectors beside what their papers and public configurations say of them."""

import pytest

from acmix.analysis.whole_costs import detector_costs, segmenter_costs

# Of 80 classes at 1280 x 800. Millions of parameters and GMACs: Swin's paper (Liu et al., ICCV
# 2021, Table 2), PVT's (Wang et al., ICCV 2021, Table 3, which gives parameters alone), and for
# ResNet-50 the same detectors in PVT's and Swin's tables.
PUBLISHED = [
    ("swin_tiny_attn", "mask_rcnn", {}, 48, 267),
    (
        *("swin_tiny_attn", "cascade_mask_rcnn"),
        *({"box_head": "conv", "class_agnostic": False, "head_norm": "sync"}, 86, 745),
    ),
    ("swin_small_attn", "mask_rcnn", {}, 69, None),
    ("pvt_tiny_attn", "retinanet", {}, 23.0, None),
    ("pvt_small_attn", "retinanet", {}, 34.2, None),
    ("resnet50", "mask_rcnn", {}, 44.2, 260),
    ("resnet50", "retinanet", {}, 37.7, 239),
]


@pytest.mark.parametrize(
    ("name", "detector", "options", "millions", "giga"),
    PUBLISHED,
    ids=[f"{name}-{detector}" for name, detector, *_ in PUBLISHED],
)
def test_published_figures_are_met(name, detector, options, millions, giga):
    found = detector_costs(name, detector, (800, 1280), **options)
    assert sum(found.parameters) / 1e6 == pytest.approx(millions, rel=0.01)
    if giga:
        assert sum(found.macs) / 1e9 == pytest.approx(giga, rel=0.005)


@pytest.mark.parametrize(
    ("name", "decoder", "size", "millions", "giga"),
    [
        ("pvt_tiny_attn", "semantic_fpn", (512, 512), 17.0, 33.2),  # PVT, Table 5
        ("pvt_small_attn", "semantic_fpn", (512, 512), 28.2, 44.5),
    ],
    ids=str,
)
def test_published_figures_of_segmenters_are_met(name, decoder, size, millions, giga):
    found = segmenter_costs(name, decoder, size)
    assert sum(found.parameters) / 1e6 == pytest.approx(millions, rel=0.01)
    assert sum(found.macs) / 1e9 == pytest.approx(giga, rel=0.02)


def test_the_head_costs_the_same_on_any_network_of_these_maps():
    one, other = (detector_costs(f"pvt_tiny_{path}", "retinanet") for path in ("attn", "acmix"))
    assert one.macs[1] == other.macs[1]
    assert one.parameters[1] == other.parameters[1]
    assert one.macs[0] < other.macs[0]
    assert one.parameters[0] < other.parameters[0]


def test_a_network_without_maps_is_refused():
    with pytest.raises(ValueError, match="expected a network with maps of strides 8, 16, 32"):
        detector_costs("vit_tiny_patch16_224", "retinanet")
    with pytest.raises(ValueError, match="did you mean resnet50"):
        detector_costs("resnet5O", "retinanet")
