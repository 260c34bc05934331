"""Every kernel compiles for GPUs that are not here, within their shared memory, without spilling
many registers: Triton and its assembler need no device for that."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from acmix.ops._library import INTERPRETED

triton = pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from acmix.ops.weighted_aggregation import triton as aggregation  # noqa: E402
from acmix.ops.window_attention import triton as attention  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes a program may have

pytestmark = pytest.mark.skipif(
    not (TOOLS / "cuobjdump").exists(), reason="this build of Triton has no tools for NVIDIA"
)


class Recorder:
    """In place of a kernel, takes what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.calls = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            names = (p.name for p in self.kernel.params)
            self.calls.append({**dict(zip(names, args, strict=False)), **kwargs})

        return call

    def compile(self, capability: int) -> tuple[int, int]:
        """Bytes of shared memory, and of the stack that a thread spills registers to."""
        [arguments] = self.calls
        constants, hints = {}, {}

        def describe(path: tuple[int, ...], value: Any) -> Any:
            if value is None or (isinstance(value, int) and value == 1):
                constants[path] = value
                return "constexpr"
            if isinstance(value, tuple):
                parts = [describe((*path, i), x) for i, x in enumerate(value)]
                return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
            if isinstance(value, Tensor) or (value % 16 == 0 and isinstance(value, int)):
                hints[path] = [["tt.divisibility", 16]]
            if isinstance(value, Tensor):
                return TYPES[value.dtype]
            return "fp32" if isinstance(value, float) else "i32"

        signature = {}
        for i, parameter in enumerate(self.kernel.params):
            value = arguments[parameter.name]
            if parameter.is_constexpr:
                constants[(i,)] = value
            signature[parameter.name] = (
                "constexpr" if parameter.is_constexpr else describe((i,), value)
            )
        options = {key: arguments[key] for key in ("num_warps", "num_stages") if key in arguments}
        kernel = triton.compile(
            ASTSource(self.kernel, signature, constants, hints),
            target=GPUTarget("cuda", capability, 32),
            options=options,
        )
        return kernel.metadata.shared, stack_of(kernel.asm["cubin"])


def stack_of(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    return int(re.search(r"STACK:(\d+)", done.stdout)[1])


def record(monkeypatch: pytest.MonkeyPatch, module: Any, names: list[str]) -> list[Recorder]:
    recorders = [Recorder(getattr(module, name)) for name in names]
    for name, recorder in zip(names, recorders, strict=True):
        monkeypatch.setattr(module, name, recorder)
    return recorders


TF32 = "float32 by TF32 products"
CASES = [  # head_dim, side, window, stride, dilation; dtype; compute capability
    ((16, 56, 7, 1, 1), torch.bfloat16, 90),
    ((32, 56, 7, 2, 1), torch.bfloat16, 90),
    ((64, 14, 7, 1, 1), torch.float16, 89),
    ((128, 7, 7, 1, 1), torch.bfloat16, 90),
    ((20, 33, 13, 1, 2), torch.bfloat16, 80),
    ((256, 14, 7, 1, 1), torch.bfloat16, 89),
    ((16, 28, 7, 1, 1), torch.float32, 89),
    ((128, 14, 7, 1, 1), torch.float32, 90),
    ((256, 14, 7, 1, 1), torch.float32, 89),
    ((16, 28, 7, 1, 1), TF32, 89),
    ((48, 28, 7, 1, 1), TF32, 89),
    ((128, 14, 7, 1, 1), TF32, 89),
]


@pytest.mark.parametrize(("case", "dtype", "capability"), CASES, ids=str)
@pytest.mark.slow
def test_attention(
    case: tuple[int, ...],
    dtype: torch.dtype | str,
    capability: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if dtype == TF32:
        monkeypatch.setattr(attention, "precision", lambda dtype: "tf32")
        dtype = torch.float32
    compile_attention(case, dtype, capability, monkeypatch)


@pytest.mark.parametrize("tile", [attention.Tile(4, 4, 128, 4, heads=4)], ids=str)
@pytest.mark.slow
def test_several_heads(tile: attention.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "choose_tile", lambda *_: tile)
    compile_attention((16, 28, 7, 1, 1), torch.bfloat16, 90, monkeypatch)


def compile_attention(
    case: tuple[int, ...], dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["_forward_kernel", "_query_gradient_kernel", "_key_gradient_kernel"]
    recorders = record(monkeypatch, attention, names)
    head_dim, side, *sizes = case
    fused = torch.empty(2, side, side, 3, 4, head_dim, dtype=dtype).permute(3, 0, 4, 5, 1, 2)
    position, alpha = torch.empty(head_dim, 2), torch.empty(())
    q, k, v = fused
    q = q[..., :: sizes[1], :: sizes[1]]
    base = torch.empty_like(q)
    out, lse = attention.forward(q, k, v, base, base[:1], position, alpha, *sizes)
    attention.backward(out, q, k, v, position, alpha, lse, *sizes)
    for name, recorder in zip(names, recorders, strict=True):
        shared, stack = recorder.compile(capability)
        assert shared <= SHARED[capability], f"{name}: {shared} bytes of shared memory"
        assert stack <= 512, f"{name}: {stack} bytes of stack"


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_all_keys_of_a_window_of_7_in_one_block(
    head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the query gradient makes the probabilities once."""
    [recorder] = record(monkeypatch, attention, ["_forward_kernel"])
    q, k, v = torch.empty(3, 1, 1, head_dim, 28, 28, dtype=torch.bfloat16)
    attention.forward(q, k, v, None, None, None, None, 7, 1, 1)
    [call] = recorder.calls
    constants = call["C"]
    assert constants.HALO_ROWS * constants.HALO_COLUMNS <= constants.BLOCK


@pytest.mark.parametrize("side", [(1, 1), (1, 9), (9, 1)], ids=str)
@pytest.mark.slow
def test_sizes_of_one(side: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton makes a constant of an integer that is 1, which has no methods of a tensor's."""
    names = ["_forward_kernel", "_query_gradient_kernel", "_key_gradient_kernel"]
    recorders = record(monkeypatch, attention, names)
    q, k, v = torch.empty(3, 1, 1, 1, *side)
    out, lse = attention.forward(q, k, v, None, None, None, None, 3, 1, 1)
    attention.backward(out, q, k, v, None, None, lse, 3, 1, 1)
    names = ["_forward_kernel", "_weight_gradient_kernel", "_value_gradient_kernel"]
    recorders += record(monkeypatch, aggregation, names)
    weight = torch.empty(1, 1, 9, *side)
    aggregation.backward(aggregation.forward(weight, v, 3, 1, 1), weight, v, 3, 1, 1)
    for recorder in recorders:
        recorder.compile(80)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_aggregation(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["_forward_kernel", "_weight_gradient_kernel", "_value_gradient_kernel"]
    recorders = record(monkeypatch, aggregation, names)
    weight, v = torch.empty(2, 8, 49, 28, 28), torch.empty(2, 8, 8, 28, 28)
    if layout == "channels_last":
        weight, v = (
            x.permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2) for x in (weight, v)
        )
    out = aggregation.forward(weight, v, 7, 1, 1)
    aggregation.backward(out, weight, v, 7, 1, 1)
    for name, recorder in zip(names, recorders, strict=True):
        shared, stack = recorder.compile(90)
        assert shared <= SHARED[89], f"{name}: {shared} bytes of shared memory"
        assert stack <= 512, f"{name}: {stack} bytes of stack"
