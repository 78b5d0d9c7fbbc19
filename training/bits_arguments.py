"""The flags of what takes less memory: a frozen backbone in few bits (model/bits.py), and the optimiser."""

from dataclasses import dataclass, field

from model.bits import BITS


@dataclass
class BitsArguments:
    backbone_dtype: str | None = field(
        default=None,
        metadata={
            "help": "What a frozen backbone is kept in. nf4: a quarter of bfloat16's memory; int8: a half; fp8: as "
            "much, but faster products on GPUs that have them (H100 and later). Heads learn from what the backbone "
            "says so (docs/one-card.md). Default: bfloat16 with --bf16 True, else float32.",
            "choices": ["bfloat16", *BITS],
        },
    )
    fp8_backbone: bool = field(default=False, metadata={"help": "An older name of --backbone_dtype fp8."})

    optim: str = field(
        default="adamw_torch_fused",
        metadata={"help": "The optimiser: a name that transformers has, or muon (training/muon.py)."},
    )
    muon: bool = field(default=False, init=False)  # --optim muon, which transformers does not know

    @property
    def bits(self) -> str | None:
        """What the backbone's weights are quantised to; None: not at all."""
        kind = "fp8" if self.fp8_backbone and self.backbone_dtype is None else self.backbone_dtype
        return None if kind == "bfloat16" else kind
