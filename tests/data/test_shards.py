"""Shards: every image once, whoever reads, and on from any batch."""

import io
import json
import shutil
import tarfile
from collections import Counter

import pytest
import torch
from data.pictures import add, number_of, picture, write_shards
from torchvision.transforms.functional import to_tensor

from acmix.data.shards import Shards, ShardStream, make_shard_loader, open_shards, shard_splits

LENGTHS = [7, 1, 12, 5, 9]  # 34 images


@pytest.fixture
def shards(tmp_path):
    return open_shards(str(write_shards(tmp_path / "shards", "train", LENGTHS)), ("train",))


def stream_of(shards, **options):
    return ShardStream(shards, shards.class_names, to_tensor, **options)


def numbers(loader):
    return [[number_of(image) for image in images] for images, _ in loader]


def test_shards_of_a_folder_are_counted(shards):
    assert shards.lengths == LENGTHS
    assert shards.class_names == ["0", "1", "2"]


def test_info_names_classes_and_lengths(shards, tmp_path):
    names = [url.rsplit("/", 1)[1] for url in shards.urls]
    split = {"filenames": names, "shard_lengths": LENGTHS}
    info = {"class_names": ["x", "y", "z"], "splits": {"train": split}}
    (tmp_path / "shards" / "_info.json").write_text(json.dumps(info))
    found = open_shards(str(tmp_path / "shards"), ("train",))
    assert found == (shards.urls, LENGTHS, ["x", "y", "z"])
    assert open_shards(str(tmp_path / "shards"), ("val",)) is None


def test_a_shard_is_of_the_split_whose_name_it_has(tmp_path):
    for split in ("train", "trainval", "train_extra"):
        write_shards(tmp_path, split, [2])
    shutil.copy(tmp_path / "train-000.tar", tmp_path / "._train-001.tar")
    for name in ("train.tar", "train_1.tar", "train-00000-of-00010.tar"):
        shutil.copy(tmp_path / "train-000.tar", tmp_path / name)
    found = open_shards(str(tmp_path), ("train",))
    assert sorted(url.rpartition("/")[2] for url in found.urls) == [
        "train-000.tar",
        "train-00000-of-00010.tar",
        "train.tar",
        "train_1.tar",
    ]
    assert len(open_shards(str(tmp_path), ("train_extra",)).urls) == 1
    assert shard_splits(str(tmp_path)) == ("train", "train_extra", "trainval")


def test_what_systems_leave_is_no_sample(tmp_path):
    write_shards(tmp_path, "train", [2])
    with tarfile.open(tmp_path / "train-000.tar", "a") as tar:
        for name in ("pets/._0.png", "pets/._0.cls", "__MACOSX/0.png", "__MACOSX/0.cls"):
            add(tar, name, b"x")
    loader = make_shard_loader(
        stream_of(open_shards(str(tmp_path), ("train",))), batch_size=2, train=False
    )
    assert numbers(loader) == [[0, 1]]


WRONG = [
    (("img.0001.png", "img.0001.cls"), "expected keys without dots, got img.0001.cls"),
    (("a/b.c.png", "a/b.c.CLS"), "expected keys without dots, got a/b.c.cls"),
    (("0.png", "0.png", "0.cls"), "expected each member once, got 0.png twice"),
    (("0.png", "0.cls", "0.CLS"), "expected each member once, got 0.CLS twice"),
    (("0.cls.png", "1.cls"), "expected a class's number in 1.cls, got b'x'"),
]


@pytest.mark.parametrize(("members", "said"), WRONG, ids=[members[-1] for members, _ in WRONG])
def test_a_member_that_is_wrong_is_named_with_its_shard(tmp_path, members, said):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name in members:
            add(tar, name, b"x")
    with pytest.raises(ValueError, match=rf"^data.source: cannot read .*/train-0.tar: {said}$"):
        open_shards(str(tmp_path), ("train",))


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (("0.png", "0.png", "0.cls"), "train-0.tar: 0.png: duplicate file name"),
        (("img.0001.png", "img.0001.cls"), "train-0.tar/img: expected keys without dots"),
    ],
)
def test_a_wrong_member_is_named_as_it_comes_too(tmp_path, members, said):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name in members:
            add(tar, name, b"x")
    listed = Shards([str(tmp_path / "train-0.tar")], [1], ["0", "1"])
    with pytest.raises(ValueError, match=said) as caught:
        list(make_shard_loader(stream_of(listed), batch_size=1, train=False))
    assert "(" not in str(caught.value).partition(" (data.max_corrupt")[0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.slow
def test_held_out_images_come_once_and_in_order(shards, world, workers):
    options = {"batch_size": 4, "num_workers": workers, "world_size": world}
    loaders = [
        make_shard_loader(stream_of(shards), train=False, rank=rank, **options)
        for rank in range(world)
    ]
    read = [numbers(loader) for loader in loaders]
    assert [n for batches in read for batch in batches for n in batch] == list(range(34))
    assert [len(batches) for batches in read] == [len(loader) for loader in loaders]
    assert len({len(batches) for batches in read}) == 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_training_loses_and_repeats_nothing_but_the_last_part_of_a_batch(shards, world, workers):
    options = {"batch_size": 5, "num_workers": workers, "world_size": world}
    epochs = []
    loaders = [
        make_shard_loader(stream_of(shards, shuffle_buffer=6), train=True, rank=rank, **options)
        for rank in range(world)
    ]
    for epoch in range(2):
        for loader in loaders:
            loader.set_epoch(epoch)
        read = [batch for loader in loaders for batch in numbers(loader)]
        assert [len(batch) for batch in read] == [5] * (34 // (5 * world) * world)
        assert max(Counter(n for batch in read for n in batch).values()) == 1
        epochs.append(read)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_after_any_batch(shards, workers):
    def loader():
        stream = stream_of(shards, shuffle_buffer=6)
        return make_shard_loader(stream, batch_size=5, num_workers=workers, train=True, seed=3)

    whole = loader()
    whole.set_epoch(1)
    batches = numbers(whole)
    for start in range(1, len(batches)):
        resumed = loader()
        resumed.load_state_dict({**whole.state_dict(), "batches": start})
        resumed.set_epoch(1)
        assert numbers(resumed) == batches[start:]
        resumed.set_epoch(2)
        assert len(numbers(resumed)) == len(batches)


def test_augmentation_follows_from_seed_epoch_and_image(shards):
    def noise(image):
        return to_tensor(image) + torch.rand(())

    def epoch(number):
        stream = ShardStream(shards, shards.class_names, noise)
        loader = make_shard_loader(stream, batch_size=5, train=True)
        loader.set_epoch(number)
        state = torch.get_rng_state()
        images = torch.cat([images for images, _ in loader])
        assert torch.equal(state, torch.get_rng_state())
        return images

    assert torch.equal(epoch(0), epoch(0))
    assert not torch.equal(epoch(0), epoch(1))


def test_another_order_within_an_epoch_is_refused(shards):
    one = make_shard_loader(stream_of(shards), batch_size=5, train=True)
    two = make_shard_loader(stream_of(shards), batch_size=5, num_workers=2, train=True)
    with pytest.raises(ValueError, match="num_workers to be 0"):
        two.load_state_dict(one.state_dict())


@pytest.fixture
def broken(tmp_path):
    folder = write_shards(tmp_path / "broken", "train", [4])
    with tarfile.open(folder / "train-000.tar", "a") as tar:
        add(tar, "bad.png", b"no picture")
        add(tar, "bad.cls", b"1")
    return open_shards(str(folder), ("train",))


@pytest.mark.parametrize("train", [True, False])
def test_an_unreadable_image_is_named(broken, train):
    loader = make_shard_loader(stream_of(broken), batch_size=5, train=train)
    with pytest.raises(ValueError, match=r"train-000.tar/bad: .* \(data.max_corrupt: expected 0"):
        list(loader)


def test_unreadable_images_are_left_out_up_to_a_limit(broken, capsys):
    loader = make_shard_loader(stream_of(broken, max_corrupt=1), batch_size=2, train=False)
    assert [n for batch in numbers(loader) for n in batch] == [0, 1, 2, 3]
    assert "skipped 1 of at most 1" in capsys.readouterr().err


def test_training_keeps_its_number_of_steps(broken):
    loader = make_shard_loader(
        stream_of(broken, max_corrupt=1), batch_size=5, train=True, num_workers=1
    )
    [batch] = numbers(loader)
    assert set(batch) == {0, 1, 2, 3}


@pytest.mark.parametrize("label", ["-1", "3", "cat"])
def test_a_class_out_of_range_is_named(shards, label):
    file = io.BytesIO()
    picture(7).save(file, "png")
    raw = {"__key__": "7", "__url__": "x.tar", "png": file.getvalue(), "cls": label.encode()}
    with pytest.raises(ValueError, match=rf"cannot read x\.tar/7: .*{label}"):
        stream_of(shards).sample(raw)


def test_a_shard_of_another_length_is_named(shards):
    wrong = shards._replace(lengths=[8, *LENGTHS[1:]])
    with pytest.raises(ValueError, match=r"expected 8 samples in .*train-000.tar, got 7"):
        list(make_shard_loader(stream_of(wrong), batch_size=4, train=False))


def test_a_truncated_shard_is_named(shards):
    with open(shards.urls[2], "r+b") as file:
        file.truncate(3000)
    with pytest.raises(ValueError, match=r"cannot read .*train-002\.tar"):
        list(make_shard_loader(stream_of(shards), batch_size=4, train=False))
