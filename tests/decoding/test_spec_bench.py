"""decoding/spec_bench.py: its questions are read, and its figures are those of its own arithmetic."""

import json

import pytest

from common.errors import BadInput
from decoding.answers import Decoded
from decoding.spec_bench import read_questions, table


def test_both_forms_of_its_questions(tmp_path):
    path = tmp_path / "question.jsonl"
    lines = [
        {"question_id": 81, "category": "writing", "turns": ["Compose a post.", "Rewrite it."], "reference": []},
        {"question_id": 321, "category": "qa", "turns": ["who played anna"]},
        {"group": "rag", "id": 481, "messages": [{"role": "user", "content": "Some text"}]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    found = read_questions(str(path))
    assert [x["group"] for x in found] == ["mt_bench", "qa", "rag"]
    assert [x["messages"][0]["content"] for x in found] == ["Compose a post.", "who played anna", "Some text"]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"category": "qa"}', '{"category": "qa", "turns": []}', '{"category": "x", "turns": ["a"]}',
             '{"category": "qa", "turns": [5]}'],
)  # fmt: skip
def test_other_lines(line, tmp_path):
    path = tmp_path / "question.jsonl"
    path.write_text('{"category": "qa", "turns": ["a"]}\n' + line)
    with pytest.raises(BadInput, match=r"question\.jsonl: line 2 is no question of Spec-Bench"):
        read_questions(str(path))


def test_no_file_and_an_empty_one(tmp_path):
    with pytest.raises(BadInput, match="cannot read --spec_bench"):
        read_questions(str(tmp_path / "none"))
    (tmp_path / "empty").touch()
    with pytest.raises(BadInput, match="is empty"):
        read_questions(str(tmp_path / "empty"))


def test_figures():
    """By hand: two questions of qa, one of rag."""
    answers = [[1] * 7, [1] * 5, [1] * 4]
    heads = Decoded("heads", answers, [[3, 3], [1, 3], [3]], [0.4, 0.6, 0.2], [0.1, 0.4, 0.3])
    plain = Decoded("plain", answers, [[1] * 6, [1] * 4, [1] * 3], [1.3, 0.6, 0.7], [0.1, 0.4, 0.3])
    qa, rag, overall = table(plain, heads, ["qa", "rag", "qa"])
    assert qa["task"] == "qa" and qa["questions"] == 2
    assert qa["mean accepted tokens"] == pytest.approx((3 + 3 + 3) / 3)
    assert qa["tokens/s"] == pytest.approx((7 / 0.5 + 4 / 0.5) / 2)
    assert qa["baseline tokens/s"] == pytest.approx((7 / 1.4 + 4 / 1.0) / 2)
    assert qa["speedup"] == pytest.approx(11 / 4.5)
    assert rag["mean accepted tokens"] == 2 and rag["speedup"] == pytest.approx(1)
    assert overall["task"] == "overall" and overall["mean accepted tokens"] == pytest.approx(13 / 5)
    assert overall["speedup"] == pytest.approx((14 + 5 + 8) / (5 + 5 + 4))
