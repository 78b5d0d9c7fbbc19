"""distill.py: answers are the model's own, however they are batched, and a killed run can be gone on with."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_backbone, make_conversations, make_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import distill
from backbone import load_backbone
from chat_data import load_conversations
from errors import BadInput

PROMPTS = [chat["messages"][0]["content"] for chat in make_conversations(10)]
ENDS = list(range(1, 320, 24))  # a random model hardly ever says one given token, so many end an answer


@pytest.fixture(autouse=True)
def _one_thread():
    """Products this small gain nothing from a second thread, and on a busy machine wait long for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def chat_dir(tmp_path):
    """A tiny chat model that ends some of its answers after a few tokens, and never ends others."""
    backbone = make_backbone()
    backbone.generation_config.eos_token_id = ENDS
    backbone.save_pretrained(tmp_path / "chat")
    make_tokenizer("llama3").save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


@pytest.fixture
def ask(chat_dir, tmp_path, monkeypatch):
    """Runs the script; -> the file it wrote."""

    def run(name="out.jsonl", prompts=None, model=chat_dir, **flags) -> Path:
        if prompts is None:
            prompts = tmp_path / "prompts.txt"
            prompts.write_text("\n\n".join(f" {prompt} " for prompt in PROMPTS))
        flags = {"model_name_or_path": model, "prompts": prompts, "output": tmp_path / name} | flags
        flags = {"max_new_tokens": 12, "batch_size": 1} | flags
        argv = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        monkeypatch.setattr(sys, "argv", ["distill.py", *argv])
        distill.main()
        return tmp_path / name

    return run


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_writes_what_training_reads(ask):
    out = ask(batch_size=4)
    assert len(records(out)) > 1
    assert load_conversations(str(out))["messages"][:] == [record["messages"] for record in records(out)]
    for record in records(out):
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
        text = tokenizer.decode(out[:-1], skip_special_tokens=True).strip()
        if out[-1] in ENDS and text:
            alone[number] = text
    assert 3 < len(set(alone.values())) < len(PROMPTS)  # different ones, and some that have no end

    monkeypatch.setattr(distill, "load_backbone", lambda name, dtype: load_backbone(name, dtype=torch.float32))
    for size in (1, 4, len(PROMPTS)):
        written = records(ask(f"{size}.jsonl", batch_size=size))
        assert {record["prompt"]: record["messages"][1]["content"] for record in written} == alone


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("cut", ["in the last line", "after a line", "everything"])
def test_going_on_gives_the_file_of_an_uninterrupted_run(cut, temperature, ask):
    """One prompt a batch: larger ones are cut differently after a kill, and sampling then gives other words."""
    out = ask(temperature=temperature)
    whole = out.read_bytes()
    last = whole.rstrip().rfind(b"\n") + 1
    assert last > 0
    out.write_bytes(whole[: {"in the last line": last + 9, "after a line": last, "everything": 0}[cut]])
    assert ask(temperature=temperature).read_bytes() == whole


def test_a_finished_run_asks_nothing_that_was_answered(ask, monkeypatch):
    out = ask()
    whole, asked, answer = out.read_bytes(), [], distill.answer
    monkeypatch.setattr(distill, "answer", lambda m, t, prompts, a: asked.extend(prompts) or answer(m, t, prompts, a))
    assert ask().read_bytes() == whole
    assert asked == PROMPTS[records(out)[-1]["prompt"] :]


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


def test_unfinished_answers_are_left_out(ask, caplog):
    caplog.set_level(logging.INFO)
    short, long = records(ask("short", max_new_tokens=5)), records(ask("long", max_new_tokens=12))
    assert 0 < len(short) < len(long)
    assert [record for record in long if record in short] == short
    assert f"left out {len(PROMPTS) - len(short)} answers" in caplog.text


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
        ("missing.jsonl", None, "no data file"),
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


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_a_sampled_resume_inside_a_batch_equals_an_uninterrupted_run(ask, kept):
    flags = {"temperature": 1, "batch_size": 4, "max_new_tokens": 40}
    whole = ask(**flags).read_text()
    lines = whole.split("\n")
    assert len(lines) > 3
    cut = ask(name="cut.jsonl", **flags)
    cut.write_text("".join(line + "\n" for line in lines[:kept]) + lines[kept][:9])
    assert ask(name="cut.jsonl", **flags).read_text() == whole


def test_the_first_question_is_asked_not_the_system_prompt(tmp_path):
    turns = [("system", "be terse"), ("user", "why"), ("assistant", "warm")]
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    assert distill.read_prompts(chats) == ["why"]


@pytest.mark.parametrize("text", ["not json\n", '{"messages": []}\n', "one line without end"])
def test_a_foreign_output_file_is_not_touched(ask, tmp_path, text):
    (tmp_path / "out.jsonl").write_text(text)
    with pytest.raises(BadInput, match=r"not written by distill\.py"):
        ask()
    assert (tmp_path / "out.jsonl").read_text() == text


@pytest.mark.parametrize("flags", [{"batch_size": 0}, {"max_new_tokens": 0}, {"temperature": -1}])
def test_numbers_that_cannot_work(ask, flags):
    with pytest.raises(BadInput, match="1 or more"):
        ask(**flags)
