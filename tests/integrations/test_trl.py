"""SafeCallback in TRL's trainers: SFT, DPO with its reference passes, GRPO with its generation."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

import cases
from adafreeze import ProbeError, SafeCallback, SafeConfig

trl = pytest.importorskip("trl")
utils = pytest.importorskip("trl.trainer.utils")

LORA = cases.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def tokenizer():
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", *[f"w{i}" for i in range(60)]])}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def words(index, count):
    return " ".join(f"w{(7 * index + 11 * place) % 60}" for place in range(count))


def texts(count=32):
    return Dataset.from_dict({"text": [words(i, 8 + i % 5) for i in range(count)]})


def pairs(count=24):
    sides = {"prompt": (0, 5), "chosen": (1, 4), "rejected": (2, 4)}
    return Dataset.from_dict({k: [" " + words(3 * i + n, m) for i in range(count)] for k, (n, m) in sides.items()})


def prompts(count=12):
    return Dataset.from_dict({"prompt": [words(i, 5) for i in range(count)]})


class Watch(TrainerCallback):
    """Records results of reference passes, frozen units after each step, and frozen parameters that changed."""

    def __init__(self, safe):
        self.safe, self.passes, self.frozen, self.moved, self._before = safe, [], [], [], {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._hook = model.register_forward_hook(self._look, with_kwargs=True)

    def _look(self, model, args, inputs, output):
        if model.training and not torch.is_grad_enabled() and inputs.get("fused_lm_head"):
            depth = sum(self.safe.safe.prefixes.values()) if self.safe.safe else 0
            self.passes.append((depth, inputs, output.log_probs))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        held = {id(p) for p in self.safe.safe.freezer.parameters()}
        now = {name: p.detach().clone() for name, p in model.named_parameters() if id(p) in held}
        self.moved += [name for name, value in self._before.items() if not torch.equal(now[name], value)]
        self.moved += [name for name, p in model.named_parameters() if id(p) in held and p.requires_grad]
        self._before = now
        self.frozen.append(sorted(self.safe.safe.frozen))

    def on_train_end(self, *_, **__):
        self._hook.remove()


def trained(kind, folder, data, *, model=None, config=None, resume=None, **settings):
    """Train; returns the trainer, Safe and Watch."""
    arguments = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "num_train_epochs": 3, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False, "seed": 3,
        "disable_tqdm": True, "lr_scheduler_type": "constant", **settings,
    }  # fmt: skip
    extra = {"reward_funcs": lambda completions, **_: [float(len(set(c.split()))) for c in completions]}
    safe = SafeCallback(config or SafeConfig(freeze_share=0.6))
    watch = Watch(safe)
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model or cases.base_model("llama"), args=getattr(trl, f"{kind}Config")(**arguments), train_dataset=data,
        processing_class=tokenizer(), peft_config=None if model else LORA, callbacks=[safe, watch],
        **(extra if kind == "GRPO" else {}),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, safe.safe, watch


def adapter(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}


def assert_same(one, other):
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_sft(tmp_path):
    trainer, safe, watch = trained("SFT", tmp_path, texts(), max_length=16)
    assert isinstance(trainer.model, PeftModel)
    assert safe.prefixes["model.layers"] > 0 and not watch.moved
    assert any("safe/frozen_prefix" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("settings", [{"packing": True, "max_length": 40}, {"padding_free": True, "max_length": None}])
def test_packed_rows_are_measured_by_row_and_cached_by_document(tmp_path, settings):
    runs = []
    for cache in ("ram", "off"):
        config = SafeConfig(freeze_share=0.6, cache=cache)
        trainer, safe, watch = trained("SFT", tmp_path, texts(), config=config, **settings)
        assert safe.prefixes["model.layers"] > 0 and not watch.moved
        assert all(len(chunk["input_ids"]) == 1 for chunk in safe.decider.probe.chunks)
        runs.append((safe, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    (safe, cached), (_, plain) = runs
    assert cached == pytest.approx(plain, rel=1e-5)
    (event,) = [event for event in safe.journal.events if event["event"] == "cache"]
    assert safe.cache.off_because is None and event["hits"] + event["advanced"] >= 32


@pytest.mark.parametrize("autocast", [False, True])
def test_states_that_are_filled_before_step_0_are_found_with_the_arguments_that_trl_adds(autocast, tmp_path):
    runs = []
    for fill in ("before", None):
        config = SafeConfig(cache="ram", fill=fill, freeze_at_start=0.5, freeze_share=0.0, score="random")
        trainer, safe, watch = trained("SFT", tmp_path, texts(), config=config, max_length=16, bf16=autocast)
        assert not watch.moved
        runs.append((safe, adapter(trainer)))
    (safe, filled), (_, alone) = runs
    for name, value in filled.items():  # filled in batches of other widths
        torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=1e-4)
    (event,) = [event for event in safe.journal.events if event["event"] == "cache"]
    assert event["hits"] + event["misses"] == 3 * 32 and event["misses"] <= 4  # the batch that verifies


@pytest.mark.parametrize("given", ["a config", "a model with an adapter"])
def test_dpo_reference_passes_are_exact_above_a_frozen_prefix(tmp_path, given):
    def start():
        return cases.lora_model("llama") if given != "a config" else None

    trainer, safe, watch = trained("DPO", tmp_path, pairs(), model=start(), max_length=16)
    assert safe.prefixes["model.layers"] > 0 and not watch.moved
    assert watch.frozen[-1] == sorted(safe.frozen)
    cached = next(event for event in safe.journal.events if event["event"] == "cache")
    assert cached["hits"] > 0 and safe.cache.off_because is None
    assert safe.length.progress.epoch == 2 * 24, "counts both sides of each pair"
    reference = start() or cases.base_model("llama")
    utils.add_fused_lm_head(
        reference.get_base_model() if start() else reference, outputs=("log_probs", "entropy", "mean_logits", "is_top1")
    )
    above = [(inputs, found) for depth, inputs, found in watch.passes if depth]
    assert len(above) > 4
    with torch.no_grad():
        for inputs, found in above:
            assert torch.equal(reference(**inputs).log_probs, found)
    plain, _, _ = trained("DPO", tmp_path, pairs(), model=start(), max_length=16, config=SafeConfig(cache="off"))
    assert_same(adapter(trainer), adapter(plain))


def test_grpo_is_measured_on_what_it_generates(tmp_path, caplog):
    # GRPO itself resumes bit-identically only without shuffling.
    settings = {"num_generations": 4, "max_completion_length": 4, "beta": 0.1, "shuffle_dataset": False}
    settings |= {"save_strategy": "steps", "save_steps": 12}
    trainer, safe, watch = trained("GRPO", tmp_path / "run", prompts(), **settings)
    assert safe.prefixes["model.layers"] > 0 and not watch.moved and watch.frozen[-1]
    assert safe.decider.probe.chunks[0]["input_ids"].shape[1] > 5, "prompts with completions"
    assert "what the model gets in the first step. A probe batch is a list" in caplog.text
    assert "Prefix cache on" not in caplog.text
    assert "came a second time" in safe.cache.off_because, "generated samples do not repeat"
    reference = cases.base_model("llama")
    utils.add_fused_lm_head(reference, outputs=("log_probs", "entropy"))
    above = [(inputs, found) for depth, inputs, found in watch.passes if depth]
    assert len(above) > 4
    with torch.no_grad():
        assert all(torch.equal(reference(**inputs).log_probs, found) for inputs, found in above)
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(cases.base_model("llama"), tmp_path / "adapter")
    assert_same(adapter(trainer), dict(loaded.named_parameters()))
    checkpoint = tmp_path / "run" / "checkpoint-12"
    again, resumed, watched = trained("GRPO", tmp_path / "again", prompts(), resume=str(checkpoint), **settings)
    assert (
        watched.frozen == watch.frozen[12:]
        and watch.frozen[11]
        and resumed.decider.probe.digest() == safe.decider.probe.digest()
    )
    assert_same(adapter(trainer), adapter(again))


def test_a_memory_budget_needs_samples_before_the_first_step(tmp_path):
    with pytest.raises(ProbeError, match="before the first step") as caught:
        trained("GRPO", tmp_path, prompts(), num_generations=4, config=SafeConfig(memory_budget="1GiB"))
    assert "SafeCallback(..., probe=[" in str(caught.value)
