"""Complaints of jsonargparse and Lightning, told in one line that names the option."""

from __future__ import annotations

import ast
import difflib
import inspect
import operator
import re
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from lightning.pytorch import Trainer, callbacks, loggers

from acmix.errors import UserError, did_you_mean, few, one_line
from acmix.ranges import Range

NO_VALUE = re.compile(r"argument (?:-\w/)?-*(?P<name>[\w.]+): expected one argument")
UNKNOWN = re.compile(r"[Uu]nrecognized arguments?: (?P<dashes>-*)(?P<name>\S+)")
LINKED = re.compile(
    r'Linked "(?P<name>[\w.]+)" must be given via "(?P<source>\w+)|'
    r"argument (?P<option>\w+) --> (?P<set>[\w.]+):"
)
KEY = re.compile(r'Parser key "(?P<key>[\w.]+)":\s*')
CLASS = re.compile(r"Problem with given class_path '[\w.]*?(?P<name>\w+)':\s*")
MISSING = re.compile(r"the following arguments are required: (?P<names>[^\n]+)")
NOT_ACCEPTED = re.compile(
    r"(?:Group '(?P<group>[\w.]+)' does not accept option|Option) '(?P<name>[^']+)'"
)
EXPECTED = re.compile(r"Expected an? (?P<kind><class '[\w.]+'>|typing\.Literal\[[^\]]+\]|[^\n]+)")
GIVEN = re.compile(r"(?:Given value|Got value): (?P<value>[^\n]*)")
NO_OPTIONS = re.compile(r"Unable to load config '(?P<value>[^\n]*)'")
OF_LENGTH = re.compile(r"tuple with (?P<length>\d+) elements")
NESTED = re.compile(r"NestedArg\(key='(?P<key>[^']+)', val=(?P<value>.*)\)$")
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list such as [a, b]",
    "dict": "names with values such as {a: 1}",
    "tuple": "numbers such as [0.1, 1]",
    "Iterable": "a list such as [a, b]",
}
TRAINER = {
    "max_epochs": Range(-1),
    "min_epochs": Range(0),
    "max_steps": Range(-1),
    "min_steps": Range(0),
    "num_nodes": Range(1),
    "accumulate_grad_batches": Range(1),
    "gradient_clip_val": Range(0),
    "check_val_every_n_epoch": Range(1),
    "log_every_n_steps": Range(0),
    "num_sanity_val_steps": Range(-1),
    "reload_dataloaders_every_n_epochs": Range(0),
}
OWN = {
    "threads": Range(1),
    "every_n_steps": Range(1),
    "patience": Range(1),
    "seed_everything": Range(0, 2**32 - 1),
}
AMOUNTS = (
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"),
    "overfit_batches",
)
ELSEWHERE = {  # what options are called in other tools
    "epochs": "trainer.max_epochs",
    "gpus": "trainer.devices",
    "optimizer": "model.opt",
    "scheduler": "model.sched",
    "seed": "seed_everything",
    "workers": "data.num_workers",
}
REFUSED = {  # callbacks of Lightning, and why or what instead
    "BackboneFinetuning": "--model.freeze keeps modules as they are",
    "BaseFinetuning": "--model.freeze keeps modules as they are",
    "BatchSizeFinder": "the order of a run's images follows from its batch size",
    "LearningRateFinder": "the rate is set anew at every step",
    "ModelPruning": "its weights have other names, which no checkpoint of a run has",
    "StochasticWeightAveraging": "--model.ema_decay averages weights",
    "ThroughputMonitor": "images/s stand in metrics.csv",
    "Timer": "--trainer.max_time limits the time",
}
NEED_A_LOGGER = ("DeviceStatsMonitor", "LearningRateMonitor")


def explain_parser(message: str, options: list[str], kinds: Mapping[str, type]) -> str:
    """jsonargparse's message in one line, with the nearest option where one is unknown.

    options: every option of the command, such as "model.name"; kinds: the classes that `--data`
    takes by name.
    """
    known = [*options, *(f"data.{name}" for kind in kinds.values() for name in _arguments(kind))]
    if unknown := UNKNOWN.search(message):
        if not unknown["dashes"]:
            return f"unexpected argument {unknown['name']!r}"
        return _unknown_option(unknown["name"].split("=")[0], known)
    if lacking := NO_VALUE.search(message):
        return f"{lacking['name']}: expected a value, got none"
    if linked := LINKED.search(message):
        name, source = linked["name"] or linked["set"], linked["source"] or linked["option"]
        return f"{name}: expected no value, as it comes from {source}"
    if missing := MISSING.match(message):
        return f"{missing['names']}: expected a value, got none"
    return _explain("", message, known, kinds)


def _explain(key: str, message: str, known: list[str], kinds: Mapping[str, type]) -> str:
    """The complaint about one key, or, of an object, about the first of its own."""
    if inner := KEY.match(message):
        key = f"{key}.{inner['key']}" if key else inner["key"]
        return _explain(key, message[inner.end() :], known, kinds)
    if inner := CLASS.search(message):
        return _explain_class(key, inner["name"], message[inner.end() :], known, kinds)
    if unknown := NOT_ACCEPTED.match(message):
        return _unknown_option(".".join(filter(None, (unknown["group"], unknown["name"]))), known)
    return _explain_value(key, message, kinds)


def _explain_class(
    key: str, name: str, message: str, known: list[str], kinds: Mapping[str, type]
) -> str:
    if missing := MISSING.match(message):
        names = missing["names"].split(", ")
        return f"{', '.join(f'{key}.{n}' for n in names)}: expected a value for {name}, got none"
    if unknown := NOT_ACCEPTED.match(message):
        arguments = _arguments(kinds[name]) if name in kinds else []
        own = [f"{key}.{argument}" for argument in arguments]
        return f"{_unknown_option(key + '.' + unknown['name'], own)} ({key} is {name})"
    return _explain(key, message, known, kinds)


def _explain_value(key: str, message: str, kinds: Mapping[str, type]) -> str:
    if nothing := NO_OPTIONS.match(message):
        return f"{key}: expected options such as --{key}.NAME, got {nothing['value']!r}"
    given = GIVEN.search(message)
    value = _value(given["value"]) if given else None
    kinds_named = EXPECTED.findall(message)
    choices = [str(one) for kind in kinds_named for one in _choices(kind)]
    expected = list(dict.fromkeys(filter(None, map(_words, kinds_named))))
    if given is None or not (expected or choices):
        why = one_line(ValueError(message))
        return f"{key}: {why}" if key else why
    if "dot import path string" in message:
        offer = f" (known: {', '.join(kinds)})" if key == "data" else ""
        near = did_you_mean(str(value), {*kinds} if key == "data" else _classes_of(key) - {value})
        return f"{key}: expected a class by its name, got {value!r}{near}{offer}"
    if WORDS["float"] in expected or choices:
        expected = [words for words in expected if words != WORDS["int"]]
    wanted = " or ".join([*expected, *dict.fromkeys(choices)])
    return f"{key}: expected {wanted}, got {value!r}{did_you_mean(str(value), choices)}"


def _classes_of(key: str) -> set[str]:
    """Lightning's classes for an option of the trainer."""
    module = {"trainer.callbacks": callbacks, "trainer.logger": loggers}.get(key)
    return set(module.__all__) if module else set()


def _words(kind: str) -> str:
    """A type in the words of a message; empty for null, which nobody means to give."""
    if _choices(kind):
        return ""
    if of_length := OF_LENGTH.match(kind):
        return f"a list of {of_length['length']}"
    name = kind.removeprefix("<class '").removesuffix("'>").split(".")[-1].split(". Got")[0]
    return "" if name in ("NoneType", "NoneType'>") else WORDS.get(name, name)


def _choices(kind: str) -> list[Any]:
    """The values of a type that lists them."""
    if not kind.startswith("typing.Literal"):
        return []
    return cast("list[Any]", ast.literal_eval(kind.removeprefix("typing.Literal")))


def _value(text: str) -> Any:
    """The value from a message, of which jsonargparse may show the inside of its own."""
    text = text.strip()
    if nested := NESTED.match(text):
        text = nested["value"]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def own_words(error: BaseException) -> Exception:
    """What a constructor raised; jsonargparse wraps it where an option is of several types."""
    while str(error).startswith("Does not validate") and error.__cause__ is not None:
        error = error.__cause__
    return cast("Exception", error)


def _unknown_option(name: str, known: Iterable[str]) -> str:
    return f"unknown option {name}{nearest_option(name, known)}"


def nearest_option(name: str, known: Iterable[str]) -> str:
    """The option that was meant: of the same last part, else of nearly the same name."""
    known = list(known)
    last = name.split(".")[-1]
    same = [option for option in known if option.split(".")[-1] == last and option != name]
    same += [option for option in known if option == ELSEWHERE.get(last)]
    if same:
        return f"; did you mean {same[0]}?"
    of_last_part = {option.split(".")[-1]: option for option in known}
    near = difflib.get_close_matches(last, of_last_part, n=1, cutoff=0.7)
    return f"; did you mean {of_last_part[near[0]]}?" if near else did_you_mean(name, known)


def _arguments(kind: type) -> list[str]:
    return list(inspect.signature(kind).parameters)


def read_config(path: str) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        UserError: If it is none, or holds none.
    """
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config: expected a YAML file, got {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config: expected a YAML file, got {path}: no text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or "no YAML"
        raise UserError(f"config: expected a YAML file, got {path}{where}: {why}") from error
    if not isinstance(content, dict):
        what = "an empty file" if content is None else f"a {type(content).__name__}"
        raise UserError(f"config: expected options in {path}, got {what}")
    return content


def check_config(path: str, options: Iterable[str]) -> None:
    """A name at the top of a configuration that is no option raises `UserError`."""
    known = {option.split(".")[0] for option in options}
    for name in read_config(path):
        if str(name).split(".")[0] not in known:
            near = did_you_mean(str(name), known)
            raise UserError(f"config: unknown option {name} in {path}{near}")


def check_own(options: Mapping[str, Any]) -> None:
    """Numbers of the command itself that are out of range raise `UserError`."""
    for name, wanted in OWN.items():
        value = options[name]
        if value is not None and (isinstance(value, bool) or not wanted.holds(value)):
            raise UserError(f"{name}: expected {wanted}, got {value}")
    if not options["run"].strip():
        raise UserError(f"run: expected a folder, got {options['run']!r}")
    if Path(options["run"]).is_file():
        raise UserError(f"run: expected a folder, got a file: {options['run']}")


def check_trainer(options: Mapping[str, Any]) -> None:
    """Numbers that Lightning takes and cannot work with raise `UserError`."""
    for name, wanted in TRAINER.items():
        value = options.get(name)
        if value is not None and not wanted.holds(value):
            raise UserError(f"trainer.{name}: expected {wanted}, got {value}")
    for name in AMOUNTS:
        _check_amount(name, options.get(name), least=0)
    _check_amount("val_check_interval", options.get("val_check_interval"), least=1)
    if options.get("barebones"):
        raise UserError("trainer.barebones: expected false, as a run keeps checkpoints, got true")
    if overfit := options.get("overfit_batches"):
        raise UserError(
            f"trainer.overfit_batches: expected 0, got {overfit}; data of few images does the same"
        )
    if "spawn" in str(options.get("strategy")):
        raise UserError(f"trainer.strategy: expected others such as ddp, got {options['strategy']}")
    if options.get("profiler") == "xla":
        raise UserError("trainer.profiler: expected simple, advanced or pytorch, got xla")
    for callback in _as_list(options.get("callbacks")):
        name = str(callback.get("class_path", "")).split(".")[-1]
        if name in REFUSED:
            raise UserError(f"trainer.callbacks: expected others than {name}: {REFUSED[name]}")


def check_loggers(chosen: Iterable[Any], logger: Any) -> None:
    """Callbacks that write to a logger of Lightning, where there is none, raise `UserError`."""
    for callback in chosen:
        if type(callback).__name__ in NEED_A_LOGGER and not logger:
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} expects a logger, got none; "
                "--trainer.logger CSVLogger is one"
            )


def _check_amount(name: str, value: Any, least: int) -> None:
    """Batches by their number, or as a part of the whole."""
    if isinstance(value, float) and not (0 if least == 0 else 1e-12) <= value <= 1:
        raise UserError(f"trainer.{name}: expected a part up to 1.0 or a whole number, got {value}")
    if isinstance(value, int) and not isinstance(value, bool) and value < least:
        raise UserError(f"trainer.{name}: expected at least {least}, got {value}")


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def name_trainer_option(message: str, otherwise: str = "") -> str:
    """Lightning's complaint with the option of the trainer in front that it speaks of."""
    quoted = " ".join(re.findall(r"`([^`]+)`", message.replace("Timer(duration", "max_time")))
    known = inspect.signature(Trainer.__init__).parameters
    named = [f"trainer.{word}: " for word in re.findall(r"\w+", quoted) if word in known]
    return f"{named[0] if named else otherwise}{message}"


def whole_numbers_first(parser: Any) -> None:
    """Read 1 as the number of batches where a part, 1.0, may be meant too.

    typing takes Union[int, float] and Union[float, int] for one, and gives whichever came first.
    """
    for action in parser._actions:
        kinds = get_args(getattr(action, "_typehint", None))
        if int in kinds and float in kinds:
            others = [kind for kind in kinds if kind not in (int, float)]
            action._typehint = reduce(operator.or_, others, int | float)


def check_monitors(chosen: Iterable[Any], measures: Iterable[str]) -> None:
    """Lightning's own callbacks that watch what is not measured raise `UserError`."""
    chosen, measures = list(chosen), [*measures, "epoch", "step"]
    if not all(type(of).__module__.startswith("lightning.") for of in chosen):
        return  # one of the user's may log more
    for callback in chosen:
        watched = getattr(callback, "monitor", None)
        if watched is not None and watched not in measures:
            raise UserError(
                f"trainer.callbacks: expected {type(callback).__name__}.monitor to be one of "
                f"{few(measures, 8)}, got {watched!r}{did_you_mean(watched, measures)}"
            )
