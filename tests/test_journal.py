import json
import math

import pytest

from adafreeze import Journal, RunError, read_journal


def test_lines_are_json_whatever_is_written(tmp_path):
    journal = Journal(tmp_path / "deep" / "journal.jsonl")
    journal.write(
        "measure", step=3, scores={"a": math.nan, 1: math.inf}, units={"b", "a"}, path=tmp_path, pair=(1, None)
    )
    journal.close()
    lines = [json.loads(line) for line in journal.path.read_text().splitlines()]
    assert lines[0] == {"event": "journal", "version": 1}
    assert lines[1]["scores"] == {"a": "nan", "1": "inf"} and lines[1]["units"] == ["a", "b"]
    assert list(read_journal(journal.path)) == lines == journal.events


def test_a_journal_is_continued_and_a_line_cut_off_left_out(tmp_path):
    path = tmp_path / "journal.jsonl"
    for step in range(2):
        journal = Journal(path)
        journal.write("freeze", step=step)
        journal.close()
    with path.open("a") as file:
        file.write('{"event": "measure", "sco')
    assert [event.get("step") for event in read_journal(path)] == [None, 0, 1]


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file/journal.jsonl cannot be written"):
        Journal(tmp_path / "file" / "journal.jsonl")


def test_events_are_kept_in_memory_without_a_path():
    journal = Journal()
    journal.write("start", step=0)
    journal.close()
    journal.write("close", step=1)
    assert [event["event"] for event in journal.events] == ["journal", "start", "close"]
