"""Where this project meets the private side of the HF Trainer.

The Trainer has no public way to change how it draws batches, wraps the model or writes a checkpoint. So its private
methods are overridden, all of them in this file. Each override hands over to a public method that
`CheckpointingTrainer` or `MedusaTrainer` defines. tests/training/test_hooks.py compares the signatures with those of
the installed transformers: a release that renames a method fails there, and not in a run.
"""

from pathlib import Path

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import Trainer

from training.arguments import TrainingArguments
from training.state import reading


class HookedTrainer(Trainer):
    args: TrainingArguments
    optimizer: AcceleratedOptimizer  # this and the next: None until train() makes them
    lr_scheduler: LambdaLR

    # ---- what the subclasses define ----
    def model_inputs(self, inputs: dict) -> dict:
        """The part of a batch that the model gets."""
        raise NotImplementedError

    def train_sampler(self, dataset) -> Sampler | None:
        """The order of the training rows, or None for the Trainer's default."""
        raise NotImplementedError

    def before_wrapping(self) -> None:
        """Before the model is wrapped for FSDP or DDP."""
        raise NotImplementedError

    def after_wrapping(self) -> None:
        raise NotImplementedError

    def save_checkpoint(self) -> None:
        """Writes `checkpoint-<step>`; called on every process."""
        raise NotImplementedError

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Loads optimiser, schedule and, in stage 2, the weights of the wrapped model; called on every process."""
        raise NotImplementedError

    def load_best(self, checkpoint: Path) -> None:
        """Loads the weights of the best checkpoint (--load_best_model_at_end)."""
        raise NotImplementedError

    def save_rng_state(self, directory: Path) -> None:
        self._save_rng_state(str(directory))

    def restore_window(self) -> None:
        """At the start of each epoch: after a resume, puts back what was summed up since the last log."""
        raise NotImplementedError

    def _pending_loss(self) -> tuple[torch.Tensor, int]:
        """The loss summed up on this rank since the last log, and the step of that log."""
        return self._tr_loss.detach(), self._globalstep_last_logged

    def _set_pending_loss(self, loss: float, step: int) -> None:
        self._tr_loss.fill_(loss)
        self._globalstep_last_logged = step

    # ---- what the Trainer calls ----
    def _prepare_inputs(self, inputs: dict) -> dict:
        return super()._prepare_inputs(self.model_inputs(inputs))

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        sampler = self.train_sampler(self.train_dataset if train_dataset is None else train_dataset)
        return super()._get_train_sampler(train_dataset) if sampler is None else sampler

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        self.before_wrapping()
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.after_wrapping()
        return prepared

    def _run_epoch(self, model, epoch, train_dataloader, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # resumed from a run's last checkpoint: nothing is left
            self.control.should_training_stop = True
            return
        # On several processes, a resumed Trainer gives the epoch's number to a loader that does not pass it on.
        train_dataloader.set_epoch(epoch)
        self.restore_window()
        super()._run_epoch(model, epoch, train_dataloader, *args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        self.save_checkpoint()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Does nothing: training/build.py loads the heads before the model is sharded, and `load_checkpoint` loads
        stage 2's weights with Adam's moments."""

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is not None:
            self.load_checkpoint(Path(checkpoint))

    def _load_rng_state(self, checkpoint) -> None:
        with reading(Path(checkpoint or "", "rng_state*.pth")):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None  # or the Trainer would not call this
        self.load_best(Path(self.state.best_model_checkpoint))
