"""The inference form computes what the network does, whatever stands where in it."""

import copy
import logging
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import TOLERANCE, assert_all_close
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune, spectral_norm
from torch.nn.utils import weight_norm as hooked_weight_norm
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops import FrozenBatchNorm2d

from acmix.layers import ACmix2d, PairwiseAttention, PatchwiseACmix, ReducedACmix, WindowACmix
from acmix.layers.mix import MIXES
from acmix.layers.shift import SHIFTS
from acmix.models.pvt import ACmixPVT
from acmix.models.san import ACmixSAN
from acmix.models.swin import ACmixSwin
from acmix.ops import backends
from acmix.surgery.fuse import fuse


def trained(model: nn.Module) -> nn.Module:
    """The model with what training moves moved: statistics, norms, mixing weights, kernels."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
    for name, parameter in model.named_parameters():
        if name.endswith((".alpha", ".beta")):
            nn.init.uniform_(parameter, 0.2, 0.8)
        if name.endswith(("shift.weight", "fc_bias", "qkv.bias", "table")):
            with torch.no_grad():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def assert_same(model: nn.Module, *inputs: object) -> nn.Module:
    """fuse(model), whose outputs are those of the model in eval mode."""
    fused = fuse(model)
    mode = model.training
    with torch.no_grad():
        expected = model.eval()(*inputs)
        assert_all_close([fused(*inputs)], [expected], TOLERANCE[torch.float32])
    model.train(mode)
    return fused


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def resnet(path: str) -> nn.Module:
    return timm.create_model(f"resnet11_tiny_{path}", in_chans=3)


def san(path: str) -> nn.Module:
    return ACmixSAN((1, 2), path=path, widths=(32, 64), kernels=(3, 5), num_classes=10)


def pvt(path: str) -> nn.Module:
    sizes = {"embed_dims": (16, 32), "heads": (1, 2), "reductions": (2, 1), "mlp_ratios": (2, 2)}
    return ACmixPVT((1, 2), path=path, img_size=32, num_classes=10, **sizes)


def swin(path: str) -> nn.Module:
    sizes = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    return ACmixSwin(path=path, img_size=32, num_classes=10, **sizes)


# Each with the batch norms that stay: in SAN those before an activation that no layer precedes
# directly, one in each block and one in each operator.
FAMILIES = {
    "resnet-conv": (lambda: resnet("conv"), 0),
    "resnet-attn": (lambda: resnet("attn"), 0),
    "resnet-acmix": (lambda: resnet("acmix"), 0),
    "san-pairwise": (lambda: san("pairwise"), 8),
    "san-attn": (lambda: san("attn"), 8),
    "san-acmix": (lambda: san("acmix"), 8),
    "pvt-acmix": (lambda: pvt("acmix"), 0),
    "swin-acmix": (lambda: swin("acmix"), 0),
}
FOLDED = ("fc_weight", "fc_bias", "shift.", "mix.")


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    make, stay = FAMILIES[family]
    model = trained(make()).train()
    before = copy.deepcopy(model.state_dict())
    fused = assert_same(model, torch.randn(2, 3, 29, 37))
    images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    assert_same(model, images)

    assert norms(fused) == stay
    assert not any(part in name for name in fused.state_dict() for part in FOLDED)
    assert not any(module.training for module in fused.modules())
    assert not any(parameter.requires_grad for parameter in fused.parameters())

    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_resnet_has_fewer_tensors_and_operations() -> None:
    model = trained(resnet("acmix"))
    fused = fuse(model)
    count = [sum(t.numel() for t in m.state_dict().values()) for m in (model, fused)]
    assert count[1] < count[0]
    nodes = [
        len(list(torch.export.export(m.eval(), (torch.randn(1, 3, 9, 9),)).graph.nodes))
        for m in (model, fused)
    ]
    assert nodes[1] < 0.7 * nodes[0]


def test_compiles_and_exports() -> None:
    fused = fuse(trained(resnet("acmix")))
    x = torch.randn(2, 3, 9, 7)
    expected = fused(x)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(fused, (x,)).module()
    assert_all_close([compiled(x), exported(x)], [expected] * 2, TOLERANCE[torch.float32])


def test_gradient_of_the_input() -> None:
    model = trained(resnet("acmix")).eval()
    x = torch.randn(2, 3, 9, 7, requires_grad=True)
    fused, expected = (torch.autograd.grad(m(x).sum(), x) for m in (fuse(model), model))
    assert_all_close(fused, expected, TOLERANCE[torch.float32])


def test_state_dict_loads_into_another_fused_model() -> None:
    first, second = (fuse(trained(resnet("acmix"))) for _ in range(2))
    x = torch.randn(1, 3, 9, 9)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_fused_twice_is_fused() -> None:
    for path in ("acmix", "pairwise"):
        model = fuse(trained(san(path)))
        assert_same(model, torch.randn(1, 3, 17, 16))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("mix", MIXES)
def test_layer(mix: str, shift: str, form: str) -> None:
    layer = trained(nn.Sequential(ACmix2d(6, 8, mix=mix, shift=shift), nn.BatchNorm2d(8)))
    fused = assert_same(layer, torch.randn(2, 6, 9, 7))
    assert isinstance(fused[1], nn.Identity)
    assert_same(layer[0], torch.randn(2, 6, 9, 7))  # without a norm, and the model itself


@pytest.mark.parametrize("mix", ["learned", "attention"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"stride": 2},
        {"stride": 2, "dilation": 2, "kernel_conv": 5},
        {"kernel_conv": 1, "kernel_att": 3, "heads": 2},
        {"position": False, "heads": 8},
    ],
    ids=str,
)
def test_layer_of_other_arguments(mix: str, arguments: dict, form: str) -> None:
    layer = nn.Sequential(ACmix2d(6, 8, mix=mix, **arguments), nn.BatchNorm2d(8))
    for shape in ((2, 6, 9, 7), (1, 6, 2, 3), (1, 6, 1, 1)):
        assert_same(trained(layer), torch.randn(shape))


@pytest.mark.parametrize("backend", [name for name, why in backends().items() if why is None])
def test_layer_by_every_backend(backend: str) -> None:
    layer = nn.Sequential(ACmix2d(6, 8, backend=backend), nn.BatchNorm2d(8))
    assert_same(trained(layer), torch.randn(2, 6, 9, 7))


def test_norm_with_channels_that_it_shuts_off(form: str) -> None:
    """The convolution reads v too, which may therefore not be multiplied by zero."""
    layer = trained(nn.Sequential(ACmix2d(6, 8), nn.BatchNorm2d(8)))
    with torch.no_grad():
        layer[1].weight[:5] = torch.tensor([0.0, -0.0, 1e-12, -1e-7, 1e-3])
    assert_same(layer, torch.randn(2, 6, 9, 7))
    nn.init.zeros_(layer[1].weight)
    assert_same(layer, torch.randn(2, 6, 9, 7))
    nn.init.zeros_(layer[0].mix.alpha)
    assert_same(layer, torch.randn(2, 6, 9, 7))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("mix", MIXES)
def test_layers_of_swin_and_pvt(mix: str, shift: str, form: str) -> None:
    for roll, bias in ((True, True), (False, False)):
        window = WindowACmix(
            8,
            heads=2,
            window_size=4,
            shift_size=2,
            mix=mix,
            shift=shift,
            roll_convolution=roll,
            qkv_bias=bias,
        )
        assert_same(trained(window), torch.randn(2, 9, 7, 8))
    reduced = ReducedACmix(8, heads=2, reduction=2, mix=mix, shift=shift)
    assert_same(trained(reduced), torch.randn(2, 63, 8), (9, 7))
    with_token = ReducedACmix(8, heads=2, mix=mix, shift=shift, qkv_bias=False)
    assert_same(trained(with_token), torch.randn(2, 64, 8), (9, 7))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("mix", ["learned", "convolution"])
def test_many_heads_keep_fc_apart(mix: str, shift: str) -> None:
    """Above four heads the fold has more operations than the two steps."""
    x = torch.randn(2, 9, 7, 16)
    window = trained(WindowACmix(16, heads=8, window_size=4, mix=mix, shift=shift))
    assert assert_same(window, x).convolution.fc_weight is not None
    reduced = trained(ReducedACmix(16, heads=8, reduction=2, mix=mix, shift=shift))
    fused = assert_same(reduced, x.flatten(1, 2), (9, 7))
    assert fused.convolution.fc_weight is not None
    layer = nn.Sequential(ACmix2d(16, 16, heads=8, mix=mix, shift=shift), nn.BatchNorm2d(16))
    fused = assert_same(trained(layer), x.permute(0, 3, 1, 2))
    # What is one factor for attention and the convolution of v has to be in the kernel.
    assert (fused[0].convolution.fc_weight is None) == (mix == "learned")


@pytest.mark.parametrize("mix", MIXES)
def test_layer_of_san(mix: str, form: str) -> None:
    for shift in SHIFTS:
        layer = PatchwiseACmix(6, 16, kernel_att=3, mix=mix, shift=shift)
        assert_same(trained(nn.Sequential(layer, nn.BatchNorm2d(16))), torch.randn(2, 6, 9, 7))
        assert_same(trained(layer), torch.randn(2, 6, 9, 7))


def test_pairwise_attention_takes_the_norm() -> None:
    layer = nn.Sequential(PairwiseAttention(6, 16, kernel_att=3), nn.BatchNorm2d(16))
    assert norms(assert_same(trained(layer), torch.randn(2, 6, 9, 7))) == 1  # before a ReLU


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = trained(resnet("acmix")).to(dtype).eval()
    x = torch.randn(2, 3, 9, 7).to(dtype)
    fused = fuse(model)
    assert {p.dtype for p in fused.parameters()} == {dtype}
    expected = copy.deepcopy(model).double()(x.double())
    errors = [(m(x).double() - expected).abs().max() / expected.abs().max() for m in (fused, model)]
    assert errors[0] < max(2 * errors[1], TOLERANCE[dtype])


LAYERS = {
    "conv1d": (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (2, 3, 9)),
    "conv2d": (nn.Conv2d(3, 4, 3, 2, groups=1), nn.BatchNorm2d(4), (2, 3, 9, 7)),
    "conv2d-groups": (nn.Conv2d(4, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8), (2, 4, 9, 7)),
    "conv3d": (nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), (2, 3, 5, 5, 5)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4), (2, 3, 9, 7)),
    "norm-and-activation": (nn.Conv2d(3, 4, 3), BatchNormAct2d(4), (2, 3, 9, 7)),
    "no-affine": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), (2, 3, 9, 7)),
    "acmix-no-affine": (ACmix2d(3, 4), nn.BatchNorm2d(4, affine=False), (2, 3, 9, 7)),
    "frozen": (nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4), (2, 3, 9, 7)),
    "acmix-frozen": (ACmix2d(3, 4), FrozenBatchNorm2d(4), (2, 3, 9, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_norms_that_are_folded(name: str) -> None:
    layer, norm, shape = LAYERS[name]
    fused = assert_same(trained(nn.Sequential(layer, norm)), torch.randn(shape))
    assert isinstance(fused[1], (nn.Identity, nn.ReLU))


KEPT = {
    "instance-statistics": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
    "transposed-groups": (nn.ConvTranspose2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)),
    "activation-between": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.BatchNorm2d(4)),
    "parametrized": (weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)),
    "linear-over-maps": (nn.Linear(7, 4), nn.BatchNorm2d(3)),
    "linear-over-tokens": (nn.Sequential(nn.Flatten(2), nn.Linear(63, 3)), nn.BatchNorm1d(3)),
}


@pytest.mark.parametrize("name", KEPT)
def test_norms_that_stay(name: str) -> None:
    layer, norm = KEPT[name]
    fused = assert_same(trained(nn.Sequential(layer, norm)), torch.randn(2, 3, 9, 7))
    assert type(fused[1]) is type(norm)


def test_hooks_stay_and_run() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), ACmix2d(8, 8)))
    seen = []
    for index in (0, 2):
        model[index].register_forward_hook(lambda module, args, out: seen.append(type(module)))
    fused = assert_same(model, torch.randn(1, 3, 9, 7))
    assert norms(fused) == 1
    assert seen == [nn.Conv2d, ACmix2d] * 2


class Twice(nn.Module):
    """A convolution before two norms, one norm after two convolutions, a map that a skip reads."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.norm1, self.norm2 = ACmix2d(4, 4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.read, self.after = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.shared(x)) + self.norm2(self.shared(x + 1))
        x = self.norm(self.first(x)) + self.norm(self.second(x))
        between = self.read(x)
        return self.after(between) + between


def test_what_is_used_twice() -> None:
    assert norms(assert_same(trained(Twice()), torch.randn(2, 4, 9, 7))) == 4


def test_a_layer_of_two_names_is_one_layer() -> None:
    model = trained(nn.Sequential(ACmix2d(4, 4), nn.BatchNorm2d(4), nn.ReLU()))
    model.append(model[0])
    fused = assert_same(model, torch.randn(2, 4, 9, 7))
    assert fused[0] is fused[3]
    assert norms(fused) == 1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = ACmix2d(4, 4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.norm(self.conv(x))
        return x if skip is None else x + skip


class Opaque(nn.Module):
    """Cannot be traced, and takes the map between two entries of its Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Block())
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        taken = x[:, :, :1, :1] * 0
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index == 0 and x.shape[2] > 3:
                taken = x
        for block in self.blocks:
            x = block(x, x)
        return x + taken


def test_what_cannot_be_traced_is_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="acmix.surgery.fuse"):
        fused = assert_same(trained(Opaque()), torch.randn(2, 4, 9, 7))
    assert norms(fused) == 1
    assert "the model: torch.fx cannot trace it" in caplog.text


class Choosing(nn.Module):
    """What follows the convolution depends on an optional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.block = Block()

    def forward(self, x: Tensor, raw: bool = False, more: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        if raw or more is not None:
            return self.block(y)
        return self.block(self.norm(y))


class Asking(Choosing):
    """As it, but by a question that a proxy answers."""

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        return self.block(self.norm(y)) if more is None else self.block(y) + more


class Exact(Choosing):
    """As it, but by a question that a proxy answers as the default does."""

    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        y = self.conv(x)
        return self.block(y if raw is True else self.norm(y))


@pytest.mark.parametrize(
    ("kind", "option"),
    [(Choosing, "raw"), (Choosing, "more"), (Asking, "more"), (Exact, "raw")],
)
def test_optional_arguments_keep_their_meaning(kind: type[Choosing], option: str) -> None:
    model, x = trained(kind()), torch.randn(2, 4, 5, 6)
    fused = assert_same(model, x)
    assert norms(fused) == 1
    given = {option: True if option == "raw" else x}
    torch.testing.assert_close(fused(x, **given), model.eval()(x, **given))


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + F.conv2d(x, self.conv.weight)


def test_a_weight_that_is_read_elsewhere_stays() -> None:
    assert norms(assert_same(trained(Reading()), torch.randn(2, 4, 9, 7))) == 1


def test_refuses_what_is_no_module() -> None:
    with pytest.raises(TypeError, match="model: expected a module, got dict"):
        fuse({})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stay"),
    [("xception41p", 29), ("ghostnet_050", 1), ("resnet18", 0), ("mobilenetv3_small_050", 0)],
)
def test_features_of_timm(name: str, stay: int) -> None:
    """Taken by hooks, between a layer and its norm, or by the network itself."""
    fused = assert_same_features(timm.create_model(name, features_only=True))
    assert norms(fused) == stay
    whole = trained(timm.create_model(name))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = whole.eval().forward_intermediates(x)[1]
        assert_all_close(fuse(whole).forward_intermediates(x)[1], expected, 1e-4)


def assert_same_features(model: nn.Module) -> nn.Module:
    model, x = trained(model).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        fused = fuse(model)
        assert_all_close(fused(x), expected, 1e-4)
    return fused


class Showing(Block):
    """Another method returns what is before the norm."""

    def features(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ShowingByAnother(Block):
    def features(self, batch):
        return self._stem(batch)

    def _stem(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Around(Block):
    """Another method, which returns what forward does."""

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Describing(Block):
    def widths(self, index: int) -> int:
        return self.conv.out_channels


@pytest.mark.parametrize(
    ("kind", "stay"), [(Showing, 1), (ShowingByAnother, 1), (Around, 0), (Describing, 0)]
)
def test_what_another_method_sees(kind: type[Block], stay: int) -> None:
    x = torch.randn(2, 4, 5, 6)
    for model in (kind(), nn.Sequential(kind(), nn.ReLU())):
        fused = assert_same(trained(model), x)
        assert norms(fused) == stay
        if hasattr(model, "features"):
            torch.testing.assert_close(fused.features(x), model.eval().features(x))


class Reaching(nn.Module):
    """Cannot be traced, and runs or reads what is in its child."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.block, self.way = Block(), way

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        if x.sum() > 1e9:
            return y
        inner = self.block
        if self.way == "call":
            return y + inner.conv(x)
        return y * inner.norm.weight.sum() if self.way == "read" else y


@pytest.mark.parametrize("way", ["call", "read"])
def test_a_parent_that_reaches_below_its_child(way: str) -> None:
    fused = assert_same(trained(Reaching(way)), torch.randn(2, 4, 5, 6))
    assert norms(fused) == 1


def test_a_hook_on_what_holds_the_layer(caplog: pytest.LogCaptureFixture) -> None:
    seen = []
    model = nn.Sequential()
    model.add_module("stem", nn.Sequential(nn.Conv2d(4, 4, 1)))
    model.add_module("norm", nn.BatchNorm2d(4))
    model = trained(model)
    assert norms(fuse(model)) == 0
    model.stem.register_forward_hook(lambda module, inputs, out: seen.append(out))
    x = torch.randn(2, 4, 5, 6)
    with caplog.at_level(logging.INFO, logger="acmix.surgery.fuse"):
        fused = assert_same(model, x)
    assert norms(fused) == 1
    assert "norm stays: a hook of stem may see what is before it" in caplog.text
    expected, actual = (out for out in seen if isinstance(out, Tensor))
    torch.testing.assert_close(actual, expected)


def pruned(layer: nn.Module, name: str) -> nn.Module:
    return prune.l1_unstructured(layer, name, 0.5)


def ran(layer: nn.Module) -> nn.Module:
    layer(torch.randn(2, 4, 5, 6))
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: hooked_weight_norm(nn.Conv2d(4, 4, 1)),
            r"0 \(Conv2d\): expected weight as a parameter",
        ),
        (lambda: ran(spectral_norm(nn.Linear(6, 6))), r"0 \(Linear\): expected weight as a"),
        (lambda: pruned(nn.Conv2d(4, 4, 1), "weight"), "make it permanent by .* or prune.remove"),
        (lambda: pruned(ACmix2d(4, 4), "qkv_weight"), r"0 \(ACmix2d\): expected qkv_weight as a"),
        (lambda: nn.LazyConv2d(4, 1), r"0 \(LazyConv2d\): .* of a known shape, got none: run the"),
        (lambda: nn.LazyBatchNorm2d(), r"0 \(LazyBatchNorm2d\): .* of a known shape, got none"),
    ],
    ids=["weight_norm", "spectral_norm", "pruned", "pruned operator", "lazy", "lazy norm"],
)
def test_weights_that_are_not_there_yet(make: Callable[[], nn.Module], message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # weight_norm is deprecated, and in use
        model = nn.Sequential(make(), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=message):
        fuse(model)


def test_weights_made_permanent() -> None:
    layer = pruned(nn.Conv2d(4, 4, 1), "weight")
    prune.remove(layer, "weight")
    model = trained(nn.Sequential(layer, nn.BatchNorm2d(4)))
    assert norms(assert_same(model, torch.randn(2, 4, 5, 6))) == 0
