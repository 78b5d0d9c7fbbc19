"""A process that hangs: the others wait for its gradients, without a word. After 9/10 of --ddp_timeout seconds without
progress all that still run end with one sentence, which names those that do not answer or are behind. (At the whole
time torch ends a process of its own accord, in its own words.)
"""

import contextlib
import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist
from transformers import TrainerCallback

KEY, ANSWER = "medusa_hangs/{}", 3.0  # seconds in which the others can say in which step they are


def sentence(seconds: float, steps: dict[int, int], processes: int) -> str:
    """steps: the step in which each process waits that has answered."""
    silent = [rank for rank in range(processes) if rank not in steps]
    behind = [rank for rank, step in steps.items() if step < max(steps.values())]
    if silent:
        what = f"of {processes} processes, number {', '.join(map(str, silent))} (from 0) does not answer"
    elif behind:
        what = f"number {', '.join(map(str, behind))} (from 0) is still in step {min(steps.values())}"
    else:
        what = "all of them wait for each other, or for their data"
    return (
        f"no progress for {seconds:.0f} s in step {max(steps.values())}: {what}. Look at that machine, its GPU and "
        "its disk; then go on from the last checkpoint with --resume_from_checkpoint True. If it only was slow, raise "
        "--ddp_timeout"
    )


class Watchdog(TrainerCallback):
    """One thread in each of several processes."""

    def __init__(self, timeout: float):
        self.seconds, self.last, self.step = 0.9 * timeout, time.monotonic(), 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.beat(args, state, control)
        if dist.is_initialized() and dist.get_world_size() > 1:
            threading.Thread(target=self.watch, daemon=True).start()

    def beat(self, args, state, control, **kwargs):
        self.last, self.step = time.monotonic(), state.global_step + 1

    on_step_begin = on_substep_end = on_step_end = on_prediction_step = on_evaluate = on_save = on_log = beat
    on_train_end = beat  # it goes on until the process ends

    def watch(self):
        while (left := self.last + self.seconds - time.monotonic()) > 0:
            time.sleep(left)
        steps = {dist.get_rank(): self.step}
        asking = threading.Thread(target=self.ask, args=(steps,), daemon=True)
        asking.start()
        asking.join(2 * ANSWER)  # torch asks without end where a process holds the meeting place and does not answer
        steps = dict(steps)
        if min(steps) == dist.get_rank():
            print(f"error: {sentence(self.seconds, steps, dist.get_world_size())}", file=sys.stderr, flush=True)
        time.sleep(1)  # a launcher that sees one end ends the others; the sentence is out by then
        os._exit(1)

    def ask(self, steps: dict[int, int]):
        """Adds the step of each process that has noticed too. They meet where they met at the start, over a connection
        of its own: the other may wait for something."""
        with contextlib.suppress(RuntimeError, KeyError, ValueError):  # nobody is there
            place, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(place, port, is_master=False, timeout=timedelta(seconds=ANSWER))
            store.set(KEY.format(dist.get_rank()), str(self.step))
            time.sleep(ANSWER)
            there = [rank for rank in range(dist.get_world_size()) if store.check([KEY.format(rank)])]
            steps |= {rank: int(store.get(KEY.format(rank))) for rank in there}
