import os
from pathlib import Path

# Compiled graphs and kernels stay in the clone. Set before torch is imported.
_CACHE = Path(__file__).parent.parent / ".cache"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_CACHE / "inductor"))
os.environ.setdefault("TRITON_CACHE_DIR", str(_CACHE / "triton"))
os.environ.setdefault("MPLCONFIGDIR", str(_CACHE / "matplotlib"))

import pytest
import torch
from helpers import set_form


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["pieces", "dense"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of the folded convolution path; that of a GPU, "dense", runs on a CPU too."""
    set_form(monkeypatch, request.param)
    return request.param
