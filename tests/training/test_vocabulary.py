"""--medusa_vocab_size: the tokens are those of the data, and a run with fewer of them is a run like any other."""

import json
import time

import datasets
import numpy as np
import pytest
import torch
from conftest import assert_same, logged, make_backbone, make_conversations, make_tokenizer, weights, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from common.errors import BadInput
from conversations.targets import IGNORE
from medusa_model import MedusaModel
from model.heads_file import HEADS_FILE
from training.trainer import MedusaTrainer
from training.vocabulary import count_labels, most_frequent

SIZE = 24
STAGE_1 = ("--medusa_only_heads", True, "--max_steps", 2, "--save_steps", 1)
STAGE_2 = ("--medusa_only_heads", False, "--max_steps", 2, "--save_steps", 1)


def token_map(out) -> list[int]:
    heads = out if (out / HEADS_FILE).exists() else out / "medusa_heads"
    return load_file(heads / HEADS_FILE)["token_map"].tolist()


def test_the_most_frequent_tokens():
    counts = np.array([0, 5, 2, 9, 0, 2, 0, 1])
    assert most_frequent(counts, 3, set()).tolist() == [1, 2, 3]  # of 2 and 5 the lower one
    assert most_frequent(counts, 3, {6, 4}).tolist() == [3, 4, 6]
    assert most_frequent(counts, 7, {6, 99, -1}).tolist() == [0, 1, 2, 3, 5, 6, 7]  # filled up with 0, not with 4
    assert most_frequent(counts, 8, set()).tolist() == list(range(8))


def rows(labels) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"labels": labels, "input_ids": labels}).with_format("numpy")


def test_labels_are_counted_in_any_dataset():
    rng = np.random.default_rng(0)
    labels = [rng.integers(0, 50, size=n).tolist() for n in rng.integers(0, 30, size=25_000)]
    labels = [[IGNORE if token < 10 else token for token in row] for row in labels]
    want = np.bincount([token for row in labels for token in row if token != IGNORE], minlength=60)
    assert want[10:50].all()
    assert (count_labels(rows(labels), 60) == want).all()
    half = rows(labels).select(range(24_999, 3, -2))  # another order, not as it lies in the file
    want = np.bincount([token for row in labels[5::2] for token in row if token != IGNORE], minlength=60)
    assert (count_labels(half, 60) == want).all()


def test_ten_million_labels_take_a_moment():
    data = rows([list(range(1000))] * 100)
    data = datasets.concatenate_datasets([data] * 100)
    start = time.perf_counter()
    assert (count_labels(data, 128_256)[:1000] == 10_000).all()
    assert time.perf_counter() - start < 5  # a loop over tokens takes longer


def test_heads_of_some_tokens_from_training_to_files(train, model_dir, caplog):
    """Those of the data, and those that end a text, though the data never have them."""
    GenerationConfig(eos_token_id=[1, 200, 201]).save_pretrained(model_dir)
    seen = []
    count = "training.vocabulary.most_frequent"
    with pytest.MonkeyPatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(count, lambda counts, *args: seen.append(counts) or most_frequent(counts, *args))
        out = train(*STAGE_1, "--medusa_vocab_size", SIZE, "--eval_holdout", 6)
    tokens = token_map(out)
    assert len(tokens) == SIZE and tokens == sorted(set(tokens)) and {1, 200, 201} <= set(tokens)
    assert seen[0][200] == seen[0][201] == 0
    least = min(seen[0][token] for token in tokens if token not in (1, 200, 201))
    assert all(seen[0][token] <= least for token in range(320) if token not in tokens)
    lines = [record.getMessage() for record in caplog.records if "the heads guess" in record.getMessage()]
    share = 100 * seen[0][tokens].sum() / seen[0].sum()
    assert lines[0] == f"the heads guess 24 of 320 tokens: {share:.2f} % of the training labels" and 50 < share < 100
    assert lines[1].endswith("of the evaluation labels") and len(lines) == 2
    assert json.loads((out / "config.json").read_text())["medusa_vocab_size"] == SIZE
    model = MedusaModel.from_pretrained(out)
    assert model.token_map.tolist() == tokens and model.medusa_heads[1][-1].weight.shape == (SIZE, 32)
    assert 0 < logged(out, "eval_head_1_top1")[-1] < 1


@pytest.mark.parametrize("flags", [STAGE_1, STAGE_2])
def test_all_tokens_are_the_default_byte_for_byte(flags, train):
    default, full = train(*flags, output="default"), train(*flags, "--medusa_vocab_size", 320, output="full")
    names = sorted(str(path.relative_to(default)) for path in default.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(full)) for path in full.rglob("*") if path.is_file())
    assert any("run.json" in name for name in names) and any(name.endswith(HEADS_FILE) for name in names)
    same = [name for name in names if name.endswith((".safetensors", "config.json", "run.json"))]
    for name in same:
        text = [(out / name).read_bytes().replace(str(out).encode(), b"") for out in (default, full)]
        assert text[0] == text[1], name
    assert not any(b"medusa_vocab_size" in (default / name).read_bytes() for name in same)


@pytest.mark.parametrize("flags", [STAGE_1, STAGE_2])
@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_one_head_after_the_other_equals_all_at_once(kind, flags, train_both_ways):
    common = (*flags, "--medusa_vocab_size", SIZE, "--medusa_loss", kind, "--gradient_accumulation_steps", 2)
    one_by_one, plain = train_both_ways(*common)
    assert logged(plain) == pytest.approx(logged(one_by_one), rel=1e-5)
    assert logged(plain, "head_1_top1") == pytest.approx(logged(one_by_one, "head_1_top1"))
    assert_same(weights(plain), weights(one_by_one), rtol=1e-3, atol=2e-4)


def test_the_log_has_the_means_over_all_rows(train, monkeypatch):
    """As the model's own forward has them, which tests/model/test_vocabulary.py compares with a computation by hand.
    With two tokens most rows have no loss."""
    step, want = MedusaTrainer._one_by_one, []

    def look(self, model, inputs, *args):
        want.append(model(**inputs))
        return step(self, model, inputs, *args)

    monkeypatch.setattr(MedusaTrainer, "_one_by_one", look)
    out = train("--max_steps", 2, "--medusa_only_heads", True, "--medusa_vocab_size", 2)
    for k in (1, 2):
        assert logged(out, f"head_{k}_loss") == pytest.approx([float(w.head_losses[k]) for w in want], rel=1e-5)
        assert logged(out, f"head_{k}_top1") == pytest.approx([float(w.head_accuracies[k]) for w in want])


@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_accumulation_gives_the_same_update(kind, train):
    flags = ("--medusa_only_heads", True, "--max_steps", 3, "--medusa_loss", kind, "--optim", "sgd")
    flags += ("--medusa_vocab_size", SIZE)
    whole = train(*flags, "--per_device_train_batch_size", 8, output="whole")
    parts = train(*flags, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4, output="parts")
    assert_same(weights(whole), weights(parts), rtol=1e-4, atol=1e-6)


# ---- heads to start from, runs to go on with ----


def other_tokens(out) -> list[int]:
    """Puts other tokens into the heads that a run left, as if they were of other data."""
    tensors = load_file(out / HEADS_FILE)
    tensors["token_map"] = torch.arange(SIZE) * 13
    save_file(tensors, out / HEADS_FILE)
    return tensors["token_map"].tolist()


@pytest.mark.parametrize("flags", [STAGE_1, STAGE_2])
def test_heads_to_start_from_bring_their_tokens(flags, train, caplog):
    first = train(*STAGE_1, "--medusa_vocab_size", SIZE, output="first")
    tokens = other_tokens(first)
    caplog.set_level("INFO")
    caplog.clear()
    second = train(*flags, "--medusa_heads_path", first, "--lazy_preprocess", True, output="second")
    assert token_map(second) == tokens and "of the training labels" not in caplog.text  # nobody has counted them
    third = train(*flags, "--medusa_heads_path", second, "--medusa_vocab_size", SIZE, output="third")
    assert token_map(third) == tokens and "of the training labels" in caplog.text


@pytest.mark.parametrize("flags", [STAGE_1, STAGE_2])
def test_a_run_goes_on_with_its_own_tokens(flags, train, tmp_path):
    """Also where they are not those of the data, and the heads that it began with are gone."""
    first = train(*STAGE_1, "--medusa_vocab_size", SIZE, output="first")
    tokens = other_tokens(first)
    begin = (*flags, "--max_steps", 4, "--medusa_heads_path", first)
    whole, stopped = train(*begin, output="whole"), train(*begin, output="stopped")
    for path in [*stopped.glob("checkpoint-[34]"), *(path for path in stopped.iterdir() if path.is_file())]:
        path.rename(tmp_path / f"gone-{path.name}")
    if (stopped / "medusa_heads").exists():
        (stopped / "medusa_heads").rename(tmp_path / "gone-heads")
    first.rename(tmp_path / "gone")
    resumed = (*flags, "--max_steps", 4, "--resume_from_checkpoint", True)
    with pytest.raises(BadInput, match="--medusa_vocab_size 24, not None"):
        train(*resumed, output="stopped")
    with pytest.raises(BadInput, match="--medusa_vocab_size 24, not 25"):
        train(*resumed, "--medusa_vocab_size", 25, output="stopped")
    out = train(*resumed, "--medusa_vocab_size", SIZE, output="stopped")
    assert token_map(out) == tokens
    assert_same(weights(out), weights(whole))


def test_a_run_of_all_tokens_is_not_one_of_some(train):
    out = train(*STAGE_1)
    assert "medusa_vocab_size" not in json.loads((out / "checkpoint-2" / "run.json").read_text())
    with pytest.raises(BadInput, match="--medusa_vocab_size None, not 24"):
        train(*STAGE_1, "--medusa_vocab_size", SIZE, "--resume_from_checkpoint", True)


def test_the_best_checkpoint_is_loaded(train):
    best = ("--load_best_model_at_end", True, "--greater_is_better", True, "--eval_holdout", 8)
    best += ("--eval_strategy", "steps", "--eval_steps", 1, "--medusa_vocab_size", SIZE)
    for stage, flags in enumerate((STAGE_1, STAGE_2), 1):
        out = train(*flags, "--max_steps", 4, *best, output=f"stage{stage}")
        state = json.loads((out / "trainer_state.json").read_text())
        assert state["best_global_step"] < 4
        highest = max(logged(out, "eval_loss")[:-1])
        assert logged(out, "eval_loss")[-1] == pytest.approx(highest, rel=1e-5)


# ---- what cannot be ----


def test_sizes_that_cannot_be(train, model_dir, tmp_path):
    GenerationConfig(eos_token_id=[1, 318, 319]).save_pretrained(model_dir)
    for size, message in ((321, "--medusa_vocab_size 321: .* has only 320 tokens"),
                          (2, "--medusa_vocab_size 2: .* stops on 3 tokens")):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            train("--medusa_vocab_size", size)
    assert not (tmp_path / "out").exists()
    assert len(token_map(train(*STAGE_1, "--medusa_vocab_size", 3))) == 3


def test_another_size_than_that_of_the_heads(train):
    some = train(*STAGE_1, "--medusa_vocab_size", SIZE, output="some")
    full = train(*STAGE_1, output="full")
    for heads, size, message in (
        (some, 25, "--medusa_vocab_size 25: the heads in .*some guess 24 tokens"),
        (some, 320, "--medusa_vocab_size 320: the heads in .*some guess 24 tokens"),
        (full, 24, "--medusa_vocab_size 24: the heads in .*full guess 320 tokens"),
    ):
        with pytest.raises(BadInput, match=message):
            train(*STAGE_1, "--medusa_heads_path", heads, "--medusa_vocab_size", size, output="none")
    again = train(*STAGE_1, "--medusa_heads_path", full, "--medusa_vocab_size", 320, output="again")
    assert "token_map" not in load_file(again / HEADS_FILE)


def test_a_tokenizer_larger_than_the_model_is_still_one_sentence(train, tmp_path):
    make_backbone(vocab_size=300).save_pretrained(tmp_path / "small")
    make_tokenizer("llama3").save_pretrained(tmp_path / "small")
    chats = [{"messages": [{"role": "user", "content": "how"}, {"role": "assistant", "content": "the moon rises"}]}]
    data = write_jsonl(tmp_path / "few.jsonl", chats + make_conversations(3))
    flags = ("--model_name_or_path", tmp_path / "small", "--data_path", data, "--medusa_vocab_size", SIZE)
    with pytest.raises(BadInput, match=r"tokenizer has 3.. tokens.*300"):
        train(*flags)
