"""Rows for a task, from the Hub or from local files, checked before the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, warn
from ._files import check_csv, check_encoding, check_json, place_of

if TYPE_CHECKING:
    from datasets import Dataset

    from .task import Task

__all__ = ["Split", "check", "first_line", "load_file", "load_hub", "load_splits", "load_validation", "quiet"]

_READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


def _row(index: int) -> str:
    return f"row {index + 1}"


@dataclass(frozen=True)
class Split:
    """Rows in the order of their source.

    Args:
        rows: the dataset.
        name: the file, or the dataset and split on the Hub, as the user wrote it.
        locate: where row ``index`` is, such as ``"line 7"``.
    """

    rows: Dataset
    name: str
    locate: Callable[[int], str] = _row

    def where(self, index: int) -> str:
        """The place of a row for messages, such as ``"train.csv, line 7"``."""
        return f"{self.name}, {self.locate(index)}"


def load_file(path: str, cache_dir: str | None = None) -> Split:
    """Read a .csv, .json, .jsonl or .parquet file, or the lines of a .txt file as the column ``text``.

    Raises:
        DataError: the file has another extension, no rows, or ``datasets`` cannot read it.
    """
    from datasets import load_dataset

    file = Path(path).expanduser()
    if file.suffix not in _READERS:
        raise DataError(
            f"{path} has the extension {file.suffix or '(none)'}, not one of {', '.join(_READERS)}.",
            fix=f"Save the data as {file.stem}.csv or {file.stem}.jsonl.",
        )
    options: dict[str, Any] = {}
    rows = None
    try:
        if file.suffix != ".parquet":
            check_encoding(file)
        if file.suffix == ".csv":
            check_csv(file)
            # Words such as "NA", "None" and "null" are text; only an empty field is a missing value.
            options = {"keep_default_na": False, "na_values": [""]}
        elif file.suffix == ".txt":
            options = {"keep_linebreaks": True}  # as run_clm: joined lines stay lines
        with quiet():
            rows = load_dataset(
                _READERS[file.suffix], data_files={"train": str(file)}, split="train", cache_dir=cache_dir, **options
            )
    except DataError:
        raise
    except Exception as error:  # OSError, and those of csv, pandas, pyarrow and datasets
        if "corresponds to no data" not in str(error):
            if file.suffix in (".json", ".jsonl"):
                check_json(file)
            raise DataError(
                f"{path} cannot be read: {first_line(error)}",
                fix=f"Correct the path or the content; {file.suffix} files need one type of value per column.",
            ) from error
    if not rows:
        raise DataError(f"{path} has no rows.", fix="Check how the file was written, or give another file.")
    return Split(rows, path, partial(place_of, file))


@contextmanager
def quiet() -> Iterator[None]:
    """Run ``datasets`` without progress bars and without its log of an error that the caller explains."""
    from datasets import disable_progress_bars
    from datasets.utils.logging import CRITICAL, get_verbosity, set_verbosity

    disable_progress_bars()
    verbosity = get_verbosity()
    set_verbosity(CRITICAL)
    try:
        yield
    finally:
        set_verbosity(verbosity)


def first_line(error: BaseException) -> str:
    """The first line of a library's message; of pyarrow's or that of the cause if ``datasets`` wraps it."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    inner = [cause for cause in chain if type(cause).__name__ == "ArrowInvalid"]
    wrapped = chain[1:2] if type(error).__name__ == "DatasetGenerationError" else []
    return next(iter(str([*inner, *wrapped, error][0]).strip().splitlines()), type(error).__name__)


def load_hub(
    name: str, config: str | None = None, *, trust_remote_code: bool = False, **options: Any
) -> dict[str, Split]:
    """All splits of a dataset on the Hub (or in a local dataset folder) by name.

    Args:
        name: such as ``"nyu-mll/glue"``.
        config: such as ``"mrpc"``.
        trust_remote_code: run code that comes with the dataset (datasets 3).
        options: for ``datasets.load_dataset``: ``cache_dir``, ``token``.

    Raises:
        DataError: ``datasets`` cannot load it.
    """
    from datasets import load_dataset

    if trust_remote_code:  # datasets 4 dropped the option and warns about it
        options["trust_remote_code"] = True
    try:
        splits = load_dataset(name, config, **options)
    except Exception as error:
        raise DataError(
            f"The dataset {name!r} cannot be loaded: {first_line(error)}",
            fix="Correct --dataset_name or --dataset_config_name, add --token hf_... for a private dataset, or "
            "give local files: --train_file train.csv --validation_file validation.csv",
        ) from error
    return {key: Split(rows, f"{name}[{key}]") for key, rows in splits.items()}


def check(task: Task, split: Split, *, skip_bad_rows: bool = False) -> Split:
    """``split`` if ``task`` can use every row; with ``skip_bad_rows`` the usable rows, and a warning with their count.

    Raises:
        DataError: a column is missing, or a row cannot be used.
    """
    found = list(split.rows.column_names)
    for field in task.columns(found):
        value = getattr(task, field)
        names = [value] if isinstance(value, str) else list(value)
        missing = [name for name in names if name not in found]
        if missing:
            raise DataError(
                f"{split.name} has no column {', '.join(map(repr, missing))}; its columns are {', '.join(found)}.",
                fix=f"Name the right ones: --{field} {' '.join(found[: len(names)])}",
            )
    faults = task.faults(split)
    if not faults:
        return split
    first = min(faults)
    count = f"{len(faults)} of {len(split.rows)} rows"
    if not skip_bad_rows or len(faults) == len(split.rows):
        raise DataError(
            f"{split.where(first)}: {faults[first]}." + (f" {count} cannot be used." if len(faults) > 1 else ""),
            fix="Correct or remove the row, or add --skip_bad_rows to leave such rows out.",
        )
    warn(
        f"{count} of {split.name} are left out; the first is {split.locate(first)}: {faults[first]}.",
        fix="Correct the rows; without --skip_bad_rows the run stops at the first.",
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
    **options: Any,
) -> tuple[Dataset, Dataset | None]:
    """Load and check the training and validation rows, and fit ``task`` to the training rows.

    The arguments are the flags of ``adafreeze train``. ``validation_split`` is the split to evaluate on (default:
    ``"validation"`` if it exists), or a share such as ``"0.1"`` of the training rows to hold out, drawn by ``seed``.
    ``max_train_samples`` and ``max_eval_samples`` keep the first rows only. ``options`` are for ``load_hub``.

    Returns:
        Training rows, and validation rows or None.

    Raises:
        DataError: see ``load_file``, ``load_hub``, ``check``.
    """
    share = _share(validation_split)
    validation: Split | None = None
    if (dataset_name is None) == (train_file is None):
        raise DataError(
            "Exactly one of --dataset_name and --train_file (--train_dir for a folder of images) is needed; got "
            f"{'neither' if dataset_name is None else 'both'}.",
            fix="--train_file train.csv --validation_file validation.csv",
        )
    if dataset_name is not None:
        splits = load_hub(dataset_name, dataset_config_name, **options)
        for flag, name in (("train", train_split), ("validation", validation_split if share is None else None)):
            if name is not None and name not in splits:
                raise DataError(
                    f"The dataset {dataset_name!r} has no split {name!r}; its splits are {', '.join(splits)}.",
                    fix=f"--{flag}_split {next(iter(splits))}",
                )
        train = splits[train_split]
        if share is None:
            validation = splits.get(validation_split or "validation")
    else:
        assert train_file is not None
        train = task.read(train_file, options.get("cache_dir"))
    if validation_file is not None:
        validation = task.read(validation_file, options.get("cache_dir"))

    train = check(task, train, skip_bad_rows=skip_bad_rows)
    task.fit(train)
    train_rows, validation_rows = train.rows, None
    if validation is not None:
        validation_rows = check(task, validation, skip_bad_rows=skip_bad_rows).rows
    elif share is not None:
        if len(train_rows) < 2:
            raise DataError(
                f"{train.name} has one row, so --validation_split {validation_split} cannot hold out any.",
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
    """More rows to evaluate on, after ``load_splits``: the file ``path``, or ``split`` of the Hub dataset if it exists.

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
            f"--validation_split is {validation_split}; as a share of the training rows it must be between 0 and 1.",
            fix="--validation_split 0.1",
        )
    return share


def _first(rows: Any, count: int | None) -> Any:
    return rows if rows is None or count is None else rows.select(range(min(count, len(rows))))
