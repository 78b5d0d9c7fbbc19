"""A checkpoint to go on from: everything a run needs to continue exactly, whole or not there at all.

    checkpoint-N/
        medusa_lm_head.safetensors, config.json   stage 1: the heads, in the format of the finished ones
        state/               Adam's moments, and in stage 2 all weights. Each process writes its own part
                             (torch.distributed.checkpoint), and any number of processes can read them
        scheduler.pt, rng_state*.pth, trainer_state.json
        run.json             what kind of run it is: stage, heads, conversations in an optimiser step

It is written as incomplete-checkpoint-N, synced to the disk and renamed. Several nodes need one shared output_dir.
"""

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

import medusa_fsdp
from errors import BadInput, first_line
from medusa_checkpoint import find_heads, fsync, load_heads
from medusa_model import MedusaModel, under

logger = logging.getLogger(__name__)

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


def start_over(directory: Path):
    """An empty directory to write into."""
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)


def publish(staging: Path, final: Path):
    """Renames a finished directory, after all in it is on the disk."""
    for path in (*staging.rglob("*"), staging):
        fsync(path)
    if final.exists():  # not complete, or the run would have gone on from it
        shutil.rmtree(final)
    os.rename(staging, final)
    fsync(final.parent)


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
        fsync(target.parent)
    shutil.rmtree(staging)


def read_run(checkpoint: Path) -> dict | None:
    """run.json, or None if the directory is not a complete checkpoint."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        return json.loads((checkpoint / RUN_FILE).read_text())
    except (OSError, ValueError):
        return None


class CheckpointingTrainer(Trainer):
    """A Trainer of a `MedusaModel` whose checkpoints are those above. `self.run` is what run.json says."""

    run: dict

    @property
    def medusa(self) -> MedusaModel:
        return self.accelerator.unwrap_model(self.model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The finished files: heads (stage 1) or backbone and heads (stage 2), and the tokenizer."""
        directory = Path(output_dir or self.args.output_dir)
        staging = directory / f"{INCOMPLETE}model"
        with self._writing(staging):
            self._write_weights(staging, directory)
            self._on_rank_0(lambda: publish_files(staging, directory))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _write_weights(self, directory: Path, final_directory: Path | None = None):
        medusa = self.medusa
        state_dict = whole_weights(self.model, medusa, self.args.device)

        def write():
            medusa.save_pretrained(directory, state_dict=state_dict, final_directory=final_directory)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(directory)

        self._on_rank_0(write)

    def _save_checkpoint(self, model, trial) -> None:
        """`checkpoint-N`, whole or not at all; the Trainer's own could be cut off in the middle."""
        final = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        best = final.with_name(f"checkpoint-{self.state.best_global_step}")
        if self.state.best_global_step and (best == final or best.exists()):
            self.state.best_model_checkpoint = str(best)
        staging = final.with_name(INCOMPLETE + final.name)
        with self._writing(staging):
            if self.medusa.backbone_frozen:
                self._write_weights(staging)
            optimizer = None if self.args.save_only_model else self.optimizer.optimizer
            if optimizer is not None or not self.medusa.backbone_frozen:
                directory = staging / STATE_DIR
                save_state(directory, self.model, optimizer, not self.medusa.backbone_frozen)
            self._save_rng_state(str(staging))
            self.accelerator.wait_for_everyone()
            self._on_rank_0(lambda: self._finish_checkpoint(staging, final))

    def _finish_checkpoint(self, staging: Path, final: Path):
        torch.save(self.lr_scheduler.state_dict(), staging / "scheduler.pt")
        run = self.run | {"save_only_model": self.args.save_only_model}
        (staging / RUN_FILE).write_text(json.dumps(run, indent=2) + "\n")
        # As in the Trainer's own method, which cannot be called for this part alone.
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                name = type(callback).__name__
                kept = self.state.stateful_callbacks.get(name)
                if isinstance(kept, list):
                    kept.append(callback.state())
                else:
                    self.state.stateful_callbacks[name] = callback.state()
        self.state.save_to_json(str(staging / "trainer_state.json"))
        publish(staging, final)
        rotate_checkpoints(
            output_dir=str(final.parent),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    @contextlib.contextmanager
    def _writing(self, staging: Path):
        """A fresh directory for all ranks to write into, gone again if the writing fails; refuses NaN weights."""
        medusa, earlier = self.medusa, f"Earlier checkpoints in {self.args.output_dir} are intact"
        bad = (
            name
            for name, parameter in medusa.named_parameters()
            if parameter.requires_grad and not medusa_fsdp.local(parameter).isfinite().all()
        )
        bad = [name for name in gather_object([next(bad, None)]) if name is not None]
        if bad:
            raise FloatingPointError(
                f"step {self.state.global_step}: {bad[0]} holds NaN or infinity and was not saved. {earlier}: lower "
                "the learning rate and resume from one"
            )
        try:
            self._on_rank_0(lambda: start_over(staging))
            yield
        except (torch.OutOfMemoryError, torch.distributed.DistError):  # RuntimeErrors too, but not of a disk
            raise
        except WRITE_ERRORS as error:
            if self.is_world_process_zero():
                shutil.rmtree(staging, ignore_errors=True)
            raise BadInput(
                f"could not write {staging.name} in {staging.parent}: {reason(error)}. {earlier}: if the "
                "disk is full, free some space, and go on with --resume_from_checkpoint True"
            ) from error

    def _on_rank_0(self, action):
        """Runs `action` on rank 0 of the whole job. If it fails, every rank raises that instead of waiting."""
        error = [None]
        if self.is_world_process_zero():
            try:
                action()
            except WRITE_ERRORS as failure:
                error = [reason(failure)]
        broadcast_object_list(error)
        if error[0] is not None:
            raise OSError(error[0])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Nothing: heads are loaded before the model is sharded (train.py), stage 2's weights with Adam's moments."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        directory, stage_2 = Path(checkpoint, STATE_DIR), not self.medusa.backbone_frozen
        load_state(directory, self.model, self.optimizer.optimizer, stage_2)
        with reading(path := Path(checkpoint, "scheduler.pt")):
            self.lr_scheduler.load_state_dict(torch.load(path, weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(Path(checkpoint or "", "rng_state*.pth")):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        logger.info("loading the best weights, those of %s", best)
        if self.medusa.backbone_frozen:
            state_dict = load_heads(find_heads(best)[0])[1] if self.is_world_process_zero() else {}
            set_head_weights(self.medusa, state_dict, self.args.world_size > 1)
        else:
            load_state(Path(best, STATE_DIR), self.model, None, True)
