"""Pictures from plain data, edge cases first: they are drawn, readable as PNG, and not blank."""

import matplotlib.image
import numpy as np
import pytest
import torch

from acmix.analysis import figures, fonts
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
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert [text.startswith("✗") for text in texts] == [True] * mistakes + [False] * (10 - mistakes)
    assert len(figure.axes[0].images) == len(figure.axes[0].patches) == 10


def test_pictures_of_a_grid_keep_their_shape_and_do_not_touch(tmp_path):
    pictures = [np.full((4, 4 + 3 * n), 0.5) for n in range(10)]
    figure = figures.images(pictures, [f"name {n}" for n in range(10)], "title")
    drawn(figure, tmp_path / "images.png")
    boxes = [image.get_window_extent() for image in figure.axes[0].images]
    for picture, box in zip(pictures, boxes, strict=True):
        assert box.width / box.height == pytest.approx(picture.shape[1] / picture.shape[0])
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


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


NAMES = ["Ba$$in", "$50%$", "a_b^{c}", "two\nlines\tand a tab", "caf\u00e9"]


@pytest.mark.filterwarnings("error")
def test_a_name_is_never_mathematics(tmp_path):
    counts = np.eye(len(NAMES), dtype=int)
    rows = [
        {"class": name, "images": 3, "precision": 0.5, "recall": 1.0, "f1": 0.7} for name in NAMES
    ]
    image = np.zeros((4, 4, 3))
    drawn = [
        figures.confusion(counts, NAMES),
        figures.classes(rows),
        figures.images([image] * 5, NAMES, "$x"),
        figures.predictions([image] * 5, NAMES, NAMES[::-1], [0.5] * 5, "$5 and $6"),
        figures.ablation(
            [
                {
                    "variant": name,
                    "accuracy": 0.5,
                    "train_images_per_second": 3.0,
                    "infer_images_per_second": 4.0,
                }
                for name in NAMES
            ],
            "50 $",
        ),
    ]
    for number, figure in enumerate(drawn):
        figures.save(figure, tmp_path / f"{number}.png")
    said = {text.get_text() for text in fonts.texts_of(drawn[2])}
    assert {"Ba$$in", "$50%$", r"two\nlines\tand…"} <= said


@pytest.fixture
def no_letter_told(monkeypatch):
    monkeypatch.setattr(fonts, "_said", set())
    yield
    fonts.families_for.cache_clear()


@pytest.mark.filterwarnings("error")
def test_letters_of_no_font_are_told_once(tmp_path, capsys, monkeypatch, no_letter_told):
    monkeypatch.setattr(fonts.font_manager.fontManager, "ttflist", [])
    fonts.families_for.cache_clear()
    for name in ("cat 猫", "dog 犬 猫"):
        figures.save(figures.images([np.zeros((4, 4))], [name], "animals"), tmp_path / "a.png")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("no font of this system shows 猫: pictures have boxes")
    assert second.startswith("no font of this system shows 犬: ")


@pytest.mark.filterwarnings("error")
def test_letters_are_drawn_in_a_font_that_has_them(tmp_path, capsys, no_letter_told):
    """Letters that only a mathematical font of matplotlib has stand for another script."""
    usual = fonts.letters_of(fonts.font_manager.findfont(fonts.USUAL))
    entries = fonts.font_manager.fontManager.ttflist
    letter = next(
        min(more)
        for entry in sorted(entries, key=lambda entry: entry.name)
        if entry.style == "normal" and entry.weight == 400 and entry.name.startswith("STIX")
        if (more := {of for of in fonts.letters_of(entry.fname) - usual if of.isprintable()})
    )
    figure = figures.images([np.zeros((4, 4))], [f"a {letter}"], "letters")
    figures.save(figure, tmp_path / "a.png")
    assert capsys.readouterr().err == ""
    families = figure.axes[0].texts[0].get_fontfamily()
    assert families[0] == fonts.USUAL
    assert any(letter in fonts.letters_of(fonts.font_manager.findfont(of)) for of in families[1:])


@pytest.mark.parametrize("limit", [4, 8, 40])
def test_what_is_shown_is_spread_over_classes_the_surest_mistakes_first(limit):
    truth = [0] * 30 + [1] * 30 + [2] * 4
    predicted = [1] * 20 + [0] * 10 + [0] * 3 + [1] * 27 + [2] * 4
    confidence = [(index * 37 % 64) / 64 for index in range(64)]
    shown = figures.choose_shown(truth, predicted, confidence, limit)
    assert len(shown) == len(set(shown)) == min(limit, 64)
    wrong = [index for index in shown if truth[index] != predicted[index]]
    right = shown[len(wrong) :]
    assert all(truth[index] == predicted[index] for index in right)
    assert len(right) >= limit // 4
    assert {truth[index] for index in wrong[:2]} == {0, 1}
    assert {truth[index] for index in right[:3]} == set(range(min(3, len(right))))
    surest = max((i for i in range(20) if truth[i] == 0), key=lambda i: confidence[i])
    assert wrong[0] == surest


def test_few_mistakes_leave_room_for_right_ones():
    assert figures.choose_shown([0, 1, 1], [1, 1, 1], [0.5, 0.6, 0.9], 2) == [0, 2]
    assert figures.choose_shown([], [], [], 4) == []


def test_rows_of_an_ablation_lie_within_the_frame():
    rows = [
        {
            "variant": name,
            "accuracy": accuracy,
            "train_images_per_second": speed,
            "infer_images_per_second": speed,
        }
        for name in ("conv", "acmix")
        for accuracy, speed in ((0.5, 1.0), (0.9, 90.0))
    ]
    for axes in figures.ablation(rows, "two").axes:
        bottom, top = axes.get_ylim()
        assert (bottom, top) == (1.6, -0.6)
        left, right = axes.get_xlim()
        for line in axes.lines:
            assert min(line.get_xdata()) >= left
            assert max(line.get_xdata()) <= right
        ends = [
            end for bars in axes.collections for path in bars.get_paths() for end in path.vertices
        ]
        assert all(left <= x <= right for x, _ in ends)
