"""What `acmix predict RUN IMAGES` shares among the tasks whose finds are drawn into images."""

from __future__ import annotations

import sys
from abc import abstractmethod
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from acmix.errors import Parser, UserError, one_line, printable
from acmix.tasks.base import Task
from acmix.tasks.own_images import read_image

Kind = TypeVar("Kind", bound=Task)


def make_parser(description: str, examples: str) -> Parser:
    parser = Parser(
        "acmix predict",
        description,
        examples,
        usage="acmix predict RUN IMAGE_OR_FOLDER ... [options]",
    )
    parser.add_argument("network", metavar="RUN", help="run folder, or checkpoint of one")
    parser.add_argument(
        "images", metavar="IMAGE_OR_FOLDER", nargs="+", help="a folder with all folders in it"
    )
    parser.add_argument(
        "--out", default="predictions", metavar="FOLDER", help="of all files (predictions)"
    )
    parser.add_argument(
        "--no-pictures", dest="pictures", action="store_false", help="draw no picture of each image"
    )
    parser.add_argument("--device", help="such as cpu or cuda:0; by default a GPU if there is one")
    return parser


def load(kind: type[Kind], path: Path) -> tuple[Kind, dict[str, Any]]:
    """The network of a checkpoint, and how an image is prepared; nothing in the file is run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = kind(**checkpoint["hyper_parameters"])
        model.load_state_dict(checkpoint["state_dict"])
        return model.eval(), checkpoint["input"]
    except Exception as error:  # of a file that is no checkpoint, torch.load raises anything
        raise UserError(f"{path} is no checkpoint of acmix fit: {one_line(error)}") from error


def normalised(image: Image.Image, config: dict[str, Any]) -> torch.Tensor:
    """An image as the network takes it, (C, H, W)."""
    pixels = torch.from_numpy(as_picture(image)).permute(2, 0, 1)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (pixels - mean) / std


def as_picture(image: Image.Image) -> np.ndarray:
    """(H, W, 3) in [0, 1]."""
    return np.asarray(image, dtype=np.float32) / 255


class Writer:
    """Files of what is found, image by image; those that hold all images end with the last."""

    def __init__(self, options: Namespace) -> None:
        self.folder, self.pictures = Path(options.out), options.pictures
        self.stems: Counter[str] = Counter()

    @abstractmethod
    def write(self, path: Path, image: Image.Image) -> str:
        """Write what is found in an image; say it in a line."""

    def end(self) -> None:
        """Write what is of all images."""

    def name_of(self, path: Path) -> str:
        """A name for an image's files; of a second image of one name with a number."""
        self.stems[path.stem] += 1
        number = self.stems[path.stem]
        return path.stem if number == 1 else f"{path.stem}-{number}"


@torch.inference_mode()
def write_all(paths: Sequence[Path], background: str, writer: Writer) -> None:
    """Each image as it comes; those that cannot be read are named, and end with exit code 1."""
    stderr, done = Console(stderr=True), 0
    hidden = not stderr.is_terminal or sys.stdout.isatty()
    writer.folder.mkdir(parents=True, exist_ok=True)
    try:
        for path in track(paths, "images", console=stderr, transient=True, disable=hidden):
            try:
                image = read_image(path, background)
            except ValueError as error:
                print(error, file=sys.stderr)
                continue
            print(f"{printable(str(path))}  {writer.write(path, image)}", flush=True)
            done += 1
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"Stopped after {done} of {len(paths)} images.") from stop
    finally:
        writer.end()
    print("1 image" if done == 1 else f"{done} images", writer.folder, sep=": ")
    if unread := len(paths) - done:
        print(f"{unread} of {len(paths)} images could not be read", file=sys.stderr)
        raise SystemExit(1)
