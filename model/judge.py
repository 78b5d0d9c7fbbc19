"""Is the model what heads are trained for? Its own output is asked, on a short random text, and no list of names.

Heads start as copies of the `lm_head`, and all losses here are of (soft-capped) `lm_head(hidden)`. With a backbone
that does something else to its logits, heads would be trained for another model without a word. So they would if a
packed row's conversations saw each other. Both are found by running it: 16 or 32 tokens, before the first step.
"""

from collections.abc import Callable

import torch

from common.errors import BadInput

# How far logits of the same text may part, over the spread (largest less smallest) of their position: by the same
# kernels, where only what follows the lm_head can differ, and by others, which round every layer otherwise. Measured
# (docs/design.md): 0, and with others 1e-6 in fp32, 0.016 in bf16. What is wrong parts by 0.001 to 5 in random models.
SAME_KERNELS = {torch.float32: 5e-5, torch.bfloat16: 0.03}
OTHER_KERNELS = {torch.float32: 5e-5, torch.bfloat16: 0.06}
LENGTH = 16  # tokens of a text

Logits = Callable[..., torch.Tensor]  # (input_ids [B, T], position_ids=None) -> [2, B, T, V]: ours, the backbone's own


def random_text(vocab_size: int, rows: int = 1) -> torch.Tensor:
    """int64 `[rows, LENGTH]`, always the same. The run's own random numbers stay as they are."""
    return torch.randint(vocab_size, (rows, LENGTH), generator=torch.Generator().manual_seed(0))


def apart(ours: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Logits `[..., V]` -> `[...]`: the largest difference of a position over the spread of `own` there. NaN counts as
    infinite."""
    ours, own = ours.float(), own.float()
    spread = (own.amax(-1) - own.amin(-1)).clamp(min=torch.finfo(torch.float32).tiny)
    return ((ours - own).abs().amax(-1) / spread).nan_to_num(torch.inf)


def check_whole(model):
    """`check_logits` of a MedusaModel that is in eval mode, on its device and not sharded."""

    def logits(input_ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=input_ids, own_logits=True).logits

    check_logits(logits, model, model.lm_head.weight.device, model.lm_head.weight.dtype)


def check_logits(logits: Logits, model, device: torch.device, dtype: torch.dtype):
    """Raises BadInput if the backbone's own logits are not those of its heads' losses.

    model: the MedusaModel, on `device`. dtype: in which it computes.
    """
    ids = random_text(model.config.vocab_size).to(device)
    ours, own = logits(ids)
    if not (finite := own.isfinite()).all():
        raise BadInput(
            f"{(~finite).float().mean():.0%} of the logits of {name_of(model)} are NaN or infinite on a random text: "
            f"its weights are damaged, or too large for {str(dtype)[6:]}"
        )
    found = apart(ours, own).max().item()
    if found > SAME_KERNELS[dtype]:
        capped = "lm_head(hidden)," if model.softcap is None else f"lm_head(hidden), soft-capped at {model.softcap:g},"
        raise BadInput(
            f"the logits of {name_of(model)} are not {capped} which heads are copied from: on a random text they "
            f"differ by up to {(ours.float() - own.float()).abs().max():.3g}, {found:.2%} of their spread. Its heads "
            "would learn to guess for another model, so it is not supported"
        )


def check_packing(logits: Logits, model, device: torch.device, dtype: torch.dtype):
    """Raises BadInput if conversations of a packed row see each other."""
    parts = random_text(model.config.vocab_size, rows=2).to(device)
    positions = torch.arange(LENGTH, device=parts.device).repeat(2)[None]
    packed, alone = logits(parts.view(1, -1), positions)[0, 0, LENGTH:], logits(parts)[0, 1]
    found = apart(packed, alone).median().item()  # one position may part by itself: a token that goes to other experts
    if found > OTHER_KERNELS[dtype]:
        raise BadInput(
            f"--packing: conversations that share a row see each other in {name_of(model)}: the second one's logits "
            f"differ by up to {(packed.float() - alone.float()).abs().max():.3g}, {found:.2%} of their spread, from "
            "those that it has alone. Train without --packing"
        )


def name_of(model) -> str:
    return type(model.backbone).__name__
