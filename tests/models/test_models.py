"""Every model of the registry under what timm and its users do with a model."""

import copy
import importlib
import math
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers import TOLERANCE, slow_but
from timm.models import group_parameters, model_entrypoint, named_apply
from timm.models._hub import save_for_hf
from timm.models.vision_transformer import init_weights_vit_timm
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.export import Dim

import acmix.models
from acmix.models import _registry
from acmix.models.pvt import PATHS as TRANSFORMER_PATHS
from acmix.models.resnet import PATHS as RESNET_PATHS
from acmix.models.san import PATHS as SAN_PATHS
from acmix.ops import shift_kernels

RESNETS = ["resnet26", "resnet38", "resnet50", "resnet26_small", "resnet11_tiny"]
SANS = ["san10", "san15", "san19"]
TRANSFORMERS = ["pvt_tiny", "pvt_small", "swin_tiny", "swin_small"]
NAMES = [
    *(f"{base}_{path}" for base in RESNETS for path in RESNET_PATHS),
    *(f"{base}_{path}" for base in SANS for path in SAN_PATHS),
    *(f"{base}_{path}" for base in TRANSFORMERS for path in TRANSFORMER_PATHS),
]
# One of each family and path, where depth and width add nothing.
EACH = [
    *(f"resnet26_{path}" for path in RESNET_PATHS),
    "resnet11_tiny_acmix",
    *(f"san10_{path}" for path in SAN_PATHS),
    *(f"{base}_tiny_{path}" for base in ("pvt", "swin") for path in TRANSFORMER_PATHS),
]
CORE = ["resnet26_acmix", "san10_acmix", "pvt_tiny_acmix", "swin_tiny_acmix"]
each = pytest.mark.parametrize("name", slow_but(CORE, EACH))


def side(name: str) -> int:
    """Of a small image with more than a pixel on the last map."""
    return {"resnet26_small": 16, "resnet11_tiny": 8}.get(name.rsplit("_", 1)[0], 64)


def image(model: nn.Module, name: str, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels(model), side(name), side(name))


def channels(model: nn.Module) -> int:
    """Of the images that it takes: those of its first convolution."""
    return next(p for p in model.parameters() if p.dim() == 4).shape[1]


FEW = {
    "resnet26": {"layers": (1, 2, 1, 1)},
    "san": {"depths": (1, 2, 1, 1, 1)},
    "pvt": {"depths": (2, 2, 2, 2)},
    "swin": {"depths": (2, 2, 2, 2)},
}


def few(name: str, **arguments: object) -> nn.Module:
    """The model with one block or two in a stage and ten classes."""
    depths = next((d for family, d in FEW.items() if name.startswith(family)), {})
    return timm.create_model(name, **{"num_classes": 10, **depths, **arguments})


@pytest.fixture(scope="module", params=slow_but(CORE, NAMES))
def whole(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    """Each model as it is registered; tests leave it as it was."""
    return request.param, timm.create_model(request.param)


def test_registry() -> None:
    assert acmix.models.list_models() == sorted(NAMES)
    assert set(NAMES) <= set(timm.list_models())


def test_forward_and_backward(whole: tuple[str, nn.Module]) -> None:
    name, model = whole
    model.train()
    logits = model(image(model, name))
    assert logits.shape == (2, model.num_classes)
    logits.sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    model.zero_grad()


@pytest.mark.parametrize("name", [name for name in EACH if name.startswith(("resnet", "swin"))])
def test_device_and_dtype(name: str) -> None:
    model = few(name, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize("base", ["resnet26", "san10", "pvt_tiny", "swin_tiny"])
def test_acmix_from_attention_alone(base: str) -> None:
    """With the attention alone, the network of attention: its weights and its outputs."""
    attention = few(f"{base}_attn").eval()
    acmix = few(f"{base}_acmix", acmix_kwargs={"mix": "attention"}).eval()
    acmix.load_state_dict(attention.state_dict())
    x = torch.randn(1, 3, 50, 70)
    torch.testing.assert_close(acmix(x), attention(x))


def test_odd_sizes(whole: tuple[str, nn.Module]) -> None:
    name, model = whole
    model.eval()
    small = side(name) < 64
    sizes = [(13, 9), (1, 3)] if small else [(97, 131), (33, 7)]
    with torch.inference_mode():
        for size in sizes:
            x = torch.randn(1, channels(model), *size)
            logits, features = model(x), model.forward_intermediates(x, intermediates_only=True)
            assert logits.isfinite().all()
            for feature, info in zip(features, model.feature_info, strict=True):
                expected = tuple(math.ceil(length / info["reduction"]) for length in size)
                assert feature.shape[1:] == (info["num_chs"], *expected)


@pytest.mark.parametrize("coarse", [False, True], ids=["blocks", "stages"])
def test_layer_groups(whole: tuple[str, nn.Module], coarse: bool) -> None:
    """Each parameter in one group, and groups from the stem to the head."""
    _, model = whole
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    group_of = {key: group for group, keys in groups.items() for key in keys}
    in_order = [key for key, _ in model.named_parameters()]
    assert sum(map(len, groups.values())) == len(in_order)
    assert group_of.keys() == set(in_order)
    in_modules = [group_of[key] for key in in_order if "." in key]  # embeddings come before
    assert in_modules == sorted(in_modules)
    assert in_modules[0] == 0
    stages = len(model.feature_info) - any(i["module"] == "act1" for i in model.feature_info)
    assert max(in_modules) == stages + 1 if coarse else max(in_modules) >= stages + 1
    for key in in_order:
        if key.startswith("pos_embed"):
            assert group_of[key] == group_of[f"patch_embed{key[-1]}.proj.weight"]


def test_optimizer(whole: tuple[str, nn.Module]) -> None:
    """timm's, with layer-wise decay: no weight decay for the mix, less for earlier layers."""
    _, model = whole
    kept = model.no_weight_decay()
    names = {parameter: key for key, parameter in model.named_parameters()}
    assert {key for key in names.values() if ".mix." in key} <= kept <= set(names.values())
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=0.05, layer_decay=0.5)
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            key = names[parameter]
            assert key not in found
            found[key] = group["lr_scale"]
            if key in kept or parameter.dim() < 2:
                assert group["weight_decay"] == 0
    assert found.keys() == set(names.values())
    assert found[f"{model.default_cfg['classifier']}.weight"] == 1
    assert found[f"{model.default_cfg['first_conv']}.weight"] == min(found.values())


def test_no_weights_come_with_the_package(whole: tuple[str, nn.Module]) -> None:
    name, _ = whole
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
        timm.create_model(name, pretrained=True)


@each
def test_features_only(name: str) -> None:
    model = few(name, features_only=True)
    strides = [2, 4, 8, 16, 32]
    base = name.rsplit("_", 1)[0]
    strides = {"resnet11_tiny": [1, 1, 2, 4]}.get(base, strides)
    strides = strides[1:] if base in TRANSFORMERS else strides
    assert model.feature_info.reduction() == strides
    size = side(name)
    x = torch.randn(1, 1 if "resnet11" in name else 3, size, size)
    for feature, width, stride in zip(
        model(x), model.feature_info.channels(), strides, strict=True
    ):
        if name.startswith("swin"):
            feature = feature.permute(0, 3, 1, 2)
        assert feature.shape == (1, width, size // stride, size // stride)
    last_two = few(name, features_only=True, out_indices=(-2, -1))
    assert last_two.feature_info.reduction() == strides[-2:]
    assert [feature.shape for feature in last_two(x)] == [f.shape for f in model(x)[-2:]]


@each
def test_feature_getter(name: str) -> None:
    """timm's newest feature extractor, on top of forward_intermediates."""
    model = few(name, features_only=True, feature_cls="getter", out_indices=(0, 2))
    size = side(name)
    features = model(torch.randn(1, 1 if "resnet11" in name else 3, size, size))
    reductions = model.feature_info.reduction()
    assert [feature.shape[-1] for feature in features] == [size // r for r in reductions]


@each
def test_intermediates(name: str) -> None:
    model = few(name).eval()
    x = image(model, name)
    last, features = model.forward_intermediates(x)
    assert len(features) == len(model.feature_info)
    torch.testing.assert_close(last, model.forward_features(x))
    (second,) = model.forward_intermediates(x, [1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(second, features[1])
    assert len(model.forward_intermediates(x, 2, intermediates_only=True)) == 2


@each
def test_head(name: str) -> None:
    model = few(name, num_classes=3).eval()
    x = image(model, name)
    assert model(x).shape == (2, 3)
    assert model.get_classifier().out_features == 3
    model.reset_classifier(5, "avg" if "pvt" in name else "max")
    assert model(x).shape == (2, 5)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    assert few(name, num_classes=0)(x).shape == (2, model.num_features)
    assert few(name, num_classes=0, global_pool="")(x).dim() == (3 if "pvt" in name else 4)


@pytest.mark.parametrize("name", [name for name in EACH if name.endswith("acmix")])
def test_initialisation_survives_loops(name: str) -> None:
    """Loops of a network's own over the modules that everyone starts anew."""
    model = few(name)
    named_apply(init_weights_vit_timm, model)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.BatchNorm2d)):
            nn.init.zeros_(module.weight)
    operators = [module for module in model.modules() if hasattr(module, "shift")]
    assert operators
    for operator in operators:
        kernels = operator.shift.weight
        assert torch.equal(kernels, shift_kernels(len(kernels), operator.kernel_conv))
        assert operator.fc_weight.any()
        assert operator.mix.alpha.item() == operator.mix.beta.item() == 0.5


@each
def test_channels_of_the_image(name: str) -> None:
    model = few(name, in_chans=4)
    assert model(image(model, name)).shape == (2, 10)


@each
def test_drop_path(name: str) -> None:
    model = few(name, drop_path_rate=0.5)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert max(rates) == pytest.approx(0.5)
    model(image(model, name)).sum().backward()


@each
@pytest.mark.slow
def test_gradient_checkpointing(name: str) -> None:
    model = few(name, drop_path_rate=0.0)
    # Running statistics would move twice in a block that is run again.
    model.eval()
    x = image(model, name)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        gradients.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    torch.testing.assert_close(*gradients)


@each
def test_channels_last(name: str) -> None:
    model = few(name).double().eval()
    x = image(model, name).double()
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected)


@each
@pytest.mark.slow
def test_bfloat16(name: str) -> None:
    model = few(name, zero_init_last=False) if "resnet" in name else few(name)
    model.eval()
    x = image(model, name)
    expected = model(x)
    actual = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert actual.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(x)
    autocast.float().sum().backward()
    bound = 3 * TOLERANCE[torch.bfloat16] * expected.abs().max()  # through some twenty layers
    for result in (actual, autocast):
        assert (result - expected).abs().max() <= bound


SHALLOW = {
    "resnet11_tiny_acmix": {},
    "san10_acmix": {"depths": (1, 1), "widths": (32, 64), "kernels": (3, 5)},
    "pvt_tiny_acmix": {"depths": (1, 1), "embed_dims": (8, 16), "img_size": 64}
    | {"heads": (1, 2), "reductions": (4, 1), "mlp_ratios": (2, 2)},
    "swin_tiny_acmix": {"depths": (2, 1), "embed_dim": 12, "num_heads": (2, 4), "img_size": 64},
}
shallow = pytest.mark.parametrize("name", SHALLOW)


@shallow
@pytest.mark.slow
def test_compile(name: str) -> None:
    model = timm.create_model(name, **SHALLOW[name]).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = image(model, name)
    torch.testing.assert_close(compiled(x), model(x))


@shallow
@pytest.mark.slow
def test_export(name: str) -> None:
    """A program of one map for maps of any size, its own and img_size among them."""
    model = timm.create_model(name, **SHALLOW[name]).eval()
    dynamic = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)
    x = torch.randn(2, channels(model), 96, 72)
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic).module()
    for shape in [(2, 96, 72), (3, 64, 64), (1, 97, 131), (4, 57, 160)]:
        x = torch.randn(shape[0], channels(model), *shape[1:])
        torch.testing.assert_close(program(x), model(x))


@shallow
@pytest.mark.slow
def test_onnx(name: str) -> None:
    """Our operators are not ONNX's: the exported graph holds none of them."""
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    model = timm.create_model(name, **SHALLOW[name]).eval()
    x = torch.randn(2, channels(model), 24, 24)
    options = {"dynamic_shapes": ({0: Dim.AUTO},), "dynamo": True, "verbose": False}
    exported = torch.onnx.export(model, (x,), **options)
    session = reference.ReferenceEvaluator(exported.model_proto)
    x = torch.randn(3, channels(model), 24, 24)
    (logits,) = session.run(None, {session.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(x))


@each
@pytest.mark.slow
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model = few(name).eval()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    again = few(name, checkpoint_path=tmp_path / "model.pth").eval()
    x = image(model, name)
    assert torch.equal(again(x), model(x))
    whole = copy.deepcopy(model)
    assert torch.equal(whole(x), model(x))


@shallow
def test_local_directory_and_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm's saved form, with the arguments that the model was made of; from a folder, and from the
    hub's cache, where a repository that was downloaded lies."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = {"num_classes": 7, "acmix_kwargs": {"mix": "convex"}, **SHALLOW[name]}
    model = timm.create_model(name, **arguments).eval()
    repository = tmp_path / "models--someone--network"
    folder = repository / "snapshots" / ("0" * 40)
    save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(folder.name)
    x = image(model, name)
    for source in (f"local-dir:{folder}", "hf-hub:someone/network"):
        again = timm.create_model(source, pretrained=True, cache_dir=tmp_path).eval()
        assert torch.equal(again(x), model(x))


WRONG = [
    ("resnet26_attn", "resnet26_conv", "layer1.0.conv2.qkv_weight"),
    ("resnet26_acmix", "pvt_tiny_acmix", "layer1.0.conv2.shift.weight"),
    ("san10_attn", "san10_pairwise", "layer0.0.sam.conv_w.0.weight"),
    ("san10_acmix", "san10_attn", "layer0.0.sam.mix.alpha"),
    ("pvt_tiny_acmix", "swin_tiny_acmix", "pos_embed1"),
    ("swin_tiny_acmix", "swin_tiny_attn", "layers.0.blocks.0.attn.fc_weight"),
    ("swin_tiny_attn", "resnet26_conv", "layers.0.blocks.0.attn.qkv.weight"),
]


@pytest.mark.parametrize(("name", "other", "key"), WRONG)
@pytest.mark.slow
def test_checkpoint_of_another_model(name: str, other: str, key: str, tmp_path: Path) -> None:
    """What does not fit is listed."""
    torch.save(few(other).state_dict(), tmp_path / "model.pth")
    with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict") as error:
        few(name, checkpoint_path=tmp_path / "model.pth")
    assert key in str(error.value)


@each
def test_wrong_images(name: str) -> None:
    model = few(name).eval()
    for x, message in [
        (torch.zeros(1, channels(model), 0, 8), "x: expected a map of 1x1 or more"),
        (torch.zeros(1, 5, 8, 8), "x: expected . channels, got 5"),
        (torch.zeros(channels(model), 8, 8), r"x: expected 4 dimensions \(B, C, H, W\), got 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(x)
        with pytest.raises(ValueError, match=message):
            model.forward_intermediates(x)


@each
def test_meta_device(name: str) -> None:
    """Shapes of a network that has no memory."""
    with torch.device("meta"):
        model = few(name)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_refuses_a_name_that_is_taken() -> None:
    def resnet50() -> nn.Module:
        raise AssertionError

    with pytest.raises(ValueError, match=r"resnet50: .*timm.models.resnet has registered it"):
        _registry.register_model(resnet50)
    assert model_entrypoint("resnet50").__module__ == "timm.models.resnet"


def test_may_be_imported_again() -> None:
    importlib.reload(acmix.models.resnet)
    assert acmix.models.list_models() == sorted(NAMES)


def test_unknown_names_suggest_near_ones() -> None:
    with pytest.raises(ValueError, match=r"such as resnet50_acmix, .*; got 'resnet50_acmxi'"):
        acmix.models.create_model("resnet50_acmxi")
    with pytest.raises(ValueError, match=r"such as .*resnet50_acmix, .*; got '\?'"):
        acmix.models.create_model("?")
    assert acmix.models.create_model("resnet11_tiny_conv").path == "conv"


@pytest.mark.slow
def test_import_leaves_timms_names_alone() -> None:
    """In a process of its own: which names were there before is known only there."""
    script = """
import timm
before = {name: timm.models.model_entrypoint(name) for name in timm.list_models()}
import acmix.models
assert all(timm.models.model_entrypoint(name) is fn for name, fn in before.items())
assert set(timm.list_models()) == set(before) | set(acmix.models.list_models())
"""
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", script], check=True)
