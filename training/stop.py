"""SIGTERM, as schedulers send it before they kill: the run writes a checkpoint and ends.

All ranks end after the same step. The signal may reach one of them only, or each in another step. A rank that gets it
in step s proposes to stop after step s + 2, in the store through which the ranks met. No rank is more than one step
ahead of another, because each waits for the gradients of all. So all read the proposal after step s + 1 at the latest,
and nobody waits for an answer.
"""

import logging
import signal

import torch.distributed
from torch.distributed.distributed_c10d import _get_default_store
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

KEY = "medusa_stop_after"
STATUS = 128 + signal.SIGTERM  # as shells count


class StopCallback(TrainerCallback):
    """stopped: whether training ended because of the signal."""

    def __init__(self):
        self.asked, self.stopped, self.store = False, False, None
        self.last: int | None = None  # the step after which to stop

    def on_train_begin(self, args, state, control, **kwargs):
        self.store = _get_default_store() if torch.distributed.is_initialized() else None
        self.before = signal.signal(signal.SIGTERM, self.ask)

    def ask(self, number, frame):
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.store is None:
            self.last = state.global_step if self.asked else None
        else:
            if self.asked and self.last is None:  # the first proposal stands
                self.store.compare_set(KEY, "", str(state.global_step + 2))
            if self.last is None and self.store.check([KEY]):
                self.last = int(self.store.get(KEY))
        if self.last is not None and state.global_step >= self.last and state.global_step < state.max_steps:
            logger.info("SIGTERM: writing a checkpoint after step %d, and ending", state.global_step)
            self.stopped = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self.before)
