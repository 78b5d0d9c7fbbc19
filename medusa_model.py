"""A causal LM with K Medusa heads (arXiv 2401.10774, section 2.1), by composition: nothing is patched.

    backbone = AutoModelForCausalLM.from_pretrained("meta-llama/Meta-Llama-3-8B-Instruct")
    model = MedusaModel.from_backbone(backbone, MedusaConfig(medusa_num_heads=3, medusa_num_layers=1))
    model.freeze_backbone()          # stage 1; leave it out for stage 2
    model(input_ids, labels=labels).loss.backward()

Head k (k = 1..K) predicts the token at t + k + 1 from the last hidden state h_t; the backbone's own `lm_head` is
head 0 and predicts t + 1. A head is n ResBlocks and a projection to the vocabulary of its own.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import ModelOutput

from common.errors import BadInput
from conversations.targets import shifted_targets
from model.backbone import check_backbone, load_backbone
from model.heads import HeadLoss, MedusaHead, cap, projection_loss
from model.heads_file import HEADS_DIR, find_heads, load_heads, save_heads
from model.loss import choose_impl


class MedusaConfig(PreTrainedConfig):
    """What config.json of a heads directory holds. Sizes are filled in from the backbone."""

    model_type = "medusa"
    medusa_num_heads: int = 5
    medusa_num_layers: int = 1
    base_model_name_or_path: str | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None

    def to_dict(self) -> dict:
        # Only what describes the heads. No `architectures`: TGI tells a Medusa directory by its absence.
        keys = ("model_type", "medusa_num_heads", "medusa_num_layers", "base_model_name_or_path")
        fields = {key: getattr(self, key) for key in (*keys, "hidden_size", "vocab_size")}
        return fields | {"transformers_version": transformers.__version__}


@dataclass
class MedusaOutput(ModelOutput):
    """`loss` is `[head 0's loss, if it was computed +] sum_k lambda_k * L_k`. `head_losses` and
    `head_accuracies` (top-1) are `[K+1]`, index = head, NaN where head 0 was not computed; a head without rows
    has loss 0. `head_sums` `[K+1, 3]` is what they are made of: summed loss, right guesses, rows.
    Without labels: `logits` `[K+1, B, T, V]`, or `last_hidden_state` `[B, T, H]` if asked for."""

    loss: torch.Tensor | None = None
    head_losses: torch.Tensor | None = None
    head_accuracies: torch.Tensor | None = None
    head_sums: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


class MedusaModel(PreTrainedModel):
    """Any causal LM with `get_decoder()` and `get_output_embeddings()`, as `backbone`, and `medusa_heads`."""

    config_class = MedusaConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False

    def __init__(self, config: MedusaConfig, backbone: PreTrainedModel):
        super().__init__(config)
        self.backbone = backbone
        self.medusa_heads = nn.ModuleList(
            MedusaHead(config.hidden_size, config.vocab_size, config.medusa_num_layers)
            for _ in range(config.medusa_num_heads)
        )
        # Not post_init(): it would draw the zero ResBlocks anew.
        text_config = backbone.config.get_text_config()
        self.softcap = getattr(text_config, "final_logit_softcapping", None)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # the Trainer compares them with the tokenizer's
            setattr(config, name, getattr(text_config, name, None))
        self.loss_impl = "torch"  # choose_kernels() chooses the one that fits the device
        self.backbone_frozen = False
        units = ["MedusaHead"] if config.medusa_num_heads else []
        self._no_split_modules = [*(backbone._no_split_modules or []), *units]  # what FSDP shards as one

    @classmethod
    def from_backbone(
        cls, backbone: PreTrainedModel, config: MedusaConfig, dtype=None, fill: bool = True
    ) -> "MedusaModel":
        """Adds untrained heads that equal the `lm_head` exactly. `dtype` is the heads' (default: the backbone's).

        fill=False leaves their memory untouched, for a process that another one sends the weights to.
        """
        lm_head = backbone.get_output_embeddings()
        check_backbone(backbone, lm_head)
        vocab_size, hidden_size = lm_head.weight.shape
        for name, value in (("vocab_size", vocab_size), ("hidden_size", hidden_size)):
            if getattr(config, name) not in (None, value):
                raise BadInput(
                    f"the heads were made for {name} {getattr(config, name)}, but the backbone "
                    f"{backbone.name_or_path or type(backbone).__name__} has {value}: use the backbone they were "
                    "trained on"
                )
            setattr(config, name, value)
        if config.base_model_name_or_path is None:
            name = backbone.name_or_path
            config.base_model_name_or_path = os.path.abspath(name) if os.path.isdir(name) else name
        with torch.device("meta"):  # a random init of K x vocab x hidden numbers would only be overwritten
            model = cls(config, backbone)
        model.medusa_heads.to(dtype=dtype or lm_head.weight.dtype).to_empty(device=lm_head.weight.device)
        if not fill:
            return model
        with torch.no_grad():
            for *blocks, projection in model.medusa_heads:
                for block in blocks:
                    block.reset_parameters()
                projection.weight.copy_(lm_head.weight)
        return model

    def choose_kernels(self, use_liger: bool, device: torch.device):
        """Chooses how the heads' loss is computed on `device`, and on a GPU puts Liger's kernels into the backbone."""
        self.loss_impl = choose_impl(use_liger, device)
        if use_liger and device.type == "cuda":
            # RMSNorm, RoPE and SwiGLU only. Liger's default would also put its own loss into the backbone's forward.
            apply_liger_kernel(self.backbone, {"fused_linear_cross_entropy": False, "cross_entropy": False})

    def freeze_backbone(self):
        """Stage 1. The backbone keeps no activations, gets no gradient and stays in eval mode."""
        self.backbone.requires_grad_(False)
        self.backbone_frozen = True
        self.backbone.eval()

    def train(self, mode: bool = True):
        super().train(mode)
        if self.backbone_frozen:
            self.backbone.eval()
        return self

    @property
    def lm_head(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def get_input_embeddings(self):
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self):
        return self.lm_head

    def last_hidden_state(self, input_ids, attention_mask=None, position_ids=None) -> torch.Tensor:
        """`[B, T]` -> `[B, T, H]`, what all heads read: the decoder's output after its last norm."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.backbone_frozen):
            return self.backbone.get_decoder()(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
            ).last_hidden_state

    def head_loss(self, k: int, hidden, labels, position_ids=None) -> HeadLoss:
        """Head k's loss on hidden `[B, T, H]` and (unshifted) labels `[B, T]`; k = 0 is the backbone's `lm_head`."""
        targets = shifted_targets(labels, k + 1, position_ids)
        if k > 0:
            return self.medusa_heads[k - 1](hidden, targets, self.loss_impl, self.softcap)
        return self.lm_head_loss(hidden, targets)

    def lm_head_loss(self, hidden, targets) -> HeadLoss:
        return projection_loss(hidden, targets, self.lm_head.weight, self.loss_impl, self.softcap)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        head_weights: list[float] | None = None,
        rows: torch.Tensor | None = None,
        output_hidden: bool = False,
    ) -> MedusaOutput:
        """All `[B, T]`. Every head forward, then one backward by the caller: the plain form of the training step
        (training/trainer.py runs one head after the other instead, where it can).

        head_weights: K+1 weights of the heads in the loss. Default: 1, and 0 for head 0 where the backbone is frozen;
            head 0 is not computed if its weight is 0.
        rows: `[K+1]` row counts to divide by, those of the whole optimiser step, at least 1 (default: this batch's).
        """
        # The class's own function: under FSDP2 that of the instance gathers the root unit's weights first
        # (training/fsdp.py), and in here they are whole already.
        hidden = MedusaModel.last_hidden_state(self, input_ids, attention_mask, position_ids)
        if output_hidden:
            return MedusaOutput(last_hidden_state=hidden)
        if labels is None:
            lm_logits = cap(self.lm_head(hidden), self.softcap)
            heads = [head(hidden, softcap=self.softcap).to(lm_logits.dtype) for head in self.medusa_heads]
            return MedusaOutput(logits=torch.stack([lm_logits, *heads]))
        num_heads = len(self.medusa_heads)
        head_weights = head_weights or [0.0 if self.backbone_frozen else 1.0] + [1.0] * num_heads
        first = 1 if head_weights[0] == 0 else 0
        sums = torch.zeros(num_heads + 1, 3, dtype=torch.float64, device=hidden.device)
        losses, total = sums.new_full((num_heads + 1,), torch.nan, dtype=torch.float32), 0.0
        for k in range(first, num_heads + 1):
            out = self.head_loss(k, hidden, labels, position_ids)
            out.add_to(sums[k])
            loss = out.loss_sum / (max(1, out.rows) if rows is None else rows[k])
            losses[k] = loss.detach()
            total = total + head_weights[k] * loss
        accuracies = (sums[:, 1] / sums[:, 2].clamp(min=1)).float()
        accuracies[:first] = torch.nan
        return MedusaOutput(loss=total, head_losses=losses, head_accuracies=accuracies, head_sums=sums)

    def save_pretrained(
        self,
        save_directory,
        is_main_process=True,
        state_dict=None,
        include_backbone=None,
        final_directory=None,
        **kwargs,
    ):
        """Writes the heads (stage 1) or the backbone and the heads (stage 2: a plain checkpoint and `medusa_heads/`).

        state_dict: whole tensors by name, where the model itself holds only a part of each.
        include_backbone: default: whether the backbone trains.
        final_directory: where the files will be moved to; the heads' config points at the backbone there.
        Other arguments of transformers' method are accepted and not needed: heads are one safetensors file.
        """
        if not is_main_process:
            return
        directory = Path(save_directory)
        if state_dict is None:
            state_dict = self.state_dict()
        if include_backbone is None:
            include_backbone = not self.backbone_frozen
        if include_backbone:
            mine = under("backbone.", state_dict)
            for name, source in self.backbone.all_tied_weights_keys.items():
                mine[name] = mine[source]  # gathered twice, tied no longer, they would be written twice
            self.backbone.save_pretrained(directory, state_dict=mine)
        if len(self.medusa_heads) == 0:
            return
        config = self.config.to_dict()
        if include_backbone:
            config["base_model_name_or_path"] = str(Path(final_directory or directory).resolve())
            directory = directory / HEADS_DIR
        save_heads(under("medusa_heads.", state_dict), config, directory)

    @classmethod
    def from_pretrained(cls, directory, base_model_name_or_path=None, dtype=None, heads_dtype=None, **kwargs):
        """Loads what `save_pretrained` wrote, from its directory or from a stage 2 directory's `medusa_heads/`.

        base_model_name_or_path: the backbone, if it is no longer where config.json says.
        dtype, heads_dtype: of backbone and heads; default: as saved. kwargs go to `AutoModelForCausalLM`.
        """
        heads_dir, base = find_heads(directory)
        fields, state_dict = load_heads(heads_dir)
        config = MedusaConfig(**fields)
        base = str(base_model_name_or_path or base or config.base_model_name_or_path)
        backbone = load_backbone(base, dtype=dtype or "auto", **kwargs)
        if heads_dtype is None:
            heads_dtype = next(iter(state_dict.values())).dtype
        model = cls.from_backbone(backbone, config, dtype=heads_dtype)
        model.medusa_heads.load_state_dict(state_dict, strict=True)
        return model.eval()


def under(prefix: str, state_dict: dict) -> dict:
    """The entries whose name starts with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


AutoConfig.register("medusa", MedusaConfig)  # or AutoTokenizer warns about a heads directory's config.json
