"""``adafreeze analyze``: runs side by side, seeds as a group, and what cannot be compared."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest

from adafreeze.cli.main import main

QUICK = ("--samples", "4", "--trace_samples", "2", "--eigenvalues", "2", "--grid", "3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, bert, csv_file, quiet):
    """``runs(method, seed, *flags)``: the folder of a run of two steps, trained once."""
    from adafreeze.cli.train import main as train

    top, made = tmp_path_factory.mktemp("runs"), {}

    def make(method: str, seed: int = 0, *flags: str):
        key = (method, seed, *flags)
        if key not in made:
            made[key] = folder = top / method / f"seed-{seed}{'-'.join(flags).replace('/', '_')}"
            train(
                [
                    *("--task", "text-classification", "--model_name_or_path", bert, "--train_file", csv_file),
                    *("--output_dir", str(folder), "--method", method, "--seed", str(seed), "--max_steps", "2"),
                    *("--count_costs", "false", "--adapter_r", "2", "--per_device_train_batch_size", "2"),
                    *(*quiet, *flags),
                ]
            )
        return made[key]

    return make


def analyze(capsys, *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["analyze", *map(str, words)])
    return code, *capsys.readouterr()


def test_plain_and_safe_are_side_by_side_and_not_changed(runs, capsys, tmp_path):
    folders = [runs("none"), runs("safe")]
    before = {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}
    code, text, _ = analyze(capsys, *folders, *QUICK, "-o", tmp_path / "out")
    assert code == 0
    assert re.search(r"none/seed-0 +┃ +safe/seed-0", text), text
    assert re.search(r"trace +│ +\S+ ± \S+ │ +\S+ ± \S+ │", text), text
    assert before == {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert list(found["runs"]) == ["none/seed-0", "safe/seed-0"]
    for run in found["runs"].values():
        # Two blocks of width 16, LoRA of rank 2 on query and value.
        assert run["parameters"] == 2 * 2 * 2 * 2 * 16 and len(run["eigenvalues"]) == 2
        assert run["line"][1] == run["plane"][1][1] == run["loss"] > 0
        assert list(run["norms"]) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert (tmp_path / "out" / "analysis.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_of_one_method_are_a_group_and_the_same_seed_gives_the_same_numbers(runs, capsys, tmp_path):
    flags = (*QUICK, "--dtype", "float64", "--head", "-o")
    code, text, _ = analyze(capsys, runs("none"), runs("none", 1), runs("safe"), *flags, tmp_path / "a")
    assert code == 0
    assert re.search(r"none, 2 seeds +┃ +safe/seed-0", text), text
    assert re.search(r"training loss +│ +\S+ ± \S+ │ +\S+ │", text), text
    found = json.loads((tmp_path / "a" / "analysis.json").read_text())
    assert found["groups"] == {"none, 2 seeds": ["none/seed-0", "none/seed-1"], "safe/seed-0": ["safe/seed-0"]}
    assert found["runs"]["none/seed-0"]["parameters"] == 256 + 2 * 16 + 2
    assert analyze(capsys, runs("none", 1), *flags, tmp_path / "b")[0] == 0
    (again,) = json.loads((tmp_path / "b" / "analysis.json").read_text())["runs"].values()
    assert again == found["runs"]["none/seed-1"]


def test_the_method_of_a_cell_of_compare_is_read_from_the_journal(runs, capsys, tmp_path):
    cell = tmp_path / "cell"
    shutil.copytree(runs("safe"), cell)
    journal = cell / "journal.jsonl"
    journal.write_text(journal.read_text().replace('"method": "safe"', '"method": "safe+lora-fa"'))
    assert analyze(capsys, runs("safe"), cell, *QUICK, "--eigenvalues", "1", "-o", tmp_path)[0] == 0
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert len(found["groups"]) == 2 and found["runs"]["cell"]["method"] == "safe+lora-fa"


def test_without_matplotlib_only_the_figure_is_missing(runs, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    code, text, error = analyze(capsys, runs("none"), *QUICK, "-o", tmp_path)
    assert code == 2 and "largest eigenvalue" in text and (tmp_path / "analysis.json").exists()
    assert "adafreeze[report]" in error and not (tmp_path / "analysis.png").exists()


def test_what_is_refused(runs, capsys, tmp_path):
    run = runs("none")
    unfinished, gone = tmp_path / "unfinished", tmp_path / "gone"
    shutil.copytree(run, unfinished)
    lines = (run / "journal.jsonl").read_text().splitlines(keepends=True)
    (unfinished / "journal.jsonl").write_text("".join(line for line in lines if '"event": "done"' not in line))
    shutil.copytree(run, gone)
    config = gone / "adafreeze_config.yaml"
    config.write_text(re.sub("model_name_or_path: .*", "model_name_or_path: ./nowhere/bert", config.read_text()))
    for words, text in (
        ((tmp_path,), "There is no run in"),
        ((unfinished,), "not finished.*--resume_from_checkpoint last"),
        ((gone,), r"base model of gone cannot.*nowhere/bert.*adafreeze_config\.yaml"),
        ((run, runs("none", 0, "--adapter_r", "3")), "cannot be compared: adapter_r is 2 and 3"),
        ((run, runs("none", 0, "--max_train_samples", "6")), "cannot be compared: max_train_samples is None and 6"),
        ((run, run), "named twice"),
        (("-o", run), "required: RUN"),
        ((run, "--grid", "4"), "--grid 5"),
        ((run, "--samples", "0"), "--samples is 0"),
        ((run, "--radius", "nan"), "--radius is nan"),
        ((run, "-o", run / "journal.jsonl"), "cannot be written"),
    ):
        code, out, error = analyze(capsys, *words, *([] if "-o" in words else ["-o", tmp_path / "out"]))
        assert (code, out) == (2, ""), words
        assert re.search(text, error, re.DOTALL) and "Fix: " in error and "Traceback" not in error, error


def test_adapters_of_other_shapes_are_named(runs, capsys, tmp_path):
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(runs("none"), other)
    weights = load_file(other / "adapter_model.safetensors")
    dropped = next(name for name in weights if "lora_A" in name)
    save_file({name: value for name, value in weights.items() if name != dropped}, other / "adapter_model.safetensors")
    code, _, error = analyze(capsys, runs("none"), other)
    assert code == 2 and f"{dropped} is [2, 16] and not there" in error
