"""`acmix bench`: what is measured, what is said of it, and what is refused."""

import csv
import io
import time

import pytest
import torch
from torch import nn

from acmix.analysis import bench, bench_command
from acmix.cli import main

SMALL = {"size": (32, 48), "batch": 2, "threads": 1}


def steps_of(seconds, name="one", run="inference"):
    return bench.Measured(bench.Subject(name, run, **SMALL), 1000, seconds, 2.0**20)


def test_all_take_turns_and_the_first_does_not_count():
    calls = []
    steps = [lambda: calls.append("a"), lambda: (calls.append("b"), time.sleep(0.01))]
    a, b = bench.take_turns(steps, turns=3)
    assert calls == ["a", "b"] * 4
    assert len(a) == len(b) == 3
    assert min(b) > 0.01 > max(a)


@pytest.mark.parametrize("task", ["classification", "detection"])
def test_a_step_of_training_has_gradients_and_one_of_inference_none(task, monkeypatch):
    kwargs = {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)}
    where, name = {
        "classification": (bench.timm, "create_model"),
        "detection": (bench, "create_detector"),
    }[task]
    small = kwargs if task == "classification" else {"width": 32, "model_kwargs": kwargs}
    real = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *args, **more: real(*args, **more, **small))
    head = "mask_rcnn" if task == "detection" else ""
    for run in bench.RUNS:
        net, step = bench.Subject("resnet26_acmix", run, task, head, **SMALL).build()
        given = set()
        for key, weight in net.named_parameters():
            weight.register_post_accumulate_grad_hook(
                lambda _, key=key, given=given: given.add(key)
            )
        step()
        assert given == (set(dict(net.named_parameters())) if run == "training" else set())
        assert net.training == (run == "training")


def test_bfloat16_is_what_the_layers_see(monkeypatch):
    seen = []
    net, step = bench.Subject("resnet18", "inference", dtype="bfloat16", **SMALL).build()
    net.layer1.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    step()
    assert seen == [torch.bfloat16]


@pytest.mark.skipif(not bench.sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_what_a_step_holds_at_its_peak():
    mib = 2**18  # numbers

    def step():
        one = torch.ones(40 * mib)
        return one + one

    found = bench.peak_on_cpu(step) / 2**20
    assert 70 < found < 130


@pytest.mark.slow
@pytest.mark.skipif(not bench.sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_training_exceeds_that_of_inference():
    one, other = (bench.peak_memory(bench.Subject("resnet18", run, **SMALL)) for run in bench.RUNS)
    assert 0 < one < other


def test_no_ranking_within_noise():
    base = steps_of((1.0, 1.1, 1.2, 1.3))
    assert bench_command.compared(base, base) == "1"
    assert bench_command.compared(steps_of((0.5, 0.55, 0.6, 0.6)), base) == "2.00"
    assert bench_command.compared(steps_of((0.9, 1.1, 1.2, 1.25)), base) == "1.11 (within noise)"


def test_a_run_is_compared_with_its_own_kind():
    found = [steps_of((1.0, 1.0)), steps_of((2.0, 2.0), "two")]
    found += [steps_of((3.0, 3.0), run="training"), steps_of((6.0, 6.0), "two", "training")]
    assert [bench_command.base_of(of, found).best for of in found] == [1.0, 1.0, 3.0, 3.0]


def test_rows_say_what_was_measured(tmp_path, capsys, monkeypatch):
    out = tmp_path / "rows.csv"
    monkeypatch.setattr(bench, "peak_memory", lambda subject: 2.0**20)  # which has a test
    args = ["--turns", "2", "--size", "32x48", "--threads", "1", "--batch", "2", "--out", str(out)]
    assert main(["bench", "resnet18", "resnet10t", *args]) == 0
    table = capsys.readouterr().out
    assert "resnet10t" in table
    assert "32x48, batch 2, float32" in table
    one, other = csv.DictReader(io.StringIO(out.read_text()))
    assert (one["name"], one["times_as_fast"], one["size"]) == ("resnet18", "1.0", "32x48")
    assert float(one["ms_min"]) <= float(one["ms_median"])
    assert float(other["images_per_second"]) == pytest.approx(
        2e3 / float(other["ms_min"]), rel=0.01
    )
    assert int(one["parameters"]) > int(other["parameters"]) > 1e6
    assert one["processor"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["resnet5O"], "unknown model 'resnet5O'; did you mean"),
        (["--turns", "1"], "--turns: expected at least 2, got 1"),
        (["--batch", "0"], "--batch: expected at least 1, got 0"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--size", "0"], "argument --size: expected S or HEIGHTxWIDTH in pixels, got '0'"),
        (["--task", "detection", "--detector", "retina"], "did you mean retinanet?"),
        (["--device", "abacus"], "--device: expected one that is there, got abacus"),
        (["vit_tiny_patch16_224", "--task", "detection"], "expected a network with maps of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_measured_is_one_line(args, said, capsys):
    assert main(["bench", *args]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("acmix bench: ")
    assert said in line


def test_loss_of_logits_depends_on_all_of_them():
    net = nn.Linear(3, 4)
    bench.loss_of(net(torch.ones(2, 3))).backward()
    assert (net.weight.grad != 0).all()
