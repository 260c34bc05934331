"""Which backend runs. A GPU is a fake one here; tests/ops/triton tries the kernels themselves."""

import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from acmix.ops import _autocast, _dispatch, _trial
from acmix.ops.shift_convolution import IMPLEMENTATIONS as CONVOLUTION
from acmix.ops.weighted_aggregation import IMPLEMENTATIONS as AGGREGATION
from acmix.ops.window_attention import IMPLEMENTATIONS


@pytest.fixture
def gpu_tensor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tensor]:
    monkeypatch.setattr(_dispatch, "_triton_reason", lambda: None)
    monkeypatch.setattr(_dispatch, "_faults", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode():
        yield torch.empty(1, device="cuda")


def test_auto_on_a_cpu_tries_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_trial, "fault", None)
    for dtype, names in ((torch.float32, {"native", "tiled"}), (torch.float64, {"tiled"})):
        assert _dispatch.resolve("auto", IMPLEMENTATIONS, torch.ones(1, dtype=dtype)) in names


def test_auto_on_a_gpu(gpu_tensor: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_trial, "fault", lambda *_: None)
    assert _dispatch.resolve("auto", IMPLEMENTATIONS, gpu_tensor) == "triton"
    assert _dispatch.resolve("auto", IMPLEMENTATIONS, gpu_tensor.double()) == "tiled"


def test_a_gpu_that_fails_the_trial(gpu_tensor: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning, then `auto` takes the portable path; the kernel's name raises."""
    trials = []
    monkeypatch.setattr(_trial, "fault", lambda *kind: trials.append(kind) or "no C compiler")
    with pytest.warns(RuntimeWarning, match="the GPU kernels are not used .*no C compiler"):
        assert _dispatch.resolve("auto", IMPLEMENTATIONS, gpu_tensor) == "tiled"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _dispatch.resolve("auto", IMPLEMENTATIONS, gpu_tensor) == "tiled"
        # PyTorch's own convolution needs no trial.
        assert _dispatch.resolve("triton", CONVOLUTION, gpu_tensor) == "triton"
    with pytest.raises(ValueError, match="backend: 'triton' cannot run here: no C compiler"):
        _dispatch.resolve("triton", IMPLEMENTATIONS, gpu_tensor)
    assert len(trials) == 1


def test_each_operator_and_dtype_is_tried(
    gpu_tensor: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dtype is that in which the kernels run, and threads wait for one trial."""
    trials = []

    def fault(trial: object, device: torch.device, dtype: torch.dtype) -> None:
        time.sleep(0.02)
        trials.append((trial, dtype))

    monkeypatch.setattr(_trial, "fault", fault)

    def resolve(implementations: dict[str, ModuleType]) -> str:
        return _dispatch.resolve("auto", implementations, gpu_tensor)

    with ThreadPoolExecutor(4) as threads:
        names = list(threads.map(resolve, [IMPLEMENTATIONS, AGGREGATION] * 4))
    assert names == ["triton"] * 8
    # As under torch.autocast, which there is none of without a GPU.
    monkeypatch.setattr(_autocast, "autocast_dtype", lambda device: torch.bfloat16)
    assert resolve(IMPLEMENTATIONS) == "triton"
    attention, aggregation = (m["triton"].trial for m in (IMPLEMENTATIONS, AGGREGATION))
    found = [(attention, torch.float32), (aggregation, torch.float32), (attention, torch.bfloat16)]
    assert sorted(map(str, trials)) == sorted(map(str, found))


def test_heads_of_many_channels(gpu_tensor: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_trial, "fault", lambda *_: None)
    assert _dispatch.resolve("auto", IMPLEMENTATIONS, gpu_tensor, head_dim=256) == "triton"
    assert _dispatch.resolve("auto", IMPLEMENTATIONS, gpu_tensor, head_dim=257) == "tiled"


def test_no_trial_while_a_graph_is_captured(
    gpu_tensor: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(_trial, "fault", None)
    assert _dispatch.resolve("auto", IMPLEMENTATIONS, gpu_tensor) == "triton"
    assert not _dispatch._faults


def test_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    reason = _trial.fault(lambda *_: 0.0, torch.device("cuda:0"), torch.float32)
    assert reason == "they need compute capability (7, 5), cuda:0 has (6, 1)"


def test_the_trial_is_a_constant_to_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_faults", {})
    monkeypatch.setattr(_trial, "fault", lambda *_: None)

    @torch.compile(fullgraph=True, backend="eager")
    def traced(x: Tensor) -> Tensor:
        trial = IMPLEMENTATIONS["triton"].trial
        return x + 1 if _dispatch._triton_fault(trial, x.device, x.dtype) is None else x

    assert torch.equal(traced(torch.zeros(2)), torch.ones(2))
    trial = IMPLEMENTATIONS["triton"].trial
    assert list(_dispatch._faults) == [(trial, torch.device("cpu"), torch.float32)]
