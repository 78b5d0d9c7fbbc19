"""What the HF Trainer lacks for Medusa heads: one head after the other, exact means, groups, heads-only files.

Loss of an optimiser step: L = [stage 2: L_0] + lambda_0 * sum_k lambda_k * L_k, where L_k is the mean over head
k's rows of the whole step (all micro-batches, all ranks). So one batch of 8, two micro-batches of 4 and two
processes of 4 give the same update, however long the conversations are.
"""

import logging
import math

import torch
import torch.nn as nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from batches import LengthGroupedSampler
from errors import BadInput
from medusa_checkpoint import find_heads, load_heads
from medusa_loss import count_rows, shifted_targets
from medusa_model import MedusaModel, load_backbone

logger = logging.getLogger(__name__)


class MedusaTrainer(Trainer):
    """meter: an `EfficiencyCallback`, or None. It is told what each step holds and asked for its figures."""

    def __init__(self, *args, meter=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.meter = meter
        if meter is not None:
            self.add_callback(meter)
        self.num_heads = len(self.medusa.medusa_heads)
        # Per head: summed loss, right guesses, rows; of the steps since the last log.
        self.window = torch.zeros(self.num_heads + 1, 3, dtype=torch.float64, device=self.args.device)
        self.step_sums = torch.zeros_like(self.window)  # the same of one optimiser step
        self.one_by_one = self.args.world_size == 1
        logger.info(
            "training step: %s",
            "one head after the other (forward and backward), then the backbone"
            if self.one_by_one
            else "all heads forward, then one backward (several processes)",
        )

    @property
    def medusa(self) -> MedusaModel:
        return self.accelerator.unwrap_model(self.model)

    # ---- the loss ----
    def head_weights(self, progress: float = 1.0) -> list[float]:
        """Weight of each head's loss, index = head, after `progress` (0 to 1) of the training."""
        ramp = {"constant": 1.0, "linear": progress, "sine": math.sin(progress * math.pi / 2)}
        lambda_0 = self.args.medusa_heads_coefficient * ramp[self.args.medusa_scheduler]
        backbone = 0.0 if self.medusa.backbone_frozen else 1.0
        return [backbone] + [lambda_0 * self.args.medusa_decay_coefficient**k for k in range(1, self.num_heads + 1)]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimiser step, and the rows each head has in all of them, on all ranks."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if not batches:
            return batches, None
        counts = torch.stack([batch_counts(batch, self.num_heads) for batch in batches]).sum(0).to(device)
        *rows, tokens, slots, pairs = self.accelerator.reduce(counts).tolist()
        if self.meter is not None:
            self.meter.count(rows=rows, tokens=tokens, slots=slots, pairs=pairs)
        return batches, rows

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: list[int] | None = None):
        """One micro-batch forward and backward; returns its share of the step's loss.

        num_items_in_batch: rows per head of the whole step, which `get_batch_samples` counted.
        """
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):  # schedule-free optimisers
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        weights = self.head_weights((self.state.global_step + 1) / self.state.max_steps)
        # Gradients are averaged over the ranks, while the row counts are already those of all ranks.
        scales = [
            weight * self.accelerator.num_processes / max(1, rows)
            for weight, rows in zip(weights, num_items_in_batch, strict=True)
        ]
        loss = self._one_by_one(inputs, scales) if self.one_by_one else self._all_at_once(model, inputs, scales)
        if self.accelerator.sync_gradients:
            self._stop_if_not_finite()
            self.window += self.step_sums
            self.step_sums.zero_()
        return loss

    def _one_by_one(self, inputs, scales):
        """Peak memory grows with one head, not with K + 1 (arXiv 2404.19737, section 2): a head's forward and
        backward, then the next one's; d_hidden adds up in `leaf`, and goes through the backbone once."""
        medusa, labels, position_ids = self.medusa, inputs["labels"], inputs.get("position_ids")
        loss = torch.zeros((), device=self.args.device)
        with self.accelerator.autocast():
            # No attention mask: padding is on the right, where causal attention never looks from a real token.
            hidden = medusa.last_hidden_state(inputs["input_ids"], position_ids=position_ids)
        leaf = hidden.detach().requires_grad_(not medusa.backbone_frozen)
        for k in range(1 if medusa.backbone_frozen else 0, self.num_heads + 1):
            with self.accelerator.autocast():
                out = medusa.head_loss(k, leaf, labels, position_ids)
            scaled = out.loss_sum * scales[k]
            scaled.backward()
            loss += scaled.detach()
            out.add_to(self.step_sums[k])
        if not medusa.backbone_frozen:
            hidden.backward(leaf.grad)
        return loss

    def _all_at_once(self, model, inputs, scales):
        inputs = {key: value for key, value in inputs.items() if key != "attention_mask"}
        out = model(**inputs, head_weights=scales, rows=[1] * len(scales))
        out.loss.backward()
        self.step_sums += out.head_sums
        return out.loss.detach()

    def _stop_if_not_finite(self):
        """Before the optimiser sees it: a NaN in any micro-batch of the step would spoil every weight."""
        for k, value in enumerate(self.step_sums[:, 0].tolist()):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"step {self.state.global_step + 1}: the loss of head {k} is {value}. Nothing was saved after the "
                    f"last checkpoint in {self.args.output_dir}: lower --learning_rate (or --medusa_lr_multiplier) or "
                    "add warm-up, and go on from it with --resume_from_checkpoint True"
                )

    # ---- what the Trainer calls ----
    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Four groups at most: heads or backbone, with or without weight decay; frozen weights are in none."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        try:
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
        except ImportError as error:
            raise BadInput(f"--optim {self.args.optim} needs a package that is missing: {error}") from error
        if kwargs.keys() & {"params", "model", "optimizer_dict"}:
            raise BadInput(
                f"--optim {self.args.optim} makes its own parameter groups: choose an AdamW, Adafactor or SGD"
            )
        decays = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(("medusa_heads." in name, name in decays), []).append(parameter)
        self.optimizer = cls(
            [
                {
                    "params": parameters,
                    "lr": self.args.learning_rate * (self.args.medusa_lr_multiplier if is_head else 1.0),
                    "weight_decay": self.args.weight_decay if decay else 0.0,
                }
                for (is_head, decay), parameters in groups.items()
            ],
            **kwargs,
        )
        return self.optimizer

    def _get_train_sampler(self, train_dataset=None):
        """Group by length where the lengths are known and rows are not packed to one length."""
        data = self.train_dataset if train_dataset is None else train_dataset
        names = getattr(data, "column_names", None) or []
        asked = self.args.train_sampling_strategy
        if "length" not in names or "position_ids" in names or asked != "random":  # random: the Trainer's default
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedSampler(list(data["length"]), self.get_total_train_batch_size(self.args), seed)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds loss and top-1 accuracy per head, and the meter's figures, to every training log."""
        if "loss" in logs:
            for k, (loss, correct, rows) in enumerate(self.accelerator.reduce(self.window).tolist()):
                if rows:
                    logs |= {f"head_{k}_loss": loss / rows, f"head_{k}_top1": correct / rows}
            self.window.zero_()
            if self.meter is not None:
                logs |= self.meter.window()
        super().log(logs, start_time)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Loss and top-1 of every head, the backbone's `lm_head` (head 0) included: exact means over all rows.
        `{prefix}_loss` is the training loss at full lambda_0. No logits are kept."""
        medusa = self.medusa
        medusa.eval()
        if hasattr(self.optimizer, "eval") and callable(self.optimizer.eval):  # schedule-free optimisers
            self.optimizer.eval()
        sums = torch.zeros_like(self.window)
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.accelerator.autocast():
                position_ids = inputs.get("position_ids")
                hidden = medusa.last_hidden_state(inputs["input_ids"], position_ids=position_ids)
                for k in range(self.num_heads + 1):
                    medusa.head_loss(k, hidden, inputs["labels"], position_ids).add_to(sums[k])
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics, total = {}, 0.0
        weights = self.head_weights()
        for k, (loss, correct, rows) in enumerate(self.accelerator.reduce(sums).tolist()):
            mean, top1 = loss / max(1, rows), correct / max(1, rows)
            metrics |= {f"{metric_key_prefix}_head_{k}_loss": mean, f"{metric_key_prefix}_head_{k}_top1": top1}
            total += weights[k] * mean
        metrics = {f"{metric_key_prefix}_loss": total} | metrics
        return EvalLoopOutput(None, None, metrics, self.num_examples(dataloader))

    def floating_point_ops(self, inputs) -> int:
        return 0  # the Trainer's estimate counts a backward through a frozen backbone; see EfficiencyCallback

    # ---- checkpoints ----
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Heads (stage 1) or backbone and heads (stage 2), and the tokenizer; no pickled training_args.bin."""
        if not self.args.should_save:
            return
        for name, parameter in self.medusa.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                raise FloatingPointError(
                    f"step {self.state.global_step}: {name} holds NaN or infinity and was not saved; earlier "
                    f"checkpoints in {self.args.output_dir} are intact: lower the learning rate and resume from one"
                )
        output_dir = output_dir or self.args.output_dir
        self.medusa.save_pretrained(output_dir)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Puts a checkpoint's weights into the model, strictly: names, shapes and finiteness are checked."""
        medusa = self.medusa
        if self.num_heads:
            _, state_dict = load_heads(find_heads(resume_from_checkpoint)[0])
            medusa.medusa_heads.load_state_dict(state_dict, strict=True)
        if not medusa.backbone_frozen:
            saved = load_backbone(resume_from_checkpoint, dtype="auto")
            medusa.backbone.load_state_dict(saved.state_dict(), strict=True)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def batch_counts(batch: dict, num_heads: int) -> torch.Tensor:
    """Rows per head 0..K, tokens, token slots (tokens and padding), causal attention pairs: int64 `[K+4]`.

    pairs: a token at position p of its conversation attends to p + 1 tokens; the sum is what attention costs.
    """
    labels, mask, position_ids = batch["labels"], batch["attention_mask"], batch.get("position_ids")
    rows = [count_rows(shifted_targets(labels, k + 1, position_ids)) for k in range(num_heads + 1)]
    positions = torch.arange(labels.shape[1], device=labels.device) if position_ids is None else position_ids
    pairs = ((positions + 1) * mask).sum()
    return torch.stack([*rows, mask.sum(), torch.tensor(mask.numel(), device=labels.device), pairs])
