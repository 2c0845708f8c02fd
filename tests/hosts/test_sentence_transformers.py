"""SafeCallback in the trainers of sentence-transformers: bi-encoders and cross-encoders, plain and cached losses."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sentence_transformers")

from peft import LoraConfig, PeftModel, get_peft_model
from sentence_cases import LORA, encoder, pairs, save_encoder
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder import losses as of_pairs
from sentence_transformers.sentence_transformer import losses as of_texts
from sentence_transformers.sentence_transformer import modules
from transformers import AutoModel

from adafreeze import AdafreezeWarning, ConfigError, ModelError, Safe, SafeCallback, SafeConfig
from adafreeze.model.batch import called_by_column

SETTINGS = {
    "num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1,
    "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0,
}  # fmt: skip
TEXTS = {
    "ranking": of_texts.MultipleNegativesRankingLoss,
    "cached": lambda model: of_texts.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3),
    "matryoshka": lambda m: of_texts.MatryoshkaLoss(m, of_texts.MultipleNegativesRankingLoss(m), [16, 8]),
    "cosine": of_texts.CosineSimilarityLoss,
}
PAIRS = {
    "binary": of_pairs.BinaryCrossEntropyLoss,
    "ranking": of_pairs.MultipleNegativesRankingLoss,
    "cached": lambda model: of_pairs.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3),
}
HALF = {"freeze_at_start": 0.5, "freeze_share": 0.0}


def trained(folder, loss, config=None, pair=False, **settings):
    """Losses by step, and the trainer."""
    folder.mkdir(exist_ok=True)
    if pair:
        model = CrossEncoder(save_encoder(folder / "base"), num_labels=1, device="cpu")
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(task_type="SEQ_CLS", **LORA))
        made, kind, arguments = PAIRS[loss](model), CrossEncoderTrainer, CrossEncoderTrainingArguments
    else:
        model = encoder(folder / "base")
        made, kind, arguments = TEXTS[loss](model), SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    trainer = kind(
        model=model, args=arguments(output_dir=str(folder / "out"), **SETTINGS | settings), loss=made,
        train_dataset=pairs(label=loss in ("cosine", "binary")),
        callbacks=[] if config is None else [SafeCallback(config)],
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


def safe_of(trainer):
    return next(one.safe for one in trainer.callback_handler.callbacks if isinstance(one, SafeCallback))


def hit_rate(trainer):
    return trainer.state.log_history[-2]["safe/cache_hit_rate"]  # the last entry is the summary


@pytest.mark.parametrize("loss", TEXTS)
def test_each_text_is_served_and_no_loss_changes(loss, tmp_path, caplog):
    control, _ = trained(tmp_path / "control", loss, SafeConfig(**HALF, cache="off"))
    losses, trainer = trained(tmp_path / "safe", loss, SafeConfig(**HALF))
    assert losses == control
    safe = safe_of(trainer)
    assert sum(safe.prefixes.values()) == 2, "from step 0 on, with a probe drawn before it"
    assert set(safe.decider.probe.chunks[0]) == {"input"}
    if loss == "matryoshka":
        assert "Prefix cache off: a forward was replaced by a ForwardDecorator" in caplog.text
    else:
        assert hit_rate(trainer) > 0.8
    assert "in the first step" not in caplog.text


def test_what_preprocess_returns_is_a_probe(tmp_path):
    model = encoder(tmp_path / "base")
    features = model.preprocess(pairs()["anchor"])
    safe = Safe(model, SafeConfig(**HALF), probe=[features], total_steps=1)
    assert safe.decider.probe.samples == len(pairs()) and set(safe.decider.probe.chunks[0]) == {"input"}


@pytest.mark.parametrize("loss", PAIRS)
def test_pairs_of_a_cross_encoder(loss, tmp_path):
    control, _ = trained(tmp_path / "control", loss, SafeConfig(**HALF, cache="off"), pair=True)
    losses, trainer = trained(tmp_path / "safe", loss, SafeConfig(**HALF), pair=True)
    assert losses == control
    assert hit_rate(trainer) > 0


def test_before_the_first_freeze_it_is_the_hosts_own_run(tmp_path):
    plain, _ = trained(tmp_path / "plain", "ranking")
    losses, trainer = trained(tmp_path / "safe", "ranking", SafeConfig(freeze_at_start=0))
    first = min(event["step"] for event in safe_of(trainer).journal.events if event["event"] == "freeze")
    assert first > 0 and losses[:first] == plain[:first] and losses != plain


def test_states_are_filled_per_text_before_step_0(tmp_path, caplog):
    control, _ = trained(tmp_path / "control", "cached", SafeConfig(**HALF, cache="off"))
    losses, trainer = trained(tmp_path / "safe", "cached", SafeConfig(**HALF, fill="before"))
    assert losses == control
    assert "0 states were stored, 64 are new" in caplog.text, "texts of both columns"
    assert hit_rate(trainer) == 1


def test_a_resumed_run_is_the_same(tmp_path):
    config = SafeConfig(**HALF)
    whole, _ = trained(tmp_path / "run", "ranking", config, save_strategy="steps", save_steps=4)
    model = encoder(tmp_path / "again")
    trainer = SentenceTransformerTrainer(
        model=model, args=SentenceTransformerTrainingArguments(output_dir=str(tmp_path / "run" / "out"), **SETTINGS),
        loss=TEXTS["ranking"](model), train_dataset=pairs(), callbacks=[SafeCallback(config)],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "out" / "checkpoint-4"))
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == whole


def test_the_adapter_loads_with_peft_alone(tmp_path):
    _, trainer = trained(tmp_path / "safe", "ranking", SafeConfig(**HALF))
    trainer.model.save_pretrained(str(tmp_path / "saved"))
    base = AutoModel.from_pretrained(str(tmp_path / "safe" / "base"))
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "saved"))
    texts = pairs()["anchor"]
    inputs = trainer.model.preprocess(texts)
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model[0](dict(inputs))["token_embeddings"]
        names = ("input_ids", "attention_mask", "token_type_ids")
        found = loaded.eval()(**{name: inputs[name] for name in names if name in inputs}).last_hidden_state
    assert torch.equal(found, expected)


def test_a_memory_budget_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="make several"):
        trained(tmp_path, "ranking", SafeConfig(memory_budget="1GiB"))


def test_both_encoders_of_a_router_have_a_prefix_without_dropout(tmp_path):
    def router_losses(config):
        parts = [encoder(tmp_path / f"{config.cache}{number}") for number in range(2)]
        router = modules.Router.for_query_document(query_modules=list(parts[0]), document_modules=list(parts[1]))
        model = SentenceTransformer(modules=[router], device="cpu")
        acts = set()
        for name, module in model.named_modules():
            # With a hook that reads the prefix, nothing is served.
            if config.cache == "off" and isinstance(module, torch.nn.Dropout) and "lora" not in name:
                module.register_forward_hook(
                    lambda _m, inputs, output, name=name: acts.add(name) if not torch.equal(inputs[0], output) else None
                )
        args = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "out"), router_mapping={"anchor": "query", "positive": "document"}, **SETTINGS
        )
        callback = SafeCallback(config)
        loss = of_texts.MultipleNegativesRankingLoss(model)
        trainer = SentenceTransformerTrainer(
            model=model, args=args, loss=loss, train_dataset=pairs(), callbacks=[callback]
        )
        trainer.train()
        assert config.cache != "off" or {name.split(".")[2] for name in acts} == {"query", "document"}
        assert not any(".embeddings." in name or ".layer.0." in name for name in acts), "below the prefix"
        return trainer

    control, served = router_losses(SafeConfig(**HALF, cache="off")), router_losses(SafeConfig(**HALF))
    of = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (control, served)]
    assert of[0] == of[1] and hit_rate(served) > 0.5


def test_an_encoder_that_no_sample_reaches_is_named(tmp_path):
    parts = [encoder(tmp_path / str(number)) for number in range(2)]
    model = SentenceTransformer(
        modules=[modules.Router.for_query_document(query_modules=list(parts[0]), document_modules=list(parts[1]))],
        device="cpu",
    )
    with pytest.warns(AdafreezeWarning, match=r"No sample of the probe reaches \S+\.document\.\S+: the adapters there"):
        Safe(model, probe=[model.preprocess(pairs()["anchor"], task="query")], total_steps=1)


def test_a_peft_model_around_it_is_called_by_column_too(tmp_path):
    model = get_peft_model(SentenceTransformer(save_encoder(tmp_path / "base"), device="cpu"), LoraConfig(**LORA))
    assert called_by_column(model) and not called_by_column(torch.nn.Linear(1, 1))
    without = SentenceTransformer(str(tmp_path / "base"), device="cpu")
    with pytest.raises(ModelError, match="has no adapters") as caught:
        Safe(without, probe=[], total_steps=1)
    assert "add_adapter" in str(caught.value)


def test_filling_pairs_that_the_loss_makes_is_refused_with_the_reason(tmp_path, caplog):
    trained(tmp_path, "binary", SafeConfig(**HALF, fill="before"), pair=True)
    assert "what the model is called with is known only from the first step on" in caplog.text
