"""Models without a trainable adapter: the error names the reason and a fix that works."""

from __future__ import annotations

import pytest
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

import cases
from adafreeze import ModelError, Safe, SafeCallback


def refusal(model, family="llama"):
    with pytest.raises(ModelError, match="No trainable adapter was found in the blocks of Llama") as caught:
        Safe(model, probe=cases.loader(family), total_steps=30)
    return caught.value


def units_of(model):
    safe = Safe(model, probe=cases.loader("llama"), total_steps=30)
    safe.close()
    return list(safe.units)


def test_an_adapter_loaded_for_inference_is_refused(tmp_path):
    cases.lora_model("llama").save_pretrained(tmp_path)
    error = refusal(PeftModel.from_pretrained(cases.base_model("llama"), tmp_path))
    assert "'default' was loaded for inference (inference_mode=True)" in error.fact
    assert error.fix.startswith("PeftModel.from_pretrained(model, path, is_trainable=True)")
    assert "get_peft_model" not in str(error)
    assert len(units_of(PeftModel.from_pretrained(cases.base_model("llama"), tmp_path, is_trainable=True))) == 4


def test_a_trainable_inactive_adapter_does_not_hide_a_frozen_active_one(tmp_path):
    cases.lora_model("llama").save_pretrained(tmp_path)
    model = cases.lora_model("llama")
    model.load_adapter(tmp_path, adapter_name="loaded")
    model.set_adapter("loaded", inference_mode=True)
    assert "'loaded' was loaded for inference" in refusal(model).fact
    again = cases.lora_model("llama")
    again.load_adapter(tmp_path, adapter_name="loaded", is_trainable=True)
    again.set_adapter("loaded")
    assert len(units_of(again)) == 4


def test_adapters_frozen_by_prepare_model_for_kbit_training_are_refused():
    model = prepare_model_for_kbit_training(cases.lora_model("llama"), use_gradient_checkpointing=False)
    error = refusal(model)
    assert "prepare_model_for_kbit_training" in error.fact and "before get_peft_model" in error.fix
    assert "model.set_adapter('default')" in error.fix
    model.set_adapter("default")
    assert len(units_of(model)) == 4


def test_adapters_outside_the_blocks_are_named():
    error = refusal(get_peft_model(cases.base_model("llama"), LoraConfig(target_modules=["embed_tokens"])))
    assert error.fact.endswith("; its adapters are outside the blocks of model.layers: model.embed_tokens.")


def test_the_callback_raises_the_same_error(tmp_path):
    from transformers import Trainer, TrainingArguments

    cases.lora_model("llama").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(cases.base_model("llama"), tmp_path)
    model.get_base_model().lm_head.weight.requires_grad_(True)  # otherwise the Trainer has nothing to train
    arguments = TrainingArguments(tmp_path / "out", report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=cases.Samples("llama"), data_collator=cases.collate,
        callbacks=[SafeCallback()],
    )  # fmt: skip
    with pytest.raises(ModelError, match="No trainable adapter") as caught:
        trainer.train()
    assert "is_trainable=True" in caught.value.fix
