"""Time and memory of ACmix on a GPU, beside the 3x3 convolution and what else computes a window.

    python benchmarks/gpu.py                        # everything, at most 8 minutes
    python benchmarks/gpu.py --only layers          # a part of it
    python benchmarks/gpu.py --only variants        # other tiles of the attention kernels

The kernels are held against the reference first, and each shape before it is timed; what is wrong
is not timed. Every row is written to results/gpu.csv as it is measured, in place of an older one
of the same case. Times are those of CUDA events, with a cold L2 cache, of a call and of its CUDA
graph, which spares launches.
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from shutil import which
from typing import Any

import gpu_check
import timm
import torch
import torch.nn.functional as F
from origin import HERE, provenance
from torch import Tensor, nn

import acmix
from acmix.ops import window_attention

PARTS = ("layers", "roofline", "rivals", "networks", "training")
GOALS = {  # ms of the attention path, forward and with backward; times the convolution
    64: (0.20, 0.8, 4.0),
    128: (0.10, 0.4, 3.5),
    256: (0.06, 0.25, 3.0),
    512: (0.035, 0.15, 2.5),
}
SHAPES = [(64, 56), (128, 28), (256, 14), (512, 7)]
HEADS, WINDOW = 4, 7
STRIDED = [(128, 56), (256, 28), (512, 14)]  # ResNet-50's
PAIRS = [("resnet50", "resnet50_acmix"), ("swin_tiny_patch4_window7_224", "swin_tiny_acmix")]
RUNS = ("forward", "forward+backward")
FIELDS = (
    *("part", "subject", "run", "how", "batch", "channels", "size", "dtype"),
    *("median_ms", "q25_ms", "q75_ms", "min_ms", "repeats", "peak_mib", "images_per_s", "note"),
    *("date", "commit", "device", "driver", "acmix", "torch", "triton", "timm", "python"),
)
CASE = (*FIELDS[:8], "device")
COMPILING = 90  # seconds that a network may take
NETWORK_TOLERANCE = 0.1  # of the largest logit, compiled against not: both in bfloat16
Row = dict[str, Any]


class Bench:
    """The machine, the sizes, and the rows measured so far."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.device, self.quick = device, args.quick
        self.path = args.out / "gpu.csv"
        self.until = time.monotonic() + 60 * args.minutes
        self.batch = 2 if args.quick else args.batch
        self.shapes, self.strided = (
            [(c // 8, s // 7) for c, s in shapes] if args.quick else shapes
            for shapes in (SHAPES, STRIDED)
        )
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.ours = "auto" if device.type == "cpu" else "triton"
        self.origin = provenance(name_of(device)) | versions(device)
        self.rows: list[Row] = []
        self.older = list(csv.DictReader(self.path.open())) if self.path.exists() else []

    def compiled(self, function: Any) -> Any:
        """For the one shape it is called with, whatever was compiled before."""
        torch.compiler.reset()
        return function if self.quick else torch.compile(function, dynamic=False)

    def record(
        self,
        function: Callable[[], object],
        images: int = 0,
        own: list[Tensor] | None = None,
        seconds: float = 0,
        check: Callable[[], str | None] | None = None,
        **case: Any,
    ) -> Row:
        """Time a case, and its peak memory where its inputs and weights are named, `own`.

        Not where fewer `seconds` are left, nor where `check` finds a fault. What it raises is its
        row's note.
        """
        row: Row = {"dtype": str(self.dtype).removeprefix("torch."), "batch": self.batch, **case}
        if time.monotonic() + seconds > self.until:
            row["note"] = "not run: out of time"
        else:
            try:
                wrong = check() if check else None
                row |= {"note": wrong} if wrong else self.measured(function, images, own)
            except Exception as error:  # out of memory, a compiler's: the others go on
                traceback.print_exc()
                row["note"] = gpu_check.line_of(error)
        self.add(row)
        return row

    def add(self, row: Row) -> None:
        self.rows.append({**row, **self.origin})
        self.write()

    def measured(
        self, function: Callable[[], object], images: int, own: list[Tensor] | None
    ) -> Row:
        peak = peak_of(function, self.device, own) if own else ""
        function()  # compiles
        span = 5 if self.quick else 1000 if images else 150
        milliseconds = timings(function, self.device, span)
        several = len(milliseconds) > 1
        quartiles = statistics.quantiles(milliseconds, n=4) if several else milliseconds * 3
        row = dict(zip(("q25_ms", "median_ms", "q75_ms"), quartiles, strict=True))
        row |= {"min_ms": min(milliseconds), "repeats": len(milliseconds), "peak_mib": peak}
        if images:
            row["images_per_s"] = images / row["median_ms"] * 1e3
        return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}

    def write(self) -> None:
        """All rows so far, and the older ones of other cases; whole, or as it was."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        measured = {case_of(row) for row in self.rows}
        part = self.path.with_suffix(".part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(row for row in self.older if case_of(row) not in measured)
            writer.writerows(self.rows)
        part.replace(self.path)

    def find(self, **case: Any) -> Row | None:
        """The row of a case, None where it was not measured."""
        for row in self.rows:
            if "median_ms" in row and all(row.get(key) == value for key, value in case.items()):
                return row
        return None


def case_of(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(name, "")) for name in CASE)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions(device: torch.device) -> dict[str, str]:
    """Of what a GPU's figures depend on beside PyTorch."""
    found = {"timm": timm.__version__, "driver": "", "triton": ""}
    if find_spec("triton"):
        import triton

        found["triton"] = triton.__version__
    if device.type == "cuda" and which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
        found["driver"] = lines[0] if lines else ""
    return found


def timings(function: Callable[[], object], device: torch.device, span: float) -> list[float]:
    """Milliseconds of each call, as many as fill the span (ms)."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(function, warmup=25, rep=span, return_mode="all")
    found, end = [], time.perf_counter() + span / 1e3
    while len(found) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        found.append((time.perf_counter() - start) * 1e3)
    return found


def peak_of(function: Callable[[], object], device: torch.device, own: list[Tensor]) -> float | str:
    """MiB allocated at most, those of its own tensors among them, but not what others hold."""
    if device.type != "cuda":
        return ""
    gc.collect()
    others = torch.cuda.memory_allocated(device) - sum(x.nbytes for x in own)
    function()  # what the first call compiles or keeps is no part of a call's peak
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return (torch.cuda.max_memory_allocated(device) - others) / 2**20


def graph_of(function: Callable[[], object]) -> Callable[[], object]:
    """Replays the function's kernels."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()

    def replay(_reads: object = function) -> None:  # its tensors live as long as the graph
        graph.replay()

    return replay


def weights_of(module: object) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []


def infer(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    def run() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return run


def train(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """Output and gradients of the inputs and, of a module, its parameters."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    wanted = [*leaves, *(function.parameters() if isinstance(function, nn.Module) else ())]
    with torch.no_grad():
        seed = torch.randn_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*leaves), wanted, seed)


def both(
    bench: Bench,
    function: Any,
    *inputs: Tensor,
    check: Callable[[], str | None] | None = None,
    graph: bool = True,
    **case: Any,
) -> None:
    """Forward and forward + backward of a subject, called and as a CUDA graph, once checked."""
    check = cache(check) if check else None
    for run, way in zip(RUNS, (infer, train), strict=True):

        def call(way: Any = way) -> Callable[[], object]:
            return way(function, *inputs)

        own, case = [*inputs, *weights_of(function)], {**case, "run": run, "check": check}
        bench.record(lazily(call), own=own, how="call", **case)
        if graph and bench.device.type == "cuda":
            bench.record(lazily(lambda call=call: graph_of(call())), how="graph", **case)


def lazily(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """What is made at the first call runs at each."""
    made: list[Callable[[], object]] = []

    def run() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return run


def maps(bench: Bench, channels: int, size: int, count: int) -> list[Tensor]:
    """Slices of one channels_last projection (B, count * C, H, W), as the layer makes them."""
    like = {"device": bench.device, "dtype": bench.dtype}
    x = torch.randn(bench.batch, size, size, count * channels, **like).permute(0, 3, 1, 2)
    return list(x.chunk(count, 1))


def position_of(channels: int, like: Tensor) -> Tensor:
    return torch.randn(channels // HEADS, 2, device=like.device, dtype=like.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, position: Tensor, backend: str) -> Tensor:
    sizes = {"heads": HEADS, "window": WINDOW}
    return window_attention(q, k, v, position=position, backend=backend, **sizes)


def layers(bench: Bench) -> None:
    """The convolution, the layer and its attention path."""
    for channels, size in bench.shapes:
        case = {"part": "layers", "channels": channels, "size": size}
        [x] = maps(bench, channels, size, 1)
        kind = {"device": bench.device, "dtype": bench.dtype}
        # Without a bias, as in a ResNet: cuDNN would add it in a pass of its own.
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False, **kind).to(
            memory_format=torch.channels_last
        )
        both(bench, conv, x, subject="conv3x3", **case)
        layer = acmix.ACmix2d(channels, channels, heads=HEADS, backend=bench.ours, **kind)
        both(bench, layer, x, subject="ACmix2d", check=layer_check(bench, channels, size), **case)
        qkv = maps(bench, channels, size, 3)
        inputs = (*qkv, position_of(channels, x))
        check = attention_check(bench, inputs)
        ours = partial(attention, backend=bench.ours)
        both(bench, ours, *inputs, subject="attention", check=check, **case)
    show_layers(bench)


def layer_check(
    bench: Bench, channels: int, size: int, stride: int = 1
) -> Callable[[], str | None]:
    """Of two images: the kernels are specialised to a shape, not to the batch."""
    few = (2, channels, size, size)
    arguments = {"heads": HEADS, "stride": stride}
    return lambda: gpu_check.layer_fault(few, arguments, bench.device, bench.ours, bench.dtype)


def attention_check(bench: Bench, inputs: tuple[Tensor, ...]) -> Callable[[], str | None]:
    few = [*(x[:2] for x in inputs[:3]), inputs[3]]
    name = f"attention {tuple(few[0].shape)}"
    return lambda: gpu_check.fault(name, attention, few, {}, bench.ours, bench.dtype)


def rivals(bench: Bench) -> None:
    """Other ways to the attention path, and the layer compiled."""
    for channels, size in bench.shapes:
        case = {"part": "rivals", "channels": channels, "size": size}
        qkv = maps(bench, channels, size, 3)
        inputs = (*qkv, position_of(channels, qkv[0]))
        tiled = partial(attention, backend="tiled")  # halo tiles, scaled_dot_product_attention
        # In a graph it computes by the definition, since it may not look at its results.
        both(bench, tiled, *inputs, graph=False, subject="SDPA on halo tiles", **case)
        reference = partial(attention, backend="reference")
        both(bench, reference, *inputs, subject="windows unfolded", **case)
        heads = [x.flatten(2).unflatten(1, (HEADS, -1)).mT.contiguous() for x in qkv]
        both(bench, flex(bench, size), *heads, subject="FlexAttention, cut at the border", **case)
        [x] = maps(bench, channels, size, 1)
        kind = {"device": bench.device, "dtype": bench.dtype}
        layer = acmix.ACmix2d(channels, channels, heads=HEADS, backend=bench.ours, **kind)
        both(bench, bench.compiled(layer), x, subject="ACmix2d compiled", **case)
    print_table(
        "Other ways, median ms (call)",
        ("", *(f"C={c}, {s}x{s}" for c, s in bench.shapes)),
        [
            [f"{subject}, {run}", *(cell(bench, "rivals", subject, run, s) for s in bench.shapes)]
            for subject, run in dict.fromkeys(
                (r["subject"], r["run"]) for r in bench.rows if r["part"] == "rivals"
            )
        ],
    )


def flex(bench: Bench, size: int) -> Callable[..., Tensor]:
    """FlexAttention of maps (B, N, H * W, d) to a window without reflection."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def inside(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows = (query // size - key // size).abs() <= WINDOW // 2
        return rows & ((query % size - key % size).abs() <= WINDOW // 2)

    mask = create_block_mask(inside, None, None, size**2, size**2, device=str(bench.device))
    function = bench.compiled(flex_attention)
    return lambda q, k, v: function(q, k, v, block_mask=mask)


def networks(bench: Bench) -> None:
    """Images/s of ACmix networks and of those whose operator they replace, called and compiled."""
    strided = cache(partial(strided_fault, bench))
    for name in names_of(bench):
        net, x, case = network(bench, name, strided)
        own = [x, *weights_of(net)]
        step = training_step(net, x)
        bench.record(step, bench.batch, own, run="training", how="call", **case)
        net, x = net.to(bench.dtype).eval(), x.to(bench.dtype)
        own = [x, *weights_of(net)]
        bench.record(infer(net, x), bench.batch, own, run="inference", how="call", **case)
        del net, x, own, step
    show_networks(bench, [("inference", "call"), ("training", "call")])
    for name in names_of(bench):
        net, x, case = network(bench, name)
        net, x = net.to(bench.dtype).eval(), x.to(bench.dtype)
        own, fast = [x, *weights_of(net)], infer(bench.compiled(net), x)
        case |= {"seconds": COMPILING, "check": partial(differing, fast, infer(net, x))}
        bench.record(fast, bench.batch, own, run="inference", how="compiled", **case)
        del net, x, own, fast, case
    show_networks(bench, [("inference", "compiled")])


def training(bench: Bench) -> None:
    """The training step compiled, last because its compilation takes minutes."""
    for name in names_of(bench):
        net, x, case = network(bench, name)
        step, own = training_step(bench.compiled(net), x), [x, *weights_of(net)]
        case["seconds"] = COMPILING
        bench.record(step, bench.batch, own, run="training", how="compiled", **case)
        del net, x, own, step
    show_networks(bench, [("training", "compiled")])


def strided_fault(bench: Bench) -> str | None:
    """Of the layers of a ResNet that no other part checks."""
    checks = (layer_check(bench, *shape, stride=2) for shape in bench.strided)
    return next(filter(None, (check() for check in checks)), None)


def differing(actual: Callable[[], object], expected: Callable[[], object]) -> str | None:
    error = gpu_check.worst([actual()], [expected()])
    return None if error <= NETWORK_TOLERANCE else f"error {error:.1e} of the largest logit"


def names_of(bench: Bench) -> list[str]:
    return [name for pair in pairs_of(bench) for name in pair]


def pairs_of(bench: Bench) -> list[tuple[str, str]]:
    return [("resnet26_conv", "resnet26_acmix")] if bench.quick else PAIRS


def network(
    bench: Bench, name: str, strided: Callable[[], str | None] | None = None
) -> tuple[nn.Module, Tensor, Row]:
    """A network, its images, and the columns of its rows, with the check of its layers."""
    torch.manual_seed(0)
    size = 32 if bench.quick else 224
    net = timm.create_model(name).to(bench.device, memory_format=torch.channels_last)
    x = torch.randn(bench.batch, 3, size, size, device=bench.device)
    case: Row = {"part": "networks", "subject": name, "size": size}
    if any(isinstance(module, acmix.ACmix2d) for module in net.modules()):
        case["check"] = strided
    return net, x.to(memory_format=torch.channels_last), case


def training_step(net: nn.Module, x: Tensor) -> Callable[[], object]:
    """Mixed precision, cross-entropy, SGD with momentum."""
    target = torch.randint(1000, (len(x),), device=x.device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        net.train()
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            loss = F.cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()

    return step


def roofline(bench: Bench) -> None:
    """The least time of attention by its traffic and arithmetic beside what it took.

    Forward reads q, k, v and writes out: 4 maps, 2 products with the window's taps; backward reads
    these and the gradient, and writes 3: 7 maps more, 5 products.
    """
    side = 256 if bench.quick else 8192
    a = torch.randn(side, side, device=bench.device, dtype=bench.dtype)
    case: Row = {"part": "roofline", "size": side}
    copy = bench.record(lambda: a.clone(), subject="copy", run="forward", **case)
    product = bench.record(lambda: a @ a, subject="matrix product", run="forward", **case)
    if "median_ms" not in copy or "median_ms" not in product:
        return
    bandwidth = 2 * a.numel() * a.element_size() / copy["median_ms"]  # bytes/ms
    rate = 2 * side**3 / product["median_ms"]  # FLOP/ms
    lines = []
    for channels, size in bench.shapes:
        for run, count, products in zip(RUNS, (4, 11), (2, 7), strict=True):
            row = best(bench, "layers", "attention", run, (channels, size))
            elements = bench.batch * channels * size**2
            memory = count * elements * a.element_size() / bandwidth
            arithmetic = 2 * products * WINDOW**2 * elements / rate
            least = max(memory, arithmetic)
            took = f"{row:.3f}" if row else "not run"
            part = f"{least / row:.0%}" if row else "-"
            shape = f"C={channels}, {size}x{size}, {run}"
            lines.append([shape, f"{memory:.3f}", f"{arithmetic:.3f}", took, part])
    rates = f"copy {bandwidth / 1e9:.2f} TB/s, matrix product {rate / 1e9:.0f} TFLOP/s"
    heads = ("", "by traffic", "by arithmetic", "took", "of the limit")
    print_table(f"Attention, least ms ({rates})", heads, lines)


def variants(bench: Bench) -> None:
    """Every tile of the search list for every shape, forward and forward + backward."""
    from acmix.ops.window_attention import triton as kernels

    chosen = kernels.choose_tile
    for channels, size in bench.shapes:
        qkv = maps(bench, channels, size, 3)
        inputs = (*qkv, position_of(channels, qkv[0]))
        padded = kernels.padded_channels(channels // HEADS)
        for tile in [None, *kernels.candidates(padded * qkv[0].element_size())]:
            case: Row = {"part": "variants", "channels": channels, "size": size}
            case |= {"subject": str(tile or "chosen"), "check": attention_check(bench, inputs)}
            try:
                kernels.choose_tile = chosen if tile is None else lambda *_, tile=tile: tile
                both(bench, partial(attention, backend=bench.ours), *inputs, **case)
            finally:
                kernels.choose_tile = chosen
    for channels, size in bench.shapes:
        for run in RUNS:
            tiles = dict.fromkeys(r["subject"] for r in bench.rows if r["part"] == "variants")
            timed = {tile: best(bench, "variants", tile, run, (channels, size)) for tile in tiles}
            order = sorted((ms, tile) for tile, ms in timed.items() if ms)
            lines = [[tile, f"{ms:.4f}"] for ms, tile in order]
            print_table(f"C={channels}, {size}x{size}, {run}", ("tile", "ms"), lines)


def best(bench: Bench, part: str, subject: str, run: str, shape: tuple[int, int]) -> float | None:
    """Median ms of a case, of its graph where there is one."""
    case = {"part": part, "subject": subject, "run": run, "channels": shape[0], "size": shape[1]}
    row = bench.find(how="graph", **case) or bench.find(how="call", **case)
    return row["median_ms"] if row else None


def cell(bench: Bench, part: str, subject: str, run: str, shape: tuple[int, int]) -> str:
    case = {"part": part, "subject": subject, "run": run, "channels": shape[0], "size": shape[1]}
    row = bench.find(how="call", **case)
    return f"{row['median_ms']:.3f}" if row else "not run"


def show_layers(bench: Bench) -> None:
    lines = []
    for run in RUNS:
        for subject in ("conv3x3", "attention", "ACmix2d"):
            for how in ("call", "graph"):
                case = {"part": "layers", "subject": subject, "run": run, "how": how}
                shown = [bench.find(**case, channels=c, size=s) for c, s in bench.shapes]
                if any(shown):
                    cells = [f"{row['median_ms']:.3f}" if row else "not run" for row in shown]
                    lines.append([f"{subject}, {run}, {how}", *cells])
    for what, goal, value in ratios(bench):
        lines.append([f"{what} (goal)", *(f"{v} ({g})" for v, g in zip(value, goal, strict=True))])
    shapes = (f"C={c}, {s}x{s}" for c, s in bench.shapes)
    print_table("Layers, median ms", ("", *shapes), lines)


def ratios(bench: Bench) -> Iterator[tuple[str, list[float], list[str]]]:
    """(what, goals, values) over the shapes."""
    goals = list(GOALS.values())
    for index, run in enumerate(RUNS):
        values = [best(bench, "layers", "attention", run, shape) for shape in bench.shapes]
        shown = [f"{v:.3f}" if v else "not run" for v in values]
        yield f"attention, {run}, ms", [goal[index] for goal in goals], shown
    pairs = [
        [best(bench, "layers", subject, "forward", shape) for subject in ("ACmix2d", "conv3x3")]
        for shape in bench.shapes
    ]
    shown = [f"{a / c:.2f}" if a and c else "not run" for a, c in pairs]
    yield "layer / conv3x3, forward", [goal[2] for goal in goals], shown
    memory = []
    for channels, size in bench.shapes:
        case = {"run": RUNS[1], "how": "call", "channels": channels, "size": size}
        a, c = (bench.find(subject=subject, **case) for subject in ("ACmix2d", "conv3x3"))
        known = a and c and a["peak_mib"] and c["peak_mib"]
        memory.append(f"{a['peak_mib'] / c['peak_mib']:.1f}" if known else "not run")
    yield "layer / conv3x3, peak memory", [4.0] * len(memory), memory


def show_networks(bench: Bench, ways: list[tuple[str, str]]) -> None:
    lines = []
    for baseline, ours in pairs_of(bench):
        for run, how in ways:
            case = {"part": "networks", "run": run, "how": how}
            rows = [bench.find(subject=name, **case) for name in (baseline, ours)]
            if not all(rows):
                lines.append([ours, run, how, *["not run"] * 4])
                continue
            old, new = (row["images_per_s"] for row in rows)
            peaks = [row["peak_mib"] for row in rows]
            memory = f"{peaks[1] / peaks[0]:.2f}" if all(peaks) else "-"
            lines.append([ours, run, how, f"{old:.0f}", f"{new:.0f}", f"{new / old:.2f}", memory])
    heads = ("network", "run", "how", "baseline, images/s", "ours", "ratio", "memory ratio")
    goals = "inference 0.75 and 0.9, training 0.6 and 0.9, memory of ResNet's training 1.6"
    authors = "the authors' ACmix-ResNet-50 on an H200: 316 and 151 images/s"
    print_table(f"Networks (goals: {goals}; {authors})", heads, lines)


def print_table(title: str, heads: tuple[str, ...], lines: list[list[str]]) -> None:
    widths = [max(len(line[i]) for line in [list(heads), *lines]) for i in range(len(heads))]
    print(f"\n{title}")
    for line in [list(heads), *lines]:
        first, *others = zip(line, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
        print("  ".join(cells), flush=True)


def draw(bench: Bench) -> None:
    """Layer and attention path over the convolution, by shape."""
    if not bench.find(part="layers", subject="conv3x3"):
        print("no layer was timed: no figure")
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no matplotlib: no figure")
        return
    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=130)
    colours = {"ACmix2d": "#0072B2", "attention": "#56B4E9"}
    for panel, run in zip(figure.subplots(1, 2, sharey=True), RUNS, strict=True):
        for offset, (subject, colour) in enumerate(colours.items()):
            heights = []
            for shape in bench.shapes:
                a, c = (best(bench, "layers", s, run, shape) for s in (subject, "conv3x3"))
                heights.append(a / c if a and c else 0.0)
            places = [i + 0.36 * (offset - 0.5) for i in range(len(heights))]
            bars = panel.bar(places, heights, 0.34, color=colour, label=subject)
            labels = [f"{h:.2f}" if h else "not run" for h in heights]
            panel.bar_label(bars, labels, fontsize=8, padding=2)
        panel.axhline(1, color="black", linewidth=0.9)
        panel.set_xticks(range(len(bench.shapes)), [f"C={c}\n{s}x{s}" for c, s in bench.shapes])
        panel.set_title(run, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(y=0.15)
    figure.axes[0].set_ylabel("time / time of the 3x3 convolution", fontsize=9)
    figure.axes[0].legend(frameon=False, fontsize=8)
    kind = f"{bench.origin['device']}, {str(bench.dtype).removeprefix('torch.')}"
    figure.suptitle(f"{kind}, batch {bench.batch}, medians (line at 1)", fontsize=11)
    figure.savefig(bench.path.with_suffix(".png"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = (*PARTS, "variants")
    parser.add_argument("--only", nargs="+", choices=parts, default=PARTS, help="parts to run")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--minutes", type=float, default=7, help="what starts later is not run")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs at all")
    args = parser.parse_args()
    if args.quick and args.out == HERE / "results":
        parser.error("--quick: expected --out FOLDER with it, since its rows are no results")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print('make bench-gpu: no GPU found; what it measures reads "not run"', file=sys.stderr)
        return 2
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    bench = Bench(args, device)
    wrong = gpu_check.faults(device, bench.ours)
    for line in chain.from_iterable(wrong.values()):
        print(line, file=sys.stderr)
    if wrong[bench.dtype]:
        print("the kernels are wrong here: nothing is timed", file=sys.stderr)
        return 1
    agreed = ", ".join(str(dtype) for dtype, faults in wrong.items() if not faults)
    print(f"{bench.origin['device']}: agrees with the reference in {agreed}", flush=True)
    for part in args.only:
        try:
            globals()[part](bench)
        except Exception as error:  # before or between its cases
            traceback.print_exc()
            bench.add({"part": part, "note": gpu_check.line_of(error)})
    draw(bench)
    print(f"wrote {bench.path}")
    return 1 if any(wrong.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
