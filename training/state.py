"""Saves and loads optimiser state and weights, by the name of each parameter.

With torch.distributed.checkpoint each process writes its own part, and any number of processes can read them. The same
code serves one process, DDP, FSDP1 and FSDP2.
"""

import contextlib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel

from common.errors import BadInput, first_line
from model.adapter import has_lora, trained_only
from model.heads import MedusaHeads
from model.heads_file import TOKEN_MAP, under
from model.prefix import PREFIX
from training.reader import Planner, Reader

# What a missing, cut-off or foreign file raises; the last four are of a pickle that is no list of shards.
BROKEN_LIST = (AttributeError, KeyError, TypeError, ValueError)
READ_ERRORS = (OSError, EOFError, RuntimeError, UnpicklingError, CheckpointException, *BROKEN_LIST)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # by parameter name: independent of groups and ranks

# bitsandbytes hands its state out a level deeper than it keeps it (0.50), and torch looks for it where it is kept.
WRAPPED = "__bnb_optimizer_quant_state__."


def _state(model, optimizer, weights: bool) -> dict:
    state: dict[str, Any] = {}
    if weights:
        state["model"] = get_model_state_dict(model)
        if adapted(model):  # all else is the model that the run began with
            state["model"] = trained_only(state["model"])
        (heads,) = (module for module in model.modules() if isinstance(module, MedusaHeads))
        if heads.token_map is not None:  # as it is the buffer itself, loading writes into that
            state["heads"] = {TOKEN_MAP: heads.token_map}
    if optimizer is not None:
        found = get_optimizer_state_dict(model, optimizer, options=FLAT)
        state["optimizer"] = {name.replace(WRAPPED, ""): value for name, value in found.items()}
    return state


def save_state(directory: Path, model, optimizer, weights: bool):
    """Saves the optimiser's state (unless it is None), and the model's weights if `weights`. Called on every
    process."""
    dcp.save(_state(model, optimizer, weights), checkpoint_id=directory)


def load_state(directory: Path, model, optimizer, weights: bool):
    """Loads them in place. Raises BadInput if a part is missing, cut off or of another shape."""
    state = _state(model, optimizer, weights)
    with reading(directory):
        dcp.load(state, storage_reader=Reader(directory), planner=Planner())
    if weights:
        set_model_state_dict(model, state["model"], options=StateDictOptions(strict=not adapted(model)))
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=FLAT)


def adapted(model) -> bool:
    """Whether the backbone, wrapped or not, has adapters and keeps its own weights."""
    return any(map(has_lora, model.modules()))


def saved_token_map(directory: Path, size: int) -> torch.Tensor:
    """The tokens `[size]` that the heads guess whose weights are saved there. Called on every process."""
    token_map = torch.empty(size, dtype=torch.int64)
    with reading(directory):
        dcp.load({"heads": {TOKEN_MAP: token_map}}, storage_reader=Reader(directory), planner=Planner())
    return token_map


def saved_dtype(directory: Path) -> torch.dtype:
    """Of the weights that are saved there."""
    with reading(directory):
        saved = Reader(directory).read_metadata().state_dict_metadata
        weights = (value for name, value in saved.items() if name.startswith("model."))
        return next(value.properties.dtype for value in weights if isinstance(value, TensorStorageMetadata))


@contextlib.contextmanager
def reading(path: Path):
    """Turns the errors of reading a missing, cut-off or wrong file into BadInput."""
    try:
        yield
    except READ_ERRORS as error:
        raise BadInput(
            f"cannot read {path}: {reason(error)}. It is damaged: move this checkpoint away, and "
            "--resume_from_checkpoint True goes on from the one before"
        ) from error


def reason(error: BaseException) -> str:
    """What went wrong, in one line; torch.distributed.checkpoint wraps the errors of all ranks in one of its own."""
    if isinstance(error, CheckpointException):
        failure = next(iter(error.failures.values()), None)
        error = failure[0] if failure else error
    return first_line(error)


def trained_parts(medusa) -> dict[str, torch.nn.Module]:
    """What trains beside a frozen backbone, one part after the other; the key begins the names of its tensors."""
    parts = {f"medusa_heads.{k}.": head for k, head in enumerate(medusa.medusa_heads)}
    return parts | ({} if medusa.prefix is None else {PREFIX: medusa.prefix})


def whole_weights(model, medusa, device: torch.device) -> dict[str, Any]:
    """Whole tensors by name on the CPU of rank 0 (none elsewhere), gathered one at a time; called on every process.

    With a frozen backbone these are the heads' only, with adapters theirs too: no more is gathered.
    """
    # On a CPU, FSDP1's own move to the CPU crashes (torch 2.13). Without it every process gets a copy.
    to_rank_0 = device.type != "cpu" or not isinstance(model, FullyShardedDataParallel)
    adapters = has_lora(medusa.backbone)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=to_rank_0, ignore_frozen_params=adapters)
    if not medusa.backbone_frozen:
        found = get_model_state_dict(model, options=whole)
        return trained_only(found) if adapters else found  # tied weights have a second name
    return {
        begin + name: tensor
        for begin, part in trained_parts(medusa).items()
        for name, tensor in get_model_state_dict(part, options=whole).items()
    }


def set_head_weights(medusa, state_dict: dict[str, torch.Tensor], several: bool):
    """Loads whole weights into wrapped heads, one head at a time.

    state_dict: named as in the heads file; empty on ranks other than 0. several: there is more than one process.
    """
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several)
    for begin, part in trained_parts(medusa).items():
        mine = under(begin.removeprefix("medusa_heads."), state_dict)
        set_model_state_dict(part, mine, options=options)
