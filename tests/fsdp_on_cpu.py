"""FSDP without a GPU, for tests and for `benchmark/memory.py --smoke`. Imports nothing of the project."""

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def allow_fsdp_on_cpu():
    """accelerate falls back to DDP on a CPU without a word. This is what it does on a GPU."""
    original = AcceleratorState.__init__

    def patched(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            for state in (self.__dict__, PartialState._shared_state):
                state["distributed_type"] = DistributedType.FSDP
                state["device"] = torch.device("cpu")

    AcceleratorState.__init__ = patched
