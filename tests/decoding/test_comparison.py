"""decoding/comparison.py: which pass yielded which piece of a text, and two texts side by side."""

from conftest import make_tokenizer

from decoding.comparison import pieces_of, side_by_side


def test_pieces_come_with_the_pass_that_completes_them():
    tokenizer = make_tokenizer("llama3")
    ids = tokenizer("the moon 🌕 rises", add_special_tokens=False)["input_ids"]
    lengths = [1] * (len(ids) - 1)
    assert pieces_of(ids, lengths, tokenizer, "") == "the moon 🌕 rises"
    assert "\ufffd" not in pieces_of(ids, lengths, tokenizer, "|")
    assert pieces_of(ids, [len(ids) - 1], tokenizer, "|").count("|") == 1


def test_two_columns():
    lines = side_by_side("one two three\n\nfour", "a", 23).splitlines()
    assert lines == ["one two    | a", "three      |", "           |", "four       |"]
