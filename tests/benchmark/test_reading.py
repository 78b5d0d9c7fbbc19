"""benchmark/reading.py: both ways read and tokenise the same."""

import json
import os
import sys

import reading
from conftest import make_tokenizer


def test_both_ways_read_and_tokenise_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # the benchmark sets it, too
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    path, tokenizer = tmp_path / "chats.jsonl", str(tmp_path / "tokenizer")
    make_tokenizer("llama3").save_pretrained(tokenizer)
    reading.write_conversations(path, 0.3)
    assert 0.3e6 < path.stat().st_size < 0.35e6 and b"\\u" in path.read_bytes()
    ours, theirs = (reading.read(who, str(path), str(tmp_path / who)) for who in ("ours", "datasets"))
    assert ours["records"] == theirs["records"] == len(path.read_text().splitlines())
    ours, theirs = (reading.tokenise(who, str(path), str(tmp_path / who), tokenizer, 10) for who in ("ours", "alone"))
    assert ours["tokens"] == theirs["tokens"] > 10 * 500 and ours["records"] == 10
    assert ours["per_s"] > 0 < ours["seconds"] and reading.peak_mb() > 50


def test_a_row_for_each_measurement(tmp_path, monkeypatch, capsys):
    asked = []

    def measure(what, who, options, path):
        asked.append((what, who, os.path.getsize(path) > 0))
        return {"seconds": 2.0, "records": 3, "peak_mb": 7.4, "imports_mb": 5.0} | (
            {"tokens": 9} if what == "tokenise" else {}
        )

    monkeypatch.setattr(reading, "measure", measure)
    out = tmp_path / "reading.csv"
    argv = ["reading.py", "--tokenizer", "x", "--megabytes", "0.01", "--rounds", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    reading.main()
    pairs = [("read", "ours"), ("read", "datasets"), ("tokenise", "ours"), ("tokenise", "tokenizer")]
    assert asked == [(*pair, True) for pair in pairs] * 2
    lines = out.read_text().splitlines()
    assert len(lines) == 9 and ",2,tokenise,tokenizer," in lines[-1] and ",2.000,3," in lines[-1]
    assert json.dumps(capsys.readouterr().out).count("peak_mb 7") == 8
