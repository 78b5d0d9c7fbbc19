"""Checkpoints: everything a run needs to continue exactly. A checkpoint is complete, or it is not there.

    checkpoint-N/
        medusa_lm_head.safetensors, config.json   stage 1: the heads, in the format of the finished ones
        state/               Adam's moments, and in stage 2 all weights. Each process writes its own part
                             (torch.distributed.checkpoint); any number of processes can read them
        scheduler.pt, rng_state*.pth, trainer_state.json
        run.json             the kind of run: stage, heads, conversations per optimiser step

It is written as incomplete-checkpoint-N, synced to disk and renamed. Several nodes need one shared output_dir.
"""

import contextlib
import json
import logging
import shutil
from pathlib import Path
from typing import cast

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from common.errors import BadInput
from common.files import publish, publish_files, start_over
from medusa_model import MedusaModel
from model.heads_file import HEADS_DIR, find_heads, load_heads
from model.readable import make_readable
from training import fsdp
from training.hooks import HookedTrainer
from training.state import load_state, reading, reason, save_state, set_head_weights, whole_weights

logger = logging.getLogger(__name__)

STATE_DIR, RUN_FILE = "state", "run.json"
INCOMPLETE = "incomplete-"
# What a full disk, a lost mount or missing rights raise, by the library that notices (RuntimeError: torch.save).
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)


def read_run(checkpoint: Path) -> dict | None:
    """run.json, or None if the directory is not a complete checkpoint."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        return json.loads((checkpoint / RUN_FILE).read_text())
    except (OSError, ValueError):
        return None


class CheckpointingTrainer(HookedTrainer):
    """Trains a `MedusaModel` and writes the checkpoints above. `self.run` is what run.json says of the run."""

    run: dict
    window: torch.Tensor  # summed up since the last log
    saved_window: dict | None = None  # the checkpoint's, until training begins

    @property
    def medusa(self) -> MedusaModel:
        return self.accelerator.unwrap_model(self.model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the result: heads (stage 1) or backbone and heads (stage 2), and the tokenizer."""
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
            for place in (directory, directory / HEADS_DIR):  # engines look for a tokenizer beside the heads
                if self.processing_class is not None and place.is_dir():
                    self.processing_class.save_pretrained(place)
                    make_readable(place)

        self._on_rank_0(write)

    def save_checkpoint(self) -> None:
        """Writes `checkpoint-N`, whole or not at all. The Trainer's own method can leave half of one."""
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
            self.save_rng_state(staging)
            window = self.save_window()
            self.accelerator.wait_for_everyone()
            self._on_rank_0(lambda: self._finish_checkpoint(staging, final, window))

    def _finish_checkpoint(self, staging: Path, final: Path, window: dict):
        torch.save(self.lr_scheduler.state_dict(), staging / "scheduler.pt")
        run = self.run | {"save_only_model": self.args.save_only_model, "window": window}
        (staging / RUN_FILE).write_text(json.dumps(run, indent=2) + "\n")
        # As in the Trainer's `_save_checkpoint`, which cannot be called for this part alone.
        by_name = cast(dict, self.state.stateful_callbacks)  # annotated as the list it is made from
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                name = type(callback).__name__
                kept = by_name.get(name)
                if isinstance(kept, list):
                    kept.append(callback.state())
                else:
                    by_name[name] = callback.state()
        self.state.save_to_json(str(staging / "trainer_state.json"))
        publish(staging, final)
        rotate_checkpoints(
            output_dir=str(final.parent),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    def save_window(self) -> dict:
        """What is summed up since the last log, over all ranks; called on every process."""
        loss, step = self._pending_loss()
        sums = self.accelerator.reduce(self.window).tolist()
        return {"loss": self.accelerator.reduce(loss, "mean").item(), "since_step": step, "heads": sums}

    def restore_window(self) -> None:
        found, self.saved_window = self.saved_window, None
        if found is not None:
            self._set_pending_loss(found["loss"], found["since_step"])
            if self.is_world_process_zero():
                self.window += torch.tensor(found["heads"], dtype=self.window.dtype, device=self.window.device)

    @contextlib.contextmanager
    def _writing(self, staging: Path):
        """An empty directory for all ranks to write into, removed if the writing fails. Refuses NaN weights."""
        medusa, earlier = self.medusa, f"Earlier checkpoints in {self.args.output_dir} are intact"
        bad_here = (
            name
            for name, parameter in medusa.named_parameters()
            if parameter.requires_grad and not fsdp.local(parameter).isfinite().all()
        )
        bad = [name for name in gather_object([next(bad_here, None)]) if name is not None]
        if bad:
            raise FloatingPointError(
                f"step {self.state.global_step}: {bad[0]} holds NaN or infinity and was not saved. {earlier}: lower "
                "the learning rate and resume from one"
            )
        try:
            self._on_rank_0(lambda: start_over(staging))
            yield
        except (torch.OutOfMemoryError, torch.distributed.DistError):  # RuntimeErrors too, but no disk's fault
            raise
        except WRITE_ERRORS as error:
            if self.is_world_process_zero():
                shutil.rmtree(staging, ignore_errors=True)
            raise BadInput(
                f"could not write {staging.name} in {staging.parent}: {reason(error)}. {earlier}: if the "
                "disk is full, free some space, and go on with --resume_from_checkpoint True"
            ) from error

    def _on_rank_0(self, action):
        """Runs `action` on rank 0 of the whole job. If it fails, every rank raises, so that none waits for rank 0."""
        error: list[str | None] = [None]
        if self.is_world_process_zero():
            try:
                action()
            except WRITE_ERRORS as failure:
                error = [reason(failure)]
        broadcast_object_list(error)
        if error[0] is not None:
            raise OSError(error[0])

    def load_checkpoint(self, checkpoint: Path) -> None:
        stage_2, optimizer, schedule = not self.medusa.backbone_frozen, self.optimizer.optimizer, self.lr_scheduler
        asked = [(group["initial_lr"], group["weight_decay"]) for group in optimizer.param_groups]
        load_state(checkpoint / STATE_DIR, self.model, optimizer, stage_2)
        self.saved_window = (read_run(checkpoint) or {}).get("window")
        with reading(path := checkpoint / "scheduler.pt"):
            saved = torch.load(path, weights_only=True)
            schedule.load_state_dict(saved)
        if not isinstance(schedule, LambdaLR):  # its rates follow from what it has seen, not from flags
            return
        # Rates, decay and number of steps are those of the flags, as the advice after a NaN has it. With the
        # checkpoint's, a finished run that is made longer would begin with its last rate, which is 0.
        rates = [
            rate * factor(schedule.last_epoch) for (rate, _), factor in zip(asked, schedule.lr_lambdas, strict=True)
        ]
        for group, (rate, decay), now in zip(optimizer.param_groups, asked, rates, strict=True):
            if rate != group["initial_lr"]:
                logger.info("the learning rate is %g from here on, and was %g", rate, group["initial_lr"])
            if isinstance(group["lr"], torch.Tensor):  # torchao's optimisers keep the rate in one
                now = torch.full_like(group["lr"], float(now))
            group |= {"initial_lr": rate, "lr": now, "weight_decay": decay}
        schedule.load_state_dict(saved | {"base_lrs": [rate for rate, _ in asked], "_last_lr": rates})

    def load_best(self, checkpoint: Path) -> None:
        logger.info("loading the best weights, those of %s", checkpoint)
        if self.medusa.backbone_frozen:
            state_dict = load_heads(find_heads(checkpoint)[0])[1] if self.is_world_process_zero() else {}
            set_head_weights(self.medusa, state_dict, self.args.world_size > 1)
        else:
            load_state(checkpoint / STATE_DIR, self.model, None, True)
