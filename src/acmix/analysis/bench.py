"""How fast networks, detectors and segmenters are, and what memory they take, side by side.

All take turns, so that a slow moment of the machine hits them alike. Memory is measured in a
process of its own.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

import acmix.models  # noqa: F401  registers our networks with timm
from acmix.detection import create_detector
from acmix.models._layout import is_convolutional
from acmix.segmentation import create_segmenter

Step = Callable[[], object]
RUNS = ("inference", "training")
SIZES = {"classification": (224, 224), "detection": (800, 1333), "segmentation": (512, 512)}
BATCHES = {"classification": 4, "detection": 1, "segmentation": 1}
CLASSES = {"classification": 1000, "detection": 80, "segmentation": 150}
OBJECTS = 8  # of a training image
# For glibc, before the process starts: every tensor of 64 KiB or more gets pages of its own and
# gives them back when it is freed.
HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Subject:
    """What is measured: a network, alone or in a detector or segmenter, and how it runs.

    head: of the task, such as retinanet; "" for classification. size: height and width in pixels.
    """

    name: str
    run: Literal["inference", "training"]
    task: str = "classification"
    head: str = ""
    size: tuple[int, int] = (224, 224)
    batch: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    threads: int = 1
    compile: bool = False

    def build(self) -> tuple[nn.Module, Step]:
        """The network, and a step of it."""
        torch.manual_seed(0)
        net = self._network().to(self.device)
        if is_convolutional(net):
            net.to(memory_format=torch.channels_last)
        net.train(self.run == "training")
        if self.compile:
            getattr(net, "features", net).compile()
        return net, self._step(net)

    def _network(self) -> nn.Module:
        if self.task == "detection":
            height, width = sorted(self.size)
            kwargs: dict[str, Any] = {"test_size": height, "max_size": width}
            return create_detector(self.name, self.head, CLASSES[self.task], **kwargs)  # type: ignore[arg-type]
        if self.task == "segmentation":
            return create_segmenter(self.name, self.head, CLASSES[self.task])  # type: ignore[arg-type]
        return timm.create_model(self.name, num_classes=CLASSES[self.task])

    def _step(self, net: nn.Module) -> Step:
        images = torch.randn(self.batch, 3, *self.size, device=self.device)
        inputs: tuple[Any, ...] = (images,)
        if self.task == "detection":
            inputs = list(images), self._targets()
        elif is_convolutional(net):
            inputs = (images.contiguous(memory_format=torch.channels_last),)
        half = self.dtype == "bfloat16"
        precision = torch.autocast(self.device, torch.bfloat16) if half else nullcontext()

        def infer() -> object:
            with torch.inference_mode(), precision:
                return net(inputs[0])

        def train() -> None:
            with precision:
                loss = loss_of(net(*inputs))
            loss.backward()
            net.zero_grad(set_to_none=True)  # so that gradients are not held before a step

        return infer if self.run == "inference" else train

    def _targets(self) -> list[dict[str, Tensor]]:
        """Some objects for each image, in the middle of it."""
        height, width = self.size
        corner = torch.rand(OBJECTS, 2) * torch.tensor([width, height]) / 2
        boxes = torch.cat([corner, corner + torch.tensor([width, height]) / 4], 1)
        masks = torch.zeros(OBJECTS, height, width, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        target = {"boxes": boxes, "labels": torch.arange(OBJECTS), "masks": masks}
        return [{key: of.to(self.device) for key, of in target.items()}] * self.batch


def loss_of(found: Any) -> Tensor:
    """Of a detector its own; of logits, and those of an auxiliary head, one that has all in it."""
    if isinstance(found, dict):
        return torch.stack(list(found.values())).sum()
    parts = found if isinstance(found, tuple) else (found,)
    return torch.stack([part.float().square().mean() for part in parts if part is not None]).sum()


@dataclass(frozen=True)
class Measured:
    """Of one subject: seconds a step, and peak bytes above what the process held before."""

    subject: Subject
    parameters: int
    seconds: tuple[float, ...]
    peak: float

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    def row(self, base: Measured) -> dict[str, Any]:
        """For a table; times as fast as `base`."""
        first, third = self.quartiles
        subject = asdict(self.subject)
        subject["size"] = "x".join(map(str, self.subject.size))
        return {
            **subject,
            "parameters": self.parameters,
            "images_per_second": round(self.subject.batch / self.best, 4),
            "times_as_fast": round(base.best / self.best, 4),
            "ms_min": round(1e3 * self.best, 3),
            "ms_first_quartile": round(1e3 * first, 3),
            "ms_median": round(1e3 * statistics.median(self.seconds), 3),
            "ms_third_quartile": round(1e3 * third, 3),
            "peak_mib": round(self.peak / 2**20, 1),
            "turns": len(self.seconds),
        }


def measure(
    subjects: Sequence[Subject], turns: int, progress: Callable[[], object] = lambda: None
) -> list[Measured]:
    """Each once to warm up, then all in turn.

    Args:
        subjects: On one device, with one number of threads.
        turns: Of each, at least 2.
        progress: Called after each step, and after each measurement of memory.
    """
    torch.set_num_threads(subjects[0].threads)
    built = [subject.build() for subject in subjects]
    peaks = []
    for subject in subjects:
        peaks.append(peak_memory(subject))
        progress()
    seconds = take_turns([step for _, step in built], turns, subjects[0].device, progress)
    return [
        Measured(subject, sum(of.numel() for of in net.parameters()), times, peak)
        for subject, (net, _), times, peak in zip(subjects, built, seconds, peaks, strict=True)
    ]


def take_turns(
    steps: Sequence[Step],
    turns: int,
    device: str = "cpu",
    progress: Callable[[], object] = lambda: None,
) -> list[tuple[float, ...]]:
    """Seconds of each step, turn by turn; the first turn warms up and does not count."""
    seconds: list[list[float]] = [[] for _ in steps]
    for turn in range(turns + 1):
        for step, times in zip(steps, seconds, strict=True):
            taken = timed(step, device)
            progress()
            if turn:
                times.append(taken)
    return [tuple(times) for times in seconds]


def timed(step: Step, device: str) -> float:
    wait = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def peak_memory(subject: Subject) -> float:
    """Bytes that a step needs above what is held before it; NaN where that cannot be measured.

    On a CPU, weights that were never read are not held before: they count. Of a training step the
    gradients count.
    """
    if subject.device.startswith("cuda"):
        return peak_on_gpu(subject.build()[1])
    if not sys.platform.startswith("linux"):
        return float("nan")
    arguments = [sys.executable, "-m", __name__, json.dumps(asdict(subject))]
    done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | HEAP)
    return float(done.stdout) if done.returncode == 0 else float("nan")


def peak_on_gpu(step: Step) -> float:
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(step: Step) -> float:
    """As the operating system sees it (Linux), scratch memory of kernels included."""
    step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    step()
    return max(0, resident("VmHWM") - before)


def resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def from_json(text: str) -> Subject:
    found = json.loads(text)
    return Subject(**{**found, "size": tuple(found["size"])})


if __name__ == "__main__":
    chosen = from_json(sys.argv[1])
    torch.set_num_threads(chosen.threads)
    print(peak_on_cpu(chosen.build()[1]))
