import os
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


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
