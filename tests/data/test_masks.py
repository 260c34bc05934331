"""Masks in every layout: pairs, classes and codes, crops, and what is said of bad ones."""

import re

import numpy as np
import pytest
import torch
from data.mask_folders import NAMES, SIZE, colours, stripes, write, write_folders
from PIL import Image

from acmix.data import Masks
from acmix.data.loading import seed_generators
from acmix.data.mask_layouts import CITYSCAPES, VOC
from acmix.data.mask_transforms import resize_mask

PLAIN = {
    "resize": 16,
    "scale": (1.0, 1.0),
    "crop": (16, 20),
    "hflip": 0.0,
    "distortion": 0.0,
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
}


@pytest.fixture
def folder(tmp_path):
    return write_folders(tmp_path / "set")


def names_in(dataset):
    return [dataset.name(index).rpartition("/")[2] for index in range(len(dataset))]


def test_folders_give_parts_classes_and_masks(folder):
    data = Masks(str(folder), **PLAIN)
    assert (data.form, data.class_names, data.test_set()) == ("folders", NAMES, None)
    assert names_in(data.train_set()) == [f"{n}.png" for n in range(4)]
    assert names_in(data.val_set()) == ["0.png", "1.png"]
    image, mask = data.train_set()[0]
    assert (image.dtype, mask.dtype) == (torch.float32, torch.int64)
    assert mask[0, 0] == 255
    assert torch.equal(mask[1:], torch.from_numpy(stripes())[1:].long())
    torch.testing.assert_close(image[:, 1:], (40 / 255 * mask[1:].float()).expand(3, -1, -1))


def test_training_batches_are_stacks_and_held_out_ones_lists(folder):
    write(folder, "2", stripes(size=(30, 11)), images="images/val", masks="masks/val")
    data = Masks(str(folder), **PLAIN, batch_size=3, test_size=8)
    images, masks = next(iter(data.train_dataloader()))
    assert (images.shape, masks.shape) == ((3, 3, 16, 20), (3, 16, 20))
    [(images, masks)] = data.val_dataloader()
    assert [tuple(of.shape) for of in images] == [(3, 8, 10), (3, 8, 10), (3, 8, 22)]
    assert [tuple(of.shape) for of in masks] == [(16, 20), (16, 20), (11, 30)]


def test_a_folder_that_is_not_divided_is_all_training(tmp_path):
    for number in range(5):
        write(tmp_path, f"deep/{number}", images="images", masks="masks")
    data = Masks(str(tmp_path), classes=NAMES, val_fraction=0.4, **PLAIN)
    held_out = names_in(data.val_set())
    assert sorted([*held_out, *names_in(data.train_set())]) == [f"{n}.png" for n in range(5)]
    assert len(held_out) == 2
    again = [
        names_in(Masks(str(tmp_path), classes=NAMES, val_fraction=0.4, split_seed=s).val_set())
        for s in range(4)
    ]
    assert again[0] == held_out
    assert len(set(map(tuple, again))) > 1


def test_ade20k_has_no_class_0(tmp_path):
    for part in ("training", "validation"):
        mask = stripes(3, first=0)
        write(tmp_path, "a", mask, images=f"images/{part}", masks=f"annotations/{part}")
    table = "Idx\tRatio\tName\n1\t0.1\twall, panel\n2\t0.2\tsky\n"
    (tmp_path / "objectInfo150.txt").write_text(table)
    data = Masks(str(tmp_path), **PLAIN)
    assert (data.form, data.class_names) == ("ade20k", ["wall, panel", "sky"])
    expected = torch.tensor([255, 0, 1])[torch.from_numpy(stripes()).long()]
    assert torch.equal(data.train_set()[0][1], expected)
    assert torch.equal(data.val_set()[0][1], expected)
    plain = Masks(str(tmp_path), reduce_zero_label=False, classes=NAMES, **PLAIN)
    assert plain.train_set()[0][1].unique().tolist() == [0, 1, 2]


def test_voc_reads_palettes_and_lists(tmp_path):
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "SegmentationClass").mkdir()
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    for number, stem in enumerate(("2007_1", "2007_2", "unused")):
        mask = np.full((16, 20), number, np.uint8)
        mask[0] = 255
        colours(mask).save(tmp_path / "JPEGImages" / f"{stem}.jpg")
        image = Image.fromarray(mask)
        image.putpalette((np.arange(768) % 256).astype(np.uint8).tobytes())
        assert image.mode == "P"
        image.save(tmp_path / "SegmentationClass" / f"{stem}.png")
    for part, stems in {"train": "2007_1\n\n", "val": "2007_2 1\n"}.items():
        (tmp_path / "ImageSets" / "Segmentation" / f"{part}.txt").write_text(stems)
    data = Masks(str(tmp_path), **PLAIN)
    assert (data.form, tuple(data.class_names)) == ("voc", VOC)
    assert names_in(data.train_set()) == ["2007_1.jpg"]
    assert data.val_set()[0][1].unique().tolist() == [1, 255]


def test_cityscapes_has_suffixes(tmp_path):
    for part in ("train", "val"):
        images, masks = tmp_path / "leftImg8bit" / part / "ulm", tmp_path / "gtFine" / part / "ulm"
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        colours(stripes()).save(images / "ulm_1_leftImg8bit.png")
        for number, kind in enumerate(("color", "labelIds", "labelTrainIds")):
            mask = Image.fromarray(stripes(first=number))
            mask.save(masks / f"ulm_1_gtFine_{kind}.png")
    data = Masks(str(tmp_path), **PLAIN)
    assert (data.form, tuple(data.class_names)) == ("cityscapes", CITYSCAPES)
    assert data.train_set()[0][1].unique().tolist() == [2, 3, 4]
    other = Masks(str(tmp_path), mask_suffix="_gtFine_labelIds.png", **PLAIN)
    assert other.train_set()[0][1].unique().tolist() == [1, 2, 3]
    assert data.faults("train") == []


@pytest.mark.parametrize("kind", [np.uint16, np.int32, bool], ids=str)
def test_masks_of_other_depths(folder, kind):
    mask = (stripes() % 2).astype(kind)
    image = Image.fromarray(mask)
    (folder / "masks" / "train" / "0.png").unlink()
    image.save(folder / "masks" / "train" / "0.tif")
    assert image.mode in ("I;16", "I", "1")
    data = Masks(str(folder), **PLAIN)
    assert torch.equal(data.train_set()[0][1], torch.from_numpy(mask.astype(np.int64)))


def test_images_grey_and_transparent_are_rgb(folder):
    Image.new("L", SIZE, 51).save(folder / "images" / "train" / "0.png")
    Image.new("RGBA", SIZE, (9, 9, 9, 0)).save(folder / "images" / "train" / "1.png")
    train = Masks(str(folder), background="#ff0000", **PLAIN).train_set()
    assert train[0][0].unique().tolist() == pytest.approx([0.2])
    assert train[1][0][:, 0, 0].tolist() == [1, 0, 0]


def test_pixels_are_counted_by_class(folder):
    data = Masks(str(folder), **PLAIN)
    masks = [np.asarray(Image.open(folder / "masks" / "train" / f"{n}.png")) for n in range(4)]
    assert data.class_counts() == [sum(int((mask == k).sum()) for mask in masks) for k in range(3)]


def test_pictures_name_the_classes_of_their_pixels(folder):
    write(folder, "0", np.full((16, 20), 1, np.uint8))
    first, second, *_ = Masks(str(folder), **PLAIN).pictures("train")
    assert first.classes == ("road",)
    assert second.classes == ("sky", "road", "car")
    assert second.load().size == SIZE
    assert Masks(str(folder), **PLAIN).pictures("test") is None


def test_a_mask_is_resized_by_the_centres_of_pixels():
    mask = torch.arange(9, dtype=torch.int32).repeat(9, 1)
    assert resize_mask(mask, [3, 3]).tolist() == [[1, 4, 7]] * 3
    assert resize_mask(mask, [9, 18])[0, :4].tolist() == [0, 0, 1, 1]


def crops(folder, number=20, **options):
    """Samples of one image with as many seeds."""
    train = Masks(str(folder), **{**PLAIN, **options}).train_set()
    found = []
    for seed in range(number):
        seed_generators(seed)
        found.append(train[0])
    return found


def test_image_and_mask_stay_together(tmp_path):
    folder = write_folders(tmp_path / "set", size=(64, 48))
    mask = np.kron(np.arange(12).reshape(3, 4) % 3, np.ones((16, 16))).astype(np.uint8)
    write(folder, "0", mask)
    mirrored = set()
    options = {"scale": (0.5, 2.0), "resize": 48, "crop": (40, 60), "hflip": 0.5}
    for image, mask in crops(folder, class_share=1.0, **options):
        assert (image.shape, mask.shape) == ((3, 40, 60), (40, 60))
        known = mask != 255
        shade = (image[0] * 255 / 40).round().long()
        assert (shade == mask)[known].float().mean() > 0.85  # all but the edges, which are smooth
        assert (image[:, ~known] == 0).all()
        mirrored.add(mask[0, 0].item())
    assert len(mirrored) > 1


def test_what_is_smaller_than_a_crop_is_padded_with_no_class(folder):
    [(image, mask)] = crops(folder, 1, crop=(20, 50), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert (mask[16:] == 255).all()
    assert (mask[:, 20:] == 255).all()
    assert (image[:, 16:] == 0).all()  # the mean colour
    assert torch.equal(mask[1:16, :20], torch.from_numpy(stripes()).long()[1:])


def test_no_class_fills_a_crop_where_that_can_be(tmp_path):
    folder = write_folders(tmp_path / "set", size=(80, 16))
    mask = np.zeros((16, 80), np.uint8)
    mask[:, :20] = 1
    write(folder, "0", mask)

    def most(mask):
        counts = mask[mask != 255].bincount()
        return (counts.max() / counts.sum()).item()

    crop = {"crop": (16, 40)}
    assert max(most(mask) for _, mask in crops(folder, class_share=0.8, **crop)) < 0.81
    assert max(most(mask) for _, mask in crops(folder, class_share=1.0, **crop)) == 1.0


def test_colours_are_changed_by_the_seed(folder):
    images = [image for image, _ in crops(folder, 4, distortion=1.0)]
    again = [image for image, _ in crops(folder, 4, distortion=1.0)]
    assert all(map(torch.equal, images, again))
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], crops(folder, 1)[0][0])


def fault(folder, kind):
    """Spoil the second pair of training; what is said of it."""
    image, mask = folder / "images" / "train" / "1.png", folder / "masks" / "train" / "1.png"
    if kind == "size":
        Image.fromarray(stripes(size=(10, 8))).save(mask)
        return f"{mask}: expected the size of its image, 20 x 16, got 10 x 8"
    if kind == "value":
        wrong = stripes()
        wrong[3, 4:6], wrong[5, 5] = 7, 9
        Image.fromarray(wrong).save(mask)
        known = "expected 0 to 2 of the 3 classes named, or 255"
        return f"{mask}: {known}, got 7 in 2 pixels, 9 in 1 pixel"
    if kind == "colours":
        Image.new("RGB", SIZE).save(mask)
        return f"cannot read {mask}: expected numbers of classes, in one channel of 8 or 16 bits"
    if kind == "broken mask":
        mask.write_bytes(b"none")
        return f"cannot read {mask}: no image"
    if kind == "no mask":
        mask.unlink()
        return f"{image}: expected a mask {mask}, got no file"
    image.unlink()
    wanted = image.with_suffix(".jpg")
    return f"{mask}: expected an image {wanted}, got no file"


FAULTS = ["size", "value", "colours", "broken mask", "no mask", "no image"]


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_named(folder, kind):
    said = fault(folder, kind)
    data = Masks(str(folder), **PLAIN)
    [found] = data.faults("train")
    assert found.startswith(said)
    assert data.faults("val") == data.faults("test") == []
    with pytest.raises(ValueError, match="^" + re.escape(f"data.source: {said}")):
        data.train_set()
    assert len(data.val_set()) == 2


@pytest.mark.parametrize("kind", ["size", "value", "colours", "broken mask"])
def test_a_fault_that_is_come_upon_later_is_named_too(folder, kind):
    train = Masks(str(folder), **PLAIN).train_set()
    said = fault(folder, kind)
    assert train[0][1].shape == (16, 20)
    with pytest.raises(ValueError, match="^" + re.escape(f"data.source: {said}")):
        train[1]


@pytest.mark.parametrize("kind", [*FAULTS, "broken image"])
def test_a_fault_is_left_out_and_counted(folder, kind, capsys):
    if kind == "broken image":
        image = folder / "images" / "train" / "1.png"
        image.write_bytes(image.read_bytes()[:60])
        said = f"cannot read {image}"
    else:
        said = fault(folder, kind)
    data = Masks(str(folder), on_error="skip", **PLAIN)
    train = data.train_set()
    assert names_in(train) == ["0.png", "2.png", "3.png"]
    assert [train[index][1].shape for index in range(3)] == [(16, 20)] * 3
    assert sum(data.class_counts()) == 3 * (16 * 20 - 1)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"data.source: left out 1 of 4 in train, such as {said}")
    assert len(data.val_set()) == 2
    assert capsys.readouterr().err == ""


def test_a_broken_image_is_named_with_the_pictures(folder):
    image = folder / "images" / "train" / "1.png"
    image.write_bytes(b"none")
    data = Masks(str(folder), **PLAIN)
    assert data.looks_early
    assert not Masks(str(folder), on_error="skip").looks_early
    with pytest.raises(ValueError, match=re.escape(f"data.source: cannot read {image}: no image")):
        data.train_set()[1]


def test_nothing_left_is_an_error(folder):
    for mask in (folder / "masks" / "val").iterdir():
        Image.new("RGB", SIZE).save(mask)
    with pytest.raises(ValueError, match=r"expected images of val that can be used, got none"):
        Masks(str(folder), on_error="skip").val_set()


def empty(folder):
    for file in folder.rglob("*.png"):
        file.unlink()


def no_form(folder):
    (folder / "masks").rename(folder / "labels")


def no_val(folder):
    (folder / "images" / "val").rename(folder / "images" / "other")


def no_masks(folder):
    (folder / "masks" / "train").rename(folder / "masks" / "other")


def no_names(folder):
    (folder / "classes.txt").unlink()


def one_name(folder):
    (folder / "classes.txt").write_text("sky\n\n")


def same_names(folder):
    (folder / "classes.txt").write_text("sky\nroad\nsky\n")


@pytest.mark.parametrize(
    ("spoil", "options", "said"),
    [
        (empty, {}, "data.source: expected images of train or training in .*, got none"),
        (no_form, {}, r"data.source: expected images/ and masks/ \(folders\); images/ and annot"),
        (no_form, {"form": "folders"}, "data.source: expected a folder, got none at .*/masks"),
        (no_val, {}, r"data.source: expected a part val or .* --data.val_fraction 0.1\)"),
        (no_masks, {}, "data.source: expected masks of train in .*/masks/train, got no folder"),
        (no_names, {}, "data.classes: expected names, or classes.txt in .* got neither"),
        (one_name, {}, r".*/classes.txt: expected 2 classes or more, got \['sky'\]"),
        (same_names, {}, ".*/classes.txt: expected names of their own, got 'sky' twice"),
        (None, {"classes": ["a", "a"]}, "data.classes: expected names of their own, got 'a' twice"),
        (None, {"train_split": "other"}, "data.source: expected a part other in"),
        (None, {"val_fraction": 0.9}, "data.val_fraction: expected images in both parts, got 0.9"),
        (None, {"scale": (2.0, 0.5)}, "data.scale: expected the smaller factor first"),
        (None, {"crop": 0}, "data.crop: expected at least 1, got 0"),
        (None, {"crop": (8, 0)}, "data.crop: expected at least 1, got"),
        (None, {"class_share": 0}, "data.class_share: expected above 0, at most 1, got 0"),
        (None, {"form": "coco"}, "data.form: expected one of folders, .*, got 'coco'"),
        (None, {"ignore_index": 70000}, "data.ignore_index: expected below 65536, got 70000"),
        (
            None,
            {"ignore_index": 0, "reduce_zero_label": True},
            "data.ignore_index: expected 3 or more with data.reduce_zero_label",
        ),
    ],
)
def test_what_there_is_not_is_said(folder, spoil, options, said):
    if spoil:
        spoil(folder)
    with pytest.raises(ValueError, match="^" + said):
        Masks(str(folder), **options).val_set()


@pytest.mark.parametrize("source", ["nowhere", "set/classes.txt"])
def test_a_source_is_a_folder(folder, source):
    with pytest.raises(ValueError, match=r"data.source: expected a folder, got "):
        Masks(str(folder.parent / source))


def test_an_ignored_class_is_none(folder):
    data = Masks(str(folder), ignore_index=1, **PLAIN)
    with pytest.raises(ValueError, match=r"or 1, got 255 in 1 pixel"):
        data.train_set()
    for number in range(4):
        write(folder, f"{number}")
    assert data.train_set()[0][1].unique().tolist() == [0, 1, 2]
    assert data.ignore_index == 1
