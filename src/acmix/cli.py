"""The `acmix` command: `info` and `analyze` with the base install, training with `train`."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from importlib import metadata
from importlib.util import find_spec

# What takes long to import (torch, rich, timm) is imported where it is used: help is immediate, and
# Ctrl-C while it loads stops in one line.
from acmix.errors import (
    Parser,
    UserError,
    check_one_of,
    did_you_mean,
    image_size,
    user_errors,
)

HELP = """\
usage: acmix COMMAND [options]

commands:
  info      versions, devices, and which backends run here (and why the others do not)
  fit       train a network: pictures, metrics and checkpoints go into a run folder
  check     look at every image of the data first: counts, sizes, broken and equal files
  validate  measure a run on its held-out images
  test      measure a run on its test images
  predict   the likeliest classes of images, and what the network looked at
  ablate    train the variants of the operator side by side: accuracy and speed
  analyze   parameters and multiply-adds of networks, beside the published ones
  bench     latency, images/s and memory of networks and detectors, side by side

options:
  -h, --help  this text; `acmix COMMAND --help` for the options of a command
  --version   the version of acmix
  --debug     show the traceback of an error

examples:
  acmix info
  acmix fit --config recipes/digits.yaml
  acmix fit --config recipes/digits.yaml --model.name resnet11_tiny_conv --run runs/conv
  acmix validate runs/digits
  acmix predict runs/mine cat.jpg --explain cat
  acmix ablate paths --config recipes/digits.yaml
  acmix analyze costs resnet50_acmix resnet50_conv --stages
  acmix bench resnet50_conv resnet50_acmix
"""

ANALYZE_HELP = """\
usage: acmix analyze WHAT [options]

what:
  costs  parameters and multiply-adds of networks, beside the published ones

`acmix analyze WHAT --help` for its options
"""
COSTS_EXAMPLES = """\
  acmix analyze costs
  acmix analyze costs resnet50_acmix resnet50_conv --stages
  acmix analyze costs swin_tiny_acmix --size 800x1333 --format csv
  acmix analyze costs pvt_tiny_attn pvt_tiny_acmix --task detection --detector retinanet
  acmix analyze costs swin_tiny_acmix --task segmentation --decoder upernet --size 512x2048
"""

TRAIN_PACKAGES = {
    "lightning": "lightning",
    "jsonargparse": "jsonargparse",
    "torchmetrics": "torchmetrics",
    "matplotlib": "matplotlib",
    "faster_coco_eval": "faster-coco-eval",
    "sklearn": "scikit-learn",
    "tensorboard": "tensorboard",
}
# Options that `predict` has for images alone.
OF_IMAGES = (
    *("-h", "--help", "--top", "--format", "--flip", "--explain", "--pixel", "--layers"),
    *("--weights", "--classes", "--batch_size", "--device"),
)
TRAINING = ("fit", "check", "validate", "test", "predict", "ablate")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 2 for a mistake of the user, 130 after Ctrl-C."""
    args = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        return _dispatch(args, debug)
    except UserError as error:
        if debug:
            raise
        return _fail(f"{' '.join(['acmix', *args[:1]])}: {error}", 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to come
        return 141
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "Stopped; nothing was saved.", 130)


def _dispatch(args: list[str], debug: bool) -> int:
    command = args[0] if args else "--help"
    if command in ("-h", "--help"):
        print(HELP, end="")
    elif command == "--version":
        print(f"acmix {metadata.version('acmix')}")
    elif command == "info":
        info(args[1:])
    elif command == "analyze":
        analyze(args[1:])
    elif command == "bench":
        from acmix.analysis import bench_command

        bench_command.run(args[1:])
    elif command in TRAINING:
        _train(command, args[1:], debug)
    else:
        known = ("info", "analyze", "bench", *TRAINING)
        raise UserError(f"unknown command{did_you_mean(command, known)} (acmix --help lists all)")
    return 0


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def _train(command: str, args: list[str], debug: bool) -> None:
    missing = [name for module, name in TRAIN_PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise UserError(f"needs {', '.join(missing)}: pip install 'acmix[train]'")
    if command == "check":
        from acmix.tasks import check

        check.run(args, debug)
    elif command == "ablate":
        from acmix.tasks import ablate

        ablate.run(args, debug)
    elif command == "predict" and _names_images(args):
        from acmix.tasks import predict

        predict.run(args)
    else:
        from acmix.tasks import command as training

        training.run(command, args, debug)


def _names_images(args: list[str]) -> bool:
    """Whether `predict` is for images, or for help, not for the test images of a run's data."""
    names = list(itertools.takewhile(lambda arg: not arg.startswith("-"), args))
    return len(names) > 1 or any(arg.split("=")[0] in OF_IMAGES for arg in args)


def info(args: list[str]) -> None:
    """Versions, devices and backends, as tables."""
    if args and args[0] in ("-h", "--help"):
        print("usage: acmix info\n\nVersions, devices, and which backends run here.")
        return
    if args:
        raise UserError(f"takes no options, got {args[0]}")
    from rich.markup import escape
    from rich.table import Table

    from acmix.analysis import environment
    from acmix.ops import _native, backends
    from acmix.tasks.console import console

    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, version in environment.versions().items():
        table.add_row(name, version)
    for device in environment.devices():
        table.add_row("device", device)
    for name, reason in backends().items():
        runs = f"not here: {escape(reason)}" if reason else "runs here"
        simd = f" ({_native.simd()})" if name == "native" and reason is None else ""
        table.add_row(f"backend {name}", runs + simd)
    if missing := [name for module, name in TRAIN_PACKAGES.items() if find_spec(module) is None]:
        table.add_row("training", f"needs {', '.join(missing)}: pip install 'acmix\\[train]'")
    console().print(table, highlight=False)


def analyze(args: list[str]) -> None:
    """`acmix analyze costs`: the tables of costs on stdout."""
    what = args[0] if args else "--help"
    if what in ("-h", "--help"):
        print(ANALYZE_HELP, end="")
    elif what == "costs":
        analyze_costs(args[1:])
    else:
        raise UserError(f"unknown analysis {what!r}{did_you_mean(what, ('costs',))} (known: costs)")


def analyze_costs(args: list[str]) -> None:
    from acmix.analysis import costs

    parser = Parser(
        "acmix analyze costs",
        "Parameters and multiply-adds (FLOPs) for one image, by the conventions of the paper, "
        "beside its figures.",
        COSTS_EXAMPLES,
    )
    parser.add_argument("models", metavar="MODEL", nargs="*", help="of timm, ours among them")
    parser.add_argument(
        "--size",
        type=image_size,
        metavar="S",
        help="of the image in pixels, S or HEIGHTxWIDTH; that of the model by default, 224 for "
        "the published",
    )
    parser.add_argument(
        "--stages", action="store_true", help="by stage: supplementary Table 1 and main Table 1"
    )
    parser.add_argument("--format", choices=costs.FORMATS, default="table", help="table by default")
    parser.add_argument(
        "--task",
        choices=("classification", "detection", "segmentation"),
        default="classification",
        help="a whole detector of 80 classes, or segmenter of 150; classification by default",
    )
    parser.add_argument("--detector", default="retinanet", help="retinanet by default")
    parser.add_argument("--decoder", default="semantic_fpn", help="semantic_fpn by default")
    options = parser.parse_intermixed_args(args)
    if options.task != "classification":
        print(analyze_whole(options), end="")
        return
    default = costs.PUBLISHED_STAGES if options.stages else costs.PUBLISHED
    with user_errors(ValueError):
        found = [costs.network_costs(name, options.size) for name in options.models or default]
    print(costs.report(found, options.stages, options.format), end="")


def analyze_whole(options: argparse.Namespace) -> str:
    """The table of networks with a detector or decoder on them."""
    from acmix.analysis import whole_costs as whole
    from acmix.detection import DETECTORS
    from acmix.segmentation import DECODERS

    check_one_of("--detector", options.detector, DETECTORS)
    check_one_of("--decoder", options.decoder, DECODERS)
    if options.stages:
        raise UserError("--stages: expected with --task classification")
    size = options.size or whole.SIZES[options.task]
    names = options.models or whole.DEFAULTS[options.task]
    with user_errors(ValueError):
        head = options.detector if options.task == "detection" else options.decoder
        found = [whole.COSTS[options.task](name, head, size) for name in names]
    return whole.report(found, options.format)


if __name__ == "__main__":
    sys.exit(main())
