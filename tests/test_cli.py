"""The command line: help, info, and mistakes told in one line with exit code 2."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import acmix
from acmix import cli
from acmix.analysis import environment
from acmix.cli import main
from acmix.ops import _native
from acmix.tasks import predict

RECIPE = str(Path(__file__).parents[1] / "recipes" / "digits.yaml")


def mistake(capsys, *args):
    """What is said about a mistake: one line on stderr, exit code 2."""
    assert main(list(args)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err.strip()


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"]])
def test_help_lists_the_commands_with_examples(capsys, args):
    assert main(args) == 0
    out = capsys.readouterr().out
    for command in ("info", "fit", "validate", "test", "predict", "ablate"):
        assert f"\n  {command} " in out
    assert "acmix fit --config recipes/digits.yaml" in out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"acmix {acmix.__version__}\n"


def test_info_names_versions_devices_and_every_backend(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "timm", "python", "device", *acmix.ops.backends()):
        assert word in out
    names = {*environment.versions(), "device", "backend", "training"}
    for words in map(str.split, out.splitlines()):  # piped: no line goes on in the next
        assert words[0] in names
        assert len(words) > 1


def test_info_of_a_long_reason_is_one_line(capsys, monkeypatch):
    reason = "a reason of many words " * 10
    monkeypatch.setattr("acmix.ops.backends", lambda: {"triton": reason})
    assert main(["info"]) == 0
    assert f"not here: {reason.strip()}" in capsys.readouterr().out


@pytest.mark.slow
def test_info_and_help_load_no_lightning():
    code = (
        "import sys; from acmix.cli import main; main(['info']); main(['--help']);"
        "assert not {'lightning', 'jsonargparse', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_ctrl_c_while_pytorch_is_loaded_shows_no_traceback():
    code = "import acmix_command; print(flush=True); acmix_command.main()"
    command = [sys.executable, "-c", code, "info"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.readline()
        time.sleep(0.2)  # PyTorch takes longer
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
    assert process.returncode == -signal.SIGINT


def test_info_says_why_there_is_no_kernel(capsys, monkeypatch):
    monkeypatch.setattr(_native, "_load", lambda: (None, "no CPU kernel: no compiler"))
    assert main(["info"]) == 0
    assert "not here: no CPU kernel: no compiler" in capsys.readouterr().out


def test_help_and_version_load_nothing_heavy():
    """The package, which loads torch, is stood in for: what counts is what the command loads."""
    code = f"""if True:
        import sys, types
        package = types.ModuleType("acmix")
        package.__path__ = {acmix.__path__!r}
        sys.modules["acmix"] = package
        from acmix.cli import main
        main(["--version"]); main(["--help"])
        assert not {{"torch", "timm", "rich", "numpy"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_options_for_images_are_those_of_their_parser():
    known = {name for action in predict._parser()._actions for name in action.option_strings}
    assert known == set(cli.OF_IMAGES)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "ablate"])
def test_help_of_a_command_ends_with_examples(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: acmix {command}" in out
    assert f"\n  acmix {command} " in out[out.index("examples:") :]


def test_without_the_train_extra(capsys, monkeypatch):
    found = cli.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "lightning" else found(name))
    said = mistake(capsys, "fit", "--config", RECIPE)
    assert said == "acmix fit: needs lightning: pip install 'acmix[train]'"
    assert main(["info"]) == 0
    assert "pip install 'acmix[train]'" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    said = mistake(capsys, "fit", "--config", RECIPE, "--run", str(tmp_path / "file" / "run"))
    assert str(tmp_path / "file") in said


def test_debug_shows_where(monkeypatch):
    with pytest.raises(cli.UserError):
        main(["--debug", "fot"])
