"""common/files.py: a reader finds the old or the new file, whole."""

import json

import pytest

from common.errors import BadInput
from common.files import publish, publish_files, read_json, start_over, write_atomically


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "figures.json"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir() if p.suffix != ".tmp"] == [path.name]


def test_a_directory_is_published_under_its_final_name(tmp_path):
    staging, final = tmp_path / "incomplete-1", tmp_path / "1"
    (final / "left").mkdir(parents=True)  # of a run that was killed
    start_over(staging)
    (staging / "state").mkdir()
    (staging / "state" / "part").write_text("whole")
    publish(staging, final)
    assert not staging.exists() and [p.name for p in final.rglob("*")] == ["state", "part"]
    start_over(final)
    assert list(final.iterdir()) == []


def test_a_config_comes_after_all_the_other_files(tmp_path, monkeypatch):
    """A reader who finds it finds the rest."""
    staging, final, moved = tmp_path / "incomplete-model", tmp_path / "out", []
    final.mkdir()
    (final / "config.json").write_text("old")
    (staging / "heads").mkdir(parents=True)
    for name in ("config.json", "weights", "heads/config.json", "heads/weights"):
        (staging / name).write_text("new")

    def replace(source, target):
        if not moved:
            assert not (final / "config.json").exists()  # the old one went first
        moved.append(str(target.relative_to(final)))
        source.rename(target)

    monkeypatch.setattr("common.files.os.replace", replace)
    publish_files(staging, final)
    assert sorted(moved[:2]) == ["heads/weights", "weights"]
    assert sorted(moved[2:]) == ["config.json", "heads/config.json"]
    assert {p.relative_to(final).as_posix() for p in final.rglob("*") if p.is_file()} == set(moved)
    assert not staging.exists()


@pytest.mark.parametrize("text", [None, "", "{'single': 1}", "[1"])
def test_what_is_no_json_is_one_sentence(text, tmp_path):
    path = tmp_path / "figures.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadInput, match=f"cannot read {path}: "):
        read_json(path)
    path.write_text(json.dumps({"a": [1]}))
    assert read_json(path) == {"a": [1]}
