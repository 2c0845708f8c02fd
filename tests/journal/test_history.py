import json

import pytest

from adafreeze.errors import RunError
from adafreeze.journal import read_history
from report_cases import write_run


def test_a_history_has_all_series_of_a_run(tmp_path):
    found = read_history(write_run(tmp_path / "one"))
    assert (found.name, found.method, found.steps, found.total_steps) == ("one", "safe", 40, 40)
    assert found.units == [f"encoder.layer.{index}" for index in range(4)]
    assert found.freezes == [(20, ["encoder.layer.0", "encoder.layer.1"], {"encoder.layer": 2})]
    assert [step for step, _ in found.scores] == [4, 8, 12, 16, 20]
    assert found.logs["loss"][0] == (4, 0.5)
    assert found.cost("flops") == 1e12
    assert found.cost("seconds") == 50 and found.cost("cpu_seconds") == 40
    assert found.metrics() == {"accuracy": 0.8, "loss": 0.5}


def test_the_folder_and_the_file_are_the_same(tmp_path):
    folder = write_run(tmp_path / "one")
    assert read_history(folder) == read_history(folder / "journal.jsonl")


def test_values_that_are_not_numbers_are_skipped(tmp_path):
    folder = write_run(tmp_path / "one")
    with (folder / "journal.jsonl").open("a") as file:
        file.write(json.dumps({"event": "log", "step": 41, "loss": "nan", "note": "text", "flag": True}) + "\n")
    found = read_history(folder)
    assert found.logs["loss"][-1][0] == 40
    assert not {"note", "flag"} & found.logs.keys()


def test_an_incomplete_line_is_skipped(tmp_path):
    path = write_run(tmp_path / "one") / "journal.jsonl"
    path.write_text(path.read_text()[:-30])
    found = read_history(path)
    assert found.done == {}
    assert found.steps == 40


def test_events_written_again_by_a_resumed_run_count_once(tmp_path):
    path = write_run(tmp_path / "one") / "journal.jsonl"
    lines = path.read_text().splitlines()
    again = [line for line in lines if '"log"' in line or '"freeze"' in line]
    path.write_text("\n".join([*lines, *again]) + "\n")
    assert read_history(path).logs == read_history(write_run(tmp_path / "two")).logs
    assert len(read_history(path).freezes) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ('{"event": "log", "step": 1}\n', "not a journal of adafreeze"),
        ('{"event": "journal", "version": 99}\n', "format 99"),
        ('{"event": "journal", "version": "1"}\n', "format '1'"),
        ('{"event": "journal", "version": 1}\n{"event": "measure", "step": 1}\n', "damaged 'measure' event"),
        ('{"event": "journal", "version": 1}\n{"event": "freeze", "units": 3}\n', "damaged 'freeze' event"),
        ('{"event": "journal", "version": 1}\n{"event": "start", "config": [1]}\n', "damaged 'start' event"),
    ],
)
def test_a_bad_journal_is_rejected_with_the_reason(text, said, tmp_path):
    (tmp_path / "journal.jsonl").write_text(text)
    with pytest.raises(RunError, match=said):
        read_history(tmp_path)


def test_a_missing_or_binary_journal_is_rejected(tmp_path):
    with pytest.raises(RunError, match="There is no journal"):
        read_history(tmp_path / "nowhere")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    with pytest.raises(RunError, match="is empty"):
        read_history(tmp_path / "binary")
