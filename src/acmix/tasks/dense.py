"""What detection and segmentation share: a network whose maps a head of another kind works on."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from acmix.errors import few
from acmix.models.features import Features
from acmix.surgery.warm_start import extractor_name, warm_start
from acmix.tasks.base import Task


class DenseTask(Task):
    """A task whose `net` has `features`, the network and its maps."""

    @property
    def backbone(self) -> nn.Module:
        return network_of(features_of(self.net))

    def configure_model(self) -> None:
        # The rest depends on what is found, and would be compiled again and again.
        if self.hparams["compile"]:
            features_of(self.net).compile()

    def start_from(self, weights: dict[str, Any]) -> None:
        """Take the weights of a classifier, or all that fit of another network of this task."""
        if any(key in weights for key in self.net.state_dict()):
            say(f"all of the checkpoint but {few(load_fitting(self.net, weights)) or 'nothing'}")
        else:
            same = load_same(self.backbone, weights)
            count = same or len(warm_start(features_of(self.net).body, weights).copied)
            say(f"{count} tensors of a classifier for the {self.hparams['name']}")


def network_of(features: Features) -> nn.Module:
    """The network itself, whose modules have the names that it gave them."""
    body = features.body
    return body.model if isinstance(body, FeatureGetterNet) else body


def features_of(net: nn.Module) -> Features:
    return net.features  # type: ignore[return-value]


@rank_zero_only
def say(what: str) -> None:
    print(f"model.warm_start: took {what}", file=sys.stderr)


def load_same(backbone: nn.Module, weights: dict[str, Any]) -> int:
    """Load the weights of a classifier with this very network; how many, or 0 for another one."""
    named = {extractor_name(key, backbone): value for key, value in weights.items()}
    own = backbone.state_dict()
    if not all(key in named and fits(value, named[key]) for key, value in own.items()):
        return 0
    backbone.load_state_dict({key: named[key] for key in own})
    return len(own)


def load_fitting(net: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Load the weights into the network but those of layers with another number of outputs.

    Returns:
        Names of the layers that stay as they are.

    Raises:
        ValueError: If a weight differs in another way: it is of another network.
    """
    own = net.state_dict()
    other = [key for key, value in own.items() if key in weights and not fits(value, weights[key])]
    for key in other:
        if own[key].shape[1:] != weights[key].shape[1:]:
            raise ValueError(
                f"expected a checkpoint of this network, got one of another: {key} is "
                f"{tuple(weights[key].shape)}, not {tuple(own[key].shape)}"
            )
    taken = {key: value for key, value in weights.items() if key in own and key not in other}
    net.load_state_dict(taken, strict=False)
    left = [key for key in own if key not in taken]
    return list(dict.fromkeys(key.rpartition(".")[0] for key in left))


def fits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape
