"""evaluate.py: the accuracies are those of a direct computation, and the script reads what training leaves behind."""

import json
import logging
import sys

import pytest
import torch
from conftest import make_backbone, make_conversations, make_tokenizer, randomise, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import evaluate
from acceptance import NO_TOKEN, TOP, acceptance, right_path
from batches import Collator
from errors import BadInput
from medusa_loss import IGNORE
from medusa_model import MedusaConfig, MedusaModel

HEADS = 3
ENDS = list(range(1, 320, 24))  # a random model hardly ever says one given token, so many end an answer


@pytest.fixture(autouse=True)
def _one_thread():
    """Products this small gain nothing from a second thread, and on a busy machine wait long for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quiet(batches, **_):
    return batches


def hits(logits, targets, n):
    """How many targets are among the n best tokens."""
    return (logits.topk(n).indices == targets[:, None]).any(1).sum().item()


def make_model(heads_std=None, **kwargs):
    """In float64, so that no two logits tie and no order of summation changes a rank."""
    backbone = make_backbone(**kwargs).double()
    model = MedusaModel.from_backbone(backbone, MedusaConfig(medusa_num_heads=HEADS)).eval()
    if heads_std:
        randomise(model.medusa_heads, heads_std)
    return model


def make_batches():
    """Three batches of uneven length; about a third of the labels do not count."""
    ids = [torch.randint(320, (4, length)) for length in (8, 24, 40)]
    return [{"input_ids": i, "labels": i.masked_fill(torch.rand(i.shape) < 0.3, IGNORE)} for i in ids]


@pytest.mark.parametrize("rows", [0, 1, evaluate.ROWS, evaluate.ROWS + 188])
def test_ranks_are_places_in_the_order_of_all_logits(rows):
    projection = torch.randn(50, 16, dtype=torch.float64)
    hidden, targets = torch.randn(rows, 16, dtype=torch.float64), torch.randint(50, (rows,))
    chunks = []

    def logits_of(x):
        chunks.append(len(x))
        return x @ projection.t()

    ranks = evaluate.ranks(logits_of, hidden, targets)
    logits = hidden @ projection.t()
    orders = logits.argsort(descending=True).tolist()
    assert ranks.tolist() == [min(order.index(t), TOP) for order, t in zip(orders, targets.tolist(), strict=True)]
    assert max(chunks) <= evaluate.ROWS and sum(chunks) == rows  # never the logits of all rows at once
    counts = evaluate.count(ranks[:, None])
    assert counts[0, :TOP].cumsum(0).tolist() == [hits(logits, targets, n) for n in range(1, TOP + 1)]
    assert counts.sum() == rows
    assert evaluate.accuracy(counts)[0] == [hits(logits, targets, n) / max(1, rows) for n in range(1, TOP + 1)]


def test_untrained_heads_are_what_they_were_before():
    result = evaluate.evaluate(make_model(), make_batches(), quiet)
    assert result["top"] == result["before"]
    assert all(before[-1] > 0 for before in result["before"])  # not equal because both are nothing


def test_equals_a_direct_computation():
    model, batches = make_model(heads_std=0.2), make_batches()
    result = evaluate.evaluate(model, batches, quiet)
    for k in range(HEADS + 1):
        guesses, copies, targets = [], [], []
        for batch in batches:
            logits, ahead = model(batch["input_ids"]).logits.detach()[:, :, : -(k + 1)], batch["labels"][:, k + 1 :]
            guesses.append(logits[k][ahead != IGNORE])
            copies.append(logits[0][ahead != IGNORE])
            targets.append(ahead[ahead != IGNORE])
        guesses, copies, targets = torch.cat(guesses), torch.cat(copies), torch.cat(targets)
        assert result["rows"][k] == len(targets) > 0
        for name, logits in (("top", guesses), ("before", copies)):
            want = [hits(logits, targets, n) / len(targets) for n in range(1, TOP + 1)]
            assert result[name][k] == pytest.approx(want)
    assert result["top"][1:] != result["before"][1:]


def ranks_by_hand(model, prompt, answer):
    """The table `own_ranks` should give for one conversation, from all logits of the whole text."""
    text = prompt + answer
    with torch.no_grad():
        orders = model(torch.tensor([text])).logits[:, 0].argsort(descending=True).tolist()
    return [
        [min(orders[k][at - 1].index(text[at + k]), TOP) if at + k < len(text) else NO_TOKEN for k in range(HEADS + 1)]
        for at in range(len(prompt), len(text))
    ]


@pytest.fixture
def answered():
    """-> a model with so few tokens that its heads are often right, 11 prompts of uneven lengths, and answers."""
    prompts, answers = (
        [torch.randint(14, (int(length),)).tolist() for length in torch.randint(low, 24, (11,))] for low in (3, 1)
    )
    prompts[4], answers[4], answers[5] = prompts[4] + [0] * 60, answers[4][:1], answers[5] + answers[6] * 3
    return make_model(heads_std=0.2, vocab_size=14), prompts, answers


@pytest.mark.parametrize("batch_size", [1, 4, 20])
def test_own_ranks_equal_those_of_one_text_after_the_other(answered, batch_size):
    tables = evaluate.own_ranks(*answered, Collator(pad_token_id=0), batch_size, quiet)
    wanted = [ranks_by_hand(answered[0], *pair) for pair in zip(*answered[1:], strict=True)]
    assert [table.tolist() for table in tables] == wanted
    assert {rank for table in wanted for row in table for rank in row} == {NO_TOKEN, *range(TOP + 1)}


def own(answered, monkeypatch, count=None):
    """own_text with the fixture's answers in the place of the model's."""
    model, prompts, answers = (answered[0], *(items[:count] for items in answered[1:]))

    def answer_all(asked_model, asked, max_new_tokens, batch_size, eos):
        assert (asked_model, max_new_tokens, batch_size, eos) == (model, 99, 4, {7})
        assert sorted(map(len, asked)) == list(map(len, asked))  # little padding
        yield from (answers[prompts.index(prompt)] for prompt in asked)

    monkeypatch.setattr(evaluate, "answer_all", answer_all)
    result = evaluate.own_text(model, prompts, {7}, 99, Collator(pad_token_id=0), 4, quiet)
    tables = [ranks_by_hand(model, *pair) for pair in zip(prompts, answers, strict=True)]
    return result, tables, [[right_path(row[1:]) for row in table[:-1]] for table in tables]


def shares(tables):
    """[K+1][TOP] accuracies of tables, counted."""
    columns = [[row[k] for table in tables for row in table if row[k] != NO_TOKEN] for k in range(HEADS + 1)]
    return [[sum(rank < n for rank in column) / len(column) for n in range(1, TOP + 1)] for column in columns]


def test_own_text_chooses_trees_on_one_half_and_measures_on_the_other(answered, monkeypatch):
    result, tables, texts = own(answered, monkeypatch)
    assert result["conversations"] == 11 and result["max_new_tokens"] == 99
    assert result["rows"] == [sum(row[k] != NO_TOKEN for table in tables for row in table) for k in range(HEADS + 1)]
    assert result["top"] == [pytest.approx(row) for row in shares(tables)]
    want = acceptance(shares(tables[:5]), texts[5:])
    assert result["acceptance"] == want != acceptance(shares(tables[5:]), texts[:5])
    assert want != acceptance(shares(tables), texts) and want[-1]["length"] > 1


def test_a_single_conversation_has_to_do_for_both(answered, monkeypatch):
    result, tables, texts = own(answered, monkeypatch, count=1)
    assert result["acceptance"] == acceptance(shares(tables), texts)
    assert result["acceptance"][-1]["length"] > 1


def test_prompts_end_where_the_first_answer_begins(caplog):
    tokenizer = make_tokenizer("chatml")
    user, assistant = ({"role": role, "content": role[0]} for role in ("user", "assistant"))
    system, long = {"role": "system", "content": "warm"}, {"role": "user", "content": "bread " * 50}
    chats = [[user, assistant, user, assistant], [system, user, assistant], [long, assistant]]
    prompts = evaluate.first_prompts(chats, tokenizer, 10**6)
    start = "<|im_start|>"
    assert [tokenizer.decode(prompt).replace(start + " ", start) for prompt in prompts[:2]] == [
        f"{start}user\nu<|im_end|>\n{start}assistant\n",
        f"{start}system\nwarm<|im_end|>\n{start}user\nu<|im_end|>\n{start}assistant\n",
    ]
    assert len(prompts) == 3 and not caplog.records
    assert evaluate.first_prompts(chats, tokenizer, len(prompts[1])) == prompts[:2]
    (record,) = caplog.records
    assert f"left out 1 of 3 prompts, longer than {len(prompts[1])} tokens" in record.getMessage()


def test_a_prompt_that_the_template_refuses_is_left_out(caplog):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}the moon"
    user, assistant = ({"role": role, "content": role} for role in ("user", "assistant"))
    chats = [[{"role": "system", "content": "s"}, user, assistant], [user, assistant]]
    (prompt,) = evaluate.first_prompts(chats, tokenizer, 100)
    assert tokenizer.decode(prompt) == "the moon"
    assert "left out 1 of 2 prompts" in caplog.text


@pytest.fixture(params=["stage1", "stage2", "untrained"])
def heads_dir(request, model_dir, tmp_path):
    """What train.py leaves behind: heads (and the backbone, in stage 2) and the tokenizer."""
    GenerationConfig(eos_token_id=ENDS).save_pretrained(model_dir)
    model = MedusaModel.from_backbone(
        AutoModelForCausalLM.from_pretrained(model_dir), MedusaConfig(medusa_num_heads=HEADS)
    )
    if request.param != "untrained":
        randomise(model.medusa_heads)
    if request.param != "stage2":
        model.freeze_backbone()
    directory = tmp_path / request.param
    model.save_pretrained(directory)
    make_tokenizer("llama3").save_pretrained(directory)
    return directory


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--max_new_tokens", "0", *map(str, argv)])
    evaluate.main()


def cells(text):
    """The rows of the Markdown tables in a text, without their headers."""
    tables = [part.split("\n")[2:] for part in text.strip().split("\n\n")]
    return [[line.strip("| ").split(" | ") for line in table] for table in tables]


def test_main_prints_the_table_and_writes_the_figures(heads_dir, data_file, tmp_path, monkeypatch, capsys):
    figures = tmp_path / "new" / "figures.json"
    run(monkeypatch, heads_dir, "--data_path", data_file, "--output_json", figures)
    result = json.loads(figures.read_text())
    # the saved heads were read, not untrained ones made
    assert (result["top"][1:] != result["before"][1:]) == (heads_dir.name != "untrained")
    assert (result["heads"], result["data_path"]) == (str(evaluate.find_heads(heads_dir)[0]), data_file)
    assert "own" not in result  # --max_new_tokens 0
    (table,) = cells(capsys.readouterr().out)
    assert [line[0] for line in table] == ["lm_head", "head 1", "head 2", "head 3"]
    for k, (_, rows, *shares) in enumerate(table):
        top, before = result["top"][k], result["before"][k]
        assert int(rows) == result["rows"][k] > 0
        assert shares == [f"{share:.3f}" for share in (before[0], top[0], before[4], top[4], top[9])]
    assert sorted(path.name for path in figures.parent.iterdir()) == ["figures.json", "figures.png"]


def test_own_text_is_what_the_backbone_says(heads_dir, data_file, monkeypatch, capsys, caplog):
    """Against transformers' generate, one prompt after the other."""
    backbone = AutoModelForCausalLM.from_pretrained(
        heads_dir if heads_dir.name == "stage2" else heads_dir / "../backbone"
    )
    tokenizer, tokens, cut = AutoTokenizer.from_pretrained(heads_dir), [], 0
    chats = make_conversations(48)[-12:]
    for chat in chats:
        prompt = tokenizer.apply_chat_template(chat["messages"][:1], add_generation_prompt=True)["input_ids"]
        ids, flags = torch.tensor([prompt]), {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
        out = backbone.generate(ids, attention_mask=torch.ones_like(ids), **flags)
        tokens.append(out.shape[1] - len(prompt))
        cut += tokens[-1] == 20
    assert 0 < cut < 12  # answers end in both ways
    with caplog.at_level(logging.INFO):
        flags = ("--data_path", data_file, "--eval_holdout", 12, "--dtype", "float32", "--max_new_tokens", 20)
        run(monkeypatch, heads_dir, *flags)
    assert "left out" not in caplog.text
    result = json.loads((heads_dir / "accuracy.json").read_text())
    assert result.keys() == {"heads", "data_path", "rows", "top", "before", "own"}
    found = result["own"]
    assert found.keys() == {"conversations", "max_new_tokens", "rows", "top", "acceptance"}
    assert found["conversations"] == 12
    assert found["rows"] == [sum(max(0, n - k) for n in tokens) for k in range(HEADS + 1)]
    assert found["top"][0][0] == 1  # the backbone's own words, greedily
    assert [row["tree"] for row in found["acceptance"]] == ["chain"] + ["best"] * (len(found["acceptance"]) - 1)
    assert found["acceptance"][0]["nodes"] == HEADS
    _, words, trees = cells(capsys.readouterr().out)
    for k, line in enumerate(words):
        top = found["top"][k]
        shares = [f"{top[rank]:.3f}" for rank in (0, 4, 9)]
        assert line == ["lm_head" if k == 0 else f"head {k}", str(found["rows"][k]), *shares]
    shown = [(row["tree"], row["nodes"], row["length"], row["expected"]) for row in found["acceptance"]]
    assert trees == [[tree, str(n), f"{length:.3f}", f"{expected:.3f}"] for tree, n, length, expected in shown]
    assert (heads_dir / "accuracy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(heads_dir.glob("*.tmp"))


@pytest.mark.parametrize("heads_dir", ["stage1"], indirect=True)
def test_prompts_that_leave_no_room_for_an_answer(heads_dir, data_file, monkeypatch, capsys, caplog):
    """The backbone reads 256 tokens."""
    run(monkeypatch, heads_dir, "--data_path", data_file, "--max_new_tokens", 250)
    assert "left out 48 of 48 prompts, longer than 6 tokens" in caplog.text
    assert "own" not in json.loads((heads_dir / "accuracy.json").read_text())
    assert len(cells(capsys.readouterr().out)) == 1


@pytest.mark.parametrize("heads_dir", ["stage1"], indirect=True)
def test_without_matplotlib_only_the_picture_is_missing(heads_dir, data_file, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(monkeypatch, heads_dir, "--data_path", data_file)
    assert "requirements-dev.txt" in caplog.text
    assert (heads_dir / "accuracy.json").is_file() and not (heads_dir / "accuracy.png").exists()


@pytest.mark.parametrize("flags", [("--max_new_tokens", -1), ("--batch_size", 0)])
def test_flags_that_mean_nothing(flags, monkeypatch):
    with pytest.raises(BadInput, match=flags[0]):
        run(monkeypatch, "heads", "--data_path", "chats.jsonl", *flags)


@pytest.mark.parametrize("heads_dir", ["stage1"], indirect=True)
def test_a_directory_that_cannot_be_written_is_noticed_first(heads_dir, monkeypatch):
    monkeypatch.setattr(evaluate.os, "access", lambda path, mode: path != heads_dir)
    with pytest.raises(BadInput, match=f"cannot write into {heads_dir}: .*--output_json"):
        run(monkeypatch, heads_dir, "--data_path", "missing.jsonl")


def test_holdout_is_the_end_of_the_file(heads_dir, tmp_path, monkeypatch):
    chats, results = make_conversations(20), []
    for name, records, more in (("all", chats, ["--eval_holdout", 8]), ("last", chats[-8:], [])):
        data, figures = write_jsonl(tmp_path / f"{name}.jsonl", records), tmp_path / f"{name}.json"
        run(monkeypatch, heads_dir, "--data_path", data, "--output_json", figures, *more)
        results.append(json.loads(figures.read_text()) | {"data_path": None})
    assert results[0] == results[1]


def test_a_backbone_that_has_moved(heads_dir, model_dir, data_file, tmp_path, monkeypatch, capsys):
    moved = (tmp_path / "backbone").rename(tmp_path / "moved")
    if heads_dir.name != "stage2":
        with pytest.raises(BadInput, match=model_dir):
            run(monkeypatch, heads_dir, "--data_path", data_file)
    run(monkeypatch, heads_dir, "--data_path", data_file, "--base_model", moved)
    assert "| head 3 |" in capsys.readouterr().out


def test_a_directory_without_heads(model_dir, data_file, monkeypatch):
    with pytest.raises(BadInput, match=f"no Medusa heads in {model_dir}"):
        run(monkeypatch, model_dir, "--data_path", data_file)


def test_of_tied_logits_the_first_token_is_the_guess():
    """As argmax does it; bf16 logits tie in one row of twenty."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    assert [evaluate.ranks(lambda _: logits, torch.zeros(1, 2), torch.tensor([t])).item() for t in range(4)] == [
        *(2, 0, 1, 3)
    ]


def test_of_a_broken_model_nothing_is_right():
    logits = torch.tensor([[torch.nan, torch.nan, 3.0, 0.0] + [torch.nan] * 12])
    assert evaluate.ranks(lambda _: logits, torch.zeros(1, 2), torch.tensor([0])).item() == evaluate.TOP
