"""benchmark/check_figures.py: README.md and docs/ say what the raw files say, and it would show if they did not."""

import subprocess
import sys

import check_figures
import claims
import pytest
import raw_figures

CLAIMS = [claim for claims in check_figures.CLAIMS.values() for claim in claims]
TABLES = [table for tables in check_figures.TABLES.values() for table in tables]
TWO = "| two | 7.57 |\n"


@pytest.fixture
def readme(tmp_path, monkeypatch):
    """A README.md with one claim and one table, both of them right."""
    path = tmp_path / "README.md"
    path.write_text("A pass\ntakes **6.14** ms.\n\n| heads | ms |\n| --- | --- |\n| one head | 7.15 |\n" + TWO)
    ms = claims.a_pass
    claim = ("pass takes {:.2f} ms", lambda: [ms(0)["step_ms"]])
    table = ("heads | ms", lambda: [["one", f"{ms(10, 1)['step_ms']:.2f}"], ["two", f"{ms(16, 2)['step_ms']:.2f}"]])
    monkeypatch.setattr(check_figures, "TEXTS", tmp_path)
    monkeypatch.setattr(check_figures, "CLAIMS", {"README.md": [claim]})
    monkeypatch.setattr(check_figures, "TABLES", {"README.md": [table]})
    return path


def test_texts_agree_with_the_raw_files_and_no_package_is_needed():
    run = subprocess.run([sys.executable, "-S", "-s", "-E", check_figures.__file__], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_right_texts(readme, capsys):
    assert check_figures.main() == 0
    assert capsys.readouterr().out.splitlines() == [
        "OK README.md: pass takes 6.14 ms",
        "OK README.md: heads | ms",
        "all 2 agree with benchmark/results/",
    ]


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ("6.14", "6.15", ["NO README.md: pass takes 6.14 ms", "the text says: pass takes 6.15 ms"]),
        ("6.14", "6.141", ["NO README.md: pass takes 6.14 ms", "the text says: pass takes 6.141 ms"]),
        ("pass\ntakes", "pass lasts", ["NO README.md: pass takes 6.14 ms", "the text has no such words"]),
        ("7.57", "7.75", ["NO README.md", "'two', column 'ms': the raw data give '7.57', the text says '7.75'"]),
        (TWO, "", ["NO README.md: heads", "there is no row 'two'"]),
        (TWO, TWO + "| ten | 9 |\n", ["NO README.md: heads", "row 'ten' is not in the raw data"]),
        ("| heads", "| guesses", ["NO README.md: heads", "0 tables with the headings"]),
    ],
)
def test_wrong_texts(readme, capsys, right, wrong, says):
    readme.write_text(readme.read_text().replace(right, wrong))
    assert check_figures.main() == 1
    out = capsys.readouterr().out
    assert all(words in out for words in says) and "1 of 2 differ" in out


def test_a_raw_file_that_is_missing(readme, tmp_path, monkeypatch):
    monkeypatch.setattr(raw_figures, "RESULTS", tmp_path)
    with pytest.raises(SystemExit) as end:
        check_figures.main()
    assert end.value.code == f"there is no raw file {tmp_path / '2026-11-24_step_time_2_h100.csv'}"


@pytest.mark.parametrize(("words", "compute"), CLAIMS, ids=[words for words, _ in CLAIMS])
def test_each_figure_of_a_claim_is_compared(words, compute):
    figures = list(compute())
    assert check_figures.claim_problems(f"so {words.format(*figures)}, and more", words, figures) == []
    for i, figure in enumerate(figures):
        changed = [*figures[:i], ".123" if isinstance(figure, str) else figure * 2, *figures[i + 1 :]]
        assert check_figures.claim_problems(f"so {words.format(*changed)}, and more", words, figures)


@pytest.mark.parametrize(("headings", "compute"), TABLES, ids=[headings for headings, _ in TABLES])
def test_each_cell_of_a_table_is_compared(headings, compute):
    expected = [list(row) for row in compute()]
    for row in expected:
        for i, cell in enumerate(row[1:], start=1):
            if cell is None:  # words, which no raw file has
                continue
            row[i] = f"not {cell}"
            shown = (" | ".join("words" if cell is None else cell for cell in line) for line in expected)
            lines = [headings, "---" + " | ---" * headings.count("|"), *shown]
            row[i] = cell
            text = "".join(f"| {line} |\n" for line in lines)
            (problem,) = check_figures.table_problems(text, headings, expected)
            name = headings.split("|")[i].strip()
            assert f"row {row[0]!r}, column {name!r}: the raw data give {cell!r}" in problem
