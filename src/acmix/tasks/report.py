"""What a finished run leaves: pictures, a summary to repeat it by, a short table."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import timm
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from acmix.analysis import environment, figures
from acmix.analysis.rates import rate
from acmix.data import ImageData
from acmix.errors import one_line
from acmix.tasks.base import Task
from acmix.tasks.callbacks import History, write_csv
from acmix.tasks.held_out import HeldOut

FILES = {
    "loss and measure": ["curves.png"],
    "alpha, beta by layer": ["mix.png"],
    "right and wrong": ["predictions.png", "pr_curve.png", "confusion.png", "classes.png"],
    "what it learned from": ["augmented.png"],
    "numbers": ["metrics.csv", "classes.csv", "mix.csv", "summary.json"],
    "checkpoint": ["checkpoints/last.ckpt"],
    "every step": ["tensorboard"],
}


class Finished(NamedTuple):
    """What a run knows at its end."""

    network: Task
    data: ImageData
    history: History
    held_out: HeldOut
    train_images: int
    config: dict[str, Any]


def write(run: Path, finished: Finished) -> dict[str, Any]:
    """Write summary, tables and pictures into the run folder; return the summary.

    Its entry "failed" names the pictures that could not be drawn, if any.
    """
    network, data, history, held_out, _, _ = finished
    summary = summarise(finished)
    path = run / "summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n")
    for name, rows in held_out.tables(data).items():
        write_csv(run / name, rows)
    pictures: dict[str, Callable[[], Figure]] = {
        "curves.png": lambda: figures.curves(history.epochs, network.monitor, network.measure),
        **held_out.pictures(data),
    }
    if history.mix:
        pictures["mix.png"] = lambda: figures.mix(history.mix)
    failed = [name for name, make in pictures.items() if not draw(make, run / name)]
    return {**summary, "failed": failed} if failed else summary


def draw(make: Callable[[], Figure], path: Path) -> bool:
    """Make and save a picture; one that cannot be is named, for none may cost a run its report."""
    try:
        figures.save(make(), path)
    except Exception as error:  # of fonts, names and images, matplotlib raises anything
        print(f"{path} could not be drawn: {one_line(error)}", file=sys.stderr)
        return False
    return True


def summarise(finished: Finished) -> dict[str, Any]:
    network, data, history, held_out, train_images, config = finished
    last = history.epochs[-1] if history.epochs else {}
    return {
        "task": network.task,
        "measure": {network.measure: last.get(network.monitor)},
        "model": config["model"]["name"],
        "parameters": network.size,
        "classes": data.class_names,
        "train_images": train_images,
        "held_out_images": len(held_out),
        "epochs": last.get("epoch", 0),
        "steps": last.get("step", 0),
        "seed": config["seed_everything"],
        **{name: value for name, value in last.items() if name.startswith(("train_", "val_"))},
        "images_per_second": median([row["images_per_second"] for row in history.epochs] or [0.0]),
        "train_seconds": sum(row["train_seconds"] for row in history.epochs),
        "versions": environment.versions(),
        "commit": environment.commit(),
        "devices": environment.devices(),
        "config": config,
    }


def show(run: Path, summary: dict[str, Any], console: Console) -> None:
    """The table at the end of a run, of what there is, and commands to go on with."""
    epochs = "1 epoch" if summary["epochs"] == 1 else f"{summary['epochs']} epochs"
    rows = {
        "network": f"{summary['model']}, {summary['parameters']:,} parameters",
        "training": f"{epochs} in {summary['train_seconds']:.0f} s, "
        f"{rate(summary['images_per_second'])} images/s",
    }
    [(measure, value)] = summary["measure"].items()
    if value is not None:
        rows = {f"held-out {measure}": f"{value:.2%}", **rows}
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
