"""A checkpoint to go on from: everything a run needs to continue exactly, whole or not there at all.

    checkpoint-N/
        medusa_lm_head.safetensors, config.json   stage 1: the heads, in the format of the finished ones
        state/               Adam's moments, and in stage 2 all weights. Each process writes its own part
                             (torch.distributed.checkpoint), and any number of processes can read them
        scheduler.pt, rng_state*.pth, trainer_state.json
        run.json             what kind of run it is: stage, heads, conversations in an optimiser step

It is written as incomplete-checkpoint-N, synced to the disk and renamed. Several nodes need one shared output_dir.
"""

import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from errors import BadInput, first_line
from medusa_checkpoint import fsync

STATE_DIR, RUN_FILE = "state", "run.json"
INCOMPLETE = "incomplete-"
# What a full disk, a lost mount or missing rights look like, by who notices. (RuntimeError: torch.save.)
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)
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
    try:
        dcp.load(state, checkpoint_id=directory)
    except (OSError, CheckpointException) as error:
        raise BadInput(
            f"cannot read {directory}: {reason(error)}. It is damaged: resume from an earlier checkpoint with "
            "--resume_from_checkpoint DIR"
        ) from error
    if weights:
        set_model_state_dict(model, state["model"])
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=FLAT)


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
    whole = StateDictOptions(full_state_dict=True, cpu_offload=device.type != "cpu")
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
        mine = {name.split(".", 1)[1]: t for name, t in state_dict.items() if name.split(".", 1)[0] == str(k)}
        set_model_state_dict(head, mine, options=options)


def start_over(directory: Path):
    """An empty directory to write into; what killed runs left of such ones goes away."""
    for left in directory.parent.glob(f"{INCOMPLETE}*"):
        shutil.rmtree(left)
    directory.mkdir(parents=True)


def publish(staging: Path, final: Path):
    """Renames a finished directory, after all in it is on the disk."""
    for path in staging.rglob("*"):
        fsync(path)
    if final.exists():  # left by a run that was resumed from an earlier checkpoint
        os.rename(final, staging.with_name(f"{INCOMPLETE}old-{final.name}"))
    os.rename(staging, final)
    fsync(final.parent)
    shutil.rmtree(staging.with_name(f"{INCOMPLETE}old-{final.name}"), ignore_errors=True)


def publish_files(staging: Path, final: Path):
    """Moves the files of a finished directory into `final`, the config.json of each level last: a reader that finds
    it finds the rest."""
    paths = sorted((p for p in staging.rglob("*") if p.is_file()), key=lambda p: (p.name == "config.json", p))
    for path in paths:
        fsync(path)
    (final / "config.json").unlink(missing_ok=True)
    for path in paths:
        target = final / path.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    fsync(final)
    shutil.rmtree(staging)


def read_run(checkpoint: Path) -> dict | None:
    """run.json, or None if the directory is not a complete checkpoint."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        return json.loads((checkpoint / RUN_FILE).read_text())
    except (OSError, ValueError):
        return None
