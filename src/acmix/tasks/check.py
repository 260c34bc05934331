"""`acmix check`: what a run would train on: counts, sizes, broken files, equal images."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from acmix.analysis import figures
from acmix.data import ImageData
from acmix.data.survey import (
    Seen,
    Span,
    Survey,
    duplicates,
    survey,
)
from acmix.tasks import command, report
from acmix.tasks.arguments import configs_of
from acmix.tasks.callbacks import write_csv
from acmix.tasks.console import console
from acmix.tasks.options import read_config
from acmix.tasks.training_cli import make

PARTS = ("train", "val", "test")
SHOWN = 40  # sample images
NAMED = 20  # of what is wrong; all of it goes into files
CLASSES = 50


def run(args: list[str], debug: bool = False) -> None:
    """Look at every image that `acmix fit` would take; exit code 1 where something is wrong."""
    with command.quiet(debug):
        cli = make("check", with_network(args))
        folder = cli.run_folder.with_name(f"{cli.run_folder.name}-check")
        with command.run_errors():
            surveys, problems = look_at_all(cli.datamodule)
            problems += find_problems(cli.datamodule, surveys)
            show(surveys, cli.datamodule.class_names)
            files = write(folder, cli.datamodule, surveys)
    print(f"{folder}/{', '.join(files)}")
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise SystemExit(1)
    print("Nothing is wrong.")


def with_network(args: list[str]) -> list[str]:
    """The options, with any network where they name none: the data need none."""
    named = [arg.split("=")[0] for arg in args]
    models = [read_config(path).get("model") for path in configs_of(args)]
    if "--model.name" in named or any(isinstance(of, dict) and "name" in of for of in models):
        return args
    return [*args, "--model.name", "resnet11_tiny_conv"]


def look_at_all(data: ImageData) -> tuple[dict[str, Survey], list[str]]:
    """A survey of each part, with thumbnails of some training images, and why others have none."""
    background = (data.input_config or {}).get("background", "white")
    shown = -(-SHOWN // len(data.class_names))
    surveys, problems = {}, []
    with counting() as count:
        for part in PARTS:
            try:
                if pictures := data.pictures(part):
                    of_class = shown if part == "train" else 0
                    surveys[part] = survey(pictures, background, of_class, progress=count)
            except ValueError as error:
                problems.append(str(error))
    return surveys, problems


@contextmanager
def counting() -> Iterator[Any]:
    """A bar on a terminal; yields what is to be called after each image."""
    stderr = Console(stderr=True)
    columns = (BarColumn(), TextColumn("{task.completed:,.0f} images"), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda: bar.advance(task)


def find_problems(data: ImageData, surveys: dict[str, Survey]) -> list[str]:
    """What would stop a run, or make its result worthless, a line each."""
    problems: list[str] = []
    problems += at_most([fault for part in PARTS for fault in faults_of(data, part)])
    broken = [image for part in surveys.values() for image in part.broken]
    problems += at_most([f"cannot read {image.name}: {image.reason}" for image in broken])
    seen = surveys.get("train", Survey()).counts
    if empty := [name for name in data.class_names if not seen[name]]:
        problems += at_most([f"nothing to learn of class {name}" for name in empty])
    parts = list(surveys)
    problems += at_most(
        [
            "equal images in several parts: "
            + ", ".join(f"{image.name} ({parts[place]})" for place, image in group)
            for group in equal_across(surveys)
        ]
    )
    problems += at_most(
        [
            "equal images of several classes: "
            + ", ".join(f"{image.name} ({image.label})" for _, image in group)
            for group in of_two_classes(surveys)
        ]
    )
    return problems


def faults_of(data: ImageData, part: str) -> list[str]:
    try:
        return data.faults(part)
    except ValueError:
        return []  # of a part that cannot be had, which is told already


def at_most(lines: list[str]) -> list[str]:
    """The first lines, and how many more there are."""
    more = [f"... and {len(lines) - NAMED} more"] if len(lines) > NAMED else []
    return [*lines[:NAMED], *more]


def equal(surveys: dict[str, Survey]) -> list[list[tuple[int, Seen]]]:
    """Groups of equal images, as (place of the part, image); one may be in two parts, as itself."""
    groups = duplicates(*surveys.values())
    return [group for group in groups if len({image.name for _, image in group}) > 1]


def equal_across(surveys: dict[str, Survey]) -> list[list[tuple[int, Seen]]]:
    return [of for of in equal(surveys) if len({place for place, _ in of}) > 1]


def of_two_classes(surveys: dict[str, Survey]) -> list[list[tuple[int, Seen]]]:
    return [of for of in equal(surveys) if len({image.label for _, image in of}) > 1]


def show(surveys: dict[str, Survey], class_names: list[str]) -> None:
    """Tables of the parts and, up to a number, of the classes."""
    parts = Table("part", "images", "broken", "equal", "width", "height", "modes", box=None)
    for name, part in surveys.items():
        again = sum(len(group) - 1 for group in duplicates(part))
        modes = ", ".join(f"{mode} {count:,}" for mode, count in part.modes.items())
        counts = (len(part.seen), len(part.broken), again)
        sides = (span(part.width), span(part.height))
        parts.add_row(name, *(f"{count:,}" for count in counts), *sides, modes)
    console().print(parts, highlight=False)
    classes = Table(f"class ({len(class_names)})", *surveys, box=None)
    for row in class_rows(surveys, class_names)[:CLASSES]:
        classes.add_row(escape(row["class"]), *(f"{row[part]:,}" for part in surveys))
    console().print(classes, highlight=False)
    if len(class_names) > CLASSES:
        print(f"... and {len(class_names) - CLASSES} more classes")


def span(of: Span | None) -> str:
    if of is None:
        return "-"
    return str(of.smallest) if of.smallest == of.largest else " to ".join(map(str, of))


def class_rows(surveys: dict[str, Survey], class_names: list[str]) -> list[dict[str, Any]]:
    return [
        {"class": name, **{part: of.counts[name] for part, of in surveys.items()}}
        for name in class_names
    ]


def write(folder: Path, data: ImageData, surveys: dict[str, Survey]) -> list[str]:
    """Tables of what was found, and a sheet of sample images; the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    broken = [{"part": p, **image._asdict()} for p, of in surveys.items() for image in of.broken]
    parts = list(surveys)
    alike = [
        {
            "group": number,
            "part": parts[place],
            "name": image.name,
            "class": image.label,
        }
        for number, group in enumerate(equal(surveys), 1)
        for place, image in group
    ]
    tables = {
        "classes.csv": class_rows(surveys, data.class_names),
        "broken.csv": broken,
        "equal.csv": alike,
    }
    for name, rows in tables.items():
        (folder / name).unlink(missing_ok=True)  # of an earlier check
        write_csv(folder / name, rows)
    samples = [
        image for part in surveys.values() for image in part.seen if image.thumbnail is not None
    ]
    if samples:
        samples.sort(key=lambda image: data.class_names.index(image.classes[0]))
        report.draw(lambda: draw_samples(samples), folder / "samples.png")
    return sorted(path.name for path in folder.iterdir())


def draw_samples(samples: list[Seen]) -> figures.Figure:
    samples = samples[:SHOWN]
    return figures.images(
        [image.thumbnail for image in samples if image.thumbnail is not None],
        [image.label for image in samples],
        title="Training images as they are stored, by class",
    )
