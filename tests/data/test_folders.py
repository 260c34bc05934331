"""A folder's parts and classes, and what is said of a folder that has none."""

import os
import shutil
import subprocess
import sys

import pytest
from data.pictures import picture, write_folder

from acmix.data.folders import open_folder, part_names
from acmix.data.sources import SPLITS

TRAIN = SPLITS["train"]


def names_of(images):
    return [images.class_names[label] for label in images.labels]


@pytest.mark.parametrize("below", ["", "train"])
def test_the_first_folder_names_the_class(tmp_path, below):
    counts = {"cat/kitchen": 1, "cat/garden": 2, "dog": 2, "dog/kitchen": 1}
    write_folder(tmp_path / below, counts)
    images = open_folder(tmp_path, TRAIN, train=True)
    assert images.class_names == ["cat", "dog"]
    assert names_of(images) == ["cat"] * 3 + ["dog"] * 3


ORDER = """
import sys
from pathlib import Path
from acmix.data.folders import open_folder
images = open_folder(Path(sys.argv[1]), ("train", "training"), train=True)
print(images.class_names, images.labels, images.files)
"""


@pytest.mark.slow
def test_every_process_has_the_same_order(tmp_path):
    write_folder(tmp_path, dict.fromkeys(["1", "01", "001", "10", "2", "Cat", "cat"], 1))
    for name in ("1.png", "01.png", "001.png"):
        picture(3).save(tmp_path / "cat" / name)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ORDER, str(tmp_path)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
        )
        for seed in ("1", "2")
    ]
    said = {process.communicate()[0] for process in processes}
    [order] = said
    assert order.startswith(b"['001', '01', '1', '2', '10', 'Cat', 'cat']")


def test_the_set_counts_what_it_left_out(tmp_path, capsys):
    write_folder(tmp_path, {"cat": 2, "dog": 1})
    shutil.copy(tmp_path / "cat" / "0.png", tmp_path / "cat" / "._0.png")
    (tmp_path / "dog" / "9.heic").write_bytes(b"x")
    (tmp_path / "__MACOSX").mkdir()
    images = open_folder(tmp_path, TRAIN, train=True)
    assert [len(paths) for paths in images.found] == [3, 2, 1]
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"data.source: passed over 2 files (such as {tmp_path}/__MACOSX)")
    assert f"; 1 file ({tmp_path}/dog/9.heic) with no suffix" in line


def test_two_forms_of_one_name_are_refused(tmp_path):
    write_folder(tmp_path, {"caf\u00e9": 1, "cafe\u0301": 1})
    with pytest.raises(ValueError, match=r"two forms of one name, 'cafe\\u0301' and 'caf\\xe9'"):
        open_folder(tmp_path, TRAIN, train=True)


def test_a_name_is_the_same_class_in_either_form(tmp_path):
    write_folder(tmp_path / "train", {"cafe\u0301": 1, "bar": 1})
    write_folder(tmp_path / "val", {"caf\u00e9": 1, "bar": 1})
    parts = [open_folder(tmp_path, SPLITS[part], part == "train") for part in ("train", "val")]
    assert [part.class_names for part in parts] == [["bar", "caf\u00e9"]] * 2


def test_a_class_may_be_a_link(tmp_path):
    write_folder(tmp_path / "elsewhere", {"cats": 2})
    write_folder(tmp_path / "pets", {"dog": 1})
    (tmp_path / "pets" / "cat").symlink_to(tmp_path / "elsewhere" / "cats")
    assert names_of(open_folder(tmp_path / "pets", TRAIN, train=True)) == ["cat", "cat", "dog"]


def test_a_class_whose_link_is_broken_is_named(tmp_path):
    write_folder(tmp_path, {"dog": 1, "owl": 1})
    (tmp_path / "cat").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"expected a folder, got a broken link .*/cat$"):
        open_folder(tmp_path, TRAIN, train=True)


def test_a_class_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path, {"dog": 1, "owl": 1})
    scan = os.scandir

    def refuse(path):  # as root may read everything
        if str(path).endswith("owl"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"^data.source: cannot read .*/owl: Permission denied$"):
        open_folder(tmp_path, TRAIN, train=True)


def test_no_images_name_what_was_looked_for(tmp_path):
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match=r"images in .*/CLASS/, got none \(looked for .*\.pgm"):
        open_folder(tmp_path, TRAIN, train=True)
    (tmp_path / "cat" / "a\nb.heic").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"got none \(passed over 1 file .*a\\nb\.heic"):
        open_folder(tmp_path, TRAIN, train=True)


def test_images_beside_the_classes_are_refused(tmp_path):
    write_folder(tmp_path, {"cat": 1})
    picture(1).save(tmp_path / "logo.png")
    with pytest.raises(ValueError, match=r"expected .*/CLASS/IMAGE, got .*/logo\.png"):
        open_folder(tmp_path, TRAIN, train=True)


def test_folders_that_look_like_parts_are_no_classes(tmp_path):
    for part in ("training_set", "Test"):
        write_folder(tmp_path / part, {"cat": 1, "dog": 1})
    assert open_folder(tmp_path, TRAIN, train=True) is None
    assert part_names(tmp_path, TRAIN) == ("Test", "training_set")


def test_parts_of_other_names_are_known_beside_those_of_usual_ones(tmp_path):
    for part in ("train", "validate", "holdout"):
        write_folder(tmp_path / part, {"cat": 1})
    write_folder(tmp_path, {"figures": 1})
    assert part_names(tmp_path, TRAIN) == ("train", "holdout", "validate")
