"""What MedusaModel.forward returns."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class MedusaOutput(ModelOutput):
    """With labels:
    loss: the sum over the heads of head_weights[k] * L_k.
    head_losses, head_accuracies (top-1): `[K+1]`, index = head. NaN for head 0 if it was not computed; the loss of a
        head without rows is 0.
    head_sums: `[K+1, 3]`, what the two are computed from: summed loss, right guesses, rows.
    Without: logits `[K+1, B, T, V]`, or last_hidden_state `[B, T, H]` with output_hidden."""

    loss: torch.Tensor | None = None
    head_losses: torch.Tensor | None = None
    head_accuracies: torch.Tensor | None = None
    head_sums: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
