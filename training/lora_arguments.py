"""The flags of stage 2 by low-rank adapters (model/lora.py)."""

from dataclasses import dataclass, field

NAMES = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "preserve_coefficient")


@dataclass
class LoraArguments:
    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Stage 2 by LoRA: the backbone's weights stay as they are, and adapters of this rank train beside "
            "them (docs/lora.md). Default: the backbone itself trains."
        },
    )
    lora_alpha: int | None = field(
        default=None,
        metadata={"help": "Adapters are scaled by this over --lora_rank (default: 2, so twice the rank)."},
    )
    lora_dropout: float | None = field(
        default=None, metadata={"help": "The share of an adapter's inputs that is left out in training (default: 0)."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Linear layers with adapters, such as q_proj v_proj (default: all but the lm_head)."},
    )
    preserve_coefficient: float | None = field(
        default=None,
        metadata={
            "help": "Adds this times KL(p || q) to the loss, p and q being what the backbone says without its "
            "adapters and with them: so it stays what it was (default: 0). One more pass of the backbone a step."
        },
    )

    @property
    def preserves(self) -> bool:
        return bool(self.preserve_coefficient)
