"""common/terminal.py: who logs what, when progress bars are drawn, and tables."""

import logging
import sys

import datasets
import pytest
import transformers

from common import terminal


@pytest.fixture(autouse=True)
def _as_before():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    bars = transformers.utils.logging.is_progress_bar_enabled()
    yield
    root.handlers[:], root.level = handlers, level
    if bars:
        transformers.utils.logging.enable_progress_bar()


@pytest.mark.parametrize(("rank", "level"), [(None, logging.INFO), ("0", logging.INFO), ("1", logging.WARNING)])
def test_the_first_process_speaks_and_the_others_warn(rank, level, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    logging.getLogger().handlers.clear()  # pytest's, beside which basicConfig does nothing
    terminal.start()
    logging.getLogger("a module").info("a line")
    logging.getLogger("a module").warning("a warning")
    logging.getLogger("liger_kernel.backends.registry").warning("Backend impl could not be imported")
    assert logging.getLogger().level == level
    assert capsys.readouterr().err == ("a line\n" if level == logging.INFO else "") + "a warning\n"


@pytest.mark.parametrize("watched", [True, False])
def test_progress_bars_are_for_people(watched, monkeypatch):
    datasets.enable_progress_bars()
    transformers.utils.logging.enable_progress_bar()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: watched, raising=False)
    terminal.start()
    assert datasets.are_progress_bars_disabled() is not watched
    assert transformers.utils.logging.is_progress_bar_enabled() is watched


def test_a_table():
    rows = [{"tree": "chain", "length": 1.23456}, {"tree": "best", "length": 2.0}]
    lines = ["| tree | length |", "| --- | --- |", "| chain | 1.235 |", "| best | 2.000 |"]
    assert terminal.markdown(rows) == "\n".join(lines)
