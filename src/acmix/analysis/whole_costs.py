"""Parameters and multiply-adds of a whole detector or segmenter, by its parts.

What stands on the network is counted by PyTorch's counter, and so is a network without operators of
ours. A detector of two stages has 1,000 proposals, and masks of 100 of them, as is the custom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from acmix.analysis import costs
from acmix.detection import Detector, create_detector
from acmix.detection.cascade import CascadeHeads
from acmix.segmentation import create_segmenter

PROPOSALS, MASKED = 1000, 100
DIVISIBLE = 32  # sides of the batch that a detector makes of images
CLASSES = {"detection": 80, "segmentation": 150}
SIZES = {"detection": (800, 1333), "segmentation": (512, 512)}
DEFAULTS = {
    "detection": ("pvt_tiny_attn", "pvt_tiny_acmix"),
    "segmentation": ("pvt_tiny_attn", "pvt_tiny_acmix"),
}


class WholeCosts(NamedTuple):
    """Numbers of parameters and multiply-adds of the network and of what stands on it."""

    name: str
    head: str
    size: tuple[int, int]
    parameters: tuple[int, int]
    macs: tuple[int, int]


def detector_costs(
    name: str, detector: str, size: tuple[int, int] = SIZES["detection"], **options: Any
) -> WholeCosts:
    """Of a detector of 80 classes for one image of this size; options: of `create_detector`.

    Raises:
        ValueError: for a network that is not there or has no maps for a detector.
    """
    costs.check_name(name)
    with torch.device("meta"):
        kwargs: dict[str, Any] = {"num_classes": CLASSES["detection"], **options}
        model = create_detector(name, detector, **kwargs).eval()  # type: ignore[arg-type]
    height, width = (-(-side // DIVISIBLE) * DIVISIBLE for side in size)
    image = torch.empty(1, 3, height, width, device="meta")
    body = body_macs(model.features.body, image)
    with torch.no_grad():
        maps = model.features(image)
        return whole(name, detector, size, model, body, lambda: _run_heads(model, maps))


def segmenter_costs(name: str, decoder: str, size: tuple[int, int], **options: Any) -> WholeCosts:
    """Of a segmenter of 150 classes, without an auxiliary head, for one image of this size.

    Raises:
        ValueError: for a network that is not there or has no maps for a decoder.
    """
    costs.check_name(name)
    with torch.device("meta"):
        kwargs: dict[str, Any] = {"num_classes": CLASSES["segmentation"], "auxiliary": False}
        model = create_segmenter(name, decoder, **kwargs, **options).eval()  # type: ignore[arg-type]
    image = torch.empty(1, 3, *size, device="meta")
    body = body_macs(model.features.body, image)
    with torch.no_grad():
        maps = model.features(image)
        return whole(name, decoder, size, model, body, lambda: model.decoder(maps))


COSTS: dict[str, Callable[..., WholeCosts]] = {
    "detection": detector_costs,
    "segmentation": segmenter_costs,
}


def whole(
    name: str,
    head: str,
    size: tuple[int, int],
    model: Any,
    body: int,
    run_head: Callable[[], Any],
) -> WholeCosts:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        run_head()
    of_body = parameters(model.features.body)
    return WholeCosts(
        name,
        head,
        size,
        (of_body, parameters(model) - of_body),
        (body, counter.get_total_flops() // 2),
    )


def body_macs(body: nn.Module, image: Tensor) -> int:
    """Multiply-adds of the network up to the last map: of convolutions, linear layers, attention.

    Operators, and timm's windows, are counted by the paper's formulas, whatever computes them.
    """
    with torch.device("meta"), torch.no_grad():
        if any(isinstance(of, tuple(costs.OPERATORS)) for of in body.modules()):
            numbers = costs.count(body, image)
            return sum(numbers[key] for key in (costs.STAGE_1, costs.STAGE_2, costs.REST))
        with FlopCounterMode(display=False) as counter:
            body(image)
    return counter.get_total_flops() // 2


def _run_heads(detector: Detector, maps: Sequence[Tensor]) -> None:
    model: Any = detector.model
    pyramid = model.backbone.fpn({str(number): of for number, of in enumerate(maps)})
    levels = list(pyramid.values())
    if hasattr(model, "head"):
        model.head(levels)
        return
    model.rpn.head(levels)
    heads = model.roi_heads
    stages: Any = heads.stages if isinstance(heads, CascadeHeads) else [heads]
    for stage in stages:
        width = model.backbone.out_channels
        stage.box_predictor(stage.box_head(torch.empty(PROPOSALS, width, 7, 7)))
        if stage.mask_head is not None:
            stage.mask_predictor(stage.mask_head(torch.empty(MASKED, width, 14, 14)))


def parameters(module: nn.Module) -> int:
    return sum(of.numel() for of in module.parameters())


def report(found: Sequence[WholeCosts], output_format: str = "table") -> str:
    """A row a network as text, to print, in one of the formats of `costs`."""
    header = ["model", "with", "size"]
    header += [f"M params{part}" for part in (", network", ", rest", "")]
    header += [f"GMACs{part}" for part in (", network", ", rest", "")]
    rows = [header]
    for one in found:
        numbers = [f"{of / 1e6:.2f}" for of in (*one.parameters, sum(one.parameters))]
        numbers += [f"{of / 1e9:.1f}" for of in (*one.macs, sum(one.macs))]
        rows.append([one.name, one.head, "x".join(map(str, one.size)), *numbers])
    if output_format == "csv":
        return costs.as_csv(rows, [notes([one]) for one in found])
    return costs.as_text(rows, notes(found), output_format)


def notes(found: Sequence[WholeCosts]) -> list[str]:
    said = ["GMACs: multiply-adds of convolutions, linear layers and attention, for one image"]
    if any("rcnn" in one.head for one in found):
        said.append(f"R-CNN: {PROPOSALS:,} proposals, and masks of {MASKED}")
    return said
