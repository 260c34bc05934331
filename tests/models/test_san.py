"""SAN: names of its release, sizes, and what replaces its attention."""

import pytest
import timm
import torch
from torch import nn

from acmix.layers import PairwiseAttention, PatchwiseACmix
from acmix.models.san import ACmixSAN, checkpoint_filter_fn
from acmix.ops import shift_kernels


def make(path: str = "acmix", **arguments: object) -> ACmixSAN:
    defaults = {"depths": (2, 1), "widths": (32, 64), "kernels": (3, 5), "num_classes": 4}
    return ACmixSAN(**{**defaults, "path": path, **arguments})


def operators(model: nn.Module) -> list[PatchwiseACmix | PairwiseAttention]:
    kinds = (PatchwiseACmix, PairwiseAttention)
    return [module for module in model.modules() if isinstance(module, kinds)]


def norm(width: int) -> dict[str, tuple[int, ...]]:
    numbers = ("weight", "bias", "running_mean", "running_var")
    return {**dict.fromkeys(numbers, (width,)), "num_batches_tracked": ()}


def conv(before: int, after: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    weight = {"weight": (after, before, 1, 1)}
    return {**weight, "bias": (after,)} if bias else weight


def released_block(width: int, kernel: int, path: str) -> dict[str, tuple[int, ...]]:
    related, inner, weights, taps = width // 16, width // 4, width // 32, kernel * kernel
    parts = {
        "bn1": norm(width),
        "sam.conv1": conv(width, related),
        "sam.conv2": conv(width, related),
        "sam.conv3": conv(width, inner),
        "bn2": norm(inner),
        "conv": conv(inner, width),
    }
    if path == "pairwise":
        sizes = (related + 2, related, weights)
        parts["sam.conv_p"] = conv(2, 2)
    else:
        sizes = (related * (taps + 1), weights, taps * weights)
    parts["sam.conv_w.0"], parts["sam.conv_w.2"] = norm(sizes[0]), conv(*sizes[:2], bias=False)
    parts["sam.conv_w.3"], parts["sam.conv_w.5"] = norm(sizes[1]), conv(*sizes[1:])
    return {f"{part}.{name}": shape for part, own in parts.items() for name, shape in own.items()}


def released(path: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of hszhao/SAN, model/san.py, for SAN-10."""
    parts = {"conv_in": conv(3, 64, bias=False), "bn_in": norm(64)}
    before = 64
    stages = zip((2, 1, 2, 4, 1), (64, 256, 512, 1024, 2048), (3, 7, 7, 7, 7), strict=True)
    for stage, (depth, width, kernel) in enumerate(stages):
        parts[f"conv{stage}"], parts[f"bn{stage}"] = conv(before, width, bias=False), norm(width)
        for block in range(depth):
            parts[f"layer{stage}.{block}"] = released_block(width, kernel, path)
        before = width
    parts["fc"] = {"weight": (1000, 2048), "bias": (1000,)}
    return {f"{part}.{name}": shape for part, own in parts.items() for name, shape in own.items()}


@pytest.mark.parametrize("path", ["attn", "pairwise"])
def test_names_and_shapes_of_the_release(path: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(f"san10_{path}").state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == released(path)


def test_loads_a_released_checkpoint(tmp_path) -> None:
    """Saved with the epoch and the optimiser, from a model in DataParallel."""
    numbers = {
        key: torch.zeros((), dtype=torch.int64) if shape == () else torch.rand(shape)
        for key, shape in released("attn").items()
    }
    wrapped = {f"module.{key}": value for key, value in numbers.items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, tmp_path / "san.pth")
    model = timm.create_model("san10_attn", checkpoint_path=tmp_path / "san.pth")
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in numbers.items())
    direct = checkpoint_filter_fn({"state_dict": wrapped}, model)
    assert direct.keys() == numbers.keys()


def test_by_hand() -> None:
    """The network of one block, step by step as the paper's table has it."""
    model = make("attn", depths=(1,), widths=(32,), kernels=(3,)).eval()
    x = torch.randn(2, 3, 8, 6)
    block = model.layer0[0]
    out = model.bn_in(model.conv_in(x)).relu()
    out = model.conv0(nn.functional.max_pool2d(out, 2))
    inside = block.sam(block.bn1(out).relu())
    out = model.bn0(out + block.conv(block.bn2(inside).relu())).relu()
    torch.testing.assert_close(model.forward_features(x), out)
    torch.testing.assert_close(model(x), model.fc(out.mean((2, 3))))


def test_windows_and_widths() -> None:
    found = [(o.in_channels, o.out_channels, o.kernel_att) for o in operators(make())]
    assert found == [(32, 8, 3), (32, 8, 3), (64, 16, 5)]
    assert [info["reduction"] for info in make().feature_info] == [2, 4]


def test_an_odd_side_keeps_its_last_row() -> None:
    model = make().eval()
    x = torch.randn(1, 3, 9, 5)
    changed = x.clone()
    changed[..., -1, :] += 1
    assert model.forward_features(x).shape == (1, 64, 3, 2)
    assert not torch.equal(model(x), model(changed))


def test_pruning() -> None:
    model = make().eval()
    x = torch.randn(1, 3, 16, 16)
    (expected,) = model.forward_intermediates(x, [0], intermediates_only=True)
    assert model.prune_intermediate_layers([0]) == [0]
    assert not hasattr(model, "layer1")
    torch.testing.assert_close(model.forward_features(x), expected)


def test_initialisation() -> None:
    for operator in operators(make()):
        assert torch.equal(operator.shift.weight, shift_kernels(operator.out_channels, 3))
        assert operator.mix.alpha.item() == operator.mix.beta.item() == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "conv"}, "path: expected one of"),
        ({"depths": (1, 1, 1)}, "expected one number a stage"),
        ({"widths": (32, 62)}, "widths: expected multiples of 4"),
        ({"widths": (32, 48)}, "out_channels: expected a multiple of share_planes"),
        ({"acmix_kwargs": {"heads": 2}}, "acmix_kwargs: expected some of .*got heads"),
        ({"path": "attn", "acmix_kwargs": {"mix": "sum"}}, "share_planes, backend, got mix"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)
