"""Pictures of classes by pixel: images with their masks, and how the classes were told apart."""

from __future__ import annotations

import colorsys
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from acmix.analysis.figures import BLUE, GREY, STYLE, Row, short
from acmix.analysis.objects import COLOURS

IGNORED = -1  # in a mask, of pixels of no class
NO_CLASS = "#C4C4C4"
OPACITY = 0.55
SIDE = 2.9  # inches
LEGEND = 23  # classes in it
NUMBERED = 20  # classes: of more, numbers in a matrix would not be read


def colour(index: int) -> tuple[float, float, float]:
    """Of a class: the first are far apart, the others as far as so many can be."""
    if index < len(COLOURS):
        return to_rgb(COLOURS[index])
    turn = index - len(COLOURS)
    hue = 0.618034 * turn % 1
    return colorsys.hsv_to_rgb(hue, (0.85, 0.5, 0.7)[turn % 3], (0.85, 0.95, 0.55)[turn // 3 % 3])


def paint(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W) in colours, (H, W, 3) in [0, 1]."""
    classes = max(0, int(mask.max(initial=IGNORED))) + 1
    palette = np.array([*(colour(index) for index in range(classes)), to_rgb(NO_CLASS)])
    return palette[mask]


@matplotlib.rc_context(STYLE)
def sheet(
    images: Sequence[np.ndarray], masks: Sequence[np.ndarray], names: Sequence[str], title: str
) -> Figure:
    """Images (H, W) or (H, W, 3) in [0, 1], each beside itself under its mask (H, W)."""
    figure, grid = _grid(images, 2, masks, names, title, columns=4)
    for place, (image, mask) in enumerate(zip(images, masks, strict=True)):
        _show(grid[2 * place], image)
        _show(grid[2 * place + 1], image, mask)
    return figure


@matplotlib.rc_context(STYLE)
def predictions(
    images: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    found: Sequence[np.ndarray],
    mious: Sequence[float],
    names: Sequence[str],
    title: str,
) -> Figure:
    """Rows of an image, its mask, what was found, and that over the image.

    Images are (H, W) or (H, W, 3) in [0, 1], masks (H, W) of any size. mious: of each image.
    """
    figure, grid = _grid(images, 4, [*truth, *found], names, title, columns=4)
    for row, (image, mask, seen, miou) in enumerate(zip(images, truth, found, mious, strict=True)):
        first, second, third, fourth = grid[4 * row : 4 * row + 4]
        _show(first, image)
        _paint(second, image, mask)
        _paint(third, image, seen)
        _show(fourth, image, seen)
        titles = ("image", "truth", f"found: mean IoU {miou:.0%}", "found, over the image")
        for axes, text in zip((first, second, third, fourth), titles, strict=True):
            axes.set_title(text, fontsize=9, fontweight="normal")
    return figure


def _grid(
    images: Sequence[np.ndarray],
    tiles: int,
    masks: Sequence[np.ndarray],
    names: Sequence[str],
    title: str,
    columns: int,
) -> tuple[Figure, list[Axes]]:
    """Axes for so many tiles of each image, and a legend of the classes that are in the masks."""
    rows = max(1, math.ceil(len(images) * tiles / columns))
    ratios = [image.shape[0] / image.shape[1] for image in images]
    height = SIDE * min(1.4, max(0.3, float(np.median(ratios or [1.0])))) + 0.3
    handles = _legend(masks, names)
    lines = math.ceil(len(handles) / 6)
    figure = Figure(figsize=(SIDE * columns, height * rows + 0.5 + 0.25 * lines))
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=6, fontsize=9)
    return figure, list(grid.flat)


def _legend(masks: Sequence[np.ndarray], names: Sequence[str]) -> list[Patch]:
    """Of the classes in masks the most frequent, in their order, and of no class."""
    counts: Counter[int] = Counter()
    for mask in masks:
        values, pixels = np.unique(mask, return_counts=True)
        counts.update(dict(zip(values.tolist(), pixels.tolist(), strict=True)))
    ignored = counts.pop(IGNORED, 0)
    taken = sorted(index for index, _ in counts.most_common(LEGEND))
    handles = [Patch(color=colour(index), label=short(names[index], 18)) for index in taken]
    if len(counts) > LEGEND:
        handles.append(Patch(color="white", label=f"and {len(counts) - LEGEND} more"))
    return [*handles, Patch(color=NO_CLASS, label="no class: ignored")] if ignored else handles


def _show(axes: Axes, image: np.ndarray, mask: np.ndarray | None = None) -> None:
    """The image, and a mask over it."""
    extent = _extent(image)
    grey: Any = {"cmap": "gray", "vmin": 0, "vmax": 1} if image.ndim == 2 else {}
    axes.imshow(image, extent=extent, interpolation="antialiased", **grey)
    if mask is not None:
        axes.imshow(paint(mask), extent=extent, interpolation="nearest", alpha=OPACITY)


def _paint(axes: Axes, image: np.ndarray, mask: np.ndarray) -> None:
    """A mask, of any size, in the place of its image."""
    axes.imshow(paint(mask), extent=_extent(image), interpolation="nearest")


def _extent(image: np.ndarray) -> tuple[float, float, float, float]:
    return (0, image.shape[1], image.shape[0], 0)


@matplotlib.rc_context(STYLE)
def classes(rows: Sequence[Row], miou: float) -> Figure:
    """IoU of each class, the highest first. Rows hold class, share (of the pixels), iou."""
    order = sorted(rows, key=lambda row: -1.0 if row["iou"] is None else row["iou"], reverse=True)
    figure = Figure(figsize=(9, 1.6 + (0.3 if len(rows) <= 50 else 0.2) * len(rows)))
    axes = figure.subplots()
    places = range(len(order))
    axes.barh(places, [row["iou"] or 0.0 for row in order], color=BLUE, height=0.7)
    axes.axvline(miou, color=GREY, linewidth=1, linestyle="--")
    for place, row in zip(places, order, strict=True):
        text = "neither there nor found" if row["iou"] is None else f"{row['iou']:.1%}"
        over: Any = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the dashed line
        at: Any = {"fontsize": 8, "color": GREY, "va": "center", "bbox": over}
        axes.text((row["iou"] or 0.0) + 0.006, place, text, **at)
    names = [f"{short(row['class'], 24)} ({row['share']:.1%})" for row in order]
    axes.set_yticks(places, names, fontsize=9 if len(rows) <= 50 else 7)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlim(0, 1.08)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(False, axis="y")
    axes.set_title(f"IoU of each class (its share of the held-out pixels); mean {miou:.1%}, dashed")
    return figure


@matplotlib.rc_context(STYLE)
def confusion(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """Held-out pixels by class (rows) and prediction (columns), counts (classes, classes).

    The shade is the part of the row, which up to 20 classes have as a number too.
    """
    number = len(names)
    part = counts / counts.sum(1, keepdims=True).clip(1)
    side = 2.4 + max(0.42 * number, 2.0) if number <= NUMBERED else 9.5
    figure = Figure(figsize=(side + 1.2, side))
    axes = figure.subplots()
    # The root brings out what is rare: the mistakes.
    shown = axes.imshow(part, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    figure.colorbar(shown, ax=axes, shrink=0.7, format=PercentFormatter(1.0), label="of the class")
    if number <= NUMBERED:
        for row, column in np.argwhere(part >= 0.005):
            ink = "white" if part[row, column] > 0.3 else "black"
            text = f"{100 * part[row, column]:.0f}"
            axes.text(column, row, text, color=ink, fontsize=8, ha="center", va="center")
    labels, size = [short(name, 18) for name in names], 9.5 if number <= NUMBERED else 7.5
    axes.set_xticks(range(number), labels, fontsize=size, rotation=90)
    axes.set_yticks(range(number), labels, fontsize=size)
    axes.grid(False)
    axes.set(xlabel="prediction", ylabel="class")
    right = counts.trace() / max(1, counts.sum())
    numbers = "; numbers are % of the class" if number <= NUMBERED else ""
    axes.set_title(f"{right:.1%} of the pixels right{numbers}")
    return figure
