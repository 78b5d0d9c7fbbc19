"""Fixtures of several benchmarks."""

import json

import pytest
import step_time
from csvs import run


@pytest.fixture
def plain_torch(monkeypatch):
    """Without Triton's interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def dump(tmp_path):
    """Writes JSON -> its path."""

    def to_json(value, name="some.json"):
        (tmp_path / name).write_text(json.dumps(value))
        return tmp_path / name

    return to_json


@pytest.fixture
def time_steps(tmp_path, monkeypatch):
    """step_time.py without the second that a copy of 128 MiB takes."""
    monkeypatch.setattr(step_time, "bandwidth", lambda device: 2e6)
    return lambda *words: run(step_time, monkeypatch, "--model", "tiny", *words, "--out", tmp_path / "steps.csv")
