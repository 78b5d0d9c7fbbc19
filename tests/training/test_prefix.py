"""--medusa_prefix_layer: a run whose heads have a layer before them is a run like any other."""

import json
from pathlib import Path

import pytest
import torch
from conftest import assert_same, logged, make_conversations, weights, write_jsonl
from safetensors.torch import load_file
from stored import HELD_OUT, ONLINE, offline

from common.errors import BadInput
from medusa_model import MedusaModel
from model.heads_file import HEADS_FILE

PREFIX = ("--medusa_prefix_layer", True)
FEW = ("--max_steps", 2, "--save_steps", 1, *PREFIX)
STAGE_1, STAGE_2 = (*FEW, "--medusa_only_heads", True), (*FEW, "--medusa_only_heads", False)
STILL = ("--learning_rate", 0.0, "--medusa_lr_multiplier", 1.0)
stages = pytest.mark.parametrize("flags", [STAGE_1, STAGE_2], ids=["stage 1", "stage 2"])


@stages
def test_the_whole_layer_trains_and_the_backbone_as_the_stage_says(flags, train, model_dir):
    out = train(*flags, "--max_steps", 4, "--eval_holdout", 6, "--save_steps", 10)
    heads = out if flags == STAGE_1 else out / "medusa_heads"
    model, fresh = MedusaModel.from_pretrained(heads), train(*flags, *STILL, output="fresh")
    fresh = MedusaModel.from_pretrained(fresh if flags == STAGE_1 else fresh / "medusa_heads")
    for part in (model.prefix, model.medusa_heads):
        other = dict((fresh.prefix if part is model.prefix else fresh.medusa_heads).named_parameters())
        assert not [name for name, tensor in part.named_parameters() if torch.equal(tensor, other[name])]
    before = load_file(Path(model_dir) / "model.safetensors")
    same = [
        torch.equal(before[name], tensor) for name, tensor in model.backbone.state_dict().items() if name in before
    ]
    assert len(same) > 5 and (all(same) if flags == STAGE_1 else not any(same))
    assert logged(out, "eval_head_2_loss")[-1] > 0


@stages
@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_one_head_after_the_other_equals_all_at_once(kind, flags, train_both_ways):
    common = (*flags, "--medusa_head_type", kind, "--medusa_loss", "kl", "--gradient_accumulation_steps", 2)
    one_by_one, plain = train_both_ways(*common, "--medusa_vocab_size", 40, "--adam_epsilon", 1e-4)
    assert logged(plain) == pytest.approx(logged(one_by_one), rel=1e-5)
    assert_same(weights(plain), weights(one_by_one), rtol=1e-4, atol=1e-5)


@stages
def test_packed_equals_unpacked(flags, train, tmp_path):
    data = write_jsonl(tmp_path / "few.jsonl", make_conversations(24, seed=3))
    common = (*flags, "--data_path", data, "--model_max_length", 200, "--optim", "sgd")
    common += ("--per_device_train_batch_size", 24, "--learning_rate", 0.1)
    packed, unpacked = train(*common, "--packing", True, output="packed"), train(*common, output="unpacked")
    for key in ("loss", "head_1_loss", "head_2_loss", "grad_norm"):
        assert logged(packed, key) == pytest.approx(logged(unpacked, key), rel=1e-4)
    assert_same(weights(packed), weights(unpacked), rtol=1e-4, atol=1e-5)


def test_from_stored_states_as_online(train, store):
    states, how = store("--dtype", "float32", *HELD_OUT), (*PREFIX, "--eval_strategy", "steps", "--eval_steps", 2)
    online, stored = train(*ONLINE, *how, *HELD_OUT, output="online"), train(*offline(states), *how, output="stored")
    assert_same(weights(stored), weights(online), rtol=1e-5, atol=1e-6)
    for key in ("loss", "grad_norm", "head_2_top1", "eval_head_2_loss"):
        assert logged(stored, key) == pytest.approx(logged(online, key), rel=1e-5) and len(logged(online, key)) >= 4


@stages
def test_resumed_equals_never_stopped(flags, train):
    constant = ("--lr_scheduler_type", "constant")
    train(*flags, *constant, "--max_steps", 1, output="part")
    whole = train(*flags, *constant, output="whole")
    again = (*flags, *constant, "--resume_from_checkpoint", True)
    assert_same(weights(train(*again, output="part")), weights(whole))
    with pytest.raises(BadInput, match="trained with --medusa_prefix_layer True, not False"):
        train(*again, "--medusa_prefix_layer", False, output="whole")


def test_a_run_goes_on_with_the_layer_it_starts_from(train):
    first = train(*STAGE_1, output="first")
    start = ("--medusa_heads_path", first, *STILL)
    for number, flags in enumerate((STAGE_2, [*STAGE_2[:4], *STAGE_2[6:]])):  # asked for; as the heads have it
        second = train(*flags, *start, output=f"second-{number}")
        assert_same(load_file(second / "medusa_heads" / HEADS_FILE), load_file(first / HEADS_FILE))
        assert json.loads((second / "medusa_heads" / "config.json").read_text())["medusa_prefix_layer"] is True
    with pytest.raises(BadInput, match=r"--medusa_prefix_layer False: the heads in .* have a prefix layer"):
        train(*STAGE_2, *start, "--medusa_prefix_layer", False, output="refused")


def test_refused(train, tmp_path):
    with pytest.raises(BadInput, match="--medusa_prefix_layer is of heads, and --medusa_return False has none"):
        train(*STAGE_2, "--medusa_return", False)
    assert not (tmp_path / "out").exists()
