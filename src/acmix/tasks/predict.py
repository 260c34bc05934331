"""`acmix predict NETWORK IMAGES`: the likeliest classes, and what the network looked at."""

from __future__ import annotations

import csv
import json
import math
import pickle
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import track
from timm.data import ImageNetInfo, MaybeToTensor, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision import transforms

from acmix.analysis import figures
from acmix.analysis.explain import explain
from acmix.errors import Parser, UserError, did_you_mean, one_line, user_errors
from acmix.tasks.base import task_of
from acmix.tasks.classification import Classification, flipped_logits
from acmix.tasks.own_images import (
    checkpoint_of,
    choose_device,
    find_images,
    peek,
    read_image,
    task_of_network,
)
from acmix.tasks.run_folder import nearest_run

OF_TASKS = {
    "detection": "acmix.tasks.predict_objects",
    "segmentation": "acmix.tasks.predict_masks",
}
FAR = -1e6
PIXELS = (MaybeToTensor, transforms.Normalize)  # transforms that move none
LITTLE = 0.25  # part of an image, below which it is said that no more is seen
FORMATS = ("table", "csv", "json")
OF_THE_NETWORK = (
    *("name", "class_names", "in_chans", "model_kwargs"),
    *("ema_decay", "ema_kwargs", "channels_last", "flip_test"),
)
EXAMPLES = """\
  acmix predict runs/mine cat.jpg
  acmix predict runs/mine a.jpg b.jpg photos/ --flip
  acmix predict runs/mine photos/ --top 3 --format csv > photos.csv
  acmix predict runs/mine cat.jpg --explain cat --pixel 120 200
  acmix predict resnet50_acmix cat.jpg --weights resnet50_acmix.safetensors
  acmix predict runs/mine                  every test image of the run's data, as CSV in its folder
"""


class Classifier(NamedTuple):
    """A network in eval mode: `model` makes the logits, `net` holds its layers."""

    model: nn.Module
    net: nn.Module
    class_names: list[str]
    input_config: dict[str, Any]

    @property
    def channels(self) -> int:
        return self.input_config["input_size"][0]


def run(args: list[str]) -> None:
    """Print the classes of images as they come; with `--explain`, save pictures too.

    What a network of another task finds goes into files: `predict_objects`, `predict_masks`.
    """
    task = task_of_network(args[0]) if args else None
    if task in OF_TASKS:
        import_module(OF_TASKS[task]).run(args)
        return
    options = _parser().parse_args(args)
    check_options(options)
    with user_errors(ValueError, OSError, torch.OutOfMemoryError):
        device = choose_device(options.device)
        paths = find_images(options.images)
        classifier = load(options.network, options.weights, options.classes)
        classifier.model.to(device)
        if options.explain:
            save_explanation(classifier, paths, options, device)
        rows = Rows(options.format, classifier.class_names, options.top, paths)
        unread = show_all(classifier, paths, options, device, rows)
    if unread:
        print(f"{unread} of {len(paths)} images could not be read", file=sys.stderr)
        raise SystemExit(1)


def check_options(options: Namespace) -> None:
    """Numbers out of range, and options without effect, raise `UserError`."""
    for name, value in (("--top", options.top), ("--batch_size", options.batch_size)):
        if value < 1:
            raise UserError(f"{name}: expected at least 1, got {value}")
    for name in ("pixel", "layers"):
        if getattr(options, name) and not options.explain:
            raise UserError(f"--{name}: expected with --explain FOLDER, got without")


def _parser() -> Parser:
    parser = Parser(
        "acmix predict",
        "The likeliest classes of images, or of all images in folders.",
        EXAMPLES,
        usage="acmix predict NETWORK IMAGE_OR_FOLDER ... [options]",
    )
    parser.add_argument(
        "network", metavar="NETWORK", help="run folder, checkpoint of one, or model of timm"
    )
    parser.add_argument(
        "images", metavar="IMAGE_OR_FOLDER", nargs="+", help="a folder with all folders in it"
    )
    parser.add_argument(
        "--top", type=int, default=5, metavar="K", help="classes an image (5, or all if less)"
    )
    parser.add_argument("--format", choices=FORMATS, default="table", help="table by default")
    parser.add_argument("--flip", action="store_true", help="mean of an image and its mirror image")
    parser.add_argument(
        "--explain",
        metavar="FOLDER",
        help="save attention.png (what one pixel attends to in each layer) and paths.png (the "
        "share of attention and convolution) of one image here",
    )
    parser.add_argument(
        "--pixel",
        type=int,
        nargs=2,
        metavar=("ROW", "COLUMN"),
        help="of the image file, whose attention is shown; by default the centre",
    )
    parser.add_argument(
        "--layers", nargs="+", default=[], metavar="NAME", help="to explain; all by default"
    )
    parser.add_argument("--weights", metavar="FILE", help="of a model of timm")
    parser.add_argument("--classes", metavar="FILE", help="their names for it, one a line")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="32 by default")
    parser.add_argument("--device", help="such as cpu or cuda:0; by default a GPU if there is one")
    return parser


def load(network: str, weights: str | None = None, classes: str | None = None) -> Classifier:
    """The network of a run folder or checkpoint, or timm's of this name with weights from a file.

    Raises:
        UserError: if it is none of these, and for a file of another kind.
    """
    path = Path(network)
    if network and path.exists():
        checkpoint = checkpoint_of(path)
        if weights or classes:
            raise UserError("--weights, --classes: expected with a model of timm, not a checkpoint")
        return load_checkpoint(checkpoint)
    if not timm.is_model(network):
        near = nearest_run(path) or did_you_mean(
            network, [] if "/" in network else timm.list_models()
        )
        raise UserError(f"no run folder, checkpoint or model of timm is called {network!r}{near}")
    if weights is None:
        raise UserError(f"--weights: expected a file of weights for {network}, got none")
    return load_timm(network, Path(weights), Path(classes) if classes else None)


def load_checkpoint(path: Path) -> Classifier:
    """The network of a checkpoint of `acmix fit`; nothing in the file is run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        chosen = checkpoint["hyper_parameters"]
        if (task := task_of(checkpoint)) != Classification.task:
            raise ValueError(f"expected the task {Classification.task}, got {task}")
        model = Classification(**{name: chosen[name] for name in OF_THE_NETWORK if name in chosen})
        model.load_state_dict(checkpoint["state_dict"])
    except Exception as error:  # of a file that is no checkpoint, torch.load raises anything
        unread = isinstance(error, (pickle.UnpicklingError, KeyError))  # whose words do not help
        why = "it holds something else" if unread else one_line(error)
        raise UserError(f"{path} is no checkpoint of acmix fit: {why}") from error
    net = model.net if model.ema is None else model.ema.module
    config = checkpoint.get("input") or resolve_model_data_config(net)
    return Classifier(model.eval(), net, model.class_names, config)


def load_timm(name: str, weights: Path, classes: Path | None) -> Classifier:
    if not weights.is_file():
        raise UserError(f"--weights: no file {weights}")
    if classes and not classes.is_file():
        raise UserError(f"--classes: no file {classes}")
    names = classes.read_text().splitlines() if classes else []
    options: dict[str, Any] = {"num_classes": len(names)} if names else {}
    try:  # timm reads safetensors, and pickles with weights_only
        net = timm.create_model(name, checkpoint_path=str(weights), **options).eval()
    except Exception as error:
        if peek(weights):
            raise UserError(
                f"--weights: {weights} is a checkpoint of acmix fit: acmix predict {weights} IMAGES"
            ) from error
        of_another = isinstance(error, RuntimeError) and "state_dict" in str(error)
        why = f": {one_line(error)}" if of_another else ""
        raise UserError(f"--weights: {weights} holds no weights of {name}{why}") from error
    count: Any = net.num_classes
    if not names and count == 1000:
        info = ImageNetInfo()
        names = [info.index_to_description(index) for index in range(count)]
    return Classifier(
        net, net, names or [str(index) for index in range(count)], resolve_model_data_config(net)
    )


def open_image(path: Path, classifier: Classifier) -> Image.Image:
    """The image, in as many channels as the network takes.

    Raises:
        ValueError: If it cannot be read; the message names it.
    """
    channels = classifier.channels
    if channels not in (1, 3):
        raise UserError(f"expected a network for images of 1 or 3 channels, got {channels}")
    colours = read_image(path, classifier.input_config.get("background", "white"))
    return colours if channels == 3 else colours.convert("L")


def make_transform(config: dict[str, Any], **changes: Any) -> Any:
    """timm's transform of images to measure, from what a checkpoint keeps of its input."""
    return create_transform(**{k: v for k, v in (config | changes).items() if k != "background"})


@torch.inference_mode()
def show_all(
    classifier: Classifier,
    paths: Sequence[Path],
    options: Namespace,
    device: torch.device,
    rows: Rows,
) -> int:
    """Print the rows of all images, batch by batch; how many could not be read, each is named."""
    transform, size, done = make_transform(classifier.input_config), options.batch_size, 0
    stderr = Console(stderr=True)
    batches: Iterable[Sequence[Path]]
    batches = [paths[start : start + size] for start in range(0, len(paths), size)]
    if stderr.is_terminal and not sys.stdout.isatty() and len(batches) > 1:
        batches = track(batches, "images", console=stderr, transient=True)
    try:
        with rows:
            for batch in batches:
                readable = list(read(batch, classifier, transform))
                if readable:
                    there, images = zip(*readable, strict=True)
                    rows.show(there, predict(classifier, images, device, options.flip))
                done += len(readable)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"Stopped after {done} of {len(paths)} images.") from stop
    return len(paths) - done


def read(
    paths: Sequence[Path], classifier: Classifier, transform: Any
) -> Iterator[tuple[Path, Tensor]]:
    """Images that can be read, as the network takes them; the others are named on stderr."""
    for path in paths:
        try:
            image = open_image(path, classifier)
        except ValueError as error:
            print(error, file=sys.stderr)
            continue
        part = part_seen(image.size, classifier.input_config)
        if part < LITTLE:
            print(f"{path}: judged on its middle, {part:.0%} of the image", file=sys.stderr)
        yield path, transform(image)


def part_seen(size: tuple[int, int], config: dict[str, Any]) -> float:
    """Part of an image of this (width, height) that the crop keeps, by area."""
    if config.get("crop_mode", "center") != "center":
        return 1.0
    height, width = (side / config.get("crop_pct", 1.0) for side in config["input_size"][1:])
    scale = max(width / size[0], height / size[1])
    sides = zip(size, reversed(config["input_size"]), strict=False)
    return math.prod(min(1.0, kept / (side * scale)) for side, kept in sides)


def predict(
    classifier: Classifier, images: Sequence[Tensor], device: torch.device, flip: bool = False
) -> Tensor:
    """Probabilities (images, classes) on the CPU."""
    model, batch = classifier.model, torch.stack(list(images)).to(device)
    flip = flip or getattr(model, "hparams", {}).get("flip_test", False)
    logits = flipped_logits(model, batch) if flip else model(batch).float()
    return logits.softmax(1).cpu()


class Rows:
    """The likeliest classes of images on stdout, row by row as they come, in one of the formats."""

    def __init__(self, form: str, names: Sequence[str], top: int, paths: Sequence[Path]) -> None:
        self.form, self.names, self.top = form, names, min(top, len(names))
        self.shown = 0
        self.width = max(cell_len(str(path)) for path in paths) + 2
        self.column = max(map(cell_len, names)) + len(" 100.0%  ")

    def __enter__(self) -> Rows:
        if self.form == "csv":
            self._csv([("image", "rank", "class", "probability")])
        elif self.form == "table":
            ranks = "".join(f"{rank}.".ljust(self.column) for rank in range(1, self.top + 1))
            print("image".ljust(self.width) + ranks.rstrip())
        return self

    def __exit__(self, *error: object) -> None:
        if self.form == "json":
            print("\n]" if self.shown else "[]")

    def show(self, paths: Sequence[Path], probabilities: Tensor) -> None:
        """Rows of some images; their probabilities (images, classes)."""
        for path, values, places in zip(
            paths, *(part.tolist() for part in probabilities.topk(self.top)), strict=True
        ):
            best = [(self.names[place], value) for place, value in zip(places, values, strict=True)]
            getattr(self, f"_{self.form}_row")(str(path), best)
            self.shown += 1
        sys.stdout.flush()

    def _csv_row(self, path: str, best: list[tuple[str, float]]) -> None:
        self._csv((path, rank, n, f"{p:.6f}") for rank, (n, p) in enumerate(best, 1))

    def _csv(self, rows: Iterable[tuple[Any, ...]]) -> None:
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows)

    def _json_row(self, path: str, best: list[tuple[str, float]]) -> None:
        row = {"image": path, "classes": [{"class": n, "probability": p} for n, p in best]}
        print(",\n" if self.shown else "[\n", json.dumps(row), sep="", end="")

    def _table_row(self, path: str, best: list[tuple[str, float]]) -> None:
        cells = [path + " " * (self.width - cell_len(path))]
        cells += [set_cell_size(f"{name} {p:.1%}", self.column) for name, p in best]
        print("".join(cells).rstrip())


def save_explanation(
    classifier: Classifier, paths: Sequence[Path], options: Namespace, device: torch.device
) -> None:
    """`attention.png` and `paths.png` of one image."""
    if len(paths) != 1:
        raise UserError(f"--explain: expected one image, got {len(paths)}")
    transform = make_transform(classifier.input_config)
    picture = open_image(paths[0], classifier)
    centre = (picture.height // 2, picture.width // 2)
    row, column = options.pixel or centre
    pixel = locate(classifier.input_config, picture.size, (row, column))
    image = transform(picture)
    views = explain(classifier.net, image[None].to(device), pixel, options.layers)
    shown = to_picture(image, classifier.input_config)
    folder = Path(options.explain)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "attention": figures.attention(
            shown, views, pixel, f"row {row}, column {column} of the file"
        ),
        "paths": figures.shares(shown, views),
    }
    for name, figure in drawn.items():
        print(figures.save(figure, folder / f"{name}.png"), file=sys.stderr)


def locate(config: dict[str, Any], size: tuple[int, int], pixel: Sequence[int]) -> tuple[int, int]:
    """Row and column of a file's pixel in what the network sees of it. size: (width, height).

    Images of the coordinates go through the transform, so that any crop will do.
    """
    (width, height), (row, column) = size, pixel
    if not (0 <= row < height and 0 <= column < width):
        raise UserError(
            f"--pixel: expected a row below {height} and a column below {width}, got {row} {column}"
        )
    # timm fills a border with the mean: here with a coordinate that is far from all.
    transform = make_transform(config, mean=(FAR,), std=(1.0,))
    crop = transforms.Compose([t for t in transform.transforms if not isinstance(t, PIXELS)])
    y, x = np.indices((height, width), dtype=np.float32)
    y, x = (np.asarray(crop(Image.fromarray(axis))) for axis in (y, x))
    step = max(height / y.shape[0], width / x.shape[1], 1.0)
    if abs(y - row).min() > step or abs(x - column).min() > step:
        rows, columns = (f"{max(axis.min(), 0):.0f} to {axis.max():.0f}" for axis in (y, x))
        raise UserError(
            f"--pixel: expected rows {rows} and columns {columns}, which the network sees, "
            f"got {row} {column}"
        )
    nearest = ((y - row) ** 2 + (x - column) ** 2).argmin()
    return divmod(int(nearest), y.shape[1])


def to_picture(image: Tensor, config: dict[str, Any]) -> np.ndarray:
    """A normalised image (C, H, W) -> (H, W) or (H, W, 3) in [0, 1]."""
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    pixels = (image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels
