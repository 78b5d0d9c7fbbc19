"""benchmark/step_time.py and decoding.py on a CPU, and the pictures of their figures."""

import csv
import json
import sys

import decoding_speed
import pytest
import step_time
import torch
from conftest import make_tokenizer
from PIL import Image, ImageFont
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmark import plot_decoding as plot
from decoding.decoder import Decoder
from decoding.tree import read_step_times
from medusa_model import MedusaConfig, MedusaModel

STEP_TIME = "date commit model heads nodes length batch_size step_ms plain_ms ratio_to_plain floor_ms heads_floor_ms "
STEP_TIME += "bandwidth_tb_s weight_gb heads_gb cache_gb error gpu versions command"
DECODING = "date commit label tree nodes prompts batch_size max_new_tokens tokens passes seconds tokens_per_s "
DECODING += "tokens_per_pass step_ms speed_up identical expected_length machine dtype versions command"


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Products this small gain nothing from a second thread."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(script, monkeypatch, *words) -> list[dict]:
    """Runs a script with these words -> the rows of its --out, the last word."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
    try:
        script.main()
    finally:
        rows = rows_of(words[-1]) if words[-1].exists() else []
    return rows


def rows_of(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def dump(tmp_path):
    """Writes JSON -> its path."""

    def to_json(value, name="some.json"):
        (tmp_path / name).write_text(json.dumps(value))
        return tmp_path / name

    return to_json


@pytest.fixture
def time_steps(tmp_path, monkeypatch):
    """step_time.py without the second that a copy of 128 MiB takes."""
    monkeypatch.setattr(step_time, "bandwidth", lambda device: 2e6)
    return lambda *words: run(step_time, monkeypatch, "--model", "tiny", *words, "--out", tmp_path / "steps.csv")


def test_step_times(time_steps, tmp_path):
    rows = time_steps("--heads", 2, "--nodes", 8, 1, "--length", 20)
    assert [list(row) for row in rows] == [STEP_TIME.split()] * 3
    assert [row["nodes"] for row in rows] == ["0", "1", "8"]
    for row in rows:
        assert row["plain_ms"] == rows[0]["step_ms"] and row["versions"].startswith("python ") and not row["error"]
        assert float(row["ratio_to_plain"]) == pytest.approx(float(row["step_ms"]) / float(row["plain_ms"]), rel=1e-3)
    # bf16. Two layers: q and o 32 x 32, k and v 32 x 16, MLP 3 x 32 x 48, two norms; a norm; an lm_head of 320 x 32.
    weights = 2 * (2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32 + 320 * 32)
    head, cache = 2 * (32 * 32 + 32 + 320 * 32), 2 * 2 * 2 * 16 * 20  # keys and values, 2 bytes, 2 layers, 16 numbers
    for row, heads in zip(rows, (0, 1, 2), strict=True):
        assert float(row["weight_gb"]) == pytest.approx(weights / 1e9, abs=1e-6)
        assert float(row["heads_gb"]) == pytest.approx(heads * head / 1e9, abs=1e-6)
        assert float(row["cache_gb"]) == pytest.approx(cache / 1e9, abs=1e-6)
        assert float(row["floor_ms"]) == pytest.approx(weights / 2e6 * 1e3, rel=1e-4)
        assert float(row["heads_floor_ms"]) == pytest.approx(heads * head / 2e6 * 1e3, rel=1e-4)
    assert read_step_times(tmp_path / "steps.csv").keys() == {0, 1, 8}


def test_trees_of_several_numbers_of_heads(time_steps):
    rows = time_steps("--heads", 1, 3, "--nodes", 4, 16, "--length", 10)
    assert [(row["heads"], row["nodes"]) for row in rows] == [
        ("3", "0"), ("3", "4"), ("3", "16"), ("1", "4"), ("1", "10"),
    ]  # fmt: skip
    read = [float(row["heads_gb"]) for row in rows]
    assert 0 == read[0] < read[3] == read[4] < read[2]
    assert {row["plain_ms"] for row in rows} == {rows[0]["step_ms"]}


def test_each_length_has_its_own_plain_pass(time_steps, monkeypatch):
    """A pass of n nodes that takes n + 1 ms per token of the prompt; every third measurement is an outlier."""
    calls = []

    def step_ms(self, prompt, passes):
        calls.append((passes, len(self.tokens), self.max_length - len(prompt)))
        return len(prompt) * self.nodes * (100 if len(calls) % 3 == 0 else 1)

    monkeypatch.setattr(Decoder, "step_ms", step_ms)
    rows = time_steps("--nodes", 0, 4, "--length", 10, 30, "--passes", 7, "--batch_size", 2)
    assert [float(row["step_ms"]) for row in rows] == [10, 50, 30, 150]
    assert [float(row["plain_ms"]) for row in rows] == [10, 10, 30, 30]
    assert [float(row["ratio_to_plain"]) for row in rows] == [1, 5, 1, 5]
    assert calls == [(7, 2, step_time.ANSWER)] * 12


def test_a_size_that_fails_is_a_row_and_the_next_one_runs(time_steps, monkeypatch):
    step_ms = Decoder.step_ms

    def full(self, prompt, passes):
        if self.nodes == (5 if len(prompt) == 10 else 1):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to")
        return step_ms(self, prompt, passes)

    monkeypatch.setattr(Decoder, "step_ms", full)
    with pytest.raises(SystemExit, match="2 sizes failed: see the column error"):
        time_steps("--nodes", 4, 8, "--length", 10, 11)
    rows = rows_of(sys.argv[-1])
    assert [row["nodes"] for row in rows if row["error"]] == ["4", "0"]
    assert {row["error"] for row in rows} == {"", "OutOfMemoryError: CUDA out of memory."}
    assert [bool(row["step_ms"]) for row in rows] == [True, False, True, False, True, True]
    assert [bool(row["ratio_to_plain"]) for row in rows] == [True, False, True, False, False, False]


@pytest.mark.parametrize("script", ["step_time", "decoding_speed"])
def test_a_run_that_is_cut_off_leaves_its_rows(script, time_steps, decode, monkeypatch, tmp_path):
    made = Decoder.__init__

    def cut_off(self, model, choices, *args):
        if len(choices) == 4:
            raise KeyboardInterrupt
        made(self, model, choices, *args)

    monkeypatch.setattr(Decoder, "__init__", cut_off)
    with pytest.raises(KeyboardInterrupt):
        (time_steps if script == "step_time" else decode)("--nodes", 2, 4, 8)
    rows = rows_of(sys.argv[-1])
    assert [row["nodes"] for row in rows] == ["0", "2"]


def test_trees_are_of_the_published_accuracies():
    for top1, top5 in zip(step_time.TOP1, step_time.TOP5, strict=True):
        rows = step_time.shares(top1, top5)
        steps = [b - a for a, b in zip([0, *rows], rows, strict=False)]
        assert rows[0] == pytest.approx(top1) and rows[4] == pytest.approx(top5) and rows[-1] < 1
        assert steps == pytest.approx([top1 * (steps[1] / steps[0]) ** rank for rank in range(10)])
    # 0.56 x 0.316 = 0.18 is more than head 1's second guess, 0.16, so the second node goes deeper
    assert step_time.tree(5, 2) == [(0,), (0, 0)] and step_time.tree(5, 3) == [(0,), (1,), (0, 0)]


def test_more_nodes_than_a_tree_can_have_are_refused(time_steps, capsys):
    with pytest.raises(SystemExit):
        time_steps("--heads", 1, "--nodes", 11)
    assert "--nodes 11: trees of 1 heads and 10 ranks have 10 nodes" in capsys.readouterr().err


def test_bandwidth_counts_what_is_read_and_written(monkeypatch):
    """A clock that says a second for each copy of 2^27 bytes."""
    clock = iter(range(100))
    monkeypatch.setattr(step_time.time, "perf_counter", lambda: next(clock))
    assert step_time.bandwidth(torch.device("cpu")) == 2 * 2**27


TOP = [[1.0] * 3, [0.6, 0.7, 0.8], [0.5, 0.6, 0.7], [0.4, 0.5, 0.6]]
PROMPTS = ["why", "how warm is the moon", "green river", "old stone sings", "salt"]


@pytest.fixture
def heads_dir(model_dir, tmp_path):
    """Untrained heads: they guess the next token again, which is right where the model repeats itself."""
    GenerationConfig(eos_token_id=[1]).save_pretrained(model_dir)
    model = MedusaModel.from_backbone(
        AutoModelForCausalLM.from_pretrained(model_dir), MedusaConfig(medusa_num_heads=3)
    )
    model.freeze_backbone()
    model.save_pretrained(tmp_path / "my_heads")
    make_tokenizer("llama3").save_pretrained(tmp_path / "my_heads")
    (tmp_path / "my_heads" / "accuracy.json").write_text(json.dumps({"top": TOP}))
    return tmp_path / "my_heads"


@pytest.fixture
def decode(heads_dir, tmp_path, monkeypatch):
    """Runs decoding.py -> its rows."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    common = (heads_dir, "--prompts", prompts, "--dtype", "float32", "--max_new_tokens", 24)
    return lambda *words: run(decoding_speed, monkeypatch, *common, *words, "--out", tmp_path / "decoding.csv")


def near(value):
    return pytest.approx(float(value), rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_every_tree_decodes_the_same_answers(decode, batch_size):
    rows = decode("--skip", 1, "--limit", 3, "--batch_size", batch_size, "--nodes", "chain", 8)
    assert [list(row) for row in rows] == [DECODING.split()] * 3
    assert [(row["tree"], row["nodes"]) for row in rows] == [("plain", "0"), ("chain", "3"), ("best", "8")]
    assert {(row["label"], row["prompts"], row["identical"]) for row in rows} == {("my_heads", "3", "3")}
    plain, *others = rows
    assert float(plain["tokens_per_pass"]) == float(plain["speed_up"]) == float(plain["expected_length"]) == 1
    assert float(rows[1]["expected_length"]) == near(1 + 0.6 + 0.6 * 0.5 + 0.6 * 0.5 * 0.4)
    for row in rows:
        assert row["tokens"] == plain["tokens"] and row["machine"] == decoding_speed.machine()
        tokens, passes, seconds = (float(row[key]) for key in ("tokens", "passes", "seconds"))
        assert float(row["step_ms"]) == pytest.approx(seconds / passes * 1000, rel=1e-2)
        assert float(row["tokens_per_s"]) == pytest.approx(tokens / seconds, rel=1e-2)
        assert float(row["speed_up"]) == near(float(row["tokens_per_s"]) / float(plain["tokens_per_s"]))
    for row in others:
        assert int(row["passes"]) < int(plain["passes"]) and float(row["tokens_per_pass"]) > 1
        if batch_size == 1:
            assert float(row["tokens_per_pass"]) == near(int(row["tokens"]) / int(row["passes"]))


def test_which_prompts_are_decoded_and_how(decode, monkeypatch):
    """One warm-up, not counted; the prompts behind --skip, at most --limit; an answer that differs is noticed."""
    seen = []

    def fake(decoder, prompts, max_new_tokens, eos, name):
        seen.append((len(prompts), max_new_tokens, name))
        step = 1 if name == "0" else 2
        answers = [[5] * 9 for _ in prompts]
        if name == "4":
            answers[0] = [6] * 9
        return decoding_speed.Decoded(
            name, answers, [[step] * (8 // step) for _ in prompts], seconds=0.1 * len(prompts)
        )

    monkeypatch.setattr(decoding_speed, "decode", fake)
    rows = decode("--skip", 3, "--nodes", 4, 0, "--label", "own answers", "--batch_size", 2)
    assert seen == [(1, 16, "0"), (2, 24, "0"), (1, 16, "4"), (2, 24, "4")]
    assert [row["identical"] for row in rows] == ["2", "1"] and {row["label"] for row in rows} == {"own answers"}
    keys = ("tokens", "passes", "tokens_per_s", "tokens_per_pass", "step_ms", "speed_up")
    assert [[float(row[key]) for key in keys] for row in rows] == [[16, 8, 80, 1, 25, 1], [16, 4, 80, 2, 50, 1]]


def test_a_tree_is_decoded_once(decode, dump):
    """Where only best guesses are ever right, the chain and all trees of its size or more are one."""
    sure = {"top": [[share] * 10 for share in (1.0, 0.5, 0.4, 0.3)]}
    rows = decode("--nodes", 3, "chain", 8, "--accuracy", dump(sure))
    assert [(row["tree"], row["nodes"]) for row in rows] == [("plain", "0"), ("best", "3")]
    assert float(rows[1]["expected_length"]) == pytest.approx(1 + 0.5 + 0.5 * 0.4 + 0.5 * 0.4 * 0.3)


def test_trace(decode, heads_dir, tmp_path):
    rows = decode("--limit", 1, "--nodes", 8, "--trace", tmp_path / "new" / "t.json", "--trace_nodes", "chain")
    trace = json.loads((tmp_path / "new" / "t.json").read_text())
    assert trace["prompt"] == PROMPTS[0] and (trace["plain"]["nodes"], trace["heads"]["nodes"]) == (0, 3)
    texts = []
    for key in ("plain", "heads"):
        passes = trace[key]["passes"]
        seconds = [at for at, _ in passes]
        assert seconds[0] == 0 and seconds == sorted(seconds) and len(set(seconds)) == len(seconds)
        assert len(passes[0][1]) == 1 and sum(len(new) for _, new in passes) == int(rows[0]["tokens"]) + 1
        texts.append("".join(text for _, new in passes for text in new))
    assert texts[0] == texts[1] != ""
    assert {len(new) for _, new in trace["plain"]["passes"]} == {1}
    assert max(len(new) for _, new in trace["heads"]["passes"]) > 1


def test_the_trace_takes_the_fastest_tree_and_another_prompt(decode, tmp_path):
    rows = decode("--nodes", 2, 8, "--trace", tmp_path / "t.json", "--trace_prompt", "cold bread")
    trace = json.loads((tmp_path / "t.json").read_text())
    fastest = max(rows, key=lambda row: float(row["tokens_per_s"]))
    assert trace["prompt"] == "cold bread" and trace["heads"]["nodes"] == int(fastest["nodes"])


def test_a_letter_of_several_tokens_comes_with_the_last():
    tokenizer = make_tokenizer("llama3")
    text = "the moon \N{FULL MOON SYMBOL} rises\N{LATIN SMALL LETTER U WITH DIAERESIS}"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = decoding_speed.token_texts(tokens, tokenizer)
    assert len(texts) == len(tokens) and "".join(texts) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts) and "\N{FULL MOON SYMBOL}" in [t.strip() for t in texts]
    cut = decoding_speed.token_texts(
        tokens[: texts.index("\N{FULL MOON SYMBOL}")], tokenizer
    )  # in the middle of a letter
    assert "".join(cut) == tokenizer.decode(tokens[: len(cut)])


def test_a_machine_has_a_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    name, threads = decoding_speed.machine().rsplit(", ", 1)
    assert name and threads == "1 threads"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert decoding_speed.machine() == "a GPU"


def test_what_cannot_be_decoded_is_one_sentence(decode, tmp_path, monkeypatch, dump):
    with pytest.raises(decoding_speed.BadInput, match=r"cannot read .*gone\.json"):
        decode("--accuracy", tmp_path / "gone.json")
    with pytest.raises(decoding_speed.BadInput, match=r"prompts\.txt has no prompts behind the first 5: lower --skip"):
        decode("--skip", 5)
    with pytest.raises(decoding_speed.BadInput, match=r"is of 2 heads, but .*my_heads has 3"):
        decode("--accuracy", dump({"top": TOP[:3]}))
    with pytest.raises(SystemExit):
        decode("--nodes", -1)
    monkeypatch.setattr(decoding_speed, "end_tokens", lambda backbone: set(range(320)))
    with pytest.raises(decoding_speed.BadInput, match="no answer is longer than the first token"):
        decode("--nodes", 4)


def decoding_row(tree, nodes, speed, label="heads", machine="a GPU"):
    common = {"label": label, "machine": machine, "dtype": "bfloat16", "batch_size": 1}
    common |= {"tokens_per_s": speed, "tokens_per_pass": 1.5, "speed_up": speed / 10}
    return common | {"tree": tree, "nodes": nodes}


def step_row(nodes, ms, length=512):
    common = {"model": "llama3_8b", "heads": 5, "length": length, "batch_size": 1, "gpu": "a GPU", "floor_ms": 5}
    return common | {"bandwidth_tb_s": 3, "cache_gb": 0.6, "nodes": nodes, "step_ms": ms, "heads_floor_ms": nodes / 8}


def test_bars(tmp_path):
    rows = [decoding_row("best", 16, 25), decoding_row("plain", 0, 10), decoding_row("chain", 5, 12)]
    rows += [decoding_row("best", 16, 24), decoding_row("best", 8, 30)]
    rows += [decoding_row("plain", 0, 3, machine="a CPU"), decoding_row("plain", 0, 4, label="other", machine="a CPU")]
    picture = plot.decoding(plot.read([write(tmp_path / "d.csv", rows)], plot.DECODING))
    gpu, cpu = picture.axes
    assert [label.get_text() for label in gpu.get_xticklabels()] == ["plain", "chain\nof 5", "8", "16"]
    heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in gpu.patches}
    assert heights == {0: 10, 1: 12, 2: 30, 3: 24}  # the last of two rows for a tree
    assert sorted(text.get_text() for text in gpu.texts) == ["", "1.20 x\n1.50", "2.40 x\n1.50", "3.00 x\n1.50"]
    assert [bar.get_height() for bar in cpu.patches] == [3, 4] and gpu.get_legend() is None
    assert [text.get_text() for text in cpu.get_legend().get_texts()] == ["heads", "other"]
    assert (gpu.get_title(), cpu.get_title()) == ("a GPU, bfloat16", "a CPU, bfloat16")
    plot.plt.close(picture)


def test_time_of_a_pass_over_what_it_reads(tmp_path):
    rows = [step_row(16, 7.5), step_row(0, 6), step_row(64, ""), step_row(32, 9), step_row(16, 3, 7936)]
    picture = plot.step_time(plot.read([write(tmp_path / "s.csv", rows)], plot.STEP_TIME))
    short, long = picture.axes
    measured, plain = short.lines
    assert measured.get_xydata().tolist() == [[0, 6], [16, 7.5], [32, 9]] and set(plain.get_ydata()) == {6}
    assert [text.get_text() for text in short.texts] == ["1.25", "1.50"]
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in short.collections]
    assert tops == pytest.approx([5, 5 + 0.6 / 3, 5 + 0.6 / 3 + 32 / 8])
    assert len(long.lines) == 1 and not long.texts  # no plain pass to compare with
    assert "7,936 tokens" in long.get_title() and short.get_ylim() == long.get_ylim()
    plot.plt.close(picture)


def test_a_line_for_each_number_of_heads(tmp_path):
    """All begin at the one plain pass; the areas are what the most heads read; all show where they end."""
    fewer = [step_row(nodes, ms) | {"heads": 2} for nodes, ms in ((16, 7), (8, 6.6))]
    rows = [*fewer, step_row(32, 9), step_row(16, 7.5), step_row(0, 6), step_row(8, 7) | {"heads": 1}]
    picture = plot.step_time(plot.read([write(tmp_path / "s.csv", rows)], plot.STEP_TIME))
    (axes,) = picture.axes
    most, two, one, _ = axes.lines
    assert most.get_xydata().tolist() == [[0, 6], [16, 7.5], [32, 9]]
    assert two.get_xydata().tolist() == [[0, 6], [8, 6.6], [16, 7]] and one.get_xydata().tolist() == [[0, 6], [8, 7]]
    assert [text.get_text() for text in axes.texts] == ["1.25", "1.50", "1.17", "1.17"]
    assert axes.collections[-1].get_paths()[0].vertices[:, 0].max() == 32
    labels = [text.get_text() for text in picture.legends[0].get_texts()]
    assert [label.split(",")[0] for label in labels[3:]] == ["5 heads", "2 heads", "1 head", "plain decoding"]
    plot.plt.close(picture)


def make_trace(**changes):
    passes = [[0.0, ["The"]], [0.1, [" moon", " is"]], [0.2, [" made", " of", " green"]], [0.4, [" cheese"]]]
    plain = [[0.1 * i, [text]] for i, text in enumerate(text for _, texts in passes for text in texts)]
    sides = {"plain": {"nodes": 0, "passes": plain}, "heads": {"nodes": 7, "passes": passes}}
    return {"prompt": "What is the moon?", "machine": "a GPU", "label": "my heads"} | sides | changes


def test_pictures_and_animation(tmp_path, monkeypatch, capsys, dump):
    words = ["--decoding", write(tmp_path / "d.csv", [decoding_row("plain", 0, 10)]), "--slow_down", 20]
    words += ["--step_time", write(tmp_path / "s.csv", [step_row(0, 6)]), "--trace", dump(make_trace())]
    monkeypatch.setattr(sys, "argv", ["plot_decoding.py", *map(str, words), "--out", str(tmp_path / "new" / "images")])
    plot.main()
    out = tmp_path / "new" / "images"
    assert sorted(path.name for path in out.iterdir()) == ["decoding.gif", "decoding.png", "step_time.png"]
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20000
    with Image.open(out / "decoding.gif") as gif:
        durations = []
        for number in range(gif.n_frames):
            gif.seek(number)
            durations.append(gif.info["duration"])
        assert gif.size == plot.SIZE and gif.info["loop"] == 0
    assert 2 < len(durations) <= plot.FRAMES and durations[-1] == plot.LAST
    # 0.6 s, slowed down 20 times; a frame may be up to 10 ms too long, and equal ones are merged
    assert 12000 <= sum(durations[:-1]) <= 12000 + plot.FRAMES * 10
    assert (out / "decoding.gif").stat().st_size < 1e6 and "decoding.gif: 111 frames" in capsys.readouterr().out


def test_an_animation_shows_what_has_come():
    passes = make_trace()["heads"]["passes"]
    font = ImageFont.load_default(size=14)
    runs = plot.runs(passes, font, 10**6)
    assert "".join(run.text for run in runs) == "The moon is made of green cheese" and {run.line for run in runs} == {
        0
    }
    blue = "".join(run.text for run in runs if run.color == plot.GUESS)
    assert blue == " moon made of" and runs[0].x == 0 and runs == sorted(runs, key=lambda run: run.x)
    assert {run.text: run.seconds for run in runs if run.text.strip()} == {
        text.strip(): seconds for seconds, texts in passes for text in texts
    }
    assert plot.counters(passes, 0) == "1 token"
    assert plot.counters(passes, 0.15) == "3 tokens   20 tokens/s   2.00 tokens per pass"
    assert plot.counters(passes, 9) == "7 tokens   15 tokens/s   2.00 tokens per pass"


def test_an_answer_is_wrapped_at_words():
    font = ImageFont.load_default(size=14)
    width = int(font.getlength("The moon is")) + 2
    runs = plot.runs(make_trace()["heads"]["passes"] + [[0.5, ["\n", "\n", "and salt"]]], font, width)
    lines = {line: "".join(run.text for run in runs if run.line == line) for line in {run.line for run in runs}}
    assert [line.strip() for line in lines.values()] == ["The moon is", "made of", "green", "cheese", "and salt"]
    assert list(lines) == [0, 1, 2, 3, 5]
    assert all(run.x + font.getlength(run.text.rstrip()) <= width for run in runs)


def test_a_long_title_ends_in_dots():
    font = ImageFont.load_default(size=14)
    assert plot.fit("the moon", font, 1000) == "the moon"
    short = plot.fit("the moon " * 20, font, 200)
    assert short.endswith(" ...") and short.startswith("the moon") and font.getlength(short) <= 200


def test_a_picture_without_rows_is_skipped(tmp_path, monkeypatch, capsys):
    words = ["--step_time", write(tmp_path / "s.csv", [step_row(0, "")]), "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["plot_decoding.py", *map(str, words)])
    plot.main()
    assert not list((tmp_path / "out").iterdir())
    assert capsys.readouterr().err == "no row for step_time.png: skipped\n"


def test_what_cannot_be_drawn_is_one_sentence(tmp_path, dump):
    with pytest.raises(SystemExit, match=r"there is no file .*gone\.csv"):
        plot.read([tmp_path / "gone.csv"], plot.DECODING)
    path = write(tmp_path / "d.csv", [decoding_row("plain", 0, 10)])
    with pytest.raises(SystemExit, match=r"d\.csv cannot be drawn: it has no column model, heads, length, step_ms"):
        plot.read([path], plot.STEP_TIME)
    with pytest.raises(SystemExit, match=r"cannot read .*gone\.json: No such file"):
        plot.read_trace(tmp_path / "gone.json")
    for wrong in ([], {"plain": {}}, make_trace(heads={"nodes": 3, "passes": [[0.0, []]]})):
        with pytest.raises(SystemExit, match=r"wrong\.json is no trace"):
            plot.read_trace(dump(wrong, "wrong.json"))
