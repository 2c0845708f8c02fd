import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adafreeze import AdafreezeWarning, Journal, RunError, read_journal


def test_lines_are_json_whatever_is_written(tmp_path):
    journal = Journal(tmp_path / "deep" / "journal.jsonl")
    journal.write(
        "measure", step=3, scores={"a": math.nan, 1: math.inf}, units={"b", "a"}, path=tmp_path, pair=(1, None)
    )
    journal.close()
    lines = [json.loads(line) for line in journal.path.read_text().splitlines()]
    assert {**lines[0], "run": None} == {"event": "journal", "version": 1, "run": None} and lines[0]["run"]
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


def test_a_journal_that_was_cut_off_is_continued_on_a_line_of_its_own(tmp_path):
    path = tmp_path / "journal.jsonl"
    first = Journal(path)
    first.write("freeze", step=1)
    first.close()
    whole = path.read_bytes()
    for length in range(1, len(whole)):  # killed at any byte
        path.write_bytes(whole[:length])
        journal = Journal(path)
        journal.write("resume", step=2)
        journal.close()
        events = [event["event"] for event in read_journal(path)]
        assert events[-1] == "resume"
        kept = whole[: length + 1].count(b"\n")  # complete but for the line's end is complete
        assert events[:-1] == ["journal", "freeze"][:kept]


def test_a_run_that_is_killed_loses_no_event_it_had_written(tmp_path):
    path = tmp_path / "journal.jsonl"
    code = (
        "import os, signal, sys; from adafreeze import Journal; journal = Journal(sys.argv[1])\n"
        "for step in range(50): journal.write('measure', step=step, scores={'a': float('nan')})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, path]).returncode == -signal.SIGKILL
    assert [event.get("step") for event in read_journal(path)] == [None, *range(50)]


def test_nan_and_infinity_are_valid_json_anywhere_in_an_event(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("x", a=math.nan, b=[-math.inf, (math.inf, 1.5)], c={"d": {"e": math.nan}})
    journal.close()
    line = journal.path.read_text().splitlines()[-1]

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(line, parse_constant=refuse) == {
        "event": "x",
        "a": "nan",
        "b": ["-inf", ["inf", 1.5]],
        "c": {"d": {"e": "nan"}},
    }


@pytest.mark.parametrize("where", ["/proc/nowhere/journal.jsonl", "a folder", "/dev/full"])
def test_a_path_that_cannot_be_written_is_refused_with_its_reason(where, tmp_path):
    if where.startswith("/") and not Path(where).parent.parent.exists():
        pytest.skip(f"no {where} on this system")
    path = tmp_path if where == "a folder" else where
    with pytest.raises(RunError, match=r"cannot be written \(.+\)") as caught:
        Journal(path)
    assert str(path) in caught.value.fact and "Fix:" in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="Permission denied"):
        Journal(tmp_path / "journal.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_disk_that_fills_up_is_warned_of_once_and_does_not_end_the_run(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    assert journal._file is not None
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, journal._file.fileno())
    os.close(full)
    with pytest.warns(AdafreezeWarning, match=r"ends before the event 'freeze' \(No space left on device\)") as caught:
        journal.write("freeze", step=3)
        journal.write("freeze", step=4)
    assert len(caught) == 1
    journal.close()
    assert [event.get("step") for event in journal.events] == [None, 3, 4]
    assert [event["event"] for event in read_journal(journal.path)] == ["journal"]


def test_a_line_written_in_parts_is_whole(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal.jsonl")

    class Narrow:
        def __init__(self, file):
            self.file = file

        def write(self, text):
            return self.file.write(text[:7])

        def close(self):
            self.file.close()

    journal._file = Narrow(journal._file)
    journal.write("freeze", step=3, units=["α"])
    journal.close()
    assert list(read_journal(journal.path)) == journal.events
