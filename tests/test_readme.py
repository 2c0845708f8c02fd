"""What the README tells its reader to type works, with a small local model and rows in the places of the Hub's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from adafreeze.cli.main import main
from text_cases import reviews, save_bert, save_llama, write

README = (Path(__file__).parents[1] / "README.md").read_text()


def replaced(text: str, **places: str) -> str:
    """``text`` with local names for those of the Hub, each of which is in it."""
    for name, local in places.items():
        assert name in text, name
        text = text.replace(name, local)
    return text


def test_the_script_trains_and_freezes(tmp_path, monkeypatch, caplog):
    (script,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(script.splitlines()) <= 17
    rows = [{"sentence": row["text"], "label": int(row["label"] == "pos")} for row in reviews(32)]
    file = write(tmp_path / "rows.parquet", rows)
    script = replaced(
        script,
        **{
            "sentence-transformers/all-MiniLM-L6-v2": save_bert(tmp_path / "bert"),
            '"stanfordnlp/sst2"': f'"parquet", data_files="{file}"',
            "learning_rate=5e-4": "learning_rate=5e-4, use_cpu=True, report_to=[], disable_tqdm=True",
            '"all-linear"': '["query", "value"]',
        },
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "README.md", "exec"), {"__name__": "__main__"})
    assert re.search(r"Step \d+ of 6: \d of \d units are frozen", caplog.text)


def test_the_plan_prints_what_fits(tmp_path, capsys):
    (command,) = re.findall(r"\$ (adafreeze plan.*?)\n```", README, re.DOTALL)
    words = shlex.split(
        replaced(command.replace("\\\n", ""), **{"meta-llama/Llama-3.1-8B": save_llama(tmp_path), "1024": "16"})
    )
    assert main(words[1:]) == 0
    assert "Micro-batches that fit" in capsys.readouterr().out


@pytest.mark.parametrize(("limit", "count"), [(120, len(README.splitlines())), (800, len(README.split()))])
def test_it_stays_short(limit, count):
    assert count <= limit
