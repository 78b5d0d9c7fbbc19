"""model/heads.py: ResBlocks, and the rows that enter them."""

import torch
from tiny import make_batch, make_model

from model.heads import ResBlock


def test_resblocks_are_separate_and_start_at_zero():
    model = make_model(heads=2, layers=2, random=False)
    blocks = [module for module in model.modules() if isinstance(module, ResBlock)]
    assert len({id(block.linear.weight) for block in blocks}) == len(blocks) == 4
    assert all(not p.any() for block in blocks for p in block.parameters())


def test_only_counting_rows_enter_a_head():
    model = make_model()
    ids, labels = make_batch()
    seen = []
    model.medusa_heads[1][0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    out = model.head_loss(2, *[model.last_hidden_state(ids)] * 2, labels, None)
    assert out.rows == 10 + 6  # labels 4..13 and 4..9, each three places before
    assert seen == [(16, 32)]


def test_head_without_a_row_has_loss_zero_and_zero_gradients():
    model = make_model()
    ids = torch.randint(90, (2, 3))  # head 2 and 3 look further than that
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.head_losses[2:].tolist() == [0, 0] and out.loss.isfinite()
    for parameter in model.medusa_heads[2].parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
