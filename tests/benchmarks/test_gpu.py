"""`make bench-gpu` at tiny sizes on the CPU: every part runs, and nothing wrong is timed."""

import csv
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def run(gpu, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, options)])
    return gpu.main()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.slow
def test_every_part_leaves_rows_and_a_figure(gpu, monkeypatch, tmp_path, capsys):
    quick = ("--device", "cpu", "--quick", "--out", tmp_path)
    assert run(gpu, monkeypatch, *quick) == 0
    rows = list(csv.DictReader((tmp_path / "gpu.csv").open()))
    timed = {(row["part"], row["subject"]) for row in rows if float(row["median_ms"] or 0) > 0}
    assert timed == {
        *(("layers", subject) for subject in ("conv3x3", "ACmix2d", "attention")),
        *(("rivals", subject) for subject in ("SDPA on halo tiles", "windows unfolded")),
        *(("rivals", subject) for subject in ("FlexAttention, cut at the border",)),
        ("rivals", "ACmix2d compiled"),
        *(("networks", subject) for subject in ("resnet26_conv", "resnet26_acmix")),
        *(("roofline", subject) for subject in ("copy", "matrix product")),
    }
    assert all(row["median_ms"] or row["note"] for row in rows)
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    assert "attention, forward, ms (goal)" in capsys.readouterr().out


@pytest.mark.slow
def test_what_would_start_too_late_is_not_run(gpu, monkeypatch, tmp_path):
    late = ("--device", "cpu", "--quick", "--minutes", "0", "--only", "layers", "--out", tmp_path)
    assert run(gpu, monkeypatch, *late) == 0
    notes = {row["note"] for row in csv.DictReader((tmp_path / "gpu.csv").open())}
    assert notes == {"not run: out of time"}
    assert not (tmp_path / "gpu.png").exists()


@pytest.mark.slow
def test_what_fails_is_a_row_that_says_why(gpu, monkeypatch, tmp_path):
    def fails(*_):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(gpu, "infer", fails)  # a case
    monkeypatch.setattr(gpu, "pairs_of", fails)  # a part
    quick = ("--device", "cpu", "--quick", "--only", "networks", "layers", "--out", tmp_path)
    assert run(gpu, monkeypatch, *quick) == 0
    rows = list(csv.DictReader((tmp_path / "gpu.csv").open()))
    told = [row["note"] == "RuntimeError: no compiler here" for row in rows]
    assert told == [row["run"] != "forward+backward" for row in rows]


@pytest.mark.slow
def test_every_tile_is_checked_and_timed(gpu, monkeypatch, tmp_path, capsys):
    tiles = pytest.importorskip("acmix.ops.window_attention.triton").candidates(64)
    quick = ("--device", "cpu", "--quick", "--only", "variants", "--out", tmp_path)
    assert run(gpu, monkeypatch, *quick) == 0
    rows = list(csv.DictReader((tmp_path / "gpu.csv").open()))
    assert {row["subject"] for row in rows if row["median_ms"]} == {"chosen", *map(str, tiles)}
    assert str(tiles[0]) in capsys.readouterr().out


def test_a_wrong_tile_is_not_timed(gpu, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu.gpu_check, "faults", lambda *_: {torch.float32: []})
    monkeypatch.setattr(gpu.gpu_check, "TOLERANCE", {torch.float32: 0.0})
    quick = ("--device", "cpu", "--quick", "--only", "variants", "--out", tmp_path)
    assert run(gpu, monkeypatch, *quick) == 0
    rows = list(csv.DictReader((tmp_path / "gpu.csv").open()))
    assert all("error" in row["note"] and not row["median_ms"] for row in rows)


@pytest.mark.slow
def test_a_kernel_wrong_at_a_shape_is_not_timed_there(gpu, monkeypatch, tmp_path, capsys):
    """Nor a network whose layers are; what it is compared with is timed."""

    def wrong_at(channels):
        honest = gpu.gpu_check.worst

        def worst(actual, exact):
            return 1.0 if actual[0].shape[1] == channels else honest(actual, exact)

        return worst

    [first, *_], [strided, *_] = gpu.SHAPES, gpu.STRIDED
    assert first[0] != strided[0]
    for part, channels, wrong in (
        ("layers", first[0] // 8, {"ACmix2d", "attention"}),
        ("networks", strided[0] // 8, {"resnet26_acmix"}),
    ):
        monkeypatch.setattr(gpu.gpu_check, "faults", lambda *_: {torch.float32: []})
        with monkeypatch.context() as patch:
            patch.setattr(gpu.gpu_check, "worst", wrong_at(channels))
            options = ("--device", "cpu", "--quick", "--only", part, "--out", tmp_path / part)
            assert run(gpu, monkeypatch, *options) == 0
        rows = list(csv.DictReader((tmp_path / part / "gpu.csv").open()))
        assert {row["subject"] for row in rows if "error" in row["note"]} == wrong
        assert all(bool(row["median_ms"]) != ("error" in row["note"]) for row in rows)
        assert any(row["median_ms"] for row in rows)
    assert (tmp_path / "layers/gpu.png").exists()
    assert not (tmp_path / "networks/gpu.png").exists()
    assert "no layer was timed: no figure" in capsys.readouterr().out


def test_wrong_in_another_dtype_is_said(gpu, monkeypatch, tmp_path, capsys):
    found = {torch.float32: [], torch.float16: ["attention: error 1.0"]}
    monkeypatch.setattr(gpu.gpu_check, "faults", lambda *_: found)
    quick = ("--device", "cpu", "--quick", "--only", "roofline", "--out", tmp_path)
    assert run(gpu, monkeypatch, *quick) == 1
    told = capsys.readouterr()
    assert "attention: error 1.0" in told.err
    assert "agrees with the reference in torch.float32\n" in told.out
    assert len(list(csv.DictReader((tmp_path / "gpu.csv").open()))) == 2


def test_rows_are_kept(gpu, monkeypatch, tmp_path):
    """Those of other cases that were measured before, and all before a kill."""
    monkeypatch.setattr(gpu.gpu_check, "faults", lambda *_: {torch.float32: []})
    quick = ("--device", "cpu", "--quick", "--out", tmp_path, "--only")
    for _ in range(2):
        assert run(gpu, monkeypatch, *quick, "roofline") == 0

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        run(gpu, monkeypatch, *quick, "layers")
    rows = list(csv.DictReader((tmp_path / "gpu.csv").open()))
    assert [row["subject"] for row in rows] == ["copy", "matrix product", "conv3x3"]


def test_a_wrong_kernel_is_not_timed(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu.gpu_check, "TOLERANCE", {torch.float32: 0.0})
    assert run(gpu, monkeypatch, "--device", "cpu", "--quick", "--out", tmp_path) == 1
    assert "nothing is timed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_so(gpu, monkeypatch, tmp_path, capsys):
    assert run(gpu, monkeypatch, "--out", tmp_path) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "no GPU found" in line
    assert "not run" in line
    assert not list(tmp_path.iterdir())
