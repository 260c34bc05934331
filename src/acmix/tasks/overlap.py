"""Measures of segmentation, from how many pixels of each class were taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]
MEASURES = ("miou", "pixel_accuracy", "mean_accuracy")


def measures(counts: np.ndarray) -> dict[str, float]:
    """Mean IoU, pixel accuracy and mean accuracy; counts (classes, classes) by truth, prediction.

    A class that is neither there nor predicted has no IoU, and one that is not there no accuracy:
    a mean is over the others. Where there is nothing to average, it is 0.
    """
    right, truth, predicted = parts(counts)
    union = truth + predicted - right
    return {
        "miou": _mean(right[union > 0] / union[union > 0]),
        "pixel_accuracy": float(right.sum() / max(1, truth.sum())),
        "mean_accuracy": _mean(right[truth > 0] / truth[truth > 0]),
    }


def per_class(counts: np.ndarray, names: Sequence[str]) -> list[Row]:
    """Pixels, their share of all, IoU and accuracy of each class; None where there is none."""
    right, truth, predicted = parts(counts)
    union, total = truth + predicted - right, max(1, truth.sum())
    return [
        {
            "class": name,
            "pixels": int(truth[index]),
            "share": float(truth[index] / total),
            "predicted_share": float(predicted[index] / total),
            "iou": float(right[index] / union[index]) if union[index] else None,
            "accuracy": float(right[index] / truth[index]) if truth[index] else None,
        }
        for index, name in enumerate(names)
    ]


def parts(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each class: pixels that are right, that are of it, that are taken for it."""
    return counts.diagonal(), counts.sum(1), counts.sum(0)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
