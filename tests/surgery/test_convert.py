"""What is swapped, what is not and why, and what stays as it was."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from helpers import TOLERANCE, assert_all_close
from timm.layers import Conv2dSame
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.nn.utils import spectral_norm
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models import resnet18
from torchvision.ops import Conv2dNormActivation

from acmix.layers import ACmix2d, WindowACmix
from acmix.surgery.convert import convert


class Own(nn.Conv2d):
    """A subclass that computes what its base does."""


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Net(nn.Module):
    """A stem, a stage of two blocks and a head, 3x3 and 1x1 by turns."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage = nn.Sequential(self.block(8, 12, stride=2), self.block(12, 8, dilation=2))
        self.head = nn.Conv2d(8, 5, 3, padding=1)

    @staticmethod
    def block(before: int, after: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(before, after, 3, stride, dilation, dilation, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU(), nn.Conv2d(after, after, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage(self.stem(x)))


STEM, FIRST, SECOND = "stem", "stage.0.0", "stage.1.0"


def operators(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, (ACmix2d, WindowACmix))]


def test_whole_model() -> None:
    model = Net()
    x = torch.randn(2, 3, 9, 7)
    shape = model(x).shape
    report = convert(model, "*")
    assert operators(model) == [*report.swapped] == [STEM, FIRST, SECOND]
    assert report.skipped == {
        "stage.0.3": "kernel 1x1, not 3x3",
        "stage.1.3": "kernel 1x1, not 3x3",
        "head": "5 channels, no multiple of 4 heads",
    }
    assert all(0 <= residual < 1 for residual in report.swapped.values())
    assert (model.stage[0][0].stride, model.stage[1][0].dilation) == (2, 2)
    out = model(x)
    assert out.shape == shape
    out.sum().backward()
    assert all(p.grad is not None for p in model.stem.parameters())


@pytest.mark.parametrize(
    ("where", "swapped"),
    [
        (lambda model: "stage.*.0", [FIRST, SECOND]),
        (lambda model: "stage", [FIRST, SECOND]),
        (lambda model: ["stem", "*.1.?"], [STEM, SECOND]),
        (lambda model: model.stage, [FIRST, SECOND]),
        (lambda model: model.stem, [STEM]),
        (lambda model: (model.stem, model.stage[1]), [STEM, SECOND]),
        (lambda model: lambda name, conv: conv.in_channels == 12, [SECOND]),
        (lambda model: [lambda name, conv: name == "stem", "stage.0"], [STEM, FIRST]),
        (lambda model: model, [STEM, FIRST, SECOND]),
    ],
    ids=range(9),
)
def test_where(where: Callable[[nn.Module], object], swapped: list[str]) -> None:
    model = Net()
    report = convert(model, where(model), warm=False)
    assert operators(model) == [*report.swapped] == swapped


REASONS = {
    "5x5, not 3x3": lambda: nn.Conv2d(8, 8, 5, padding=2),
    "2 groups": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2),
    "stride (2, 1)": lambda: nn.Conv2d(8, 8, 3, (2, 1), 1),
    "dilation (2, 1)": lambda: nn.Conv2d(8, 8, 3, padding=(2, 1), dilation=(2, 1)),
    "padding (0, 0), not its dilation, 1": lambda: nn.Conv2d(8, 8, 3),
    "padding (1, 1), not its dilation, 2": lambda: nn.Conv2d(8, 8, 3, padding=1, dilation=2),
    "padding valid": lambda: nn.Conv2d(8, 8, 3, padding="valid"),
    "padding mode 'reflect'": lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    "6 channels, no multiple of 4 heads": lambda: nn.Conv2d(8, 6, 3, padding=1),
    "dtype torch.complex64": lambda: nn.Conv2d(8, 8, 3, padding=1, dtype=torch.complex64),
    "a forward of Scaled's own": lambda: Scaled(8, 8, 3, padding=1),
    "a forward of Conv2dSame's own": lambda: Conv2dSame(8, 8, 3, padding=1),
    "channels that only an input tells": lambda: nn.LazyConv2d(8, 3, padding=1),
    "parametrizations": lambda: weight_norm(nn.Conv2d(8, 8, 3, padding=1)),
    "hooks": lambda: spectral_norm(nn.Conv2d(8, 8, 3, padding=1)),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_stays_and_why(reason: str) -> None:
    conv = REASONS[reason]()
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), conv)
    report = convert(model, "*", warm=False)
    assert model[1] is conv
    assert [*report.swapped] == ["0"]
    assert reason in report.skipped["1"]
    assert reason in str(report)


@pytest.mark.parametrize(
    "conv",
    [
        Own(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding="same", dilation=3),
        nn.Conv2d(8, 16, 3, 2, 2, 2),
    ],
    ids=["subclass", "same", "strided-and-dilated"],
)
def test_same_size(conv: nn.Conv2d) -> None:
    model = nn.Sequential(nn.Identity(), conv)
    for size in ((9, 7), (8, 6), (1, 1)):
        assert convert(copy.deepcopy(model), warm=False).skipped == {}
        swapped = copy.deepcopy(model)
        convert(swapped, "*", warm=False)
        assert swapped(torch.randn(2, 8, *size)).shape == conv(torch.randn(2, 8, *size)).shape


def test_device_dtype_mode_and_frozen_stay() -> None:
    model = Net().to(torch.bfloat16)
    model.stage.eval()
    model.stem.weight.requires_grad_(False)
    convert(model, "*")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.stem.training
    assert not model.stage[0][0].training
    assert not any(p.requires_grad for p in model.stem.parameters())
    assert all(p.requires_grad for p in model.stage[0][0].parameters())

    meta = Net().to("meta")
    convert(meta, "*", warm=False)
    assert {p.device.type for p in meta.parameters()} == {"meta"}


def test_arguments_pass_on() -> None:
    model = Net()
    convert(model, "*", heads=2, kernel_att=3, kernel_conv=5, mix="convex", shift="fixed")
    layer = model.stem
    assert (layer.heads, layer.kernel_att, layer.kernel_conv) == (2, 3, 5)
    model = Net()
    report = convert(model, "*", path="attn", position=False)
    assert not model.stem.has_convolution
    assert set(report.swapped.values()) == {None}
    assert "starts anew" in str(report)


def test_a_module_of_two_names_stays_one() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.ModuleDict({"a": conv, "b": nn.Sequential(conv), "c": copy.deepcopy(conv)})
    report = convert(model, "a", warm=False)
    assert [*report.swapped] == ["a", "b.0"]
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], ACmix2d)
    assert isinstance(model["c"], nn.Conv2d)


def test_warm_start_is_near_what_it_replaces() -> None:
    x = torch.randn(2, 8, 9, 7)
    errors = []
    for warm in (True, False):
        model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False))
        expected = model(x)
        convert(model, "*", warm=warm)
        errors.append(((model(x) - expected).norm() / expected.norm()).item())
    assert errors[0] < 0.7 * errors[1]


def swin() -> SwinTransformer:
    sizes = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    return SwinTransformer(img_size=32, num_classes=10, **sizes)


def test_window_attention_of_timm() -> None:
    model = swin().eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    report = convert(model, "layers.1", roll_convolution=False)
    names = ["layers.1.blocks.0.attn", "layers.1.blocks.1.attn"]
    assert operators(model) == names
    assert report.swapped == dict.fromkeys(names, 0.0)
    assert not model.layers[1].blocks[0].attn.roll_convolution
    assert not any(module.training for module in model.modules())
    assert_all_close([model(x)], [expected], TOLERANCE[torch.float32])
    model.train()(x).sum().backward()
    convert(model, model.layers[0].blocks[1], warm=False)
    assert len(operators(model)) == 3
    model.set_input_size((64, 32))
    assert model(torch.randn(1, 3, 64, 32)).shape == (1, 10)


def test_attentions_that_stay() -> None:
    model = nn.ModuleDict({"vit": nn.MultiheadAttention(8, 2), "swin": swin(), "net": Net()})
    report = convert(model, "*", path="attn")
    assert report.skipped["vit"] == "not the attention of a block of timm's Swin"
    assert report.skipped["swin.layers.0.blocks.0.attn"] == "attention already"
    assert [*report.swapped] == [f"net.{name}" for name in (STEM, FIRST, SECOND)]
    wide = swin()
    wide.layers[0].blocks[0] = timm.models.swin_transformer.SwinTransformerBlock(
        16, (8, 8), num_heads=2, head_dim=4, window_size=4
    )
    report = convert(wide, "layers.0", warm=False)
    assert "heads 8 channels wide" in report.skipped["layers.0.blocks.0.attn"]


def test_converted_parts_are_left_alone() -> None:
    model = timm.create_model("resnet11_tiny_acmix", in_chans=3)
    stem = model.conv1
    report = convert(model, "*", warm=False)
    assert [*report.swapped] == ["conv1"]
    assert model.conv1 is not stem
    with pytest.raises(ValueError, match="where: expected a 3x3"):
        convert(model, "*")


def test_networks_of_torchvision_and_timm() -> None:
    model = resnet18(num_classes=10)
    assert len(convert(model, "layer4", warm=False).swapped) == 4
    assert model(torch.randn(2, 3, 65, 33)).shape == (2, 10)
    block = nn.Sequential(Conv2dNormActivation(3, 8), Conv2dNormActivation(8, 8))
    assert [*convert(block, "*", warm=False).swapped] == ["0.0", "1.0"]


@pytest.mark.parametrize(
    ("where", "arguments", "message"),
    [
        ([], {}, "where: expected patterns, modules or predicates, got none"),
        ("stag.*", {}, r"where: expected .* such as stage\.\S+, .*; got 'stag\.\*'"),
        (["stem", "nothing"], {}, "got 'nothing'"),
        (nn.Conv2d(3, 4, 3), {}, "where: .* got a Conv2d that has or is none of them"),
        (lambda name, module: False, {}, "where: .* got a predicate that is true of none"),
        ("head", {}, r"where: .* got head \(5 channels, no multiple of 4 heads\)"),
        (None, {"window_size": 7}, "acmix_kwargs: expected some of .* got window_size"),
        (None, {"path": "attn", "mix": "sum"}, "acmix_kwargs: expected some of .* got mix"),
        (None, {"kernel_att": 4}, "kernel_att: expected an odd window side, got 4"),
        (None, {"heads": 0}, "heads: expected a positive int, got 0"),
        (None, {"path": "conv"}, "path: expected one of 'acmix', 'attn', got 'conv'"),
    ],
)
def test_refused_and_unchanged(where: object, arguments: dict, message: str) -> None:
    model = Net()
    before = [*model.named_modules()]
    with pytest.raises(ValueError, match=message):
        convert(model, where, **arguments)
    assert [*model.named_modules()] == before


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))
    model[1].weight = model[0].weight
    report = convert(model, "*", warm=False)
    assert [*report.swapped] == ["2"]
    assert report.skipped == dict.fromkeys("01", "a weight that another module has, too")


def test_each_operator_takes_its_arguments() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), swin())
    convert(model, lambda name, _: "conv" not in name, heads=3, kernel_att=5, shift="fixed")
    assert model[0].kernel_att == 5
    windows = [module for module in model.modules() if isinstance(module, WindowACmix)]
    assert windows
    assert {type(layer.shift) for layer in (model[0], *windows)} == {type(model[0].shift)}


def test_refused_types() -> None:
    with pytest.raises(TypeError, match="model: expected a module, got list"):
        convert([])
    with pytest.raises(TypeError, match=r"where: expected patterns, .* got int"):
        convert(Net(), 3)
    with pytest.raises(ValueError, match=r"model: expected a module that holds .* got a Conv2d"):
        convert(nn.Conv2d(4, 4, 3, padding=1))
    with pytest.raises(ValueError, match="warm: expected False on the meta device"):
        convert(Net().to("meta"))
    with pytest.raises(ValueError, match="got a model without any convolution"):
        convert(nn.Linear(3, 3))


def test_report_reads_well() -> None:
    report = convert(Net(), "*", warm=False)
    assert str(report).splitlines() == [
        "3 swapped",
        "  stem: starts anew",
        "  stage.0.0: starts anew",
        "  stage.1.0: starts anew",
        "3 kept",
        "  kernel 1x1, not 3x3: stage.0.3, stage.1.3",
        "  5 channels, no multiple of 4 heads: head",
    ]


@pytest.mark.parametrize(
    ("name", "stem"), [("mobilenetv3_small_050", "conv_stem"), ("regnetx_002", "stem.conv")]
)
def test_the_stem_is_swapped_where_it_is_named(name: str, stem: str) -> None:
    """It sees the image at its full size, and is all that these networks could swap."""
    model = timm.create_model(name)
    with pytest.raises(
        ValueError, match=rf"got {stem} \(the stem, which sees the image at its full"
    ):
        convert(model, warm=False)
    assert stem in convert(model, stem, warm=False).swapped


def test_what_is_no_stem() -> None:
    """A first convolution of features, or one that would not be swapped anyway."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    assert [*convert(model, warm=False).swapped] == ["0"]
    model = nn.Sequential(nn.Conv2d(3, 8, 7), nn.Conv2d(8, 8, 3, padding=1))
    assert convert(model, warm=False).skipped == {"0": "kernel 7x7, not 3x3"}


class Listed(nn.Module):
    """Its forward takes the layers from plain containers."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.conv, self.last = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        layers = {"first": self.conv, "more": [(self.last,)]}
        self.layers = layers if kind is dict else kind([self.conv, [self.last]])

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layers, dict):
            return self.layers["more"][0][0](self.layers["first"](x))
        return self.layers[1][0](self.layers[0](x))


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_what_plain_containers_hold_is_swapped_too(kind: type) -> None:
    model = Listed(kind)
    assert [*convert(model, warm=False).swapped] == ["conv", "last"]
    model(torch.randn(1, 4, 5, 5)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_method_that_is_kept_keeps_its_layer() -> None:
    model = Net()
    model.run = model.stage[0][0].forward
    report = convert(model, "stage", warm=False)
    assert report.skipped["stage.0.0"] == "a method of it is kept as run"
    assert [*report.swapped] == ["stage.1.0"]


def test_an_attention_without_weights_is_none() -> None:
    class NoAttention(nn.Identity):
        pass

    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), NoAttention())
    assert convert(model, warm=False).skipped == {}


def test_converting_twice_says_so() -> None:
    model = Net()
    convert(model, "stage", warm=False)
    with pytest.raises(ValueError, match=r"got 'stage.\*.0'; 2 layers are ACmix already"):
        convert(model, "stage.*.0")
    with pytest.raises(ValueError, match="; 2 layers are ACmix already"):
        convert(model, "stage")


def test_our_own_swin_converts() -> None:
    model = timm.create_model("swin_tiny_attn", img_size=56, depths=(1, 1, 1, 1))
    assert len(convert(model, "layers.0").swapped) == 1
