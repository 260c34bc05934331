"""Pictures of a run, from plain data; matplotlib without pyplot, so no state and no display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

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
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.1,
}
DPI = 150


def save(figure: Figure, path: Path) -> Path:
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=DPI)
    return path


@matplotlib.rc_context(STYLE)
def curves(rows: Sequence[Row]) -> Figure:
    """Loss and accuracy by epoch. Rows hold epoch, {train,val}_{loss,accuracy}."""
    figure = Figure(figsize=(10, 4))
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    _lines(loss_axes, rows, "loss")
    _lines(accuracy_axes, rows, "accuracy")
    loss_axes.set(title="Loss" + _final(rows, "val_loss", ".3f"), ylabel="cross-entropy")
    accuracy_axes.set(title="Accuracy" + _final(rows, "val_accuracy", ".1%"))
    accuracy_axes.yaxis.set_major_formatter(PercentFormatter(1.0))
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
        return _note("This network has no layer that mixes attention and convolution")
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
    columns: int = 8,
) -> Figure:
    """A grid of images (H, W) or (H, W, 3) in [0, 1], the mistakes first and marked."""
    if not images:
        return _note("No held-out images were kept")
    order = sorted(range(len(images)), key=lambda index: truth[index] == predicted[index])
    rows = -(-len(order) // columns)
    figure = Figure(figsize=(1.35 * columns, 1.62 * rows + 0.6))
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, index in zip(grid, order, strict=False):
        _tile(axes, images[index], truth[index], predicted[index], confidence[index])
    return figure


def _tile(axes: Axes, image: np.ndarray, truth: str, predicted: str, confidence: float) -> None:
    right = truth == predicted
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_on()
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color=GREEN if right else RED, linewidth=1 if right else 4)
    text = (
        f"{_short(predicted)}  {confidence:.0%}"
        if right
        else f"✗ {_short(predicted)}, is {_short(truth)}"
    )
    axes.set_title(
        text,
        loc="center",
        fontsize=9.5,
        color="black" if right else RED,
        fontweight="normal" if right else "bold",
    )


def _short(name: str, limit: int = 12) -> str:
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
