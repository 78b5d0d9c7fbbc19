"""The model that a program decodes or measures with."""

import torch

from medusa_model import MedusaModel
from model.judge import check_whole


def load_model(heads: str, base_model: str | None, dtype: str | None, bits: str | None = None) -> MedusaModel:
    """Backbone and heads, on the GPU if there is one. dtype: of both (default: bfloat16 on a GPU, else float32).
    bits: of the backbone, if it is to be quantised (model/bits.py).
    Raises BadInput if they cannot be loaded, or if the backbone's logits are not the `lm_head`'s."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype or ("bfloat16" if device == "cuda" else "float32"))
    model = MedusaModel.from_pretrained(heads, base_model, dtype=kind, heads_dtype=kind, bits=bits)
    model.to(device)
    check_whole(model)
    return model
