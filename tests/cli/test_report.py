"""The command, and the pages that other commands leave."""

import pytest

from adafreeze.cli.main import main
from report_cases import write_run


def test_the_command_writes_the_page_it_names(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    assert "Report: report.html" in capsys.readouterr().out
    assert main(["report", str(run), str(run), "-o", "deep/er/page.html"]) == 0
    text = (tmp_path / "deep" / "er" / "page.html").read_text()
    assert "run (2)" in text


@pytest.mark.parametrize("place", ["nowhere", "empty"])
def test_bad_places(place, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / place), "-o", str(tmp_path / "page.html")]) == 2
    assert "There is no journal" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_run_leaves_a_page_with_its_costs_over_time(train, bert, csv_file, tmp_path, capsys):
    flags = ("text-classification", bert, csv_file, "--validation_file", csv_file, "--max_steps", "12")
    flags += ("--eval_strategy", "steps", "--eval_steps", "4", "--logging_steps", "2", "--count_costs", "true")
    safe = train(*flags, "--method", "safe").rename(tmp_path / "safe")
    page = (safe / "report.html").read_text()
    for chart in ("scores-run", "stack-run", "loss", "saved-bytes", "flops", "seconds", "eval-accuracy"):
        assert f'<figure id="{chart}">' in page
    plain = train(*flags).rename(tmp_path / "plain")
    assert main(["report", str(safe), str(plain), "-o", str(tmp_path / "both.html")]) == 0
    assert "compared with plain: mean saved bytes" in (tmp_path / "both.html").read_text()


def test_a_page_that_fails_does_not_end_the_run(train, bert, csv_file, monkeypatch):
    monkeypatch.setattr("adafreeze.report.page.headline", lambda *_: 1 / 0)
    with pytest.warns(match="The report of this run failed"):
        folder = train("text-classification", bert, csv_file)
    assert (folder / "adapter_config.json").exists()
