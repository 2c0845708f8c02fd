"""Data for a task: from the Hub or from local files, checked before anything expensive starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, warn
from ._files import check_csv, check_encoding, find_bad_line, line_of
from ._hub import first_line, hub_reason

if TYPE_CHECKING:
    from datasets import Dataset

    from .task import Task

__all__ = ["Split", "check", "load_file", "load_hub", "load_splits", "load_validation", "quiet"]

_READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


def _row(index: int) -> str:
    return f"row {index + 1}"


@dataclass(frozen=True)
class Split:
    """Rows in the order of their source, and how to say where one of them stands.

    Args:
        rows: the dataset.
        name: the file, or the dataset and split on the Hub, as the user wrote it.
        locate: row index (from 0) to words such as ``"line 7"``.
    """

    rows: Dataset
    name: str
    locate: Callable[[int], str] = _row

    def where(self, index: int) -> str:
        """The place of a row in words: ``"train.csv, line 7"``."""
        return f"{self.name}, {self.locate(index)}"


def load_file(path: str, cache_dir: str | None = None) -> Split:
    """Read a .csv, .json, .jsonl or .parquet file, or the lines of a .txt file as the column ``text``.

    Raises:
        DataError: the file does not exist, has another extension, is empty, or holds a line that cannot be
            read.
    """
    from datasets import load_dataset

    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(
            f"The file {path} does not exist.",
            cause="It is a folder." if file.is_dir() else f"The current folder is {Path.cwd()}.",
            fix=f"Correct the path; `ls {file.parent}` shows what is there.",
        )
    if file.suffix not in _READERS:
        raise DataError(
            f"{path} has the extension {file.suffix or '(none)'}, which is not known.",
            cause=f"The extension says how to read a file; known are {', '.join(_READERS)}.",
            fix=f"Save the data as {file.stem}.csv or {file.stem}.jsonl.",
        )
    options: dict[str, Any] = {}
    if file.suffix != ".parquet":
        check_encoding(file)
    if file.suffix == ".csv":
        check_csv(file)
        # Words like "NA", "None" and "null" are text; only an empty field is a missing value.
        options = {"keep_default_na": False, "na_values": [""]}
    elif file.suffix == ".txt":
        options = {"keep_linebreaks": True}  # as run_clm: joined lines stay lines
    if file.stat().st_size == 0:
        raise _no_rows(path)
    try:
        with quiet():
            rows = load_dataset(
                _READERS[file.suffix],
                data_files={"train": str(file)},
                split="train",
                cache_dir=cache_dir,
                **options,
            )
    except Exception as error:  # pandas', pyarrow's and datasets' own, whatever the reader is
        if "corresponds to no data" in str(error):
            raise _no_rows(path) from error
        raise find_bad_line(file) or DataError(
            f"{path} cannot be read: {first_line(error)}",
            cause=f"Its content is not what the extension {file.suffix} says, or a column changes its type.",
            fix="Open the file and correct it, or save the data in another format.",
        ) from error
    if len(rows) == 0:
        raise _no_rows(path)

    def locate(index: int) -> str:
        line = line_of(file, index)
        return _row(index) if line is None else f"line {line}"

    return Split(rows, path, locate)


@contextmanager
def quiet() -> Iterator[None]:
    """``datasets`` without progress bars, and without a log of the failure that is told in the user's terms."""
    from datasets import disable_progress_bars
    from datasets.utils.logging import CRITICAL, get_verbosity, set_verbosity

    disable_progress_bars()
    verbosity = get_verbosity()
    set_verbosity(CRITICAL)
    try:
        yield
    finally:
        set_verbosity(verbosity)


def _no_rows(path: str) -> DataError:
    return DataError(
        f"{path} is empty.",
        cause="It holds no rows (a header alone is none).",
        fix="Check how the file was written, or give another one.",
    )


def load_hub(
    name: str, config: str | None = None, *, trust_remote_code: bool = False, **options: Any
) -> dict[str, Split]:
    """All splits of a dataset on the Hub (or in a local dataset folder), by name.

    Args:
        name: such as ``"nyu-mll/glue"``.
        config: such as ``"mrpc"``.
        trust_remote_code: run code that comes with the dataset (before datasets 4).
        options: for ``datasets.load_dataset``: ``cache_dir``, ``token``.

    Raises:
        DataError: the Hub cannot be reached or does not have it, or a ``config`` must be chosen.
    """
    from datasets import load_dataset

    if trust_remote_code:  # only said when it is wanted: datasets 4 dropped the option and warns of it
        options["trust_remote_code"] = True
    try:
        splits = load_dataset(name, config, **options)
    except Exception as error:
        reason = None if Path(name).exists() else hub_reason(error)
        if reason == "unreachable":
            raise DataError(
                f"The dataset {name!r} cannot be fetched: the Hugging Face Hub is unreachable.",
                cause="It is not in the download cache, and there is no connection to huggingface.co (or "
                "HF_HUB_OFFLINE is set).",
                fix="Give local files: --train_file train.csv --validation_file validation.csv",
            ) from error
        if reason is not None:
            raise DataError(
                f"The Hugging Face Hub does not give out a dataset {name!r}.",
                cause="There is none of that name, or it is private or gated and needs your token.",
                fix="Correct --dataset_name, or pass --token hf_...",
            ) from error
        raise DataError(
            f"The dataset {name!r} cannot be loaded: {first_line(error)}",
            cause="A configuration must be named, or the dataset is not in a format that `datasets` reads.",
            fix="Name one with --dataset_config_name, or download its files and give --train_file.",
        ) from error
    return {key: Split(rows, f"{name}[{key}]") for key, rows in splits.items()}


def check(task: Task, split: Split, *, skip_bad_rows: bool = False) -> Split:
    """``split`` if ``task`` can use every row of it.

    With ``skip_bad_rows`` those that it cannot use are left out and counted in a warning.

    Raises:
        DataError: a column is missing, or a row cannot be used: named by its line.
    """
    found = list(split.rows.column_names)
    for flag, names in task.columns(found).items():
        missing = [name for name in names if name not in found]
        if missing:
            raise DataError(
                f"{split.name} has no column {', '.join(map(repr, missing))}.",
                cause=f"Its columns are: {', '.join(found)}.",
                fix=f"Name the right ones: {flag} {' '.join(found[: len(names)])}",
            )
    faults = task.faults(split)
    if not faults:
        return split
    first = min(faults)
    if not skip_bad_rows or len(faults) == len(split.rows):
        raise DataError(
            f"{split.where(first)}: {faults[first]}."
            + (f" {len(faults)} of {len(split.rows)} rows cannot be used." if len(faults) > 1 else ""),
            cause=f"{task.name} needs text and, where it has labels, a label that it knows in every row.",
            fix="Correct or remove the row, or add --skip_bad_rows to leave such rows out.",
        )
    warn(
        f"{len(faults)} of {len(split.rows)} rows of {split.name} are left out.",
        cause=f"The first of them: {split.locate(first)}: {faults[first]}.",
        fix="Correct the rows, or leave out --skip_bad_rows to stop at the first.",
    )
    kept = [index for index in range(len(split.rows)) if index not in faults]
    return Split(split.rows.select(kept), split.name, lambda index: split.locate(kept[index]))


def load_splits(
    task: Task,
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
    skip_bad_rows: bool = False,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 42,
    cache_dir: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Dataset, Dataset | None]:
    """Load, check, and fit ``task`` to the training data.

    Args:
        task: what the rows are for; ``Task.fit`` is called on the training rows.
        dataset_name: a dataset on the Hub; or ``train_file``.
        dataset_config_name: its configuration.
        train_file: a local file; or ``dataset_name``.
        validation_file: a local file to evaluate on.
        train_split: the split of the Hub dataset to train on.
        validation_split: the split to evaluate on (default: ``"validation"`` where there is one), or a share
            such as ``"0.1"``: that part of the training rows is held out instead.
        skip_bad_rows: see ``check``.
        max_train_samples: train on the first rows only.
        max_eval_samples: evaluate on the first rows only.
        seed: draws the rows that are held out.
        cache_dir: where ``datasets`` keeps what it read.
        token: access token of the Hub.
        trust_remote_code: run code that comes with the dataset (before datasets 4).

    Returns:
        Training rows and, where there are any, validation rows.

    Raises:
        DataError: see ``load_file``, ``load_hub``, ``check``.
    """
    share = _share(validation_split)
    validation: Split | None = None
    if (dataset_name is None) == (train_file is None):
        raise DataError(
            "Exactly one of --dataset_name and --train_file (a folder of images: --train_dir) is needed.",
            cause="Neither is given." if dataset_name is None else "Both are given.",
            fix="--train_file train.csv --validation_file validation.csv",
        )
    if dataset_name is not None:
        splits = load_hub(
            dataset_name, dataset_config_name, cache_dir=cache_dir, token=token, trust_remote_code=trust_remote_code
        )
        wanted = [train_split] + ([validation_split] if validation_split and share is None else [])
        for name in wanted:
            if name not in splits:
                raise DataError(
                    f"The dataset {dataset_name!r} has no split {name!r}.",
                    cause=f"Its splits are: {', '.join(splits)}.",
                    fix=f"--{'train' if name == train_split else 'validation'}_split {next(iter(splits))}",
                )
        train = splits[train_split]
        if share is None:
            validation = splits.get(validation_split or "validation")
    else:
        assert train_file is not None
        train = task.read(train_file, cache_dir)
    if validation_file is not None:
        validation = task.read(validation_file, cache_dir)

    train = check(task, train, skip_bad_rows=skip_bad_rows)
    task.fit(train)
    train_rows, validation_rows = train.rows, None
    if validation is not None:
        validation_rows = check(task, validation, skip_bad_rows=skip_bad_rows).rows
    elif share is not None:
        if len(train_rows) < 2:
            raise DataError(
                f"{train.name} has one row: none can be held out.",
                cause=f"--validation_split {validation_split} takes its rows from the training data.",
                fix="Give more rows, or a --validation_file.",
            )
        size = min(max(1, round(share * len(train_rows))), len(train_rows) - 1)
        parts = train_rows.train_test_split(test_size=size, seed=seed)
        train_rows, validation_rows = parts["train"], parts["test"]
    return _first(train_rows, max_train_samples), _first(validation_rows, max_eval_samples)


def load_validation(
    task: Task,
    split: str,
    *,
    path: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    skip_bad_rows: bool = False,
    max_samples: int | None = None,
    **options: Any,
) -> Dataset | None:
    """More rows to evaluate on, for a task that ``load_splits`` has fitted; None where there are none.

    Args:
        task: what the rows are for.
        split: of the dataset on the Hub.
        path: a local file instead.
        dataset_name: on the Hub.
        dataset_config_name: its configuration.
        skip_bad_rows: see ``check``.
        max_samples: the first rows only.
        options: for ``load_hub``.

    Raises:
        DataError: see ``load_file``, ``load_hub``, ``check``.
    """
    found: Split | None = None
    if path is not None:
        found = task.read(path, options.get("cache_dir"))
    elif dataset_name is not None:
        found = load_hub(dataset_name, dataset_config_name, **options).get(split)
    return None if found is None else _first(check(task, found, skip_bad_rows=skip_bad_rows).rows, max_samples)


def _share(validation_split: str | None) -> float | None:
    try:
        share = float(validation_split) if validation_split is not None else None
    except ValueError:
        return None  # the name of a split
    if share is not None and not 0 < share < 1:
        raise DataError(
            f"--validation_split is {validation_split}.",
            cause="As a number it is the part of the training rows to hold out, between 0 and 1.",
            fix="--validation_split 0.1",
        )
    return share


def _first(rows: Any, count: int | None) -> Any:
    return rows if rows is None or count is None else rows.select(range(min(count, len(rows))))
