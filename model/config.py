"""config.json of a heads directory."""

import transformers
from transformers import AutoConfig, PreTrainedConfig


class MedusaConfig(PreTrainedConfig):
    """Of the heads alone. `MedusaModel.from_backbone` fills in the sizes."""

    model_type = "medusa"
    medusa_num_heads: int = 5
    medusa_num_layers: int = 1
    base_model_name_or_path: str | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None
    medusa_vocab_size: int | None = None  # V' of a draft vocabulary

    def to_dict(self) -> dict:
        # Only what describes the heads. TGI recognises a Medusa directory by the absence of `architectures`.
        keys = ["model_type", "medusa_num_heads", "medusa_num_layers", "base_model_name_or_path"]
        keys += ["medusa_vocab_size"] if self.medusa_vocab_size is not None else []
        fields = {key: getattr(self, key) for key in (*keys, "hidden_size", "vocab_size")}
        return fields | {"transformers_version": transformers.__version__}


AutoConfig.register("medusa", MedusaConfig)  # else AutoTokenizer warns about config.json of a heads directory
