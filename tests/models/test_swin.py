"""Swin: timm's network, its sizes, and what replaces its attention."""

import pytest
import timm
import torch
from torch import nn

import acmix.models  # noqa: F401, registers the models
from acmix.layers.window import WindowACmix
from acmix.models.swin import ACmixSwin
from acmix.ops import shift_kernels


def make(path: str = "acmix", **arguments: object) -> ACmixSwin:
    defaults = {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 4}
    defaults.update(img_size=56, window_size=7, drop_path_rate=0.0)
    return ACmixSwin(**{**defaults, "path": path, **arguments})


def operators(model: nn.Module) -> list[WindowACmix]:
    return [module for module in model.modules() if isinstance(module, WindowACmix)]


def attention_only(model: ACmixSwin) -> ACmixSwin:
    """The ACmix network of a Swin's weights that computes what the Swin does."""
    img_size = model.patch_embed.img_size
    other = make(acmix_kwargs={"mix": "attention"}, img_size=img_size).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_attn_is_timms_swin() -> None:
    theirs = timm.create_model("swin_tiny_patch4_window7_224").eval()
    ours = timm.create_model("swin_tiny_attn").eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("size", [(56, 56), (64, 64), (97, 131), (24, 40), (3, 5), (28, 28)])
def test_block_is_timms(size: tuple[int, int]) -> None:
    """Rolled, padded and masked as timm does, at the size of the model and at any other."""
    swin = make("attn").double().eval()
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(attention_only(swin).double()(x), swin(x))


@pytest.mark.parametrize("size", [(56, 56), (28, 40), (20, 20)])
def test_windows_of_small_images(size: tuple[int, int]) -> None:
    """A window is no larger than the map that img_size gives, and then is not shifted."""
    swin = make("attn", img_size=size).double().eval()
    acmix = attention_only(swin).double()
    for block, operator in zip(blocks(swin), operators(acmix), strict=True):
        assert operator.window_size == block.window_size
        assert operator.shift_size == block.shift_size
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(acmix(x), swin(x))


def blocks(model: ACmixSwin) -> list:
    return [block for stage in model.layers for block in stage.blocks]


@pytest.mark.parametrize("size", [(40, 40), (112, 112), (84, 56)])
@pytest.mark.parametrize("always_partition", [None, True])
def test_set_input_size(size: tuple[int, int], always_partition: bool | None) -> None:
    swin, acmix = make("attn"), make()
    for model in (swin, acmix):
        model.set_input_size(size, always_partition=always_partition)
    for block, operator in zip(blocks(swin), operators(acmix), strict=True):
        assert operator.window_size == block.window_size
        assert operator.shift_size == block.shift_size
        assert (
            operator.relative_position_bias_table.shape
            == block.attn.relative_position_bias_table.shape
        )
    assert acmix(torch.randn(1, 3, *size)).shape == (1, 4)


def test_released_swin_loads() -> None:
    """Names of Swin's own release: patches merged at the end of a stage, buffers stored."""
    swin = make("attn")
    release = {}
    for key, value in swin.state_dict().items():
        key = key.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc", "head")
        release[key] = value.clone()
    release["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
    release["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    other = make("attn")
    other.load_state_dict({"model": release})
    for key, value in other.state_dict().items():
        assert torch.equal(value, swin.state_dict()[key])


def test_position_biases_are_resized_on_loading() -> None:
    source = make("attn")
    release = {
        key.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc", "head"): value
        for key, value in source.state_dict().items()
    }
    for path, arguments in [("attn", {}), ("acmix", {"acmix_kwargs": {"mix": "attention"}})]:
        model = make(path, window_size=5, img_size=80, **arguments)
        model.load_state_dict(release)
        assert blocks(model)[0].attn.relative_position_bias_table.shape == (81, 2)


def test_acmix_kwargs() -> None:
    arguments = {"kernel_conv": 5, "mix": "convex", "shift": "fixed", "roll_convolution": False}
    for operator in operators(make(acmix_kwargs=arguments)):
        assert operator.kernel_conv == 5
        assert not operator.roll_convolution
        assert [name for name, _ in operator.mix.named_parameters()] == ["alpha"]
        assert not list(operator.shift.parameters())


def test_rolled_convolution_changes_shifted_blocks_only() -> None:
    x = torch.randn(1, 3, 56, 56)
    rolled, unrolled = make().eval(), make(acmix_kwargs={"roll_convolution": False}).eval()
    unrolled.load_state_dict(rolled.state_dict())
    features = [m.patch_embed(x) for m in (rolled, unrolled)]
    first = [m.layers[0].blocks[0](f) for m, f in zip((rolled, unrolled), features, strict=True)]
    assert torch.equal(*first)
    second = [m.layers[0].blocks[1](f) for m, f in zip((rolled, unrolled), first, strict=True)]
    assert not torch.allclose(*second)


@pytest.mark.parametrize("mode", ["", "jax", "moco"])
def test_initialisation_survives(mode: str) -> None:
    model = make(weight_init=mode)
    for again in (False, True):
        if again:
            model.init_weights(mode)
        for operator in operators(model):
            assert torch.equal(operator.shift.weight, shift_kernels(operator.dim, 3))
            assert operator.mix.alpha.item() == operator.mix.beta.item() == 0.5
            assert operator.relative_position_bias_table.std() < 0.03


def test_drop_rates() -> None:
    model = make(attn_drop_rate=0.1, proj_drop_rate=0.2, drop_path_rate=0.3)
    for operator in operators(model):
        assert operator.attn_drop == 0.1
        assert operator.proj_drop.p == 0.2
    rates = [block.drop_path1.drop_prob for block in blocks(model)[1:]]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.3)


def test_strict_img_size() -> None:
    model = make(strict_img_size=True)
    assert model(torch.randn(1, 3, 56, 56)).shape == (1, 4)
    with pytest.raises(AssertionError, match="doesn't match model"):
        model(torch.randn(1, 3, 64, 64))


def test_no_qkv_bias() -> None:
    model = make(qkv_bias=False)
    assert all(operator.qkv.bias is None for operator in operators(model))
    assert model(torch.randn(1, 3, 56, 56)).shape == (1, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "conv"}, "path: expected one of 'attn', 'acmix', got 'conv'"),
        ({"acmix_kwargs": {"heads": 2}}, "acmix_kwargs: expected some of kernel_conv.*got heads"),
        ({"path": "attn", "acmix_kwargs": {"mix": "sum"}}, "expected none for this path, got mix"),
        ({"acmix_kwargs": {"mix": "mean"}}, "mix: expected one of"),
        ({"head_dim": 3}, "head_dim: expected all heads together as wide as the stage"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)
