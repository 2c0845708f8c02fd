"""The command, and the pages that other commands leave."""

import pytest

from adafreeze.cli.main import main
from report_cases import write_run
from text_cases import reviews, write


def test_the_command_writes_where_it_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    assert "The page is report.html." in capsys.readouterr().out
    assert main(["report", str(run), str(run), "-o", "deep/er/page.html"]) == 0
    text = (tmp_path / "deep" / "er" / "page.html").read_text()
    assert "run (2)" in text


@pytest.mark.parametrize("place", ["nowhere", "empty"])
def test_bad_places(place, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / place), "-o", str(tmp_path / "page.html")]) == 2
    assert "There is no journal" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_run_leaves_a_page_with_its_costs_over_time(bert, tmp_path, capsys):
    data = write(tmp_path / "rows.csv", reviews(8))
    call = ["train", "--model_name_or_path", bert, "--task", "text-classification", "--train_file", data,
            "--validation_file", data, "--max_steps", "12", "--per_device_train_batch_size", "4", "--use_cpu",
            "--logging_steps", "2", "--eval_strategy", "steps", "--eval_steps", "4", "--report_to", "none",
            "--disable_tqdm", "true", "--output_dir"]  # fmt: skip
    assert main([*call, str(tmp_path / "safe")]) == 0
    page = (tmp_path / "safe" / "report.html").read_text()
    for chart in ("scores-safe", "stack-safe", "loss", "saved-bytes", "flops", "seconds", "eval-accuracy"):
        assert f'<figure id="{chart}">' in page
    assert main([*call, str(tmp_path / "plain"), "--method", "none"]) == 0
    capsys.readouterr()
    assert main(["report", str(tmp_path / "safe"), str(tmp_path / "plain"), "-o", str(tmp_path / "both.html")]) == 0
    assert "against plain, mean saved bytes" in (tmp_path / "both.html").read_text()


def test_a_page_that_fails_ends_no_run(bert, tmp_path, monkeypatch):
    data = write(tmp_path / "rows.csv", reviews(4))
    monkeypatch.setattr("adafreeze.report.page.headline", lambda *_: 1 / 0)
    with pytest.warns(match="There is no page about this run"):
        assert main(["train", "--model_name_or_path", bert, "--task", "text-classification", "--train_file", data,
                     "--max_steps", "1", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true",
                     "--output_dir", str(tmp_path / "run")]) == 0  # fmt: skip
    assert (tmp_path / "run" / "adapter_config.json").exists()
