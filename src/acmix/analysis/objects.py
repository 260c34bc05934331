"""Pictures of boxes and masks, and of how well they were found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import PercentFormatter

from acmix.analysis.figures import BLUE, GREY, ORANGE, STYLE, Row, short

# Told apart on photographs, by every kind of colour vision as far as a few can be.
COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442"),
    *("#8C564B", "#7F3FBF", "#17BECF", "#BCBD22", "#FF1493"),
)
NAMED = 10  # boxes of an image: of more the names would hide the image, which the legend tells
MASK = 0.45  # opacity
SURE = 0.5  # least score of a detection that is shown
SIDE = 3.1  # inches
WIDEST = 12.0  # inches, of a picture alone
LEGEND = 20  # classes in it
CURVES = 8  # classes with a curve of their own


class Marks(NamedTuple):
    """What is in an image, or was found: boxes (N, 4), labels, and perhaps scores and masks."""

    boxes: np.ndarray
    labels: list[int]
    scores: list[float] | None
    masks: np.ndarray | None  # (N, H, W)

    @classmethod
    def of(cls, parts: Mapping[str, Any]) -> Marks:
        """From tensors by name."""
        return cls(
            parts["boxes"].cpu().numpy().reshape(-1, 4),
            parts["labels"].tolist(),
            parts["scores"].tolist() if "scores" in parts else None,
            parts["masks"].cpu().numpy().astype(bool) if "masks" in parts else None,
        )


@matplotlib.rc_context(STYLE)
def sheet(
    pictures: Sequence[np.ndarray], marks: Sequence[Marks], names: Sequence[str], title: str
) -> Figure:
    """Images (H, W) or (H, W, 3) in [0, 1] with what is in them."""
    columns = min(4, len(pictures))
    figure, grid = _grid(pictures, columns, title, _used(marks), names)
    for axes, picture, of in zip(grid, pictures, marks, strict=False):
        _draw(axes, picture, of, names)
    return figure


@matplotlib.rc_context(STYLE)
def predictions(
    pictures: Sequence[np.ndarray],
    truth: Sequence[Marks],
    found: Sequence[Marks],
    names: Sequence[str],
    title: str,
) -> Figure:
    """Pairs of images: what is in them, and what was found, the surest detections."""
    twice = [picture for picture in pictures for _ in range(2)]
    figure, grid = _grid(twice, 4, title, _used([*truth, *found]), names)
    for place, (picture, there, seen) in enumerate(zip(pictures, truth, found, strict=True)):
        left, right = grid[2 * place], grid[2 * place + 1]
        _draw(left, picture, there, names)
        left.set_title(f"truth: {_count(there)}", fontsize=9, fontweight="normal")
        sure = _surest(seen)
        _draw(right, picture, sure, names)
        right.set_title(
            f"found: {_count(sure)}, score {SURE} or more", fontsize=9, fontweight="normal"
        )
    return figure


@matplotlib.rc_context(STYLE)
def picture(image: np.ndarray, marks: Marks, names: Sequence[str]) -> Figure:
    """One image (H, W, 3) in [0, 1] with what was found, as large as it is up to a limit."""
    height, width = image.shape[:2]
    scale = min(WIDEST, max(4.0, max(height, width) / 110)) / max(height, width)
    figure = Figure(figsize=(width * scale, height * scale))
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    _draw(axes, image, marks, names, font=8)
    return figure


def _count(marks: Marks) -> str:
    return "1 object" if len(marks.labels) == 1 else f"{len(marks.labels)} objects"


def _surest(marks: Marks) -> Marks:
    """The detections that are shown."""
    assert marks.scores is not None
    taken = [place for place, score in enumerate(marks.scores) if score >= SURE]
    return Marks(
        marks.boxes[taken],
        [marks.labels[place] for place in taken],
        [marks.scores[place] for place in taken],
        None if marks.masks is None else marks.masks[taken],
    )


def _used(marks: Sequence[Marks]) -> list[int]:
    return sorted({label for of in marks for label in of.labels})


def _grid(
    pictures: Sequence[np.ndarray],
    columns: int,
    title: str,
    used: Sequence[int],
    names: Sequence[str],
) -> tuple[Figure, list[Axes]]:
    """Axes for each picture, in rows that are as high as most pictures need."""
    rows = max(1, math.ceil(len(pictures) / columns))
    ratios = [picture.shape[0] / picture.shape[1] for picture in pictures]
    height = SIDE * min(1.4, max(0.3, float(np.median(ratios)))) + 0.3 if ratios else SIDE
    lines = math.ceil(min(len(used), LEGEND + 1) / 6)
    figure = Figure(figsize=(SIDE * columns, height * rows + 0.5 + 0.25 * lines))
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    if used:
        handles = [Patch(color=colour(label), label=short(names[label])) for label in used[:LEGEND]]
        if len(used) > LEGEND:
            handles.append(Patch(color="white", label=f"and {len(used) - LEGEND} more"))
        figure.legend(handles=handles, loc="outside lower left", ncols=6, fontsize=9)
    return figure, list(grid.flat)


def colour(label: int) -> str:
    return COLOURS[label % len(COLOURS)]


def _draw(
    axes: Axes, picture: np.ndarray, marks: Marks, names: Sequence[str], font: float = 6
) -> None:
    """The image, masks in it, boxes around, and names and scores where there are few."""
    shown = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, 2)
    if marks.masks is not None:
        shown = with_masks(shown, marks.masks, marks.labels)
    axes.imshow(shown, interpolation="nearest")
    size = max(picture.shape[:2])
    for place, (box, label) in enumerate(zip(marks.boxes, marks.labels, strict=True)):
        left, top, right, bottom = box
        style: Any = {"fill": False, "edgecolor": colour(label), "linewidth": 1.4}
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, **style))
        words = [] if len(marks.labels) > NAMED else [short(names[label], 14)]
        if marks.scores is not None:
            words.append(f"{marks.scores[place]:.2f}".lstrip("0"))
        if words and len(marks.labels) <= 4 * NAMED:
            frame: Any = {
                "facecolor": colour(label),
                "edgecolor": "none",
                "pad": 0.6,
                "alpha": 0.85,
            }
            above: Any = {"va": "bottom"} if top > 0.06 * size else {"va": "top"}
            place_of: Any = {"fontsize": font, "color": _ink(label), "bbox": frame, **above}
            axes.text(left, max(top, 0), " ".join(words), clip_on=True, **place_of)
    axes.set(xlim=(-0.5, picture.shape[1] - 0.5), ylim=(picture.shape[0] - 0.5, -0.5))


def _ink(label: int) -> str:
    """Black or white, whichever is read on the colour of a class."""
    red, green, blue = to_rgb(colour(label))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def with_masks(picture: np.ndarray, masks: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """(H, W, 3) with each object's pixels in its class's colour."""
    picture = picture.copy()
    for mask, label in zip(masks, labels, strict=True):
        picture[mask] = (1 - MASK) * picture[mask] + MASK * np.array(to_rgb(colour(label)))
    return picture


@matplotlib.rc_context(STYLE)
def precision_recall(
    curves: Mapping[str, Mapping[int, np.ndarray]], recalls: Sequence[float], names: Sequence[str]
) -> Figure:
    """Precision by recall at IoU 0.5, by kind ("" boxes, "mask_" masks) and index of the class.

    The mean of the classes, and each class where there are few; of many those that differ most.
    """
    figure = Figure(figsize=(6.2 * len(curves) + 1.6, 4.6))
    grid = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (kind, of_class) in zip(grid, curves.items(), strict=True):
        order = sorted(of_class, key=lambda label: -float(of_class[label].mean()))
        shown = order if len(order) <= CURVES else [*order[: CURVES // 2], *order[-CURVES // 2 :]]
        for label in shown:
            score = f" {of_class[label].mean():.2f}"
            text = short(names[label], 18) + score
            axes.plot(recalls, of_class[label], color=colour(label), linewidth=1.4, label=text)
        if len(order) > 1:
            mean = np.mean([of_class[label] for label in order], axis=0)
            text = f"mean of {len(order)} {mean.mean():.2f}"
            axes.plot(recalls, mean, color="black", linewidth=2.6, label=text)
        what = "Masks" if kind else "Boxes"
        axes.set(
            title=f"{what}: precision by recall at IoU 0.5", xlabel="recall", ylabel="precision"
        )
        axes.set(xlim=(0, 1.005), ylim=(0, 1.03))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.legend(title="class, AP50", alignment="left", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@matplotlib.rc_context(STYLE)
def classes(rows: Sequence[Row], mean: float) -> Figure:
    """AP and AP50 of the boxes of each class. Rows hold class, objects, ap, ap50."""
    figure = Figure(figsize=(9, 1.6 + 0.3 * len(rows)))
    axes = figure.subplots()
    places = np.arange(len(rows))
    ap50, ap = ([row[key] or 0.0 for row in rows] for key in ("ap50", "ap"))
    axes.barh(places, ap50, color=ORANGE, height=0.7, alpha=0.55)
    axes.barh(places, ap, color=BLUE, height=0.42)
    for place, row in zip(places, rows, strict=True):
        if row["ap"] is None:
            axes.text(0.005, float(place), "no object", color=GREY, fontsize=8, va="center")
    names = [f"{short(row['class'], 24)} ({row['objects']:,})" for row in rows]
    axes.set_yticks(places, names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(False, axis="y")
    handles = [
        Line2D([], [], color=shade, linewidth=8, label=label, alpha=alpha)
        for shade, label, alpha in ((BLUE, "AP", 1.0), (ORANGE, "AP50", 0.55))
    ]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_title(f"Held-out objects by class (how many); mean AP of boxes {mean:.1%}")
    return figure
