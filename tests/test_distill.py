"""distill.py: answers are the model's own, however they are batched, the cut ones are marked, and a killed run can be
gone on with."""

import json
import logging
import re

import pytest
import torch
from conftest import make_tokenizer, write_jsonl
from distilling import ENDS, PROMPTS, records
from transformers import AutoModelForCausalLM, AutoTokenizer

import distill
from common.errors import BadInput
from conversations.labels import encode
from conversations.prompts import question, tokenise
from conversations.sources import load_conversations
from conversations.targets import IGNORE
from conversations.template import ChatTemplate
from decoding import answers
from model.backbone import load_backbone

pytest_plugins = ("distilling",)

LENGTHS = [len(ids) for ids in tokenise([question(p) for p in PROMPTS], ChatTemplate(make_tokenizer("llama3")))]
SOME = sorted(LENGTHS)[6]  # tokens that 7 of the 10 prompts have at most


def test_writes_what_training_reads(ask):
    out = ask(batch_size=4)
    flags = [record.get("unfinished", False) for record in records(out)]
    assert 0 < sum(flags) < len(flags)
    data, tokenizer = load_conversations(str(out)), make_tokenizer("llama3")
    assert data["messages"][:] == [record["messages"] for record in records(out)]
    assert data["unfinished"][:] == flags
    for record, row in zip(records(out), data, strict=True):
        prompt, answer = record["prompt_ids"], record["answer_ids"]
        assert tokenizer.decode(prompt).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
        assert (answer[-1] in ENDS) == (not record.get("unfinished"))
        rows = encode(row, ChatTemplate(tokenizer), 1000)
        assert rows == [{"input_ids": prompt + answer, "labels": [IGNORE] * len(prompt) + answer}]
        assert record.keys() - {"unfinished"} == {"prompt", "messages", "prompt_ids", "answer_ids"}
        assert record.get("unfinished", True) is True
        user, assistant = record["messages"]
        assert user == {"role": "user", "content": PROMPTS[record["prompt"] - 1]}
        assert assistant["role"] == "assistant" and assistant["content"].strip()


def test_batching_changes_no_answer(ask, chat_dir, monkeypatch):
    """In float32: in bf16 two logits tie now and then, and padding may decide between them."""
    tokenizer = AutoTokenizer.from_pretrained(chat_dir)
    model = AutoModelForCausalLM.from_pretrained(chat_dir, dtype=torch.float32)
    alone = {}
    for number, prompt in enumerate(PROMPTS, 1):
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        out = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
        unfinished = out[-1] not in ENDS
        text = tokenizer.decode(out if unfinished else out[:-1], skip_special_tokens=True)
        if text := (text.rstrip("\ufffd") if unfinished else text).strip():
            alone[number] = text, unfinished
    assert len({text for text, _ in alone.values()}) > 3  # different ones, and some that have no end
    assert 0 < sum(unfinished for _, unfinished in alone.values()) < len(alone)

    monkeypatch.setattr(distill, "load_backbone", lambda name, bits, dtype: load_backbone(name, dtype=torch.float32))
    for size in (1, 4, len(PROMPTS)):
        written = records(ask(f"{size}.jsonl", batch_size=size))
        found = {r["prompt"]: (r["messages"][1]["content"], r.get("unfinished", False)) for r in written}
        assert found == alone


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("max_prompt_length", [100, SOME])
def test_a_resume_anywhere_equals_an_uninterrupted_run(max_prompt_length, temperature, ask, tmp_path):
    """Batches of 3, of which the last is smaller."""
    flags = {"temperature": temperature, "batch_size": 3, "max_prompt_length": max_prompt_length}
    whole = ask(**flags).read_text()
    lines = whole.split("\n")
    assert len(lines) > 6
    for kept, line in enumerate(lines):
        for rest in ("", line[:9]):
            (tmp_path / "cut.jsonl").write_text("".join(line + "\n" for line in lines[:kept]) + rest)
            assert ask("cut.jsonl", **flags).read_text() == whole


def test_a_resumed_run_decodes_in_the_same_shapes(ask, monkeypatch):
    """On a GPU the sums of another shape round differently, and every row draws other noise."""
    shapes, original = [], answers.Decoder

    def note(model, choices, batch_size, max_length, *args):
        shapes.append((batch_size, max_length))
        return original(model, choices, batch_size, max_length, *args)

    monkeypatch.setattr(answers, "Decoder", note)
    out = ask(batch_size=3)
    lines = out.read_text().split("\n")
    for kept in (4, 9):
        out.write_text("".join(line + "\n" for line in lines[:kept]))
        ask(batch_size=3)
    assert shapes == [(3, max(LENGTHS) + 12)] * 3
    ask("one.jsonl", batch_size=64)  # no more rows than there are prompts
    assert shapes[3:] == [(10, max(LENGTHS) + 12)]


def test_a_finished_run_asks_nothing_that_was_answered(ask, monkeypatch):
    out = ask()
    whole, asked, answer_all = out.read_bytes(), [], distill.answer_all

    def note(model, prompts, *args):
        for answer, prompt in zip(answer_all(model, prompts, *args), prompts, strict=True):
            asked.append(make_tokenizer("llama3").decode(prompt))
            yield answer

    monkeypatch.setattr(distill, "answer_all", note)
    assert ask().read_bytes() == whole
    last = records(out)[-1]["prompt"]
    assert len(asked) == len(PROMPTS) - last  # behind the last record there can only be answers without text
    assert ask("new.jsonl").read_bytes() == whole
    assert len(asked) == 2 * len(PROMPTS) - last
    assert all(prompt in text for prompt, text in zip(PROMPTS, asked[-len(PROMPTS) :], strict=True))


def test_a_limit_below_one_is_refused(ask):
    with pytest.raises(BadInput, match="--limit must be 1 or more"):
        ask("none", limit=-5)


def test_limit_is_the_first_prompts(ask):
    assert records(ask("some", limit=4)) == [record for record in records(ask("all")) if record["prompt"] <= 4]


def test_seed_decides_what_is_sampled(ask):
    texts = {
        (temperature, seed, again): ask(
            f"{temperature}{seed}{again}", temperature=temperature, seed=seed, batch_size=5
        ).read_text()
        for temperature, seed, again in ((1, 0, 0), (1, 0, 1), (1, 5, 0), (0, 0, 0), (0, 5, 0))
    }
    assert texts[1, 0, 0] == texts[1, 0, 1]
    assert texts[0, 0, 0] == texts[0, 5, 0]
    assert len(set(texts.values())) == 3


def test_each_batch_samples_anew(ask, tmp_path):
    (tmp_path / "same.txt").write_text("why\n" * 4)
    found = records(ask(prompts=tmp_path / "same.txt", temperature=1, max_new_tokens=40))
    assert len({record["messages"][1]["content"] for record in found}) == len(found) > 1


def test_unfinished_answers_are_the_start_of_longer_ones(ask, caplog):
    caplog.set_level(logging.INFO)
    short, long = ({r["prompt"]: r for r in records(ask(f"{n}", max_new_tokens=n))} for n in (5, 12))
    cut = [number for number, record in short.items() if record.get("unfinished")]
    assert 0 < len(cut) < len(short)
    assert all(record == long[number] for number, record in short.items() if number not in cut)
    assert all(long[n]["answer_ids"][:5] == short[n]["answer_ids"] for n in cut)
    for number in cut:
        start, text = (records[number]["messages"][1]["content"] for records in (short, long))
        assert text.startswith(start) and (len(text) > len(start) or "unfinished" not in long[number])
    message = f"{len(short) - len(cut)} answers with an end and {len(cut)} unfinished after 5 tokens; left out: "
    assert message + f"{len(PROMPTS) - len(short)} answers without text" in caplog.text


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ("warm moon", ("warm moon", "unfinished")),
        ("warm moon|", ("warm moon", "finished")),
        (" warm \n", ("warm", "unfinished")),
        (" warm \n|", ("warm", "finished")),
        ("warm é", ("warm é", "unfinished")),
        ("warm é/", ("warm", "unfinished")),  # the first of its two bytes
        ("warm 🌕/", ("warm", "unfinished")),  # the first three of four
        ("warm é/|", ("warm \ufffd", "finished")),  # the model's own words, and no cut
        ("|", ("", "empty")),
        (" \n|", ("", "empty")),
        (" ", ("", "empty")),
        ("🌕/", ("", "empty")),
    ],
)
def test_text_of_an_answer(tokens, found):
    """| is an end of turn, / takes the token before it away."""
    tokenizer, ids = make_tokenizer("llama3"), []
    for part in re.split("([|/])", tokens):
        if part == "/":
            ids.pop()
        else:
            ids += [tokenizer.eos_token_id] if part == "|" else tokenizer(part)["input_ids"]
    assert distill.to_text(ids, {5, tokenizer.eos_token_id}, tokenizer) == found


def test_longer_prompts_are_left_out(ask, caplog):
    """And the numbers of the others stay their places in the file."""
    caplog.set_level(logging.INFO)
    short = [number for number, length in enumerate(LENGTHS, 1) if length <= SOME]
    assert len(short) == 7 and short != list(range(1, 8))
    everything, some = ask("all"), ask("some", max_prompt_length=SOME)
    assert records(some) == [record for record in records(everything) if record["prompt"] in short]
    assert len(records(some)) > 3
    assert f"3 prompts of more than {SOME} tokens" in caplog.text
    assert records(ask("none", max_prompt_length=min(LENGTHS) - 1)) == []
    assert f"10 prompts of more than {min(LENGTHS) - 1} tokens" in caplog.text


def test_a_prompt_and_its_answer_fit_into_the_context(ask):
    assert records(ask(max_prompt_length=200, max_new_tokens=56))
    with pytest.raises(BadInput, match=r"--max_prompt_length 200 and --max_new_tokens 57 .* 256 tokens .*: lower one"):
        ask("other.jsonl", max_prompt_length=200, max_new_tokens=57)


def test_a_model_without_an_end_is_refused(ask, chat_dir):
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((chat_dir / name).read_text())
        (chat_dir / name).write_text(json.dumps(settings | {"eos_token_id": None}))
    with pytest.raises(BadInput, match="names no end-of-sequence token"):
        ask()


def test_asks_the_first_question_of_conversations(ask, tmp_path):
    turns = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": "x"}] for prompt in PROMPTS]
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": turn + turns[0]} for turn in turns])
    assert ask("from_chats", prompts=chats).read_text() == ask("from_text").read_text()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no prompts"),
        ("blank.txt", b" \n\n", "holds no prompts"),
        ("latin.txt", b"na\xefve", "cannot read the prompts"),
        ("missing.txt", None, "cannot read the prompts"),
        ("missing.jsonl", None, "no file or directory"),
    ],
)
def test_no_prompts(name, content, message, ask, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=f"{message}.*{name}|{name}.*{message}"):
        ask(prompts=tmp_path / name)


def test_not_a_chat_model(ask, chat_dir):
    make_tokenizer("llama3", template=None).save_pretrained(chat_dir)
    (chat_dir / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(BadInput, match="no chat template"):
        ask()


@pytest.mark.parametrize("text", ["not json\n", '{"messages": []}\n', "one line without end"])
def test_a_foreign_output_file_is_not_touched(ask, tmp_path, text):
    (tmp_path / "out.jsonl").write_text(text)
    with pytest.raises(BadInput, match=r"not written by distill\.py"):
        ask()
    assert (tmp_path / "out.jsonl").read_text() == text


@pytest.mark.parametrize(
    "flags", [{"batch_size": 0}, {"max_new_tokens": 0}, {"max_prompt_length": 0}, {"temperature": -1}]
)
def test_numbers_that_cannot_work(ask, flags):
    with pytest.raises(BadInput, match="1 or more"):
        ask(**flags)
