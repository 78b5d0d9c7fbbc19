"""benchmark/decoding_speed.py on a CPU: its rows, and the trace of an answer."""

import json
import sys

import decoding_speed
import pytest
import torch
from conftest import make_tokenizer
from csvs import rows_of, run
from transformers import AutoModelForCausalLM, GenerationConfig

from decoding.decoder import Decoder
from medusa_model import MedusaConfig, MedusaModel

pytestmark = pytest.mark.usefixtures("plain_torch")
DECODING = "date commit label tree nodes prompts batch_size max_new_tokens tokens passes seconds tokens_per_s "
DECODING += "tokens_per_pass step_ms speed_up identical expected_length machine dtype versions command"
TOP = [[1.0] * 3, [0.6, 0.7, 0.8], [0.5, 0.6, 0.7], [0.4, 0.5, 0.6]]
PROMPTS = ["why", "how warm is the moon", "green river", "old stone sings", "salt"]


@pytest.fixture
def heads_dir(model_dir, tmp_path):
    """Untrained heads: they guess the next token again, which is right where the model repeats itself."""
    GenerationConfig(eos_token_id=[1]).save_pretrained(model_dir)
    model = MedusaModel.from_backbone(
        AutoModelForCausalLM.from_pretrained(model_dir), MedusaConfig(medusa_num_heads=3)
    )
    model.freeze_backbone()
    model.save_pretrained(tmp_path / "my_heads")
    make_tokenizer("llama3").save_pretrained(tmp_path / "my_heads")
    (tmp_path / "my_heads" / "accuracy.json").write_text(json.dumps({"top": TOP}))
    return tmp_path / "my_heads"


@pytest.fixture
def decode(heads_dir, tmp_path, monkeypatch):
    """Runs decoding.py -> its rows."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    common = (heads_dir, "--prompts", prompts, "--dtype", "float32", "--max_new_tokens", 24)
    return lambda *words: run(decoding_speed, monkeypatch, *common, *words, "--out", tmp_path / "decoding.csv")


def near(value):
    return pytest.approx(float(value), rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_every_tree_decodes_the_same_answers(decode, batch_size):
    rows = decode("--skip", 1, "--limit", 3, "--batch_size", batch_size, "--nodes", "chain", 8)
    assert [list(row) for row in rows] == [DECODING.split()] * 3
    assert [(row["tree"], row["nodes"]) for row in rows] == [("plain", "0"), ("chain", "3"), ("best", "8")]
    assert {(row["label"], row["prompts"], row["identical"]) for row in rows} == {("my_heads", "3", "3")}
    plain, *others = rows
    assert float(plain["tokens_per_pass"]) == float(plain["speed_up"]) == float(plain["expected_length"]) == 1
    assert float(rows[1]["expected_length"]) == near(1 + 0.6 + 0.6 * 0.5 + 0.6 * 0.5 * 0.4)
    for row in rows:
        assert row["tokens"] == plain["tokens"] and row["machine"] == decoding_speed.machine()
        tokens, passes, seconds = (float(row[key]) for key in ("tokens", "passes", "seconds"))
        assert float(row["step_ms"]) == pytest.approx(seconds / passes * 1000, rel=1e-2)
        assert float(row["tokens_per_s"]) == pytest.approx(tokens / seconds, rel=1e-2)
        assert float(row["speed_up"]) == near(float(row["tokens_per_s"]) / float(plain["tokens_per_s"]))
    for row in others:
        assert int(row["passes"]) < int(plain["passes"]) and float(row["tokens_per_pass"]) > 1
        if batch_size == 1:
            assert float(row["tokens_per_pass"]) == near(int(row["tokens"]) / int(row["passes"]))


def test_which_prompts_are_decoded_and_how(decode, monkeypatch):
    """One warm-up, not counted; the prompts behind --skip, at most --limit; an answer that differs is noticed."""
    seen = []

    def fake(decoder, prompts, max_new_tokens, eos, name):
        seen.append((len(prompts), max_new_tokens, name))
        step = 1 if name == "0" else 2
        answers = [[5] * 9 for _ in prompts]
        if name == "4":
            answers[0] = [6] * 9
        return decoding_speed.Decoded(
            name, answers, [[step] * (8 // step) for _ in prompts], seconds=[0.1] * len(prompts)
        )

    monkeypatch.setattr(decoding_speed, "decode", fake)
    rows = decode("--skip", 3, "--nodes", 4, 0, "--label", "own answers", "--batch_size", 2)
    assert seen == [(1, 16, "0"), (2, 24, "0"), (1, 16, "4"), (2, 24, "4")]
    assert [row["identical"] for row in rows] == ["2", "1"] and {row["label"] for row in rows} == {"own answers"}
    keys = ("tokens", "passes", "tokens_per_s", "tokens_per_pass", "step_ms", "speed_up")
    assert [[float(row[key]) for key in keys] for row in rows] == [[16, 8, 80, 1, 25, 1], [16, 4, 80, 2, 50, 1]]


def test_a_tree_is_decoded_once(decode, dump):
    """Where only best guesses are ever right, the chain and all trees of its size or more are one."""
    sure = {"top": [[share] * 10 for share in (1.0, 0.5, 0.4, 0.3)]}
    rows = decode("--nodes", 3, "chain", 8, "--accuracy", dump(sure))
    assert [(row["tree"], row["nodes"]) for row in rows] == [("plain", "0"), ("best", "3")]
    assert float(rows[1]["expected_length"]) == pytest.approx(1 + 0.5 + 0.5 * 0.4 + 0.5 * 0.4 * 0.3)


@pytest.mark.parametrize("script", ["step_time", "decoding_speed"])
def test_a_run_that_is_cut_off_leaves_its_rows(script, time_steps, decode, monkeypatch, tmp_path):
    made = Decoder.__init__

    def cut_off(self, model, choices, *args, **kwargs):
        if len(choices) == 4:
            raise KeyboardInterrupt
        made(self, model, choices, *args, **kwargs)

    monkeypatch.setattr(Decoder, "__init__", cut_off)
    with pytest.raises(KeyboardInterrupt):
        (time_steps if script == "step_time" else decode)("--nodes", 2, 4, 8)
    rows = rows_of(sys.argv[-1])
    assert [row["nodes"] for row in rows] == ["0", "2"]


def test_trace(decode, heads_dir, tmp_path):
    rows = decode("--limit", 1, "--nodes", 8, "--trace", tmp_path / "new" / "t.json", "--trace_nodes", "chain")
    trace = json.loads((tmp_path / "new" / "t.json").read_text())
    assert trace["prompt"] == PROMPTS[0] and (trace["plain"]["nodes"], trace["heads"]["nodes"]) == (0, 3)
    texts = []
    for key in ("plain", "heads"):
        passes = trace[key]["passes"]
        seconds = [at for at, _ in passes]
        assert seconds[0] == 0 and seconds == sorted(seconds) and len(set(seconds)) == len(seconds)
        assert len(passes[0][1]) == 1 and sum(len(new) for _, new in passes) == int(rows[0]["tokens"]) + 1
        texts.append("".join(text for _, new in passes for text in new))
    assert texts[0] == texts[1] != ""
    assert {len(new) for _, new in trace["plain"]["passes"]} == {1}
    assert max(len(new) for _, new in trace["heads"]["passes"]) > 1


def test_the_trace_takes_the_fastest_tree_and_another_prompt(decode, tmp_path):
    rows = decode("--nodes", 2, 8, "--trace", tmp_path / "t.json", "--trace_prompt", "cold bread")
    trace = json.loads((tmp_path / "t.json").read_text())
    fastest = max(rows, key=lambda row: float(row["tokens_per_s"]))
    assert trace["prompt"] == "cold bread" and trace["heads"]["nodes"] == int(fastest["nodes"])


def test_a_letter_of_several_tokens_comes_with_the_last():
    tokenizer = make_tokenizer("llama3")
    text = "the moon \N{FULL MOON SYMBOL} rises\N{LATIN SMALL LETTER U WITH DIAERESIS}"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = decoding_speed.token_texts(tokens, tokenizer)
    assert len(texts) == len(tokens) and "".join(texts) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts) and "\N{FULL MOON SYMBOL}" in [t.strip() for t in texts]
    cut = decoding_speed.token_texts(
        tokens[: texts.index("\N{FULL MOON SYMBOL}")], tokenizer
    )  # in the middle of a letter
    assert "".join(cut) == tokenizer.decode(tokens[: len(cut)])


def test_a_machine_has_a_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    name, threads = decoding_speed.machine().rsplit(", ", 1)
    assert name and threads == "1 threads"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert decoding_speed.machine() == "a GPU"


def test_what_cannot_be_decoded_is_one_sentence(decode, tmp_path, monkeypatch, dump):
    with pytest.raises(decoding_speed.BadInput, match=r"cannot read .*gone\.json"):
        decode("--accuracy", tmp_path / "gone.json")
    with pytest.raises(decoding_speed.BadInput, match=r"prompts\.txt has no prompts behind the first 5: lower --skip"):
        decode("--skip", 5)
    with pytest.raises(decoding_speed.BadInput, match=r"is of 2 heads, but .*my_heads has 3"):
        decode("--accuracy", dump({"top": TOP[:3]}))
    with pytest.raises(SystemExit):
        decode("--nodes", -1)
    monkeypatch.setattr(decoding_speed, "end_tokens", lambda backbone: set(range(320)))
    with pytest.raises(decoding_speed.BadInput, match="no answer is longer than the first token"):
        decode("--nodes", 4)
