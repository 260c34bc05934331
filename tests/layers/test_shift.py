"""What the layers share of the second ablation."""

from collections.abc import Callable

import pytest
from torch import nn

from acmix.layers import ACmix2d, PatchwiseACmix, ReducedACmix, WindowACmix

LAYERS = {
    "ACmix2d": lambda **arguments: ACmix2d(8, 8, **arguments),
    "PatchwiseACmix": lambda **arguments: PatchwiseACmix(8, 8, **arguments),
    "ReducedACmix": lambda **arguments: ReducedACmix(8, heads=2, **arguments),
    "WindowACmix": lambda **arguments: WindowACmix(8, heads=2, **arguments),
}


@pytest.mark.parametrize("shift", ["tensor", "fixed"])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_start_of_kernels_that_are_not_learned_is_refused(
    make: Callable[..., nn.Module], shift: str
) -> None:
    make(shift=shift)
    with pytest.raises(ValueError, match=f"shift_init: expected 'shift' with shift='{shift}'"):
        make(shift=shift, shift_init="kaiming")
