"""Prompts: from a file or a conversation, and as tokens."""

from collections import Counter

from common.errors import BadInput, first_line
from conversations.json_files import read_chunks
from conversations.sources import load_conversations
from conversations.summary import Summary
from conversations.template import ChatTemplate, Refusal


def read_prompts(
    path: str, summary: Summary | None = None, *, config: str | None = None, split: str | None = None
) -> list[dict]:
    """Conversations that wait for an answer, in the normal form: the lines of a .txt file, or what stands before the
    first answer of each record of anything else that `load_conversations` takes, system turns and tools included.
    Raises BadInput if there are none."""
    if not path.endswith(".txt"):
        rows = load_conversations(path, summary, config=config, split=split, ask=True).remove_columns("record")
        return [dict(row) | {"messages": ask(row["messages"])} for row in rows]
    try:
        text = b"".join(read_chunks(path)).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the prompts in {path}: {first_line(error)}") from error
    prompts = [line.strip(" \t\r") for line in text.split("\n") if line.strip()]  # other signs are no line ends
    if not prompts:
        raise BadInput(f"{path} holds no prompts: write one a line")
    if summary:
        summary.read += len(prompts)
    return [question(prompt) for prompt in prompts]


def ask(messages: list[dict]) -> list[dict]:
    """The turns before the first answer."""
    return messages[: next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))]


def question(text: str) -> dict:
    """A conversation of one question."""
    rest = {"tools": None, "unfinished": False, "prompt_ids": None, "answer_ids": None, "group": None}
    return {"messages": [{"role": "user", "content": text}]} | rest


def with_system(conversation: dict, system: str | None) -> dict:
    """The conversation with a system turn in front, if one is given and it has none."""
    messages = conversation["messages"]
    if not system or messages[0]["role"] in ("system", "developer"):
        return conversation
    return conversation | {"messages": [{"role": "system", "content": system}, *messages]}


def tokenise(conversations: list[dict], chat: ChatTemplate, refused: Counter[str] | None = None) -> list[list[int]]:
    """Each conversation as tokens, up to where the assistant's answer begins. Where the template does not write one:
    counts it in `refused` and gives no tokens, or raises Refusal, which names the prompt."""
    texts = []
    for number, conversation in enumerate(conversations, 1):
        try:
            texts.append(chat.prompt(conversation["messages"], conversation.get("tools")))
        except Refusal as refusal:
            if refused is None:
                raise Refusal(f"prompt {number}: {refusal}") from refusal
            refused[str(refusal)] += 1
            texts.append("")
    return chat.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
