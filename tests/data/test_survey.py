"""A survey counts every image once, and knows equal ones."""

import threading
import time

import pytest
from data.pictures import picture, write_folder, write_shards
from PIL import Image

from acmix.data import Digits, Images
from acmix.data.folders import open_folder
from acmix.data.images import pictures_of
from acmix.data.survey import Broken, Span, duplicates, in_threads, survey


@pytest.fixture
def parts(tmp_path):
    train = write_folder(tmp_path / "train", {"cat": 3, "dog": 2, "owl": 1})
    picture(0, size=(30, 20)).save(train / "cat" / "0.png")
    picture(4).convert("RGBA").save(train / "dog" / "again.webp", lossless=True)
    Image.new("L", (5, 5)).save(train / "owl" / "9.png")
    (train / "owl" / "5.png").write_bytes(b"")
    write_folder(tmp_path / "val", {"cat": 1}, first=2)
    return [open_folder(tmp_path, (part,), part == "train") for part in ("train", "val")]


def look(part, **options):
    return survey(pictures_of(part, range(len(part.labels))), **options)


@pytest.mark.parametrize("jobs", [1, 4, None])
def test_every_image_is_counted(parts, jobs):
    train, _ = parts
    calls = []
    found = look(train, jobs=jobs, progress=lambda: calls.append(1))
    assert found.counts == {"cat": 3, "dog": 3, "owl": 1}
    assert (found.width, found.height) == (Span(5, 10, 30), Span(5, 12, 20))
    assert found.modes == {"RGB": 6, "L": 1}
    assert found.broken == [Broken(train.files[6], "no image")]
    assert len(calls) == 8


def test_the_first_of_each_class_keep_a_thumbnail(parts):
    shown = [image for image in look(parts[0], shown=2).seen if image.thumbnail is not None]
    assert [image.classes[0] for image in shown] == ["cat", "cat", "dog", "dog", "owl"]
    assert shown[0].thumbnail.shape == (20, 30, 3)
    assert shown[0].thumbnail.max() <= 1


def test_equal_pictures_are_found_within_and_across_parts(parts):
    surveys = [look(part) for part in parts]
    names = [
        [image.name.rpartition("/")[2] for _, image in group] for group in duplicates(*surveys)
    ]
    assert names == [["2.png", "2.png"], ["4.png", "again.webp"]]
    assert [place for place, _ in duplicates(*surveys)[0]] == [0, 1]
    assert duplicates(surveys[1]) == []


def test_images_of_shards_are_looked_at(tmp_path):
    write_shards(tmp_path / "wds", "train", [3, 2])
    write_shards(tmp_path / "wds", "val", [1], first=4)
    data = Images(f"wds/{tmp_path / 'wds'}", img_size=8)
    surveys = [survey(data.pictures(part)) for part in ("train", "val")]
    assert [dict(of.counts) for of in surveys] == [{"0": 2, "1": 2, "2": 1}, {"1": 1}]
    [[(_, one), (_, two)]] = duplicates(*surveys)
    assert one.name.endswith("train-001.tar/00004")
    assert two.name.endswith("val-000.tar/00004")


def test_digits_are_looked_at():
    found = survey(Digits().pictures("val"))
    assert len(found.seen) == 360
    assert (found.width, found.modes) == (Span(8, 8, 8), {"L": 360})


def test_no_images_are_no_error():
    found = survey([])
    assert (found.width, found.broken, duplicates(found), found.counts) == (None, [], [], {})


def test_who_stops_asking_does_not_wait_for_the_rest():
    begun = []

    def slow(item):
        begun.append(item)
        time.sleep(0.01)
        return item

    results = in_threads(slow, range(1000), jobs=2)
    assert next(results) == 0
    results.close()
    assert len(begun) < 100
    assert threading.active_count() < 20
