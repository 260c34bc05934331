import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

# Set before torch is imported: one thread, which a test may raise, since `make test` runs a worker
# a core; and compiled graphs and kernels stay in the clone, made where they are asked for.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
_CACHE = Path(__file__).parent.parent / ".cache"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_CACHE / "inductor"))
os.environ.setdefault("TRITON_CACHE_DIR", str(_CACHE / "triton"))
os.environ.setdefault("MPLCONFIGDIR", str(_CACHE / "matplotlib"))

import pytest
import torch
from filelock import FileLock
from helpers import set_form

THREADS = torch.get_num_threads()
SLOW = 5.0  # seconds, more than the 2 from which a test is to be marked: other programs run too


@pytest.fixture(autouse=True)
def _seed_and_threads() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(params=["pieces", "dense"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of the folded convolution path; that of a GPU, "dense", runs on a CPU too."""
    set_form(monkeypatch, request.param)
    return request.param


@pytest.fixture(scope="session")
def made_once(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Callable[[Path], object]], Path]:
    """made_once(name, make): a folder that make(folder) fills, in one worker for all of them."""
    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        root = root.parent

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        path, made = root / name, root / f"{name}.made"
        with FileLock(root / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir()
                make(path)
                made.touch()
        return path

    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names the tests that keep `make test-fast` from being fast."""
    for report in terminalreporter.getreports("passed"):
        if report.when == "call" and report.duration > SLOW and "slow" not in report.keywords:
            terminalreporter.write_line(f"not marked slow: {report.nodeid} {report.duration:.1f} s")
