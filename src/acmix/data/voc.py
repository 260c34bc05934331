"""Objects in Pascal VOC's form: images in JPEGImages/, an XML file for each in Annotations/.

Parts are lists of their names in ImageSets/Main/.

http://host.robots.ox.ac.uk/pascal/VOC/
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn
from xml.etree import ElementTree

from acmix.data.files import SUFFIXES
from acmix.data.records import OF_ZEROS, Annotations, Object, Record, checked_box
from acmix.errors import one_line

ANNOTATIONS, IMAGES, LISTS = "Annotations", "JPEGImages", "ImageSets/Main"
INCLUSIVE = 1  # pixels count from one, and the last belongs to the box


def is_voc(root: Path) -> bool:
    return (root / ANNOTATIONS).is_dir() and (root / IMAGES).is_dir()


def read_voc(root: Path, part: str | None, class_names: list[str] | None) -> Annotations:
    """The objects of a part, or of all files without one.

    Objects that are marked as difficult are ignored: they are not learnt, nor asked for.

    Args:
        root: Folder of the three.
        part: Name of a list in ImageSets/Main.
        class_names: Those that are known; by default all there are, in alphabetical order.
    """
    stems = names_of(root, part)
    images = {path.stem: path for path in sorted((root / IMAGES).iterdir()) if _is_image(path)}
    trees: dict[str, ElementTree.Element] = {}
    found = Annotations([], [])
    for stem in stems:
        file = root / ANNOTATIONS / f"{stem}.xml"
        try:
            trees[stem] = parse(file)
        except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
            found.fault(file, one_line(error))
    there = {name for tree in trees.values() for name in _names(tree)}
    found.class_names = class_names or sorted(there)
    found.category_ids = list(range(1, len(found.class_names) + 1))
    for number, (stem, tree) in enumerate(trees.items()):
        file = root / ANNOTATIONS / f"{stem}.xml"
        if stem not in images:
            found.fault(file, f"no image {stem} in {IMAGES}")
            continue
        try:
            width, height = (int(_text(tree, f"size/{side}")) for side in ("width", "height"))
        except ValueError as error:
            found.fault(file, f"expected size/width and size/height: {error}")
            continue
        record = Record(str(images[stem]), number, (width, height), b"")
        found.records.append(record.holding(objects_of(tree, file, record.size, found)))
    return found


def names_of(root: Path, part: str | None) -> list[str]:
    """Of the images of a part; of all where there are no lists."""
    if part is None:
        return sorted(path.stem for path in (root / ANNOTATIONS).glob("*.xml"))
    lines = (root / LISTS / f"{part}.txt").read_text(errors="replace").splitlines()
    return [line.split()[0] for line in lines if line.strip()]


def has_part(root: Path, part: str) -> bool:
    return (root / LISTS / f"{part}.txt").is_file()


def parse(file: Path) -> ElementTree.Element:
    """The tree of a file, which may define no entities: they could grow without end."""
    parser = ElementTree.XMLParser(target=_WithoutDoctype())
    return ElementTree.fromstring(file.read_bytes(), parser)


class _WithoutDoctype(ElementTree.TreeBuilder):
    def doctype(self, name: str, pubid: str, system: str) -> NoReturn:
        raise ValueError("expected XML without a document type, got one")


def objects_of(
    tree: ElementTree.Element, file: Path, size: tuple[int, int], found: Annotations
) -> list[Object]:
    """The objects of an image that are without faults."""
    objects = []
    for number, node in enumerate(tree.iter("object"), 1):
        try:
            left, top, right, bottom = (
                float(_text(node, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")
            )
            if not any((left, top, right, bottom)):
                raise ValueError(OF_ZEROS)
            box = checked_box((left - INCLUSIVE, top - INCLUSIVE, right, bottom), size)
            name = _text(node, "name")
            if name not in found.class_names:
                raise ValueError(f"class {name!r} is not among the classes")
        except ValueError as error:
            found.fault(f"{file}, object {number}", str(error))
            continue
        difficult = (node.findtext("difficult") or "0").strip() == "1"
        label, area = found.class_names.index(name), (box[2] - box[0]) * (box[3] - box[1])
        objects.append(Object(label, box, area, difficult))
    return objects


def _text(node: ElementTree.Element, path: str) -> str:
    text = node.findtext(path)
    if text is None or not text.strip():
        raise ValueError(f"expected {path}, got none")
    return text.strip()


def _names(tree: ElementTree.Element) -> list[str]:
    return [name for node in tree.iter("object") if (name := (node.findtext("name") or "").strip())]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES
