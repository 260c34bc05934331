"""Pictures from plain data, edge cases first: they are drawn, readable as PNG, and not blank."""

import matplotlib.image
import numpy as np
import pytest
import torch

from acmix.analysis import figures
from acmix.analysis.explain import LayerView

EPOCHS = [
    {
        "epoch": epoch,
        "train_loss": 2 / epoch,
        "train_accuracy": 1 - 0.5 / epoch,
        "val_loss": 1 / epoch,
        "val_accuracy": 1 - 0.4 / epoch,
    }
    for epoch in range(1, 6)
]


def mix_rows(layers, epochs=3, alpha=0.6, beta=0.4):
    return [
        {"epoch": epoch, "layer": f"layer{index}", "alpha": alpha, "beta": beta}
        for epoch in range(epochs)
        for index in range(layers)
    ]


def drawn(figure, path):
    """The picture as written; fails where it is blank."""
    pixels = matplotlib.image.imread(figures.save(figure, path))
    assert pixels.std() > 0.01
    return pixels


@pytest.mark.parametrize("epochs", [0, 1, 5])
def test_curves(tmp_path, epochs):
    drawn(figures.curves(EPOCHS[:epochs]), tmp_path / "curves.png")


def test_curves_without_validation(tmp_path):
    rows = [{"epoch": 1, "train_loss": 1.0, "train_accuracy": 0.5}]
    figure = figures.curves(rows)
    drawn(figure, tmp_path / "curves.png")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Loss", "Accuracy"]


def test_curves_name_the_final_accuracy():
    assert "92.0%" in figures.curves(EPOCHS).axes[1].get_title(loc="left")


@pytest.mark.parametrize("layers", [1, 3, 16])
@pytest.mark.parametrize("epochs", [1, 3])
def test_mix(tmp_path, layers, epochs):
    figure = figures.mix(mix_rows(layers, epochs))
    drawn(figure, tmp_path / "mix.png")
    assert len(figure.axes[0].lines) == len(figure.axes[1].lines) == layers


@pytest.mark.parametrize(("alpha", "beta"), [(None, 1.0), (1.0, None), (0.0, 0.5), (-0.2, 0.5)])
def test_mix_of_missing_zero_and_negative_weights(tmp_path, alpha, beta):
    drawn(figures.mix(mix_rows(2, alpha=alpha, beta=beta)), tmp_path / "mix.png")


def test_mix_without_layers_is_refused():
    with pytest.raises(ValueError, match="expected layers that mix"):
        figures.mix([])


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.499), (None, 1.0), (0.0, 0.0)])
def test_final_weights_leave_room_above_the_markers(alpha, beta):
    axes = figures.mix(mix_rows(2, alpha=alpha, beta=beta)).axes[2]
    bottom, top = axes.get_ylim()
    assert bottom == 0
    assert top == pytest.approx(1.1 * max(alpha or 0, beta or 0) or 1)


@pytest.mark.parametrize(
    ("alpha", "beta", "expected"),
    [(1.0, 1.0, 0.0), (np.e, -1.0, 1.0), (None, 1.0, np.nan), (0.0, 1.0, np.nan)],
)
def test_log_ratio(alpha, beta, expected):
    np.testing.assert_allclose(figures.log_ratio(alpha, beta), expected)


@pytest.mark.parametrize("mistakes", [0, 1, 10])
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3)])
def test_predictions_show_mistakes_first(tmp_path, mistakes, shape):
    images = [np.full(shape, 0.5) for _ in range(10)]
    truth = ["a"] * 10
    predicted = ["a"] * (10 - mistakes) + ["b"] * mistakes
    figure = figures.predictions(images, truth, predicted, [0.9] * 10, "title")
    drawn(figure, tmp_path / "predictions.png")
    titles = [axes.get_title() for axes in figure.axes]
    assert [title.startswith("✗") for title in titles[:10]] == [True] * mistakes + [False] * (
        10 - mistakes
    )


def test_predictions_without_images(tmp_path):
    drawn(figures.predictions([], [], [], [], "title"), tmp_path / "predictions.png")


@pytest.mark.parametrize("classes", [2, 20, 50])
def test_confusion(tmp_path, classes):
    counts = np.diag(np.arange(classes)) + np.eye(classes, k=1, dtype=int)
    figure = figures.confusion(counts, ["a class of a long name"] * classes)
    drawn(figure, tmp_path / "confusion.png")
    axes = figure.axes[0]
    right = np.arange(classes).sum()
    assert axes.get_title(loc="left") == f"{right / counts.sum():.1%} of {counts.sum():,} right"
    numbers = [text.get_text() for text in axes.texts]
    assert numbers == ([str(n) for n in counts[counts > 0]] if classes <= 20 else [])


@pytest.mark.parametrize("shape", [(8, 8), (8, 12, 3)])
@pytest.mark.parametrize("layers", [1, 16])
@pytest.mark.slow
def test_views_of_an_image(tmp_path, shape, layers):
    weights = torch.zeros(2, 4, 4)
    weights[:, 1, 2] = 1
    view = LayerView("layer", (1, 1), weights, torch.full((2, 2), 0.25))
    image = np.full(shape, 0.5)
    for figure in (
        figures.attention(image, [view] * layers, (3, 3), "row 3"),
        figures.shares(image, [view] * layers),
    ):
        drawn(figure, tmp_path / "views.png")
        titles = [axes.get_title(loc="left") for axes in figure.axes]
        assert sum(title.startswith("layer\n") for title in titles) == layers
    assert "25% attention" in titles[1]


def test_attention_of_no_layer_says_so():
    view = LayerView("layer", (0, 0), None, torch.zeros(2, 2))
    figure = figures.attention(np.zeros((8, 8)), [view], (0, 0), "")
    assert "No layer" in figure.axes[0].texts[0].get_text()


@pytest.mark.parametrize("seeds", [1, 3])
def test_ablation(tmp_path, seeds):
    rows = [
        {
            "variant": variant,
            "accuracy": 0.9 + 0.01 * seed,
            "train_images_per_second": 100.0,
            "infer_images_per_second": 300.0,
        }
        for variant in ("conv", "acmix")
        for seed in range(seeds)
    ]
    figure = figures.ablation(rows, "title")
    drawn(figure, tmp_path / "ablation.png")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["conv", "acmix"]
