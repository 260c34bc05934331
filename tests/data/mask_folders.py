"""Small folders of images and masks for the tests of segmentation."""

import numpy as np
from PIL import Image

SIZE = (20, 16)  # width, height
NAMES = ["sky", "road", "car"]


def colours(mask):
    """The image of a mask: a shade for each class."""
    return Image.fromarray(np.repeat((40 * np.minimum(mask, 5)).astype(np.uint8)[..., None], 3, 2))


def stripes(classes=3, size=SIZE, first=0):
    """A mask (H, W) of so many upright stripes, of one class each."""
    width, height = size
    row = first + np.arange(width) * classes // width
    return np.tile(row, (height, 1)).astype(np.uint8)


def write(folder, stem, mask=None, image=None, images="images/train", masks="masks/train"):
    """A pair: `stem.png` in both folders, the image in the colours of the mask."""
    mask = stripes() if mask is None else mask
    for part in (images, masks):
        (folder / part / stem).parent.mkdir(parents=True, exist_ok=True)
    (image or colours(mask)).save(folder / images / f"{stem}.png")
    Image.fromarray(mask).save(folder / masks / f"{stem}.png")


def write_folders(folder, train=4, val=2, names=NAMES, size=SIZE):
    """images/PART and masks/PART, and classes.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in {"train": train, "val": val}.items():
        for number in range(count):
            mask = np.roll(stripes(len(names), size), number, 1)
            mask[0, 0] = 255
            write(folder, f"{number}", mask, images=f"images/{part}", masks=f"masks/{part}")
    (folder / "classes.txt").write_text("\n".join(names) + "\n")
    return folder
