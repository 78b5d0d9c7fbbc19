"""decoding/choosing.py, and what it reads of accuracy.json: flags and figures that cannot be."""

import json
from types import SimpleNamespace

import pytest

from common.errors import BadInput
from decoding.choosing import check_tree_options
from decoding.tree import measured_temperature, ranks


@pytest.mark.parametrize("temperature", [0, 0.0, -1.5, "warm", True])
def test_a_temperature_that_is_none(temperature, tmp_path):
    (tmp_path / "accuracy.json").write_text(json.dumps({"own": {"temperature": temperature}}))
    with pytest.raises(BadInput, match="which must be a number above 0"):
        measured_temperature(tmp_path / "accuracy.json")


def test_a_temperature_that_is_one_and_none_at_all(tmp_path):
    for own, expected in (({"temperature": 1.4}, 1.4), ({}, 1.0), (None, 1.0)):
        (tmp_path / "accuracy.json").write_text(json.dumps({"own": own}))
        assert measured_temperature(tmp_path / "accuracy.json") == expected


def test_flags():
    check_tree_options(SimpleNamespace(nodes=None, adaptive=None))
    check_tree_options(SimpleNamespace(nodes=4, adaptive=3))
    check_tree_options(SimpleNamespace(nodes=0, adaptive=None))
    with pytest.raises(BadInput, match="--nodes -1: it must be 0 or more"):
        check_tree_options(SimpleNamespace(nodes=-1, adaptive=None))
    for nodes in (None, 0):
        with pytest.raises(BadInput, match="--adaptive needs the number of guesses"):
            check_tree_options(SimpleNamespace(nodes=nodes, adaptive=3))


def test_guesses_of_the_tokens_that_there_are():
    assert ranks([(4,), (0,)], 5) == 5 and ranks([(0,), (0, 2)], 9) == 3 and ranks([], 9) == 0
    with pytest.raises(BadInput, match="the tree has rank 5, but heads guess 5 tokens"):
        ranks([(0,), (5,)], 5)
