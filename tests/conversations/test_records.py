"""conversations/records.py: the shapes of records, and which records are refused."""

import json

import pytest
from chats import ANSWER, ASKED, CALLED, RED, RED_PAIRS, SYSTEM, THOUGHT, TOOL, USER, WHOLE, called, chat, made, turn

from conversations.records import CUT_OFF, to_conversation

SHAPES = {
    "chat": ({"messages": RED}, RED),
    "ShareGPT": ({"id": "x", "conversations": RED_PAIRS}, RED),
    "role and content under conversations": ({"conversations": RED}, RED),
    "LMSYS": ({"conversation": RED, "language": "English"}, RED),
    "an empty list first": ({"messages": [], "conversations": RED_PAIRS}, RED),
    "JSON text": ({"messages": json.dumps(RED)}, RED),
    "turns as JSON text": ({"messages": [json.dumps(t) for t in RED]}, RED),
    "columns": ({"messages": {"role": ["user", "assistant"], "content": ["the cat", "red dog"], "name": None}}, RED),
    "prompt and completion": ({"prompt": "the cat", "completion": "red dog"}, RED),
    "TRL": ({"prompt": RED[:1], "completion": RED[1:]}, RED),
    "turns and a text": ({"prompt": [SYSTEM, ASKED], "completion": "red dog"}, [SYSTEM, *RED]),
    "instruction and response": ({"instruction": "the cat", "response": "red dog"}, RED),
    "question and answer": ({"question": "the cat", "answer": "red dog"}, RED),
    "query and output": ({"query": "the cat", "output": "red dog"}, RED),
    "input and output": ({"input": "the cat", "output": "red dog"}, RED),
    "an answer that is a list": ({"prompt": "the cat", "completion": "[1, 2]"}, [ASKED, turn("assistant", "[1, 2]")]),
    "Alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        [turn("user", "Add.\n\n1 2"), turn("assistant", "3")],
    ),
    "Alpaca without input": ({"instruction": "the cat", "input": "", "output": "red dog"}, RED),
    "context": (
        {"instruction": "Add.", "context": "1 2", "response": "3"},
        [turn("user", "Add.\n\n1 2"), turn("assistant", "3")],
    ),
    "history": (
        {"system": "moon", "history": [["why", "cold"]], "instruction": "the cat", "output": "red dog"},
        [SYSTEM, USER, ANSWER, *RED],
    ),
    "system beside": ({"system": "moon", "conversations": RED_PAIRS}, [SYSTEM, *RED]),
    "system_prompt beside": ({"system_prompt": "moon", "messages": RED}, [SYSTEM, *RED]),
    "the same system twice": ({"system": "moon", "messages": [SYSTEM, *RED]}, [SYSTEM, *RED]),
    "no system": ({"system": "", "system_prompt": None, "messages": RED}, RED),
    "developer": ({"messages": [turn("developer", "moon"), *RED]}, [turn("developer", "moon"), *RED]),
    "capitals": ({"messages": [turn("USER", "the cat"), turn("Assistant", "red dog")]}, RED),
    "parts": (
        {"messages": [turn("user", [{"type": "text", "text": "the "}, "cat"]), turn("assistant", ["red dog"])]},
        RED,
    ),
    "parts of other names": (
        {
            "messages": [
                turn("user", [{"type": "input_text", "text": "the cat"}]),
                turn("assistant", [{"type": "output_text", "text": "red dog"}]),
            ]
        },
        RED,
    ),
    "a part that is a thought": (
        {
            "messages": [
                ASKED,
                turn(
                    "assistant",
                    [{"type": "thinking", "thinking": "the cat sees"}, {"type": "text", "text": "red dog"}],
                ),
            ]
        },
        THOUGHT,
    ),
    **{
        f"thoughts under {name}": ({"messages": [ASKED, RED[1] | {name: "the cat sees"}]}, THOUGHT)
        for name in ("reasoning_content", "reasoning", "thinking")
    },
    "think tags stay": (
        {"messages": [ASKED, turn("assistant", "<think>\nsees\n</think>\n\nred dog")]},
        [ASKED, turn("assistant", "<think>\nsees\n</think>\n\nred dog")],
    ),
    "names of people": ({"messages": [ASKED | {"name": "Ann"}, RED[1]]}, [ASKED | {"name": "Ann"}, RED[1]]),
    "weight of a question": ({"messages": [ASKED | {"weight": 0}, RED[1] | {"weight": 1.0}]}, RED),
    "an empty answer": ({"messages": [USER, turn("assistant", ""), *RED]}, [USER, turn("assistant", ""), *RED]),
    "an empty result": (
        {"messages": [*CALLED[:2], turn("tool", ""), CALLED[3]]},
        [*CALLED[:2], turn("tool", ""), CALLED[3]],
    ),
}


@pytest.mark.parametrize(("record", "messages"), SHAPES.values(), ids=SHAPES)
def test_shapes(record, messages):
    assert made(record) == WHOLE | {"messages": messages}
    assert made(json.loads(json.dumps(record))) == WHOLE | {"messages": messages}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]], ids=["list", "text", "texts"])
def test_tools(tools):
    assert made({"messages": RED, "tools": tools})["tools"] == [TOOL]


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools(tools):
    assert made({"messages": RED, "tools": tools})["tools"] is None


def test_tokens_and_unfinished_are_kept():
    ids = {"prompt_ids": [1, 2], "answer_ids": [3]}
    assert made({"messages": RED, "unfinished": True} | ids) == WHOLE | ids | {"messages": RED, "unfinished": True}
    assert made({"messages": RED, "unfinished": None, "prompt_ids": None}) == WHOLE | {"messages": RED}


IDS = "'prompt_ids' and 'answer_ids' are not two lists of token ids"
REFUSED = [
    ("no turns: 'messages' is empty", {"messages": []}),
    ("no turns: its fields are 'id', 'text'", {"text": "why", "id": 3}),
    ("no turns: its fields are 'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', ...", dict.fromkeys("abcdefghi")),
    ("no turns: its fields are 'prompt'", {"prompt": "why"}),
    ("no turns: it has no fields", {}),
    ("'messages' is not a list of turns", {"messages": "why"}),
    ("the turns are an object, but not of lists of one length", {"messages": {"role": ["user"], "content": []}}),
    *(("a record that is no object", record) for record in ("why", [USER, ANSWER], None)),
    ("the file is cut off here", CUT_OFF),
    ("turn 2 is not an object", {"messages": [USER, "cold"]}),
    ("unknown role 'narrator'", {"messages": [USER, ANSWER, turn("narrator", "42")]}),
    ("unknown role None", {"messages": [{"content": "why"}, ANSWER]}),
    ("unknown role [1]", {"messages": [turn([1], "why"), ANSWER]}),  # cannot be looked up in a dict
    ("two user turns in a row", {"messages": [USER, USER, ANSWER]}),
    ("two assistant turns in a row", {"messages": [USER, ANSWER, ANSWER]}),
    ("a tool turn right behind a user turn", {"messages": [USER, turn("tool", "42"), ANSWER]}),
    *(("a turn without text", {"messages": [turn("user", text), ANSWER]}) for text in ("", " \n", None, [], [""])),
    ("a turn without text", {"messages": [USER, turn("assistant", None)]}),
    *(("a turn whose text is no string", {"messages": [turn("user", text), ANSWER]}) for text in (42, {"a": 1})),
    (
        "a turn with a part of type 'image_url', which is no text",
        {"messages": [turn("user", [{"type": "text", "text": "why"}, {"type": "image_url"}]), ANSWER]},
    ),
    *(
        (f"a {role} turn that is not the first", {"messages": [USER, ANSWER, turn(role, "moon"), USER, ANSWER]})
        for role in ("system", "developer")
    ),
    ("'system' is not what the system turn says", {"system": "sun", "messages": [SYSTEM, USER, ANSWER]}),
    ("'system' is no text", {"system": ["sun"], "messages": [USER, ANSWER]}),
    *(("'unfinished' is not true or false", {"messages": [USER, ANSWER], "unfinished": x}) for x in ("yes", "", 0, 1)),
    *(("no answer by the assistant", {"messages": [said]}) for said in (USER, ANSWER, SYSTEM)),
    ("no answer that says anything", {"messages": [USER, turn("assistant", ""), USER, turn("assistant", " ")]}),
    ("no answer to learn: each has weight 0 or train false", {"messages": [USER, ANSWER | {"weight": 0}]}),
    ("a turn of weight 0.5: only 0 and 1 are known", {"messages": [USER, ANSWER | {"weight": 0.5}]}),
    ("'train' of a turn is 'no', not true or false", {"messages": [USER, ANSWER | {"train": "no"}]}),
    ("'tools' is not a list of objects", {"messages": [USER, ANSWER], "tools": ["search"]}),
    ("a call of a tool that has no name, or is no JSON", called(tool_calls=[{"function": {}}])),
    ("a call of a tool that has no name, or is no JSON", called(role="function_call", value="w(x)")),
    ("a call of a tool whose arguments are no object", called(tool_calls=[{"name": "w", "arguments": [1]}])),
    ("'history' is not a list of pairs of question and answer", {"prompt": "a", "output": "b", "history": ["c"]}),
    *(
        (IDS, {"messages": [USER, ANSWER]} | ids)
        for ids in (
            {"prompt_ids": [1]},
            {"prompt_ids": [1], "answer_ids": "2"},
            {"prompt_ids": [1], "answer_ids": [2.0]},
            {"prompt_ids": [-1], "answer_ids": [2]},
            {"prompt_ids": [1], "answer_ids": [2**31]},
            {"prompt_ids": [True], "answer_ids": [2]},
        )
    ),
    *(
        ("a turn with half a character (a lone surrogate)", record)
        for record in (
            {"messages": chat("why", "a\ud83d")},
            {"messages": [USER, ANSWER | {"reasoning": "a\ud83d"}]},
            {"messages": [USER, ANSWER], "system": "a\ud83d"},
            {"messages": [USER, ANSWER], "tools": [{"name": "a\ud83d"}]},
        )
    ),
]


@pytest.mark.parametrize(("problem", "record"), REFUSED)
def test_refused_records(problem, record):
    assert to_conversation(record) == (None, problem, [])


FIRST, LAST = "an answer before the first question", "a question after the last answer"


@pytest.mark.parametrize("start", [[], [SYSTEM]])
def test_first_answers_and_last_question_are_left_out(start):
    turns = [*start, ANSWER, ANSWER, USER, ANSWER, USER]
    conversation, problem, dropped = to_conversation({"messages": turns})
    assert (conversation, problem) == (WHOLE | {"messages": [*start, USER, ANSWER]}, "")
    assert dropped == [FIRST, FIRST, LAST]


def test_results_of_tools_without_question_or_answer_are_left_out():
    calls, result = CALLED[1:3]
    conversation, _, dropped = to_conversation({"messages": [calls, result, *CALLED, USER, calls, result, result]})
    assert conversation["messages"] == [*CALLED, USER, calls]
    assert dropped == [
        FIRST,
        "a tool's result before the first question",
        *["a tool's result after the last answer"] * 2,
    ]


def test_an_empty_system_turn_is_left_out():
    conversation, problem, dropped = to_conversation({"messages": [turn("system", ""), *RED]})
    assert (conversation["messages"], problem, dropped) == (RED, "", ["an empty system turn"])


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [SYSTEM, USER]}, [SYSTEM, USER]),
        ({"messages": [USER, ANSWER, USER]}, [USER, ANSWER, USER]),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, [USER, ANSWER | {"train": False}]),
        ({"prompt": "why"}, [USER]),
        ({"instruction": "why", "input": "", "system": "moon"}, [SYSTEM, USER]),
        ({"prompt": [USER]}, [USER]),
        ({"messages": [USER], "unfinished": True, "prompt_ids": [1]}, [USER]),  # of an answer that is not asked for
    ],
)
def test_a_prompt_needs_no_answer(record, messages):
    assert made(record, ask=True) == WHOLE | {"messages": messages}


def test_a_prompt_needs_a_question():
    assert to_conversation({"messages": [SYSTEM]}, ask=True) == (None, "no question by the user", [])
