"""Whole networks on a CPU: ACmix beside the baseline that users would take, in images/s."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import timm
import torch
import torchvision
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import acmix

BATCH, SIZE, TURNS = 4, 224, 5
RUNS = ("inference", "training step")
PAIRS: list[tuple[str, Callable[[], nn.Module], str]] = [
    ("torchvision resnet50", torchvision.models.resnet50, "resnet50_acmix"),
    (
        "timm swin_tiny",
        lambda: timm.create_model("swin_tiny_patch4_window7_224"),
        "swin_tiny_acmix",
    ),
]


def measure(
    thread_counts: list[int], origin: dict[str, str], console: Console
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for threads in thread_counts:
        torch.set_num_threads(threads)
        for baseline, make, name in PAIRS:
            rows += compare({baseline: make(), name: timm.create_model(name)}, threads, origin)
    show(rows, console)
    return rows


def compare(
    nets: dict[str, nn.Module], threads: int, origin: dict[str, str]
) -> list[dict[str, object]]:
    """A baseline and its ACmix network, as they are and fused, in turn, each in its better layout.

    Fused networks are for inference, and compared with the fused baseline.
    """
    forms = {subject: (net, net) for subject, net in nets.items()}
    forms |= {f"{subject} fused": (acmix.fuse(net), None) for subject, net in nets.items()}
    layouts = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
    times: dict[tuple[str, str, str], list[float]] = {}
    what = f"{list(nets)[1]}, {threads} thread(s)"
    for turn in track(range(TURNS + 1), description=what, transient=True):
        for subject, both in forms.items():
            for layout, memory_format in layouts.items():
                x = torch.randn(BATCH, 3, SIZE, SIZE).to(memory_format=memory_format)
                for run, function, net in zip(RUNS, (infer, train), both, strict=True):
                    if net is None:
                        continue
                    seconds = function(net.to(memory_format=memory_format), x)
                    if turn:  # the first warms up
                        times.setdefault((subject, layout, run), []).append(seconds)
    rows = []
    for (subject, layout, run), seconds in times.items():
        baseline = next(iter(nets)) + (" fused" if subject.endswith(" fused") else "")
        best = min(min(t) for (s, _, r), t in times.items() if (s, r) == (baseline, run))
        rows.append(
            {
                "subject": subject,
                "layout": layout,
                "batch": BATCH,
                "size": SIZE,
                "run": run,
                "threads": threads,
                "dtype": "float32",
                "images_per_s": round(BATCH / min(seconds), 3),
                "median_images_per_s": round(BATCH / statistics.median(seconds), 3),
                "turns": len(seconds),
                "baseline": baseline,
                "times_baseline": round(best / min(seconds), 3),
                **origin,
            }
        )
    return rows


def infer(net: nn.Module, x: torch.Tensor) -> float:
    net.eval()
    start = time.perf_counter()
    with torch.no_grad():
        net(x)
    return time.perf_counter() - start


def train(net: nn.Module, x: torch.Tensor) -> float:
    """Forward, backward and a step of SGD."""
    net.train()
    start = time.perf_counter()
    loss = net(x).float().logsumexp(1).mean()
    loss.backward()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=1e-4)
                parameter.grad = None
    return time.perf_counter() - start


def show(rows: list[dict[str, object]], console: Console) -> None:
    table = Table(title=f"images/s at {SIZE} px, batch {BATCH} (times the baseline's best layout)")
    for column in ("network", "threads", "layout", "inference", "training step"):
        table.add_column(column)
    keys = dict.fromkeys((r["subject"], r["threads"], r["layout"]) for r in rows)
    for key in keys:
        cells = {
            r["run"]: f"{r['images_per_s']:.2f} ({r['times_baseline']:.2f})"
            for r in rows
            if (r["subject"], r["threads"], r["layout"]) == key
        }
        table.add_row(*map(str, key), *(cells.get(run, "-") for run in RUNS))
    console.print(table)
