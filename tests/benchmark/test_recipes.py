"""benchmark/recipes.py: its file of recipes, and that its figures are those of evaluate.py's way."""

import sys

import pytest
import recipes
import torch
from conftest import write_jsonl
from csvs import rows_of

from conversations.batches import Collator
from decoding.accuracy import figures, own_ranks
from medusa_model import MedusaModel


def test_a_file_of_recipes(tmp_path):
    path = tmp_path / "recipes.txt"
    path.write_text("# two\n: --a 1 --b 'x y'\none: --c 2\n\n two : --a 3\n: --d 4\nthree:\n")
    assert recipes.read_recipes(path) == [
        ("one", ["--a", "1", "--b", "x y", "--c", "2"]),
        ("two", ["--a", "1", "--b", "x y", "--a", "3"]),
        ("three", ["--d", "4"]),
    ]
    for text in ("no colon\n", "one: --a\none: --b\n"):
        path.write_text(text)
        with pytest.raises(SystemExit, match="not `name: flags`, or the name of an earlier line"):
            recipes.read_recipes(path)


@pytest.mark.processes
@pytest.mark.usefixtures("plain_torch")
def test_a_recipe_is_trained_and_counted_as_evaluate_counts(store, model_dir, tmp_path, monkeypatch):
    words = ["warm", "stone", "cold", "moon", "river", "tree"]
    said = [{"prompt": " ".join(words[: i % 5 + 1]), "completion": " ".join(words[i % 3 :] * 2)} for i in range(24)]
    write_jsonl(tmp_path / "chats.jsonl", said)
    states = store("--dtype", "float32", "--data_path", tmp_path / "chats.jsonl", "--eval_holdout", 8)
    out, file = tmp_path / "out.csv", tmp_path / "recipes.txt"
    file.write_text(": --medusa_num_heads 2 --max_steps 6 --learning_rate 1e-2\nce:\n")
    argv = f"recipes.py --model {model_dir} --states {states} --recipes {file} --runs {tmp_path / 'runs'} --out {out}"
    monkeypatch.setattr(sys, "argv", argv.split())
    recipes.main()
    (found,) = rows_of(out)
    assert found["recipe"] == "ce"
    index = recipes.read_index(states)
    rows = recipes.StoredRows(states, index["shards"]["eval"], index, torch.float32)
    starts = [int((row["labels"] >= 0).argmax()) for row in rows]
    prompts = [row["input_ids"][:n].tolist() for row, n in zip(rows, starts, strict=True)]
    answers = [row["input_ids"][n:].tolist() for row, n in zip(rows, starts, strict=True)]
    model = MedusaModel.from_pretrained(tmp_path / "runs" / "ce")
    want = figures(own_ranks(model, prompts, answers, Collator(0), 4))
    assert found["top1"].split() == [f"{top[0]:.4f}" for top in want["top"][1:]]
    assert {key: found[key] for key in ("chain", "8")} == {
        "chain": f"{want['acceptance'][0]['length']:.3f}",
        "8": next(f"{row['length']:.3f}" for row in want["acceptance"] if row["nodes"] == 8),
    }


def test_a_training_that_fails_ends_the_run(tmp_path, model_dir, monkeypatch):
    monkeypatch.setattr(recipes, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text("import sys\nsys.exit(f'not a flag: {sys.argv[-2]}')\n")
    file = tmp_path / "recipes.txt"
    file.write_text("bad: --no_such_flag 1\n")
    argv = f"recipes.py --model {model_dir} --states {tmp_path} --recipes {file} --out {tmp_path / 'out.csv'}"
    monkeypatch.setattr(sys, "argv", argv.split())
    with pytest.raises(SystemExit, match="not a flag: --no_such_flag"):
        recipes.main()
    assert not (tmp_path / "out.csv").exists()
