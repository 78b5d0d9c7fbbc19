"""conversations/prompts.py: what is asked."""

from conftest import write_jsonl

from conversations.prompts import read_prompts


def test_the_first_question_is_asked_not_the_system_prompt(tmp_path):
    turns = [("system", "be terse"), ("user", "why"), ("assistant", "warm")]
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    assert read_prompts(chats) == ["why"]
