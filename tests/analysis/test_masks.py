"""Pictures of masks from plain data: drawn, not blank, with the colours that their legend says."""

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from acmix.analysis import figures, masks

NAMES = ["sky", "road", "car", "a name that is too long for a legend"]


def drawn(figure, path):
    """The picture as written; fails where it is blank."""
    pixels = matplotlib.image.imread(figures.save(figure, path))
    assert pixels.std() > 0.01
    return pixels[..., :3]


def mask(height=12, width=16, classes=4):
    found = np.arange(height * width).reshape(height, width) % classes
    found[0] = masks.IGNORED
    return found


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shape", [(12, 16), (40, 9, 3)], ids=str)
def test_predictions(tmp_path, count, shape):
    images = [np.full(shape, 0.5)] * count
    figure = masks.predictions(
        images, [mask()] * count, [mask(24, 32)] * count, [0.25] * count, NAMES, "title"
    )
    drawn(figure, tmp_path / "predictions.png")
    assert legend(figure) == ["sky", "road", "car", "a name that is to…", "no class: ignored"]
    assert figure.axes[2].get_title(loc="left") == "found: mean IoU 25%"


def test_sheet_shows_image_and_mask_together(tmp_path):
    found = np.full((12, 16), 1)
    found[:, :8] = masks.IGNORED
    figure = masks.sheet([np.ones((12, 16, 3))], [found], NAMES, "title")
    drawn(figure, tmp_path / "sheet.png")
    assert legend(figure) == ["road", "no class: ignored"]


def test_paint():
    painted = masks.paint(np.array([[0, 2], [masks.IGNORED, 200]]))
    assert painted[0, 0] == pytest.approx(masks.colour(0))
    assert painted[0, 1] == pytest.approx(masks.colour(2))
    assert painted[1, 0] == pytest.approx(to_rgb(masks.NO_CLASS))
    assert painted[1, 1] == pytest.approx(masks.colour(200))
    assert masks.paint(np.full((2, 2), masks.IGNORED)).shape == (2, 2, 3)


def test_classes_have_colours_of_their_own():
    assert len({masks.colour(index) for index in range(150)}) == 150
    assert to_rgb(masks.NO_CLASS) not in {masks.colour(index) for index in range(150)}


def test_a_legend_of_many_classes_has_the_most_frequent():
    found = np.minimum(np.arange(900).reshape(30, 30), 39)  # the last is the most frequent
    figure = masks.sheet([np.ones((30, 30, 3))], [found], [f"class {n}" for n in range(40)], "t")
    assert len(legend(figure)) == masks.LEGEND + 1
    assert "class 39" in legend(figure)
    assert legend(figure)[-1] == "and 17 more"


def rows(ious):
    return [
        {"class": f"class {n}", "share": 0.1 * n, "iou": iou, "accuracy": iou}
        for n, iou in enumerate(ious)
    ]


@pytest.mark.parametrize("ious", [[0.2, None, 0.9], [0.0], [None], [0.5] * 60], ids=len)
def test_classes(tmp_path, ious):
    figure = masks.classes(rows(ious), 0.55)
    drawn(figure, tmp_path / "classes.png")
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    if len(ious) == 3:
        assert labels == ["class 2 (20.0%)", "class 0 (0.0%)", "class 1 (10.0%)"]
        assert "neither there nor found" in [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize("classes", [2, 21])
def test_confusion(tmp_path, classes):
    counts = np.eye(classes, dtype=np.int64) * 2_000_000
    counts[0, 1] = 2_000_000
    counts[-1] = 0  # of which there is none
    figure = masks.confusion(counts, [f"class {n}" for n in range(classes)])
    drawn(figure, tmp_path / "confusion.png")
    numbers = {text.get_text() for text in figure.axes[0].texts}
    assert numbers == ({"50"} if classes == 2 else set())
