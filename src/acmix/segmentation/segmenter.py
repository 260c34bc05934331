"""Segmenters by name: a decoder on the maps of any network."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor, nn

from acmix.models.features import Features, create_features
from acmix.segmentation import semantic_fpn, upernet
from acmix.segmentation.blocks import Norm, resize, size_of

DecoderName = Literal["semantic_fpn", "upernet"]
DECODERS: tuple[str, ...] = get_args(DecoderName)
AUXILIARY_STRIDE = 16


class Segmenter(nn.Module):
    """A class for each pixel of images of any size.

    In eval mode `forward` returns logits (B, num_classes, H, W) of the size of the images; in
    training the pair of these and of the auxiliary head's, of the same size, or None without one.

    Attributes:
        features: The network, and its maps.
        decoder: Maps -> logits.
        auxiliary: Of training alone, or None.
    """

    def __init__(
        self,
        features: Features,
        decoder: nn.Module,
        num_classes: int,
        auxiliary: nn.Module | None = None,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.features, self.decoder, self.auxiliary = features, decoder, auxiliary
        self.num_classes, self.align_corners = num_classes, align_corners
        self._auxiliary_map = (
            features.strides.index(AUXILIARY_STRIDE) if auxiliary is not None else None
        )

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that go without weight decay, as `timm.optim` asks."""
        return {f"features.{key}" for key in self.features.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Any:
        """The layer of a parameter, for layer-wise learning rates; decoders are the last."""
        return lambda key: self.features.layer_of(key.removeprefix("features."))

    def forward(self, images: Tensor) -> Any:
        """images: (B, in_chans, H, W), of any size."""
        maps = self.features(images)
        size = size_of(images)
        logits = resize(self.decoder(maps), size, self.align_corners)
        if not self.training:
            return logits
        if self.auxiliary is None:
            return logits, None
        of_map = self.auxiliary(maps[self._auxiliary_map])
        return logits, resize(of_map, size, self.align_corners)


def create_segmenter(
    name: str,
    decoder: DecoderName = "semantic_fpn",
    num_classes: int = 150,
    in_chans: int = 3,
    model_kwargs: dict[str, Any] | None = None,
    width: int | None = None,
    head_width: int | None = None,
    norm: Norm | None = None,
    dropout: float = 0.0,
    align_corners: bool = False,
    auxiliary: bool = True,
) -> Segmenter:
    """A segmenter on a network with maps of strides 4, 8, 16 and 32.

    Args:
        name: Network, as `timm.create_model` knows it.
        decoder: One of `DECODERS`.
        num_classes: Classes.
        in_chans: Channels of the images.
        model_kwargs: Further arguments of the network's constructor.
        width: Channels of the pyramid; by default 256 of Semantic FPN, 512 of UPerNet.
        head_width: Of Semantic FPN's branches, by default 128; of UPerNet's auxiliary head, 256.
        norm: In the decoder; by default group of Semantic FPN, batch of UPerNet. A batch norm over
            one value a channel, as pyramid pooling has with one image, takes its running
            statistics.
        dropout: Of channels before the last layer of each head.
        align_corners: Whether the corners of maps coincide when they are resized.
        auxiliary: Whether UPerNet has its auxiliary head; Semantic FPN has none.

    Raises:
        ValueError: For an unknown decoder or norm, or a network without such maps.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder: expected one of {', '.join(DECODERS)}, got {decoder!r}")
    features = create_features(name, in_chans, model_kwargs=model_kwargs)
    channels, second = features.channels, None
    kwargs: dict[str, Any] = {"dropout": dropout, "align_corners": align_corners}
    first: nn.Module
    if decoder == "semantic_fpn":
        widths = (width or semantic_fpn.WIDTH, head_width or semantic_fpn.BRANCH_WIDTH)
        first = semantic_fpn.SemanticFPN(
            channels, num_classes, *widths, norm=norm or "group", **kwargs
        )
    else:
        norm = norm or "batch"
        first = upernet.UPerNet(channels, num_classes, width or upernet.WIDTH, norm=norm, **kwargs)
        if auxiliary:
            below = channels[features.strides.index(AUXILIARY_STRIDE)]
            second = upernet.AuxiliaryHead(
                below, num_classes, head_width or upernet.AUXILIARY_WIDTH, norm, dropout
            )
    return Segmenter(features, first, num_classes, second, align_corners)
