"""Networks that compute what the source does, or nearly, and what does not fit."""

import copy
import re
from typing import Any

import pytest
import timm
import torch
import torchvision
from helpers import TOLERANCE, assert_all_close
from timm.models.resnet import Bottleneck, ResNet
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

import acmix
from acmix.layers import ACmix2d, PatchwiseACmix, WindowACmix
from acmix.models.pvt import ACmixPVT, resize_position
from acmix.models.resnet import ACmixResNet
from acmix.models.san import ACmixSAN
from acmix.models.swin import ACmixSwin
from acmix.surgery.fuse import fuse
from acmix.surgery.warm_start import ALPHA, copy_attention, fit_convolution, warm_start

SWIN: dict[str, Any] = {
    "img_size": 64,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
    "num_classes": 5,
}
PVT: dict[str, Any] = {
    "depths": (1, 2),
    "embed_dims": (16, 32),
    "heads": (2, 4),
    "reductions": (2, 1),
    "mlp_ratios": (2, 2),
    "img_size": 32,
    "num_classes": 5,
    "global_pool": "avg",  # nothing reads the last map where it is the class token
}
SAN: dict[str, Any] = {"depths": (1, 2), "widths": (64, 128), "kernels": (3, 5), "num_classes": 5}
RESNET: dict[str, Any] = {
    "layers": (1, 1, 1),
    "channels": (8, 16, 16),
    "num_classes": 5,
    "zero_init_last": False,
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def scatter(network: nn.Module) -> nn.Module:
    """Norms, tables and biases away from their start, as those of trained weights are."""
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.dim() <= 2 and tensor.is_floating_point():
                tensor += 0.1 * torch.rand_like(tensor)
    return network.eval()


def swin_that_pads_first(acmix_kwargs: dict | None = None, **kw: object) -> nn.Module:
    return ACmixSwin(**SWIN, acmix_kwargs={"pad_first": True, **(acmix_kwargs or {})}, **kw)


def torchvision_swin() -> nn.Module:
    window = [SWIN["window_size"]] * 2
    widths = SWIN["embed_dim"], list(SWIN["depths"]), list(SWIN["num_heads"])
    return TorchvisionSwin([4, 4], *widths, window, num_classes=SWIN["num_classes"])


def release(network: nn.Module) -> dict[str, Any]:
    """The names of Swin's first release, in the file of a parallel training."""
    keys = network.state_dict()
    renamed = {
        re.sub(
            r"s\.(\d)\.down", lambda m: f"s.{int(m[1]) - 1}.down", key.replace("head.fc", "head")
        ): value
        for key, value in keys.items()
    }
    mask = {"layers.0.blocks.1.attn_mask": torch.zeros(16, 16, 16)}
    return {"model": {f"module.{key}": value for key, value in {**renamed, **mask}.items()}}


PAIRS: dict[str, Any] = {
    "swin_timm": (lambda: SwinTransformer(**SWIN), lambda **kw: ACmixSwin(**SWIN, **kw)),
    "swin_torchvision": (torchvision_swin, swin_that_pads_first),
    "pvt": (lambda: ACmixPVT(**PVT, path="attn"), lambda **kw: ACmixPVT(**PVT, **kw)),
    "san": (lambda: ACmixSAN(**SAN, path="attn"), lambda **kw: ACmixSAN(**SAN, **kw)),
    "resnet_attn": (
        lambda: ACmixResNet(**RESNET, path="attn"),
        lambda **kw: ACmixResNet(**RESNET, **kw),
    ),
}
OPERATOR_KWARGS: dict[str, dict[str, Any]] = {
    "learned": {},
    "convex": {"mix": "convex"},
    "sum": {"mix": "sum"},
    "shared": {"shift": "learned_shared", "kernel_conv": 5},
    "fixed": {"shift": "fixed"},
    "tensor": {"shift": "tensor", "mix": "convex"},
}


def operators(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if hasattr(m, "fc_weight")}


def image(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size)


@pytest.mark.parametrize("kwargs", OPERATOR_KWARGS)
@pytest.mark.parametrize("pair", PAIRS)
def test_logits_are_the_sources(pair: str, kwargs: str) -> None:
    make_source, make_model = PAIRS[pair]
    source = scatter(make_source())
    model = make_model(acmix_kwargs=OPERATOR_KWARGS[kwargs]).eval()
    x = image()
    expected = source(x)
    assert (model(x) - expected).abs().max() > 1e-2
    report = warm_start(model, source)
    assert set(report.exact) == set(operators(model))
    assert report.fitted == {}
    assert report.kept == ()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("roll_convolution", [True, False])
def test_swin_tiny(roll_convolution: bool) -> None:
    source = timm.create_model("swin_tiny_patch4_window7_224", img_size=64).eval()
    kwargs = {"roll_convolution": roll_convolution}
    model = timm.create_model("swin_tiny_acmix", img_size=64, acmix_kwargs=kwargs).eval()
    report = warm_start(model, release(source))
    assert len(report.exact) == 12
    assert set(report.copied) == set(source.state_dict())
    x = image()
    torch.testing.assert_close(model(x), source(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kwargs", OPERATOR_KWARGS)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.slow
def test_the_path_learns_from_the_first_step(pair: str, kwargs: str) -> None:
    """Its last weights at once, and what is before them after one step."""
    make_source, make_model = PAIRS[pair]
    model = make_model(acmix_kwargs=OPERATOR_KWARGS[kwargs])
    warm_start(model, make_source())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    x, wanted = image(), torch.tensor([1, 3])

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), wanted).backward()
        optimizer.step()

    step()
    for layer in operators(model).values():
        learned = hasattr(layer.shift, "weight")
        last = layer.shift.weight if learned else layer.fc_weight
        assert last.grad.count_nonzero() > 0.9 * last.numel()
        assert layer.mix.weights()[1] >= 0.4
    step()
    for name, layer in operators(model).items():
        assert layer.fc_weight.grad.any(), name
        if "mix" not in OPERATOR_KWARGS[kwargs]:
            assert layer.mix.beta.grad.any(), name
            assert layer.mix.alpha.grad.any(), name


def impulse_kernel(layer: nn.Module, side: int) -> Tensor:
    """The kernel (C, C_in, k, k) as the layer answers to impulses, its bias subtracted."""
    size, reach = 2 * side + 1, side // 2
    channels = layer.in_channels
    impulses = torch.zeros(channels + 1, channels, size, size, dtype=torch.float64)
    impulses[range(channels), range(channels), side, side] = 1
    with torch.no_grad():
        out = layer(impulses)
    window = slice(side - reach, side + reach + 1)
    return (out[:-1] - out[-1:])[..., window, window].flip(-1, -2).transpose(0, 1)


def without_attention(layer: ACmix2d) -> ACmix2d:
    """A copy whose attention counts nothing; alpha of a fixed mix stays."""
    layer = copy.deepcopy(layer)
    nn.init.zeros_(layer.mix.alpha)
    return layer


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("shift", ["learned", "learned_shared", "fixed", "tensor"])
def test_residual_is_that_of_impulses(shift: str, heads: int) -> None:
    conv = nn.Conv2d(10, 12, 3, padding=1, dtype=torch.float64)
    layer = ACmix2d(10, 12, heads=heads, shift=shift, dtype=torch.float64)
    residual = fit_convolution(layer, conv)
    found = impulse_kernel(without_attention(layer), 3)
    measured = ((found - conv.weight).norm() / conv.weight.norm()).item()
    assert 0 < residual < 1
    assert measured == pytest.approx(residual, rel=1e-6)
    assert layer.mix.alpha == ALPHA


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(("mix", "stride", "dilation"), [("learned", 1, 2), ("convex", 2, 1)])
def test_a_convolution_within_reach_is_reproduced(
    mix: str, stride: int, dilation: int, kernel: int, bias: bool
) -> None:
    """Of as many input channels as the rank allows, and a smaller kernel in the centre."""
    padding = kernel // 2 * dilation
    conv = nn.Conv2d(9, 16, kernel, stride, padding, dilation, bias=bias)
    layer = ACmix2d(9, 16, kernel_conv=5, stride=stride, dilation=dilation, mix=mix)
    assert fit_convolution(layer, conv) < 1e-6
    x = torch.randn(2, 9, 16, 16)
    attention_off = without_attention(layer)
    inner = slice(4, -4) if bias else slice(None)  # where no tap is outside
    scale = 1 - ALPHA if mix == "convex" else 1  # beta, which a convex mix ties to alpha
    out = scale * attention_off(x)
    tolerance = 1e-3 if bias else 1e-5  # see INTERIOR
    torch.testing.assert_close(
        out[..., inner, inner], conv(x)[..., inner, inner], rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("mix", ["sum", "convolution"])
def test_a_fixed_mix_has_beta_1(mix: str) -> None:
    conv = nn.Conv2d(6, 8, 3, padding=1, bias=False)
    layer = ACmix2d(6, 8, mix=mix)
    assert fit_convolution(layer, conv) < 1e-6
    x = torch.randn(1, 6, 8, 8)
    out = layer(x)
    if mix == "sum":
        alone = ACmix2d(6, 8, mix="attention")
        alone.load_state_dict(layer.state_dict(), strict=False)
        out = out - alone(x)
    torch.testing.assert_close(out, conv(x), rtol=1e-5, atol=1e-5)


def resnets(**kwargs: Any) -> tuple[nn.Module, nn.Module]:
    source = scatter(ResNet(Bottleneck, (1, 2, 1, 1), num_classes=5, zero_init_last=False))
    return source, ACmixResNet((1, 2, 1, 1), num_classes=5, zero_init_last=False, **kwargs).eval()


def test_resnet() -> None:
    source, model = resnets()
    x = image()
    cold = (model(x) - source(x)).norm()
    report = warm_start(model, {"state_dict": source.state_dict()})
    assert [*report.fitted] == [*operators(model)]
    assert len(report.fitted) == 5
    assert all(0.5 < residual < 0.9 for residual in report.fitted.values())
    weights, own = source.state_dict(), model.state_dict()
    assert {key for key in weights if ".conv2." not in key} == set(report.copied)
    assert all(torch.equal(own[key], weights[key]) for key in report.copied)
    assert (model(x) - source(x)).norm() < 0.8 * cold
    model.train()(x).sum().backward()
    for layer in operators(model).values():
        for name, parameter in layer.named_parameters():
            assert parameter.grad.any(), name


def test_torchvision_resnet_and_a_classifier_of_other_classes() -> None:
    source = torchvision.models.resnet.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1])
    model = ACmixResNet((1, 1, 1, 1), num_classes=7)
    head = model.fc.weight.detach().clone()
    report = warm_start(model, source)
    assert report.kept == ("fc.weight", "fc.bias")
    assert torch.equal(model.fc.weight, head)
    assert "2 tensors kept: fc.weight, fc.bias" in str(report)
    assert f"layer1.0.conv2: {report.fitted['layer1.0.conv2']:.3f}" in str(report)
    warm_start(ACmixResNet((1, 1, 1, 1), num_classes=0), source)


@pytest.mark.parametrize("kind", ["swin", "pvt"])
def test_other_image_and_window_sizes_are_interpolated(kind: str) -> None:
    if kind == "swin":
        source = SwinTransformer(**SWIN)
        model: nn.Module = ACmixSwin(**{**SWIN, "window_size": 7, "img_size": 112})
        loaded: nn.Module = ACmixSwin(**{**SWIN, "window_size": 7, "img_size": 112}, path="attn")
        weights = acmix.models.swin.checkpoint_filter_fn(source.state_dict(), loaded)
    else:
        source = ACmixPVT(**PVT, path="attn")
        model = ACmixPVT(**{**PVT, "img_size": 48})
        loaded = ACmixPVT(**{**PVT, "img_size": 48}, path="attn")
        weights = acmix.models.pvt.checkpoint_filter_fn(source.state_dict(), loaded)
    loaded.load_state_dict(weights)
    warm_start(model, source)
    x = image(112)
    torch.testing.assert_close(model.eval()(x), loaded.eval()(x), rtol=1e-5, atol=1e-5)


def test_embeddings_of_a_grid_that_is_not_square() -> None:
    """48 x 48 tokens and 32 x 72 are as many."""
    small = {**PVT, "depths": (1, 1)}
    source = ACmixPVT(**{**small, "img_size": 192}, path="attn")
    model = ACmixPVT(**{**small, "img_size": (128, 288)})
    warm_start(model, source)
    expected = resize_position(source.pos_embed1, (48, 48), (32, 72))
    torch.testing.assert_close(model.pos_embed1, expected)
    back = ACmixPVT(**{**small, "img_size": 192})
    warm_start(back, ACmixPVT(**{**small, "img_size": (128, 288)}, path="attn"))


FEATURES = {
    "swin_tiny_acmix": ("swin_tiny_attn", {"depths": (2, 2, 2, 2), "embed_dim": 24}),
    "pvt_tiny_acmix": ("pvt_tiny_attn", {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32)}),
    "san10_acmix": ("san10_attn", {"depths": (1, 1, 1, 1, 1)}),
}


@pytest.mark.parametrize("name", FEATURES)
def test_feature_extractors(name: str) -> None:
    source_name, kwargs = FEATURES[name]
    kwargs = {**kwargs, "num_classes": 5}
    if "embed_dims" in kwargs:
        kwargs["heads"] = (1, 2, 2, 4)
    if "embed_dim" in kwargs:
        kwargs["num_heads"] = (1, 2, 4, 8)
    source = scatter(timm.create_model(source_name, **kwargs))
    taken = {"features_only": True, "out_indices": (0, 2)}
    model = timm.create_model(name, **taken, **kwargs).eval()
    size = 224 if name.startswith("swin") else 64
    report = warm_start(model, source)
    assert any(key.startswith(("head.", "fc.")) for key in report.left)
    assert "left out" in str(report)
    x = image(size)
    maps = source.forward_intermediates(
        x, indices=[0, 2], intermediates_only=True, output_fmt="NCHW"
    )
    for found, map_ in zip(model(x), maps, strict=True):
        found = found.permute(0, 3, 1, 2) if name.startswith("swin") else found
        torch.testing.assert_close(found, map_, rtol=1e-4, atol=1e-4)


def test_feature_extractor_of_a_resnet() -> None:
    source = scatter(timm.create_model("resnet26_conv", channels=(8, 8, 16, 16)))
    whole = timm.create_model("resnet26_acmix", channels=(8, 8, 16, 16))
    model = timm.create_model("resnet26_acmix", channels=(8, 8, 16, 16), features_only=True)
    fitted = warm_start(whole, source).fitted
    report = warm_start(model, source)
    assert report.fitted == pytest.approx(fitted, abs=1e-9)
    assert report.left == ("fc.weight", "fc.bias")
    weights = source.state_dict()
    assert {*report.copied} == {*weights} & {*model.state_dict()}
    assert all(torch.equal(model.state_dict()[key], weights[key]) for key in report.copied)


def test_released_weights_are_for_another_function() -> None:
    _, model = resnets()
    with pytest.raises(ValueError, match=r"acmix\.models\.checkpoints\.from_released takes"):
        warm_start(model, {"layer1.0.conv2.rate1": torch.ones(1)})


def test_dtype_of_the_model_stays() -> None:
    source, model = resnets()
    warm_start(model.to(torch.bfloat16), source)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    conv = nn.Conv2d(6, 8, 3, padding=1, bias=False)
    layer = ACmix2d(6, 8, dtype=torch.bfloat16)
    assert fit_convolution(layer, conv) < 1e-6
    x = torch.randn(1, 6, 9, 9)
    error = (without_attention(layer)(x.bfloat16()) - conv(x)).abs().max() / conv(x).abs().max()
    assert error < TOLERANCE[torch.bfloat16]


def test_pair_of_attentions() -> None:
    attention = WindowAttention(16, num_heads=2, window_size=4)
    nn.init.normal_(attention.relative_position_bias_table)
    layer = WindowACmix(16, heads=2, window_size=4)
    copy_attention(layer, attention)
    x = torch.randn(3, 4, 4, 16)
    expected = attention(x.flatten(1, 2)).unflatten(1, (4, 4))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def assert_refused(model: nn.Module, source: Any, *messages: str) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="source: expected weights for") as error:
        warm_start(model, source)
    for message in messages:
        assert message in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_wrong_model_lists_what_does_not_fit() -> None:
    deeper = SwinTransformer(**{**SWIN, "depths": (2, 3)})
    model = ACmixSwin(**SWIN)
    assert_refused(model, deeper, "ACmixSwin, got 13", "unknown: layers.1.blocks.2.mlp.fc1.weight")
    shallow = SwinTransformer(**{**SWIN, "depths": (2, 1)})
    assert_refused(model, shallow, "missing: layers.1.blocks.1.attn.qkv.weight")
    wide = SwinTransformer(**{**SWIN, "embed_dim": 32})
    wrong = "wrong shape: layers.0.blocks.0.attn.qkv.weight, expected (48, 16), got (96, 32)"
    assert_refused(model, wide, wrong)
    assert_refused(model, resnets()[0], "unknown: conv1.weight", "missing: patch_embed.proj.weight")
    assert_refused(model, ACmixSwin(**SWIN), "unknown: layers.0.blocks.0.attn.fc_weight")
    assert_refused(model, {**SwinTransformer(**SWIN).state_dict(), "norm.bias": 3}, "no tensor")
    none = "no attention in the model: layers.0.blocks.0.attn"
    only_convolution = ACmixSwin(**SWIN, acmix_kwargs={"mix": "convolution"})
    assert_refused(only_convolution, SwinTransformer(**SWIN), none)


def test_a_wrong_resnet_lists_what_does_not_fit() -> None:
    source, model = resnets()
    weights = source.state_dict()
    kernel = "layer2.1.conv2.weight"
    assert_refused(model, {**weights, kernel: weights[kernel][:, :4]}, "kernel of layer2.1.conv2")
    assert_refused(model, {**weights, kernel: weights[kernel] / 0}, "not finite: kernel of layer2")
    assert_refused(model, {**weights, kernel: None}, "no tensor: weight or bias of layer2.1.conv2")
    del weights[kernel]
    assert_refused(model, weights, "missing: layer2.1.conv2.qkv_weight")
    _, attention = resnets(path="attn")
    assert_refused(attention, source, "no convolution path in the model: layer1.0.conv2")
    with torch.device("meta"):
        nowhere = ACmix2d(8, 8)
    with pytest.raises(ValueError, match="on the meta device: the layer"):
        warm_start(nowhere, nn.Conv2d(8, 8, 3, padding=1))


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Conv2d(8, 8, 3, 2, 1), r"stride \(1, 1\).*got \(2, 2\)"),
        (nn.Conv2d(8, 8, 3, 1, 2, 2), r"dilation \(1, 1\).*got \(2, 2\)"),
        (nn.Conv2d(8, 8, 3), r"padding \(1, 1\).*got \(0, 0\)"),
        (nn.Conv2d(8, 8, 3, 1, 1, padding_mode="reflect"), "padding_mode zeros.*got reflect"),
        (nn.Conv2d(8, 8, 3, 1, 1, groups=2), "groups 1.*got 2"),
        (nn.Conv2d(8, 4, 3, 1, 1), r"expected \(8, 8, k, k\).*got \(4, 8, 3, 3\)"),
        (nn.Conv2d(8, 8, 5, 1, 2), r"odd k up to 3, got \(8, 8, 5, 5\)"),
        (nn.Conv2d(8, 8, (3, 1), 1, (1, 0)), r"got \(8, 8, 3, 1\)"),
    ],
)
def test_a_convolution_that_does_not_fit(conv: nn.Conv2d, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_convolution(ACmix2d(8, 8), conv)
    with pytest.raises(ValueError, match="no convolution path in the model"):
        fit_convolution(ACmix2d(8, 8, mix="attention"), nn.Conv2d(8, 8, 3, padding=1))


def test_types() -> None:
    with pytest.raises(TypeError, match="model: expected a module, got str"):
        warm_start("resnet50", {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="source: expected a module or a state dict, got str"):
        warm_start(PatchwiseACmix(8, 8), "weights.pt")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnetaa50", r"stride: layer2.0.conv2, expected 2, got 1"),
        ("resnetblur50", r"stride: layer2.0.conv2, expected 2, got 1"),
        ("resnet50", r"dilation: layer4.1.conv2, expected 1, got 2"),
        ("act", "SiLU, not ReLU: act1"),
        ("eps", "eps: bn1, expected 1e-05, got 0.001"),
    ],
)
@pytest.mark.slow
def test_another_geometry_is_refused(name: str, message: str) -> None:
    """No tensor tells it."""
    arguments: dict[str, object] = {"output_stride": 16} if name == "resnet50" else {}
    if name == "act":
        arguments["act_layer"] = nn.SiLU
    source = timm.create_model(name if name.startswith("resnet") else "resnet50", **arguments)
    if name == "eps":
        source.bn1.eps = 1e-3
    model = timm.create_model("resnet50_acmix")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        warm_start(model, source)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("size", [(224, 224), (168, 168), (64, 100), (28, 28), (448, 32)], ids=str)
def test_swin_of_torchvision_at_any_size(size: tuple[int, int]) -> None:
    """It pads before it shifts, and shifts where a map is larger than the window."""
    source = TorchvisionSwin([4, 4], 16, [2, 2, 2], [1, 2, 4], [7, 7]).eval()
    model = ACmixSwin(
        img_size=224,
        embed_dim=16,
        depths=(2, 2, 2),
        num_heads=(1, 2, 4),
        acmix_kwargs={"pad_first": True},
    ).eval()
    for table in (p for n, p in source.named_parameters() if n.endswith("bias_table")):
        nn.init.normal_(table)
    warm_start(model, source)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        assert_all_close([model(x)], [source(x)], 1e-4)
        assert_all_close([fuse(model)(x)], [source(x)], 1e-4)


def test_swin_of_torchvision_for_one_that_rolls_first() -> None:
    for path in ("acmix", "attn"):
        with pytest.raises(ValueError, match=r"pads maps before it shifts .*'pad_first': True"):
            warm_start(ACmixSwin(**SWIN, path=path), torchvision_swin())
