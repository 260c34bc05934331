"""Hugging Face data sets: which columns are taken, and rows without an image."""

import pytest
from data.pictures import number_of, picture

from acmix.data import Images

datasets = pytest.importorskip("datasets")

PLAIN = {"img_size": 8, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
CLASSES = datasets.ClassLabel(names=["cat", "dog"])


@pytest.fixture
def write(tmp_path):
    """A set of four numbered pictures in Parquet files, which `hfds/` reads from a folder."""

    def write(**columns):
        kinds = {name: kind for name, (kind, _) in columns.items()}
        rows = {name: values for name, (_, values) in columns.items()}
        data = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
        (tmp_path / "pets").mkdir()
        for split in ("train", "validation"):
            data.to_parquet(tmp_path / "pets" / f"{split}.parquet")
        return {"source": f"hfds/{tmp_path}/pets", "root": str(tmp_path / "cache"), **PLAIN}

    return write


PICTURES = (datasets.Image(), [picture(number) for number in range(4)])
LABELS = (CLASSES, [0, 1, 0, 1])
NAMES = (datasets.Value("string"), ["a", "b", "c", "d"])


def test_columns_are_found_by_their_kinds(write):
    data = Images(**write(title=NAMES, img=PICTURES, fine=LABELS))
    assert data.class_names == ["cat", "dog"]
    val = data.val_set()
    assert [(number_of(image), label) for image, label in (val[i] for i in range(4))] == [
        (0, 0),
        (1, 1),
        (2, 0),
        (3, 1),
    ]


def test_of_several_columns_the_usual_or_the_chosen_one_is_taken(write):
    other = (datasets.Image(), [picture(number + 9) for number in range(4)])
    columns = {"image": PICTURES, "mask": other, "label": LABELS, "coarse": LABELS}
    options = write(**columns)
    assert number_of(Images(**options).val_set()[0][0]) == 0
    chosen = Images(**options, image_key="mask", label_key="coarse")
    assert number_of(chosen.val_set()[0][0]) == 9


@pytest.mark.parametrize(
    ("columns", "options", "said"),
    [
        ({"img": PICTURES, "a": LABELS, "b": LABELS}, {}, "label_key: .*got 2 of them among img"),
        ({"img": PICTURES, "label": NAMES}, {}, r"label_key: .*got 0 .*label \(Value\)"),
        ({"text": NAMES, "label": LABELS}, {}, r"image_key: .*got 0 .*text \(Value\)"),
        ({"img": PICTURES, "y": LABELS}, {"image_key": "image"}, "image_key: .*got 'image' among"),
        ({"img": PICTURES, "y": LABELS}, {"label_key": "img"}, "label_key: .*got 'img' among"),
        ({"img": PICTURES, "y": LABELS}, {"image_key": "y"}, "image_key: .*got 'y'"),
        ({"img": PICTURES, "y": (CLASSES, [0, 1, None, 1])}, {}, "a class of every image in train"),
        ({"img": PICTURES, "y": LABELS}, {"train_split": "tarin"}, "got train, validation"),
    ],
)
def test_the_columns_there_are_named(write, columns, options, said):
    with pytest.raises(ValueError, match=said) as caught:
        Images(**write(**columns), **options)
    assert "\n" not in str(caught.value)


def test_a_row_without_an_image_is_corrupt(write, capsys):
    rows = [picture(0), None, picture(2), picture(3)]
    options = write(img=(datasets.Image(), rows), label=LABELS)
    train = Images(**options, max_corrupt=1).train_set()
    assert train.indices == [0, 2, 3]
    [line] = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert "cannot read image 1 of train of hfds/" in line
    assert line.endswith(": no image in its row")
    with pytest.raises(ValueError, match="cannot read image 1 of validation of hfds/"):
        Images(**options).val_set()[1]
