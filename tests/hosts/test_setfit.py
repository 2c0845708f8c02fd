"""SafeCallback in SetFit, whose callbacks get a model that is no nn.Module."""

from __future__ import annotations

import pytest

pytest.importorskip("setfit")

from datasets import Dataset
from sentence_cases import encoder, pairs
from setfit import SetFitModel, Trainer, TrainingArguments
from sklearn.linear_model import LogisticRegression

from adafreeze import SafeCallback, SafeConfig


def trained(folder, config=None):
    model = SetFitModel(model_body=encoder(folder / "base"), model_head=LogisticRegression())
    args = TrainingArguments(
        output_dir=str(folder / "out"), num_epochs=1, batch_size=8, body_learning_rate=1e-2, report_to="none",
        logging_steps=1, save_strategy="no", seed=0,
    )  # fmt: skip
    callback = None if config is None else SafeCallback(config)
    texts = pairs()["anchor"][::2]
    data = Dataset.from_dict({"text": texts, "label": [place // 4 for place in range(len(texts))]})
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[callback] if callback else [])
    trainer.train()
    history = [entry for entry in trainer.st_trainer.state.log_history if "embedding_loss" in entry]
    return history, callback, trainer


def test_texts_that_repeat_within_an_epoch_are_served_and_no_loss_changes(tmp_path):
    config = {"freeze_at_start": 0.5, "freeze_share": 0.0}
    control, _, _ = trained(tmp_path / "control", SafeConfig(**config, cache="off"))
    history, callback, trainer = trained(tmp_path / "safe", SafeConfig(**config))
    assert [entry["embedding_loss"] for entry in history] == [entry["embedding_loss"] for entry in control]
    assert sum(callback.safe.prefixes.values()) == 2
    assert history[-1]["safe/cache_hit_rate"] > 0.5
    assert len(trainer.model.predict(["a good film"])) == 1


def test_before_the_first_freeze_it_is_the_hosts_own_run(tmp_path):
    plain, _, _ = trained(tmp_path / "plain")
    history, callback, _ = trained(tmp_path / "safe", SafeConfig(freeze_at_start=0))
    first = min(event["step"] for event in callback.safe.journal.events if event["event"] == "freeze")
    losses, without = ([entry["embedding_loss"] for entry in part] for part in (history, plain))
    assert first > 0 and losses[:first] == without[:first] and losses != without


def test_states_that_are_filled_are_found(tmp_path, caplog):
    config = {"freeze_at_start": 0.5, "freeze_share": 0.0}
    control, _, _ = trained(tmp_path / "control", SafeConfig(**config, cache="off"))
    history, _, _ = trained(tmp_path / "safe", SafeConfig(**config, fill="before"))
    assert [entry["embedding_loss"] for entry in history] == [entry["embedding_loss"] for entry in control]
    assert "Prefix cache filled" in caplog.text and "of no use" not in caplog.text
