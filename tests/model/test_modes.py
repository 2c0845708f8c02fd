"""Weights of bitsandbytes on the CPU: what evaluation mode does to them reaches no training step."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import cases
from adafreeze import SafeCallback, SafeConfig
from adafreeze.costs import CountFlops

ROWS = [cases.sample("llama", index) for index in range(16)]
FIRST_HALF = [f"layers.{index}." for index in range(2)]


def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=cases.VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # a row fills a block of bitsandbytes' 64


def made(bits):
    model = get_peft_model(
        cases.quantized(base(), bits),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.1
    return model


def trained(tmp_path, model, config=None, evaluate=False, **settings):
    """The losses of eight steps, and the adapters after them."""
    args = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, use_cpu=True,
        save_strategy="no", eval_strategy="steps" if evaluate else "no", eval_steps=2, report_to=[], disable_tqdm=True,
        bf16=True, **settings,
    )  # fmt: skip
    callbacks = [] if config is None else [SafeCallback(config)]
    trainer = Trainer(
        model, args, train_dataset=ROWS, eval_dataset=ROWS, data_collator=cases.collate, callbacks=callbacks
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def is_equal(found, expected):
    return found[0] == expected[0] and all(torch.equal(p, found[1][name]) for name, p in expected[1].items())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("evaluate", [False, True])
def test_scores_and_evaluations_take_no_gradient_away(bits, evaluate, tmp_path):
    plain = trained(tmp_path, made(bits))
    assert is_equal(trained(tmp_path, made(bits), SafeConfig(dry_run=True), evaluate=evaluate), plain)


def test_weights_that_an_evaluation_has_repacked_pass_gradients_again(tmp_path):
    model = made(4)
    with torch.no_grad():
        model.eval()(**cases.collate(ROWS))
    losses, _ = trained(tmp_path / "again", model, SafeConfig(dry_run=True))
    expected, _ = trained(tmp_path / "plain", made(4))
    assert losses == pytest.approx(expected, abs=0.02)  # not to the bit: repacking has rounded the scales


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("cache", ["off", "ram"])
def test_a_frozen_block_computes_what_it_does_in_plain_training(bits, cache, tmp_path):
    by_hand = made(bits)
    for name, parameter in by_hand.named_parameters():
        if any(block in name for block in FIRST_HALF):
            parameter.requires_grad_(False)
    plain = trained(tmp_path, by_hand)
    config = SafeConfig(freeze_at_start=0.5, freeze_share=0.0, lr_scale=1.0, cache=cache)
    assert is_equal(trained(tmp_path, made(bits), config), plain)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("training", [False, True])
def test_products_of_quantized_weights_are_counted(bits, training):
    def count(model):
        model.train(training)
        batch = cases.collate(ROWS[:4])
        with torch.set_grad_enabled(training), CountFlops() as counted:
            loss = model(**batch).loss
            if training:
                loss.backward()
        return counted.total

    dense = get_peft_model(
        base(),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    assert count(made(bits)) == count(dense)
