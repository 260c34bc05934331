"""Training: images/s of networks and data, cost of the all-reduce, and what follows at scale.

python benchmarks/training.py rates      # one process, paths by turns
python benchmarks/training.py ddp        # two processes on gloo
python benchmarks/training.py scale      # from parameter counts alone
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.multiprocessing as mp
from PIL import Image
from torch import distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import acmix  # noqa: F401  registers the networks
from acmix.data import Images

PATHS = ("conv", "attn", "acmix")
NETWORKS = (
    *("resnet26_acmix", "resnet38_acmix", "resnet50_acmix"),
    *("san10_acmix", "san15_acmix", "san19_acmix"),
    *("pvt_tiny_acmix", "pvt_small_acmix", "swin_tiny_acmix", "swin_small_acmix"),
)
# Images/s of one H200 training the baselines (docs/scale.md); epochs of the recipe.
BASELINES = {"resnet50_acmix": (4317, 100), "swin_tiny_acmix": (2196, 300)}
DEVICE_BATCH = 128
GPUS = (8, 64, 512)
# Bytes/s of a GPU within a machine, bytes/s of a GPU among machines; s of latency for each hop.
LINKS = {"400 Gb/s a GPU": (300e9, 40e9), "400 Gb/s a machine": (300e9, 5e9)}
LATENCY = 10e-6
# What an all-reduce cost of the step of two processes on gloo, as a multiple of it alone.
OVERHEAD = 42 / 33


def make_step(net: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    """Forward, backward and SGD on one batch (B, 3, H, W)."""
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    classes = torch.arange(len(images)) % 10

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(net(images), classes).backward()
        optimizer.step()

    return step


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rates(threads: int, batch: int, turns: int) -> None:
    torch.set_num_threads(threads)
    nhwc = torch.channels_last
    images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=nhwc)
    steps = {}
    for path in PATHS:
        net = timm.create_model(f"resnet26_small_{path}").to(memory_format=nhwc)
        steps[path] = make_step(net, images)
    times: dict[str, list[float]] = {path: [] for path in PATHS}
    for turn in range(turns + 1):
        for path, step in steps.items():
            taken = seconds_of(step)
            if turn:  # the first warms up
                times[path].append(taken)
    print(f"resnet26_small, 32x32, batch {batch}, {threads} threads, {turns} turns: images/s")
    for path, seconds in times.items():
        best, median = batch / min(seconds), batch / statistics.median(seconds)
        share = min(times["conv"]) / min(seconds)
        typical = statistics.median(times["conv"]) / statistics.median(seconds)
        print(f"{path:6} best {best:6.1f} ({share:.2f})   median {median:6.1f} ({typical:.2f})")
    print(f"data   {data_rate():6.0f} by the clock, 1 process, 32x32, JPEG in folders")


def data_rate(count: int = 2000, batch: int = 64) -> float:
    """Images/s of the loader alone on pictures of noise."""
    noise = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for index in range(count):
            place = Path(folder) / "train" / f"c{index % 10}" / f"{index}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (32, 32, 3), np.uint8)).save(place)
        data = Images(folder, val_fraction=0.1, img_size=32, crop_padding=4, batch_size=batch)
        loader = iter(data.train_dataloader())
        next(loader)  # opens what there is to open
        left = len(data.train_dataloader()) - 1
        return left * batch / seconds_of(lambda: [*loader])


def ddp_process(rank: int, port: int, name: str, batch: int, turns: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    net = timm.create_model(name).to(memory_format=torch.channels_last)
    ddp = DistributedDataParallel(net)
    images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    step = make_step(ddp, images)
    gradients = torch.zeros(sum(weight.numel() for weight in net.parameters()))
    runs: dict[str, tuple[Callable[[], Any], Callable[[], object]]] = {
        "step, no all-reduce": (ddp.no_sync, step),
        "step": (nullcontext, step),
        "all-reduce alone": (nullcontext, lambda: distributed.all_reduce(gradients)),
    }
    times: dict[str, list[float]] = {what: [] for what in runs}
    for turn in range(turns + 2):
        for what, (context, run) in runs.items():
            distributed.barrier()
            with context():
                taken = seconds_of(run)
            if turn > 1:  # DDP regroups its buckets after the first
                times[what].append(taken)
    if rank == 0:
        print(f"{name}, 2 processes of batch {batch}, {gradients.numel() * 4 / 1e6:.1f} MB: ms")
        for what, seconds in times.items():
            best, median = 1e3 * min(seconds), 1e3 * statistics.median(seconds)
            print(f"{what:20} best {best:7.1f}   median {median:7.1f}")
    distributed.destroy_process_group()


def ring_seconds(parameters: float, gpus: int, link: tuple[float, float]) -> float:
    """Of an all-reduce of float32 gradients, within machines of 8 and then among them."""
    size, machines = 4 * parameters, gpus // 8
    within = 2 * size * 7 / 8 / link[0]
    # Each of the 8 GPUs of a machine carries an eighth of the gradients among the machines.
    among = 2 * size / 8 * (machines - 1) / machines / link[1]
    return within + among + LATENCY * 2 * (7 + machines - 1)


def scale() -> None:
    print(
        "| network | parameters (M) | all-reduced a step (MB) | sent by a GPU of 8, of 512 (MB) |"
    )
    print("|---|---:|---:|---:|")
    sizes = {}
    for name in NETWORKS:
        weights = timm.create_model(name).parameters()
        sizes[name] = count = sum(w.numel() for w in weights if w.requires_grad)
        ring = [8 * count * (n - 1) / n / 1e6 for n in (8, 512)]
        print(
            f"| {name} | {count / 1e6:.2f} | {4 * count / 1e6:.1f} | {ring[0]:.1f}, {ring[1]:.1f} |"
        )
    print(
        "\n| network | link | GPUs | step (ms) | all-reduce (ms) | efficiency |"
        " ImageNet (h) | 1e9 images (h) |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for name, (rate, epochs) in BASELINES.items():
        for label, link in LINKS.items():
            for gpus in GPUS:
                step, reduce = DEVICE_BATCH / rate, ring_seconds(sizes[name], gpus, link)
                # From nothing hidden behind the backward pass, at the overhead measured, to all
                # that fits into it, two thirds of a step.
                worst = step / (step + OVERHEAD * reduce)
                best = step / (step + max(0, reduce - step * 2 / 3))
                imagenet, billion = (n / rate / gpus / 3600 for n in (1_281_167 * epochs, 1e9))
                print(
                    f"| {name} | {label} | {gpus} | {1e3 * step:.1f} | {1e3 * reduce:.2f} | "
                    f"{worst:.2f} to {best:.2f} | {imagenet / best:.2f} to "
                    f"{imagenet / worst:.2f} | {billion / best:.2f} to {billion / worst:.2f} |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("rates", "ddp", "scale"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    if options.what == "rates":
        rates(options.threads, options.batch, options.turns)
    elif options.what == "ddp":
        args = (29531, "resnet26_small_acmix", options.batch, options.turns)
        mp.spawn(ddp_process, args, nprocs=2)
    else:
        scale()


if __name__ == "__main__":
    main()
