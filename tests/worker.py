"""A process that runs train.py, store_states.py or benchmark/memory.py for tests, forked from one that has imported it
all."""

import gc
import os
import pkgutil
import resource
import sys
import weakref

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  (here, once, and not in every process)
from fsdp_on_cpu import allow_fsdp_on_cpu
from torch.distributed.tensor import DTensor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import store_states
import train
from common import errors
from model import heads, loss
from training import build, store_plan
from training import fsdp as sharding
from training.trainer import MedusaTrainer

get_checkpoint_conversion_mapping("llama")  # transformers makes its table of all models when it is first asked
os.fsync = lambda descriptor: None  # processes are killed here, but not the machine
gc.freeze()  # or each process would go through all that was imported when the Trainer collects garbage


def begin(log, environment):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.pop("TRITON_INTERPRET", None)  # plain torch in chunks: Triton's interpreter takes far longer
    os.environ |= environment


def run(flags, log, environment, fsdp=0, at=None, gradients=None, shard_bytes=None):
    """train.py with torchrun's variables in `environment`; FSDP 1 or 2 as on a GPU, or 0: DDP.

    at: {"call": "module.name", "nth": n, and one of "signal": number, "file_size": bytes}: what befalls the process
        when it makes its n-th call of a function. gradients: a file name; ".<step>" is added.
    shard_bytes: runs store_states.py instead, with files of that size.
    """
    begin(log, environment)
    if fsdp:
        allow_fsdp_on_cpu()
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": str(fsdp), "FSDP_USE_ORIG_PARAMS": "true"}
        os.environ.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    if at:
        strike(**at)
    if gradients:
        save_gradients(gradients)
    script = train
    if shard_bytes:
        script, store_plan.SHARD_BYTES = store_states, shard_bytes
    load = build.load_backbone
    build.load_backbone = lambda *args, **kwargs: print("reads the backbone", flush=True) or load(*args, **kwargs)
    sys.argv = [f"{script.__name__}.py", *flags]
    errors.run(script.main, **script.ADVICE)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def strike(call, nth, **what):
    path, name = call.rsplit(".", 1)
    owner, calls = pkgutil.resolve_name(path), []  # a module or a class
    original = getattr(owner, name)

    def patched(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            if "signal" in what:
                os.kill(os.getpid(), what["signal"])
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (what["file_size"],) * 2)
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def save_gradients(path):
    """Those the optimiser gets, whole, but before they are clipped."""
    original = MedusaTrainer._clip_grad_norm

    def patched(self, model):
        whole = {}
        for name, parameter in self.medusa.named_parameters():
            if parameter.grad is not None:
                grad = parameter.grad
                whole[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
        if self.is_world_process_zero():
            torch.save(whole, f"{path}.{self.state.global_step + 1}")
        return original(self, model)

    MedusaTrainer._clip_grad_norm = patched


def measure(flags, log, environment):
    """benchmark/memory.py --smoke. It prints of each model what share of the weights is held, how many heads are units
    and how many models of before are still there; memory runs out for Liger's chunks of more than 64 rows."""
    begin(log, environment)
    import memory

    link, cross_entropy, earlier = sharding.link_units, heads.linear_cross_entropy, []

    def look(model):
        parameters = list(model.parameters())
        held = sum(sharding.local(p).numel() for p in parameters) * 8 / sum(p.numel() for p in parameters)
        units = sum(isinstance(head, sharding.FSDPModule) for head in model.medusa_heads)
        print("model", round(held, 2), units, sum(model() is not None for model in earlier), flush=True)
        earlier.append(weakref.ref(model))
        return link(model)

    def run_out(hidden, weight, targets, *args):
        if loss.CHUNK_ROWS == 1 and len(targets) > 4 * 16:
            raise torch.OutOfMemoryError("from the test")
        return cross_entropy(hidden, weight, targets, *args)

    sharding.link_units, heads.linear_cross_entropy = look, run_out
    sys.argv = ["memory.py", "--smoke", *map(str, flags)]
    memory.main()
