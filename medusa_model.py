"""A causal LM with K Medusa heads (arXiv 2401.10774, section 2.1). It wraps the backbone and does not patch it.

    backbone = AutoModelForCausalLM.from_pretrained("meta-llama/Meta-Llama-3-8B-Instruct")
    model = MedusaModel.from_backbone(backbone, MedusaConfig(medusa_num_heads=3, medusa_num_layers=1))
    model.freeze_backbone()          # stage 1; leave it out for stage 2
    model(input_ids, labels=labels).loss.backward()

Head k (k = 1..K) predicts the token at t + k + 1 from the last hidden state h_t. The backbone's own `lm_head` is
head 0 and predicts the token at t + 1. A head is n ResBlocks and its own projection to the vocabulary, or to a draft
vocabulary (model/vocabulary.py); other types of heads know the tokens before their guess too (model/path_heads.py).
"""

import functools
import os
import pathlib
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from conversations.targets import count_rows, shifted_targets
from model.backbone import check_backbone, load_backbone, use_liger
from model.config import MedusaConfig
from model.heads import HeadLoss, Path, Teacher, Text, projection_loss, until
from model.heads_file import HEADS_FILE, TOKEN_MAP, base_of, find_heads, load_heads, under
from model.loss import cap, choose_impl
from model.output import MedusaOutput
from model.path_heads import HEAD_TYPES, make_heads
from model.prefix import PREFIX, load_prefix, make_prefix, run_prefix, use_liger_in_prefix
from model.varlen import places
from model.vocabulary import to_draft, to_full
from model.writing import write_model


class MedusaModel(PreTrainedModel):
    """Any causal LM with `get_decoder()` and `get_output_embeddings()`, as `backbone`, and `medusa_heads`."""

    config_class = MedusaConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False

    def __init__(self, config: MedusaConfig, backbone: PreTrainedModel):
        super().__init__(config)
        self.backbone, self.medusa_heads = backbone, make_heads(config)
        self.prefix: PreTrainedModel | None = None  # until from_backbone()
        kind = HEAD_TYPES[config.medusa_head_type]
        self.reads_path, self.reads_embeds = kind.reads_path, kind.reads_embeds
        # No post_init(): it would initialise the zero ResBlocks at random.
        text_config = backbone.config.get_text_config()
        self.softcap = getattr(text_config, "final_logit_softcapping", None)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # the Trainer compares them with the tokenizer's
            setattr(config, name, getattr(text_config, name, None))
        self.loss_impl, self.has_liger = "torch", False  # until choose_kernels()
        self.medusa_loss = "ce"  # of the heads: against the next tokens; kl, lk: against the backbone's distribution
        self.preserves = False  # whether head_loss(K + 1) is how far adapters took the backbone from itself
        self.backbone_frozen = False
        units = [*(backbone._no_split_modules or [])]  # of FSDP
        self._no_split_modules = units + [kind.__name__] * (config.medusa_num_heads > 0)

    @classmethod
    def from_backbone(
        cls, backbone: PreTrainedModel, config: MedusaConfig, dtype=None, fill: bool = True, token_map=None
    ) -> "MedusaModel":
        """Adds untrained heads, whose logits equal the `lm_head`'s exactly. dtype: of the heads (default: the
        backbone's). fill=False leaves them uninitialised, for a process that receives the weights from another.
        token_map: int64 `[V']`, the only tokens that they guess, ascending (model/vocabulary.py; default: all)."""
        lm_head = backbone.get_output_embeddings()
        check_backbone(backbone, lm_head)
        vocab_size, hidden_size = lm_head.weight.shape
        config.set_sizes(vocab_size, hidden_size, backbone.name_or_path or type(backbone).__name__)
        if config.base_model_name_or_path is None:
            name = backbone.name_or_path or ""
            config.base_model_name_or_path = os.path.abspath(name) if os.path.isdir(name) else name
        config.medusa_vocab_size = None if token_map is None else len(token_map)
        with torch.device("meta"):  # saves the random init of K x vocab x hidden numbers, which would be overwritten
            model = cls(config, backbone)
        model.medusa_heads.to(dtype=dtype or lm_head.weight.dtype).to_empty(device=lm_head.weight.device)
        model.medusa_heads.start_from(lm_head.weight, token_map, fill)
        if config.medusa_prefix_layer:
            model.prefix = make_prefix(backbone, dtype or lm_head.weight.dtype, lm_head.weight.device)
        return model

    def choose_kernels(self, use_liger: bool, device: torch.device):
        """Chooses how the heads' loss is computed on `device`, and on a GPU puts Liger's kernels into the backbone."""
        self.loss_impl = choose_impl(use_liger, device)
        if use_liger and device.type == "cuda":
            self.use_liger_in_backbone()

    def use_liger_in_backbone(self):
        """Liger's RMSNorm, RoPE and SwiGLU: a kernel each. Does nothing the second time."""
        if not self.has_liger:
            use_liger(self.backbone)
            if self.prefix is not None:
                use_liger_in_prefix(self.prefix)
            self.has_liger = True

    def freeze_backbone(self):
        """Stage 1: the backbone stores no activations, gets no gradient and stays in eval mode."""
        self.backbone.requires_grad_(False)
        self.backbone_frozen = True
        self.backbone.eval()

    def train(self, mode: bool = True):
        super().train(mode)
        if self.backbone_frozen:
            self.backbone.eval()
        return self

    @property
    def token_map(self) -> torch.Tensor | None:
        return self.medusa_heads.token_map

    @property
    def lm_head(self) -> nn.Linear:
        return self.backbone.get_output_embeddings()

    def get_input_embeddings(self):
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self):
        return self.lm_head

    def read(self, input_ids, attention_mask=None, position_ids=None, hidden=None) -> tuple[torch.Tensor, Text | None]:
        """`[B, T]` -> `[B, T, H]`, the input of all heads: the decoder's output after its last norm. And the text, if
        heads read their paths. hidden: that output, if it is stored (store_states.py). It still comes through here,
        where FSDP2 sees a step begin, and where the embeddings are whole."""
        tokens, embeds = {"input_ids": input_ids}, None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.backbone_frozen):
            if self.reads_embeds:
                embeds = self.backbone.get_input_embeddings()(input_ids)
                tokens = {"inputs_embeds": embeds}
            if hidden is None:
                hidden = self.backbone.get_decoder()(
                    **tokens, attention_mask=attention_mask, use_cache=False, **places(self.backbone, position_ids)
                ).last_hidden_state
        return hidden, Text(input_ids, None if embeds is None else embeds.detach()) if self.reads_path else None

    def last_hidden_state(self, *args, **kwargs) -> torch.Tensor:
        """`[B, T, H]`, the first that `read` returns."""
        return self.read(*args, **kwargs)[0]

    def for_heads(self, hidden: torch.Tensor, **kwargs) -> torch.Tensor:
        """hidden `[B, T, H]` as heads 1 to K see it: through the prefix layer, if there is one. kwargs: of `read`."""
        return hidden if self.prefix is None else run_prefix(self.prefix, hidden, **kwargs)

    def path(self, ids: torch.Tensor) -> Path | None:
        """Tokens `[..., k]` between a hidden state and head k's guess -> what the head may read of them, without
        gradient. None if heads read no path."""
        if not self.reads_path:
            return None
        return Path(ids, self.backbone.get_input_embeddings()(ids).detach() if self.reads_embeds else None)

    def original(self, read: Callable, *args, **kwargs) -> torch.Tensor | None:
        """hidden `[B, T, H]` of the backbone without its adapters; None if nothing is compared with it. read: ours, or
        where FSDP2's root is in its forward, the class's."""
        if not self.preserves:
            return None
        from model.lora import adapters_off  # not at the top: peft is slow to import, and few need it

        with torch.no_grad(), adapters_off(self.backbone):
            return read(*args, **kwargs)[0]

    @property
    def num_losses(self) -> int:
        """Of head_loss: K + 1, and one more if the backbone is to stay what it was."""
        return len(self.medusa_heads) + 1 + self.preserves

    def head_loss(self, k: int, hidden, seen, labels, text: Text | None, position_ids=None, original=None) -> HeadLoss:
        """Head k's loss on (unshifted) labels `[B, T]`; k = 0 is the backbone's `lm_head`. hidden `[B, T, H]` and text
        are what `read` gave, seen `[B, T, H]` what `for_heads` made of it. k = K + 1: KL(p || q) in head 0's rows, of
        the backbone's distributions without adapters (p, from `original`) and with them (q)."""
        if k > len(self.medusa_heads):
            return self.lm_head_loss(hidden, shifted_targets(labels, 1, position_ids), original)
        targets = shifted_targets(labels, k + 1, position_ids)
        if k > 0:
            teacher = None
            if self.medusa_loss != "ce":
                teacher = Teacher(self.medusa_loss, hidden.detach(), self.teacher_weight(), k)
            drafted = to_draft(targets, self.token_map)
            out = self.medusa_heads[k - 1](seen, drafted, self.loss_impl, self.softcap, teacher, until(text, k))
            # A row whose target heads cannot guess costs no product and has no loss, but it is a row, and a miss.
            return out if self.token_map is None else out._replace(rows=count_rows(targets))
        return self.lm_head_loss(hidden, targets)

    def teacher_weight(self) -> torch.Tensor:
        """`[V, H]`, of the lm_head, or its `[V', H]` rows: the teacher's softmax is over the tokens of the heads'.
        (Under FSDP2 the instance's own gathers it first: training/fsdp.py.)"""
        weight = self.lm_head.weight.detach()
        return weight if self.token_map is None else weight[self.token_map]

    def lm_head_loss(self, hidden, targets, original=None) -> HeadLoss:
        weight = self.lm_head.weight
        teacher = None if original is None else Teacher("kl", original, weight, 0)
        return projection_loss(hidden, targets, weight, self.loss_impl, self.softcap, teacher=teacher)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        head_weights: list[float] | None = None,
        rows: torch.Tensor | None = None,
        output_hidden: bool = False,
        hidden: torch.Tensor | None = None,
        own_logits: bool = False,
    ) -> MedusaOutput:
        """Runs all heads forward; the caller runs one backward. training/trainer.py does one head after the other
        instead where it can, to save memory. input_ids, attention_mask, position_ids and labels are `[B, T]`.

        head_weights: `num_losses` weights of the losses. Default: 1, but 0 for head 0 if the backbone is frozen.
            Head 0 is not computed if its weight is 0.
        rows: `[num_losses]` row counts of the whole step, at least 1, to divide the sums by. Default: this batch's.
        own_logits: without labels: `[2, B, T, V]`, head 0's logits and the backbone's own (model/judge.py).
        Heads that read the path to their guess are given the one of input_ids. Their logits mean nothing where it
        would leave the row or, in packed rows, the conversation.
        """
        # The class's method: under FSDP2 the instance's own gathers the root unit's weights, which are whole here.
        read = functools.partial(MedusaModel.read, self)
        original = None if labels is None else self.original(read, input_ids, attention_mask, position_ids)
        hidden, text = read(input_ids, attention_mask, position_ids, hidden)
        if output_hidden:
            return MedusaOutput(last_hidden_state=hidden)
        if own_logits:
            ours = cap(self.lm_head(hidden), self.softcap)
            own = self.backbone(input_ids=input_ids, use_cache=False, **places(self.backbone, position_ids)).logits
            return MedusaOutput(logits=torch.stack([ours, own.to(ours)]))
        seen = self.for_heads(hidden, attention_mask=attention_mask, position_ids=position_ids)
        if labels is None:
            lm_logits = cap(self.lm_head(hidden), self.softcap)
            heads = [
                to_full(head(seen, softcap=self.softcap, text=until(text, k)), self.token_map, lm_logits)
                for k, head in enumerate(self.medusa_heads, 1)
            ]
            return MedusaOutput(logits=torch.stack([lm_logits, *heads]))
        head_weights = head_weights or [0.0 if self.backbone_frozen else 1.0] + [1.0] * (self.num_losses - 1)
        first = 1 if head_weights[0] == 0 else 0
        sums = torch.zeros(self.num_losses, 3, dtype=torch.float64, device=hidden.device)
        losses = sums.new_full((len(sums),), torch.nan, dtype=torch.float32)
        total = sums.new_zeros((), dtype=torch.float32)
        for k in range(first, len(sums)):
            out = self.head_loss(k, hidden, seen, labels, text, position_ids, original)
            out.add_to(sums[k])
            loss = out.loss_sum / (max(1, out.rows) if rows is None else rows[k])
            losses[k] = loss.detach()
            total = total + head_weights[k] * loss
        accuracies = (sums[:, 1] / sums[:, 2].clamp(min=1)).float()
        accuracies[:first] = torch.nan
        return MedusaOutput(loss=total, head_losses=losses, head_accuracies=accuracies, head_sums=sums)

    def save_pretrained(  # type: ignore[override]  # takes no options for shards, variants and uploads
        self,
        save_directory,
        is_main_process=True,
        state_dict=None,
        include_backbone=None,
        final_directory=None,
        **kwargs,
    ):
        """Writes the heads alone (stage 1), or the backbone's checkpoint with the heads in `medusa_heads/` (stage 2).
        state_dict: unsharded tensors by name, if the model holds only shards.
        include_backbone: default: True if the backbone is not frozen. Other arguments are ignored.
        final_directory: where the caller will move the files; the heads' config names the backbone there.
        """
        if not is_main_process:
            return
        include_backbone = not self.backbone_frozen if include_backbone is None else include_backbone
        state_dict = self.state_dict() if state_dict is None else state_dict
        write_model(self, pathlib.Path(save_directory), state_dict, include_backbone, final_directory)

    def load_heads(self, state_dict: dict[str, torch.Tensor], source):
        """Loads the tensors of a heads file (without its token_map). source: the file, for errors."""
        # Heads that share the lm_head have no projections there: they keep the copies that they started as.
        heads = {name: tensor for name, tensor in state_dict.items() if not name.startswith(PREFIX)}
        self.medusa_heads.load_state_dict(self.medusa_heads.state_dict() | heads)
        load_prefix(self.prefix, under(PREFIX, state_dict), source)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # loads heads and a backbone: other arguments than one model's
        cls, directory, base_model_name_or_path=None, dtype=None, heads_dtype=None, backbone=None, **kwargs
    ):
        """Loads what `save_pretrained` wrote, from its directory or from the `medusa_heads/` of a stage 2 directory.

        base_model_name_or_path: the backbone, if it is no longer where config.json says; backbone: one that is loaded.
        dtype, heads_dtype: of backbone and heads; default: as saved. kwargs go to `AutoModelForCausalLM`.
        """
        heads_dir, stage2 = find_heads(directory)
        fields, state_dict = load_heads(heads_dir)
        config = MedusaConfig(**fields)
        if backbone is None:
            base = str(base_model_name_or_path or stage2 or base_of(config, heads_dir))
            backbone = load_backbone(base, adapter=stage2, dtype=dtype or "auto", **kwargs)
        token_map = state_dict.pop(TOKEN_MAP, None)
        heads_dtype = heads_dtype or next(iter(state_dict.values())).dtype
        model = cls.from_backbone(backbone, config, dtype=heads_dtype, token_map=token_map)
        model.load_heads(state_dict, heads_dir / HEADS_FILE)
        return model.eval()
