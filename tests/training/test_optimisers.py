"""--optim: optimisers that keep less than AdamW's two moments in fp32. Each trains, goes on bit for bit after a stop,
and is the same for one head after the other and for all at once; their values against AdamW's or a formula."""

import pytest
import torch
from conftest import assert_same, logged, saved_state, weights
from lab import STAGE_1, assert_close
from quantised import needs
from torch import nn

from common.errors import BadInput
from training.muon import MuonAndAdamW

SLOW = [needs("torchao"), pytest.mark.slow]  # torch.compile makes a kernel for each shape: half a minute
FEW_BYTES = [
    "adafactor",
    "muon",
    pytest.param("adamw_8bit", marks=needs("bitsandbytes")),
    pytest.param("adamw_torch_8bit", marks=SLOW),
]
FLAGS = ("--medusa_only_heads", True, "--learning_rate", 1e-3, "--lr_scheduler_type", "constant")


@pytest.mark.parametrize("optim", FEW_BYTES)
def test_a_resumed_run_is_one_that_never_stopped(optim, train):
    flags = (*FLAGS, "--optim", optim, "--save_steps", 2, "--weight_decay", 0.1)
    want = train(*flags, "--max_steps", 4, output="whole")
    train(*flags, "--max_steps", 2, output="cut")
    again = train(*flags, "--max_steps", 4, "--resume_from_checkpoint", True, output="cut")
    assert logged(again) == logged(want) and len(set(logged(want))) == 4
    assert_same(weights(again), weights(want))
    assert_same(saved_state(again / "checkpoint-4"), saved_state(want / "checkpoint-4"))


@pytest.mark.parametrize("optim", FEW_BYTES)
def test_one_head_after_the_other_and_all_at_once(optim, train_both_ways):
    ours, plain = train_both_ways(*FLAGS, "--optim", optim, "--max_steps", 2)
    assert logged(ours) == pytest.approx(logged(plain), rel=1e-5)
    # Adam's first steps are as long however small a gradient is, so rounding shows in the smallest ones.
    assert_same(weights(ours), weights(plain), rtol=0, atol=1e-4)


@pytest.mark.processes
@pytest.mark.parametrize(("optim", "atol"), [("muon", 5e-4), pytest.param("adamw_torch_8bit", 1e-5, marks=SLOW)])
def test_shards_of_fsdp2(lab, optim, atol):
    """As one process; and a run that goes on after a stop, on as many processes or on one, is one that never stopped.
    Muon rounds to bf16 in the middle: where sums of shards differ in the last bit, its steps differ by percents."""
    flags = STAGE_1 | {"--optim": optim, "--eval_strategy": "no", "--save_steps": 2, "--logging_steps": 2}
    flags |= {"--lr_scheduler_type": "constant", "--medusa_scheduler": "constant"}
    one, two = (lab.run(kind, flags | {"--max_steps": 4}) for kind in ("one process", "FSDP2"))
    assert_close(two.out, one.out, rel=1e-3 if optim == "muon" else 1e-5, atol=atol)
    for kind in ("FSDP2", "one process"):
        cut = lab.run("FSDP2", flags | {"--max_steps": 2})
        again = lab.run(kind, flags | {"--max_steps": 4, "--resume_from_checkpoint": True}, out=cut.out)
        if kind == "FSDP2":
            assert_same(weights(again.out), weights(two.out))
        assert_close(again.out, two.out, rel=1e-3 if optim == "muon" else 1e-5, atol=atol)


def test_muon_s_first_steps_by_its_formula():
    """Momentum, its Newton-Schulz iteration in fp32, and AdamW for the rest; decay and rate of each group."""
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(24, 16)), nn.Parameter(torch.randn(24))
    plain, start = nn.Parameter(vector.detach().clone()), matrix.detach().clone()
    rate, decay = 0.01, 0.1
    groups = [{"params": [matrix], "lr": rate, "weight_decay": decay, "muon": True}]
    groups.append({"params": [vector], "lr": 2 * rate, "weight_decay": 0.0, "muon": False})
    ours = MuonAndAdamW(groups, betas=(0.8, 0.9), eps=1e-6)
    adamw = torch.optim.AdamW([plain], lr=2 * rate, weight_decay=0.0, betas=(0.8, 0.9), eps=1e-6)
    momentum, want = torch.zeros_like(start), start.clone()
    for _ in range(3):
        matrix.grad, vector.grad = torch.randn_like(matrix), torch.randn_like(vector)
        plain.grad = vector.grad.clone()
        ours.step()
        adamw.step()
        momentum = 0.95 * momentum + 0.05 * matrix.grad
        x = 0.95 * momentum + 0.05 * matrix.grad  # Nesterov's
        x = x.T / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        want = want * (1 - rate * decay) - rate * 0.2 * 24**0.5 * x.T
    assert torch.equal(vector, plain)
    # torch iterates in bf16. 3 steps of 0.2 in root mean square at a rate of 0.01 come to 0.006 or less.
    assert ((matrix - want).norm() / (want - start).norm()).item() < 0.03


@needs("bitsandbytes")
def test_bitsandbytes_8_bits_stay_close_to_adamw(train):
    want, got = (
        weights(train(*FLAGS, "--optim", o, "--max_steps", 3, output=o)) for o in ("adamw_torch", "adamw_8bit")
    )
    apart = [(got[name] - want[name]).abs().mean().item() for name in want]
    assert 0 < max(apart) < 2e-4  # three steps of 1e-3: mean differences of less than a tenth of the way


def test_muon_without_matrices(train):
    with pytest.raises(BadInput, match="--optim muon is for the matrices of ResBlocks, and these heads have none"):
        train(*FLAGS, "--optim", "muon", "--medusa_num_layers", 0)
    with pytest.raises(BadInput, match="--optim muon takes none"):
        train(*FLAGS, "--optim", "muon", "--optim_args", "a=1", output="args")


@needs("torchao")
@pytest.mark.slow
def test_bf16_weights_keep_small_updates_on_average_if_they_are_rounded_by_chance():
    """A weight of 1 in bf16 has neighbours 1/256 and 1/128 away. 40 steps of 1e-4 are lost by rounding to the nearest,
    and kept by chance: the mean of 65,536 weights moves by their sum, to within four deviations."""
    from torchao.optim import AdamW8bit

    def moved(**kwargs) -> float:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.ones(256, 256, dtype=torch.bfloat16))
        optimiser = AdamW8bit([weight], lr=1e-4, weight_decay=0.0, **kwargs)
        for _ in range(40):
            weight.grad = torch.ones_like(weight)
            optimiser.step()
        return 1 - weight.float().mean().item()

    assert moved() == 0
    deviation = (40 * 1e-4 / 256) ** 0.5 / 256  # of a mean of 65,536, each of steps of 1/256 with mean 4e-3
    assert moved(bf16_stochastic_round=True) == pytest.approx(40 * 1e-4, abs=4 * deviation)
