"""PVT: names of its release, sizes, and what replaces its attention."""

import pytest
import timm
import torch
from torch import nn

from acmix.layers.reduced import ReducedACmix
from acmix.models.pvt import ACmixPVT, checkpoint_filter_fn, resize_position
from acmix.ops import shift_kernels


def make(path: str = "acmix", **arguments: object) -> ACmixPVT:
    defaults = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 40, 32), "num_classes": 4}
    defaults.update(img_size=64, drop_path_rate=0.0)
    return ACmixPVT(**{**defaults, "path": path, **arguments})


def operators(model: nn.Module) -> list[ReducedACmix]:
    return [module for module in model.modules() if isinstance(module, ReducedACmix)]


def test_names_and_shapes_of_the_release() -> None:
    """Those of whai362/PVT, classification/pvt.py, for PVT-Tiny."""
    with torch.device("meta"):
        state = timm.create_model("pvt_tiny_attn").state_dict()
    expected = {"cls_token": (1, 1, 512), "norm.weight": (512,), "norm.bias": (512,)}
    expected.update({"head.weight": (1000, 512), "head.bias": (1000,)})
    before = 3
    stages = zip((64, 128, 320, 512), (4, 2, 2, 2), (8, 4, 2, 1), (8, 8, 4, 4), strict=True)
    for stage, (dim, patch, reduction, ratio) in enumerate(stages, 1):
        tokens = (56 // 2 ** (stage - 1)) ** 2 + (stage == 4)
        linear = {"attn.q": dim, "attn.kv": 2 * dim, "attn.proj": dim}
        shapes = {f"{name}.weight": (out, dim) for name, out in linear.items()}
        shapes.update({"mlp.fc1.weight": (ratio * dim, dim), "mlp.fc2.weight": (dim, ratio * dim)})
        if reduction > 1:
            shapes["attn.sr.weight"] = (dim, dim, reduction, reduction)
            shapes["attn.norm.weight"] = (dim,)
        shapes.update({"norm1.weight": (dim,), "norm2.weight": (dim,)})
        shapes.update({k.replace("weight", "bias"): v[:1] for k, v in shapes.items()})
        for block in range(2):
            expected.update({f"block{stage}.{block}.{k}": v for k, v in shapes.items()})
        expected[f"pos_embed{stage}"] = (1, tokens, dim)
        expected[f"patch_embed{stage}.proj.weight"] = (dim, before, patch, patch)
        for key in ("proj.bias", "norm.weight", "norm.bias"):
            expected[f"patch_embed{stage}.{key}"] = (dim,)
        before = dim
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


def test_reductions_and_heads() -> None:
    found = [(o.heads, o.reduction) for o in operators(make())]
    assert found == [(1, 8), (2, 4), (5, 2), (8, 1)]


def test_pooling() -> None:
    model = make(num_classes=0, global_pool="").eval()
    x = torch.randn(2, 3, 64, 64)
    tokens = model(x)
    assert tokens.shape == (2, 5, 32)
    model.reset_classifier(0, "token")
    torch.testing.assert_close(model(x), tokens[:, 0])
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(x), tokens[:, 1:].mean(1))


def test_final_norm_of_intermediates() -> None:
    model = make().eval()
    x = torch.randn(1, 3, 64, 64)
    raw = model.forward_intermediates(x, [3], intermediates_only=True)[0]
    last, (normed,) = model.forward_intermediates(x, [3], norm=True)
    torch.testing.assert_close(model.norm(raw.movedim(1, -1)).movedim(-1, 1), normed)
    torch.testing.assert_close(normed.flatten(2).transpose(1, 2), last[:, 1:])


def test_position_embeddings_are_resized() -> None:
    position = torch.randn(1, 1 + 4 * 4, 6)
    assert resize_position(position, (4, 4), (4, 4)) is position
    resized = resize_position(position, (4, 4), (3, 8))
    assert resized.shape == (1, 25, 6)
    assert torch.equal(resized[:, 0], position[:, 0])
    source, model = make(), make(img_size=96)
    model.load_state_dict(checkpoint_filter_fn({"model": source.state_dict()}, model))
    assert model.pos_embed4.shape == (1, 10, 32)


def test_initialisation() -> None:
    model = make()
    for again in (False, True):
        if again:
            model.init_weights()
        for operator in operators(model):
            assert torch.equal(operator.shift.weight, shift_kernels(operator.dim, 3))
            assert operator.mix.alpha.item() == operator.mix.beta.item() == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "conv"}, "path: expected one of"),
        ({"depths": (1, 1)}, "expected one number a stage"),
        ({"reductions": (8, 4, 2, 2)}, "reductions: expected 1 in the last stage"),
        ({"global_pool": "max"}, "global_pool: expected one of"),
        ({"acmix_kwargs": {"heads": 2}}, "acmix_kwargs: expected some of kernel_conv.*got heads"),
        ({"path": "attn", "acmix_kwargs": {"mix": "sum"}}, "expected none for this path, got mix"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)
