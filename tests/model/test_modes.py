"""What else evaluation mode does, beside disabling dropout, reaches no training step and no frozen block."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import (
    AutoModelForCausalLM,
    BigBirdConfig,
    BigBirdForSequenceClassification,
    LlamaConfig,
    RwkvConfig,
    RwkvForCausalLM,
    Trainer,
    TrainingArguments,
)

import cases
from adafreeze import Safe, SafeCallback, SafeConfig
from adafreeze.costs import CountFlops

ROWS = [cases.sample("llama", index) for index in range(16)]
HALF = {"freeze_at_start": 0.5, "freeze_share": 0.0, "lr_scale": 1.0}


def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=cases.VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # a row fills a block of bitsandbytes' 64


def adapted(model, targets="all-linear", scale=0.1):
    """With adapters that do something from the start."""
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * scale
    return model


def made(bits):
    return adapted(cases.quantized(base(), bits))


def frozen_by_hand(model):
    """The adapters of the lower half of four blocks."""
    for name, parameter in model.named_parameters():
        if any(f".{index}." in name for index in (0, 1)):
            parameter.requires_grad_(False)
    return model


def trained(tmp_path, model, config=None, evaluate=False, rows=ROWS, **settings):
    """The losses of eight steps, and the adapters after them."""
    args = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, use_cpu=True,
        save_strategy="no", eval_strategy="steps" if evaluate else "no", eval_steps=2, report_to=[], disable_tqdm=True,
        **settings,
    )  # fmt: skip
    callbacks = [] if config is None else [SafeCallback(config)]
    trainer = Trainer(
        model, args, train_dataset=rows, eval_dataset=rows, data_collator=cases.collate, callbacks=callbacks
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def is_equal(found, expected):
    return found[0] == expected[0] and all(torch.equal(p, found[1][name]) for name, p in expected[1].items())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("evaluate", [False, True])
def test_scores_and_evaluations_take_no_gradient_away(bits, evaluate, tmp_path):
    plain = trained(tmp_path, made(bits), bf16=True)
    assert is_equal(trained(tmp_path, made(bits), SafeConfig(dry_run=True), evaluate=evaluate, bf16=True), plain)


def test_weights_that_an_evaluation_has_repacked_pass_gradients_again(tmp_path):
    model = made(4)
    with torch.no_grad():
        model.eval()(**cases.collate(ROWS))
    losses, _ = trained(tmp_path / "again", model, SafeConfig(dry_run=True), bf16=True)
    expected, _ = trained(tmp_path / "plain", made(4), bf16=True)
    assert losses == pytest.approx(expected, abs=0.02)  # not to the bit: repacking has rounded the scales


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("cache", ["off", "ram"])
def test_a_frozen_block_computes_what_it_does_in_plain_training(bits, cache, tmp_path):
    plain = trained(tmp_path, frozen_by_hand(made(bits)), bf16=True)
    assert is_equal(trained(tmp_path, made(bits), SafeConfig(**HALF, cache=cache), bf16=True), plain)


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

    assert count(made(bits)) == count(adapted(base()))


def sparse():
    """BigBird's sparse attention has other random blocks in training mode."""
    config = BigBirdConfig(
        **cases.TEXT, num_hidden_layers=4, block_size=4, num_random_blocks=1, max_position_embeddings=128,
        attention_type="block_sparse", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    rows = [cases.sample("bert", index, 64) for index in range(16)]
    return BigBirdForSequenceClassification(config), ["query", "value"], rows


def rescaling():
    """RWKV divides weights in evaluation mode."""
    config = RwkvConfig(
        vocab_size=64, hidden_size=32, attention_hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        rescale_every=1, context_length=64,
    )  # fmt: skip
    model = RwkvForCausalLM(config)
    return model, r".*attention\.(key|value|receptance)", [cases.sample("llama", i, 12) for i in range(16)]


class Encoder(nn.Module):
    """torch's encoder, whose fast path in evaluation mode bypasses PEFT's layers; or one with a spectral norm."""

    def __init__(self, layer):
        super().__init__()
        self.embeddings = nn.Embedding(64, 32)
        self.encoder = nn.TransformerEncoder(layer, 4) if isinstance(layer, nn.TransformerEncoderLayer) else None
        self.layers = None if self.encoder else nn.ModuleList(layer() for _ in range(4))
        self.head = nn.Linear(32, 2)

    def forward(self, input_ids, attention_mask, labels):
        hidden = self.embeddings(input_ids)
        if self.encoder:
            hidden = self.encoder(hidden, src_key_padding_mask=attention_mask == 0)
        else:
            for layer in self.layers:
                hidden = layer(hidden)
        logits = self.head(hidden[:, 0])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def fast_path():
    model = Encoder(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True))
    rows = [cases.sample("bert", index, 12) for index in range(16)]
    for index, row in enumerate(rows):
        row["attention_mask"][6 + index % 6 :] = 0
    return model, ["linear1", "linear2"], rows


class Power(nn.Module):
    """A block whose spectral norm takes a step of the power iteration in each pass in training mode."""

    def __init__(self):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(32, 32), spectral_norm(nn.Linear(32, 32))

    def forward(self, hidden):
        return hidden + self.linear2(self.linear1(hidden).relu())


def power():
    return Encoder(Power), ["linear1"], [cases.sample("bert", i, 12) for i in range(16)]


@pytest.mark.parametrize("kind", [sparse, rescaling, fast_path, power])
@pytest.mark.parametrize("cache", ["off", "ram"])
def test_models_that_compute_something_else_in_evaluation_mode(kind, cache, tmp_path):
    def run(config, change=lambda model: model):
        torch.manual_seed(0)
        model, targets, rows = kind()
        return trained(tmp_path, change(adapted(model, targets, scale=0.3)), config, rows=rows)

    assert is_equal(run(SafeConfig(**HALF, cache=cache)), run(None, frozen_by_hand))
    assert is_equal(run(SafeConfig(dry_run=True, cache=cache)), run(None))
    assert torch.backends.mha.get_fastpath_enabled()


def test_modules_that_a_model_replaces_in_a_pass_are_put_back():
    """BigBird's attention, when it meets a short input."""
    torch.manual_seed(0)
    model, targets, rows = sparse()
    model = adapted(model, targets)
    attention = model.get_base_model().bert.encoder.layer[0].attention.self
    probe = [cases.collate(rows[:2]), cases.batch("bert", 2, 12)]
    Safe(model, SafeConfig(dry_run=True), probe=probe, total_steps=9)
    assert model.get_base_model().bert.encoder.layer[0].attention.self is attention
    assert model(**probe[0]).loss.requires_grad
