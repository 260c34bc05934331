"""A bar where there is a terminal to draw it on, and nothing elsewhere."""

import pytest

from acmix.surgery import _progress


@pytest.mark.parametrize("terminal", [True, False])
def test_bar(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_progress, "SECONDS_UNTIL_SHOWN", -1.0)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(_progress.track([1, 2, 3], "fitting")) == [1, 2, 3]
    printed = capsys.readouterr()
    assert ("fitting" in printed.err) == terminal
    assert printed.out == ""


def test_nothing_before_it_takes_long(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(_progress.track([1], "fitting")) == [1]
    assert capsys.readouterr() == ("", "")
