"""model/judge.py: models whose logits are others than ours, or whose packed conversations see each other, are refused;
good ones are not, in bf16 either."""

import pytest
import torch
from odd import make_odd

from common.errors import BadInput
from medusa_model import MedusaConfig, MedusaModel
from model.judge import apart, check_logits, check_packing, check_whole, random_text

BF16 = torch.bfloat16
GOOD = ("llama", "gemma2", "gpt2", "neox", "mixtral", "qwen3_moe")


def make(name, dtype=torch.float32, kind="medusa") -> MedusaModel:
    config = MedusaConfig(medusa_num_heads=1, medusa_head_type=kind)
    return MedusaModel.from_backbone(make_odd(name, dtype), config).eval()


def check(model, judge, dtype):
    def logits(input_ids, position_ids=None):
        with torch.no_grad():
            return model(input_ids=input_ids, position_ids=position_ids, own_logits=True).logits

    judge(logits, model, torch.device("cpu"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", GOOD)
def test_good_models_pass(name, dtype):
    model = make(name, dtype)
    check_whole(model)
    check(model, check_packing, dtype)
    check_whole(make(name, dtype, "hydra"))  # the decoder gets embeddings


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", ["falcon_h1", "recurrent_gemma"])
def test_other_logits_are_refused(name, dtype):
    """Those of Falcon-H1 are multiplied, those of RecurrentGemma capped by a name of its own."""
    with pytest.raises(BadInput, match=r"are not lm_head\(hidden\), .* differ by up to \d.*% of their spread"):
        check_whole(make(name, dtype))


def test_another_soft_cap_is_refused():
    model = make("gemma2")
    model.softcap = 4.0
    with pytest.raises(BadInput, match=r"soft-capped at 4, "):
        check_whole(model)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", ["opt", "falcon"])
def test_packed_conversations_that_see_each_other_are_refused(name, dtype):
    model = make(name, dtype)
    check_whole(model)
    with pytest.raises(BadInput, match=r"--packing: .* see each other in .*% of their spread.* without --packing"):
        check(model, check_packing, dtype)


def test_damaged_weights_are_told_apart():
    model = make("llama")
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(BadInput, match="NaN or infinite on a random text"):
        check(model, check_logits, torch.float32)


def test_the_measure():
    own = torch.tensor([[0.0, 10, 5], [100, 101, 102]])
    assert apart(own + torch.tensor([[1.0, 0, 0], [0, 0, 0.5]]), own).tolist() == pytest.approx([0.1, 0.25])
    assert apart(own * torch.nan, own).min() == torch.inf
    assert not apart(own[:1] * 0, own[:1] * 0).any()


def test_the_text_leaves_the_run_s_random_numbers_alone():
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(random_text(90), random_text(90)) and torch.equal(torch.rand(1), want)


@pytest.mark.parametrize("name", ["bloom", "mpt", "mamba", "xlstm"])
def test_models_without_places_are_refused(name):
    with pytest.raises(BadInput, match="takes no position_ids"):
        make(name)
