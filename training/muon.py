"""Muon (Jordan et al., 2024) for the matrices of ResBlocks, AdamW for all else (`--optim muon`).

Muon's step is the momentum made orthogonal: it is for matrices between hidden states, which projections to the
vocabulary and tables of tokens are not. It keeps one moment instead of two. An update is scaled to the size of
AdamW's (0.2 in root mean square, arXiv 2502.16982), so one learning rate serves both.
"""

from typing import Any

import torch
from torch import nn

from model.heads import ResBlock


def resblock_matrices(model: nn.Module) -> set[int]:
    """The ids of the parameters that Muon takes."""
    blocks = (module for module in model.modules() if isinstance(module, ResBlock))
    return {id(parameter) for block in blocks for parameter in block.parameters() if parameter.ndim == 2}


class MuonAndAdamW(torch.optim.Optimizer):
    """params: parameter groups; `muon` of a group says whether it is Muon's. kwargs: AdamW's.

    Two optimisers of torch, over the groups and the state of this one: a schedule, a checkpoint and FSDP see a single
    optimiser.
    """

    def __init__(self, params: list[dict], **kwargs):
        muon, adamw = ([group for group in params if group["muon"] is mine] for mine in (True, False))
        self.parts: list[torch.optim.Optimizer] = []
        if muon:
            self.parts.append(torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw"))
        if adamw:
            self.parts.append(torch.optim.AdamW(adamw, **kwargs))
        super().__init__(params, {})
        self._link()

    def _link(self):
        for part in self.parts:
            part.state = self.state
            is_muon = isinstance(part, torch.optim.Muon)
            part.param_groups = [group for group in self.param_groups if group["muon"] is is_muon]

    def __setstate__(self, state: dict[str, Any]):
        super().__setstate__(state)  # what is loaded has other groups and another state
        self._link()

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss
