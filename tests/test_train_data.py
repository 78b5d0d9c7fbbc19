"""train.py: the data that its flags ask for, and what it says of it."""

import datetime
import json
import logging
from pathlib import Path

import pytest
import torch
from conftest import assert_same, logged, make_conversations, make_tokenizer, weights, write_jsonl
from transformers import GenerationConfig

from common.errors import BadInput
from training import run
from training.arguments import TrainingArguments

DATED = (
    "{{ strftime_now('%d %b %Y') }}"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}\n{{ m.content }}<|eot_id|>{% endfor %}"
)


def test_a_look_at_the_data(train, data_file, capsys, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"messages": []}])
    with open(data_file, "a") as file:
        file.write(Path(bad).read_text())
    out = train("--show_data", 2, "--eval_holdout", 8, "--packing", True)
    text = capsys.readouterr().out
    assert text.count("--- row") == 2 and "<|eot_id|>⟧" in text
    assert text.count("<|begin_of_text|>") == 2  # one conversation a row, though --packing would join them
    for line in (
        "records read",
        "records used",
        "skipped: held out to evaluate on",
        "skipped: no turns",
        "rows of tokens",
    ):
        assert line in caplog.text
    assert not out.exists()  # no model was made


def test_counts_of_records(train, data_file, caplog):
    caplog.set_level(logging.INFO)
    with open(data_file, "a") as file:
        file.write('{"messages": []}\n')
    train("--show_data", 1, "--eval_holdout", 8)
    tables = [message for message in caplog.messages if message.startswith("\n| ")]
    cells = [[[cell.strip() for cell in line.split("|")[1:3]] for line in table.split("\n")[3:-1]] for table in tables]
    assert cells == [
        [
            *(["records read", "49"], ["records used", "40"]),
            *(["skipped: no turns: 'messages' is empty", "1"], ["skipped: held out to evaluate on", "8"]),
            *([["answers cut by --model_max_length 64", cells[0][4][1]]]),
            ["rows of tokens", "40"],
        ],
        [["records read", "8"], ["records used", "8"], *cells[1][2:-1], ["rows of tokens", "8"]],
    ]


@pytest.mark.parametrize("flags", [(), ("--lazy_preprocess", True)])
def test_all_rows_of_a_conversation_are_shown(flags, train, model_dir, data_file, capsys):
    last = "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
    template = f"{{% for m in messages %}}{{{{ m.role }}}}:{last}{{{{ m.content }}}}<|eot_id|>{{% endfor %}}"
    make_tokenizer("llama3", template + "{% if add_generation_prompt %}assistant:{% endif %}").save_pretrained(
        model_dir
    )
    turns = [{"role": role, "content": "why"} for role in ("user", "assistant")] * 3
    write_jsonl(Path(data_file), [{"messages": turns}])
    train("--show_data", 9, "--model_max_length", 200, *flags)
    assert capsys.readouterr().out.count("--- row") == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_shows_the_data(rank, train, capsys, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "process_index", rank)
    train("--show_data", 1)
    assert capsys.readouterr().out.count("--- row") == (rank == 0)


def test_a_file_has_no_split_to_evaluate_on(train, data_file):
    for flags in (("--eval_split", "test"), ("--eval_data_path", data_file, "--eval_split", "test")):
        with pytest.raises(BadInput, match="is a file, so it has no split 'test'"):
            train(*flags)


def test_several_files_and_a_split_to_evaluate_on(train, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    directory = tmp_path / "set"
    directory.mkdir()
    conversations = make_conversations(14)
    for name, part in (("train-0", slice(0, 5)), ("train-1", slice(5, 10)), ("test", slice(10, 14))):
        write_jsonl(directory / f"{name}.jsonl", conversations[part])
    out = train("--data_path", directory, "--eval_split", "test", "--max_steps", 1)
    assert "10 rows to train on, 4 to evaluate on" in caplog.text and logged(out, "eval_loss")
    # one flag, two paths
    both = [directory / "train-0.jsonl", directory / "train-1.jsonl"]
    again = train("--data_path", f"{both[0]}", "--eval_data_path", f"{both[1]}", "--max_steps", 1, output="again")
    assert "5 rows to train on, 5 to evaluate on" in caplog.text and logged(again, "eval_loss")


def test_the_same_split_twice_is_refused(train):
    with pytest.raises(BadInput, match="--eval_split train is what is trained on"):
        train("--eval_split", "train")


def test_kwargs_that_are_no_json_are_refused_before_anything_loads(train):
    with pytest.raises(BadInput, match="--chat_template_kwargs"):
        train("--chat_template_kwargs", "{", "--model_name_or_path", "no/such/model")


class Tomorrow(datetime.date):
    @classmethod
    def today(cls):
        return cls(2031, 1, 2)


def test_a_run_is_resumed_on_another_day_with_the_data_of_the_first(train, model_dir, monkeypatch):
    """Though the chat template prints the date."""
    make_tokenizer("llama3", DATED).save_pretrained(model_dir)
    flags = ("--max_steps", 4, "--save_steps", 2, "--medusa_only_heads", True, "--lr_scheduler_type", "constant")
    whole = weights(train(*flags, output="whole"))
    train("--max_steps", 2, *flags[2:])
    monkeypatch.setattr(run, "Date", Tomorrow)
    resumed = train(*flags, "--resume_from_checkpoint", True)
    assert_same(weights(resumed), whole)
    assert json.loads((resumed / "checkpoint-4" / "run.json").read_text())["date"] == datetime.date.today().isoformat()


def test_the_models_own_stop_tokens_are_learnt(train, model_dir, data_file, capsys):
    """Here the next role's marker, where the template has no end of turn."""
    template = "{% for m in messages %}<|start_header_id|>{{ m.content }}{% endfor %}"
    tokenizer = make_tokenizer("llama3", template)
    tokenizer.save_pretrained(model_dir)
    GenerationConfig(eos_token_id=1).save_pretrained(model_dir)
    train("--show_data", 1)
    assert "<|start_header_id|>⟧" not in capsys.readouterr().out
    GenerationConfig(eos_token_id=[1, tokenizer.convert_tokens_to_ids("<|start_header_id|>")]).save_pretrained(
        model_dir
    )
    train("--show_data", 1)
    assert "<|start_header_id|>⟧" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("stage_1", [True, False])
def test_packed_rows_train_the_same_with_a_mask_and_by_segments(train, monkeypatch, caplog, stage_1):
    """The whole trainer, stage 2 with layers that are recomputed; segments by plain torch."""
    flags = ("--packing", True, "--medusa_only_heads", stage_1, "--max_steps", 4, "--model_max_length", 96)
    flags += () if stage_1 else ("--gradient_checkpointing", True)
    caplog.set_level(logging.INFO)
    found = []
    for varlen in (False, True):
        if varlen:
            monkeypatch.setattr("model.varlen.misfit", lambda *_: None)
        out = train(*flags, output=f"varlen {varlen}")
        log = json.loads((out / "trainer_state.json").read_text())["log_history"]
        assert ("packed rows: attention of variable length" in caplog.text) == varlen
        found.append([(entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry])
    assert len(found[0]) == 4
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=1e-3, atol=1e-4)
