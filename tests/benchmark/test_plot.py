"""benchmark/plot.py: the bars and texts of each picture, from small CSVs."""

import sys

import pytest
from csvs import write

from benchmark import plot

GPU = {"gpu": "a GPU"}
NAMES = [f"{kind}_Stage{s}_num_head_{h}.png" for kind in ("memory", "throughput") for s in (1, 2) for h in (3, 5)]


def memory(stage, heads, implementation, *peaks, options="fsdp2", world_size=8):
    common = {"stage": stage, "heads": heads, "batch_size": 4, "world_size": world_size, "options": options} | GPU
    common |= {"implementation": implementation}
    return [common | {"length": n, "peak_gib": peak} for n, peak in zip(plot.LENGTHS, peaks, strict=False)]


def throughput(stage, heads, implementation, *figures, options="", data="random", batch_size=4):
    common = {"stage": stage, "heads": heads, "batch_size": batch_size, "data": data, "options": options} | GPU
    common |= {"implementation": implementation}
    return [common | {"length": n, "tokens_per_s": x} for n, x in zip(plot.LENGTHS, figures, strict=False)]


@pytest.fixture
def seen(tmp_path):
    """Draws rows and returns the bars' heights, the texts in the place of a bar, those on bars, and the caption."""

    def draw(kind, rows, stage="1", heads="3"):
        picture = plot.figure(kind, plot.read(kind, [write(tmp_path / "rows.csv", rows)]), stage, heads)
        (axes,) = picture.axes
        texts = [text.get_text() for text in axes.texts]
        instead = [text for text in texts if text in ("OOM", "not run")]
        heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
        plot.plt.close(picture)
        return heights, instead, [text for text in texts if text not in instead], picture.get_supxlabel()

    return draw


def test_eight_pictures(tmp_path, monkeypatch):
    pairs = [(stage, heads) for stage in (1, 2) for heads in (3, 5)]
    peaks = write(tmp_path / "m.csv", [row for pair in pairs for row in memory(*pair, "ours", 8, 9.1, 70, "OOM")])
    speeds = [throughput(*pair, "ours", 10000, 9000.5) for pair in pairs]
    first, second = (write(tmp_path / f"{i}.csv", speeds[2 * i] + speeds[2 * i + 1]) for i in (0, 1))
    command = ["plot.py", "--memory", peaks, "--throughput", first, second, "--out", tmp_path / "new" / "images"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    plot.main()
    pictures = sorted((tmp_path / "new" / "images").iterdir())
    assert [path.name for path in pictures] == NAMES
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20000 for path in pictures)


def test_bars_and_what_is_in_their_place(seen):
    """hf ran out of memory at 2048 and liger at once, so both did at all longer lengths; ours was cut off."""
    rows = memory(1, 3, "hf", 50.25, "OOM") + memory(1, 3, "liger", "OOM") + memory(1, 3, "ours", 8.5, 8.75, 10)
    rows += memory(1, 5, "liger", 99) + memory(2, 3, "liger", 99)
    rows += memory(1, 3, "liger", 99, options="fsdp1") + memory(1, 3, "liger", 99, world_size=4)
    heights, instead, on_bars, caption = seen("memory", rows)
    assert heights == [[50.25], [], [8.5, 8.75, 10]]
    assert instead == ["OOM"] * 7 + ["not run"] and on_bars == ["50.2", "8.5", "8.8", "10.0"]
    assert caption == "a GPU, LLaMA-3-8B shapes, batch 4, one rank of 8, bf16, AdamW"


def test_the_fastest_without_fp8_counts(seen):
    rows = throughput(2, 5, "ours", 100, 110, 90, 80)
    rows += throughput(2, 5, "ours", 120, 130, "OOM", options="16 of 32 layers recomputed")
    rows += throughput(2, 5, "ours", 200, 210, 190, 180, options="fp8 backbone")
    rows += throughput(2, 5, "ours", 300, data="chats") + throughput(2, 5, "ours", 300, batch_size=8)
    heights, instead, on_bars, caption = seen("throughput", rows, "2", "5")
    assert heights == [[], [], [120, 130, 90, 80]] and on_bars == ["120", "130", "90", "80"]
    assert instead == ["not run"] * 8
    assert caption.endswith("one GPU, bf16, AdamW, gradient checkpointing\nthis project: 16 of 32 layers recomputed")


def test_other_heads_are_not_drawn(seen):
    rows = [row | {"medusa_vocab_size": "", "head_type": "medusa"} for row in throughput(2, 5, "ours", 100)]
    rows += [row | {"medusa_vocab_size": "32000", "head_type": "medusa"} for row in throughput(2, 5, "ours", 200)]
    rows += [row | {"medusa_vocab_size": "", "head_type": "hydra"} for row in throughput(2, 5, "ours", 300)]
    assert seen("throughput", rows, "2", "5")[0] == [[], [], [100]]


def test_a_picture_without_rows_is_skipped(tmp_path, monkeypatch, capsys):
    peaks = write(tmp_path / "m.csv", memory(1, 3, "ours", 8) + memory(1, 5, "ours", "OOM"))
    monkeypatch.setattr(sys, "argv", ["plot.py", "--memory", str(peaks), "--out", str(tmp_path / "out")])
    plot.main()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == NAMES[:2]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"no row for {name}: skipped" for name in NAMES[2:4]]


def test_what_cannot_be_read_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"there is no file .*gone\.csv"):
        plot.read("memory", [tmp_path / "gone.csv"])
    path = write(tmp_path / "speeds.csv", throughput(1, 3, "ours", 1))
    with pytest.raises(SystemExit, match=r"speeds\.csv is not a memory CSV: it has no column peak_gib, world_size"):
        plot.read("memory", [path])
