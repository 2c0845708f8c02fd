from __future__ import annotations

from pathlib import Path

import pytest

from adafreeze.tasks import GLUE
from image_cases import save_vit
from text_cases import reviews, save_bert, save_llama, write

QUIET = ("--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no")


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path_factory, monkeypatch):
    """``datasets`` caches a file by name and age, which another test's file may share."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> str:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def vit(tmp_path_factory) -> str:
    return save_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="session")
def csv_file(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("data") / "train.csv", reviews())


@pytest.fixture(scope="session")
def quiet() -> tuple[str, ...]:
    """Flags of a run on the CPU that prints and saves little."""
    return QUIET


@pytest.fixture
def train(tmp_path):
    """``train(task, model, file, *flags)``: the command in two steps of two rows; its output folder.

    ``task`` may be a GLUE task, ``file`` a folder of images.
    """
    from adafreeze.cli.train import main

    def run(task: str, model: str, file: str, *flags: str) -> Path:
        folder = tmp_path / "run"
        main(
            [
                *("--task_name" if task in GLUE else "--task", task, "--model_name_or_path", model),
                *("--train_dir" if Path(file).is_dir() else "--train_file", file, "--output_dir", str(folder)),
                *("--method", "none", "--count_costs", "false", "--max_steps", "2", "--logging_steps", "1"),
                *("--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "4", *QUIET, *flags),
            ]
        )
        return folder

    return run
