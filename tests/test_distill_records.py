"""distill.py: what its records hold beside the text, and which prompts it asks."""

from datetime import date as Date

import pytest
from conftest import make_tokenizer, write_jsonl
from distilling import records

from common.errors import BadInput
from conversations.labels import encode
from conversations.template import ChatTemplate

pytest_plugins = ("distilling",)


def test_a_thought_that_the_prompt_opens_is_whole_in_the_messages_and_trained_on_as_it_was(ask, chat_dir):
    """The chat template would cut it out of the finished answer."""
    tokenizer = make_tokenizer(
        "llama3",
        "{% for m in messages %}{{ m.content.split('</think>')[-1] }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}{% if think %}<think>\n{% endif %}{% endif %}",
    )
    tokenizer.save_pretrained(chat_dir)
    out = records(ask(chat_template_kwargs='{"think": true}'))
    assert out
    for record in out:
        assert tokenizer.decode(record["prompt_ids"]).endswith("<|eot_id|><think>\n")
        assert record["messages"][-1]["content"].startswith("<think>\n")
        (row,) = encode(record, ChatTemplate(tokenizer), 1000)
        assert row["input_ids"] == record["prompt_ids"] + record["answer_ids"]
    assert "<think>" not in ask("other.jsonl", chat_template_kwargs='{"think": false}').read_text()


def test_system_turns_are_kept_or_given(ask, tmp_path):
    turns = [{"role": "system", "content": "be old"}, {"role": "user", "content": "why"}]
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"messages": turns}, {"messages": turns[1:]}])
    found = [r["messages"][0] for r in records(ask(prompts=prompts, max_new_tokens=40, system="be new"))]
    assert found == [{"role": "system", "content": f"be {age}"} for age in ("old", "new")]


def test_prompts_that_the_template_refuses_are_left_out_and_counted(ask, chat_dir, tmp_path, caplog):
    caplog.set_level("INFO")
    template = "{{ raise_exception('no system') if messages[0].role == 'system' }}{{ messages[0].content }}<|eot_id|>"
    (chat_dir / "chat_template.jinja").write_text(template)
    turns = [{"role": "system", "content": "be old"}, {"role": "user", "content": "why"}]
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"messages": turns}, {"messages": turns[1:]}])
    assert [record["prompt"] for record in records(ask(prompts=prompts, max_new_tokens=40))] == [2]
    assert "1 prompts that the chat template does not write (the chat template refuses it: no system)" in caplog.text
    with pytest.raises(BadInput, match="no prompt can be asked: the chat template refuses it: no system"):
        ask("none.jsonl", prompts=prompts, system="be new")


def test_a_template_that_prints_the_day_is_gone_on_with_tomorrow(ask, chat_dir, monkeypatch):
    class Yesterday(Date):
        @classmethod
        def today(cls):
            return cls(2026, 1, 2)

    template = chat_dir / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + template.read_text())
    with monkeypatch.context() as patch:
        patch.setattr("distill.Date", Yesterday)
        out = ask()
    whole = out.read_text()
    out.write_text("".join(line + "\n" for line in whole.split("\n")[:3]))
    assert ask().read_text() == whole and '"date": "2026-01-02"' in whole
