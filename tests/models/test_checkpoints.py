"""Released weights: golden tensors of the released code, and what does not fit."""

import math
import re
from pathlib import Path

import pytest
import timm
import torch
from helpers import set_form
from safetensors import safe_open
from torch import Tensor, nn

from acmix import ACmix2d
from acmix.models.checkpoints import Shapes, from_released, is_released, released_shapes

GOLDEN = Path(__file__).parents[1] / "golden"
OPERATORS = sorted(path.stem for path in GOLDEN.glob("resnet_module_*.safetensors"))


def read(name: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {key: value for key, value in tensors.items() if key.startswith(prefix)}
    return {key.removeprefix(prefix): value for key, value in found.items()}


def formula_weights(shapes: Shapes, phase: float) -> dict[str, Tensor]:
    """The released weights of a golden network, from their keys and shapes (golden/README.md)."""
    skipped = ("num_batches_tracked", "attn_mask", "relative_position_index")
    weights = {}
    for position, (key, shape) in enumerate(sorted(shapes.items())):
        if key.endswith(skipped):
            continue
        index = torch.arange(math.prod(shape), dtype=torch.float64)
        wave = torch.sin(0.7 * ((index * 7919) % 9973) + position + phase).view(shape)
        if key.endswith("running_var"):
            weights[key] = 1 + 0.5 * wave
        elif key.endswith("running_mean"):
            weights[key] = 0.1 * wave
        elif len(shape) >= 2:
            weights[key] = wave * math.sqrt(2 / math.prod(shape[1:]))
        elif "rate" in key:
            weights[key] = 0.5 + 0.2 * wave
        else:
            weights[key] = 1 + 0.2 * wave if key.endswith("weight") else 0.1 * wave
    return weights


def formula_image(size: int, phase: float) -> Tensor:
    index = torch.arange(3 * size * size, dtype=torch.float64)
    image = torch.sin(0.013 * index + phase) + 0.5 * torch.cos(0.00117 * index + 2 * phase)
    return image.view(1, 3, size, size)


def swin_constants(depths: tuple[int, ...] = (2, 2, 6, 2)) -> Shapes:
    """Buffers of released Swin-T: masks of shifted blocks, and indices."""
    blocks = [(stage, block) for stage, depth in enumerate(depths) for block in range(depth)]
    names = {f"layers.{s}.blocks.{b}.attn.relative_position_index": (49, 49) for s, b in blocks}
    shifted = [(s, b) for s, b in blocks if b % 2 == 1 and s < 3]
    masks = {f"layers.{s}.blocks.{b}.attn_mask": (64 // 4**s, 49, 49) for s, b in shifted}
    return {**names, **masks}


@pytest.fixture(params=["reference", "tiled", "auto", "dense"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend, and both forms of the folded convolution path."""
    set_form(monkeypatch, "dense" if request.param == "dense" else "pieces")
    return "tiled" if request.param == "dense" else request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name: str, backend: str, dtype: torch.dtype) -> None:
    metadata, golden = read(name)
    arguments = {key: int(value) for key, value in metadata.items()}
    layer = ACmix2d(**arguments, backend=backend, dtype=dtype)
    layer.load_state_dict(from_released(under("weight/", golden)))
    x = golden["x"].to(dtype, copy=True).requires_grad_()
    y = layer(x)
    y.backward(golden["grad_y"].to(dtype))
    check(y, golden["y"], dtype)
    check(x.grad, golden["grad_x"], dtype)
    # Ours are the released gradients in another order: converted as the weights are.
    gradients = from_released(under("grad/", golden))
    assert golden["grad/conv_p.bias"].abs().max() < 1e-12  # why it is left out
    for key, parameter in layer.named_parameters():
        check(parameter.grad, gradients.pop(key), dtype)
    assert not gradients


def check(actual: Tensor | None, expected: Tensor, dtype: torch.dtype) -> None:
    """1e-10 absolutely in float64, 1e-5 of the largest magnitude in float32."""
    assert actual is not None
    error = (actual.double() - expected).abs().max()
    bound = 1e-10 if dtype == torch.float64 else 1e-5 * expected.abs().max()
    assert error <= bound


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_resnet26(wrapped: bool) -> None:
    metadata, golden = read("resnet26_acmix_128")
    phase = float(metadata["phase"])
    model = timm.create_model("resnet26_acmix").double().eval()
    weights = formula_weights(released_shapes(model), phase)
    if wrapped:
        weights = {"state_dict": {f"module.{key}": value for key, value in weights.items()}}
    model.load_state_dict(from_released(weights))
    with torch.inference_mode():
        logits = model(formula_image(int(metadata["size"]), phase))
    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=scale(golden) * 1e-10)


def test_swin_tiny(form: str) -> None:
    metadata, golden = read("swin_t_acmix_224")
    phase = float(metadata["phase"])
    model = timm.create_model("swin_tiny_acmix").double().eval()
    shapes = {**released_shapes(model), **swin_constants()}
    model.load_state_dict(from_released(formula_weights(shapes, phase)))
    with torch.inference_mode():
        logits = model(formula_image(int(metadata["size"]), phase))
    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=scale(golden) * 1e-10)


def scale(golden: dict[str, Tensor]) -> float:
    return golden["logits"].abs().max().item()


# A network of each family, small, with the names the released one has.
SMALL = {
    "resnet26_acmix": {"layers": (1, 1, 2, 1), "channels": (8, 8, 16, 8), "num_classes": 5},
    "swin_tiny_acmix": {"embed_dim": 12, "depths": (2, 1), "num_heads": (2, 4), "num_classes": 5},
}
small = pytest.mark.parametrize("name", SMALL)


def released_weights(name: str) -> dict[str, Tensor]:
    """Of a small network, as the authors' code saves them."""
    return formula_weights(released_shapes(timm.create_model(name, **SMALL[name])), 0.1)


@small
def test_reads_the_sizes(name: str) -> None:
    arguments = {**SMALL[name], "in_chans": 2}
    if name.startswith("resnet"):
        arguments["acmix_kwargs"] = {"heads": 2, "kernel_conv": 5}
    else:
        arguments["window_size"] = 4
    model = timm.create_model(name, **arguments)
    converted = from_released(formula_weights(released_shapes(model), 0.1))
    assert converted.keys() == model.state_dict().keys()
    model.load_state_dict(converted)


@pytest.mark.parametrize("name", ["resnet38_acmix", "resnet50_acmix", "swin_small_acmix"])
def test_other_networks_of_the_paper(name: str) -> None:
    """Those without golden numbers: what is released fills every tensor."""
    with torch.device("meta"):
        model = timm.create_model(name)
        released = {key: torch.empty(shape) for key, shape in released_shapes(model).items()}
    model.load_state_dict(from_released(released))


@small
def test_checkpoint_path(name: str, tmp_path: Path) -> None:
    weights = released_weights(name)
    torch.save({"model": weights}, tmp_path / "released.pth")
    model = timm.create_model(name, checkpoint_path=tmp_path / "released.pth", **SMALL[name])
    expected = from_released(weights)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value.double(), expected[key].double())


def from_file(
    name: str,
    folder: Path,
    weights: dict[str, Tensor],
    overlay: dict[str, int],
    **arguments: object,
) -> nn.Module:
    """timm's way to load pretrained weights."""
    torch.save(weights, folder / "released.pth")
    return timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(folder / "released.pth"), **overlay},
        **{**SMALL[name], **arguments},
    )


@small
def test_pretrained_file(name: str, tmp_path: Path) -> None:
    """With a head of our own."""
    weights = released_weights(name)
    model = from_file(name, tmp_path, weights, {"num_classes": 5}, num_classes=3)
    expected = from_released(weights)
    head = model.get_classifier()
    assert head.out_features == 3
    for key, parameter in model.named_parameters():
        if not key.startswith(("fc.", "head.")):
            torch.testing.assert_close(parameter.double(), expected[key])


@small
def test_pretrained_file_of_a_feature_extractor(name: str, tmp_path: Path) -> None:
    """Which converts the names before it takes the network apart."""
    weights = released_weights(name)
    arguments = {"in_chans": 1, "num_classes": 10, "features_only": True}
    model = from_file(name, tmp_path, weights, {}, **arguments)
    expected = from_released(weights)
    first = "conv1.weight" if name.startswith("resnet") else "patch_embed.proj.weight"
    expected[first] = expected[first].sum(1, keepdim=True)
    for key, parameter in model.named_parameters():
        whole = key.replace("layers_", "layers.")
        torch.testing.assert_close(parameter.double(), expected[whole])


@pytest.mark.parametrize("name", [*SMALL, "operator"])
def test_lists_all_that_does_not_fit(name: str) -> None:
    if name == "operator":
        weights = under("weight/", read("resnet_module_14")[1])
        prefix = ""
    else:
        weights = released_weights(name)
        prefix = "layer2.0.conv2." if name.startswith("resnet") else "layers.1.blocks.0.attn."
    weights[f"{prefix}dep_conv.bias"] = torch.zeros(8)
    weights["extra"] = torch.zeros(1)
    del weights[f"{prefix}fc.weight"]
    weights[f"{prefix}rate1"] = torch.zeros(2)
    weights[f"{prefix}rate2"] = 0.5
    with pytest.raises(ValueError, match="expected the released keys of") as error:
        from_released(weights)
    assert "got 5 that do not fit" in str(error.value)
    for problem in [
        f"unknown: {prefix}dep_conv.bias",
        "unknown: extra",
        f"missing: {prefix}fc.weight",
        f"wrong shape: {prefix}rate1, expected (1,), got (2,)",
        f"no tensor: {prefix}rate2, float",
    ]:
        assert problem in str(error.value).replace("\n", "")


@small
@pytest.mark.slow
def test_any_missing_key_is_named(name: str) -> None:
    """Also those that the sizes of the network are read from."""
    weights = released_weights(name)
    for key in weights:
        if key.endswith((".num_batches_tracked", "relative_position_index")):
            continue
        rest = {other: value for other, value in weights.items() if other != key}
        with pytest.raises(ValueError, match=re.escape(f"missing: {key}")):
            from_released(rest)


ODD = {
    "resnet26_acmix": ("layer1.0.conv2.", ("fc.weight", "conv_p.weight", "dep_conv.weight")),
    "swin_tiny_acmix": (
        "layers.0.blocks.0.attn.",
        ("fc.weight", "relative_position_bias_table", "dep_conv.weight"),
    ),
}


@small
def test_blames_the_tensor_that_differs(name: str) -> None:
    """In the first operator, where sizes of the network could be read; the others outvote it."""
    weights = released_weights(name)
    prefix, keys = ODD[name]
    for key in keys:
        wrong = weights[prefix + key].repeat_interleave(2, 0).repeat_interleave(2, 1)
        with pytest.raises(ValueError, match="got 1 that do not fit") as error:
            from_released({**weights, prefix + key: wrong})
        assert f"wrong shape: {prefix}{key}, " in str(error.value)


def test_blames_fc_of_one_operator() -> None:
    weights = under("weight/", read("resnet_module_14")[1])
    weights["fc.weight"] = weights["fc.weight"].repeat(1, 2, 1, 1)
    with pytest.raises(ValueError, match=r"got 1 that do not fit:\n  wrong shape: fc.weight"):
        from_released(weights)


@pytest.mark.parametrize(
    "state_dict", [{}, {"fc.weight": torch.zeros(1)}, {"a": torch.zeros(1)}], ids=str
)
def test_unknown_network(state_dict: dict) -> None:
    with pytest.raises(ValueError, match="expected the keys of a released operator"):
        from_released(state_dict)


def test_other_state_dicts_are_left_alone() -> None:
    model = timm.create_model("resnet11_tiny_acmix")
    assert not is_released(model.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(timm.create_model("resnet26_acmix").state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "module._orig_mod."])
def test_prefixes_of_wrapping_modules(prefix: str) -> None:
    golden = read("resnet_module_k3_1head")[1]
    weights = {k[7:]: v for k, v in golden.items() if k.startswith("weight/")}
    expected = from_released(weights)
    actual = from_released({prefix + key: value for key, value in weights.items()})
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    with pytest.raises(ValueError, match="expected 'rate1' once, got it with a prefix as well"):
        from_released({**weights, prefix + "rate1": weights["rate1"]})


@pytest.mark.parametrize(
    "wrong", ["weights.pth", nn.Linear(1, 1), {0: torch.ones(1)}, None], ids=str
)
def test_what_is_no_state_dict(wrong: object) -> None:
    with pytest.raises(TypeError, match="state_dict: expected a dict from names to tensors"):
        from_released(wrong)
