"""Time and memory of ACmix on a CPU, beside the 3x3 convolution that it replaces.

    python benchmarks/run.py                 # the layer and the operators, a few minutes
    python benchmarks/run.py --networks      # whole networks as well

First the fast paths are held against the reference; nothing is timed when that fails. Then all
subjects of a shape take turns, so that a slow moment of the machine hits them alike, and the
minimum and median over the turns are kept. Writes a row a case to results/cpu.csv, what attention
attains to results/cpu_roofline.csv, and the figure results/cpu.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import memory
import torch
from origin import HERE, provenance
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import acmix
from acmix import ops
from acmix.ops import _native, backends, shift_convolution, weighted_aggregation, window_attention

SHAPES = [(64, 56), (128, 28), (256, 14), (512, 7)]
BATCH, HEADS, WINDOW = 4, 4, 7
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
CONVOLUTION = "conv3x3"
SLOW = ("reference",)  # one turn after the warm-up is enough for what takes seconds

Run = Callable[[], object]


@dataclass
class Case:
    """One subject at one shape: what to run, and what was measured."""

    subject: str
    backend: str
    layout: str
    channels: int
    size: int
    run: str
    function: Run
    input_bytes: int
    times: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        return min(self.times)


def available() -> list[str]:
    return [name for name in ("native", "tiled", "reference") if backends()[name] is None]


def layer_cases(channels: int, size: int) -> Iterator[Case]:
    """The convolution and the layer on every backend, in both layouts, both ways."""
    for layout, memory_format in LAYOUTS.items():
        x = torch.randn(BATCH, channels, size, size).to(memory_format=memory_format)
        conv = nn.Conv2d(channels, channels, 3, padding=1).to(memory_format=memory_format)
        modules = {("", CONVOLUTION): conv}
        for backend in available():
            modules[backend, "ACmix2d"] = acmix.ACmix2d(channels, channels, backend=backend)
        for (backend, subject), module in modules.items():
            for run, function in (("forward", infer), ("forward+backward", train)):
                bound = bind(function, module, x)
                bytes_ = x.numel() * x.element_size()
                yield Case(subject, backend, layout, channels, size, run, bound, bytes_)


def operator_cases(channels: int, size: int) -> Iterator[Case]:
    """Each operator alone on every backend, on (B, C, H, W) maps in NCHW."""
    q, k, v = torch.randn(3, BATCH, channels, size, size)
    position = torch.randn(channels // HEADS, 2)
    weight = torch.randn(BATCH, channels // 8, WINDOW**2, size, size)
    pieces = torch.randn(BATCH, channels // HEADS, 3 * HEADS, size, size).transpose(1, 2)
    qkv = torch.randn(3 * channels, channels), torch.randn(3 * channels)
    fc, shift = torch.randn(9, 3 * HEADS), torch.randn(channels, 9, 3, 3)
    operators: dict[str, tuple[Callable[..., Tensor], list[Tensor], dict[str, object]]] = {
        "window_attention": (
            positioned_attention,
            [q, k, v, position],
            {"heads": HEADS, "window": WINDOW},
        ),
        "acmix": (ops.acmix, [v, *qkv, position, fc, shift], {"heads": HEADS, "window": WINDOW}),
        "weighted_aggregation": (weighted_aggregation, [weight, v], {"window": WINDOW}),
    }
    bytes_ = v.numel() * v.element_size()
    for subject, (function_, inputs, arguments) in operators.items():
        for backend in available():
            for run, function in (("forward", infer), ("forward+backward", train)):
                bound = bind(function, function_, *inputs, backend=backend, **arguments)
                yield Case(subject, backend, "nchw", channels, size, run, bound, bytes_)
    for backend in available():
        for run, function in (("forward", infer), ("forward+backward", train)):
            bound = bind(function, shift_convolution, pieces, fc, shift, backend=backend)
            yield Case("shift_convolution", backend, "nchw", channels, size, run, bound, bytes_)


def positioned_attention(q: Tensor, k: Tensor, v: Tensor, p: Tensor, **arguments: Any) -> Tensor:
    return window_attention(q, k, v, position=p, **arguments)


def bind(function: Callable[..., object], *args: object, **kwargs: object) -> Run:
    return lambda: function(*args, **kwargs)


def infer(subject: Callable[..., Tensor], *inputs: Tensor, **kwargs: object) -> Tensor:
    with torch.no_grad():
        return subject(*inputs, **kwargs)


def train(subject: Callable[..., Tensor], *inputs: Tensor, **kwargs: object) -> None:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = subject(*leaves, **kwargs)
    if isinstance(subject, nn.Module):
        subject.zero_grad(set_to_none=True)
    out.backward(torch.ones((), dtype=out.dtype).expand_as(out))


def check() -> None:
    """Hold every fast path against the reference, output and gradients; exit where one is off."""
    for (channels, size), backend in [(s, b) for s in SHAPES for b in available()]:
        if backend == "reference":
            continue
        layer = acmix.ACmix2d(channels, channels, backend=backend)
        exact = acmix.ACmix2d(channels, channels, backend="reference", dtype=torch.float64)
        exact.load_state_dict({k: v.double() for k, v in layer.state_dict().items()})
        results = []
        x = torch.randn(1, channels, size, size)
        seed = torch.randn(1, channels, size, size)
        for module, dtype in ((layer, torch.float32), (exact, torch.float64)):
            leaf = x.to(dtype).requires_grad_()
            out = module(leaf)
            gradients = torch.autograd.grad(out, [leaf, *module.parameters()], seed.to(dtype))
            results.append([out, *gradients])
        for actual, expected in zip(*results, strict=True):
            error = (actual - expected).abs().max() / expected.abs().max().clamp_min(0.1)
            if not error <= 2e-5:
                sys.exit(f"{backend} is wrong at C={channels}, {size}x{size}: error {error:.1e}")


def measure(cases: list[Case], seconds: float, what: str) -> None:
    """Give the fast cases turns for about `seconds`, three at least."""
    for case in track(cases, description=f"{what}: warming up", transient=True):
        case.function()
    for case in track(cases, description=f"{what}: timing", transient=True):
        turns_of(case)  # a first estimate
    fast = [case for case in cases if case.backend not in SLOW]
    rounds = max(3, int(seconds / sum(min(case.times) for case in fast)))
    for _ in track(range(rounds), description=f"{what}: {rounds} turns", transient=True):
        for case in fast:
            turns_of(case)


def turns_of(case: Case) -> None:
    start = time.perf_counter()
    case.function()
    case.times.append(time.perf_counter() - start)


def rows_of(cases: list[Case], threads: int, origin: dict[str, str]) -> list[dict[str, object]]:
    rows = []
    for case in cases:
        convolutions = [c for c in cases if c.subject == CONVOLUTION and c.run == case.run]
        best = min((c.best for c in convolutions), default=None)
        rows.append(
            {
                "subject": case.subject,
                "backend": case.backend,
                "layout": case.layout,
                "batch": BATCH,
                "channels": case.channels,
                "size": case.size,
                "run": case.run,
                "threads": threads,
                "dtype": "float32",
                "min_ms": round(case.best * 1e3, 4),
                "median_ms": round(statistics.median(case.times) * 1e3, 4),
                "turns": len(case.times),
                "times_conv3x3": round(case.best / best, 3) if best else "",
                "peak_inputs": "",
                **origin,
            }
        )
    return rows


def peaks() -> Iterator[list[object]]:
    """(subject, backend, layout, channels, run, peak memory in tensors of the input's size)."""
    torch.set_num_threads(1)
    for channels, size in SHAPES:
        for case in [*layer_cases(channels, size), *operator_cases(channels, size)]:
            if case.run == "forward+backward":
                peak = round(memory.peak_of(case.function) / case.input_bytes, 2)
                yield [case.subject, case.backend, case.layout, case.channels, case.run, peak]


def add_peaks(rows: list[dict[str, object]]) -> None:
    """In a process of its own, where freed memory goes back to the system at once."""
    command = [sys.executable, __file__, "--peaks"]
    result = subprocess.run(
        command,
        env={**os.environ, **memory.ENVIRONMENT},
        capture_output=True,
        text=True,
        check=True,
    )
    for *case, peak in json.loads(result.stdout):
        for row in rows:
            if [row[k] for k in ("subject", "backend", "layout", "channels", "run")] == case:
                row["peak_inputs"] = peak


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def ceilings() -> dict[str, float]:
    """What this machine can do: float32 multiply-adds of a large matrix product, and a copy."""
    a, b = torch.randn(2, 1024, 1024)
    source = torch.randn(2**24)
    target = torch.empty_like(source)
    product = min(timed(lambda: a @ b) for _ in range(8))
    copy = min(timed(lambda: target.copy_(source)) for _ in range(8))
    return {
        "GFLOP/s": 2 * 1024**3 / product / 1e9,
        "GB/s": 2 * source.numel() * 4 / copy / 1e9,
    }


def timed(function: Run) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def roofline(
    cases: list[Case], ceiling: dict[str, float], threads: int, origin: dict[str, str]
) -> list[dict[str, object]]:
    """Arithmetic and least traffic of native attention over its time, beside the ceilings.

    Forward reads q, k, v and writes out; with backward it reads q, k, v and the gradient again
    and writes three gradients. Backward has four products where forward has two, and makes the
    logits again.
    """
    products = {"forward": 2, "forward+backward": 7}
    maps = {"forward": 4, "forward+backward": 11}
    rows = []
    for case in cases:
        if (case.subject, case.backend) != ("window_attention", "native"):
            continue
        elements = BATCH * case.size**2 * case.channels
        gflops = 2 * products[case.run] * WINDOW**2 * elements / case.best / 1e9
        gbytes = 4 * maps[case.run] * elements / case.best / 1e9
        rows.append(
            {
                "subject": case.subject,
                "backend": case.backend,
                "channels": case.channels,
                "size": case.size,
                "run": case.run,
                "threads": threads,
                "gflop_per_s": round(gflops, 1),
                "matrix_product_gflop_per_s": round(ceiling["GFLOP/s"], 1),
                "gbyte_per_s": round(gbytes, 2),
                "copy_gbyte_per_s": round(ceiling["GB/s"], 1),
                **origin,
            }
        )
    return rows


def show_roofline(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="native window_attention beside what this machine attains")
    for column in (
        "shape",
        "run",
        "threads",
        "GFLOP/s",
        "of a matrix product",
        "GB/s",
        "of a copy",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        gflops, gbytes = row["gflop_per_s"], row["gbyte_per_s"]
        table.add_row(
            f"C={row['channels']}, {row['size']}x{row['size']}",
            row["run"],
            str(row["threads"]),
            f"{gflops:.0f}",
            f"{gflops / row['matrix_product_gflop_per_s']:.0%}",
            f"{gbytes:.1f}",
            f"{gbytes / row['copy_gbyte_per_s']:.0%}",
        )
    console.print(table)


def show(rows: list[dict[str, object]], console: Console) -> None:
    for threads in sorted({row["threads"] for row in rows}):
        table = Table(title=f"minimum in ms (times the best conv3x3), {threads} thread(s)")
        for column in ("", "layout", "run", *(f"{c}, {s}x{s}" for c, s in SHAPES)):
            table.add_column(column, justify="left" if column in ("", "layout", "run") else "right")
        keys = dict.fromkeys(
            (r["subject"], r["backend"], r["layout"], r["run"])
            for r in rows
            if r["threads"] == threads
        )
        for key in keys:
            cells = []
            for channels, _ in SHAPES:
                [row] = [
                    r
                    for r in rows
                    if (r["subject"], r["backend"], r["layout"], r["run"]) == key
                    and (r["threads"], r["channels"]) == (threads, channels)
                ]
                ratio = f" ({row['times_conv3x3']:.2f})" if row["times_conv3x3"] else ""
                cells.append(f"{row['min_ms']:.2f}{ratio}")
            table.add_row(f"{key[0]} {key[1]}".strip(), key[2], key[3], *cells)
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=8, help="timing per shape and threads")
    parser.add_argument("--networks", action="store_true", help="time whole networks as well")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--peaks", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peaks:
        print(json.dumps(list(peaks())))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    torch.manual_seed(0)
    check()
    console.print("fast paths agree with the reference")
    rows, attained = [], []
    origin = provenance(processor())
    origin["simd"] = _native.simd() if backends()["native"] is None else ""
    for threads in args.threads:
        torch.set_num_threads(threads)
        ceiling = ceilings()
        for channels, size in SHAPES:
            cases = [*layer_cases(channels, size), *operator_cases(channels, size)]
            measure(cases, args.seconds, f"{threads} thread(s), C={channels}")
            rows += rows_of(cases, threads, origin)
            attained += roofline(cases, ceiling, threads, origin)
    add_peaks(rows)
    show(rows, console)
    show_roofline(attained, console)
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "cpu.csv", rows)
    write(args.out / "cpu_roofline.csv", attained)
    draw(rows, args.out / "cpu.png")
    if args.networks:
        import networks

        write(args.out / "cpu_networks.csv", networks.measure(args.threads, origin, console))
    console.print(f"wrote {args.out}")


def write(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """ACmix2d over the best convolution, by shape, for each backend; one panel a run and thread
    count."""
    from matplotlib.figure import Figure

    threads = sorted({int(str(row["threads"])) for row in rows})
    runs = ("forward", "forward+backward")
    figure = Figure(figsize=(9, 3.2 * len(threads) + 0.6), layout="constrained", dpi=130)
    panels = figure.subplots(len(threads), len(runs), squeeze=False, sharex=True, sharey=True)
    colours = {"native": "#0072B2", "tiled": "#E69F00", "reference": "#999999"}
    for row_of_panels, count in zip(panels, threads, strict=True):
        for panel, run in zip(row_of_panels, runs, strict=True):
            for offset, backend in enumerate(available()):
                heights = [
                    min(
                        float(str(row["times_conv3x3"]))
                        for row in rows
                        if (row["subject"], row["backend"], row["channels"])
                        == ("ACmix2d", backend, channels)
                        and (row["run"], row["threads"]) == (run, count)
                    )
                    for channels, _ in SHAPES
                ]
                positions = [i + 0.27 * (offset - 1) for i in range(len(SHAPES))]
                bars = panel.bar(positions, heights, 0.25, color=colours[backend], label=backend)
                labels = [f"{h:.2f}" if h < 10 else f"{h:.0f}" for h in heights]
                clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
                panel.bar_label(bars, labels, fontsize=7.5, padding=2, bbox=clear)
            panel.axhline(1, color="black", linewidth=0.9, zorder=0.5)
            panel.set_yscale("log")
            panel.set_xticks(range(len(SHAPES)), [f"C={c}\n{s}x{s}" for c, s in SHAPES])
            panel.set_title(f"{run}, {count} thread{'s' * (count > 1)}", fontsize=10)
            panel.spines[["top", "right"]].set_visible(False)
    for row_of_panels in panels:
        row_of_panels[0].set_ylabel("time / time of 3x3 convolution", fontsize=9)
    panels[0][0].legend(frameon=False, fontsize=8, title="ACmix2d", title_fontsize=8)
    figure.suptitle(
        f"An ACmix layer against the 3x3 convolution it replaces (line at 1)\n"
        f"{rows[0]['device']}, float32, batch {BATCH}, minima",
        fontsize=11,
    )
    figure.savefig(path)


if __name__ == "__main__":
    main()
