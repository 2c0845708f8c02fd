"""Obstacles: the warning names the parameter and a fix that works, and adapters above it do not freeze."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, VBLoRAConfig, get_peft_model

import cases
from adafreeze import AdafreezeWarning, Safe, SafeConfig
from adafreeze.costs.memory import SavedBytes

LOWEST = {"bert": "bert.encoder.layer", "llama": "model.layers"}
# Family, settings with an obstacle below all adapters, its name, the fix, settings without it.
BELOW_ALL = {
    "modules_to_save": (
        "llama",
        {"modules_to_save": ["embed_tokens"]},
        "model.embed_tokens.modules_to_save.default.weight",
        "LoraConfig(modules_to_save=...) without 'embed_tokens'",
        {"modules_to_save": ["lm_head"]},
    ),
    "tokens": (
        "llama",
        {"trainable_token_indices": [1, 2]},
        "model.embed_tokens.token_adapter.trainable_tokens_delta.default",
        "LoraConfig() without trainable_token_indices",
        {},
    ),
    "targets": (
        "llama",
        {"target_modules": ["embed_tokens", "q_proj"]},
        "model.embed_tokens.lora_embedding_B.default, model.embed_tokens.lora_embedding_A.default",
        "LoraConfig(target_modules=...) without 'embed_tokens'",
        {"target_modules": ["q_proj"]},
    ),
    "pattern": (
        "llama",
        {"target_modules": r".*(embed_tokens|q_proj)"},
        "model.embed_tokens.lora_embedding_B.default, model.embed_tokens.lora_embedding_A.default",
        "LoraConfig(exclude_modules=['model.embed_tokens'])",
        {"target_modules": r".*(embed_tokens|q_proj)", "exclude_modules": ["model.embed_tokens"]},
    ),
    "bias": (
        "bert",
        {"bias": "all"},
        "bert.embeddings.LayerNorm.bias",
        'LoraConfig(bias="none")',
        {"bias": "lora_only"},  # a bias of an adapted layer freezes with its adapter
    ),
    "norm": (
        "llama",
        {"modules_to_save": ["input_layernorm"]},
        "model.layers.0.input_layernorm.modules_to_save.default.weight",
        "LoraConfig(modules_to_save=...) without 'input_layernorm'",
        {},
    ),
}


def started(model, family="llama", **config):
    """A Safe, and its warning about obstacles."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        safe = Safe(model, SafeConfig(**config), probe=cases.loader(family), total_steps=30)
    found = [str(one.message) for one in caught if "in or below the blocks" in str(one.message)]
    assert len(found) < 2
    return safe, found[0] if found else None


def with_a_live_norm(family="llama", block=2, blocks=6):
    model = cases.lora_model(family, blocks=blocks)
    stack = {"llama": lambda m: m.model.layers[block], "t5": lambda m: m.decoder.block[block].layer[0]}[family]
    norm = stack(model.get_base_model())
    (norm.input_layernorm if family == "llama" else norm.layer_norm).weight.requires_grad_(True)
    return model


def saved_bytes(model, family="llama"):
    with SavedBytes(model) as counted:
        model(**cases.batch(family)).loss.backward()
    return counted.total


def train(model, policy, steps=30, **config):
    """Losses of a run, and its Safe."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    safe = None
    if policy is not None:
        settings = {"warmup": 0.2, "ramp_end": 0.5, "wait_for_loss": False, "cache": "off", **config}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rest = {"optimizer": optimizer, "probe": cases.batch("llama", 8), "total_steps": steps}
            safe = Safe(model, SafeConfig(policy=policy, **settings), **rest)
    losses = []
    for _ in range(steps):
        loss = model(**cases.batch("llama")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if safe is not None:
            safe.step()
    return losses, safe


@pytest.mark.parametrize("kind", BELOW_ALL)
def test_nothing_freezes_above_an_obstacle_and_the_fix_works(kind):
    family, settings, names, fix, better = BELOW_ALL[kind]
    safe, text = started(cases.lora_model(family, blocks=6, **settings), family)
    assert text.startswith(f"Nothing will freeze: {names}") and f"Fix: {fix}" in text
    assert safe.frozen == frozenset() and safe.prefixes == {LOWEST[family]: 0}
    safe.close()
    safe, text = started(cases.lora_model(family, blocks=6, **better), family)
    assert text is None
    assert safe.frozen == {f"{LOWEST[family]}.{index}" for index in range(2)} and safe.prefixes == {LOWEST[family]: 2}
    safe.close()


def test_freezing_above_an_obstacle_would_save_almost_nothing():
    model = with_a_live_norm(block=2)
    plain = saved_bytes(model)
    safe, _ = started(model, freeze_at_start=1.0)
    paying = saved_bytes(model)
    assert safe.frozen == {"model.layers.0", "model.layers.1"} and safe.prefixes == {"model.layers": 2}
    safe.freeze(["model.layers.2", "model.layers.3", "model.layers.4"])
    assert safe.prefixes == {"model.layers": 2}
    assert paying < 0.75 * plain and saved_bytes(model) > 0.9 * paying
    safe.close()


@pytest.mark.parametrize("policy", ["share", "bottom_up"])
def test_policies_that_freeze_prefixes_stop_below_an_obstacle(policy):
    free, controlled = (
        train(model, policy, freeze_share=0.9, freeze_at_start=0.0)[1]
        for model in (cases.lora_model("llama", blocks=6), with_a_live_norm(block=2))
    )
    assert len(free.frozen) > 3
    assert controlled.frozen == {"model.layers.0", "model.layers.1"}


def test_without_units_that_pay_the_run_is_bit_identical_to_the_plain_one():
    plain, safely = (
        train(cases.lora_model("llama", modules_to_save=["embed_tokens"]), policy, freeze_share=0.9)
        for policy in (None, "share")
    )
    assert safely[0] == plain[0] and safely[1].frozen == frozenset()
    assert len(safely[1].scores) == 4  # still measured


def test_threshold_and_freezing_by_hand_ignore_obstacles():
    _, safe = train(with_a_live_norm(block=1), "threshold", threshold=1.0, freeze_share=0.9)
    assert len(safe.frozen) == 5
    safe, text = started(with_a_live_norm(block=1), policy="threshold")
    assert text.startswith(
        "Freezing saves memory and time in no more than 1 of 6 units: model.layers.1.input_layernorm"
    )
    safe.close()
    safe, text = started(with_a_live_norm(block=1), freeze=["model.layers.4"])
    assert text.startswith("Only 1 of 6 units can freeze") and safe.frozen == {"model.layers.4"}
    safe.close()


def test_freeze_at_start_stops_below_an_obstacle_with_policy_threshold():
    safe, _ = started(with_a_live_norm(block=1), policy="threshold", freeze_at_start=0.9)
    assert safe.frozen == {"model.layers.0"}
    safe.close()


def test_the_encoder_freezes_below_a_decoder_with_an_obstacle():
    safe, text = started(with_a_live_norm("t5", block=0, blocks=3), "t5", freeze_at_start=0.9)
    assert text.startswith("Only 3 of 6 units can freeze: decoder.block.0.layer.0.layer_norm.weight trains in or below")
    assert "requires_grad_(False) on decoder.block.0.layer.0.layer_norm.weight" in text
    assert safe.prefixes == {"encoder.block": 3, "decoder.block": 0}
    safe.close()


def test_parameters_above_the_adapters_are_no_obstacle():
    lora = LoraConfig(target_modules="all-linear", modules_to_save=["classifier"])
    safe, text = started(get_peft_model(cases.base_model("bert", blocks=6), lora), "bert")  # also adapts the pooler
    assert text is None and safe.prefixes == {"bert.encoder.layer": 2}
    safe.close()


def test_shared_parameters_keep_their_units_live():
    settings = {"num_vectors": 16, "vector_length": 8, "topk": 2, "r": 2, "target_modules": ["q_proj"]}
    safe, text = started(get_peft_model(cases.base_model("llama"), VBLoRAConfig(**settings)))
    assert "4 units share parameters" in text and "such as LoRA" in text and safe.frozen == frozenset()
    safe.close()


def test_a_dry_run_reports_only_freezes_below_an_obstacle():
    model = with_a_live_norm(block=1)
    safe, _ = started(model, dry_run=True, freeze_at_start=0.9)
    (event,) = [event for event in safe.journal.events if event["event"] == "would_freeze"]
    assert event["units"] == ["model.layers.0"]
    safe.close()


def test_many_stacks_give_one_warning():
    model = cases.lora_model("t5", blocks=3)
    for parameter in model.get_base_model().shared.parameters():
        parameter.requires_grad_(True)  # below the encoder and the decoder
    with pytest.warns(AdafreezeWarning, match=r"Nothing will freeze: shared\.weight trains") as caught:
        safe = Safe(model, probe=cases.loader("t5"), total_steps=30)
    assert len([one for one in caught if issubclass(one.category, AdafreezeWarning)]) == 1
    safe.close()


def test_many_obstacles_of_a_kind_give_a_short_message():
    model = cases.lora_model("llama", blocks=6)
    for block in model.get_base_model().model.layers:
        block.input_layernorm.weight.requires_grad_(True)
    safe, text = started(model)
    assert "model.layers.2.input_layernorm.weight and 3 more train in" in text
    assert "requires_grad_(False) on model.layers.2.input_layernorm.weight; and 3 more of the kind." in text
    safe.close()
