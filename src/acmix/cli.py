"""The `acmix` command: `info` with the base install, training with the `train` extra."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import acmix
from acmix.analysis import environment
from acmix.ops import _native
from acmix.tasks.errors import UserError, did_you_mean

HELP = """\
usage: acmix COMMAND [options]

commands:
  info      versions, devices, and which backends run here (and why the others do not)
  fit       train a network: pictures, metrics and checkpoints go into a run folder
  validate  measure a run on its held-out images
  test      measure a run on its test images
  predict   write the class and confidence of every test image as CSV

options:
  -h, --help  this text; `acmix COMMAND --help` for the options of a command
  --version   the version of acmix
  --debug     show the traceback of an error

examples:
  acmix info
  acmix fit --config recipes/digits.yaml
  acmix fit --config recipes/digits.yaml --model.name resnet11_tiny_conv --run runs/conv
  acmix validate runs/digits
"""

TRAIN_PACKAGES = {
    "lightning": "lightning",
    "jsonargparse": "jsonargparse",
    "torchmetrics": "torchmetrics",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
}
TRAINING = ("fit", "validate", "test", "predict")


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
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "Stopped; nothing was saved.", 130)


def _dispatch(args: list[str], debug: bool) -> int:
    command = args[0] if args else "--help"
    if command in ("-h", "--help"):
        print(HELP, end="")
    elif command == "--version":
        print(f"acmix {acmix.__version__}")
    elif command == "info":
        info(args[1:])
    elif command in TRAINING:
        _train(command, args[1:], debug)
    else:
        known = ("info", *TRAINING)
        raise UserError(f"unknown command{did_you_mean(command, known)} (acmix --help lists all)")
    return 0


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def _train(command: str, args: list[str], debug: bool) -> None:
    missing = [name for module, name in TRAIN_PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise UserError(f"needs {', '.join(missing)}: pip install 'acmix[train]'")
    from acmix.tasks import command as training

    training.run(command, args, debug)


def info(args: list[str]) -> None:
    """Versions, devices and backends, as tables."""
    if args and args[0] in ("-h", "--help"):
        print("usage: acmix info\n\nVersions, devices, and which backends run here.")
        return
    if args:
        raise UserError(f"takes no options, got {args[0]}")
    console = Console()
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, version in environment.versions().items():
        table.add_row(name, version)
    for device in environment.devices():
        table.add_row("device", device)
    for name, reason in acmix.ops.backends().items():
        runs = f"runs here ({_native.simd()})" if name == "native" else "runs here"
        table.add_row(f"backend {name}", f"not here: {escape(reason)}" if reason else runs)
    if missing := [name for module, name in TRAIN_PACKAGES.items() if find_spec(module) is None]:
        table.add_row("training", f"needs {', '.join(missing)}: pip install 'acmix\\[train]'")
    console.print(table, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
