import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adafreeze import AdafreezeWarning, Journal, RunError, read_journal


def test_every_value_is_written_as_valid_json(tmp_path):
    journal = Journal(tmp_path / "deep" / "journal.jsonl")
    journal.write("x", scores={"a": math.nan, 1: math.inf}, units={"b", "a"}, path=tmp_path, pair=(1, None))
    journal.write("y", a=math.nan, b=[-math.inf, (math.inf, 1.5)], c={"d": {"e": math.nan}})
    journal.close()

    def refuse(constant):
        raise AssertionError(constant)

    first, *lines = (json.loads(line, parse_constant=refuse) for line in journal.path.read_text().splitlines())
    assert {**first, "run": None} == {"event": "journal", "version": 1, "run": None} and first["run"]
    assert lines == [
        {
            "event": "x",
            "scores": {"a": "nan", "1": "inf"},
            "units": ["a", "b"],
            "path": str(tmp_path),
            "pair": [1, None],
        },
        {"event": "y", "a": "nan", "b": ["-inf", ["inf", 1.5]], "c": {"d": {"e": "nan"}}},
    ]
    assert list(read_journal(journal.path)) == [first, *lines] == journal.events


def test_a_journal_is_continued_and_an_incomplete_line_skipped(tmp_path):
    path = tmp_path / "journal.jsonl"
    for step in range(2):
        journal = Journal(path)
        journal.write("freeze", step=step)
        journal.close()
    with path.open("a") as file:
        file.write('{"event": "measure", "sco')
    assert [event.get("step") for event in read_journal(path)] == [None, 0, 1]


def test_events_are_kept_in_memory_without_a_path():
    journal = Journal()
    journal.write("start", step=0)
    journal.close()
    journal.write("close", step=1)
    assert [event["event"] for event in journal.events] == ["journal", "start", "close"]


def test_a_truncated_journal_is_continued_on_a_new_line(tmp_path):
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
        kept = whole[: length + 1].count(b"\n")  # a line that lacks only its newline is complete
        assert events[:-1] == ["journal", "freeze"][:kept]


def test_a_killed_run_loses_no_event(tmp_path):
    path = tmp_path / "journal.jsonl"
    code = (
        "import os, signal, sys; from adafreeze import Journal; journal = Journal(sys.argv[1])\n"
        "for step in range(50): journal.write('measure', step=step, scores={'a': float('nan')})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, path]).returncode == -signal.SIGKILL
    assert [event.get("step") for event in read_journal(path)] == [None, *range(50)]


@pytest.mark.parametrize("where", ["/proc/nowhere/journal.jsonl", "a folder", "in a file", "/dev/full"])
def test_an_unwritable_path_is_rejected_with_the_reason(where, tmp_path):
    if where.startswith("/") and not Path(where).parent.parent.exists():
        pytest.skip(f"no {where} on this system")
    (tmp_path / "file").touch()
    path = {"a folder": tmp_path, "in a file": tmp_path / "file" / "journal.jsonl"}.get(where, where)
    with pytest.raises(RunError, match=r"cannot be written \(.+\)") as caught:
        Journal(path)
    assert str(path) in caught.value.fact and "Fix:" in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_rejected(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="Permission denied"):
        Journal(tmp_path / "journal.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_gives_one_warning_and_the_run_continues(tmp_path):
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


def test_partial_writes_are_completed(tmp_path, monkeypatch):
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
