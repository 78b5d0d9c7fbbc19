"""conversations/turns.py: roles, what is not to be learnt, and calls of tools."""

import json

import pytest
from chats import ANSWER, ASKED, CALL, CALLED, RED, SYSTEM, TOOL, USER, WHOLE, called, made, turn

ARGUMENTS = json.dumps(CALL["function"]["arguments"])
CALLS = {
    "a call": (called(content=None, tool_calls=[CALL]), CALLED),
    "arguments as text": (called(tool_calls=[{"function": {"name": "w", "arguments": ARGUMENTS}}]), CALLED),
    "calls as text": (called(tool_calls=json.dumps([CALL])), CALLED),
    "a call without wrapper": (called(tool_calls=[CALL["function"]]), CALLED),
    "OpenAI's old call": (called(content=None, function_call={"name": "w", "arguments": ARGUMENTS}), CALLED),
    "a turn that is a call": (called(role="function_call", value=json.dumps(CALL["function"])), CALLED),
    "names of calls": (
        called(
            turn("function", "sun") | {"tool_call_id": "1"},
            content="I look.",
            tool_calls=[
                CALL | {"id": "1"},
                {"function": {"name": "v"}},
                {"function": {"name": "u", "arguments": "x"}},
            ],
        ),
        [
            CALLED[0],
            turn("assistant", "I look.")
            | {
                "tool_calls": [
                    CALL | {"id": "1"},
                    {"type": "function", "function": {"name": "v", "arguments": {}}},
                    {"type": "function", "function": {"name": "u", "arguments": "x"}},  # no JSON: as it is
                ]
            },
            turn("tool", "sun") | {"tool_call_id": "1"},
            *CALLED[2:],
        ],
    ),
}


@pytest.mark.parametrize(("record", "messages"), CALLS.values(), ids=CALLS)
def test_calls(record, messages):
    assert made(record) == WHOLE | {"messages": messages}


@pytest.mark.parametrize(
    "field", [{"weight": 0}, {"train": False}, {"training": False}, {"weight": 0.0, "train": True}], ids=str
)
def test_an_answer_that_is_not_to_be_learnt(field):
    record = {"messages": [USER, ANSWER | field, ASKED, RED[1] | {"weight": 1, "train": True, "training": None}]}
    assert made(record) == WHOLE | {"messages": [USER, ANSWER | {"train": False}, *RED]}


@pytest.mark.parametrize("name", ["gpt", "chatgpt", "bing", "bard", "model", "bot", "assistant"])
@pytest.mark.parametrize("asker", ["human", "user", "prompter"])
def test_names_of_roles(asker, name):
    said = (("system", "moon"), (asker, "why"), (name, "cold"))
    turns = [{"from": role, "value": text} for role, text in said]
    assert made({"conversations": turns})["messages"] == [SYSTEM, USER, ANSWER]


@pytest.mark.parametrize(
    "role", ["tool", "function", "observation", "ipython", "function_response", "tool_response", "Tool"]
)
def test_names_of_tools(role):
    record = {"messages": [*CALLED[:2], CALLED[2] | {"role": role}, CALLED[3]], "tools": [TOOL]}
    assert made(record) == WHOLE | {"messages": CALLED, "tools": [TOOL]}
