"""What a checkpoint holds of a run in progress, saved and loaded by the name of each parameter.

torch.distributed.checkpoint: each process writes its own part, and any number of processes can read it. The same code
serves one process, DDP, FSDP1 and FSDP2.
"""

import contextlib
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel

from common.errors import BadInput, first_line
from medusa_model import under

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # by parameter name: independent of groups and ranks


def _state(model, optimizer, weights: bool) -> dict:
    state = {}
    if weights:
        state["model"] = get_model_state_dict(model)
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=FLAT)
    return state


def save_state(directory: Path, model, optimizer, weights: bool):
    """Called on every process: the optimiser's state, and the model's weights if `weights`."""
    dcp.save(_state(model, optimizer, weights), checkpoint_id=directory)


def load_state(directory: Path, model, optimizer, weights: bool):
    """The reverse, in place. Raises BadInput if a part is missing, cut off or of another shape."""
    state = _state(model, optimizer, weights)
    with reading(directory):
        dcp.load(state, checkpoint_id=directory)
    if weights:
        set_model_state_dict(model, state["model"])
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=FLAT)


@contextlib.contextmanager
def reading(path: Path):
    """Raises BadInput if what is read inside is missing, cut off or something else."""
    try:
        yield
    except (OSError, EOFError, RuntimeError, UnpicklingError, CheckpointException) as error:
        raise BadInput(
            f"cannot read {path}: {reason(error)}. It is damaged: move this checkpoint away, and "
            "--resume_from_checkpoint True goes on from the one before"
        ) from error


def reason(error: BaseException) -> str:
    """One line of what went wrong, also when torch.distributed.checkpoint has wrapped it, per rank."""
    if isinstance(error, CheckpointException):
        failure = next(iter(error.failures.values()), None)
        error = failure[0] if failure else error
    return first_line(error)


def whole_weights(model, medusa, device: torch.device) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU of rank 0 (empty elsewhere), gathered one at a time; called on every process.

    With a frozen backbone only the heads', without touching the backbone.
    """
    # FSDP1 crashes when it moves what is on the CPU to the CPU (torch 2.13); there every process gets a copy.
    to_rank_0 = device.type != "cpu" or not isinstance(model, FullyShardedDataParallel)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=to_rank_0)
    if not medusa.backbone_frozen:
        return get_model_state_dict(model, options=whole)
    return {
        f"medusa_heads.{k}.{name}": tensor
        for k, head in enumerate(medusa.medusa_heads)
        for name, tensor in get_model_state_dict(head, options=whole).items()
    }


def set_head_weights(medusa, state_dict: dict[str, torch.Tensor], several: bool):
    """Puts whole weights (names of the heads file; empty but on rank 0) into wrapped heads, one head at a time."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several)
    for k, head in enumerate(medusa.medusa_heads):
        set_model_state_dict(head, under(f"{k}.", state_dict), options=options)
