"""The folder of a run: what makes one, who writes into it, and where an earlier one goes."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from acmix.errors import UserError, did_you_mean

LOCK = "lock.json"
BEAT = 20.0  # seconds from one sign of life to the next
SILENT = 15 * BEAT  # after which a process of another machine is taken for dead


def named_folder(path: str) -> str:
    """The path; one that ends in no name, such as ".", as the folder that it now stands for."""
    return path if Path(path).name not in ("", "..") else str(Path(path).resolve())


def is_run(folder: Path) -> bool:
    """Whether `acmix fit` made the folder: `checkpoints` beside a `config.yaml` with its keys."""
    config = folder / "config.yaml"
    if not (config.is_file() and (folder / "checkpoints").is_dir()):
        return False
    keys = {line.split(":")[0] for line in config.read_text(errors="replace").splitlines()}
    return keys >= {"data", "model", "run", "trainer"}


def check_folder(folder: Path) -> None:
    """A folder with anything but an earlier run in it raises `UserError`."""
    files = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if files - {LOCK} and not is_run(folder):
        raise UserError(f"run: {folder} is not empty and no run of acmix")


def move_earlier_run(folder: Path) -> None:
    """A run already in the folder keeps its files under the first free name FOLDER.1, .2, ..."""
    if not is_run(folder):
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    print(f"{folder} held an earlier run, which is now {aside}", file=sys.stderr)


def nearest_run(path: Path) -> str:
    """A run beside the path, of nearly its name."""
    if not path.parent.is_dir():
        return ""
    runs = [str(run) for run in sorted(path.parent.iterdir()) if (run / "checkpoints").is_dir()]
    return did_you_mean(str(path), runs)


class Lock:
    """`lock.json` in a run's folder, as long as this process writes there.

    It names the process, its host and when it began. A lock is stale where its process is gone;
    of a process of another machine that shows by a file that was not touched for minutes.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._stop: threading.Event | None = None

    def check(self) -> None:
        """A run that is being written raises `UserError`; a stale lock is removed."""
        owner = self._owner()
        if owner is None:
            return
        if not self._lives(owner):
            self.path.unlink(missing_ok=True)
            return
        raise UserError(
            f"run: {self.path.parent} is being written by process {owner['process']} on "
            f"{owner['host']} since {owner['since']}"
        )

    def take(self) -> None:
        """Make the lock, for this process; where another was faster, raise `UserError`."""
        folders = [self.path.parent, *self.path.parent.parents]
        self._made = [folder for folder in folders if not folder.exists()]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run: cannot make {self.path.parent}: {error.strerror}") from error
        own = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "started": _started(os.getpid()),
        }
        for _ in range(2):
            try:
                with self.path.open("x") as file:  # fails where there is one
                    json.dump(own, file)
                break
            except FileExistsError:
                self.check()  # which removes a stale one
        else:
            raise UserError(f"run: {self.path.parent} is being written by another run")
        self._stop = threading.Event()
        threading.Thread(target=self._beat, args=(self._stop,), daemon=True).start()

    def release(self) -> None:
        if self._stop is not None:
            self._stop.set()
            self._stop = None
            self.path.unlink(missing_ok=True)
            with suppress(OSError):  # of what is no longer empty
                for folder in self._made:
                    folder.rmdir()

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(BEAT):
            with suppress(OSError):
                os.utime(self.path)

    def _owner(self) -> dict[str, Any] | None:
        try:
            owner = json.loads(self.path.read_text())
            return owner if {"process", "host", "since"} <= owner.keys() else None
        except (OSError, ValueError, AttributeError):
            return None

    def _lives(self, owner: dict[str, Any]) -> bool:
        if owner["host"] != socket.gethostname():
            return self._silence() < SILENT
        try:
            os.kill(owner["process"], 0)
        except PermissionError:  # another user's
            return True
        except OSError:
            return False
        # A number of a process is given again.
        return owner.get("started") == _started(owner["process"])

    def _silence(self) -> float:
        """Seconds since the last sign of life, both by the clock of the file system."""
        try:
            with tempfile.NamedTemporaryFile(dir=self.path.parent) as now:
                return os.stat(now.name).st_mtime - self.path.stat().st_mtime
        except OSError:
            return 0.0


def _started(process: int) -> str | None:
    """When a process of this machine began, in ticks of its clock; None where nothing tells."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]
