"""What the HF Trainer lacks for Medusa heads: one head after the other, exact means, learning-rate groups.

Loss of an optimiser step: L = [stage 2: L_0] + lambda_0 * sum_k lambda_k * L_k + [adapters: c * KL]. L_k is the mean
over head k's rows in the whole step (all micro-batches, all ranks), and KL, of --preserve_coefficient, over head 0's.
So one batch of 8, two micro-batches of 4 and two processes of 4 give the same update, however long the conversations
are.
"""

import contextlib
import logging
import math
from typing import Any, cast

import torch
import torch.nn as nn
from transformers.trainer_utils import EvalLoopOutput

from common.errors import BadInput
from conversations.batches import ShuffledSampler
from conversations.targets import IGNORE, count_rows, shifted_targets
from model.backbone import decoder_layers
from model.judge import check_logits, check_packing
from training import fsdp
from training.checkpoints import CheckpointingTrainer
from training.optimiser import groups, optimiser_class

logger = logging.getLogger(__name__)


class MedusaTrainer(CheckpointingTrainer):
    """meter: an `EfficiencyCallback`, or None. It gets the counts of each step, and its figures go into the logs.
    run: what run.json of a checkpoint says of the run.
    """

    def __init__(self, *args, meter=None, run=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.meter, self.run = meter, run or {}
        if meter is not None:
            self.add_callback(meter)
        self.num_heads = len(self.medusa.medusa_heads)
        self.names = [f"head_{k}" for k in range(self.num_heads + 1)] + ["preserve"] * self.medusa.preserves
        # Per loss: its sum, right guesses, rows, over the steps since the last log.
        self.window = torch.zeros(self.medusa.num_losses, 3, dtype=torch.float64, device=self.args.device)
        self.step_sums = torch.zeros_like(self.window)  # the same over the current step
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            fsdp.configure(plugin, self.medusa)
        # FSDP1 allows only one end of backward per step, and DDP marks each weight ready only once.
        self.one_by_one = plugin.fsdp_version == 2 if plugin else self.args.world_size == 1
        where = f"FSDP{plugin.fsdp_version}" if plugin else "DDP" if self.args.world_size > 1 else "one process"
        sizes = self.accelerator.parallelism_config
        if sizes is not None and sizes.dp_replicate_size > 1:
            where += f", {sizes.dp_replicate_size} copies of {sizes.dp_shard_size} shards"
        self.where = where
        if self.args.offload_activations and not self.one_by_one:
            raise BadInput(f"--offload_activations needs FSDP2 or one process, and this is {where}")
        layers, recomputed = len(decoder_layers(self.medusa.backbone)), self.args.gradient_checkpointing_layers
        if recomputed is not None and recomputed > layers:
            raise BadInput(f"--gradient_checkpointing_layers {recomputed}: the backbone has {layers} layers")
        form = "all heads forward, then one backward"
        if self.one_by_one:
            form = "one head after the other (forward and backward), then the backbone"
        logger.info("training step: %s (%s)", form, where)

    # ---- the loss ----
    def head_weights(self, progress: float = 1.0) -> list[float]:
        """The weight of each loss (index = head) after `progress` (0 to 1) of the training."""
        ramp = {"constant": 1.0, "linear": progress, "sine": math.sin(progress * math.pi / 2)}
        lambda_0 = self.args.medusa_heads_coefficient * ramp[self.args.medusa_scheduler]
        backbone = 0.0 if self.medusa.backbone_frozen else 1.0
        heads = [lambda_0 * self.args.medusa_decay_coefficient**k for k in range(1, self.num_heads + 1)]
        return [backbone, *heads] + [self.args.preserve_coefficient or 0.0] * self.medusa.preserves

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimiser step, and the number of rows per head in all of them, on all ranks."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if not batches:
            return batches, None
        if self.args.medusa_rows == "all":  # a teacher has something to say of a prompt's tokens too
            for batch in batches:
                batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)
        self._mask_repeated(batches[-1], self.train_dataset)
        counts = torch.stack([batch_counts(batch, self.num_heads) for batch in batches]).sum(0)
        counts = self.accelerator.reduce(counts.to(device))
        # The counts stay on the device. Reading them here would wait for the end of the last step, and then the GPU
        # would idle until the first layers of the next one are launched.
        if self.meter is not None:
            self.meter.count(counts)
        rows = counts[: self.num_heads + 1].clamp(min=1)
        return batches, torch.cat([rows, rows[:1]]) if self.medusa.preserves else rows

    def _mask_repeated(self, batch: dict, dataset):
        """Masks the labels of repeated conversations. If an epoch's last batch is not full, accelerate fills it with
        conversations from the epoch's start; with them, several processes would train on more rows than one.

        (accelerate's own count of them, `gradient_state.remainder`, is not known in a resumed epoch.)
        """
        size = len(batch["labels"])
        rest = 0 if self.args.dataloader_drop_last else len(dataset) % (size * self.args.world_size)
        if self.args.world_size > 1 and self.accelerator.gradient_state.end_of_dataloader and rest > 0:
            batch["labels"][max(0, rest - self.args.process_index * size) :] = IGNORE

    def model_inputs(self, inputs: dict) -> dict:
        """Drops the attention mask: padding is on the right, where causal attention never looks from a token."""
        return {key: value for key, value in inputs.items() if key != "attention_mask"}

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        """One micro-batch forward and backward; returns its share of the step's loss.

        num_items_in_batch: `[num_losses]`, rows per loss in the whole step (at least 1), from `get_batch_samples`.
        """
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):  # schedule-free optimisers
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        weights = self.head_weights((self.state.global_step + 1) / self.state.max_steps)
        # The row counts are already those of all ranks, so the average of the gradients over the ranks is undone.
        weights = [weight * self.accelerator.num_processes for weight in weights]
        step = self._one_by_one if self.one_by_one else self._all_at_once
        loss = step(model, inputs, weights, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._stop_if_not_finite()
            self.window += self.step_sums
            self.step_sums.zero_()
        return loss

    def _one_by_one(self, model, inputs, weights, rows):
        """One head's forward and backward, then the next one's, so that memory holds one head's activations, not K + 1
        (arXiv 2404.19737, section 2). d_hidden adds up in `leaf.grad` and goes through the backbone once."""
        medusa, labels, position_ids = self.medusa, inputs["labels"], inputs.get("position_ids")
        loss = torch.zeros((), device=self.args.device)
        offload: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.args.offload_activations:
            offload = torch.autograd.graph.save_on_cpu(pin_memory=self.args.device.type == "cuda")
        with self.accelerator.autocast(), offload:
            original = medusa.original(medusa.read, inputs["input_ids"], position_ids=position_ids)
            stored = inputs.get("hidden")  # --states_path
            hidden, text = medusa.read(inputs["input_ids"], position_ids=position_ids, hidden=stored)
        leaf = hidden.detach().requires_grad_(not medusa.backbone_frozen)
        with self.accelerator.autocast():
            prefixed = medusa.for_heads(leaf, position_ids=position_ids)
        seen = leaf if medusa.prefix is None else prefixed.detach().requires_grad_()
        joint = []  # losses whose backward pass runs together with the backbone's
        for k in range(1 if medusa.backbone_frozen else 0, medusa.num_losses):
            of_lm_head = k in (0, self.num_heads + 1)
            with_backbone = of_lm_head and fsdp.lm_head_in_root_unit(medusa)
            fsdp.gather(fsdp.lm_head_unit(medusa) if of_lm_head else medusa.medusa_heads[k - 1])
            with self.accelerator.autocast():
                read = hidden if with_backbone else leaf
                out = medusa.head_loss(k, read, seen, labels, text, position_ids, original)
            scaled = out.loss_sum * weights[k] / rows[k]
            if with_backbone:
                joint.append(scaled)
            else:
                scaled.backward()
            loss += scaled.detach()
            out.add_to(self.step_sums[k])
            del out, scaled
        fsdp.release_teacher(medusa)
        if seen is not leaf:  # the prefix layer's backward pass, once for all heads
            prefixed.backward(torch.zeros_like(seen) if seen.grad is None else seen.grad)
        if not medusa.backbone_frozen:
            d_hidden = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
            if joint:
                fsdp.gather(medusa)
            torch.autograd.backward([hidden, *joint], [d_hidden] + [None] * len(joint))
        return loss

    def _all_at_once(self, model, inputs, weights, rows):
        out = model(**inputs, head_weights=weights, rows=rows)
        out.loss.backward()
        self.step_sums += out.head_sums
        return out.loss.detach()

    def _stop_if_not_finite(self):
        """Called before the optimiser's step: a NaN in any micro-batch would spoil every weight."""
        for name, value in zip(self.names, self.step_sums[:, 0].tolist(), strict=True):
            if not math.isfinite(value):
                what = name.replace("_", " ")
                raise FloatingPointError(
                    f"step {self.state.global_step + 1}: the loss of {what} is {value}. Nothing was saved after the "
                    f"last checkpoint in {self.args.output_dir}, if there is one: lower --learning_rate (or "
                    "--medusa_lr_multiplier) or add warm-up, and go on from it with --resume_from_checkpoint True"
                )

    # ---- what the Trainer calls ----
    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Up to four parameter groups: heads or backbone, with or without weight decay; no frozen weights."""
        if self.optimizer is not None:
            return self.optimizer
        model, sharded = self.model if model is None else model, self.is_fsdp_enabled
        cls, kwargs = optimiser_class(self.args, sharded, lambda: self.get_optimizer_cls_and_kwargs(self.args, model))
        self.optimizer = cls(groups(self.args, model, set(self.get_decay_parameter_names(model))), **kwargs)
        return self.optimizer

    def train_sampler(self, dataset):
        """Groups rows by length if the lengths are known and the rows are not packed."""
        if self.args.train_sampling_strategy != "random":  # the Trainer's default
            return None
        names = getattr(dataset, "column_names", None) or []
        lengths = list(dataset["length"]) if "length" in names and "position_ids" not in names else None
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ShuffledSampler(len(dataset), self.get_total_train_batch_size(self.args), seed, lengths)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each head's loss and top-1 accuracy, and the meter's figures, to every training log."""
        if "loss" in logs:
            for name, (loss, correct, rows) in zip(
                self.names, self.accelerator.reduce(self.window).tolist(), strict=True
            ):
                if rows:
                    logs |= {f"{name}_loss": loss / rows, f"{name}_top1": correct / rows}
            self.window.zero_()
            if self.meter is not None:
                logs |= self.meter.window()
        super().log(logs, start_time)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Loss and top-1 accuracy of every head, the backbone's `lm_head` (head 0) included: means over all rows.
        `{prefix}_loss` is the training loss at full lambda_0. Logits are not kept."""
        model = self.model_wrapped
        model.eval()
        if hasattr(self.optimizer, "eval") and callable(self.optimizer.eval):  # schedule-free optimisers
            self.optimizer.eval()
        fsdp.keep_whole_between_forward_and_backward(self.medusa, False)
        sums = torch.zeros_like(self.window)
        for inputs in dataloader:
            self._mask_repeated(inputs, dataloader.dataset)
            with torch.no_grad(), self.accelerator.autocast():
                sums += model(**self._prepare_inputs(inputs), head_weights=[1.0] * len(sums)).head_sums
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        fsdp.release_teacher(self.medusa)
        fsdp.keep_whole_between_forward_and_backward(self.medusa, True)
        metrics: dict[str, float] = {}
        total, weights = 0.0, self.head_weights()
        for name, weight, (loss, correct, rows) in zip(
            self.names, weights, self.accelerator.reduce(sums).tolist(), strict=True
        ):
            mean, top1 = loss / max(1, rows), correct / max(1, rows)
            metrics |= {f"{metric_key_prefix}_{name}_loss": mean, f"{metric_key_prefix}_{name}_top1": top1}
            total += weight * mean
        metrics = {f"{metric_key_prefix}_loss": total} | metrics
        predictions = cast(Any, None)  # annotated as an array, but the Trainer too gives None if it keeps no logits
        return EvalLoopOutput(predictions, None, metrics, self.num_examples(dataloader))

    def floating_point_ops(self, inputs) -> int:
        return 0  # the Trainer's estimate has a backward pass for a frozen backbone; see EfficiencyCallback

    def before_wrapping(self) -> None:
        if self.args.gradient_checkpointing_layers is not None:  # the Trainer switched it on in all
            for layer in decoder_layers(self.medusa.backbone)[self.args.gradient_checkpointing_layers :]:
                cast(Any, layer).gradient_checkpointing = False

    def after_wrapping(self) -> None:
        fsdp.link_units(self.medusa)
        if len(decoder_layers(self.medusa.backbone)):  # of stored states store_states.py has judged
            self.judge()

    def judge(self):
        """Compares the backbone's own logits with ours, and a packed row with its parts, on the model as it is now, on
        its device. Under FSDP every rank runs the wrapped model's forward, which gathers a unit at a time."""
        dtype = torch.bfloat16 if self.args.bf16 else self.medusa.lm_head.weight.dtype
        self.model_wrapped.eval()
        fsdp.keep_whole_between_forward_and_backward(self.medusa, False)  # as in an evaluation

        def logits(input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
            with torch.no_grad(), self.accelerator.autocast():
                return self.model_wrapped(input_ids=input_ids, position_ids=position_ids, own_logits=True).logits

        check_logits(logits, self.medusa, self.args.device, dtype)
        if "position_ids" in (getattr(self.train_dataset, "column_names", None) or []):
            check_packing(logits, self.medusa, self.args.device, dtype)
        fsdp.keep_whole_between_forward_and_backward(self.medusa, True)


def batch_counts(batch: dict, num_heads: int) -> torch.Tensor:
    """int64 `[K+4]`: rows of head 0..K, tokens, token slots (tokens and padding), causal attention pairs.

    pairs: a token at position p of its conversation attends to p + 1 tokens. Attention costs their sum.
    """
    labels, mask, position_ids = batch["labels"], batch["attention_mask"], batch.get("position_ids")
    rows = [count_rows(shifted_targets(labels, k + 1, position_ids)) for k in range(num_heads + 1)]
    positions = torch.arange(labels.shape[1], device=labels.device) if position_ids is None else position_ids
    pairs = ((positions + 1) * mask).sum()
    return torch.stack([*rows, mask.sum(), torch.tensor(mask.numel(), device=labels.device), pairs])
