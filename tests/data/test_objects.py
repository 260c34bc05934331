"""Objects in three forms: the same images, boxes, masks, whatever they were written in."""

import json

import numpy as np
import pytest
import torch
from data.scenes import (
    IDS,
    NAMES,
    change,
    coco_row,
    scene,
    voc_xml,
    write_coco,
    write_json,
    write_voc,
    write_yolo,
)
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torchvision.ops import masks_to_boxes

from acmix.data import Objects
from acmix.data.base import DetectionData
from acmix.data.records import decode

WRITERS = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo}


def objects(root, masks=False, **options):
    data = Objects(str(root), **{"test_size": 64, "max_size": 96, "hflip": 0.0, **options})
    data.with_masks = masks
    return data


def boxes_of(seed, count=None):
    return torch.tensor([box for _, box, _ in scene(seed, count=count)[1]]).float().view(-1, 4)


@pytest.mark.parametrize("form", WRITERS)
def test_every_form_gives_the_same_objects(form, tmp_path):
    data = objects(WRITERS[form](tmp_path))
    assert data.form == form
    assert sorted(data.class_names) == sorted(NAMES)
    held_out = data.val_set()
    assert len(data.train_set()) == (6 if form == "coco" else 4)
    for index in range(len(held_out)):
        number = int(held_out.name(index).rpartition("/")[2].removesuffix(".png"))
        expected = [] if form == "coco" and number == 100 else scene(number)[1]
        image, target = held_out[index]
        picture = data.to_pixels(image[None])[0].permute(1, 2, 0).numpy() * 255
        stored = scene(number, count=0)[0] if not expected else scene(number)[0]
        np.testing.assert_allclose(picture, np.asarray(stored), atol=0.51)
        boxes = torch.tensor([box for _, box, _ in expected]).float().view(-1, 4)
        torch.testing.assert_close(target["boxes"], boxes, atol=1e-4, rtol=0)
        names = [data.class_names[label] for label in target["labels"]]
        assert names == [NAMES[label] for label, _, _ in expected]


def test_a_sample_is_of_plain_tensors(tmp_path):
    data = objects(write_coco(tmp_path), masks=True)
    for images in (data.train_set(), data.val_set()):
        for index in (0, 1):
            image, target = images[index]
            count = len(target["labels"])
            assert type(image) is Tensor
            assert all(type(value) is Tensor for value in target.values())
            assert target["boxes"].shape == (count, 4)
            assert target["masks"].shape == (count, *image.shape[1:])
            assert (target["boxes"].dtype, target["labels"].dtype) == (torch.float32, torch.int64)
            assert (target["iscrowd"].dtype, target["masks"].dtype) == (torch.bool, torch.uint8)
            assert target["area"].shape == (count,)
            assert target["image_id"].shape == ()
    assert len(data.val_set()[0][1]["labels"]) == 0  # an image without objects


def test_classes_are_in_the_order_of_their_numbers(tmp_path):
    data = objects(write_coco(tmp_path))
    assert (data.class_names, data.category_ids) == (NAMES, IDS)
    assert data.input_config["category_ids"] == IDS
    assert sum(data.class_counts()) == sum(len(scene(n)[1]) for n in range(1, 6))


def test_the_area_of_held_out_objects_is_the_annotations(tmp_path):
    _, target = objects(write_coco(tmp_path)).val_set()[1]
    sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
    torch.testing.assert_close(target["area"], 0.8 * sides.prod(1))


def masks_in_every_code(root):
    """One image with an object in polygons, in runs, in runs as a string, and a crowd."""
    from pycocotools import mask as coco_mask

    image, _ = scene(1, (50, 40), count=0)
    (root / "images").mkdir(parents=True)
    image.save(root / "images" / "1.png")
    mask = np.zeros((40, 50), np.uint8)
    mask[5:20, 10:30] = 1
    mask[8:12, 12:15] = 0
    code = coco_mask.encode(np.asfortranarray(mask))
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *changes, flat.size]).tolist()
    box = {"bbox": [10, 5, 20, 15], "area": 300, "image_id": 1, "category_id": 7}
    codes = [
        [[10, 5, 30, 5, 30, 20, 10, 20], [40, 30, 48, 30, 48, 38]],
        {"size": [40, 50], "counts": runs},
        {"size": [40, 50], "counts": code["counts"].decode()},
    ]
    rows = [{**box, "id": n, "segmentation": of, "iscrowd": 0} for n, of in enumerate(codes, 1)]
    rows.append({**box, "id": 4, "segmentation": codes[1], "iscrowd": 1})
    images = [{"id": 1, "file_name": "1.png", "width": 50, "height": 40}]
    for part in ("train", "val"):
        write_json(root / f"instances_{part}.json", images, rows)
    return root


def test_masks_are_those_of_pycocotools(tmp_path):
    root = masks_in_every_code(tmp_path)
    data = objects(root, masks=True)
    truth = COCO(str(root / "instances_val.json"))
    expected = [truth.annToMask(row) for row in truth.loadAnns(truth.getAnnIds())]
    _, target = data.val_set()[0]
    np.testing.assert_array_equal(target["masks"].numpy(), np.stack(expected))
    assert target["iscrowd"].tolist() == [False, False, False, True]


def test_polygons_keep_their_precision(tmp_path):
    """0.7 in float32 lies on the other side of an edge of the grid that masks are drawn on."""
    corners = [[10.7, 5.7, 30.3, 5.7, 30.3, 20.7, 10.7, 20.7], [1.1, 2.3, 9.7, 3.1, 5.7, 19.9]]
    rows = [coco_row(n, 100, 0, (1, 2, 30, 21), of) for n, of in enumerate(corners)]
    edit(write_coco(tmp_path), "val", lambda c: c["annotations"].extend(rows))
    truth = COCO(str(tmp_path / "instances_val.json"))
    expected = np.stack([truth.annToMask(row) for row in rows])
    np.testing.assert_array_equal(objects(tmp_path, masks=True).val_set()[0][1]["masks"], expected)


def test_without_an_area_it_is_that_of_the_mask_or_of_the_box(tmp_path):
    def spoil(content):
        of_mask, of_box = content["annotations"][-2:]
        of_box["segmentation"] = []
        del of_mask["area"], of_box["area"]

    records = objects(edit(write_coco(tmp_path, val=9), "val", spoil)).val_set().records
    found = [(record.size, of) for record in records for of in record.objects]
    (size, of_mask), (_, of_box) = found[-2:]
    assert of_mask.area == decode(of_mask.mask, size).sum()
    left, top, right, bottom = of_box.box
    assert of_box.area == (right - left) * (bottom - top)


def test_crowds_are_no_part_of_training(tmp_path):
    data = objects(masks_in_every_code(tmp_path), masks=True)
    assert len(data.train_set()[0][1]["labels"]) == 3
    assert sum(data.class_counts()) == 3


def test_training_images_are_resized_and_mirrored_with_their_objects(tmp_path):
    data = objects(write_coco(tmp_path), masks=True, train_sizes=[32, 128], max_size=300, hflip=0.5)
    images, seen = data.train_set(), set()
    for turn in range(12):
        torch.manual_seed(turn)
        for index in range(1, 6):
            image, target = images[index]
            seen.add(min(image.shape[1:]))
            scale = min(image.shape[1:]) / 64
            mirrored = boxes_of(index) * scale
            mirrored[:, [0, 2]] = image.shape[2] - mirrored[:, [2, 0]]
            plain = boxes_of(index) * scale
            near = [torch.allclose(target["boxes"], of, atol=1e-3) for of in (plain, mirrored)]
            assert any(near)
            for box, mask in zip(target["boxes"], target["masks"], strict=True):
                rows, columns = np.nonzero(mask.numpy())
                around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                np.testing.assert_allclose(box, around, atol=1.5 * max(1, scale))
    assert seen == {32, 128}


def test_large_scale_jitter_crops_to_one_size_and_drops_what_is_not_seen(tmp_path):
    data = objects(write_coco(tmp_path), masks=True, jitter=(0.5, 3.0), jitter_size=80, min_box=4)
    images, counts = data.train_set(), set()
    for turn in range(10):
        torch.manual_seed(turn)
        for index in range(1, 6):
            image, target = images[index]
            assert image.shape == (3, 80, 80)
            sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
            assert (sides >= 4).all()
            assert (target["boxes"] >= 0).all()
            assert (target["boxes"] <= 80).all()
            lengths = {len(target[key]) for key in ("boxes", "labels", "area", "iscrowd", "masks")}
            assert len(lengths) == 1
            torch.testing.assert_close(target["area"], sides.prod(1))
            tight = masks_to_boxes(target["masks"]) + torch.tensor([0, 0, 1, 1])
            assert torch.equal(target["boxes"], tight)  # the mask may end before the crop does
            counts.add(len(target["labels"]) < len(boxes_of(index)))
    assert counts == {True, False}


def test_batches_are_lists(tmp_path):
    data = objects(write_coco(tmp_path), batch_size=3)
    images, targets = next(iter(data.train_dataloader()))
    assert len(images) == len(targets) == 3
    assert isinstance(images, list)


def test_batches_are_of_wide_or_of_high_images(tmp_path):
    data = objects(write_coco(tmp_path, train=13), batch_size=2)
    batches = [images for images, _ in data.train_dataloader()]
    mixed = [len({image.shape[2] > image.shape[1] for image in images}) > 1 for images in batches]
    assert len(batches) == 6
    assert sum(mixed) <= 1


def test_a_part_is_held_out_where_there_is_none(tmp_path):
    root = write_coco(tmp_path, train=10)
    (root / "instances_val.json").unlink()
    with pytest.raises(ValueError, match=r"expected a part val or .* --data.val_fraction"):
        objects(root).val_set()
    data, again = (objects(root, val_fraction=0.3, split_seed=seed) for seed in (0, 1))
    names = [{of.val_set().name(n) for n in range(3)} for of in (data, again)]
    assert len(data.val_set()) == 3
    assert len(data.train_set()) == 7
    assert names[0] != names[1]
    train = {data.train_set().name(n) for n in range(7)}
    assert not train & names[0]


def test_pictures_have_a_class_for_every_object(tmp_path):
    data = objects(write_coco(tmp_path))
    pictures = list(data.pictures("train"))
    assert [len(of.classes) for of in pictures] == [0, *(len(scene(n)[1]) for n in range(1, 6))]
    assert pictures[1].load().size == scene(1)[0].size
    assert data.pictures("test") is None


@pytest.mark.parametrize("mode", ["L", "CMYK", "I;16", "RGBA", "P"])
def test_images_of_any_mode_come_in_three_channels(mode, tmp_path):
    root = write_coco(tmp_path, val=1)
    image = Image.open(root / "images" / "100.png")
    deep = Image.fromarray(np.full((64, 96), 300, np.uint16))
    changed = deep if mode == "I;16" else image.convert(mode)
    suffix = "tif" if mode in ("CMYK", "I;16") else "png"
    changed.save(root / "images" / f"new.{suffix}")
    content = json.loads((root / "instances_val.json").read_text())
    content["images"][0] |= {"file_name": f"new.{suffix}", "width": 96, "height": 64}
    (root / "instances_val.json").write_text(json.dumps(content))
    size = changed.size
    content["images"][0] |= {"width": size[0], "height": size[1]}
    (root / "instances_val.json").write_text(json.dumps(content))
    assert objects(root).val_set()[0][0].shape == (3, size[1], size[0])


# What is wrong

FAULTS = {
    "outside": ({"bbox": [500, 10, 20, 20]}, "leaves its image of"),
    "sticks out": ({"bbox": [-9, 10, 30, 20]}, "leaves its image of"),
    "no area": ({"bbox": [5, 5, 0, 20]}, "expected right > left and bottom > top"),
    "swapped": ({"bbox": [30, 30, -20, -20]}, "expected right > left and bottom > top"),
    "beside": ({"bbox": [-1, 5, 1, 20]}, "the box (-1, 5, 0, 25) leaves its image of"),
    "text": ({"bbox": ["a", 5, 20, 20]}, "expected four numbers of a box"),
    "area": ({"area": float("nan")}, "expected an area of 0 or more, got nan"),
    "negative area": ({"area": -1}, "expected an area of 0 or more, got -1"),
    "zeros": ({"bbox": [0, 0, 0, 0]}, "an image without objects has no box at all"),
    "not finite": ({"bbox": [float("nan"), 5, 20, 20]}, "expected a box of finite numbers"),
    "three numbers": ({"bbox": [1, 5, 20]}, "expected four numbers of a box, got [1, 5, 20]"),
    "no box": ({"bbox": None}, "expected bbox, got none"),
    "unknown class": ({"category_id": 4}, "category_id 4 is not among the categories"),
    "class of classes": ({"category_id": [3]}, "category_id [3] is not among the categories"),
    "unknown image": ({"image_id": 77}, "image_id 77 is not among the images"),
    "image of images": ({"image_id": [1]}, "image_id [1] is not among the images"),
    "no image": ({"image_id": None}, "image_id None is not among the images"),
    "mask of another size": (
        {"segmentation": {"size": [10, 10], "counts": [100]}},
        "the mask has size [10, 10] (height, width), its image",
    ),
    "runs too short": (
        {"segmentation": {"size": [96, 64], "counts": [5, 5]}},
        "the runs of the mask sum to 10, not 6144",
    ),
    "runs below zero": (
        {"segmentation": {"size": [96, 64], "counts": [-1, 6145]}},
        "expected run lengths of whole numbers from 0",
    ),
    "runs cut off": (
        {"segmentation": {"size": [96, 64], "counts": "abc"}},
        "a mask cannot be decoded: ",
    ),
    "far point": (
        {"segmentation": [[1, 1, 5, 5, 1, 1e9]]},
        "a polygon has a point far from its image of 64x96",
    ),
    "two points": ({"segmentation": [[1, 1, 5, 5]]}, "expected a polygon of three points or more"),
    "polygon of nothing": ({"segmentation": [["a"] * 6]}, "expected polygons of numbers"),
}


@pytest.mark.parametrize(("changes", "said"), FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_in_a_record_is_named_with_file_and_record(changes, said, tmp_path):
    root = change(write_coco(tmp_path), "val", **changes)
    data = objects(root)
    [fault] = data.faults("val")
    assert "instances_val.json, annotation " in fault
    assert said in fault
    assert data.faults("train") == []
    with pytest.raises(ValueError, match=r"^data.source: .*annotation .*on_error skip"):
        data.val_set()
    assert len(data.train_set()) == 6


@pytest.mark.parametrize(("changes", "said"), FAULTS.values(), ids=FAULTS)
def test_skip_goes_on_without_it_and_counts(changes, said, tmp_path, capsys):
    root = write_coco(tmp_path)
    whole = sum(len(t["labels"]) for _, t in objects(root).val_set())
    held_out = objects(change(root, "val", **changes), on_error="skip").val_set()
    assert sum(len(t["labels"]) for _, t in held_out) == whole - 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("data.source: left out 1 fault in val, such as ")


def test_several_faults_are_named_and_the_others_counted(tmp_path):
    def spoil(content):
        for row in content["annotations"][:5]:
            row["category_id"] = 4

    data = objects(edit(write_coco(tmp_path), "train", spoil))
    with pytest.raises(
        ValueError, match=r"annotation 1: .*; .*annotation 3: .* and 2 more \(acmix"
    ):
        data.train_set()


@pytest.mark.parametrize("part", ["train", "val"])
def test_faults_of_either_part_end_a_run_before_its_first_step(part, tmp_path):
    data = objects(change(write_coco(tmp_path), part, bbox=[5, 5, 0, 9]))
    data.setup("validate")
    with pytest.raises(ValueError, match=f"instances_{part}.json, annotation "):
        data.setup("fit")


def test_a_box_that_rounding_brought_out_is_cut(tmp_path):
    root = change(write_coco(tmp_path), "val", bbox=[-0.5, 3, 20.5, 20])
    data = objects(root)
    assert data.faults("val") == []
    assert data.val_set()[2][1]["boxes"][-1].tolist() == [0, 3, 20, 23]


def edit(root, part, function):
    file = root / f"instances_{part}.json"
    content = json.loads(file.read_text())
    function(content)
    file.write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda c: c["images"][1].update(file_name="gone.png"), "no file gone.png"),
        (lambda c: c["images"][1].update(id=0), "the id of another image"),
        (lambda c: c["images"][1].update(file_name="2.png"), "the file 2.png of another image"),
        (lambda c: c["images"][1].update(id=[1]), "expected id, file_name and size: unhashable"),
        (lambda c: c["images"][1].update(width=float("inf")), "expected id, file_name and size"),
        (lambda c: c["images"][1].pop("width"), "expected id, file_name and size"),
        (lambda c: c["images"][1].update(height=0), "expected a size, got (96, 0)"),
    ],
    ids=[
        "missing file",
        "one id twice",
        "one file twice",
        "a list",
        "endless",
        "no width",
        "no height",
    ],
)
def test_an_image_that_cannot_be_had_is_named_once(function, said, tmp_path, capsys):
    root = edit(write_coco(tmp_path), "train", function)
    faults = [of for of in objects(root).faults("train") if "image " in of.split(":")[0]]
    assert len(faults) == 1
    assert said in faults[0]
    assert len(objects(root, on_error="skip").train_set()) == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"),
        ("[]", "expected a list images in"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "with id and name"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, '
            '{"id": 1, "name": "b"}]}',
            "expected each category once",
        ),
        ('{"images": [], "annotations": [], "categories": []}', "expected classes"),
    ],
    ids=["no JSON", "a list", "no names", "twice", "no classes"],
)
def test_a_file_of_another_form_is_refused(text, said, tmp_path):
    root = write_coco(tmp_path)
    (root / "instances_train.json").write_text(text)
    with pytest.raises(ValueError, match=r"^data.source: ") as caught:
        objects(root)
    assert said in str(caught.value)


def test_nothing_to_learn_from_is_refused(tmp_path):
    root = edit(write_coco(tmp_path), "train", lambda c: c["annotations"].clear())
    with pytest.raises(ValueError, match=r"expected objects to learn .*got none in 6 images"):
        objects(root).train_set()


def test_other_classes_in_another_part_are_refused(tmp_path):
    root = edit(write_coco(tmp_path), "val", lambda c: c["categories"][0].update(name="rod"))
    with pytest.raises(ValueError, match=r"expected the same classes in every part, got .*rod"):
        objects(root).val_set()


def test_an_image_of_another_size_than_said_is_named(tmp_path):
    root = write_coco(tmp_path)
    Image.new("RGB", (33, 20)).save(root / "images" / "102.png")
    with pytest.raises(ValueError, match=r"102.png: the image is 33x20, its annotation says 64x96"):
        objects(root).val_set()


def test_a_file_that_is_no_image_is_named(tmp_path):
    root = write_coco(tmp_path)
    (root / "images" / "102.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"data.source: .*102.png: no image"):
        objects(root).val_set()


def test_a_file_that_is_cut_off_is_named_when_it_is_read(tmp_path):
    file = write_coco(tmp_path) / "images" / "102.png"
    file.write_bytes(file.read_bytes()[:-400])
    images = objects(tmp_path).val_set()
    with pytest.raises(ValueError, match=r"data.source: cannot read .*102.png: "):
        images[2]
    assert len(objects(tmp_path, on_error="skip").val_set()) == 2


def test_ids_that_are_no_whole_numbers_are_replaced_by_the_order(tmp_path):
    def rename(content):
        content["images"][0]["id"] = "first"

    assert [int(t["image_id"]) for _, t in objects(write_coco(tmp_path)).val_set()] == [
        100,
        101,
        102,
    ]
    edit(tmp_path, "val", rename)
    assert [int(t["image_id"]) for _, t in objects(tmp_path).val_set()] == [0, 1, 2]


def test_skip_leaves_out_images_that_cannot_be_had(tmp_path, capsys):
    root = write_coco(tmp_path)
    (root / "images" / "102.png").write_bytes(b"no image")
    Image.new("RGB", (33, 20)).save(root / "images" / "3.png")
    data = objects(root, on_error="skip")
    assert (len(data.train_set()), len(data.val_set())) == (5, 2)
    lines = capsys.readouterr().err.splitlines()
    assert "3.png: the image is 33x20" in lines[0]
    assert "102.png: no image" in lines[1]


def test_masks_that_are_asked_for_and_not_there_are_named(tmp_path, capsys):
    root = change(write_coco(tmp_path), "train", segmentation=[])
    assert len(objects(root).train_set()) == 6
    with pytest.raises(ValueError, match=r"a mask for every object, got .* in 1 images of train"):
        objects(root, masks=True).train_set()
    skipping = objects(root, masks=True, on_error="skip").train_set()
    assert len(skipping[5][1]["labels"]) == len(scene(5)[1]) - 1
    assert "left out the objects without a mask in 1 images of train" in capsys.readouterr().err


# Where files lie


def test_files_beside_the_images_of_their_part_are_found(tmp_path):
    """As Roboflow writes them."""
    root = write_coco(tmp_path)
    for part, new in (("train", "train"), ("val", "valid")):
        content = json.loads((root / f"instances_{part}.json").read_text())
        (root / new).mkdir()
        (root / f"instances_{part}.json").rename(root / new / "_annotations.coco.json")
        for row in content["images"]:
            name = row["file_name"]
            (root / "images" / name).rename(root / new / name)
    data = objects(root)
    assert (len(data.train_set()), len(data.val_set())) == (6, 3)


def test_files_of_other_tasks_are_passed_over(tmp_path):
    root = write_coco(tmp_path)
    (root / "annotations").mkdir()
    for name in ("image_info_test2017", "captions_train2017", "person_keypoints_val2017"):
        (root / "annotations" / f"{name}.json").write_text("{}")
    data = objects(root)
    assert (len(data.train_set()), len(data.val_set()), data.test_set()) == (6, 3, None)


def test_images_are_taken_as_they_are_stored(tmp_path):
    """EXIF's orientation is not followed: boxes are in the coordinates of what is stored."""
    root = write_coco(tmp_path)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    file = root / "images" / "101.png"
    Image.open(file).save(file, exif=turned)
    assert objects(root).val_set()[1][0].shape == (3, *scene(101)[0].size[::-1])


def test_a_folder_of_nothing_says_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"data.yaml \(YOLO\), Annotations/ and JPEGImages/"):
        objects(tmp_path)
    with pytest.raises(ValueError, match=r"expected a folder or data.yaml, got"):
        objects(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"jitter": (2.0, 1.0)}, "data.jitter: expected the smaller factor first"),
        ({"hflip": 1.5}, "data.hflip: expected 0 to 1"),
        ({"test_size": 0}, "data.test_size: expected at least 1"),
        ({"background": "whyte"}, "data.background: expected a colour"),
        ({"val_fraction": 1.0}, "data.val_fraction: expected 0 to below 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_options_out_of_range_are_refused(options, said, tmp_path):
    with pytest.raises(ValueError, match="^" + said):
        objects(write_coco(tmp_path), **options)


def test_it_is_data_for_detection():
    assert issubclass(Objects, DetectionData)


# Pascal VOC


def test_difficult_objects_are_neither_learnt_nor_asked_for(tmp_path):
    root = write_voc(tmp_path)
    for part in (1, 100):
        file = root / "Annotations" / f"{part}.xml"
        file.write_text(file.read_text().replace("<difficult>0", "<difficult>1", 1))
    data = objects(root)
    assert len(data.train_set()[1][1]["labels"]) == len(scene(1)[1]) - 1
    _, target = data.val_set()[0]
    assert target["iscrowd"].tolist() == [True] + [False] * (len(scene(100)[1]) - 1)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("<annotation>", "<annotation", "not well-formed"),
        ("<annotation>", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>', "without a document type"),
        ("<xmin>", "<xmen>", "mismatched tag"),
        ("<width>96", "<width>", "expected size/width"),
        ("<xmax>", "<xmax>9", "leaves its image"),
    ],
    ids=["cut off", "entities", "other names", "no width", "outside"],
)
def test_faults_of_an_xml_file_are_named(old, new, said, tmp_path):
    root = write_voc(tmp_path)
    file = root / "Annotations" / "100.xml"
    file.write_text(file.read_text().replace(old, new, 1))
    fault, *_ = objects(root).faults("val")
    assert "100.xml" in fault
    assert said in fault


def test_missing_and_unknown_things_of_voc_are_named(tmp_path):
    root = write_voc(tmp_path)
    (root / "Annotations" / "100.xml").unlink()
    (root / "JPEGImages" / "101.png").unlink()
    assert [of.rpartition(": ")[2] for of in objects(root).faults("val")][1:] == [
        "no image 101 in JPEGImages"
    ]
    image, found = scene(2)
    text = voc_xml(image.size, found).replace(NAMES[found[0][0]], "pyramid")
    (root / "JPEGImages" / "100.png").write_bytes((root / "JPEGImages" / "2.png").read_bytes())
    (root / "Annotations" / "100.xml").write_text(text)
    assert any("class 'pyramid' is not among" in of for of in objects(root).faults("val"))


def voc_object(*corners, name="box", difficult=0):
    sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    marked = f"<difficult>{difficult}</difficult>"
    return f"<object><name>{name}</name>{marked}<bndbox>{box}</bndbox></object>"


SIZED = "<annotation><size><width>96</width><height>64</height></size>{}</annotation>"


def with_voc(root, content):
    """The second training file says this instead; its image is 96 x 64."""
    encoded = content if isinstance(content, bytes) else content.encode()
    (write_voc(root) / "Annotations" / "1.xml").write_bytes(encoded)
    return root


VOC_FAULTS = {
    "zeros": (voc_object(0, 0, 0, 0), "1.xml, object 2: a box of zeros; an image without objects"),
    "swapped": (voc_object(20, 6, 10, 17), "1.xml, object 2: expected right > left"),
    "text": (voc_object("a", 6, 10, 17), "1.xml, object 2: could not convert string to float"),
    "no box": ("<object><name>box</name></object>", "1.xml, object 2: expected bndbox/xmin"),
    "not finite": (voc_object("nan", 6, 10, 17), "1.xml, object 2: expected a box of finite"),
}


@pytest.mark.parametrize(("row", "said"), VOC_FAULTS.values(), ids=VOC_FAULTS)
def test_faults_of_voc_are_named_with_file_and_object(row, said, tmp_path):
    good = voc_object(5, 6, 14, 17)
    root = with_voc(tmp_path, SIZED.format(f"{good}{row}{good}"))
    [fault] = objects(root).faults("train")
    assert said in fault
    skipping = objects(root, on_error="skip").train_set()
    assert len(skipping[1][1]["labels"]) == 2


GROWING = '<!DOCTYPE a [<!ENTITY x "xx"><!ENTITY y "&x;&x;">]>' + SIZED.format("&y;")
VOC_FILES = {
    "empty": ("", "1.xml: no element found: line 1"),
    "entities in UTF-16": (GROWING.encode("utf-16"), "expected XML without a document type"),
    "encoding": ('<?xml version="1.0" encoding="x"?><annotation/>', "1.xml: unknown encoding"),
}


@pytest.mark.parametrize(("content", "said"), VOC_FILES.values(), ids=VOC_FILES)
def test_files_of_voc_that_cannot_be_read_are_named(content, said, tmp_path):
    root = with_voc(tmp_path, content)
    [fault] = objects(root).faults("train")
    assert said in fault
    assert len(objects(root, on_error="skip").train_set()) == 3


# YOLO


def test_polygons_of_yolo_are_masks(tmp_path):
    data = objects(write_yolo(tmp_path, polygons=True), masks=True)
    for seed, (image, target) in zip((100, 101), data.val_set(), strict=True):
        torch.testing.assert_close(target["boxes"], boxes_of(seed), atol=1e-3, rtol=0)
        for mask, (label, box, _) in zip(target["masks"], scene(seed)[1], strict=True):
            area = (box[2] - box[0]) * (box[3] - box[1])
            part = float(mask.sum()) / area
            assert part > 0.9 if label else 0.6 < part < 0.95
            assert mask.shape == image.shape[1:]
        assert target["area"].tolist() == target["masks"].sum((1, 2)).tolist()


YOLO_FAULTS = {
    "words": (b"disc 0.5 0.5 0.1 0.1", "expected numbers, got 'disc 0.5 0.5 0.1 0.1'"),
    "no text": (b"\xff 0.5 0.5 0.1 0.1", "expected numbers, got"),
    "few numbers": (b"1 0.5 0.5 0.1", "expected a class and 4 numbers, or 6 and more"),
    "a score": (b"1 0.5 0.5 0.1 0.1 0.9", "expected a class and 4 numbers, or 6 and more"),
    "class": (b"3 0.5 0.5 0.1 0.1", "class 3 is not among the 3 classes, from 0"),
    "part of a class": (b"0.5 0.5 0.5 0.1 0.1", "class 0.5 is not among the 3 classes"),
    "endless class": (b"inf 0.5 0.5 0.1 0.1", "class inf is not among the 3 classes"),
    "no class": (b"nan 0.5 0.5 0.1 0.1", "class nan is not among the 3 classes"),
    "not finite": (b"1 nan 0.5 0.1 0.1", "expected a box of finite numbers"),
    "zeros": (b"0 0 0 0 0", "a box of zeros; an image without objects has no box at all"),
    "no width": (b"1 0.5 0.5 0 0.1", "expected right > left and bottom > top"),
    "pixels": (b"1 20 15 10 6", "leaves its image of"),
    "wide": (b"1 0.5 0.5 1.5 0.2", "leaves its image of"),
    "at the edge": (b"1 -0.005 0.5 0.01 0.1", "leaves its image of"),
}


@pytest.mark.parametrize(("line", "said"), YOLO_FAULTS.values(), ids=YOLO_FAULTS)
def test_faults_of_yolo_are_named_with_file_and_line(line, said, tmp_path):
    good = b"1 0.5 0.5 0.25 0.2"
    file = write_yolo(tmp_path) / "labels" / "train" / "1.txt"
    file.write_bytes(b"\n".join([good, b"", line, good]))
    [fault] = objects(tmp_path).faults("train")
    assert fault.startswith(f"{file}, line 3: ")
    assert said in fault
    assert len(objects(tmp_path, on_error="skip").train_set()[1][1]["labels"]) == 2


def test_an_image_of_yolo_without_a_file_has_no_objects(tmp_path):
    root = write_yolo(tmp_path)
    (root / "labels" / "val" / "100.txt").unlink()
    data = objects(root / "data.yaml")
    assert data.faults("val") == []
    assert len(data.val_set()[0][1]["labels"]) == 0


def test_paths_of_yolo_are_found_as_exports_write_them(tmp_path):
    root = write_yolo(tmp_path)
    text = (root / "data.yaml").read_text()
    (root / "data.yaml").write_text(text.replace("path: .\n", "").replace("images/", "../images/"))
    assert len(objects(root).val_set()) == 2
    (root / "val.txt").write_text("images/val/101.png\n")
    (root / "data.yaml").write_text(text.replace("images/val", "val.txt"))
    assert objects(root).val_set().name(0).endswith("101.png")
    (root / "data.yaml").write_text(text.replace("images/val", "images/nowhere"))
    with pytest.raises(ValueError, match="names val: images/nowhere, which is not there"):
        objects(root).val_set()


@pytest.mark.parametrize("text", ["names: [", "train: images\n", "names: {1: a, 2: b}\n", "- 1\n"])
def test_a_data_yaml_without_names_is_refused(text, tmp_path):
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"^data.source: "):
        objects(tmp_path)
