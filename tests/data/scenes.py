"""Small images with coloured shapes, and what is in them in the forms of COCO, VOC and YOLO."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

NAMES = ["disc", "box", "bar"]
IDS = [3, 7, 90]  # with gaps
COLOURS = [(220, 40, 40), (40, 200, 60), (50, 80, 230)]


def scene(seed: int, size: tuple[int, int] | None = None, count: int | None = None):
    """An image, and its objects: (label, box as left, top, right, bottom, polygon)."""
    draw = np.random.default_rng(seed)
    size = size or ((96, 64) if seed % 3 else (64, 96))
    pixels = draw.integers(90, 130, (size[1], size[0], 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    brush, objects = ImageDraw.Draw(image), []
    for _ in range(int(draw.integers(1, 4)) if count is None else count):
        side = int(draw.integers(14, 30))
        left, top = (int(draw.integers(0, whole - side)) for whole in size)
        label = int(draw.integers(0, len(NAMES)))
        right, bottom = left + side, top + (side // 2 if label == 2 else side)
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        if label == 0:  # an octagon
            cut = side // 3
            corners = [
                *((left + cut, top), (right - cut, top), (right, top + cut), (right, bottom - cut)),
                *((right - cut, bottom), (left + cut, bottom)),
                *((left, bottom - cut), (left, top + cut)),
            ]
        brush.polygon([(x, y) for x, y in corners], fill=COLOURS[label])
        objects.append((label, (left, top, right, bottom), [float(v) for p in corners for v in p]))
    return image, objects


def write_coco(root: Path, train: int = 6, val: int = 3) -> Path:
    """images/ and instances_{train,val}.json; the first image of each part has no object."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    for part, numbers in {"train": range(train), "val": range(100, 100 + val)}.items():
        images: list[dict[str, Any]] = []
        rows: list[dict[str, Any]] = []
        for number in numbers:
            image, objects = scene(number, count=0 if number in (0, 100) else None)
            name = f"{number}.png"
            image.save(root / "images" / name)
            width, height = image.size
            images.append({"id": number, "file_name": name, "width": width, "height": height})
            rows += [
                coco_row(len(rows) + 1, number, label, box, polygon)
                for label, box, polygon in objects
            ]
        write_json(root / f"instances_{part}.json", images, rows)
    return root


def coco_row(number: int, image: int, label: int, box, polygon) -> dict[str, Any]:
    left, top, right, bottom = box
    return {
        "id": number,
        "image_id": image,
        "category_id": IDS[label],
        "bbox": [left, top, right - left, bottom - top],
        "area": 0.8 * (right - left) * (bottom - top),
        "iscrowd": 0,
        "segmentation": [polygon],
    }


def write_json(file: Path, images, rows) -> None:
    categories = [{"id": key, "name": name} for key, name in zip(IDS, NAMES, strict=True)]
    content = {"images": images, "annotations": rows, "categories": categories[::-1]}
    file.write_text(json.dumps(content))


def change(root: Path, part: str, **changes: Any) -> Path:
    """Change the last annotation of a part; a value of None takes the entry away."""
    file = root / f"instances_{part}.json"
    content = json.loads(file.read_text())
    row = content["annotations"][-1] | changes
    content["annotations"][-1] = {key: value for key, value in row.items() if value is not None}
    file.write_text(json.dumps(content))
    return root


def write_voc(root: Path, train: int = 4, val: int = 2) -> Path:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for part, numbers in {"train": range(train), "val": range(100, 100 + val)}.items():
        for number in numbers:
            image, objects = scene(number)
            image.save(root / "JPEGImages" / f"{number}.png")
            (root / "Annotations" / f"{number}.xml").write_text(voc_xml(image.size, objects))
        names = "".join(f"{number}\n" for number in numbers)
        (root / "ImageSets" / "Main" / f"{part}.txt").write_text(names)
    return root


def voc_xml(size: tuple[int, int], objects) -> str:
    """Boxes whose first pixel is 1 and whose last belongs to them."""
    found = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    for label, (left, top, right, bottom), _ in objects:
        sides = {"xmin": left + 1, "ymin": top + 1, "xmax": right, "ymax": bottom}
        box = "".join(f"<{key}>{value}</{key}>" for key, value in sides.items())
        name = f"<name>{NAMES[label]}</name>"
        found += f"<object>{name}<difficult>0</difficult><bndbox>{box}</bndbox></object>"
    return f"<annotation>{found}</annotation>"


def write_yolo(root: Path, train: int = 4, val: int = 2, polygons: bool = False) -> Path:
    for part, numbers in {"train": range(train), "val": range(100, 100 + val)}.items():
        (root / "images" / part).mkdir(parents=True, exist_ok=True)
        (root / "labels" / part).mkdir(parents=True, exist_ok=True)
        for number in numbers:
            image, objects = scene(number)
            image.save(root / "images" / part / f"{number}.png")
            lines = "".join(f"{yolo_line(image.size, of, polygons)}\n" for of in objects)
            (root / "labels" / part / f"{number}.txt").write_text(lines)
    names = ", ".join(f"{number}: {name}" for number, name in enumerate(NAMES))
    text = f"path: .\ntrain: images/train\nval: images/val\nnames: {{{names}}}\n"
    (root / "data.yaml").write_text(text)
    return root


def yolo_line(size: tuple[int, int], of, polygon: bool) -> str:
    (width, height), (label, (left, top, right, bottom), points) = size, of
    if polygon:
        parts = [value / (height if odd % 2 else width) for odd, value in enumerate(points)]
    else:
        parts = [(left + right) / 2 / width, (top + bottom) / 2 / height]
        parts += [(right - left) / width, (bottom - top) / height]
    return " ".join([str(label), *(f"{part:.8f}" for part in parts)])
