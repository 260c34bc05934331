"""What timm's own tests ask of every network, of ours."""

import pytest
import timm
import torch
from helpers import slow_but
from timm.models._features_fx import GraphExtractNet, get_graph_node_names
from torch import Tensor, nn

import acmix

NAMES = [
    "resnet26_attn",
    "resnet26_acmix",
    "san10_pairwise",
    "san10_attn",
    "san10_acmix",
    "pvt_tiny_attn",
    "pvt_tiny_acmix",
    "swin_tiny_attn",
    "swin_tiny_acmix",
]
SIDE = 64
CORE = ["resnet26_acmix", "san10_acmix", "pvt_tiny_acmix", "swin_tiny_acmix"]
every_network = pytest.mark.parametrize("name", slow_but(CORE, NAMES))


def create(name: str, **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith(("pvt", "swin")):
        arguments["img_size"] = SIDE
    return timm.create_model(name, **{"num_classes": 10, **arguments}).eval()


def image() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE)


def last_node(model: nn.Module) -> GraphExtractNet:
    """The network as a graph of torch.fx, up to its output."""
    _, names = get_graph_node_names(model)
    return GraphExtractNet(model, [names[-1]])


@every_network
def test_forward_and_backward_through_fx(name: str) -> None:
    model, x = create(name), image()
    out = last_node(model)(x)
    torch.testing.assert_close(out, model(x))
    out.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@every_network
@pytest.mark.slow
def test_a_fused_network_through_fx(name: str) -> None:
    model, x = create(name), image()
    out = last_node(acmix.fuse(model))(x)
    torch.testing.assert_close(out, model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["fx", "hook"])
@every_network
@pytest.mark.slow
def test_features_by_other_means(name: str, kind: str) -> None:
    """The maps that features_only gives by itself, with the sizes it promises."""
    features, others = (
        create(name, features_only=True),
        create(name, features_only=True, feature_cls=kind),
    )
    x = image()
    expected, found = features(x), others(x)
    assert others.feature_info.channels() == features.feature_info.channels()
    assert len(found) == len(expected) > 1
    for one, other, info in zip(found, expected, features.feature_info.get_dicts(), strict=True):
        torch.testing.assert_close(one, other)
        side = -(-SIDE // info["reduction"])
        assert sorted(one.shape[1:]) == sorted((info["num_chs"], side, side))


@every_network
def test_default_cfg(name: str) -> None:
    model = timm.create_model(name)
    cfg = model.default_cfg
    assert cfg["input_size"] == (3, 224, 224)
    assert cfg["pool_size"] == (7, 7)
    state = model.state_dict()
    assert f"{cfg['first_conv']}.weight" in state
    assert f"{cfg['classifier']}.weight" in state


@every_network
def test_heads(name: str) -> None:
    model, x = create(name), image()
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    model.reset_classifier(3, "token" if name.startswith("pvt") else "avg")
    assert model(x).shape == (2, 3)


@every_network
def test_forward_intermediates(name: str) -> None:
    model, x = create(name), image()
    last, maps = model.forward_intermediates(x)
    torch.testing.assert_close(last, model.forward_features(x))
    first, second = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert torch.equal(first, maps[0])
    assert torch.equal(second, maps[1])


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("acmix")])
@pytest.mark.slow
def test_a_trace_of_jit(name: str) -> None:
    model, x = create(name).requires_grad_(False), image()[:1, :, :32, :32]
    traced = torch.jit.trace(model, (x,), check_trace=False)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)
    assert "acmix::" not in str(traced.inlined_graph)


@pytest.mark.parametrize("name", ["san10_acmix", "pvt_tiny_attn", "swin_tiny_acmix"])
def test_output_stride_of_a_family_that_has_one_only(name: str) -> None:
    with pytest.raises(ValueError, match=f"output_stride: expected 32, the only one of {name}"):
        timm.create_model(name, output_stride=16)
    create(name, output_stride=32)  # what others ask for by default


@pytest.mark.parametrize(
    "name", ["resnet26_acmix", "san10_attn", "pvt_tiny_acmix", "swin_tiny_attn"]
)
def test_scripting_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"scriptable: expected False, .*use torch\.export"):
        timm.create_model(name, scriptable=True)
