"""`acmix bench`: latency, images/s and memory of networks, side by side."""

from __future__ import annotations

import argparse
import csv
import io
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from acmix.analysis import bench, environment
from acmix.analysis.costs import check_name
from acmix.analysis.rates import rate
from acmix.detection import DETECTORS
from acmix.errors import Parser, UserError, check_one_of, image_size, user_errors
from acmix.segmentation import DECODERS

DEFAULTS = {
    "classification": ("resnet50_conv", "resnet50_acmix"),
    "detection": ("pvt_tiny_attn", "pvt_tiny_acmix"),
    "segmentation": ("pvt_tiny_attn", "pvt_tiny_acmix"),
}
EXAMPLES = """\
  acmix bench resnet50_conv resnet50_acmix
  acmix bench swin_tiny_attn swin_tiny_acmix --dtype bfloat16 --threads 2 --out swin.csv
  acmix bench pvt_tiny_attn pvt_tiny_acmix --task detection --detector retinanet
"""
COLUMNS = {
    "model": "",
    "run": "",
    "M params": "",
    "images/s": "of the fastest step",
    "ms": "of the fastest step",
    "quartiles": "of all steps, in ms",
    "peak MiB": "of a step, above what is held before it",
    "times as fast": "as the first model",
}


def run(args: list[str]) -> None:
    """Print the table, and write the rows where `--out` says."""
    options = _parser().parse_intermixed_args(args)
    check(options)
    subjects = subjects_of(options)
    with user_errors(ValueError, OSError, torch.OutOfMemoryError):
        found = [measured for run in options.run for measured in measure(subjects[run], options)]
    rows = [of.row(base_of(of, found)) | provenance(of.subject.device) for of in found]
    if options.format == "csv":
        print(as_csv(rows), end="")
    else:
        show(found, options)
    if options.out:
        with user_errors(OSError):
            Path(options.out).write_text(as_csv(rows))


def _parser() -> Parser:
    parser = Parser(
        "acmix bench",
        "Latency, images/s and peak memory of networks, side by side in turns. The first is what "
        "the others are compared with.",
        EXAMPLES,
    )
    parser.add_argument("models", metavar="MODEL", nargs="*", help="of timm, ours among them")
    parser.add_argument("--task", choices=tuple(DEFAULTS), default="classification")
    parser.add_argument(
        "--detector", default="retinanet", help="of 80 classes, for --task detection (retinanet)"
    )
    parser.add_argument(
        "--decoder", default="semantic_fpn", help="of 150, for --task segmentation (semantic_fpn)"
    )
    parser.add_argument(
        "--run", nargs="+", choices=bench.RUNS, default=["inference"], help="inference by default"
    )
    parser.add_argument(
        "--size", type=image_size, metavar="S", help="S or HEIGHTxWIDTH (224, 800x1333, 512)"
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", help="images a step (4; 1 of a detector or segmenter)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU; all by default")
    parser.add_argument("--device", default="cpu", help="such as cuda:0 (cpu)")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--turns", type=int, default=10, metavar="N", help="steps of each (10)")
    parser.add_argument("--format", choices=("table", "csv"), default="table")
    parser.add_argument("--out", metavar="FILE", help="of the rows as CSV")
    return parser


def check(options: argparse.Namespace) -> None:
    """What cannot be measured raises `UserError`."""
    least = {"batch": 1, "threads": 1, "turns": 2}
    for name, value in least.items():
        given = getattr(options, name)
        if given is not None and given < value:
            raise UserError(f"--{name}: expected at least {value}, got {given}")
    check_one_of("--detector", options.detector, DETECTORS)
    check_one_of("--decoder", options.decoder, DECODERS)
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: expected one that is there, got {options.device}") from error
    with user_errors(ValueError):
        for name in options.models:
            check_name(name)


def subjects_of(options: argparse.Namespace) -> dict[str, list[bench.Subject]]:
    """By the kind of step."""
    task = options.task
    shared: dict[str, Any] = {
        "task": task,
        "head": {"detection": options.detector, "segmentation": options.decoder}.get(task, ""),
        "size": options.size or bench.SIZES[task],
        "batch": options.batch or bench.BATCHES[task],
        "dtype": options.dtype,
        "device": options.device,
        "threads": options.threads or torch.get_num_threads(),
        "compile": options.compile,
    }
    names = options.models or DEFAULTS[task]
    return {run: [bench.Subject(name, run, **shared) for name in names] for run in options.run}


def measure(subjects: Sequence[bench.Subject], options: argparse.Namespace) -> list[bench.Measured]:
    """With a bar on a terminal."""
    stderr = Console(stderr=True)
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        steps = len(subjects) * (options.turns + 2)
        task = bar.add_task(subjects[0].run, total=steps)
        return bench.measure(subjects, options.turns, lambda: bar.advance(task))


def base_of(one: bench.Measured, found: Sequence[bench.Measured]) -> bench.Measured:
    return next(of for of in found if of.subject.run == one.subject.run)


def provenance(device: str) -> dict[str, str]:
    versions = environment.versions()
    return {
        "processor": processor(device),
        "commit": environment.commit() or "",
        **{name: versions[name] for name in ("acmix", "torch", "timm", "python")},
    }


def processor(device: str) -> str:
    """The name of the GPU, or of the CPU with its instruction sets that matter."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    flags = [name for name in ("avx2", "avx512f", "amx_bf16") if name in fields.get("flags", "")]
    name = fields.get("model name", platform.machine())
    return f"{name}, {os.cpu_count()} cores, {' '.join(flags)}".rstrip(", ")


def show(found: Sequence[bench.Measured], options: argparse.Namespace) -> None:
    """A row a model and kind of step, and below it what the columns say."""
    table = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("model", "run") else "right")
    for one in found:
        base, (first, third) = base_of(one, found), one.quartiles
        table.add_row(
            one.subject.name,
            one.subject.run,
            f"{one.parameters / 1e6:.2f}",
            rate(one.subject.batch / one.best),
            f"{1e3 * one.best:,.1f}",
            f"{1e3 * first:,.1f} to {1e3 * third:,.1f}",
            f"{one.peak / 2**20:,.0f}",
            compared(one, base),
        )
    console = Console() if sys.stdout.isatty() else Console(width=10_000)
    console.print(table, highlight=False)
    subject = found[0].subject
    size = "x".join(map(str, subject.size))
    what = f"{subject.head} " if subject.head else ""
    console.print(
        f"\n{what}{size}, batch {subject.batch}, {subject.dtype}, "
        f"{processor(subject.device)}, {subject.threads} threads, {options.turns} turns. "
        + "; ".join(f"{name}: {text}" for name, text in COLUMNS.items() if text),
        highlight=False,
    )


def compared(one: bench.Measured, base: bench.Measured) -> str:
    """Times as fast as the base; no ranking where the quartiles of the two overlap."""
    if one is base:
        return "1"
    (low, high), (least, most) = one.quartiles, base.quartiles
    noise = "" if high < least or most < low else " (within noise)"
    return f"{base.best / one.best:.2f}{noise}"


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
