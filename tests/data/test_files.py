"""The scan of a folder: which files are its images, in which order, and what is left out."""

import os
import random
import sys

import pytest

from acmix.data.files import EXTENSIONS, find_images, natural_order
from acmix.errors import printable


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def below(root, paths):
    return [os.path.relpath(path, root).replace(os.sep, "/") for path in paths]


def test_what_systems_and_tools_leave_is_hidden(tmp_path):
    write(
        tmp_path, "cat/0.jpg", "cat/._0.jpg", "__MACOSX/cat/0.jpg", "cat/.DS_Store", "cat/~$0.png"
    )
    write(tmp_path, "cat/Thumbs.db", "cat/desktop.ini", "cat/0.jpg~", ".git/1.png", "@eaDir/2.jpg")
    write(tmp_path, "cat/.ipynb_checkpoints/0.jpg", "lost+found/3.jpg", "$RECYCLE.BIN/4.jpg")
    found = find_images(tmp_path)
    assert below(tmp_path, found.images) == ["cat/0.jpg"]
    assert len(found.hidden) == 12
    assert found.passed_over == []
    first = tmp_path / "$RECYCLE.BIN"
    assert found.remark() == f"passed over 12 files (such as {first}) left by systems and tools"


def test_every_picture_that_pillow_reads_is_looked_for(tmp_path):
    names = ["0.jfif", "1.JPE", "2.pgm", "3.avif", "4.jp2", "5.mpo", "6.TIFF"]
    write(tmp_path, *names)
    assert below(tmp_path, find_images(tmp_path).images) == names
    assert not {".pdf", ".ps", ".eps", ".h5", ".mpg"} & set(EXTENSIONS)


def test_other_files_are_passed_over_and_text_is_not_mentioned(tmp_path):
    write(tmp_path, "a/0.png", "a/1.heic", "a/photo", "a/notes.txt", "labels.CSV", "a/2.mp4")
    found = find_images(tmp_path)
    assert below(tmp_path, found.images) == ["a/0.png"]
    assert below(tmp_path, found.passed_over) == ["a/1.heic", "a/photo"]
    first = tmp_path / "a" / "1.heic"
    assert found.remark() == (
        f"passed over 2 files (such as {first}) with no suffix of an image that Pillow reads"
    )


def test_nothing_left_out_is_not_mentioned(tmp_path):
    write(tmp_path, "a/0.png")
    assert find_images(tmp_path).remark() is None


@pytest.mark.skipif(sys.platform == "win32", reason="pipes with a name are POSIX")
def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # which would wait for ever to be read
    assert below(tmp_path, find_images(tmp_path).passed_over) == ["pipe.png"]


def test_links_are_followed_without_going_round(tmp_path):
    write(tmp_path / "elsewhere", "0.png", "deep/1.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deep" / "back").symlink_to(root)
    (root / "lost.png").symlink_to("nowhere.png")
    images = below(root, find_images(root).images)
    assert images == ["cat/0.png", "cat/deep/1.png", "lost.png"]


def test_the_order_is_natural_and_total():
    names = ["1", "01", "001", "2", "10", "Cat", "cat", "m²", "²", "caf\u00e9", "cafe\u0301"]
    expected = ["001", "01", "1", "2", "10", "cafe\u0301", "caf\u00e9", "Cat", "cat", "m²", "²"]
    for seed in range(5):
        random.Random(seed).shuffle(names)
        assert sorted(names, key=natural_order) == expected


@pytest.mark.parametrize(("text", "shown"), [("a\nb", r"a\nb"), ("é \udcff", r"é \udcff")])
def test_a_name_is_shown_on_one_line(text, shown):
    assert printable(text) == shown
