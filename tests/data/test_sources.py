"""Folders, shards and columns as people have them: names, orders, hidden files, modes."""

import json
import os
import subprocess
import sys
import tarfile
import unicodedata

import numpy as np
import pytest
from data.pictures import add, number_of, picture, write_folder, write_shards
from PIL import Image, ImageDraw

from acmix.data import Images
from acmix.data.files import find_images, natural_key, suffixes
from acmix.data.shards import open_shards
from acmix.data.sources import FolderImages, as_rgb, open_split

PLAIN = {"img_size": 8, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def classes_of(folder, **options):
    return Images(str(folder), **PLAIN, **options).class_names


def numbers(dataset):
    return [number_of(dataset[index][0]) for index in range(len(dataset))]


@pytest.mark.parametrize("between", ["kitchen", "kitchen/2024/new"])
def test_the_class_is_the_first_folder(tmp_path, between):
    for first, name in enumerate(("cat", "dog")):
        write_folder(tmp_path / name, {between: 2, "garden": 1}, first=10 * first)
    data = Images(str(tmp_path), **PLAIN)
    assert data.class_names == ["cat", "dog"]
    assert data.train_set().classes == [0, 0, 0, 1, 1, 1]
    assert sorted(numbers(data.train_set())) == [0, 1, 2, 10, 11, 12]


ALIKE = (["1", "01", "001", "10", "2"], ["Cat", "cat", "CAT", "dog"], ["a1b2", "a01b2", "a1b02"])


@pytest.mark.slow
def test_the_order_of_classes_and_images_is_the_same_in_every_process(tmp_path):
    for place, names in enumerate(ALIKE):
        for name in names:
            folder = write_folder(tmp_path / str(place), {name: 1}) / name
            picture(0).save(folder / "IMAGE.png")
            picture(0).save(folder / "image.png")
    code = (
        "import sys, json; from acmix.data.sources import open_split\n"
        "for folder in sys.argv[1:]:\n"
        "  images = open_split(folder, ('train',))\n"
        "  print(json.dumps([images.class_names, images.labels, list(map(images.name, range(9)))]))"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code, *(str(tmp_path / str(place)) for place in range(3))],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1]
    for names, line in zip(ALIKE, found[0].splitlines(), strict=True):
        assert set(json.loads(line)[0]) == set(names)


def test_numbers_in_names_sort_by_their_value():
    names = ["10", "2", "img10", "img9", "1", "01", "b", "B", "a"]
    expected = ["01", "1", "2", "10", "a", "B", "b", "img9", "img10"]
    assert sorted(names, key=natural_key) == expected


LEFT = ["._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", "0.png~", ".git/0.png", "@eaDir/0.png"]


@pytest.mark.parametrize("left", [*LEFT, "__MACOSX/cat/0.png", ".ipynb_checkpoints/0.png"])
def test_what_tools_leave_behind_is_skipped_and_counted(tmp_path, capsys, left):
    write_folder(tmp_path, {"cat": 2, "dog": 2})
    for path in (tmp_path / "cat" / left, tmp_path / left):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no picture")
    data = Images(str(tmp_path), val_fraction=0.5, **PLAIN)
    assert data.class_names == ["cat", "dog"]
    assert sorted(numbers(data.train_set()) + numbers(data.val_set())) == [0, 1, 2, 3]
    assert "files passed over: 2 hidden (" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "said"), [("0.heic", True), ("0", True), ("notes.txt", False)])
def test_an_image_of_no_known_suffix_is_not_passed_over_in_silence(tmp_path, capsys, name, said):
    write_folder(tmp_path, {"cat": 2, "dog": 2})
    picture(1).save(tmp_path / "cat" / name, "png")
    assert len(open_split(str(tmp_path), ("train",)).labels) == 4
    err = capsys.readouterr().err
    assert err == (
        f"{tmp_path}: files passed over: 1 of no known suffix ({tmp_path}/cat/{name})\n"
        if said
        else ""
    )


def test_every_suffix_that_pillow_reads_is_looked_for(tmp_path):
    assert {".jpg", ".JPG".lower(), ".jfif", ".jpe", ".pgm", ".webp", ".avif", ".tga"} <= suffixes()
    assert not {".pdf", ".eps", ".h5", ".mpg"} & suffixes()
    for number, suffix in enumerate((".pgm", ".JFIF", ".tga")):
        (tmp_path / "cat").mkdir(exist_ok=True)
        picture(number).convert("L").save(tmp_path / "cat" / f"{number}{suffix}")
    write_folder(tmp_path, {"dog": 3})
    assert open_split(str(tmp_path), ("train",)).labels == [0, 0, 0, 1, 1, 1]


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_folder(tmp_path / "store", {"cat": 2, "dog": 1})
    folder = tmp_path / "pets"
    folder.mkdir()
    (folder / "cat").symlink_to(tmp_path / "store" / "cat")
    (folder / "dog").symlink_to(tmp_path / "store" / "dog")
    (tmp_path / "store" / "cat" / "again").symlink_to(tmp_path / "store" / "cat")
    (folder / "dog" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    found = find_images(folder)
    assert [path.name for path in found.images] == ["0.png", "1.png", "2.png", "lost.png"]


def test_accents_are_spelt_in_one_way(tmp_path):
    one, two = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert one != two
    write_folder(tmp_path / "train", {two: 1, "the": 1})
    write_folder(tmp_path / "val", {one: 1, "the": 1})
    data = Images(str(tmp_path), **PLAIN)
    assert data.class_names == [one, "the"]
    assert data.val_set().classes == [0, 1]
    write_folder(tmp_path / "train", {one: 1})
    with pytest.raises(ValueError, match=r"expected one folder a class .*: 'cafe"):
        Images(str(tmp_path), **PLAIN)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path, {"cat": 1, "dog": 1})

    def scandir(folder, _scandir=os.scandir):  # root reads everything
        if folder.name == "dog":
            raise PermissionError(13, "Permission denied", str(folder))
        return _scandir(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"data\.source: Permission denied: .*dog"):
        classes_of(tmp_path)


def test_parts_in_capitals(tmp_path):
    write_folder(tmp_path / "Train", {"cat": 2, "dog": 2})
    write_folder(tmp_path / "VAL", {"cat": 1, "dog": 1})
    data = Images(str(tmp_path), **PLAIN)
    assert (len(data.train_set()), len(data.val_set())) == (4, 2)


def test_a_source_is_found_again_from_anywhere(tmp_path, monkeypatch):
    write_folder(tmp_path / "pets", {"cat": 2, "dog": 2})
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for source in ("~/pets", "pets", "./pets/", str(tmp_path / "pets")):
        data = Images(source, root="~/cache", **PLAIN)
        assert data.source == str(tmp_path / "pets")
        assert data.root == str(tmp_path / "cache")


def glyph(mode):
    """A black bar on transparent ground."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((0, 0, 3, 7), fill=(0, 0, 0, 255))
    if mode == "P":
        return image.quantize(4)
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize(
    ("background", "colour"), [("white", (255,) * 3), ("#ff8000", (255, 128, 0))]
)
def test_what_is_transparent_lies_on_a_background(tmp_path, mode, background, colour):
    (tmp_path / "black").mkdir()
    path = tmp_path / "black" / "glyph.png"
    glyph(mode).save(path)
    pixels = np.asarray(as_rgb(Image.open(path), background))
    assert tuple(pixels[0, 0]) == (0, 0, 0)
    assert tuple(pixels[0, 7]) == colour
    write_folder(tmp_path, {"other": 1})
    data = Images(str(tmp_path), background=background, crop_pct=1.0, **PLAIN)
    [image] = [data.eval_transform(as_rgb(Image.open(path), data.background))]
    assert (image[:, 0, 7] * 255).round().tolist() == list(colour)
    assert data.input_config["background"] == background


def test_a_background_that_is_no_colour_is_refused(tmp_path):
    write_folder(tmp_path, {"cat": 1, "dog": 1})
    with pytest.raises(ValueError, match=r"data\.background: expected a colour .*, got 'whit'"):
        Images(str(tmp_path), background="whit", **PLAIN)


@pytest.mark.parametrize("suffix", [".pgm", ".png", ".tif"])
def test_sixteen_bits_in_any_file(tmp_path, suffix):
    values = np.full((4, 4), 256 * 77, dtype=np.uint16)
    path = tmp_path / f"image{suffix}"
    if suffix == ".pgm":
        path.write_bytes(b"P5 4 4 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    assert np.unique(np.asarray(as_rgb(Image.open(path)))) == [77]


def test_more_than_sixteen_bits_are_refused():
    image = Image.fromarray(np.full((2, 2), 1 << 16, dtype=np.int32))
    with pytest.raises(ValueError, match="expected 8 or 16 bits a channel, got mode I"):
        as_rgb(image)


def test_shards_of_another_part_are_left_alone(tmp_path):
    folder = tmp_path / "wds"
    for first, split in enumerate(("train", "trainval", "train_extra", "train2-a")):
        write_shards(folder, split, [2], first=10 * first)
    assert [url.rsplit("/", 1)[1] for url in open_shards(str(folder), ("train",)).urls] == [
        "train-000.tar"
    ]
    for name in ("train.tar", "train_7.tar", "train-00001-of-00002.tar", "train0003.tar"):
        (folder / "train-000.tar").rename(folder / name)
        assert open_shards(str(folder), ("train",)).lengths == [2]
        (folder / name).rename(folder / "train-000.tar")


def write_tar(path, *members):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in members:
            add(tar, name, b"1" if name.endswith(".cls") else b"no picture")
    return path


def test_keys_with_dots_are_refused_with_the_shard_and_the_member(tmp_path):
    path = write_tar(tmp_path / "wds" / "train-0.tar", "img.0001.jpg", "img.0001.cls")
    with pytest.raises(ValueError, match=f"{path}: expected keys without dots, got img.0001.cls"):
        open_shards(str(path.parent), ("train",))


def test_a_member_that_is_there_twice_is_named_with_its_shard(tmp_path):
    path = write_tar(tmp_path / "wds" / "train-0.tar", "a.jpg", "a.cls", "b.jpg", "b.jpg", "b.cls")
    data = Images(f"wds/{path.parent}", max_corrupt=9, **PLAIN)
    with pytest.raises(ValueError, match=f"cannot read {path}: b.jpg is there twice$"):
        list(data.train_dataloader())


def test_a_shard_without_classes_is_named(tmp_path):
    path = write_tar(tmp_path / "wds" / "train-0.tar", "a.jpg", "b.jpg")
    with pytest.raises(ValueError, match=f"expected KEY.cls beside KEY.jpg in {path}"):
        open_shards(str(path.parent), ("train",))


@pytest.fixture
def hub(tmp_path):
    """A Hugging Face data set of these columns, as one loads from a folder."""
    datasets = pytest.importorskip("datasets")

    def make(image="img", label="label", null=False, **more):
        pictures = [None if null and n == 1 else picture(n) for n in range(4)]
        columns = {image: datasets.Image(), label: datasets.ClassLabel(names=["cat", "dog"])}
        values = {image: pictures, label: [0, 1, 0, 1]}
        for name, column in more.items():
            columns[name], values[name] = datasets.Value("string"), column
        data = datasets.Dataset.from_dict(values, datasets.Features(columns))
        (tmp_path / "set" / "data").mkdir(parents=True)
        data.to_parquet(str(tmp_path / "set" / "data" / "train-0.parquet"))
        return f"hfds/{tmp_path / 'set'}", str(tmp_path / "cache")

    return make


def test_the_column_of_images_is_found_by_its_type(hub):
    source, root = hub(image="img", label="fine_label", title=["a", "b", "c", "d"])
    data = Images(source, root=root, **PLAIN)
    assert data.class_names == ["cat", "dog"]
    assert numbers(data.train_set()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"image_key": "image"}, r"data\.image_key: expected a column of type Image, got 'image'"),
        ({"label_key": "title"}, r"data\.label_key: expected a column of type ClassLabel, got 'ti"),
    ],
)
def test_a_column_that_is_not_there_is_told_with_those_that_are(hub, option, said):
    source, root = hub(title=["a", "b", "c", "d"])
    with pytest.raises(ValueError, match=said + r".*; there are img \(Image\), label \(Cl"):
        Images(source, root=root, **option, **PLAIN)


def test_a_null_counts_as_corrupt(hub, capsys):
    source, root = hub(null=True)
    data = Images(source, root=root, max_corrupt=1, **PLAIN)
    assert numbers(data.train_set()) == [0, 2, 3]
    assert "skipped 1 of at most 1: " in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"cannot read image 1 of train of .*: no image \(null\)"):
        Images(source, root=root, **PLAIN).train_set()[1]


def test_a_folder_of_classes_opens_by_hand(tmp_path):
    write_folder(tmp_path, {"b": 1, "a": 1})
    images = FolderImages(tmp_path, find_images(tmp_path).images)
    assert (images.class_names, images.labels) == (["a", "b"], [0, 1])
