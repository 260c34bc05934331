"""`acmix predict NETWORK IMAGES`: the likeliest classes, and what the network looked at."""

from __future__ import annotations

import csv
import json
import pickle
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from timm.data import ImageNetInfo, MaybeToTensor, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision import transforms

from acmix.analysis import figures
from acmix.analysis.explain import explain
from acmix.data.sources import EXTENSIONS, as_rgb, why_unreadable
from acmix.errors import Parser, UserError, did_you_mean, one_line, user_errors
from acmix.tasks.classification import Classification
from acmix.tasks.console import console

FAR = -1e6
PIXELS = (MaybeToTensor, transforms.Normalize)  # transforms that move none
FORMATS = ("table", "csv", "json")
OF_THE_NETWORK = (
    *("name", "class_names", "in_chans", "model_kwargs"),
    *("ema_decay", "ema_kwargs", "channels_last"),
)
EXAMPLES = """\
  acmix predict runs/mine cat.jpg
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
    """Print the classes of images; with `--explain`, save pictures too."""
    options = _parser().parse_args(args)
    with user_errors(ValueError, OSError, torch.OutOfMemoryError):
        device = choose_device(options.device)
        classifier = load(options.network, options.weights, options.classes)
        paths = find_images(Path(options.images))
        top = _top(options.top, len(classifier.class_names))
        classifier.model.to(device)
        if options.explain:
            save_explanation(classifier, paths, options, device)
        probabilities = predict(classifier, paths, options.batch_size, device)
        show(paths, probabilities, classifier.class_names, top, options.format)


def _parser() -> Parser:
    parser = Parser(
        "acmix predict",
        "The likeliest classes of an image, or of all images in a folder.",
        EXAMPLES,
        usage="acmix predict NETWORK IMAGE_OR_FOLDER [options]",
    )
    parser.add_argument(
        "network", metavar="NETWORK", help="run folder, checkpoint of one, or model of timm"
    )
    parser.add_argument("images", metavar="IMAGE_OR_FOLDER", help="searched with its folders")
    parser.add_argument("--top", type=int, metavar="K", help="classes an image (5, or all if less)")
    parser.add_argument("--format", choices=FORMATS, default="table", help="table by default")
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


def choose_device(name: str | None) -> torch.device:
    """The named device; by default a GPU if there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: expected one that is there, got {name}") from error


def load(network: str, weights: str | None = None, classes: str | None = None) -> Classifier:
    """The network of a run folder or checkpoint, or timm's of this name with weights from a file.

    Raises:
        UserError: if it is none of these, and for a file of another kind.
    """
    path = Path(network)
    if path.exists():
        checkpoint = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
        if not checkpoint.is_file():
            raise UserError(f"{path} is no run folder: no {checkpoint}")
        if weights or classes:
            raise UserError("--weights, --classes: expected with a model of timm, not a checkpoint")
        return load_checkpoint(checkpoint)
    if not timm.is_model(network):
        near = did_you_mean(network, timm.list_models())
        raise UserError(f"no run folder, checkpoint or model of timm is called {network}{near}")
    if weights is None:
        raise UserError(f"--weights: expected a file of weights for {network}, got none")
    return load_timm(network, Path(weights), Path(classes) if classes else None)


def load_checkpoint(path: Path) -> Classifier:
    """The network of a checkpoint of `acmix fit`; nothing in the file is run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        chosen = checkpoint["hyper_parameters"]
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
    names = classes.read_text().splitlines() if classes else []
    options: dict[str, Any] = {"num_classes": len(names)} if names else {}
    try:  # timm reads safetensors, and pickles with weights_only
        net = timm.create_model(name, checkpoint_path=str(weights), **options).eval()
    except Exception as error:
        raise UserError(f"{weights} holds no weights of {name}: {one_line(error)}") from error
    count: Any = net.num_classes
    if not names and count == 1000:
        info = ImageNetInfo()
        names = [info.index_to_description(index) for index in range(count)]
    return Classifier(
        net, net, names or [str(index) for index in range(count)], resolve_model_data_config(net)
    )


def find_images(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"no image or folder {path}")
    if path.is_file():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS)
    if not found:
        raise UserError(f"{path}: expected images ({' '.join(EXTENSIONS)}), found none")
    return found


def _top(chosen: int | None, classes: int) -> int:
    if chosen is not None and not 1 <= chosen <= classes:
        raise UserError(f"--top: expected 1 to {classes}, the number of classes, got {chosen}")
    return chosen or min(5, classes)


def open_image(path: Path, channels: int) -> Image.Image:
    try:
        with Image.open(path) as image:
            colours = as_rgb(image)
    except Exception as error:  # of a broken file, Pillow raises anything
        raise UserError(f"cannot read {path}: {why_unreadable(error)}") from error
    if channels not in (1, 3):
        raise UserError(f"expected a network for images of 1 or 3 channels, got {channels}")
    return colours if channels == 3 else colours.convert("L")


@torch.inference_mode()
def predict(
    classifier: Classifier, paths: Sequence[Path], batch_size: int, device: torch.device
) -> Tensor:
    """Probabilities (images, classes) on the CPU."""
    if batch_size < 1:
        raise UserError(f"--batch_size: expected at least 1, got {batch_size}")
    transform: Any = create_transform(**classifier.input_config)
    batches = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    stderr, found = Console(stderr=True), []
    shown: Iterable[Sequence[Path]] = batches
    if stderr.is_terminal and len(batches) > 1:
        shown = track(batches, "images", console=stderr, transient=True)
    for batch in shown:
        images = [transform(open_image(path, classifier.channels)) for path in batch]
        logits = classifier.model(torch.stack(images).to(device))
        found.append(logits.float().softmax(1).cpu())
    return torch.cat(found)


def show(
    paths: Sequence[Path], probabilities: Tensor, names: Sequence[str], top: int, form: str
) -> None:
    """The `top` likeliest classes of each image on stdout."""
    best = [
        [(names[index], value) for value, index in zip(*pair, strict=True)]
        for pair in zip(*(part.tolist() for part in probabilities.topk(top)), strict=True)
    ]
    if form == "json":
        rows = [
            {"image": str(path), "classes": [{"class": n, "probability": p} for n, p in found]}
            for path, found in zip(paths, best, strict=True)
        ]
        print(json.dumps(rows, indent=2))
    elif form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(("image", "rank", "class", "probability"))
        for path, found in zip(paths, best, strict=True):
            writer.writerows((path, rank, n, f"{p:.6f}") for rank, (n, p) in enumerate(found, 1))
    else:
        table = Table("image", *(f"{rank}." for rank in range(1, top + 1)), box=None)
        for path, found in zip(paths, best, strict=True):
            table.add_row(escape(str(path)), *(f"{escape(name)} {p:.1%}" for name, p in found))
        console().print(table, highlight=False)


def save_explanation(
    classifier: Classifier, paths: Sequence[Path], options: Namespace, device: torch.device
) -> None:
    """`attention.png` and `paths.png` of one image."""
    if len(paths) != 1:
        raise UserError(f"--explain: expected one image, got {len(paths)}")
    transform: Any = create_transform(**classifier.input_config)
    picture = open_image(paths[0], classifier.channels)
    centre = (picture.height // 2, picture.width // 2)
    pixel = locate(classifier.input_config, picture.size, options.pixel or centre)
    image = transform(picture)
    views = explain(classifier.net, image[None].to(device), pixel, options.layers)
    shown = to_picture(image, classifier.input_config)
    folder = Path(options.explain)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "attention": figures.attention(shown, views, pixel),
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
    transform: Any = create_transform(**{**config, "mean": (FAR,), "std": (1.0,)})
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
