"""The probe recorded from the first step, if samples cannot be drawn from the train dataloader."""

import json

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import cases
from adafreeze import AdafreezeWarning, ProbeError, Safe, SafeCallback, SafeConfig
from adafreeze.integrations.accelerate import AcceleratedSafe

ROWS, STEPS = 4, 12


class Stream(torch.utils.data.IterableDataset):
    """A generator whose samples come only once."""

    def __init__(self, repeat=None):
        self.numbers = iter(range(1000)) if repeat is None else (n % repeat for n in range(1000))

    def __iter__(self):
        for number in self.numbers:
            yield cases.sample("bert", number, 10)


def generated():
    def rows():
        for number in range(64):
            yield {name: value.tolist() for name, value in cases.sample("bert", number, 10).items()}

    return IterableDataset.from_generator(rows).with_format("torch")


class Watching(Trainer):
    """Records the samples and losses."""

    def compute_loss(self, model, inputs, **kwargs):
        self.__dict__.setdefault("ids", []).append(inputs["input_ids"].tolist())
        self.__dict__.setdefault("losses", [])
        loss = self.loss_of(model, inputs)
        self.losses.append(float(loss.detach()))
        return loss

    def loss_of(self, model, inputs):
        return model(**inputs).loss


def trained(folder, data, callback, *, kind=Watching, model=None, collate=cases.collate, resume=None, **settings):
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=ROWS, max_steps=STEPS, learning_rate=1e-2, report_to=[],
        disable_tqdm=True, use_cpu=True, remove_unused_columns=False, **{"save_strategy": "no", **settings},
    )  # fmt: skip
    trainer = kind(
        model=model or cases.lora_model("bert"), args=arguments, train_dataset=data, data_collator=collate,
        callbacks=[callback] if callback else [],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("make", [Stream, generated])
def test_a_stream_is_not_consumed_and_trains_on_the_same_batches(tmp_path, make):
    plain = trained(tmp_path / "plain", make(), None)
    callback = SafeCallback(SafeConfig(freeze_at_start=0))
    safe = trained(tmp_path / "safe", make(), callback)
    assert safe.ids == plain.ids
    freezes = [event["step"] for event in callback.safe.journal.events if event["event"] == "freeze"]
    assert freezes and safe.losses[: freezes[0]] == plain.losses[: freezes[0]]
    assert callback.safe.decider.probe.chunks[0]["input_ids"].tolist() == plain.ids[0]
    assert callback.safe.decider.scorer.at_rest, "measured with the initial weights, not those after the first step"


def test_repeated_samples_of_a_stream_are_cached(tmp_path):
    runs = {}
    for cache in ("ram", "off"):
        callback = SafeCallback(SafeConfig(cache=cache, lr_scale=1))
        runs[cache] = trained(tmp_path / cache, Stream(repeat=8), callback).losses
        if cache == "ram":
            (event,) = [event for event in callback.safe.journal.events if event["event"] == "cache"]
            assert event["hits"] > 0 and callback.safe.length.samples_per_epoch is None
    assert runs["ram"] == runs["off"]


def test_a_stream_is_rejected_before_its_first_sample_is_taken():
    model = cases.lora_model("bert")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    stream = Stream()
    loader = DataLoader(stream, batch_size=2, collate_fn=cases.collate)
    accelerator = Accelerator(cpu=True)
    for start in (
        lambda: Safe(model, probe=loader, total_steps=10),
        lambda: AcceleratedSafe(accelerator, model, optimizer, accelerator.prepare(loader), total_steps=10),
        lambda: AcceleratedSafe(accelerator, model, optimizer, iter([cases.batch("bert")]), total_steps=10),
    ):
        with pytest.raises(ProbeError, match="without using up samples of the run") as caught:
            start()
        assert "probe=[batch, ...]" in caught.value.fix
    assert next(stream.numbers) == 0
    safe = Safe(model, probe=(cases.batch("bert") for _ in range(2)), total_steps=10)
    assert safe.decider.probe.samples == 8, "given batches are consumed"
    safe.close()


def test_lightning_rejects_a_stream():
    pytest.importorskip("lightning")
    from lightning.pytorch import LightningModule
    from lightning.pytorch import Trainer as LightningTrainer

    from adafreeze.integrations.lightning import AdapterFreezing

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = cases.lora_model("bert")

        def training_step(self, batch, index):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    stream = Stream()
    trainer = LightningTrainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[AdapterFreezing()],
    )  # fmt: skip
    with pytest.raises(ProbeError, match="without using up samples"):
        trainer.fit(Module(), DataLoader(stream, batch_size=2, collate_fn=cases.collate))


class Features(nn.Module):
    """Called with one dictionary of features, to which it adds, like models of sentence-transformers."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input, **kwargs):
        input["logits"] = self.inner(input_ids=input["input_ids"], attention_mask=input["attention_mask"]).logits
        return input


class Positional(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, token_ids, mask):
        return self.inner(token_ids, mask).logits


class FeaturesTrainer(Watching):
    def loss_of(self, model, inputs):
        features = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return nn.functional.cross_entropy(model(features)["logits"], inputs["labels"])


class PositionalTrainer(Watching):
    def loss_of(self, model, inputs):
        return nn.functional.cross_entropy(model(inputs["input_ids"], inputs["attention_mask"]), inputs["labels"])


@pytest.mark.parametrize(
    ("kind", "wrapper", "names"),
    [(FeaturesTrainer, Features, {"input"}), (PositionalTrainer, Positional, {"token_ids", "mask"})],
)
def test_the_probe_calls_the_model_in_the_same_way_as_training(tmp_path, kind, wrapper, names):
    data = cases.Samples("bert", 16, length=10)
    plain = trained(tmp_path, data, None, kind=kind, model=wrapper(cases.lora_model("bert")))
    callback = SafeCallback(SafeConfig(freeze_at_start=0, cache="off"))
    safe = trained(tmp_path, data, callback, kind=kind, model=wrapper(cases.lora_model("bert")))
    first = min(event["step"] for event in callback.safe.journal.events if event["event"] == "freeze")
    assert safe.losses[:first] == plain.losses[:first]
    assert set(callback.safe.decider.probe.chunks[0]) == names
    assert callback.safe.decider.probe.samples == ROWS and max(callback.safe.scores.values()) > 0
    if wrapper is Features:
        assert set(callback.safe.decider.probe.chunks[0]["input"]) == {"input_ids", "attention_mask"}


@cases.resumes_in_an_epoch
def test_a_resumed_run_has_the_probe_of_its_first_step(tmp_path):
    settings = {"kind": FeaturesTrainer, "save_strategy": "steps", "save_steps": 6}
    config, data = SafeConfig(freeze_at_start=0, cache="off"), cases.Samples("bert", 16, length=10)
    whole = SafeCallback(config)
    full = trained(tmp_path / "run", data, whole, model=Features(cases.lora_model("bert")), **settings)
    resumed = SafeCallback(config)
    rest = trained(
        tmp_path / "again", data, resumed, model=Features(cases.lora_model("bert")),
        resume=str(tmp_path / "run" / "checkpoint-6"), **settings,
    )  # fmt: skip
    assert resumed.safe.decider.probe.digest() == whole.safe.decider.probe.digest()
    assert rest.losses == full.losses[6:] and resumed.safe.scores == whole.safe.scores
    assert json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())


def test_a_model_that_cannot_be_called_alone_trains_without_freezing(tmp_path):
    class Inner(Watching):
        def loss_of(self, model, inputs):
            texts = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
            return model.inner(**texts).loss  # the Trainer's own model is never called

    data = Dataset.from_list([{"text": "a"} for _ in range(16)])

    def collate(samples):
        return cases.batch("bert", len(samples)) | {"texts": ["a"] * len(samples)}

    def run(callback):
        model = Features(cases.lora_model("bert"))
        return trained(tmp_path, data, callback, kind=Inner, model=model, collate=collate)

    plain, callback = run(None), SafeCallback()
    with pytest.warns(AdafreezeWarning, match="The probe is empty") as caught:
        safe = run(callback)
    assert any("Training continues without freezing." in str(warning.message) for warning in caught)
    assert callback.safe is None and safe.losses == plain.losses
