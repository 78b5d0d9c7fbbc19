"""benchmark/baselines.py: what is over 10 % slower fails by name, whichever way its figure goes."""

import json
import sys

import baselines
import pytest
import step_time
import throughput
from csvs import run

KIND = "a GPU"
WAS = {
    "stage 1, all tokens: tokens/s": 1000.0,
    "stage 1, 32,000 tokens: tokens/s": 2000.0,
    "plain pass, LLaMA-3-8B: ms": 5.0,
    "32 guesses, medusa: ms": 6.0,
    "plain pass, SmolLM2: ms": 1.0,
    "32 grown guesses, hydra and prefix: ms": 1.5,
}


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """Runs it where the benchmarks would measure `now` -> what the file says afterwards."""
    path = tmp_path / "baselines.json"

    def compare(*flags, now, kind=KIND):
        rates = iter([now[name] for name in WAS if "tokens/s" in name])
        passes = [now[name] for name in WAS if "ms" in name]
        pairs = iter([passes[:2], passes[2:]])

        def measure(command):
            if command[0] == "throughput.py":
                return [{"tokens_per_s": str(next(rates))}]
            return [{"step_ms": str(ms)} for ms in next(pairs)]

        monkeypatch.setattr(baselines, "measure", measure)
        monkeypatch.setattr(baselines, "machine", lambda: kind)
        monkeypatch.setattr(baselines.torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(baselines.setting, "origin", lambda: {"commit": "c", "versions": "v", "gpu": "g"})
        monkeypatch.setattr(sys, "argv", ["baselines.py", "--file", str(path), *flags])
        baselines.main()
        return json.loads(path.read_text())

    return compare


def test_every_figure_that_is_slower_is_named(compare):
    assert compare("--update", now=WAS) == {KIND: {"commit": "c", "versions": "v", "figures": WAS}}
    assert compare(now=WAS)
    little = {name: value / 1.09 if "tokens/s" in name else value * 1.09 for name, value in WAS.items()}
    assert compare(now=little)[KIND]["figures"] == WAS  # only --update changes the file
    much = {name: value / 1.2 if "tokens/s" in name else value * 1.2 for name, value in WAS.items()}
    with pytest.raises(SystemExit) as ended:
        compare(now=much)
    said = str(ended.value).splitlines()
    assert [line.rsplit(": ", 1)[0] for line in said] == list(WAS) and all("20 % slower" in line for line in said)
    faster = {name: value * 2 if "tokens/s" in name else value / 2 for name, value in WAS.items()}
    assert compare(now=faster)


def test_another_gpu_and_a_new_figure_have_no_baseline(compare, capsys):
    compare("--update", now=WAS)
    with pytest.raises(SystemExit):
        compare(now=WAS, kind="another GPU")
    assert "has no figures of another GPU, but of a GPU: run --update" in capsys.readouterr().err
    assert set(compare("--update", now=WAS, kind="another GPU")) == {KIND, "another GPU"}
    assert baselines.differences({"new": 1.0}, WAS, {"new": True}) == [
        "new: 1, and no figure to compare with: run --update"
    ]


@pytest.mark.processes
def test_the_benchmarks_have_these_flags_and_columns(monkeypatch, tmp_path, plain_torch):
    """The last one as its own process, as a user runs it; the others here."""
    measure, benchmarks = baselines.measure, {"step_time.py": step_time, "throughput.py": throughput}
    last = baselines.RUNS[-1][1].split()

    def here(command):
        if command == last:
            return measure(command)
        return run(benchmarks[command[0]], monkeypatch, *command[1:], "--out", tmp_path / f"{len(command)}.csv")

    monkeypatch.setattr(step_time, "bandwidth", lambda device: 2e6)
    monkeypatch.setattr(baselines, "measure", here)
    path = tmp_path / "baselines.json"
    run_it = ["baselines.py", "--file", str(path), "--smoke", "--update"]
    monkeypatch.setattr(sys, "argv", run_it)
    baselines.main()
    ((kind, kept),) = json.loads(path.read_text()).items()
    assert kind.endswith("small shapes") and kept["figures"].keys() == WAS.keys()
    assert all(value > 0 for value in kept["figures"].values())
