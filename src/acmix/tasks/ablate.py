"""`acmix ablate`: the two halves of the paper's ablation study, on any data set.

Pan et al., "On the Integration of Self-Attention and Convolution", CVPR 2022, Sec. 5.4: how the two
paths are combined, and how the convolution path shifts and sums.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import timm
import torch
from lightning.fabric.utilities import move_data_to_device
from rich.markup import escape
from rich.table import Table

from acmix.analysis import figures
from acmix.analysis.rates import rate
from acmix.errors import Parser, UserError, user_errors
from acmix.models import list_models
from acmix.tasks import command
from acmix.tasks.base import Task, nested
from acmix.tasks.callbacks import Row, write_csv
from acmix.tasks.console import console
from acmix.tasks.training_cli import TrainingCLI, make

# Arguments of the operator by variant; None stands for the network of convolutions.
PATHS: dict[str, dict[str, str] | None] = {
    "conv": None,
    "attention": {"mix": "attention"},
    "convolution": {"mix": "convolution"},
    "sum": {"mix": "sum"},
    "convex": {"mix": "convex"},
    "acmix": {"mix": "learned"},
}
SHIFTS: dict[str, dict[str, str] | None] = {
    "tensor": {"shift": "tensor"},
    "fixed": {"shift": "fixed"},
    "learned_shared": {"shift": "learned_shared"},
    "learned_shared_random": {"shift": "learned_shared", "shift_init": "kaiming"},
    "learned": {"shift": "learned"},
    "learned_random": {"shift": "learned", "shift_init": "kaiming"},
}
STUDIES = {"paths": PATHS, "shifts": SHIFTS}
TITLES = {
    "paths": "How the two paths are combined",
    "shifts": "How the convolution shifts and sums",
}
TURNS = 3
DESCRIPTION = """\
Train the variants of ACmix side by side, each with several seeds, by the options of acmix fit:
  paths   conv (the network of convolutions, where there is one), attention and convolution (one
          path alone), sum (both, unweighed), convex (alpha and 1 - alpha), acmix (alpha and beta)
  shifts  tensor, fixed, learned_shared and learned shifts, the learned ones from the shift start
          and from a random one
A run that is finished is not repeated, one that was stopped goes on.
"""
EXAMPLES = """\
  acmix ablate paths --config recipes/digits.yaml
  acmix ablate shifts --config recipes/digits.yaml --seeds 5 --out runs/shifts
  acmix ablate paths --config recipes/digits.yaml --trainer.max_epochs 4 --variants conv acmix
"""


def run(args: list[str], debug: bool = False) -> None:
    """Train what is missing of a study, then write its table and picture."""
    options, fit_args = _parse(args)
    out = Path(options.out or f"runs/ablate-{options.study}")
    with command.quiet(debug):
        base = make("fit", [*fit_args, "--run", str(out)])
        check_comparable(base)
        variants = choose_variants(base, options)
        with user_errors(OSError):
            remember(out, options.study, fit_args)
        first = int(base.config["seed_everything"])
        runs = [(variant, first + seed) for seed in range(options.seeds) for variant in variants]
        rows = []
        for number, (variant, seed) in enumerate(runs, 1):
            folder = out / f"{variant}-seed{seed}"
            known = " (finished)" if (folder / "summary.json").is_file() else ""
            print(f"run {number} of {len(runs)}: {variant}, seed {seed}{known}", file=sys.stderr)
            summary = train(folder, [*fit_args, *variants[variant], "--seed_everything", str(seed)])
            rows.append(row_of(variant, seed, summary, base.task.monitor))
        speeds = inference_speeds(base, variants)
    for row in rows:
        row["infer_images_per_second"] = speeds[row["variant"]]
    rows.sort(key=lambda row: list(variants).index(row["variant"]))
    with user_errors(OSError):
        write_csv(out / "results.csv", rows)
        seeds = "1 seed" if options.seeds == 1 else f"{options.seeds} seeds"
        title = f"{TITLES[options.study]}: {base.config['model']['name']}, {seeds}"
        picture = figures.ablation(rows, title, column_of(base.task.monitor), base.task.measure)
        figures.save(picture, out / "ablation.png")
    show(rows, variants, base.task)
    print(f"{out}/results.csv, ablation.png, and a run folder each")


def _parse(args: list[str]) -> tuple[Namespace, list[str]]:
    """Our options, and those of `acmix fit`."""
    parser = Parser(
        "acmix ablate",
        DESCRIPTION,
        EXAMPLES,
        usage="acmix ablate {paths,shifts} --config FILE [--seeds N] [--out DIR] [options of fit]",
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of each variant (3)")
    parser.add_argument("--out", metavar="DIR", help="folder of the runs (runs/ablate-STUDY)")
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", help="of the study; by default all there are"
    )
    options, fit_args = parser.parse_known_args(args)
    if options.seeds < 1:
        raise UserError(f"--seeds: expected at least 1, got {options.seeds}")
    if any(arg.split("=")[0] in ("--run", "--ckpt_path") for arg in fit_args):
        raise UserError("--run, --ckpt_path: the runs of an ablation lie in --out DIR")
    return options, fit_args


def check_comparable(base: TrainingCLI) -> None:
    """Before any file is written: runs that would measure nothing raise `UserError`."""
    trainer = base.trainer
    if trainer.world_size > 1:
        raise UserError(f"trainer.devices: expected 1, got {trainer.world_size} processes")
    if base.config["trainer"]["fast_dev_run"]:
        raise UserError("trainer.fast_dev_run: expected false, got true")
    if not trainer.limit_val_batches:
        raise UserError("trainer.limit_val_batches: expected held-out images, got 0")
    with command.run_errors():
        base.datamodule.val_dataloader()


def choose_variants(base: TrainingCLI, options: Namespace) -> dict[str, list[str]]:
    """Options of `acmix fit` by variant."""
    config = json.loads(base.parser.dump(base.config, format="json"))["model"]
    name, kwargs = config["name"], nested(config.get("model_kwargs") or {})
    if name not in list_models() or not name.endswith("_acmix"):
        raise UserError(f"model.name: expected a network of acmix that ends in _acmix, got {name}")
    conv = name.removesuffix("_acmix") + "_conv"
    there = [key for key, of in STUDIES[options.study].items() if of or timm.is_model(conv)]
    chosen = options.variants or there
    for variant in chosen:
        if variant not in there:
            raise UserError(f"--variants: expected some of {', '.join(there)}, got {variant}")
    common = {key: value for key, value in kwargs.items() if key != "acmix_kwargs"}
    found = {}
    for variant in chosen:
        operator = STUDIES[options.study][variant]
        ours = (
            {}
            if operator is None
            else {"acmix_kwargs": {**kwargs.get("acmix_kwargs", {}), **operator}}
        )
        of_model = json.dumps({**common, **ours})
        found[variant] = [
            "--model.name",
            name if operator else conv,
            "--model.model_kwargs",
            of_model,
        ]
    return found


def remember(out: Path, study: str, fit_args: list[str]) -> None:
    """Keep what is studied, recipes included; a folder of anything else raises `UserError`."""
    files = [
        arg for arg in fit_args if Path(arg).suffix in (".yaml", ".yml") and Path(arg).is_file()
    ]
    recipes = {file: Path(file).read_text() for file in files}
    wanted = {"study": study, "options": fit_args, "recipes": recipes}
    path = out / "ablation.json"
    if path.is_file():
        if json.loads(path.read_text()) != wanted:
            raise UserError(f"--out: {out} holds an ablation with other options or another recipe")
        return
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out: {out} is not empty and no ablation")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(wanted, indent=2) + "\n")


def train(folder: Path, args: list[str]) -> dict[str, Any]:
    """The summary of a run, which is trained, or goes on, unless it is finished."""
    done = folder / "summary.json"
    if done.is_file():
        return json.loads(done.read_text())
    resume = ["--ckpt_path", "last"] if (folder / "checkpoints" / "last.ckpt").is_file() else []
    cli = make("fit", [*args, "--run", str(folder), *resume])
    try:
        with command.run_errors():
            summary = command.train(cli)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"Stopped in {folder}; the same command goes on.") from stop
    if summary is None:
        raise UserError(f"{folder}: nothing was trained")
    return summary


def row_of(variant: str, seed: int, summary: dict[str, Any], monitor: str) -> Row:
    return {
        "variant": variant,
        "seed": seed,
        column_of(monitor): summary[monitor],
        "train_images_per_second": summary["images_per_second"],
        "infer_images_per_second": None,
        "parameters": summary["parameters"],
        "epochs": summary["epochs"],
    }


def column_of(monitor: str) -> str:
    """Of what is measured, in the table."""
    return monitor.removeprefix("val_")


@torch.inference_mode()
def inference_speeds(base: TrainingCLI, variants: dict[str, list[str]]) -> dict[str, float]:
    """Images/s of a batch of held-out images by variant, by turns: the best of TURNS."""
    device = base.trainer.strategy.root_device
    images = move_data_to_device(next(iter(base.datamodule.val_dataloader()))[0], device)
    models = {}
    for variant, (_, name, _, model_kwargs) in variants.items():
        hparams = {**base.model.hparams, "name": name, "model_kwargs": json.loads(model_kwargs)}
        models[variant] = base.task(**hparams).to(device).eval()
        models[variant].look(images)
    best = dict.fromkeys(variants, 0.0)
    for _ in range(TURNS):
        for variant, model in models.items():
            best[variant] = max(best[variant], images_per_second(model, images))
    return best


def images_per_second(model: Task, images: Any, seconds: float = 0.3) -> float:
    """Of as many batches as it takes to fill the time."""
    batches, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        model.look(images)
        if model.device.type != "cpu":
            torch.accelerator.synchronize()
        batches += 1
    return batches * len(images) / passed


def show(rows: list[Row], variants: Iterable[str], task: type[Task]) -> None:
    table = Table(
        *("variant", f"held-out {task.measure}", "training, images/s", "inference, images/s"),
        *("parameters", "seeds"),
        box=None,
    )
    for variant in variants:
        of = [row for row in rows if row["variant"] == variant]
        table.add_row(
            escape(variant),
            spread([100 * row[column_of(task.monitor)] for row in of], "{:.2f}".format) + " %",
            spread([row["train_images_per_second"] for row in of]),
            rate(of[0]["infer_images_per_second"]),
            f"{of[0]['parameters']:,}",
            str(len(of)),
        )
    console().print(table, highlight=False)


def spread(values: list[float], show: Callable[[float], str] = rate) -> str:
    """Mean and standard deviation."""
    text = show(mean(values))
    return f"{text} ± {show(stdev(values))}" if len(values) > 1 else text
