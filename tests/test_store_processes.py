"""store_states.py in processes of its own: several, killed ones, and some that cannot go on."""

import signal

import pytest
from stored import contents

pytestmark = pytest.mark.processes


@pytest.fixture
def start(lab, tmp_path):
    """Runs store_states.py in processes of its own, on the lab's conversations: -> the directory, codes and logs."""

    def run(output="states", kind="one process", **how):
        flags = {"--output": tmp_path / output, "--cache_dir": tmp_path / "cache", **how.pop("flags", {})}
        done = lab.launch(kind, flags, argv=lab.store_argv, shard_bytes=20_000, **how)
        return tmp_path / output, done.codes, done.logs

    return run


def test_two_processes_take_files_in_turn(start):
    one, *_ = start("one")
    two, codes, logs = start("two", "DDP")
    assert codes == [0, 0] and contents(two) == contents(one)
    written = [[line.split(":")[0] for line in log.splitlines() if " files" in line[-9:]] for log in logs]
    assert "train/00000.safetensors" in written[0] and "train/00001.safetensors" not in written[0]
    assert "is whole: train with --states_path" in logs[0]


def test_killed_before_there_is_a_plan(start):
    states, codes, _ = start(at={"call": "store_states.write_json", "nth": 1, "signal": signal.SIGKILL})
    assert codes == [-signal.SIGKILL] and contents(states) == {}
    states, codes, _ = start(at={"call": "common.files.fsync", "nth": 1, "signal": signal.SIGKILL})
    assert codes == [-signal.SIGKILL] and contents(states).keys() == {"plan.json.tmp"}
    _, codes, _ = start(at={"call": "pathlib.Path.unlink", "nth": 1, "signal": signal.SIGKILL})
    assert codes == [-signal.SIGKILL] and contents(states).keys() == {"plan.json"}
    _, codes, logs = start()
    assert codes == [0] and "is whole: train with --states_path" in logs[0]


@pytest.mark.parametrize("call", ["store_states.compute", "store_states.save_file", "common.files.os.replace"])
def test_killed_at_any_moment_it_goes_on_to_the_same_files(call, start):
    whole, *_ = start("whole")
    states, codes, _ = start(at={"call": call, "nth": 4, "signal": signal.SIGKILL})
    assert codes == [-signal.SIGKILL] and not (states / "index.json").exists()
    assert 1 <= len(list(states.rglob("*.safetensors"))) <= 4
    written = {path: path.stat().st_mtime_ns for path in states.rglob("*.safetensors")}
    _, codes, _ = start()
    assert codes == [0] and contents(states) == contents(whole)
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())


def test_ctrl_c(start):
    _, codes, logs = start(at={"call": "store_states.compute", "nth": 3, "signal": signal.SIGINT})
    assert codes == [130] and "interrupted: the same command goes on after the last whole file" in logs[0]


@pytest.mark.parametrize(
    ("flags", "sentence", "left"),
    [
        ({"--data_path": "other.jsonl"}, "rank 1 has another data set than rank 0: start all with the same", False),
        ({"--dtype": "bfloat16"}, "rank 1 has another dtype than rank 0", False),
        ({"--data_path": "nowhere.jsonl"}, "nowhere.jsonl", False),
        ({"--model_name_or_path": "other"}, "other", False),
        ({"--output": "elsewhere"}, "rank 1 does not see", True),
    ],
)
def test_if_one_process_cannot_go_on_all_end(flags, sentence, left, start, lab):
    ((name, value),) = flags.items()
    states, codes, logs = start(kind="DDP", rank_1={name: value if name == "--dtype" else lab.root / value})
    assert_all_say(sentence, codes, logs)
    assert states.exists() == left and not list(lab.root.glob("elsewhere*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_process_ends_all(rank, start):
    states, codes, logs = start(
        kind="DDP", at={"call": "store_states.save_file", "nth": 2, "file_size": 5000}, on=rank
    )
    assert_all_say(f"could not write {states}/train/0000{2 + rank}.safetensors", codes, logs)
    assert 2 <= len(list(states.rglob("*.safetensors"))) <= 4 and not list(states.rglob("*.tmp"))


def assert_all_say(sentence: str, codes: list[int], logs: list[str]):
    assert codes == [1] * len(codes)
    for log in logs:
        lines = [line for line in log.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and sentence in lines[0] and "Traceback" not in log, log
