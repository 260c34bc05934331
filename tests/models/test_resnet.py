"""ResNet: what replaces its 3x3 convolutions, its stems, strides and arguments."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

import acmix.models  # noqa: F401, registers the models
from acmix import ACmix2d
from acmix.models.resnet import ACmixResNet
from acmix.ops import shift_kernels


def make(path: str = "acmix", **arguments: object) -> ACmixResNet:
    defaults = {"layers": (1, 2, 1), "channels": (8, 12, 16), "num_classes": 4}
    return ACmixResNet(**{**defaults, "path": path, **arguments})


def operators(model: nn.Module) -> list[ACmix2d]:
    return [module for module in model.modules() if isinstance(module, ACmix2d)]


def test_is_timms_resnet() -> None:
    """path="conv" with the depths that timm has is timm's network, weight for weight."""
    ours, theirs = timm.create_model("resnet50_conv").eval(), timm.create_model("resnet50").eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("path", ["attn", "acmix"])
def test_replaces_every_3x3_and_nothing_else(path: str) -> None:
    plain, model = timm.create_model("resnet26_conv"), timm.create_model(f"resnet26_{path}")
    for name, module in plain.named_modules():
        other = model.get_submodule(name)
        if isinstance(module, nn.Conv2d) and name.endswith(".conv2"):
            assert isinstance(other, ACmix2d)
            assert (other.in_channels, other.out_channels) == (
                module.in_channels,
                module.out_channels,
            )
            assert (other.stride, other.heads, other.kernel_att) == (module.stride[0], 4, 7)
            assert hasattr(other, "fc_weight") == (path == "acmix")
        else:
            assert type(other) is type(module)
            assert repr(other).splitlines()[0] == repr(module).splitlines()[0]


def test_stride_is_on_the_3x3() -> None:
    strides = [operator.stride for operator in operators(make())]
    assert strides == [1, 2, 1, 2]


@pytest.mark.parametrize("zero_init_last", [False, True])
def test_initialisation_survives(zero_init_last: bool) -> None:
    """timm's constructor starts every nn.Conv2d and the last norm of a block anew."""
    model = make(zero_init_last=zero_init_last)
    check_start(model)
    assert bool(model.layer1[0].bn3.weight.any()) != zero_init_last
    model.init_weights(zero_init_last)
    check_start(model)


@pytest.mark.parametrize("init", [nn.init.zeros_, nn.init.ones_])
def test_initialisation_survives_a_loop(init: Callable) -> None:
    model = make()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            init(module.weight)
    check_start(model)


def check_start(model: nn.Module) -> None:
    for operator in operators(model):
        kernels = shift_kernels(operator.out_channels, 3)
        assert torch.equal(operator.shift.weight, kernels)
        assert operator.mix.alpha.item() == operator.mix.beta.item() == 0.5
        bound = operator.in_channels**-0.5
        assert 0.9 * bound < operator.qkv_weight.abs().max() <= bound


def test_acmix_kwargs() -> None:
    arguments = {"heads": 2, "kernel_att": 3, "kernel_conv": 5, "mix": "convex", "shift": "fixed"}
    arguments.update(position=False, backend="reference")
    for operator in operators(make(acmix_kwargs=arguments)):
        assert (operator.heads, operator.kernel_att, operator.kernel_conv) == (2, 3, 5)
        assert operator.backend == "reference"
        assert operator.position_weight is None
    for operator in operators(make(acmix_kwargs={"shift_init": "kaiming"})):
        assert not torch.equal(operator.shift.weight, shift_kernels(operator.out_channels, 3))
    model = timm.create_model("resnet11_tiny_acmix", acmix_kwargs={"mix": "sum"})
    assert {operator.kernel_att for operator in operators(model)} == {5}  # its own default, kept


@pytest.mark.parametrize("path", ["conv", "acmix"])
@pytest.mark.parametrize(
    ("output_stride", "strides", "dilations"),
    [(32, (1, 2, 2, 2), (1, 1, 1, 1)), (16, (1, 2, 2, 1), (1, 1, 1, 1)), (8, (1, 2, 1, 1), None)],
)
def test_output_stride(
    path: str, output_stride: int, strides: tuple[int, ...], dilations: tuple[int, ...] | None
) -> None:
    model = make(path, layers=(1, 1, 1, 2), channels=(8,) * 4, output_stride=output_stride)
    x = torch.randn(1, 3, 64, 96)
    features = model.forward_features(x)
    assert features.shape[2:] == (64 // output_stride, 96 // output_stride)
    assert model.feature_info[-1]["reduction"] == output_stride
    if path == "acmix":
        first = [
            stage[0].conv2 for stage in (model.layer1, model.layer2, model.layer3, model.layer4)
        ]
        assert tuple(operator.stride for operator in first) == strides
        # timm dilates the first block of a stage by the dilation of the stage before.
        assert model.layer4[1].conv2.dilation == 32 // output_stride
        assert dilations is None or tuple(o.dilation for o in first) == dilations


@pytest.mark.parametrize(("output_stride", "last"), [(8, 2), (4, 4), (2, 8)])
def test_small_stem(output_stride: int, last: int) -> None:
    model = timm.create_model("resnet26_small_acmix", output_stride=output_stride).eval()
    features = model.forward_features(torch.randn(1, 3, 16, 16))
    assert features.shape == (1, 2048, last, last)
    assert model.conv1.weight.shape == (64, 3, 3, 3)
    std = (2 / (64 * 9)) ** 0.5  # timm's start of a convolution
    assert model.conv1.weight.std().item() == pytest.approx(std, rel=0.1)


def test_three_stages() -> None:
    model = timm.create_model("resnet11_tiny_acmix").eval()
    x = torch.randn(1, 1, 8, 8)
    assert model.forward_features(x).shape == (1, 256, 2, 2)
    assert [info["num_chs"] for info in model.feature_info] == [64, 64, 128, 256]
    assert len(model.forward_intermediates(x, intermediates_only=True)) == 4
    assert model.prune_intermediate_layers([1]) == [1]
    assert model(x).shape == (1, 64, 8, 8)


def test_timms_other_arguments() -> None:
    """Stems, downsampling, normalisation and attention blocks of timm's ResNet."""
    model = make(
        stem_type="deep",
        stem_width=16,
        avg_down=True,
        norm_layer="groupnorm1",
        act_layer="silu",
        drop_block_rate=0.1,
        aa_layer=timm.layers.BlurPool2d,
    )
    assert {operator.stride for operator in operators(model)} == {1}  # aa_layer strides instead
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "both"}, "path: expected one of 'conv', 'attn', 'acmix', got 'both'"),
        ({"stem": "tiny"}, "stem: expected one of"),
        ({"layers": (1, 2)}, r"layers, channels: expected three stages or four.*\(1, 2\)"),
        ({"acmix_kwargs": {"stride": 2}}, "acmix_kwargs: expected some of heads.*got stride"),
        ({"path": "conv", "acmix_kwargs": {"heads": 2}}, "expected none for this path, got heads"),
        ({"path": "attn", "acmix_kwargs": {"mix": "sum"}}, "expected some of .*, got mix"),
        ({"acmix_kwargs": {"heads": 3}}, "out_channels: expected a multiple of heads"),
        ({"cardinality": 2}, "cardinality: expected 1"),
        ({"output_stride": 4}, "output_stride: expected one of 8, 16, 32, got 4"),
        ({"output_stride": 32, "stem": "small"}, "output_stride: expected one of 2, 4, 8, got 32"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)
