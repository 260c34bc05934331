"""`acmix predict RUN IMAGES` of a segmenter: a mask of every image, and pictures of it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from acmix.analysis import figures, masks
from acmix.data.mask_transforms import scaled
from acmix.errors import user_errors
from acmix.tasks.own_images import checkpoint_of, choose_device, find_images
from acmix.tasks.predict_dense import Writer, as_picture, load, make_parser, normalised, write_all
from acmix.tasks.segmentation import Segmentation

SAID = 4  # classes of an image
EXAMPLES = """\
  acmix predict runs/streets corner.jpg
  acmix predict runs/streets photos/ --out found --no-pictures
"""


def run(args: list[str]) -> None:
    """Write the mask of each image, and draw it."""
    parser = make_parser(
        "The class of every pixel of images, or of all images of folders: masks/NAME.png with the "
        "number of the class, from 0, and NAME.png with its colour over the image.",
        EXAMPLES,
    )
    options = parser.parse_args(args)
    with user_errors(ValueError, OSError, torch.OutOfMemoryError):
        device = choose_device(options.device)
        paths = find_images(options.images)
        model, config = load(Segmentation, checkpoint_of(Path(options.network)))
        writer = MaskWriter(options, model.to(device), config)
        write_all(paths, config.get("background", "white"), writer)


class MaskWriter(Writer):
    """A mask an image, whose palette has the colours of the picture."""

    def __init__(self, options: Namespace, model: Segmentation, config: dict[str, Any]) -> None:
        super().__init__(options)
        self.model, self.config, self.names = model, config, model.class_names
        colours = [masks.colour(index) for index in range(len(self.names))]
        self.palette = (255 * np.array(colours)).round().astype(np.uint8).ravel().tolist()

    def write(self, path: Path, image: Image.Image) -> str:
        stem, mask = self.name_of(path), self.segment(image)
        (self.folder / "masks").mkdir(exist_ok=True)
        deep = len(self.names) > 256
        stored = Image.fromarray(mask.astype(np.uint16 if deep else np.uint8))
        if not deep:
            stored.putpalette(self.palette)
        stored.save(self.folder / "masks" / f"{stem}.png")
        if self.pictures:
            figure = masks.sheet([as_picture(image)], [mask], self.names, title=path.name)
            figures.save(figure, self.folder / f"{stem}.png")
        return self.said(mask)

    def segment(self, image: Image.Image) -> np.ndarray:
        """The class of every pixel, (H, W)."""
        pixels = F.pil_to_tensor(image)
        size = scaled(pixels, self.config["test_size"])
        resized = F.to_pil_image(F.resize(pixels, size, antialias=True))
        seen = normalised(resized, self.config).to(self.model.device)
        [found] = self.model.segment([seen], [(image.height, image.width)])
        return found.cpu().numpy()

    def said(self, mask: np.ndarray) -> str:
        """The classes with the most pixels."""
        counts = np.bincount(mask.ravel(), minlength=len(self.names))
        most = [place for place in counts.argsort()[::-1][:SAID] if counts[place]]
        return ", ".join(f"{self.names[place]} {counts[place] / mask.size:.0%}" for place in most)
