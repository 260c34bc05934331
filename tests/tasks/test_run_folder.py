"""Who may write into the folder of a run, and what is left of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tasks.runs import ended, fit, start

from acmix.errors import UserError
from acmix.tasks import run_folder
from acmix.tasks.run_folder import Lock

SHORT = {"trainer.max_epochs": 1, "trainer.limit_train_batches": 2}


def lock_of(folder, **changes):
    """A lock as this process makes it, changed."""
    lock = Lock(folder)
    lock.take()
    owner = json.loads(lock.path.read_text())
    lock._stop.set()
    lock.path.write_text(json.dumps({**owner, **changes}))
    return lock.path


def gone():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lock_names_process_host_and_time_and_goes(tmp_path):
    lock = Lock(tmp_path / "runs" / "run")
    lock.take()
    said = rf"run: .*/run is being written by process {os.getpid()} on {socket.gethostname()} since"
    with pytest.raises(UserError, match=said + rf" {time.strftime('%Y-%m-%d')}"):
        Lock(tmp_path / "runs" / "run").check()
    with pytest.raises(UserError, match=said):
        Lock(tmp_path / "runs" / "run").take()
    lock.release()
    assert list(tmp_path.iterdir()) == []  # nor the folders that it made


def test_what_a_run_wrote_stays(tmp_path):
    lock = Lock(tmp_path / "run")
    lock.take()
    (tmp_path / "run" / "metrics.csv").write_text("")
    lock.release()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("stale", ["process", "started", "silent", "torn"])
def test_a_stale_lock_is_taken_over(tmp_path, stale):
    if stale == "started" and run_folder._started(os.getpid()) is None:
        pytest.skip("this system does not tell")
    changes = {"process": {"process": gone()}, "started": {"started": "1"}, "silent": {"host": "x"}}
    path = lock_of(tmp_path, **changes.get(stale, {}))
    if stale == "silent":
        os.utime(path, (1, time.time() - run_folder.SILENT - 1))
    if stale == "torn":
        path.write_text('{"process"')
        with pytest.raises(UserError, match="is being written by another run"):
            Lock(tmp_path).take()
        return
    lock = Lock(tmp_path)
    lock.check()
    lock.take()
    assert json.loads(path.read_text())["process"] == os.getpid()
    lock.release()


def test_a_lock_of_another_machine_holds_as_long_as_it_is_touched(tmp_path, monkeypatch):
    lock_of(tmp_path, host="elsewhere", process=1)
    with pytest.raises(UserError, match="process 1 on elsewhere since"):
        Lock(tmp_path).check()


def test_a_lock_is_touched_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "BEAT", 0.01)
    lock = Lock(tmp_path)
    lock.take()
    os.utime(lock.path, (1, 1))
    deadline = time.monotonic() + 10
    while lock.path.stat().st_mtime == 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lock.path.stat().st_mtime > 1
    lock.release()


@pytest.mark.slow
def test_a_second_run_leaves_the_first_alone(tmp_path, capsys):
    run = tmp_path / "run"
    first = start(run, {"trainer.max_epochs": 30})
    deadline = time.monotonic() + 100
    while not (run / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    for more in ([], ["--ckpt_path=last"]):
        assert fit(run, SHORT, *more) == 2
        assert f"is being written by process {first.pid} on" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    first.send_signal(signal.SIGKILL)
    assert ended(first)[0] == -signal.SIGKILL
    assert (run / "lock.json").exists()
    assert fit(run, SHORT) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.1"]
    assert not (run / "lock.json").exists()


@pytest.mark.parametrize("mistake", [{"data.val_fraction": 1e-9}, {"model.freeze": "[nothing]"}])
def test_a_mistake_moves_no_earlier_run(tmp_path, capsys, mistake):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("data:\nmodel:\nrun:\ntrainer:\n")
    assert fit(run, {**SHORT, **mistake}) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.yaml"]


@pytest.mark.parametrize("form", [".", "..", "a/..", "run"])
def test_a_run_has_a_name(tmp_path, monkeypatch, form):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Path(run_folder.named_folder(form)).name not in ("", "..")
