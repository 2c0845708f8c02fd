import json
import re
import sys
from html.parser import HTMLParser

import pytest

from adafreeze.errors import ConfigError, RunError
from adafreeze.journal import Journal
from adafreeze.report import write_report
from report_cases import write_run


class Reader(HTMLParser):
    """Figure ids, text, and every URL that a browser would load or follow."""

    def __init__(self, text):
        super().__init__()
        self.figures, self.addresses, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "figure":
            self.figures.append(given["id"])
        self.addresses += [given[name] for name in ("src", "href", "srcset", "action") if name in given]

    def handle_data(self, data):
        self.words.append(data)


def page_of(*places, tmp_path):
    text = write_report(places, tmp_path / "page.html").read_text()
    reader = Reader(text)
    return text, reader, " ".join(" ".join(reader.words).split())


@pytest.fixture
def runs(tmp_path):
    return write_run(tmp_path / "mine"), write_run(tmp_path / "other", "plain")


def test_the_headline_compares_with_the_plain_run(runs, tmp_path):
    _, reader, words = page_of(*runs, tmp_path=tmp_path)
    assert (
        "Blocks froze from step 20 of 40 on, 2 of 4 by the end; compared with other: mean saved bytes −50 %, " in words
    )
    assert "FLOPs −50 %, time −50 %, CPU time of the process −50 %, accuracy 0.8 instead of 0.8." in words
    assert reader.figures == ["scores-mine", "stack-mine", "loss", "saved-bytes", "seconds", "rate"]
    assert "The cache then served 70 of 80 samples." in words


def test_the_plain_run_is_the_reference_in_any_position(runs, tmp_path):
    nothing = write_run(tmp_path / "nothing", "safe-paper-that-froze-nothing")
    _, _, words = page_of(nothing, *runs, tmp_path=tmp_path)
    assert "compared with other" in words


def test_a_run_that_diverged_has_a_page(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "journal.jsonl"
    path.write_text(re.sub(r'"scores": \{[^}]*\}', '"scores": {"encoder.layer.0": "nan"}', path.read_text()))
    with path.open("a") as file:
        file.write('{"event": "log", "step": 41, "loss": 1e999}\n')
    _, reader, _ = page_of(folder, tmp_path=tmp_path)
    assert "stack-run" in reader.figures
    assert "scores-run" not in reader.figures


def test_one_run_alone(runs, tmp_path):
    _, _, words = page_of(runs[0], tmp_path=tmp_path)
    assert "2 of 4 by the end." in words
    _, _, words = page_of(runs[1], tmp_path=tmp_path)
    assert "Nothing froze in 40 steps." in words and "dry run" not in words


def test_a_dry_run_reports_what_would_have_frozen(tmp_path):
    folder = write_run(tmp_path / "dry", "plain")
    with (folder / "journal.jsonl").open("a") as file:
        file.write('{"event": "would_freeze", "step": 20, "units": ["a"]}\n')
        file.write('{"event": "would_freeze", "step": 30, "units": ["a", "b"]}\n')
    _, _, words = page_of(folder, tmp_path=tmp_path)
    assert "Nothing froze in 40 steps. Dry run: units would have frozen from step 20 on, 2 by step 30." in words


def test_labels_distinguish_stacks_and_units(tmp_path):
    stacks = {"model.encoder.block": 1, "model.decoder.block": 1}
    units = [f"model.{side}.block.0.layer.{k}.q_proj" for side in ("encoder", "decoder") for k in (0, 1)]
    journal = Journal(tmp_path / "t5" / "journal.jsonl")
    journal.write("start", step=0, total_steps=9, stacks=stacks, units=units)
    journal.write("measure", step=3, scores=dict.fromkeys(units, 0.5))
    journal.write("recompute", blocks=["model.decoder.block.0"])
    journal.write("log", step=9, loss=1.0)
    journal.close()
    text, _, _ = page_of(tmp_path / "t5", tmp_path=tmp_path)
    assert {"enc 0 q_proj, step 3: 0.5", "dec 0 q_proj, step 3: 0.5"} <= set(re.findall('data-tip="([^"]*)"', text))
    assert "enc 0: trains, steps 0 to 9" in text
    assert "dec 0: trains, steps 0 to 3" in text
    assert "dec 0: trains, checkpointed, steps 3 to 9" in text


def test_the_page_loads_nothing_from_outside(runs, tmp_path):
    text, reader, _ = page_of(*runs, tmp_path=tmp_path)
    assert reader.addresses
    assert all(address.startswith(("data:", "#")) for address in reader.addresses)
    assert not re.search(r"https?://|url\(|@import", text)
    assert "default-src 'none'" in text


def test_text_from_a_journal_is_escaped(tmp_path):
    evil = '<script>alert("x")</script>'
    folder = tmp_path / "evil"
    journal = Journal(folder / "journal.jsonl")
    journal.write("run", method=evil, settings={evil: evil})
    journal.write("start", step=0, total_steps=4, stacks={evil: 2}, units=[f"{evil}.0", f"{evil}.1"], config={})
    journal.write("measure", step=1, scores={f"{evil}.0": 0.1, f"{evil}.1": 0.2})
    journal.write("log", step=1, **{f"eval_{evil}": 1.0})
    journal.write("log", step=2, **{f"eval_{evil}": 2.0})
    journal.close()
    text, _, _ = page_of(folder, tmp_path=tmp_path)
    assert "<script>alert" not in text
    assert text.count("<script") == 1


def test_a_killed_run_has_a_page(runs, tmp_path):
    path = runs[0] / "journal.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:9]) + '\n{"event": "lo')
    _, _, words = page_of(runs[0], tmp_path=tmp_path)
    assert "The journal ends at step" in words


def test_a_journal_of_200_000_lines_gives_a_small_page(tmp_path):
    folder = write_run(tmp_path / "long", steps=803_000, every=6)
    assert sum(1 for _ in (folder / "journal.jsonl").open()) > 200_000
    assert write_report([folder], tmp_path / "page.html").stat().st_size < 3_000_000


def test_a_folder_of_compare_shows_the_table_and_the_runs_of_the_first_seed(tmp_path):
    rows = []
    for method in ("plain", "safe"):
        for seed in (0, 1):
            write_run(tmp_path / "out" / "task" / method / f"seed-{seed}", method)
        rows.append({"task": "task", "method": method, "seeds": 2, "score": 80.0, "sd": None, "difference": None,
                     "ratios": None, "frozen": 2.0, "units": 4, "theory": None, "reason": None})  # fmt: skip
    rows[1]["difference"] = {"mean": -0.5, "low": None, "high": None, "count": 1}
    rows.append({**rows[0], "method": "odd", "reason": "It does not <fit>."})
    outcomes = [{"task": "task", "method": m, "seed": s} for m in ("plain", "safe", "odd") for s in (0, 1)]
    (tmp_path / "out" / "compare.json").write_text(json.dumps({"rows": rows, "outcomes": outcomes}))
    _, reader, words = page_of(tmp_path / "out", tmp_path=tmp_path)
    assert "-0.50" in words
    assert "not run: It does not <fit>." in words
    assert "compared with plain" in words
    assert "stack-safe" in reader.figures


def test_runs_beyond_twelve_are_named(tmp_path):
    folders = [write_run(tmp_path / f"run-{number}") for number in range(14)]
    _, reader, words = page_of(*folders, tmp_path=tmp_path)
    assert sum(name.startswith("stack-") for name in reader.figures) == 12
    assert f"because a page has room for 12 runs: {folders[12]}, {folders[13]}." in words


def test_similar_names_have_different_ids(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("a b", "a-b")]
    _, reader, _ = page_of(*folders, tmp_path=tmp_path)
    assert len(set(reader.figures)) == len(reader.figures)


def test_equal_names_get_parent_folders(tmp_path):
    folders = [write_run(tmp_path / name / "seed-0") for name in ("trec/safe", "trec/plain", "sst/safe")]
    _, reader, words = page_of(*folders, write_run(tmp_path / "mine"), tmp_path=tmp_path)
    assert reader.figures.count("stack-trec-safe-seed-0") == reader.figures.count("stack-sst-safe-seed-0") == 1
    assert "stack-plain-seed-0" in reader.figures and "stack-mine" in reader.figures
    assert "trec/safe/seed-0: " in words and "(2)" not in words


def test_landscape_and_spectrum_are_shown(runs, tmp_path):
    found = {"loss": 0.3, "line": [0.5, 0.3, 0.6], "eigenvalues": [3.0, 1.0], "trace": 5.0}
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "analysis.json").write_text(json.dumps({"steps": [-1, 0, 1], "runs": {"a": found}}))
    _, reader, words = page_of(runs[0], tmp_path / "flat", tmp_path=tmp_path)
    assert reader.figures[-2:] == ["landscape", "spectrum"]
    assert "largest 3, trace 5" in words


@pytest.mark.parametrize("name", ["compare.json", "analysis.json"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"rows": 1}',
        '{"rows": [1], "outcomes": [1]}',
        '{"steps": [0], "runs": 1}',
        '{"steps": [0], "runs": {"a": {"line": [1], "loss": 1, "trace": 1, "eigenvalues": []}}}',
        '{"steps": [0], "runs": {"a": {"line": ["x"], "loss": 1, "trace": 1, "eigenvalues": [1]}}}',
    ],
)
def test_a_damaged_summary_is_rejected(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(RunError, match=name):
        write_report([tmp_path], tmp_path / "page.html")


def test_an_unwritable_page_is_an_error(runs, tmp_path):
    with pytest.raises(RunError, match="cannot be written"):
        write_report(runs, runs[0] / "journal.jsonl" / "page.html")


def test_without_jinja2_the_error_names_the_extra(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match=r"adafreeze\[report\]"):
        write_report(runs, tmp_path / "page.html")
