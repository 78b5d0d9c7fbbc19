"""config.json of a heads directory."""

import transformers
from transformers import AutoConfig, PreTrainedConfig

from common.errors import BadInput


class MedusaConfig(PreTrainedConfig):
    """Of the heads alone. `MedusaModel.from_backbone` fills in the sizes."""

    model_type = "medusa"
    medusa_num_heads: int = 5
    medusa_num_layers: int = 1
    base_model_name_or_path: str | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None
    medusa_vocab_size: int | None = None  # V' of a draft vocabulary
    medusa_head_type: str = "medusa"  # of model/path_heads.py
    medusa_rank: int = 256  # r of markov heads
    medusa_prefix_layer: bool = False  # of model/prefix.py

    @property
    def sizes(self) -> tuple[int, int, int]:
        """H, V' (V without a draft vocabulary) and the number of ResBlocks."""
        assert self.hidden_size is not None and self.vocab_size is not None
        return self.hidden_size, self.medusa_vocab_size or self.vocab_size, self.medusa_num_layers

    def set_sizes(self, vocab_size: int, hidden_size: int, backbone: str):
        """Those of the backbone of this name. Raises BadInput if the heads were made for others."""
        for size, value in (("vocab_size", vocab_size), ("hidden_size", hidden_size)):
            if getattr(self, size) not in (None, value):
                raise BadInput(
                    f"the heads were made for {size} {getattr(self, size)}, but the backbone {backbone} has {value}: "
                    "use the backbone they were trained on"
                )
            setattr(self, size, value)

    def to_dict(self) -> dict:
        # Only what describes the heads. TGI recognises a Medusa directory by the absence of `architectures`.
        keys = ["model_type", "medusa_num_heads", "medusa_num_layers", "base_model_name_or_path"]
        keys += ["medusa_vocab_size"] if self.medusa_vocab_size is not None else []
        keys += ["medusa_head_type"] if self.medusa_head_type != "medusa" else []
        keys += ["medusa_rank"] if self.medusa_head_type == "markov" else []
        keys += ["medusa_prefix_layer"] if self.medusa_prefix_layer else []
        fields = {key: getattr(self, key) for key in (*keys, "hidden_size", "vocab_size")}
        # vLLM drops the biases of ResBlocks without a word unless config.json says that there are some.
        return fields | {"medusa_fc_bias": True, "transformers_version": transformers.__version__}


AutoConfig.register("medusa", MedusaConfig)  # else AutoTokenizer warns about config.json of a heads directory
