"""--medusa_head_type: a run with heads that read the path to their guess is a run like any other."""

import json

import pytest
import torch
from conftest import assert_same, logged, make_conversations, weights, write_jsonl
from safetensors.torch import load_file
from stored import HELD_OUT, ONLINE, offline

from common.errors import BadInput
from medusa_model import MedusaModel
from model.heads_file import HEADS_FILE
from training.checkpoints import RUN_FILE

MARKOV = ("--medusa_head_type", "markov", "--medusa_rank", 6)
HYDRA = ("--medusa_head_type", "hydra")
FEW = ("--max_steps", 2, "--save_steps", 1)
STAGE_1, STAGE_2 = (*FEW, "--medusa_only_heads", True), (*FEW, "--medusa_only_heads", False)


@pytest.mark.parametrize("flags", [STAGE_1, STAGE_2], ids=["stage 1", "stage 2"])
@pytest.mark.parametrize("kind", [MARKOV, HYDRA], ids=["markov", "hydra"])
def test_all_that_heads_have_trains(kind, flags, train):
    out = train(*flags, *kind, "--max_steps", 4, "--eval_holdout", 6, "--save_steps", 10)
    heads = out if flags == STAGE_1 else out / "medusa_heads"
    model = MedusaModel.from_pretrained(heads)
    assert model.config.medusa_head_type == kind[1] and model.config.medusa_rank == (6 if kind == MARKOV else 256)
    assert all(p.any() for p in model.medusa_heads.parameters())  # tables and ResBlocks start at zero
    assert logged(out, "eval_head_2_loss")[-1] > 0


@pytest.mark.parametrize("flags", [STAGE_1, STAGE_2], ids=["stage 1", "stage 2"])
@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("kind", [MARKOV, HYDRA], ids=["markov", "hydra"])
def test_one_head_after_the_other_equals_all_at_once(kind, loss, flags, train_both_ways):
    common = (*flags, *kind, "--medusa_loss", loss, "--gradient_accumulation_steps", 2, "--medusa_vocab_size", 40)
    common += ("--adam_epsilon", 1e-4)
    one_by_one, plain = train_both_ways(*common)
    assert logged(plain) == pytest.approx(logged(one_by_one), rel=1e-5)
    assert_same(weights(plain), weights(one_by_one), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [MARKOV, HYDRA], ids=["markov", "hydra"])
@pytest.mark.parametrize("flags", [STAGE_1, STAGE_2], ids=["stage 1", "stage 2"])
def test_packed_equals_unpacked(flags, kind, train, tmp_path):
    data = write_jsonl(tmp_path / "few.jsonl", make_conversations(24, seed=3))
    common = (*flags, *kind, "--data_path", data, "--max_steps", 2, "--model_max_length", 200, "--optim", "sgd")
    common += ("--per_device_train_batch_size", 24)
    packed, unpacked = train(*common, "--packing", True, output="packed"), train(*common, output="unpacked")
    for key in ("loss", "head_1_loss", "head_2_loss", "grad_norm"):
        assert logged(packed, key) == pytest.approx(logged(unpacked, key), rel=1e-4)
    assert_same(weights(packed), weights(unpacked), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [MARKOV, HYDRA], ids=["markov", "hydra"])
def test_from_stored_states_as_online(kind, dtype, train, store):
    states = store("--dtype", dtype, *HELD_OUT)
    how = (*kind, "--bf16", dtype == "bfloat16", "--eval_strategy", "steps", "--eval_steps", 2)
    online, stored = train(*ONLINE, *how, *HELD_OUT, output="online"), train(*offline(states), *how, output="stored")
    exact = not torch.cuda.is_available()
    assert_same(weights(stored), weights(online), **{} if exact else {"rtol": 0, "atol": 2e-2})
    for key in ("loss", "grad_norm", "head_2_top1", "eval_head_2_loss"):
        got, want = logged(stored, key), logged(online, key)
        assert got == (want if exact else pytest.approx(want, rel=5e-2, abs=2e-2)) and len(got) >= 4


@pytest.mark.parametrize("kind", [MARKOV, HYDRA], ids=["markov", "hydra"])
@pytest.mark.parametrize("flags", [STAGE_1, STAGE_2], ids=["stage 1", "stage 2"])
def test_resumed_equals_never_stopped(flags, kind, train):
    whole = train(*flags, *kind, output="whole")
    train(*flags, *kind, "--max_steps", 1, "--lr_scheduler_type", "constant", output="part")
    constant = train(*flags, *kind, "--lr_scheduler_type", "constant", output="constant")
    again = (*flags, *kind, "--lr_scheduler_type", "constant", "--resume_from_checkpoint", True)
    assert_same(weights(train(*again, output="part")), weights(constant))
    run = json.loads((whole / "checkpoint-2" / RUN_FILE).read_text())
    assert run["medusa_head_type"] == kind[1] and run.get("medusa_rank") == (6 if kind == MARKOV else None)
    other = HYDRA if kind == MARKOV else ()
    with pytest.raises(BadInput, match=f"--medusa_head_type {kind[1]}, not {'hydra' if other else 'medusa'}"):
        train(*flags, *other, "--resume_from_checkpoint", True, output="whole")
    if kind == MARKOV:
        with pytest.raises(BadInput, match="was trained with --medusa_rank 6, not 256"):
            train(*flags, *kind[:2], "--resume_from_checkpoint", True, output="whole")


def test_a_run_from_before_there_were_types_is_of_medusa_heads(train):
    out = train(*STAGE_1, "--max_steps", 1)
    path = out / "checkpoint-1" / RUN_FILE
    run = json.loads(path.read_text())
    assert run.pop("medusa_head_type") == "medusa" and "medusa_rank" not in run
    path.write_text(json.dumps(run))
    with pytest.raises(BadInput, match="--medusa_head_type medusa, not hydra"):
        train(*STAGE_1, *HYDRA, "--resume_from_checkpoint", True)
    train(*STAGE_1, "--resume_from_checkpoint", True)


@pytest.mark.parametrize("flags", [STAGE_1, STAGE_2], ids=["stage 1", "stage 2"])
def test_medusa_heads_are_the_default_byte_for_byte(flags, train):
    default, asked = train(*flags, output="default"), train(*flags, "--medusa_head_type", "medusa", output="asked")
    for name in (HEADS_FILE, "config.json") if flags == STAGE_1 else (f"medusa_heads/{HEADS_FILE}", "config.json"):
        assert (default / name).read_bytes() == (asked / name).read_bytes()
    heads = default if flags == STAGE_1 else default / "medusa_heads"
    assert set(json.loads((heads / "config.json").read_text())) == {
        *("model_type", "medusa_num_heads", "medusa_num_layers", "base_model_name_or_path"),
        *("hidden_size", "vocab_size", "medusa_fc_bias", "transformers_version"),
    }


@pytest.mark.parametrize("kind", [MARKOV, HYDRA], ids=["markov", "hydra"])
def test_a_run_goes_on_with_the_heads_it_starts_from(kind, train):
    first = train(*STAGE_1, *kind, output="first")
    start = ("--medusa_heads_path", first, "--learning_rate", 0.0, "--medusa_lr_multiplier", 1.0)
    for number, asked in enumerate(((), kind, kind[:2])):
        second = train(*STAGE_2, *start, *asked, output=f"second-{number}")
        assert_same(load_file(second / "medusa_heads" / HEADS_FILE), load_file(first / HEADS_FILE))
        assert json.loads((second / "medusa_heads" / "config.json").read_text())["medusa_head_type"] == kind[1]
    refused = [(("--medusa_head_type", "medusa"), f"--medusa_head_type medusa: the heads in .* are {kind[1]} heads")]
    if kind == MARKOV:
        refused += [(("--medusa_rank", 7), "--medusa_rank 7: the heads in .* have 6")]
    else:
        refused += [(("--medusa_rank", 7), "--medusa_rank 7 is of --medusa_head_type markov, and these are hydra")]
        refused += [(("--medusa_num_layers", 0), "hydra heads of 0 ResBlocks: at least 1")]
    for flags, message in refused:
        with pytest.raises(BadInput, match=message):
            train(*STAGE_2, *start, *flags, output="refused")
    assert not first.with_name("refused").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--medusa_head_type", "eagle"), "invalid choice: 'eagle'"),
        (("--medusa_head_type", "hydra", "--medusa_num_layers", 0), "--medusa_num_layers 0: --medusa_head_type hydra"),
        (("--medusa_head_type", "markov", "--medusa_rank", 0), "--medusa_rank 0: at least 1"),
        (("--medusa_head_type", "hydra", "--medusa_rank", 8), "--medusa_rank 8 is of --medusa_head_type markov"),
        (("--medusa_rank", 8), "--medusa_rank 8 is of --medusa_head_type markov, and these are medusa heads"),
        (("--medusa_head_type", "hydra", "--medusa_return", False), "--medusa_head_type hydra is of heads"),
    ],
)
def test_refused(flags, message, train, tmp_path):
    with pytest.raises(BadInput, match=message):
        train(*flags)
    assert not (tmp_path / "out").exists()
