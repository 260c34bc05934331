"""Parameters of the published networks, to the digits of the project's specification."""

import pytest
import timm
import torch

import acmix.models  # noqa: F401, registers the models
from acmix import ACmix2d

# Millions of parameters by the specification, and as published where they are.
COUNTS = {
    "resnet26_acmix": (10.488, 10.6),
    "resnet38_acmix": (14.411, 14.6),
    "resnet50_acmix": (18.334, 18.6),
    "resnet26_conv": (13.697, None),
    "resnet38_conv": (19.627, None),
    "resnet50_conv": (25.557, None),
    "resnet26_attn": (10.337, None),
    "resnet38_attn": (14.181, None),
    "resnet50_attn": (18.026, None),
    "pvt_tiny_acmix": (13.396, 13),
    "pvt_small_acmix": (24.825, 25),
    "pvt_tiny_attn": (13.229, None),
    "pvt_small_attn": (24.486, None),
    "swin_tiny_acmix": (28.650, 30),
    "swin_small_acmix": (50.345, 51),
    "swin_tiny_attn": (28.288, None),
    "swin_small_attn": (49.606, None),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    # The released operator has the bias b_p of the position term, head_dim numbers, which cancels
    # in the softmax: ours has no such parameter, the specification counts it.
    operators = [m for m in model.modules() if isinstance(m, ACmix2d)]
    released = count + sum(m.head_dim for m in operators if m.position_weight is not None)
    expected, published = COUNTS[name]
    beside = "" if published is None else f", published {published} M"
    print(f"{name}: {count:,}, with b_p {released / 1e6:.3f} M{beside}")
    assert round(released / 1e6, 3) == expected
