"""ACmix2d: its paths against one another, its ablations, and everything it must work under."""

import copy
import itertools
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
from helpers import (
    TOLERANCE,
    as_function,
    assert_all_close,
    outputs_and_gradients,
    perturbed,
    weighted_sum,
)
from torch import Tensor, nn
from torch.torch_version import TorchVersion

import acmix
from acmix import ACmix2d
from acmix.layers.mix import MIXES
from acmix.layers.shift import SHIFTS
from acmix.ops import backends, shift_kernels
from acmix.ops._project import project
from acmix.ops.acmix import _plan, tiled
from acmix.ops.shift_convolution import _path

# Backends other than the definition that can run on this machine.
FAST = [name for name, reason in backends().items() if reason is None and name != "reference"]


def make_layer(**arguments: object) -> ACmix2d:
    defaults = {"heads": 2, "kernel_att": 5, "dtype": torch.float64}
    return perturbed(ACmix2d(6, 8, **{**defaults, **arguments}), 0.1)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize(
    ("stride", "dilation", "size"),
    [(1, 1, (9, 13)), (2, 1, (7, 6)), (1, 2, (1, 5)), (3, 2, (10, 4)), (1, 1, (1, 1))],
    ids=str,
)
def test_fast_paths_are_the_reference(
    form: str, mix: str, shift: str, stride: int, dilation: int, size: tuple[int, int]
) -> None:
    layer = make_layer(mix=mix, shift=shift, stride=stride, dilation=dilation, backend="reference")
    inputs = [torch.randn(2, 6, *size, dtype=torch.float64), *layer.parameters()]
    expected = outputs_and_gradients(as_function(layer), inputs)
    layer.backend = "tiled"
    actual = outputs_and_gradients(as_function(layer), inputs)
    assert_all_close(actual, expected, TOLERANCE[torch.float64])
    assert actual[0].shape == (2, 8, -(-size[0] // stride), -(-size[1] // stride))


def test_reference_has_all_gradients() -> None:
    layer = ACmix2d(2, 2, heads=1, kernel_att=3, backend="reference", dtype=torch.float64)
    inputs = [torch.randn(1, 2, 2, 3, dtype=torch.float64), *layer.parameters()]
    inputs = [x.detach().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(as_function(layer), inputs)


def test_is_a_drop_in_for_conv2d() -> None:
    for stride, dilation, size in itertools.product((1, 2, 3), (1, 2), ((7, 7), (8, 5), (1, 1))):
        conv = nn.Conv2d(8, 8, 3, stride=stride, padding=dilation, dilation=dilation)
        layer = ACmix2d(8, 8, stride=stride, dilation=dilation)
        x = torch.randn(2, 8, *size)
        assert layer(x).shape == conv(x).shape


# The ablations


def test_shifts_agree_from_the_shift_kernels(form: str) -> None:
    layers = {shift: ACmix2d(6, 8, shift=shift, dtype=torch.float64) for shift in SHIFTS}
    state = layers["tensor"].state_dict()
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    expected = layers["tensor"](x)
    for layer in layers.values():
        layer.load_state_dict(state, strict=False)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-14)


def test_shift_parameters() -> None:
    def shapes(shift: str) -> list[tuple[int, ...]]:
        return [tuple(p.shape) for p in ACmix2d(6, 8, heads=2, shift=shift).shift.parameters()]

    assert shapes("learned") == [(8, 9, 3, 3)]
    assert shapes("learned_shared") == [(4, 9, 3, 3)]
    assert shapes("fixed") == shapes("tensor") == []


def test_shift_init() -> None:
    shifts = ACmix2d(6, 8).shift.weight
    assert torch.equal(shifts, shift_kernels(8, 3))
    random = ACmix2d(6, 8, shift_init="kaiming").shift.weight
    assert random.unique().numel() == random.numel()
    assert 0.5 < random.std() * (9 * 9 * 3) ** 0.5 < 1.5  # as nn.Conv2d: variance 1 / (3 fan_in)


def test_mix_weights() -> None:
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    learned = make_layer()
    parts = {}
    for mix in MIXES:
        layer = make_layer(mix=mix)
        layer.load_state_dict(learned.state_dict(), strict=False)
        parts[mix] = layer(x)
        names = {name for name, _ in layer.named_parameters()}
        assert ("mix.alpha" in names) == (mix in ("learned", "convex"))
        assert ("mix.beta" in names) == (mix == "learned")
    attention, convolution = parts["attention"], parts["convolution"]
    torch.testing.assert_close(parts["sum"], attention + convolution)
    alpha, beta = learned.mix.alpha, learned.mix.beta
    torch.testing.assert_close(parts["convex"], alpha * attention + (1 - alpha) * convolution)
    torch.testing.assert_close(parts["learned"], alpha * attention + beta * convolution)
    assert ACmix2d(4, 4).mix.alpha.item() == ACmix2d(4, 4).mix.beta.item() == 0.5


def test_unused_path_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 6, 5, 5)
    attention = ACmix2d(6, 8, mix="attention", backend="tiled")
    convolution = ACmix2d(6, 8, mix="convolution", backend="tiled")
    assert {n for n, _ in attention.named_parameters()} == {
        "qkv_weight",
        "qkv_bias",
        "position_weight",
    }
    assert "position_weight" not in dict(convolution.named_parameters())
    with monkeypatch.context() as patch:  # to compute the path would raise
        patch.setattr(_path, "run", None)
        attention(x)
    with monkeypatch.context() as patch:
        patch.setattr(tiled, "_attend", None)
        convolution(x)


def test_position_can_be_left_out() -> None:
    layer = make_layer(position=False)
    assert layer.position_weight is None
    with_position = make_layer()
    with_position.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(1, 6, 7, 7, dtype=torch.float64)
    assert (with_position(x) - layer(x)).abs().max() > 1e-4
    nn.init.zeros_(with_position.position_weight)
    torch.testing.assert_close(with_position(x), layer(x))


def test_initialisation_survives_timm() -> None:
    """timm's ResNet re-initialises every nn.Conv2d after building its blocks."""

    class Bottleneck(timm.models.resnet.Bottleneck):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            conv = self.conv2
            self.conv2 = ACmix2d(conv.in_channels, conv.out_channels, stride=conv.stride[0])
            self.conv2.state_at_start = copy.deepcopy(self.conv2.state_dict())

    model = timm.models.resnet.ResNet(Bottleneck, (1, 1, 1, 1), num_classes=3)
    layers = [m for m in model.modules() if isinstance(m, ACmix2d)]
    assert len(layers) == 4
    for layer in layers:
        assert torch.equal(layer.shift.weight, shift_kernels(layer.out_channels, 3))
        for name, value in layer.state_dict().items():
            assert torch.equal(value, layer.state_at_start[name]), name
    assert model(torch.randn(1, 3, 65, 47)).shape == (1, 3)


# What it must work under


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dtypes(form: str, backend: str, dtype: torch.dtype) -> None:
    if backend == "native" and dtype == torch.float64:
        pytest.skip("the CPU kernel leaves float64 to the portable path")
    layer = make_layer(backend="reference")
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    expected = layer(x)
    layer.backend = backend
    actual = layer.to(dtype)(x.to(dtype))
    assert actual.dtype == dtype
    assert_all_close([actual], [expected], TOLERANCE[dtype] * 3)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(form: str, backend: str, dtype: torch.dtype) -> None:
    layer = make_layer(dtype=torch.float32, backend=backend)
    x = torch.randn(2, 6, 7, 9)
    expected = layer(x)
    with torch.autocast("cpu", dtype=dtype):
        actual = layer(x)
    assert actual.dtype == dtype
    assert_all_close([actual], [expected], TOLERANCE[dtype] * 3)
    actual.float().square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("backend", FAST)
def test_memory_formats_and_strides(form: str, backend: str, stride: int) -> None:
    layer = make_layer(dtype=torch.float32, backend=backend, stride=stride)
    x = torch.randn(3, 6, 7, 9)
    inputs = [x, *layer.parameters()]
    expected = outputs_and_gradients(as_function(layer), inputs)
    variants = {
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": torch.cat([x, x], 1)[:, :6],
        "stepped": torch.stack([x, x], -1).flatten(-2)[..., ::2],
    }
    for name, variant in variants.items():
        actual = outputs_and_gradients(as_function(layer), [variant, *inputs[1:]])
        assert_all_close(actual, expected, TOLERANCE[torch.float32], name)
    expanded = x[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(layer(expanded), layer(expanded.contiguous()))


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_batches(form: str, backend: str) -> None:
    layer = make_layer(dtype=torch.float32, backend=backend)
    x = torch.randn(3, 6, 7, 9)
    together = layer(x)
    torch.testing.assert_close(torch.cat([layer(x[i : i + 1]) for i in range(3)]), together)
    empty = torch.empty(0, 6, 7, 9, requires_grad=True)
    out = layer(empty)
    assert out.shape == (0, 8, 7, 9)
    out.sum().backward()
    assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("backend", FAST)
def test_every_small_map(form: str, backend: str) -> None:
    layer = ACmix2d(4, 4, heads=2, backend="reference")
    for height, width in itertools.product((1, 2, 3, 5), repeat=2):
        x = torch.randn(1, 4, height, width)
        layer.backend = "reference"
        expected = layer(x)
        layer.backend = backend
        assert_all_close([layer(x)], [expected], TOLERANCE[torch.float32], f"{height}x{width}")


# inductor takes a minute for what is not one operator
COMPILER = {"native": "inductor", "tiled": "aot_eager"}


def compile_layer(backend: str, dynamic: bool) -> tuple[ACmix2d, ACmix2d]:
    """A layer, and compiled."""
    torch.compiler.reset()
    layer = make_layer(dtype=torch.float32, stride=2, backend=backend)
    by = COMPILER[backend]
    return layer, torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=by)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.slow
def test_compile(backend: str) -> None:
    layer, compiled = compile_layer(backend, dynamic=False)
    check_compiled(layer, compiled, [(2, 7, 9)])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.slow
def test_compile_with_dynamic_sizes(backend: str) -> None:
    layer, compiled = compile_layer(backend, dynamic=True)
    sizes = [(2, 7, 9), (3, 12, 10), (2, 33, 17)]
    # PyTorch recompiles nn.Conv2d itself for each size in training; in inference nothing may.
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for batch, height, width in sizes:
            x = torch.randn(batch, 6, height, width)
            torch.testing.assert_close(compiled(x), layer(x))
    check_compiled(layer, compiled, sizes)


def check_compiled(
    layer: ACmix2d, compiled: Callable[[Tensor], Tensor], sizes: list[tuple[int, int, int]]
) -> None:
    for batch, height, width in sizes:
        x = torch.randn(batch, 6, height, width)
        expected = outputs_and_gradients(as_function(layer), [x, *layer.parameters()])
        out = compiled(x.requires_grad_())
        gradients = torch.autograd.grad(weighted_sum(out), [x, *layer.parameters()])
        assert_all_close([out, *gradients], expected, TOLERANCE[torch.float32])


def test_export() -> None:
    layer = make_layer(dtype=torch.float32).eval()
    x = torch.randn(2, 6, 9, 12)
    sizes = {
        i: torch.export.Dim(name, min=2, max=512) for i, name in ((0, "b"), (2, "h"), (3, "w"))
    }
    program = torch.export.export(layer, (x,), dynamic_shapes=(sizes,))
    other = torch.randn(3, 6, 21, 14)
    for y in (x, other):
        torch.testing.assert_close(program.module()(y), layer(y), rtol=1e-5, atol=1e-5)


def test_copies() -> None:
    layer = make_layer(mix="convex", shift="learned_shared", stride=2)
    x = torch.randn(1, 6, 7, 9, dtype=torch.float64)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    other = make_layer(mix="convex", shift="learned_shared", stride=2)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)


def test_meta_device() -> None:
    for mix, shift in itertools.product(MIXES, SHIFTS):
        layer = ACmix2d(6, 8, mix=mix, shift=shift, device="meta")
        assert all(p.is_meta for p in layer.parameters())
        assert layer(torch.empty(2, 6, 7, 9, device="meta")).shape == (2, 8, 7, 9)
        layer.to_empty(device="cpu").reset_parameters()
        for name, parameter in layer.named_parameters():
            assert parameter.isfinite().all(), name
        if hasattr(layer, "shift") and shift.startswith("learned"):
            sets = layer.shift.weight.shape[0]
            assert torch.equal(layer.shift.weight, shift_kernels(sets, 3))


def test_functional_call() -> None:
    layer, other = make_layer(), make_layer()
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    out = torch.func.functional_call(layer, dict(other.named_parameters()), x)
    assert torch.equal(out, other(x))


def test_transforms_of_torch_func() -> None:
    """Gradients of each sample, of an ensemble: auto takes the reference for them."""
    layers = [make_layer() for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(3, 6, 7, 9, dtype=torch.float64)

    def loss(parameters: dict, buffers: dict, x: Tensor) -> Tensor:
        out = torch.func.functional_call(layers[0], (parameters, buffers), x[None])
        return out.square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, None, 0))
    gradients = torch.func.vmap(per_sample, in_dims=(0, 0, None))(parameters, buffers, x)
    for index, layer in enumerate(layers):
        layer(x).square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(gradients[name][index].sum(0), parameter.grad)


def test_data_parallel_replicas() -> None:
    """What nn.DataParallel does on each device: replicas whose parameters are plain tensors."""
    layer = make_layer()
    replicas = []
    for _ in range(2):
        replica = layer._replicate_for_data_parallel()
        for name, child in layer.named_children():
            copied = child._replicate_for_data_parallel()
            for key, parameter in child.named_parameters(recurse=False):
                copied._parameters.pop(key, None)
                setattr(copied, key, parameter * 1)
            replica._modules[name] = copied
        for key, parameter in layer.named_parameters(recurse=False):
            replica._parameters.pop(key, None)
            setattr(replica, key, parameter * 1)
        replicas.append(replica)
    x = torch.randn(4, 6, 7, 9, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(x)
    outs = [replica(half) for replica, half in zip(replicas, x.chunk(2), strict=True)]
    torch.testing.assert_close(torch.cat(outs), expected)
    torch.cat(outs).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_threads() -> None:
    """Several Python threads through one layer."""
    from concurrent.futures import ThreadPoolExecutor

    layer = make_layer(dtype=torch.float32)
    inputs = [torch.randn(1, 6, 8 + i, 9) for i in range(8)]
    expected = [layer(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for actual, e in zip(pool.map(layer, inputs * 4), expected * 4, strict=True):
            torch.testing.assert_close(actual, e)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"out_channels": 6},
            ValueError,
            r"out_channels: expected a multiple of heads \(4\), got 6",
        ),
        ({"in_channels": 0}, ValueError, "in_channels: expected a positive int, got 0"),
        ({"heads": -1}, ValueError, "heads: expected a positive int, got -1"),
        ({"kernel_att": 6}, ValueError, "kernel_att: expected an odd window side, got 6"),
        ({"kernel_att": 0}, ValueError, "kernel_att: expected a positive int, got 0"),
        ({"kernel_conv": 2}, ValueError, "kernel_conv: expected an odd window side, got 2"),
        ({"stride": 0}, ValueError, "stride: expected a positive int, got 0"),
        ({"stride": (2, 2)}, TypeError, r"stride: expected an int, got tuple \(\(2, 2\)\)"),
        ({"dilation": 0}, ValueError, "dilation: expected a positive int, got 0"),
        ({"mix": "both"}, ValueError, "mix: expected one of 'learned', .*got 'both'"),
        ({"shift": "roll"}, ValueError, "shift: expected one of 'learned', .*got 'roll'"),
        ({"shift_init": "zero"}, ValueError, "shift_init: expected one of 'shift', 'kaiming'"),
        ({"shift": "tensor", "shift_init": "kaiming"}, ValueError, "shift_init: expected 'shift'"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of 'auto', .*got 'gpu'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ACmix2d(**{"in_channels": 8, "out_channels": 8, **arguments})


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(5, 5), ValueError, r"x: expected 4 dimensions .* got 2 with shape"),
        (torch.ones(1, 7, 5, 5), ValueError, "x: expected 8 channels, got 7"),
        (
            torch.ones(1, 8, 5, 5).int(),
            TypeError,
            "x: expected a floating-point tensor, got torch.i",
        ),
        (
            torch.ones(1, 8, 5, 5) * 1j,
            TypeError,
            "x: expected a floating-point tensor, got torch.c",
        ),
        (torch.ones(1, 8, 0, 5), ValueError, "x: expected a map of 1x1 or more"),
        ("image.png", TypeError, "x: expected a tensor, got str"),
        (torch.ones(1, 8, 5, 5).half(), TypeError, "x: expected the dtype of parameters .*float32"),
        (torch.ones(1, 8, 5, 5, device="meta"), ValueError, "x: expected the device of parameters"),
    ],
    ids=lambda value: "",
)
def test_wrong_inputs(x: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ACmix2d(8, 8)(x)


@pytest.mark.parametrize("mix", MIXES)
def test_a_backend_is_refused_before_any_work(mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plan, "project", None)
    with pytest.raises(ValueError, match="backend: 'triton' cannot run here: "):
        ACmix2d(8, 8, backend="triton", mix=mix)(torch.ones(1, 8, 5, 5))


def test_forced_backend_gives_its_reason() -> None:
    for name, reason in backends().items():
        if reason is not None:
            with pytest.raises(ValueError, match=f"backend: '{name}' cannot run here: ") as raised:
                ACmix2d(8, 8, backend=name)(torch.ones(1, 8, 5, 5))
            assert reason in str(raised.value)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(3, 5), (33, 32)], ids=str)
def test_every_way_to_project(
    threads: int, memory_format: torch.memory_format, size: tuple[int, int]
) -> None:
    """A linear, a 1x1 convolution or a batched product, by layout, threads and size."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, *size, dtype=torch.float64).to(memory_format=memory_format)
    weight, bias = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    def expected(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.einsum("oi,bihw->bohw", weight, x) + bias[:, None, None]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = outputs_and_gradients(project, (x, weight, bias))
    finally:
        torch.set_num_threads(before)
    wanted = outputs_and_gradients(expected, (x, weight, bias))
    assert_all_close(got, wanted, TOLERANCE[torch.float64])


@pytest.mark.parametrize("mix", ["learned", "convex"])
def test_early_checkpoints_have_scalars(mix: str) -> None:
    layer, fresh = make_layer(mix=mix), make_layer(mix=mix)
    early = {k: v.squeeze() if k.startswith("mix.") else v for k, v in layer.state_dict().items()}
    assert early["mix.alpha"].shape == ()
    fresh.load_state_dict(early)
    assert fresh.mix.alpha.shape == (1,)
    assert all(map(torch.equal, fresh.state_dict().values(), layer.state_dict().values()))
    with torch.device("meta"):
        assigned = ACmix2d(6, 8, heads=2, kernel_att=5, mix=mix)
    assigned.load_state_dict(early, assign=True)
    assert assigned.mix.alpha.shape == (1,)
    assert early["mix.alpha"].shape == ()  # the caller's own is left alone


@pytest.mark.parametrize("fused", [False, True], ids=["layer", "fused"])
@pytest.mark.parametrize("mix", ["learned", "convolution"])
def test_an_image_without_batch(mix: str, fused: bool) -> None:
    """As nn.Conv2d takes one."""
    layer = make_layer(mix=mix, stride=2)
    layer = acmix.fuse(layer) if fused else layer
    x = torch.randn(6, 7, 5, dtype=torch.float64)
    assert torch.equal(layer(x), layer(x[None])[0])
    assert layer(x).shape == (8, 4, 3)


@pytest.mark.parametrize("fused", [False, True], ids=["layer", "fused"])
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("mix", MIXES)
def test_a_trace_of_fx(mix: str, shift: str, fused: bool) -> None:
    """One call of the operator, of no size."""
    layer = make_layer(mix=mix, shift=shift)
    layer = acmix.fuse(layer) if fused else layer
    traced = torch.fx.symbolic_trace(layer)
    if torch.__version__ >= TorchVersion("2.9"):  # 2.8 pickles no annotations that are strings
        traced = pickle.loads(pickle.dumps(traced))
    for size in ((7, 5), (1, 9)):
        x = torch.randn(2, 6, *size, dtype=torch.float64)
        assert torch.equal(traced(x), layer(x))


@pytest.mark.parametrize("fused", [False, True], ids=["layer", "fused"])
def test_a_trace_of_jit_holds_no_operator_of_ours(fused: bool) -> None:
    layer = make_layer(dtype=torch.float32)
    layer = acmix.fuse(layer) if fused else layer.requires_grad_(False)
    x = torch.randn(2, 6, 7, 5)
    traced = torch.jit.trace(layer, (x,))
    assert "acmix::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), layer(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True], ids=["layer", "fused"])
def test_autocast_does_not_join_float64(fused: bool) -> None:
    layer = acmix.fuse(make_layer()) if fused else make_layer()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(
            TypeError, match=r"x: expected the dtype of parameters \(torch.float64\), got"
        ),
    ):
        layer(torch.ones(1, 6, 5, 5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "backend", "sizes"),
    [
        ("inductor", "reference", [(5, 6)]),  # half a minute a size
        *(("aot_eager", name, [(5, 6), (9, 7)]) for name in ("reference", "tiled", "auto")),
    ],
)
def test_dynamic_sizes_in_training(by: str, backend: str, sizes: list[tuple[int, int]]) -> None:
    if by == "inductor" and torch.__version__ < TorchVersion("2.9"):
        pytest.skip("inductor of PyTorch 2.8 fails on sizes of its own")
    layer = ACmix2d(4, 4, heads=2, kernel_att=3, kernel_conv=1, backend=backend)
    compiled = torch.compile(layer, dynamic=True, backend=by)
    for size in sizes:
        results = []
        for module in (layer, compiled):
            x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
            out = module(x.requires_grad_())
            results.append([out, *torch.autograd.grad(weighted_sum(out), x)])
        assert_all_close(*results, TOLERANCE[torch.float32])
