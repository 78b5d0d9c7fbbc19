"""benchmark/throughput.py on a CPU: its rows, and that it notices when two implementations do not do the same work."""

import sys

import pytest
import throughput
import torch
from conftest import make_conversations, make_tokenizer, write_jsonl
from csvs import rows_of

from model import heads
from training.trainer import MedusaTrainer


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs the script -> its rows."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def run(*flags):
        out = tmp_path / "throughput.csv"
        argv = f"throughput.py --smoke --heads 2 --lengths 32 64 --steps 2 --warmup 1 --out {out}".split()
        monkeypatch.setattr(sys, "argv", [*argv, *map(str, flags)])
        try:
            throughput.main()
        finally:
            rows = rows_of(out)
        return rows

    return run


@pytest.mark.parametrize("stage", [1, 2])
def test_the_three_do_the_same_work(stage, bench):
    rows = bench("--stage", stage, *(("--recomputed_layers", 0, 1) if stage == 2 else ()))
    assert [(row["implementation"], row["length"]) for row in rows] == [
        (name, length) for name in ("hf", "liger", "ours") for length in ("32", "64")
    ]
    assert all(float(row["tokens_per_s"]) > 0 and float(row["step_time_s"]) > 0 for row in rows)
    assert all(row["versions"].startswith("python ") and "--smoke" in row["command"] for row in rows)
    if stage == 2:
        assert [row["options"][:6] for row in rows] == ["2 of 2"] * 4 + ["0 of 2", "1 of 2"]
    for length in (0, 1):
        losses = [float(row["last_loss"]) for row in rows[length::2]]
        assert losses == pytest.approx(losses[:1] * 3, rel=1e-3) and losses[0] < float(rows[length]["first_loss"])


def test_from_stored_states_the_backbone_is_no_work(bench, tmp_path, monkeypatch):
    counts, of = [], throughput.FlopCount.of

    def counted(model):
        counts.append(of(model))
        return counts[-1]

    monkeypatch.setattr(throughput.FlopCount, "of", counted)
    flags = ("--stage", 1, "--implementations", "ours")
    (disk := tmp_path / "disk").mkdir()
    stored, online = bench(*flags, "--stored_states", disk), bench(*flags)[2:]
    assert disk.is_dir() and not list(disk.iterdir())
    assert [row["data"] for row in stored + online] == ["stored states"] * 2 + ["random"] * 2
    assert [count.per_token > 0 for count in counts] == [False, False, True, True]
    assert all(count.per_row == counts[0].per_row and count.per_row[1] > 0 for count in counts)
    assert all(float(row["last_loss"]) > 0 for row in stored)
    with pytest.raises(SystemExit):
        bench("--stage", 2, "--stored_states", tmp_path)


@pytest.mark.parametrize("stage", [1, 2])
def test_heads_of_fewer_tokens(stage, bench):
    """The three agree; every target is a token that heads guess, and useful work is counted of those."""
    flags = ("--stage", stage, "--implementations", "hf", "ours", "--lengths", 32)
    few, all_tokens = bench(*flags, "--medusa_vocab_size", 40), bench(*flags)[2:]
    assert [row["medusa_vocab_size"] for row in few + all_tokens] == ["40"] * 2 + [""] * 2
    work = [[float(row["useful_tflops"]) * float(row["step_time_s"]) for row in rows] for rows in (few, all_tokens)]
    assert all(0 <= a <= b for a, b in zip(*work, strict=True))
    first = [float(row["first_loss"]) for row in few]
    assert first[0] == pytest.approx(first[1], rel=1e-3) and 0 < first[0] < float(all_tokens[0]["first_loss"])
    data = throughput.setting.random_rows(throughput.setting.TINY, 64, 3, 40)
    assert {token for row in data for token in row["labels"]} <= set(range(0, 320, 8))


def test_heads_of_other_types(bench):
    """The three agree; what is useful is more than with medusa heads."""
    flags = ("--stage", 2, "--implementations", "hf", "ours", "--lengths", 32)
    kinds = ("medusa", "markov", "hydra")
    rows = [bench(*flags, "--medusa_head_type", kind)[-2:] for kind in kinds]
    assert [[row["head_type"] for row in two] for two in rows] == [[kind] * 2 for kind in kinds]
    work = [[float(row["useful_tflops"]) * float(row["step_time_s"]) for row in two] for two in rows]
    assert all(a >= b >= 0 for other in work[1:] for a, b in zip(other, work[0], strict=True))
    losses = [[float(row["first_loss"]) for row in two] for two in rows]
    assert all(hf == pytest.approx(ours, rel=1e-3) for hf, ours in losses)
    assert len({hf for hf, _ in losses}) == 3


def test_a_head_without_its_resblocks_is_noticed(bench, monkeypatch):
    def bypassed(self, hidden, targets=None, impl="torch", softcap=None, teacher=None, text=None):
        return heads.projection_loss(hidden.bfloat16(), targets, self[-1].weight, impl, softcap)

    train = throughput.train

    def with_bypass(options, implementation, *args):
        with monkeypatch.context() as patch:
            if implementation == "liger":
                patch.setattr(heads.MedusaHead, "forward", bypassed)
            return train(options, implementation, *args)

    monkeypatch.setattr(throughput, "train", with_bypass)
    with pytest.raises(SystemExit, match=r"not the same work:\n2 heads, 32 tokens: .* of liger \(\), .* of hf"):
        bench("--stage", 1)


def test_out_of_memory_is_a_row_and_the_next_one_runs(bench, monkeypatch):
    step = MedusaTrainer.training_step

    def full(self, model, inputs, *args):
        if inputs["labels"].shape[1] == 64 and not self.one_by_one:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, model, inputs, *args)

    monkeypatch.setattr(MedusaTrainer, "training_step", full)
    rows = bench("--stage", 1, "--implementations", "hf", "ours")
    assert [row["tokens_per_s"] == "OOM" for row in rows] == [False, True, False, False]


def test_real_conversations(bench, tmp_path):
    make_tokenizer("llama3").save_pretrained(tmp_path / "tokenizer")
    data = write_jsonl(tmp_path / "chats.jsonl", make_conversations(40))
    flags = ("--stage", 1, "--implementations", "ours", "--data_path", data, "--tokenizer", tmp_path / "tokenizer")
    rows = bench(*flags)
    assert [row["data"] for row in rows] == ["padded", "grouped", "packed"] * 2


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--stage 1 --data_path chats.jsonl", "--data_path and --tokenizer go together"),
        ("--stage 1 --data_path a --tokenizer b --medusa_vocab_size 9", "takes any tokens, not those of --data_path"),
        ("--stage 1 --implementations ours --stored_states absent", "there is no directory --stored_states absent"),
        ("--stage 2 --fp8_backbone", "--backbone_dtype is for a frozen backbone"),
        ("--stage 2 --recomputed_layers 1", "--recomputed_layers needs one number for each of --lengths"),
        pytest.param(
            "--stage 1 --limit_gib 23",
            "--limit_gib needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        pytest.param(
            "--stage 1 --trace somewhere",
            "--trace needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_work_is_refused(flags, sentence, bench, capsys, tmp_path):
    (tmp_path / "throughput.csv").touch()
    with pytest.raises(SystemExit):
        bench(*flags.split())
    assert sentence in capsys.readouterr().err
