"""benchmark/plot_decoding.py and plot_trace.py: the pictures of decoding, and two answers as they come."""

import sys

import plot_decoding as plot
import plot_trace
import pytest
from csvs import write
from PIL import Image, ImageFont


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
    fewer_tokens = step_row(32, 4) | {"medusa_vocab_size": "32000"}  # is not drawn
    rows = [{"medusa_vocab_size": ""} | row for row in [*rows, fewer_tokens]]
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
        assert gif.size == plot_trace.SIZE and gif.info["loop"] == 0
    assert 2 < len(durations) <= plot_trace.FRAMES and durations[-1] == plot_trace.LAST
    # 0.6 s, slowed down 20 times; a frame may be up to 10 ms too long, and equal ones are merged
    assert 12000 <= sum(durations[:-1]) <= 12000 + plot_trace.FRAMES * 10
    assert (out / "decoding.gif").stat().st_size < 1e6 and "decoding.gif: 111 frames" in capsys.readouterr().out


def test_an_animation_shows_what_has_come():
    passes = make_trace()["heads"]["passes"]
    font = ImageFont.load_default(size=14)
    runs = plot_trace.runs(passes, font, 10**6)
    assert "".join(run.text for run in runs) == "The moon is made of green cheese" and {run.line for run in runs} == {
        0
    }
    blue = "".join(run.text for run in runs if run.color == plot_trace.GUESS)
    assert blue == " moon made of" and runs[0].x == 0 and runs == sorted(runs, key=lambda run: run.x)
    assert {run.text: run.seconds for run in runs if run.text.strip()} == {
        text.strip(): seconds for seconds, texts in passes for text in texts
    }
    assert plot_trace.counters(passes, 0) == "1 token"
    assert plot_trace.counters(passes, 0.15) == "3 tokens   20 tokens/s   2.00 tokens per pass"
    assert plot_trace.counters(passes, 9) == "7 tokens   15 tokens/s   2.00 tokens per pass"


def test_an_answer_is_wrapped_at_words():
    font = ImageFont.load_default(size=14)
    width = int(font.getlength("The moon is")) + 2
    runs = plot_trace.runs(make_trace()["heads"]["passes"] + [[0.5, ["\n", "\n", "and salt"]]], font, width)
    lines = {line: "".join(run.text for run in runs if run.line == line) for line in {run.line for run in runs}}
    assert [line.strip() for line in lines.values()] == ["The moon is", "made of", "green", "cheese", "and salt"]
    assert list(lines) == [0, 1, 2, 3, 5]
    assert all(run.x + font.getlength(run.text.rstrip()) <= width for run in runs)


def test_a_long_title_ends_in_dots():
    font = ImageFont.load_default(size=14)
    assert plot_trace.fit("the moon", font, 1000) == "the moon"
    short = plot_trace.fit("the moon " * 20, font, 200)
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
        plot_trace.read_trace(tmp_path / "gone.json")
    for wrong in ([], {"plain": {}}, make_trace(heads={"nodes": 3, "passes": [[0.0, []]]})):
        with pytest.raises(SystemExit, match=r"wrong\.json is no trace"):
            plot_trace.read_trace(dump(wrong, "wrong.json"))
