"""What a finished run leaves: pictures, a summary to repeat it by, a short table."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import timm
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from acmix.analysis import environment, figures
from acmix.data import ImageData
from acmix.tasks.callbacks import HeldOut, History
from acmix.tasks.classification import Classification

SHOWN = 40
MOST_CONFUSED = 50  # classes: more are too small to read
FILES = {
    "loss and accuracy": ["curves.png"],
    "alpha, beta by layer": ["mix.png"],
    "right and wrong": ["predictions.png", "confusion.png"],
    "numbers": ["metrics.csv", "mix.csv", "summary.json"],
    "checkpoint": ["checkpoints/last.ckpt"],
    "every step": ["tensorboard"],
}


class Finished(NamedTuple):
    """What a run knows at its end."""

    network: Classification
    data: ImageData
    history: History
    held_out: HeldOut
    config: dict[str, Any]


def write(run: Path, finished: Finished) -> dict[str, Any]:
    """Write the pictures and `summary.json` into the run folder; return the summary."""
    _, data, history, held_out, _ = finished
    figures.save(figures.curves(history.epochs), run / "curves.png")
    figures.save(figures.mix(history.mix), run / "mix.png")
    if held_out.truth:
        figures.save(draw_predictions(data, held_out), run / "predictions.png")
        if len(data.class_names) <= MOST_CONFUSED:
            from sklearn.metrics import confusion_matrix  # half a second

            counts = confusion_matrix(
                held_out.truth, held_out.predicted, labels=range(len(data.class_names))
            )
            figures.save(figures.confusion(counts, data.class_names), run / "confusion.png")
    summary = summarise(finished)
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def summarise(finished: Finished) -> dict[str, Any]:
    network, data, history, held_out, config = finished
    last = history.epochs[-1] if history.epochs else {}
    return {
        "model": config["model"]["name"],
        "parameters": network.size,
        "classes": data.class_names,
        "train_images": last.get("images", 0),
        "held_out_images": len(held_out.truth),
        "epochs": last.get("epoch", 0),
        "steps": last.get("step", 0),
        "seed": config["seed_everything"],
        **{name: value for name, value in last.items() if name.endswith(("_loss", "_accuracy"))},
        "train_seconds": sum(row["train_seconds"] for row in history.epochs),
        "images_per_second": median([row["images_per_second"] for row in history.epochs] or [0.0]),
        "versions": environment.versions(),
        "commit": environment.commit(),
        "devices": environment.devices(),
        "config": config,
    }


def draw_predictions(data: ImageData, held_out: HeldOut) -> figures.Figure:
    """The held-out images of the last validation, mistakes first, up to SHOWN of them."""
    pairs = list(zip(held_out.truth, held_out.predicted, strict=True))
    wrong = sum(truth != predicted for truth, predicted in pairs)
    kept = sorted(held_out.images, key=lambda index: pairs[index][0] == pairs[index][1])[:SHOWN]
    names = data.class_names
    mistakes = "1 mistake" if wrong == 1 else f"{wrong} mistakes"
    shown = "first" if wrong <= SHOWN else f"in part ({SHOWN})"
    return figures.predictions(
        [to_picture(data, held_out.images[index]) for index in kept],
        [names[pairs[index][0]] for index in kept],
        [names[pairs[index][1]] for index in kept],
        [held_out.confidence[index] for index in kept],
        title=f"{mistakes} in {len(pairs)} held-out images, shown {shown}; "
        "above each the prediction and its confidence",
    )


def to_picture(data: ImageData, image: Tensor) -> Any:
    """A normalised image (C, H, W) -> (H, W) or (H, W, 3) in [0, 1]."""
    pixels = data.to_pixels(image[None])[0].permute(1, 2, 0).numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def show(run: Path, summary: dict[str, Any], console: Console) -> None:
    """The table at the end of a run, of what there is, and commands to go on with."""
    rows = {
        "network": f"{summary['model']}, {summary['parameters']:,} parameters",
        "training": f"{summary['epochs']} epochs in {summary['train_seconds']:.0f} s, "
        f"{summary['images_per_second']:,.0f} images/s",
    }
    if "val_accuracy" in summary:
        rows = {"held-out accuracy": f"{summary['val_accuracy']:.2%}", **rows}
    for content, files in FILES.items():
        if there := [file for file in files if (run / file).exists()]:
            rows[content] = f"{run}/{', '.join(there)}"
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console.print(table)
    console.print("\nNext, for example:")
    for command in next_commands(run, summary["config"]["model"]):
        console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)


def next_commands(run: Path, model: dict[str, Any]) -> list[str]:
    """Commands to go on with, of those that work; model: its part of the configuration."""
    folder = shlex.quote(str(run))
    again = f"acmix fit --config {shlex.quote(f'{run}/config.yaml')}"
    baseline = model["name"].removesuffix("_acmix") + "_conv"
    commands = []
    if (run / "checkpoints" / "last.ckpt").is_file():
        commands += [f"acmix validate {folder}", f"acmix predict {folder}"]
    if timm.is_model(baseline) and not model.get("model_kwargs"):
        commands.append(f"{again} --model.name {baseline} --run {shlex.quote(f'{run}-conv')}")
    return [*commands, f"{again} --seed_everything 1 --run {shlex.quote(f'{run}-seed1')}"]
