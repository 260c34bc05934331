import os
from pathlib import Path

# Compiled graphs and kernels stay in the clone. Set before torch is imported.
_CACHE = Path(__file__).parent.parent / ".cache"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_CACHE / "inductor"))
os.environ.setdefault("TRITON_CACHE_DIR", str(_CACHE / "triton"))
os.environ.setdefault("MPLCONFIGDIR", str(_CACHE / "matplotlib"))

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
