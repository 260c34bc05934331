"""Maps for detectors and segmenters: right strides and channels, of every family and of timm's."""

import pytest
import timm
import torch

from acmix.models.features import create_features

torch.manual_seed(0)
SMALL = {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)}
NAMES = ["resnet26_acmix", "san10_acmix", "pvt_tiny_acmix", "swin_tiny_acmix", "resnet18"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (8, 16, 32)], ids=str)
def test_maps_are_those_of_the_strides(name, strides):
    features = create_features(name, strides=strides).eval()
    maps = features(torch.randn(1, 3, 45, 70))
    assert features.strides == list(strides)
    assert [of.shape[1] for of in maps] == features.channels
    assert [tuple(of.shape[2:]) for of in maps] == [(-(-45 // s), -(-70 // s)) for s in strides]


def test_maps_are_those_of_the_network():
    """The first index of ResNet's and SAN's is the stem, which has stride 2; PVT's is a stage."""
    torch.manual_seed(1)
    features = create_features("pvt_tiny_acmix", norm=False).eval()
    net = timm.create_model("pvt_tiny_acmix").eval()
    missing = net.load_state_dict(features.body.model.state_dict(), strict=False).missing_keys
    assert all(key.startswith(("head", "norm", "fc")) for key in missing)
    image = torch.randn(1, 3, 64, 96)
    expected = net.forward_intermediates(image, intermediates_only=True)
    for one, other in zip(features(image), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_maps_of_swin_are_normalised():
    features = create_features("swin_tiny_attn").eval()
    for of in features(torch.randn(2, 3, 64, 64)):
        torch.testing.assert_close(of.mean(1), torch.zeros_like(of.mean(1)), atol=1e-4, rtol=0)
    assert not create_features("swin_tiny_attn", norm=False).norms
    assert len(create_features("resnet18", norm=True).norms) == 4


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("pvt_tiny_acmix", ("pos_embed1", "pos_embed4", ".mix.alpha", ".mix.beta")),
        ("swin_tiny_acmix", ("relative_position_bias_table", ".mix.alpha", ".mix.beta")),
        ("resnet26_acmix", (".mix.alpha", ".mix.beta")),
        ("resnet18", ()),
    ],
)
def test_weight_decay_spares_what_the_network_names(name, ends):
    features = create_features(name)
    spared, names = features.no_weight_decay(), dict(features.named_parameters())
    assert spared <= set(names)
    for end in ends:
        assert {key for key in names if key.endswith(end)} <= spared
        assert any(key.endswith(end) for key in spared)
    assert len(spared) < len(names) / 2


def test_arguments_reach_the_network():
    kwargs = {**SMALL, "acmix_kwargs": {"heads": 2}}
    features = create_features("resnet26_acmix", 1, model_kwargs=kwargs)
    assert features.channels == [64, 128, 256, 512]
    assert next(features.parameters()).shape[1] == 1
    assert any(getattr(module, "heads", None) == 2 for module in features.modules())


def test_a_network_without_such_maps_is_refused():
    with pytest.raises(ValueError, match=r"^name: expected .* strides 4, 8, 16, 32, got vit_tiny"):
        create_features("vit_tiny_patch16_224")
    with pytest.raises(TypeError, match="no_such_argument"):
        create_features("resnet18", model_kwargs={"no_such_argument": 1})
