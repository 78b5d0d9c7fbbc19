"""One of several processes that run train.py for a test: `python tests/worker.py spec.json`, torchrun's variables set.

spec: {"runs": [[flag, ...], ...], "fsdp": 0 | 1 | 2, "kill": null | {"rank": 0, "call": "module.name", "at": 2}}.
Runs follow one another in the same processes, since importing takes longer than they do. `kill` ends a rank with
SIGKILL when it makes its n-th call of a function.
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).parent.parent))
import errors
import train


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


def kill_at(call: str, at: int, **_):
    module, name = call.rsplit(".", 1)
    module = importlib.import_module(module)
    original, calls = getattr(module, name), []

    def patched(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(module, name, patched)


def main():
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    rank, kill = int(os.environ.get("RANK", 0)), spec.get("kill")
    if spec.get("fsdp"):
        allow_fsdp_on_cpu()
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": str(spec["fsdp"])}
        os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_USE_ORIG_PARAMS": "true"}
        os.environ |= spec.get("environment", {})
    if kill and kill["rank"] == rank:
        kill_at(**kill)
    for run in spec["runs"]:
        sys.argv = ["train.py", *run]
        errors.run(train.main)
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
