"""Pictures of a run, from plain data; matplotlib without pyplot, so no state and no display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from acmix.analysis import fonts
from acmix.errors import printable

Row = Mapping[str, Any]

# Okabe and Ito's colours, told apart by every kind of colour vision.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6B6B6B"
ATTENTION, CONVOLUTION = BLUE, RED
TRAIN, HELD_OUT = GREY, BLUE

STYLE: dict[Any, Any] = {
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.titlesize": 13.0,
    "figure.facecolor": "white",
    "text.parse_math": False,  # a name with dollar signs is a name
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.1,
}
DPI = 150


def save(figure: Figure, path: Path) -> Path:
    with matplotlib.rc_context(STYLE), fonts.for_letters_of(figure):
        figure.savefig(path, dpi=DPI)
    return path


@matplotlib.rc_context(STYLE)
def curves(rows: Sequence[Row], monitor: str = "val_accuracy", measure: str = "accuracy") -> Figure:
    """Loss, and what is measured on held-out images, by epoch.

    Rows hold epoch, {train,val}_loss and {train,val}_NAME, where monitor is val_NAME; measure is
    what people call it.
    """
    figure = Figure(figsize=(10, 4))
    loss_axes, measure_axes = figure.subplots(1, 2)
    _lines(loss_axes, rows, "loss")
    _lines(measure_axes, rows, monitor.removeprefix("val_"))
    loss_axes.set(title="Loss" + _final(rows, "val_loss", ".3f"))
    measure_axes.set(title=measure[0].upper() + measure[1:] + _final(rows, monitor, ".1%"))
    measure_axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _lines(axes: Axes, rows: Sequence[Row], quantity: str) -> None:
    for stage, label, colour in (
        ("train", "training", TRAIN),
        ("val", "held out", HELD_OUT),
    ):
        points = [
            (row["epoch"], row[f"{stage}_{quantity}"])
            for row in rows
            if f"{stage}_{quantity}" in row
        ]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=label, marker=_marker(points))
    if axes.lines:
        axes.legend()
    else:
        _say(axes, "no epoch was finished")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _marker(points: Sequence[object]) -> str | None:
    """A line of one point shows only as a marker."""
    return "o" if len(points) == 1 else None


def _final(rows: Sequence[Row], column: str, form: str) -> str:
    values = [row[column] for row in rows if column in row]
    return f": {values[-1]:{form}} held out, at the end" if values else ""


@matplotlib.rc_context(STYLE)
def mix(rows: Sequence[Row]) -> Figure:
    """alpha and beta of every layer. Rows hold epoch, layer, alpha, beta (None: no such path).

    Above, the weights over training, one line a layer. Below, the weights at the end by depth and
    log |alpha / beta|, the paper's measure of which path a layer leans to.
    """
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    if not layers:
        raise ValueError("rows: expected layers that mix attention and convolution, got none")
    figure = Figure(figsize=(11, 7.5))
    above, below = figure.subplots(2, 2)
    above[1].sharey(above[0])
    colours = {layer: _shade(index, len(layers)) for index, layer in enumerate(layers)}
    _weight_lines(above[0], rows, "alpha", colours)
    _weight_lines(above[1], rows, "beta", colours)
    above[0].set_title("alpha, weight of attention, over training")
    above[1].set_title("beta, weight of convolution, over training")
    if len(layers) <= 12:
        handles = [Line2D([], [], color=colour, label=layer) for layer, colour in colours.items()]
        place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        above[1].legend(handles=handles, title="layer", alignment="left", **place)
    else:
        _depth_bar(figure, above[1], len(layers))
    final = {row["layer"]: row for row in rows}
    _final_weights(below[0], final)
    _final_ratio(below[1], final)
    return figure


def _shade(index: int, count: int) -> str:
    """Dark for shallow layers, bright for deep ones; the palest end is left out."""
    return to_hex(matplotlib.colormaps["viridis"](0.88 * index / max(1, count - 1)))


def _weight_lines(axes: Axes, rows: Sequence[Row], weight: str, colours: Mapping[str, str]) -> None:
    drawn = False
    for layer, colour in colours.items():
        points = [(row["epoch"], row[weight]) for row in rows if row["layer"] == layer]
        points = [point for point in points if point[1] is not None]
        if points:
            drawn = True
            axes.plot(*zip(*points, strict=True), color=colour, label=layer, marker=_marker(points))
    if not drawn:
        _say(axes, "not used")
        return
    axes.set_xlabel("epoch (0: before training)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _depth_bar(figure: Figure, axes: Axes, count: int) -> None:
    shades = matplotlib.colors.ListedColormap([_shade(index, count) for index in range(count)])
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(1, count), shades)
    figure.colorbar(scale, ax=axes, label="layer, from the input (1) on")


def _final_weights(axes: Axes, final: Mapping[str, Row]) -> None:
    top = 0.0
    for weight, path, colour, marker in (
        ("alpha", "attention", ATTENTION, "o"),
        ("beta", "convolution", CONVOLUTION, "s"),
    ):
        sizes = [math.nan if row[weight] is None else abs(row[weight]) for row in final.values()]
        depth = range(1, len(sizes) + 1)
        axes.plot(depth, sizes, color=colour, marker=marker, label=f"|{weight}|, {path}")
        top = max([top, *(size for size in sizes if math.isfinite(size))])
    axes.set_title("Both weights at the end, by depth")
    axes.set_ylim(0, 1.1 * top or 1.0)
    axes.legend()
    _depth_axis(axes, list(final))


def _final_ratio(axes: Axes, final: Mapping[str, Row]) -> None:
    ratios = [log_ratio(row["alpha"], row["beta"]) for row in final.values()]
    colours = [ATTENTION if ratio > 0 else CONVOLUTION for ratio in ratios]
    axes.bar(range(1, len(ratios) + 1), ratios, color=colours, width=0.6)
    limit = 1.25 * max([abs(ratio) for ratio in ratios if math.isfinite(ratio)] + [0.1])
    axes.set_ylim(-limit, limit)
    axes.set_title("Leaning of each layer: log |alpha / beta|")
    if not any(math.isfinite(ratio) for ratio in ratios):
        _say(axes, "one path only: no ratio")
    else:
        axes.axhline(0, color=GREY, linewidth=1)
        for height, text, colour in (
            (0.95, "attention", ATTENTION),
            (0.05, "convolution", CONVOLUTION),
        ):
            axes.text(
                0.99, height, text, transform=axes.transAxes, color=colour, ha="right", va="center"
            )
    _depth_axis(axes, list(final))


def log_ratio(alpha: float | None, beta: float | None) -> float:
    """log |alpha / beta|; NaN where a path is missing or weighs nothing."""
    return math.log(abs(alpha / beta)) if alpha and beta else math.nan


def _depth_axis(axes: Axes, layers: Sequence[str]) -> None:
    axes.set_xlim(0.4, len(layers) + 0.6)
    if len(layers) <= 12:
        axes.set_xticks(range(1, len(layers) + 1), layers, rotation=30, ha="right")
        axes.grid(False, axis="x")
    else:
        axes.set_xlabel("layer, from the input (1) on")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


@matplotlib.rc_context(STYLE)
def predictions(
    images: Sequence[np.ndarray],
    truth: Sequence[str],
    predicted: Sequence[str],
    confidence: Sequence[float],
    title: str,
) -> Figure:
    """A grid of images (H, W) or (H, W, 3) in [0, 1], the mistakes first and marked."""
    if not images:
        return _note("No held-out images were kept")
    order = sorted(range(len(images)), key=lambda index: truth[index] == predicted[index])
    tiles = [
        _prediction(images[n], short(truth[n]), short(predicted[n]), confidence[n]) for n in order
    ]
    return _grid(tiles, title)


class Tile(NamedTuple):
    """A picture of a grid, the text above it, and its frame."""

    picture: np.ndarray
    text: str
    colour: str = "black"
    frame: float = 0.0  # width
    weight: str = "normal"


def _prediction(picture: np.ndarray, truth: str, predicted: str, confidence: float) -> Tile:
    text = f"{predicted} {confidence:.0%}"
    if truth == predicted:
        return Tile(picture, text, GREEN, 1.0)
    return Tile(picture, f"✗ {text}\nis {truth}", RED, 4.0, "bold")


@matplotlib.rc_context(STYLE)
def images(pictures: Sequence[np.ndarray], names: Sequence[str], title: str) -> Figure:
    """A grid of images (H, W) or (H, W, 3) in [0, 1], each below its name."""
    tiles = [Tile(picture, short(name, 16)) for picture, name in zip(pictures, names, strict=True)]
    return _grid(tiles, title)


def _grid(tiles: Sequence[Tile], title: str, columns: int = 8) -> Figure:
    """All in one pair of axes, in inches: a pair for each would take seconds to lay out."""
    line, side, cell = 0.16, 1.4, 1.5
    above = line * max(tile.text.count("\n") + 1 for tile in tiles) + 0.12
    rows, head = -(-len(tiles) // columns), 0.25 * (title.count("\n") + 1) + 0.15
    height = rows * (cell + above) + head
    figure = Figure(figsize=(cell * columns, height))
    figure.set_layout_engine("none")
    figure.suptitle(title, x=0.01, y=1 - 0.1 / height, ha="left", va="top", fontweight="bold")
    axes = figure.add_axes((0, 0, 1, 1 - head / height))
    axes.set_axis_off()
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        x, y = (column + 0.5) * cell, row * (cell + above) + above
        _draw_tile(axes, tile, x, y, side)
    axes.set(xlim=(0, cell * columns), ylim=(rows * (cell + above), 0), aspect="auto")
    return figure


def _draw_tile(axes: Axes, tile: Tile, x: float, y: float, side: float) -> None:
    """A tile whose picture is centred below (x, y), within a square."""
    height, width = (side * part / max(tile.picture.shape[:2]) for part in tile.picture.shape[:2])
    left, top = x - width / 2, y + (side - height) / 2
    extent = (left, left + width, top + height, top)
    axes.imshow(tile.picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=extent)
    if tile.frame:
        box: Any = {"fill": False, "edgecolor": tile.colour, "linewidth": tile.frame}
        axes.add_patch(Rectangle((left, top), width, height, **box))
    colour = "black" if tile.weight == "normal" else tile.colour
    place: Any = {"ha": "center", "va": "bottom"}
    axes.text(x, top - 0.05, tile.text, color=colour, fontsize=9, fontweight=tile.weight, **place)


@matplotlib.rc_context(STYLE)
def confusion(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """Held-out images by class (rows) and prediction (columns), counts (classes, classes).

    The shade is the part of the row, up to 20 classes have numbers.
    """
    classes = len(names)
    part = counts / counts.sum(1, keepdims=True).clip(1)
    side = 2.4 + max(0.3 * classes, 2.0) if classes <= 20 else 9.5
    figure = Figure(figsize=(side + 1.2, side))
    axes = figure.subplots()
    # The root brings out what is rare: the mistakes.
    shown = axes.imshow(part, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    figure.colorbar(shown, ax=axes, shrink=0.7, format=PercentFormatter(1.0), label="of the class")
    if classes <= 20:
        digits = 9 if counts.max() < 1000 or classes <= 10 else 6.5
        for row, column in np.argwhere(counts):
            colour = "white" if part[row, column] > 0.3 else "black"
            number = counts[row, column]
            axes.text(column, row, number, color=colour, fontsize=digits, ha="center", va="center")
    labels, size = [short(name, 18) for name in names], 9.5 if classes <= 20 else 7.5
    turn: Any = {"rotation": 90} if max(map(len, labels)) > 2 else {}
    axes.set_xticks(range(classes), labels, fontsize=size, **turn)
    axes.set_yticks(range(classes), labels, fontsize=size)
    axes.grid(False)
    axes.set(xlabel="prediction", ylabel="class")
    axes.set_title(f"{counts.trace() / max(1, counts.sum()):.1%} of {counts.sum():,} right")
    return figure


@matplotlib.rc_context(STYLE)
def classes(rows: Sequence[Row]) -> Figure:
    """Precision, recall and F1 of each class. Rows hold class, images, precision, recall, f1."""
    figure = Figure(figsize=(9, 1.8 + 0.32 * len(rows)))
    axes = figure.subplots()
    places = np.arange(len(rows))
    for column, colour, marker in (("precision", BLUE, ">"), ("recall", ORANGE, "<")):
        values = [math.nan if row[column] is None else row[column] for row in rows]
        axes.plot(values, places, marker, color=colour, label=column, markersize=8, alpha=0.9)
    for place, row in zip(places, rows, strict=True):
        ends = [row[column] for column in ("precision", "recall") if row[column] is not None]
        axes.plot(ends, [place] * len(ends), color="#C8C8C8", zorder=1)
    names = [f"{short(row['class'], 24)} ({row['images']:,})" for row in rows]
    axes.set_yticks(places, names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    scores = [row["f1"] for row in rows if row["f1"] is not None]
    axes.set_title(f"Held-out images by class (how many); mean F1 {np.mean(scores or [0.0]):.3f}")
    return figure


@matplotlib.rc_context(STYLE)
def attention(
    image: np.ndarray, views: Sequence[Any], pixel: tuple[int, int], caption: str
) -> Figure:
    """What one pixel of an image (H, W) or (H, W, 3) attends to in each layer.

    caption: of the image, such as where the pixel is in its file. views: layer, pixel and weights
    (heads, H, W) of each, see `acmix.analysis.explain.LayerView`.
    """
    views = [view for view in views if view.weights is not None]
    if not views:
        return _note("No layer of this network attends")
    title = "Attention of the marked pixel by layer: mean of the heads, bright where it is large"
    figure, grid = _over_image(image, len(views) + 1, title)
    _mark(grid[0], pixel, image.shape[:2], image.shape[:2])
    _caption(grid[0], caption)
    for axes, view in zip(grid[1:], views, strict=False):
        heat = view.weights.abs().mean(0).cpu().numpy()  # SAN's may be negative
        top = max(heat.max(), 1e-12)
        _dimmed(axes, image)
        shade = {"cmap": "inferno", "vmin": 0, "vmax": top, "alpha": 0.9 * np.sqrt(heat / top)}
        axes.imshow(heat, extent=_extent(image), interpolation="nearest", **shade)
        stride = max(
            1, round(heat.shape[0] / view.share.shape[0])
        )  # a window's centre is its first
        at = (view.pixel[0] * stride, view.pixel[1] * stride)
        _mark(axes, at, heat.shape if stride > 1 else view.share.shape, image.shape[:2])
        _caption(axes, f"{view.layer}\n{heat.shape[0]} x {heat.shape[1]}, largest {top:.2g}")
    return figure


@matplotlib.rc_context(STYLE)
def shares(image: np.ndarray, views: Sequence[Any]) -> Figure:
    """Part of attention in the output of each layer over an image (H, W) or (H, W, 3).

    views: layer and share (H, W) of each, see `acmix.analysis.explain.LayerView`.
    """
    title = "Which path speaks: |alpha F_att| / (|alpha F_att| + |beta F_conv|), by layer"
    figure, grid = _over_image(image, len(views) + 1, title)
    _caption(grid[0], "image")
    leaning = LinearSegmentedColormap.from_list("paths", [CONVOLUTION, "#F4F4F4", ATTENTION])
    for axes, view in zip(grid[1:], views, strict=False):
        _dimmed(axes, image)
        shade = {"cmap": leaning, "vmin": 0, "vmax": 1, "alpha": 0.8}
        share = view.share.float().cpu().numpy()
        shown = axes.imshow(share, extent=_extent(image), interpolation="nearest", **shade)
        _caption(axes, f"{view.layer}\n{share.mean():.0%} attention")
    place: Any = {"location": "bottom", "shrink": 0.5, "aspect": 40, "ticks": (0, 0.5, 1)}
    bar = figure.colorbar(shown, ax=grid.tolist(), **place)
    bar.ax.set_xticklabels(["convolution", "both alike", "attention"])
    return figure


def _over_image(image: np.ndarray, tiles: int, title: str) -> tuple[Figure, Any]:
    """A grid of tiles of the shape of the image, which is in the first."""
    columns = min(6, tiles)
    rows = -(-tiles // columns)
    wide = 2.1
    tall = min(max(wide * image.shape[0] / image.shape[1], 1.0), 4.0)
    figure = Figure(figsize=(max(wide * columns + 0.2, 8.5), (tall + 0.45) * rows + 0.9))
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    grid[0].imshow(image, cmap="gray", vmin=0, vmax=1, extent=_extent(image))
    return figure, grid


def _caption(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=8.5, fontweight="normal")


def _extent(image: np.ndarray) -> tuple[float, float, float, float]:
    return (0, image.shape[1], image.shape[0], 0)


def _dimmed(axes: Axes, image: np.ndarray) -> None:
    grey = image if image.ndim == 2 else image.mean(-1)
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1.6, extent=_extent(image))


def _mark(axes: Axes, pixel: tuple[int, int], of: Sequence[int], image: Sequence[int]) -> None:
    """A ring around a pixel of a map of the size `of` that covers the image."""
    y, x = ((place + 0.5) / here * side for place, here, side in zip(pixel, of, image, strict=True))
    for colour, width in (("black", 3.5), ("white", 1.5)):
        ring: Any = {"markerfacecolor": "none", "markeredgecolor": colour}
        axes.plot(x, y, marker="o", markersize=9, markeredgewidth=width, **ring)


@matplotlib.rc_context(STYLE)
def ablation(
    rows: Sequence[Row], title: str, measured: str = "accuracy", measure: str = "accuracy"
) -> Figure:
    """What is measured and speed by variant: a dot a run, the line their mean and deviation.

    Rows hold variant, {train,infer}_images_per_second and what is `measured`, which people call
    measure.
    """
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    figure = Figure(figsize=(12, 1.6 + 0.42 * len(variants)))
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    grid = figure.subplots(1, 3, sharey=True)
    for axes, column, name in zip(
        grid,
        (measured, "train_images_per_second", "infer_images_per_second"),
        (f"Held-out {measure}", "Training, images/s", "Inference, images/s"),
        strict=True,
    ):
        for place, variant in enumerate(variants):
            values = np.array([row[column] for row in rows if row["variant"] == variant])
            spread = values.std(ddof=1) if len(values) > 1 else 0.0
            axes.errorbar(
                values.mean(), place, xerr=spread, fmt="|", color=BLUE, markersize=16, capsize=4
            )
            axes.plot(values, [place] * len(values), "o", color=GREY, markersize=4, alpha=0.7)
        axes.set_title(name)
    grid[0].set_yticks(range(len(variants)), variants)
    grid[0].set_ylim(len(variants) - 0.4, -0.6)  # whole rows, the first on top
    grid[0].margins(x=0.08)
    grid[0].xaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in grid[1:]:
        low, high = axes.get_xlim()
        axes.set_xlim(min(0, low), 1.06 * high)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    return figure


def short(name: str, limit: int = 12) -> str:
    """The name on one line, cut where it is long."""
    name = printable(name)
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _note(text: str) -> Figure:
    figure = Figure(figsize=(7, 2))
    axes = figure.subplots()
    axes.set_axis_off()
    _say(axes, text)
    return figure


def _say(axes: Axes, text: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)


def choose_shown(
    truth: Sequence[int], predicted: Sequence[int], confidence: Sequence[float], limit: int
) -> list[int]:
    """Places of the predictions most worth a look: mistakes, then right ones, spread over classes.

    Of each class the most confident come first; right ones take at least a quarter of the limit.
    """
    right = np.equal(truth, predicted)
    shown = {False: _by_turns(truth, confidence, np.flatnonzero(~right))}
    shown[True] = _by_turns(truth, confidence, np.flatnonzero(right))
    wrong = shown[False][: limit - min(len(shown[True]), limit // 4)]
    return [*wrong, *shown[True][: limit - len(wrong)]]


def _by_turns(truth: Sequence[int], confidence: Sequence[float], places: np.ndarray) -> list[int]:
    """The places, a class after the other in turns, the most confident of each first."""
    turns: dict[int, int] = {}
    ranked = []
    for place in sorted(places.tolist(), key=lambda place: -confidence[place]):
        turn = turns[truth[place]] = turns.get(truth[place], -1) + 1
        ranked.append((turn, truth[place], place))
    return [place for _, _, place in sorted(ranked)]
