"""What a run was made with."""

import torch

import acmix
from acmix.analysis import environment


def test_versions():
    versions = environment.versions()
    assert versions["acmix"] == acmix.__version__
    assert versions["torch"] == torch.__version__.split("+")[0]


def test_devices_start_with_the_cpu():
    assert environment.devices()[0].startswith("cpu")


def test_commit_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert environment.commit() is None
