"""Pairs of texts: SetFit and sentence-transformers, plain and with adafreeze.

    python benchmarks/pairs.py [--data ../shared/data] [--seeds 0 1 2] [-o benchmarks/results/pairs.json]

* ``setfit``: 6 texts of each of TREC-6's six classes, contrastive pairs as SetFit draws them, one epoch, then its
  logistic regression; accuracy on the 500 test rows.
* ``ranking``: pairs of Banking77 texts of one intent, each text in four pairs, MultipleNegativesRankingLoss, two
  epochs; accuracy of the nearest neighbor among the training texts, on 1,000 test rows.

all-MiniLM-L6-v2 with LoRA r = 8 on all linear layers. FLOPs are counted over the whole training, with everything that
adafreeze adds. "peak" is the most that a step saves for the backward pass, over all calls of the model in that step.
Cells that are in the output already are not trained again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from setfit import SetFitModel, Trainer, TrainingArguments
from sklearn.linear_model import LogisticRegression
from transformers import set_seed
from weights import fetch

from adafreeze import SafeCallback, SafeConfig
from adafreeze.costs.flops import CountFlops
from adafreeze.costs.memory import SavedBytes
from adafreeze.env import environment
from tasks import draw

METHODS: dict[str, SafeConfig | None] = {
    "plain": None,
    "safe": SafeConfig(),
    "half": SafeConfig(freeze_at_start=0.5, freeze_share=0.0),
}


def encoder() -> SentenceTransformer:
    """MiniLM with a fresh adapter."""
    model = SentenceTransformer(str(fetch("minilm")), device="cpu")
    model.add_adapter(LoraConfig(task_type="FEATURE_EXTRACTION", r=8, target_modules="all-linear"))
    return model


def counted(trainer: SentenceTransformerTrainer, train: Any) -> dict[str, float]:
    """FLOPs of ``train()``, and the most that one of its steps saves."""
    peaks, step = [], trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        with SavedBytes(trainer.model) as saved:
            loss = step(*args, **kwargs)
        peaks.append(saved.total)
        return loss

    trainer.training_step = training_step  # type: ignore[method-assign]
    with CountFlops() as count:
        train()
    return {"flops": count.total, "peak_saved_bytes": max(peaks), "steps": len(peaks)}


def setfit(data: Path, callbacks: list[SafeCallback], seed: int, folder: str) -> dict[str, float]:
    """One run on TREC-6."""
    train = draw(data / "trec6" / "train.parquet", 2000, "label", seed)
    few = [index for label in range(6) for index in [i for i, one in enumerate(train["label"]) if one == label][:6]]
    test = draw(data / "trec6" / "dev.parquet", 500, None, 0)
    args = TrainingArguments(
        folder, num_epochs=1, batch_size=16, body_learning_rate=5e-4, report_to="none", save_strategy="no", seed=seed
    )
    model = SetFitModel(model_body=encoder(), model_head=LogisticRegression(max_iter=1000))
    trainer = Trainer(model=model, args=args, train_dataset=train.select(few), callbacks=callbacks)
    found = counted(trainer.st_trainer, trainer.train)
    return found | {"accuracy": float(np.mean(np.array(model.predict(list(test["text"]))) == np.array(test["label"])))}


def ranking(data: Path, callbacks: list[SafeCallback], seed: int, folder: str) -> dict[str, float]:
    """One run on Banking77."""
    train = draw(data / "banking77" / "train.parquet", 770, "label", seed)
    test = draw(data / "banking77" / "dev.parquet", 1000, "label", 0)
    texts = [[text for text, one in zip(train["text"], train["label"], strict=True) if one == n] for n in range(77)]
    pairs = [(a[i], a[(i + shift) % len(a)]) for a in texts for i in range(len(a)) for shift in (1, 2)]
    model = encoder()
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            folder, num_train_epochs=2, per_device_train_batch_size=32, learning_rate=5e-4, report_to=[], seed=seed,
            save_strategy="no", use_cpu=True, disable_tqdm=True, batch_sampler="no_duplicates",
        ),
        train_dataset=Dataset.from_dict({"anchor": [a for a, _ in pairs], "positive": [b for _, b in pairs]}),
        loss=MultipleNegativesRankingLoss(model),
        callbacks=callbacks,
    )  # fmt: skip
    found = counted(trainer, trainer.train)
    model.eval()
    known, asked = (model.encode(list(rows["text"]), normalize_embeddings=True) for rows in (train, test))
    answers = np.array(train["label"])[(asked @ known.T).argmax(1)]
    return found | {"accuracy": float(np.mean(answers == np.array(test["label"])))}


def table(cells: dict[str, dict[str, float]]) -> None:
    """Means over seeds, against plain."""
    print(f"{'task':10s} {'method':8s} {'accuracy':>8s} {'FLOPs':>6s} {'peak':>6s}")
    for task, method in itertools.product(("setfit", "ranking"), METHODS):
        found = [cell for key, cell in cells.items() if key.startswith(f"{task}|{method}|")]
        plain = [cells[key.replace(f"|{method}|", "|plain|")] for key in cells if key.startswith(f"{task}|{method}|")]
        if found:
            accuracy = statistics.mean(cell["accuracy"] for cell in found)
            ratios = [
                statistics.mean(a[part] / b[part] for a, b in zip(found, plain, strict=True))
                for part in ("flops", "peak_saved_bytes")
            ]
            print(f"{task:10s} {method:8s} {100 * accuracy:8.1f} {ratios[0]:6.2f} {ratios[1]:6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/pairs.json"))
    options = parser.parse_args()
    cells = json.loads(options.output.read_text())["cells"] if options.output.exists() else {}
    for seed, (task, run), method in itertools.product(
        options.seeds, (("setfit", setfit), ("ranking", ranking)), METHODS
    ):
        key = f"{task}|{method}|{seed}"
        if key not in cells:
            set_seed(seed)
            config = METHODS[method]
            with tempfile.TemporaryDirectory() as folder:
                cells[key] = run(options.data, [] if config is None else [SafeCallback(config)], seed, folder)
            record = {"cells": cells, "environment": environment()}
            options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    table(cells)


if __name__ == "__main__":
    main()
