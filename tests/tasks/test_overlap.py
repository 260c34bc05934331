"""Measures of segmentation against plain counting, and what is not there."""

import math

import numpy as np
import pytest

from acmix.tasks.overlap import measures, per_class


def confusion(truth, found, classes):
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (truth, found), 1)
    return counts


def test_measures_are_those_of_the_pixels():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 500)
    found = np.where(rng.random(500) < 0.6, truth, rng.integers(0, 4, 500))
    measured = measures(confusion(truth, found, 4))
    ious, accuracies = [], []
    for index in range(4):
        there, said = truth == index, found == index
        ious.append((there & said).sum() / (there | said).sum())
        accuracies.append((there & said).sum() / there.sum())
    assert measured == pytest.approx(
        {
            "miou": np.mean(ious),
            "pixel_accuracy": (truth == found).mean(),
            "mean_accuracy": np.mean(accuracies),
        }
    )
    rows = per_class(confusion(truth, found, 4), "abcd")
    assert [row["iou"] for row in rows] == pytest.approx(ious)
    assert [row["accuracy"] for row in rows] == pytest.approx(accuracies)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert [row["predicted_share"] for row in rows] == [np.mean(found == n) for n in range(4)]


def test_a_class_that_is_nowhere_is_in_no_mean():
    """Class 1 is neither there nor found, 2 is found alone, 3 is there alone."""
    counts = confusion([0, 0, 0, 3], [0, 0, 2, 0], 4)
    assert measures(counts) == pytest.approx(
        {"miou": (2 / 4 + 0 + 0) / 3, "pixel_accuracy": 0.5, "mean_accuracy": (2 / 3 + 0) / 2}
    )
    rows = per_class(counts, "abcd")
    assert [row["iou"] for row in rows] == [0.5, None, 0.0, 0.0]
    assert [row["accuracy"] for row in rows] == [pytest.approx(2 / 3), None, None, 0.0]


def test_no_pixel_at_all_is_no_nan():
    counts = np.zeros((3, 3), np.int64)
    assert measures(counts) == {"miou": 0.0, "pixel_accuracy": 0.0, "mean_accuracy": 0.0}
    assert not any(math.isnan(row["share"]) for row in per_class(counts, "abc"))
