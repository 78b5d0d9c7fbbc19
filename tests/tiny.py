"""A tiny Medusa model and a batch for it, that several tests of medusa_model.py and model/ use."""

import torch
from conftest import make_backbone, randomise

from conversations.targets import IGNORE
from medusa_model import MedusaConfig, MedusaModel

SMALL = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def make_model(heads=3, layers=1, tied=False, random=True) -> MedusaModel:
    model = MedusaModel.from_backbone(
        make_backbone(tied, vocab_size=90), MedusaConfig(medusa_num_heads=heads, medusa_num_layers=layers)
    )
    if random:
        randomise(model.medusa_heads)
    return model


def make_batch():
    """Two rows; the first 4 labels and the padding of the second do not count."""
    ids = torch.randint(90, (2, 14))
    labels = ids.clone()
    labels[:, :4] = IGNORE
    labels[1, 10:] = IGNORE
    return ids, labels
