"""Images of every source: parts, classes, transforms, and what is said of bad ones."""

import io
import os
import signal
import sys
import tarfile

import numpy as np
import pytest
import torch
from data.pictures import (
    add,
    number_of,
    picture,
    write_cifar10,
    write_folder,
    write_shards,
)
from lightning.pytorch import Callback
from PIL import Image
from torchvision.datasets import cifar

from acmix.cli import main
from acmix.data import Images
from acmix.data.loading import seed_generators
from acmix.data.sources import locate

PLAIN = {"img_size": 8, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
COUNTS = {"cat": 6, "dog": 4, "owl": 2}


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "pets" / "train", COUNTS)
    write_folder(tmp_path / "pets" / "val", {"cat": 2, "owl": 1}, first=100)
    return tmp_path / "pets"


def numbers(dataset):
    return [number_of(dataset[index][0]) for index in range(len(dataset))]


def test_a_folder_gives_its_parts_and_classes(folder):
    data = Images(str(folder), **PLAIN)
    assert data.class_names == ["cat", "dog", "owl"]
    assert data.train_set().classes == [0] * 6 + [1] * 4 + [2] * 2
    assert numbers(data.val_set()) == [100, 101, 102]
    assert data.val_set().classes == [0, 0, 2]
    assert data.test_set() is None


def test_a_part_of_every_class_is_held_out(folder):
    def held_out(seed):
        data = Images(str(folder / "train"), val_fraction=0.5, split_seed=seed, **PLAIN)
        val, train = data.val_set(), data.train_set()
        assert val.classes == [0] * 3 + [1] * 2 + [2]
        assert sorted(numbers(val) + numbers(train)) == list(range(12))
        return numbers(val)

    assert held_out(0) == held_out(0)
    assert any(held_out(0) != held_out(seed) for seed in (1, 2, 3))


def test_cifar10_in_its_own_format(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)  # of the published pictures
    root = write_cifar10(tmp_path / "data")
    data = Images("torchvision/cifar10", root=str(root), val_split="test", img_size=32)
    assert data.class_names[:3] == ["airplane", "automobile", "bird"]
    assert (len(data.train_set()), len(data.val_set())) == (30, 6)
    image, label = data.val_set()[3]
    assert (image.shape, label) == ((3, 32, 32), 3)


def test_a_hugging_face_data_set(folder):
    pytest.importorskip("datasets")
    data = Images(f"hfds/{folder}", root=str(folder.parent / "cache"), **PLAIN)
    assert data.class_names == ["cat", "dog", "owl"]
    assert sorted(numbers(data.train_set())) == list(range(12))
    assert sorted(numbers(data.val_set())) == [100, 101, 102]


def test_shards(tmp_path):
    write_shards(tmp_path / "wds", "train", [5, 8])
    write_shards(tmp_path / "wds", "val", [4], first=50)
    data = Images(f"wds/{tmp_path / 'wds'}", batch_size=3, **PLAIN)
    [images, classes] = zip(*data.val_dataloader(), strict=True)
    assert [number_of(image) for image in torch.cat(images)] == [50, 51, 52, 53]
    assert torch.cat(classes).tolist() == [n % 3 for n in (50, 51, 52, 53)]
    assert len(list(data.train_dataloader())) == len(data.train_dataloader()) == 4


def test_a_source_is_the_same_from_any_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for written in ("pets", "./pets/", "~/pets", str(folder)):
        data = Images(written, root="~/cache", **PLAIN)
        assert (data.source, data.root) == (str(folder), str(tmp_path / "cache"))
    monkeypatch.chdir(folder)
    assert len(data.val_set()) == 3


@pytest.mark.parametrize(
    ("written", "located"),
    [
        (("torchvision/cifar10", None), ("torchvision/cifar10", "{here}/data")),
        (("torchvision/cifar10", "sets"), ("torchvision/cifar10", "{here}/sets")),
        (("hfds/pets", None), ("hfds/{here}/pets", None)),
        (("hfds/user/name", "cache"), ("hfds/user/name", "{here}/cache")),
        (("wds/~/new", None), ("wds/{here}/new", None)),
        (("wds/https://host/path", None), ("wds/https://host/path", None)),
        (("wds/pipe:cat x", None), ("wds/pipe:cat x", None)),
    ],
)
def test_only_local_paths_are_made_whole(folder, tmp_path, monkeypatch, written, located):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate(*written) == tuple(path and path.format(here=tmp_path) for path in located)


def test_names_are_told_on_one_line(folder, capsys):
    (folder / "train" / "cat" / "a\nb.png").write_bytes(b"")
    (folder / "train" / "cat" / "lost.png").symlink_to("nowhere.png")
    Images(str(folder), max_corrupt=2, **PLAIN).train_set()
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("/cat/a\\nb.png: no image")
    assert second.endswith("/cat/lost.png: No such file or directory")


def test_padded_crops_keep_the_scale(tmp_path):
    write_folder(tmp_path / "two", {"a": 2, "b": 2})
    stripe = np.zeros((8, 8, 3), dtype=np.uint8)
    stripe[:, 4] = 255
    Image.fromarray(stripe).save(tmp_path / "two" / "a" / "0.png")
    data = Images(str(tmp_path / "two"), crop_padding=2, val_fraction=0.5, **PLAIN)
    torch.manual_seed(0)
    images = [data.train_transform(Image.fromarray(stripe)) for _ in range(100)]
    columns = {tuple(image[0].amax(0).nonzero().flatten().tolist()) for image in images}
    assert columns == {(column,) for column in range(1, 7)}
    assert torch.equal(
        data.eval_transform(Image.fromarray(stripe))[0, 0],
        images[0].new_tensor(stripe[0, :, 0] / 255),
    )


def test_augmentation_draws_from_the_global_generators_only(folder):
    augmented = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5, "color_jitter": 0.4}
    data = Images(str(folder), img_size=16, **augmented).train_set()

    def draw(seed):
        seed_generators(seed)
        return torch.stack([data[index][0] for index in range(len(data))])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert all(draw(seed).isfinite().all() for seed in range(40))  # every operation has its turn


def test_settings_of_a_network(folder):
    data = Images(str(folder), like="vit_base_patch16_224.augreg_in21k")
    assert (data.mean, data.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert data.val_set()[0][0].shape == (3, 224, 224)


@pytest.mark.parametrize("kind", ["folder", "wds"])
def test_the_background_of_transparent_images_is_kept(tmp_path, kind):
    glyph = Image.new("LA", (8, 8), (0, 0))
    root = tmp_path / "two"
    if kind == "wds":
        write_shards(root, "train", [3])
        write_shards(root, "val", [3])
        with tarfile.open(root / "val-000.tar", "w") as tar:
            file = io.BytesIO()
            glyph.save(file, "png")
            add(tar, "0.png", file.getvalue())
            add(tar, "0.cls", b"1")
    else:
        write_folder(root / "train", {"a": 1, "b": 1})
        write_folder(root / "val", {"a": 1})
        glyph.save(root / "val" / "a" / "0.png")
    source = f"wds/{root}" if kind == "wds" else str(root)
    data = Images(source, background="#00ff00", crop_padding=1, **PLAIN)
    [(images, _)] = data.val_dataloader()
    assert images[0, :, 4, 4].tolist() == [0, 1, 0]
    assert data.input_config["background"] == "#00ff00"
    assert Images(source, **PLAIN).input_config["background"] == "white"


def test_images_of_floats_are_refused(folder):
    image = Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32))
    image.save(folder / "val" / "cat" / "100.tif")
    with pytest.raises(ValueError, match=r"100\.tif: expected 8 or 16 bits a channel"):
        numbers(Images(str(folder), **PLAIN).val_set())


@pytest.mark.parametrize("content", [b"", b"no picture", None], ids=["empty", "text", "truncated"])
def test_an_unreadable_image_is_named(folder, content):
    path = folder / "val" / "cat" / "100.png"
    path.write_bytes(path.read_bytes()[:50] if content is None else content)
    with pytest.raises(ValueError, match=r"cannot read .*val/cat/100\.png"):
        numbers(Images(str(folder), **PLAIN).val_set())


def test_unreadable_images_are_left_out_up_to_a_limit(folder, capsys):
    for number in (1, 7):
        name = "cat" if number < 6 else "dog"
        (folder / "train" / name / f"{number}.png").write_bytes(b"no picture")
    data = Images(str(folder), max_corrupt=2, crop_padding=1, hflip=0.0, **PLAIN)
    train = data.train_set()
    assert [train.indices[i] for i in range(len(train))] == [0, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("skipped 1 of at most 2: ")
    assert second.endswith("7.png'") or "7.png" in second
    with pytest.raises(ValueError, match=r"7\.png.*data\.max_corrupt: expected 1 at most"):
        Images(str(folder), max_corrupt=1, **PLAIN).train_set()


def test_another_class_in_a_part_is_named(folder):
    (folder / "val" / "cow").mkdir()
    picture(1).save(folder / "val" / "cow" / "1.png")
    with pytest.raises(ValueError, match="expected the classes of training in val, got 'cow'"):
        Images(str(folder), **PLAIN).val_set()


def write_mistakes(root):
    (root / "empty").mkdir()
    (root / "a.zip").write_bytes(b"x")
    write_folder(root / "one", {"cat": 3})
    write_folder(root / "lone", {"cat": 3, "owl": 1})
    write_folder(root / "hollow", {"cat": 2, "dog": 2})
    (root / "hollow" / "owl").mkdir()
    for part in ("other/train", "other/validate", "Parts/Train", "Parts/Val"):
        write_folder(root / part, {"cat": 2, "dog": 2})
    (root / "shards").mkdir()
    for name in ("b.tar", "a-000.tar"):
        (root / "shards" / name).write_bytes(b"")


FIT = ["fit", "--data=Images", "--data.img_size=8", "--data.batch_size=4"]
FIT += ["--model.name=resnet11_tiny_conv", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("missing", [], "data.source: expected a folder, torchvision/, hfds/ or wds/"),
        ("empty", [], "data.source: expected images in"),
        ("one", ["--data.val_fraction=0.5"], "one, got ['cat']"),
        ("pets/train", [], "--data.val_fraction"),
        ("pets/train", ["--data.val_fraction=0.05"], "got 0.05 of 12 images for 3 classes"),
        ("lone", ["--data.val_fraction=0.5"], "got 1 of 'owl' ("),
        (
            "other",
            [],
            "got train, validate; did you mean validate? Name it with --data.val_split",
        ),
        ("Parts", [], "got Train, Val; did you mean Train? Name it with --data.train_split Train"),
        ("wds/shards", [], "got a, b; name it with --data.train_split"),
        ("", [], "data.source: expected a folder, torchvision/, hfds/ or wds/, got ''"),
        (" ", [], "data.source: expected a folder, torchvision/, hfds/ or wds/, got ' '"),
        ("wds/", [], "data.source: expected a folder, torchvision/, hfds/ or wds/, got 'wds/'"),
        ("a.zip", [], "hfds/ or wds/, got the file /"),
        ("pets/train", ["--data.val_fraction=1.5"], "data.val_fraction: expected 0 to below 1"),
        (
            "pets",
            ["--data.train_split=tarin"],
            "did you mean train? Name it with --data.train_split",
        ),
        ("pets", ["--data.like=resnet5000"], "data.like: expected"),
        ("pets", ["--data.auto_augment=rnd-m9"], "data.auto_augment"),
        ("pets", ["--data.background=wite"], "data.background: expected a colour"),
        ("torchvision/cifar11", [], "did you mean cifar10?"),
        ("torchvision/cifar10", [], "--data.download"),
        ("wds/empty", [], "expected a split train or"),
        ("hollow", [], "/hollow/owl, got none"),
    ],
)
def test_mistakes_are_told_in_one_line(folder, monkeypatch, capsys, source, options, said):
    monkeypatch.chdir(folder.parent)
    write_mistakes(folder.parent)
    assert main([*FIT, f"--data.source={source}", *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line


def test_fit_validate_and_a_mismatch_of_classes(folder, capsys):
    run = folder.parent / "run"
    assert main([*FIT, f"--data.source={folder}", f"--run={run}"]) == 0
    assert main(["validate", str(run)]) == 0
    write_folder(folder / "train", {"cow": 2})
    capsys.readouterr()
    assert main(["validate", str(run)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "the checkpoint knows 3 classes (cat, dog, owl), the data has 4" in line


class TerminateAt(Callback):
    """Tells this process to stop once `step` steps are done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.slow
def test_fit_from_shards_goes_on_within_an_epoch(tmp_path):
    write_shards(tmp_path / "wds", "train", [9, 12])
    write_shards(tmp_path / "wds", "val", [4])
    fit = [*FIT, f"--data.source=wds/{tmp_path / 'wds'}", "--every_n_steps=3"]
    assert main([*fit, f"--run={tmp_path / 'whole'}"]) == 0
    stopped = [*fit, f"--run={tmp_path / 'run'}"]
    terminate = [f"--trainer.callbacks={__name__}.TerminateAt", "--trainer.callbacks.step=3"]
    with pytest.raises(SystemExit):
        main([*stopped, *terminate])
    assert main([*stopped, "--ckpt_path=last"]) == 0
    one, two = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("whole", "run")
    )
    assert one["global_step"] == two["global_step"] == 5
    for name, weight in one["state_dict"].items():
        assert torch.equal(weight, two["state_dict"][name]), name


@pytest.mark.parametrize(
    ("option", "of"), [("image_key", "hfds"), ("label_key", "hfds"), ("download", "torchvision")]
)
def test_an_option_of_another_kind_of_source_is_refused(folder, option, of):
    with pytest.raises(ValueError, match=rf"data\.{option}: expected with data\.source {of}/NAME"):
        Images(str(folder), **{option: "x"}, **PLAIN)


def test_every_image_can_be_looked_at_by_part(folder):
    data = Images(str(folder), **PLAIN)
    parts = {part: list(data.pictures(part)) for part in ("train", "val")}
    assert {part: len(of) for part, of in parts.items()} == {"train": 12, "val": 3}
    assert data.pictures("test") is None
    assert [of.classes[0] for of in parts["val"]] == ["cat", "cat", "owl"]
    divided = Images(str(folder / "train"), val_fraction=0.5, **PLAIN)
    names = [{of.name for of in divided.pictures(part)} for part in ("train", "val")]
    assert [len(of) for of in names] == [6, 6]
    assert not names[0] & names[1]
