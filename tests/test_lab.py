"""tests/lab.py: how long it waits for processes, and what it says of those that it kills."""

import os
import signal
import time

import pytest
from lab import FORK, STAGE_1, wait

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("lab")]  # which has started the server that forks


def start(*calls):
    """A process for each (function, argument)."""
    processes = [FORK.Process(target=function, args=(argument,)) for function, argument in calls]
    for process in processes:
        process.start()
    return processes


def test_who_takes_too_long_is_said():
    processes = start((time.sleep, 0), (time.sleep, 600))
    processes[0].join()
    assert wait(processes, 0.5) == "rank 1 was still running after 0.5 s and was killed: the machine may be busy"
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    both = "rank 0 and rank 1 were still running after 0.1 s and were killed: the machine may be busy"
    assert wait(start((time.sleep, 600), (time.sleep, 600)), 0.1) == both


def test_a_run_that_takes_too_long_fails_in_this_sentence(lab):
    with pytest.raises(
        pytest.fail.Exception, match=r"^rank 0 was still running after 0\.1 s and was killed: the mach"
    ):
        lab.launch("one process", STAGE_1, timeout=0.1)


def test_where_one_fails_the_others_may_still_report():
    processes = start((os._exit, 1), (time.sleep, 1))
    assert not wait(processes)
    assert [process.exitcode for process in processes] == [1, 0]


def test_where_one_is_killed_the_others_are_too():
    processes = start((time.sleep, 600), (time.sleep, 600))
    processes[0].kill()
    begin = time.monotonic()
    assert not wait(processes)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * 2 and time.monotonic() - begin < 9
