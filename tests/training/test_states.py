"""Training from stored hidden states is training online, without the backbone's layers."""

import pickle
import shutil

import pytest
import torch
from conftest import assert_same, logged, make_conversations, weights, write_jsonl
from stored import HELD_OUT, ONLINE, offline

from callback import FlopCount
from common.errors import BadInput
from training.states import StoredRows, read_index
from training.trainer import MedusaTrainer


@pytest.mark.parametrize("loss", ["ce", "kl", "lk"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_are_those_of_a_run_that_computes_the_states(dtype, loss, train, store):
    """Six steps, with evaluation between them: bit for bit on a CPU. A GPU's products depend on the batch's shape."""
    states = store("--dtype", dtype, *HELD_OUT)
    how = ("--bf16", dtype == "bfloat16", "--medusa_loss", loss, "--eval_strategy", "steps", "--eval_steps", 2)
    online, stored = train(*ONLINE, *how, *HELD_OUT, output="online"), train(*offline(states), *how, output="stored")
    exact = not torch.cuda.is_available()
    assert_same(weights(stored), weights(online), **{} if exact else {"rtol": 0, "atol": 2e-2})
    for key in ("loss", "grad_norm", "head_2_loss", "head_2_top1", "eval_head_0_loss", "eval_head_2_top1"):
        got, want = logged(stored, key), logged(online, key)
        assert got == (want if exact else pytest.approx(want, rel=5e-2, abs=2e-2)) and len(got) >= 4
    names = {path.name for path in online.iterdir()}
    assert {path.name for path in stored.iterdir()} == names
    for name in names - {"trainer_state.json", "train_command.txt"}:
        if exact and (online / name).is_file():
            assert (stored / name).read_bytes() == (online / name).read_bytes(), name


@pytest.mark.parametrize(
    "flags",
    [
        ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2),
        ("--medusa_num_heads", 1),
        ("--dataloader_num_workers", 2),
        ("--train_sampling_strategy", "sequential"),
        ("--medusa_vocab_size", 40, "--medusa_loss", "kl"),  # the tokens are counted in the states
    ],
)
def test_flags_do_the_same(flags, train, store):
    states = store("--dtype", "float32", "--medusa_num_heads", 2)
    stored, online = train(*offline(states), *flags, output="b"), train(*ONLINE, *flags, output="a")
    assert_same(weights(stored), weights(online), rtol=1e-5, atol=5e-6)


@pytest.mark.slow
def test_states_of_another_dtype_become_that_of_the_run(train, store):
    """Rounded to bf16 they change the losses a little; not rounded at all, bf16 rounds them later."""
    for dtype, bf16 in (("bfloat16", False), ("float32", True)):
        how = ("--bf16", bf16, "--medusa_loss", "kl")
        stored = train(*offline(store("--dtype", dtype, output=dtype)), *how, output=f"stored-{dtype}")
        online = train(*ONLINE, *how, output=f"online-{dtype}")
        assert logged(stored) == pytest.approx(logged(online), rel=5e-2) and logged(stored) != logged(online)


def test_a_run_is_resumed_exactly_and_not_with_other_states(train, store):
    states = store()
    whole = train(*offline(states), output="whole")
    stopped = train(*offline(states), output="stopped")
    left = [path for path in stopped.iterdir() if path.name != "checkpoint-3"]
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resume = ("--resume_from_checkpoint", True)
    others = (*offline(store("--dtype", "float32", output="others")), *resume)
    for flags in (others, (*ONLINE, *resume)):
        with pytest.raises(BadInput, match="checkpoint-3 was trained on other data"):
            train(*flags, output="stopped")
    assert_same(weights(train(*offline(states), *resume, output="stopped")), weights(whole))


def test_no_layer_is_built_and_no_flop_of_one_counted(train, store, monkeypatch):
    found = []
    start = MedusaTrainer.train
    monkeypatch.setattr(MedusaTrainer, "train", lambda self, **how: found.append(self) or start(self, **how))
    train(*offline(store()))
    (trainer,) = found
    assert len(trainer.medusa.backbone.get_decoder().layers) == 0
    assert {name for name, _ in trainer.medusa.backbone.named_parameters()} == {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
    }  # fmt: skip
    flops = FlopCount.of(trainer.medusa)
    assert (flops.per_token, flops.per_pair) == (0, 0)
    assert flops.per_row == [0, *[6.0 * (320 * 32 + 32 * 32 + 32)] * 2]


def test_the_rows_can_be_looked_at(train, store, capsys):
    train(*offline(store(*HELD_OUT)), "--show_data", 2)
    assert capsys.readouterr().out.count("--- row") == 2


# ---- the rows ----


def test_rows_and_columns(store, monkeypatch):
    monkeypatch.setattr("training.store_plan.SHARD_BYTES", 10_000)
    states = store(*HELD_OUT)
    index = read_index(states)
    rows = StoredRows(states, index["shards"]["train"], index, torch.float32)
    assert len(rows) == 40 and len(rows.paths) > 5
    everything = [rows[i] for i in range(40)]
    for name in ("input_ids", "labels"):
        for column, row in zip(rows[name], everything, strict=True):
            assert (column == row[name]).all()
    assert rows["length"] == [len(row["hidden"]) for row in everything] == [len(r["labels"]) for r in everything]
    assert everything[3]["hidden"].dtype == torch.float32
    again = pickle.loads(pickle.dumps(rows))
    assert rows.files and not again.files
    assert torch.equal(again[39]["hidden"], everything[39]["hidden"])


def test_rows_are_in_the_order_of_the_online_run(train, store, monkeypatch, tmp_path):
    """And evaluated in the same order: shortest first. Here one evaluation file of its own."""
    evaluated = write_jsonl(tmp_path / "eval.jsonl", make_conversations(9, seed=3))
    monkeypatch.setattr("training.store_plan.SHARD_BYTES", 9_000)
    seen = []
    start = MedusaTrainer.train
    monkeypatch.setattr(MedusaTrainer, "train", lambda self, **how: seen.append(self) or start(self, **how))
    train(*ONLINE, "--eval_data_path", evaluated, output="online")
    train(*offline(store("--eval_data_path", evaluated)), output="stored")
    online, stored = seen
    for a, b in ((online.train_dataset, stored.train_dataset), (online.eval_dataset, stored.eval_dataset)):
        assert len(a) == len(b) and list(a["length"]) == b["length"]
        for one, other in zip(a, (b[i] for i in range(len(b))), strict=True):
            assert all((one[key] == other[key]).all() for key in ("input_ids", "labels"))
