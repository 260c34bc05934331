"""Which memory format suits a network."""

from torch import nn


def is_convolutional(net: nn.Module) -> bool:
    """Whether less than half of the weights, the head aside, are those of linear layers."""
    linear = sum(
        layer.weight.numel()
        for layer in net.modules()
        if isinstance(layer, nn.Linear) and layer.out_features != getattr(net, "num_classes", 0)
    )
    return 2 * linear < sum(weight.numel() for weight in net.parameters())
