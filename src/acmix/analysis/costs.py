"""Parameters and multiply-adds of a network by stage, beside the figures of the paper.

Pan et al., "On the Integration of Self-Attention and Convolution", CVPR 2022, arXiv 2111.14556:
FLOPs (multiply-adds) of the networks, main Table 1 and supplementary Table 1. Each family was
counted by a convention of its own (`CONVENTIONS`), of which those of Swin and SAN are their
authors' counters. The network runs once on the meta device, where a forward pass has shapes and
no numbers, and hooks count: an operator by the paper's formulas, whatever code computes it.
"""

from __future__ import annotations

import csv
import difflib
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from timm.layers import SelectAdaptivePool2d
from timm.models.resnet import Bottleneck, ResNet
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import acmix.models  # noqa: F401, registers the models
from acmix.layers import ACmix2d, PairwiseAttention, PatchwiseACmix, ReducedACmix, WindowACmix
from acmix.layers.shift import TensorShift
from acmix.models.pvt import ACmixPVT
from acmix.models.san import ACmixSAN
from acmix.ops._checks import check_choice

FORMATS = ("table", "csv", "markdown")
# Where a multiply-add belongs. ADDS are those of a convolution's shifts and sums: they are part of
# its multiply-adds already, and the paper lists them once more as its Stage II.
STAGE_1, STAGE_2, REST, ADDS = "stage 1", "stage 2", "rest", "adds"
PRODUCTS = "products"  # of a layer that does not know its stage


@dataclass(frozen=True)
class Convention:
    """What counts beside the products of convolutions, linear layers and operators: operations
    for each bias added and each element that a norm, activation, pool or difference takes."""

    text: str
    bias: int = 0
    batch_norm: int = 0
    layer_norm: int = 0
    activation: int = 0
    pool: int = 0
    difference: int = 0


CONVENTIONS = {
    "resnet": Convention(
        "ResNet: multiply-adds of convolutions, linear layers and operators; attention at the "
        "resolution of the input, position term not counted"
    ),
    "san": Convention(
        "SAN: its authors' counter, with biases, ReLU, pools, and 2 operations an element for "
        "batch norms",
        bias=1,
        batch_norm=2,
        activation=1,
        pool=1,
        difference=1,
    ),
    "san_acmix": Convention(
        "SAN-ACmix: its authors' counter without batch norms, which meets all three published "
        "figures; the publications do not say which was used",
        bias=1,
        activation=1,
        pool=1,
    ),
    "pvt": Convention(
        "PVT: multiply-adds of convolutions, linear layers and operators; fc of k and v at the "
        "reduced resolution"
    ),
    "swin": Convention("Swin: its authors' counter, with layer norms", layer_norm=1),
    "mixed": Convention(
        "other networks with operators of ours: multiply-adds of convolutions, linear layers and "
        "operators, without attention of other kinds"
    ),
    "other": Convention("other networks: matrix products and convolutions, by PyTorch's counter"),
}


@dataclass(frozen=True)
class Costs:
    """Of one network for one image: numbers of parameters and multiply-adds.

    `parameters` includes `cancelled`, those of the position bias b_p of ACmix on ResNet, which
    cancels in the softmax and which our modules leave out. `adds` are not part of the sum.
    """

    name: str
    size: tuple[int, int]
    parameters: int
    cancelled: int
    stage_1: int
    stage_2: int
    rest: int
    adds: int
    family: str

    @property
    def macs(self) -> int:
        return self.stage_1 + self.stage_2 + self.rest


@dataclass(frozen=True)
class Published:
    """Millions of parameters and GMACs from the paper's tables; GMACs as read off its plot."""

    parameters: float
    macs: float
    plot: float


PUBLISHED = {
    "resnet26_acmix": Published(10.6, 2.3, 2.262),
    "resnet38_acmix": Published(14.6, 2.9, 2.909),
    "resnet50_acmix": Published(18.6, 3.6, 3.565),
    "san10_acmix": Published(12.1, 1.9, 1.921),
    "san15_acmix": Published(16.6, 2.7, 2.678),
    "san19_acmix": Published(21.2, 3.4, 3.379),
    "pvt_tiny_acmix": Published(13, 2.0, 2.006),
    "pvt_small_acmix": Published(25, 3.9, 3.954),
    "swin_tiny_acmix": Published(30, 4.6, 4.67),
    "swin_small_acmix": Published(51, 9.0, 9.00),
}
# Supplementary Table 1: GMACs of all such modules of one network, Stage I and Stage II.
PUBLISHED_STAGES = {
    "resnet50_conv": (1.85, 0.01),
    "resnet50_attn": (0.96, 0.19),
    "resnet50_acmix": (0.96, 0.35),
    "san19_attn": (1.29, 0.72),
    "san19_acmix": (1.29, 0.89),
    "swin_tiny_attn": (1.04, 0.49),
    "swin_tiny_acmix": (1.04, 0.64),
}
PUBLISHED_SIZE = (224, 224)


# Counting -----------------------------------------------------------------------------------------

Counts = Mapping[str, int]


def count_acmix(layer: ACmix2d, x: Tensor, out: Tensor) -> Counts:
    pixels, channels = positions(x), layer.out_channels
    attention = 0
    if layer.mix.weights()[0] is not None:
        attention = 2 * layer.kernel_att**2 * channels * pixels
    convolution = count_convolution(layer, 3 * channels * pixels, channels * positions(out))
    return {STAGE_1: 3 * channels * layer.in_channels * pixels, STAGE_2: attention + convolution}


def count_window(layer: WindowACmix, x: Tensor, out: Tensor) -> Counts:
    sides = zip(x.shape[1:3], layer.window_size, strict=True)
    down, across = (-(-side // window) for side, window in sides)
    tokens = layer.window_size[0] * layer.window_size[1]
    covered = down * across * tokens  # the padding at the end with them
    attention = 0 if layer.proj is None else 2 * tokens * layer.dim * covered
    return {STAGE_2: attention + count_convolution(layer, 3 * x.numel(), x.numel())}


def count_timm_window(layer: WindowAttention, x: Tensor, out: Tensor) -> Counts:
    windows, tokens, _ = x.shape
    return {STAGE_2: 2 * tokens * tokens * layer.proj.in_features * windows}


def count_reduced(layer: ReducedACmix, x: Tensor, size: tuple[int, int], out: Tensor) -> Counts:
    tokens, pixels = x.shape[1], size[0] * size[1]
    reduced = -(-size[0] // layer.reduction) * -(-size[1] // layer.reduction)
    keys = tokens if layer.sr is None else reduced
    attention = 0 if layer.proj is None else 2 * tokens * keys * layer.dim
    # fc of the heads of q at every pixel, of those of k and v at the reduced resolution.
    values = layer.dim * (pixels + 2 * reduced)
    return {STAGE_2: attention + count_convolution(layer, values, layer.dim * pixels)}


def count_patchwise(layer: PatchwiseACmix, x: Tensor, out: Tensor) -> Counts:
    pixels, channels = positions(x), layer.out_channels
    aggregation = 0 if layer.conv_w is None else layer.kernel_att**2 * channels * pixels
    values = (2 * layer.conv1.out_channels + channels) * pixels
    return {STAGE_2: aggregation + count_convolution(layer, values, channels * pixels)}


def count_pairwise(layer: PairwiseAttention, x: Tensor, out: Tensor) -> Counts:
    pairs = layer.kernel_att**2 * positions(x)
    differences = (layer.conv1.out_channels + layer.conv_p.out_channels) * pairs
    return {STAGE_2: layer.out_channels * pairs, "difference": differences}


def count_convolution(layer: Any, values: int, outputs: int) -> int:
    """The convolution path: fc takes each of `values` to k_c^2, the group convolution sums k_c^4
    for each of `outputs`, tensor shifts k_c^2."""
    if layer.mix.weights()[1] is None:
        return 0
    taps = layer.kernel_conv**2
    shifts = taps if isinstance(layer.shift, TensorShift) else taps * taps
    return taps * values + shifts * outputs


def count_conv(layer: nn.Conv2d, x: Tensor, out: Tensor) -> Counts:
    biases = 0 if layer.bias is None else out.numel()
    return {PRODUCTS: out.numel() * layer.weight[0].numel(), "bias": biases}


def count_linear(layer: nn.Linear, x: Tensor, out: Tensor) -> Counts:
    return {PRODUCTS: out.numel() * layer.in_features}


OPERATORS: dict[type[nn.Module], Callable[..., Counts]] = {
    ACmix2d: count_acmix,
    WindowACmix: count_window,
    WindowAttention: count_timm_window,
    ReducedACmix: count_reduced,
    PatchwiseACmix: count_patchwise,
    PairwiseAttention: count_pairwise,
}
RULES: dict[type[nn.Module], Callable[..., Counts]] = {
    **OPERATORS,
    nn.Conv2d: count_conv,
    nn.Linear: count_linear,
    nn.BatchNorm2d: lambda layer, x, out: {"batch_norm": x.numel()},
    nn.LayerNorm: lambda layer, x, out: {"layer_norm": x.numel()},
    nn.ReLU: lambda layer, x, out: {"activation": x.numel()},
    nn.MaxPool2d: lambda layer, x, out: {"pool": x.numel()},
    SelectAdaptivePool2d: lambda layer, x, out: {"pool": x.numel()},
}
# Which layers inside an operator are Stage I; its others are Stage II.
PROJECTIONS = ("qkv", "q", "kv", "sr", "conv1", "conv2", "conv3")


def positions(x: Tensor) -> int:
    return x.shape[-2] * x.shape[-1]


def stages_of(model: nn.Module) -> dict[nn.Module, str]:
    """The stage of each layer inside an operator."""
    return {
        layer: STAGE_1 if name in PROJECTIONS else STAGE_2
        for module in model.modules()
        if isinstance(module, tuple(OPERATORS))
        for name, child in module.named_children()
        for layer in child.modules()
    }


def replaced_convolutions(model: nn.Module) -> set[nn.Module]:
    """Those of a ResNet that ACmix would replace."""
    blocks = (module for module in model.modules() if isinstance(module, Bottleneck))
    return {block.conv2 for block in blocks if isinstance(block.conv2, nn.Conv2d)}


@torch.no_grad()
def count(model: nn.Module, *inputs: Any, convention: Convention = CONVENTIONS["mixed"]) -> Counts:
    """Multiply-adds of `model(*inputs)` by stage, under a convention.

    Attention is counted where it is ours or that of timm's Swin.
    """
    stages, replaced = stages_of(model), replaced_convolutions(model)
    stages.update(dict.fromkeys(replaced, STAGE_1))
    total: Counter[str] = Counter({STAGE_1: 0, STAGE_2: 0, REST: 0, ADDS: 0})

    def hook(module: nn.Module, arguments: tuple[Any, ...], out: Tensor) -> None:
        rule = next(rule for kind, rule in RULES.items() if isinstance(module, kind))
        for what, number in rule(module, *arguments, out).items():
            if what == PRODUCTS:
                total[stages.get(module, REST)] += number
            elif what in total:
                total[what] += number
            else:
                total[REST] += number * getattr(convention, what)
        if module in replaced and isinstance(module, nn.Conv2d):
            total[ADDS] += module.kernel_size[0] * module.kernel_size[1] * out.numel()

    hooks = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, tuple(RULES))]
    try:
        model(*inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return dict(total)


def family_of(model: nn.Module) -> str:
    """The key in CONVENTIONS by which a network is counted."""
    if isinstance(model, ACmixSAN):
        return "san_acmix" if model.path == "acmix" else "san"
    families = {ResNet: "resnet", SwinTransformer: "swin", ACmixPVT: "pvt"}
    found = [name for kind, name in families.items() if isinstance(model, kind)]
    if found:
        return found[0]
    ours = any(isinstance(module, tuple(OPERATORS)) for module in model.modules())
    return "mixed" if ours else "other"


def network_costs(name: str, size: int | tuple[int, int] | None = None) -> Costs:
    """Parameters and multiply-adds of a model for one image.

    Args:
        name: in timm's registry, which holds ours.
        size: of the image in pixels; None for the size that the model is configured for.

    Raises:
        ValueError: for a name that timm does not know, with near ones, and for a size that the
            model does not take.
    """
    check_name(name)
    model = _build(name)
    channels, *own = model.default_cfg["input_size"]
    height, width = (size, size) if isinstance(size, int) else size or own
    x = torch.empty(1, channels, height, width, device="meta")
    try:
        numbers = _count(model, x)
    except (AssertionError, RuntimeError):
        model, numbers = _count_resized(name, x)
    cancelled = sum(
        module.head_dim
        for module in model.modules()
        if isinstance(module, ACmix2d) and getattr(module, "position_weight", None) is not None
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Costs(
        name,
        (height, width),
        parameters + cancelled,
        cancelled,
        numbers[STAGE_1],
        numbers[STAGE_2],
        numbers[REST],
        numbers[ADDS],
        family_of(model),
    )


def _build(name: str, **arguments: Any) -> Any:
    try:
        with torch.device("meta"):
            return timm.create_model(name, **arguments).eval()
    except (NotImplementedError, RuntimeError):  # a constructor that reads numbers
        return timm.create_model(name, **arguments).eval().to("meta")


def _count(model: nn.Module, x: Tensor) -> Counts:
    family = family_of(model)
    with torch.device("meta"), torch.no_grad():
        if family != "other":
            return count(model, x, convention=CONVENTIONS[family])
        with FlopCounterMode(display=False) as counter:
            model(x)
    return {STAGE_1: 0, STAGE_2: 0, REST: counter.get_total_flops() // 2, ADDS: 0}


def _count_resized(name: str, x: Tensor) -> tuple[nn.Module, Counts]:
    """Of a model that takes one size only: one made for this size."""
    height, width = x.shape[-2:]
    try:
        model = _build(name, img_size=(height, width))
        return model, _count(model, x)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ValueError(f"size: {name} does not take {height}x{width}") from error


def check_name(name: str) -> None:
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    suggestion = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"unknown model {name!r}{suggestion}")


# Main Table 1 -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleCosts:
    """Of one module: multiply-adds at each position by stage, and parameters without biases."""

    stage_1: int
    stage_2: int
    parameters: int


MODULE_FORMULAS = {
    "convolution": ("k_c² C²", "k_c² C", "k_c² C²"),
    "self-attention": ("3 C²", "2 k_a² C", "3 C²"),
    "ACmix": ("3 C²", "2 k_a² C + 3 k_c² C + k_c⁴ C", "3 C² + 3 k_c² N + k_c⁴ C"),
}


def module_costs(
    kind: str, channels: int, *, kernel_att: int = 7, kernel_conv: int = 3, heads: int = 4
) -> ModuleCosts:
    """`MODULE_FORMULAS` with numbers."""
    check_choice("kind", kind, tuple(MODULE_FORMULAS))
    taps, attention = kernel_conv**2, 2 * kernel_att**2 * channels
    if kind == "convolution":
        return ModuleCosts(taps * channels**2, taps * channels, taps * channels**2)
    projections = 3 * channels**2
    if kind == "self-attention":
        return ModuleCosts(projections, attention, projections)
    convolution = (3 * taps + taps**2) * channels
    learned = 3 * taps * heads + taps**2 * channels
    return ModuleCosts(projections, attention + convolution, projections + learned)


# Tables -------------------------------------------------------------------------------------------

Rows = list[list[str]]


def totals_table(found: Sequence[Costs]) -> Rows:
    """A header and a row a network: parameters and multiply-adds beside the published ones."""
    rows = [["model", "size", "M params", "publ.", "diff", "GMACs", "publ.", "plot", "diff"]]
    for one in found:
        published = PUBLISHED.get(one.name) if one.size == PUBLISHED_SIZE else None
        parameters, macs = one.parameters / 1e6, one.macs / 1e9
        row = [one.name, "x".join(map(str, one.size)), f"{parameters:.3f}"]
        if published is None:
            rows.append([*row, "", "", f"{macs:.3f}", "", "", ""])
            continue
        row += [f"{published.parameters:g}", f"{parameters - published.parameters:+.3f}"]
        row += [f"{macs:.3f}", f"{published.macs:.1f}", f"{published.plot:.3f}"]
        rows.append([*row, f"{macs - published.plot:+.3f}"])
    return rows


def stages_table(found: Sequence[Costs]) -> Rows:
    """A header and a row a network: GMACs by stage beside supplementary Table 1."""
    rows = [["model", "Stage I", "publ.", "diff", "Stage II", "publ.", "diff", "rest", "GMACs"]]
    for one in found:
        row = [one.name]
        published = PUBLISHED_STAGES.get(one.name) if one.size == PUBLISHED_SIZE else None
        for index, number in enumerate((one.stage_1, one.stage_2 + one.adds)):
            row.append(f"{number / 1e9:.3f}")
            if published is None:
                row += ["", ""]
            else:
                row += [f"{published[index]:.2f}", f"{number / 1e9 - published[index]:+.3f}"]
        rows.append([*row, f"{one.rest / 1e9:.3f}", f"{one.macs / 1e9:.3f}"])
    return rows


def modules_table(channels: int = 256) -> Rows:
    """Main Table 1, with its numbers for one module of `channels`."""
    rows = [["one module, each position", "Stage I", "Stage II", "parameters"]]
    for kind, formulas in MODULE_FORMULAS.items():
        numbers = module_costs(kind, channels)
        values = (numbers.stage_1, numbers.stage_2, numbers.parameters)
        cells = [f"{f} = {v:,}" for f, v in zip(formulas, values, strict=True)]
        rows.append([kind, *cells])
    return rows


def notes(found: Sequence[Costs], stages: bool = False) -> list[str]:
    """What the numbers hold, a sentence each."""
    families = {one.family for one in found}
    said = [convention.text for key, convention in CONVENTIONS.items() if key in families]
    if not stages and any(one.cancelled for one in found):
        omitted = ", ".join(f"{one.name} {one.cancelled:,}" for one in found if one.cancelled)
        said.append(
            "M params of ResNet count the position bias b_p of each operator, d parameters, as the "
            "released code has it; it cancels in the softmax and our modules leave it out "
            f"({omitted})"
        )
    if not stages and any(one.name in PUBLISHED and one.size == PUBLISHED_SIZE for one in found):
        said.append("publ.: the paper's tables; plot: its accuracy-FLOPs plot, which diff is to")
    if stages:
        said += _stage_notes(found)
    return said


def _stage_notes(found: Sequence[Costs]) -> list[str]:
    said = [
        "publ.: supplementary Table 1, GFLOPs of all such modules of one network; Stage I and II "
        "hold multiply-adds alone, rest all others and what the convention counts beside them"
    ]
    if any(one.adds for one in found):
        said.append(
            "Stage II of a convolution is the additions of its shifts, which GMACs do not count "
            "again beside its multiply-adds"
        )
    shown = {one.name for one in found if one.size == PUBLISHED_SIZE}
    if not shown.isdisjoint(("san19_attn", "san19_acmix")):
        note = (
            "SAN-19: Stage II is the network of the weights, the aggregation and any convolution "
            "path, and no convention tried gives the published figure"
        )
        if "san19_attn" in shown:
            note += (
                ": self-attention has 0.556 in multiply-adds, 0.622 with batch norms, ReLU and "
                "biases, 0.72 as published"
            )
        said.append(note)
    return said


def report(found: Sequence[Costs], stages: bool = False, output_format: str = "table") -> str:
    """The tables and notes as text, to print.

    Args:
        found: rows, from `network_costs`.
        stages: GMACs by stage and main Table 1 instead of parameters and sums.
        output_format: "table", "csv" (one table, with the notes in the last column) or "markdown".
    """
    check_choice("format", output_format, FORMATS)
    main = stages_table(found) if stages else totals_table(found)
    if output_format == "csv":
        return as_csv(main, [notes([one], stages) for one in found])
    text = as_text(main, notes(found, stages), output_format)
    if stages:
        text += "\n" + as_text(modules_table(), [], output_format)
        text += "Main Table 1, for C = 256, k_a = 7, k_c = 3, N = 4, without biases.\n"
    return text


def as_text(rows: Rows, said: Sequence[str], output_format: str) -> str:
    """A table of a header and rows, and below it what its numbers hold."""
    render = _markdown if output_format == "markdown" else _rich
    bullets = "".join(f"- {note}.\n" for note in said)
    return f"{render(rows)}\n{bullets}"


def as_csv(rows: Rows, said: Sequence[Sequence[str]]) -> str:
    """The same as CSV, with what is said of each row in its last column."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_unique(rows[0]), "note"])
    for row, of_row in zip(rows[1:], said, strict=True):
        writer.writerow([*row, "; ".join(of_row)])
    return out.getvalue()


def _unique(header: Sequence[str]) -> list[str]:
    """Names of columns that say which column they are beside."""
    names, beside = [], ""
    for name in header:
        related = name in ("publ.", "plot", "diff")
        beside = beside if related else name
        names.append(f"{beside} {name.replace('publ.', 'published')}" if related else name)
    return names


def _markdown(rows: Rows) -> str:
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    lines = [rows[0], rule, *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _rich(rows: Rows) -> str:
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    # Wide enough for every column: a table cut off at the width of a pipe is of no use.
    console = Console(width=140, file=io.StringIO(), highlight=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"
