"""Evaluation in mid-run returns what the model itself would, also what nobody may read."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForTokenClassification

from adafreeze import AdafreezeError, Safe
from cached_run import BLOCKS, assert_same, config, epochs, train
from cases import batch, collate, loader, lora_model, sample


def larger(family):
    """Weights so large that outputs differ from row to row."""
    model = lora_model(family, BLOCKS, dropout=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def both(family, look, model=larger, steps=(2, 4, 6), batches=None):
    """What ``look(model)`` returned after these steps with the cache, and without it; training must be the same."""
    found, runs = {"ram": [], "off": []}, []
    batches = list(epochs(family) if batches is None else batches)
    for cache, seen in found.items():

        def after(safe, model, seen=seen):
            if safe.steps in steps:
                model.eval()
                with torch.no_grad():
                    seen.append(look(model))
                model.train()

        settings = config({1: 2, 5: 3}, cache)
        runs.append(train(family, settings, batches, model=model(family), after=after))
    assert_same(*runs)
    return found["ram"], found["off"], runs[0][2]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generation_has_the_keys_and_values_of_all_blocks(family):
    ids = batch(family, rows=2)["input_ids"]
    cached, own, _ = both(family, lambda model: model.generate(input_ids=ids, max_new_tokens=8, do_sample=False))
    assert all(map(torch.equal, cached, own))


@pytest.mark.parametrize("asked", [{}, {"use_cache": True}, {"return_dict": False}])
def test_decoding_by_hand_continues_from_what_evaluation_returned(asked):
    ids = batch("llama", rows=2)["input_ids"]

    def look(model):
        for _ in range(3):
            first = model(input_ids=ids, **asked)
        past = first[1] if isinstance(first, tuple) else first.past_key_values
        return model(input_ids=ids[:, :1], past_key_values=past)[0]

    cached, own, safe = both("llama", look)
    assert all(map(torch.equal, cached, own))
    waits = [event["reason"] for event in safe.journal.events if event["event"] == "cache_waits"]
    assert any("use_cache=False" in reason for reason in waits) == ("use_cache" not in asked)


def test_keys_and_values_of_a_served_evaluation_cannot_be_used():
    inputs = batch("llama", rows=2)
    outputs = []

    def look(model):
        outputs.append([model(**inputs) for _ in range(4)][-1])
        return outputs[-1].logits

    cached, own, _ = both("llama", look)
    assert all(map(torch.equal, cached, own))
    with pytest.raises(AdafreezeError, match="use_cache=True"):
        lora_model("llama")(input_ids=inputs["input_ids"], past_key_values=outputs[0].past_key_values)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_outputs_at_padded_positions_are_those_of_the_model(family):
    some = [
        collate([sample(family, index, length) for index, length in rows])
        for rows in (((0, 4), (1, 9)), ((2, 7), (3, 5)))
    ]
    cached, own, _ = both(family, lambda model: [model(**one).logits for one in [*some, *some]])
    assert all(torch.equal(a, b) for x, y in zip(cached, own, strict=True) for a, b in zip(x, y, strict=True))


def test_a_head_that_starts_at_zero_shows_nothing():
    some = [collate([sample("bert", index, 5 + 3 * index) for index in range(3)])]
    rows = [{**one, "labels": one["input_ids"] % 3} for one in epochs("bert")]
    some = [{name: value for name, value in one.items() if name != "labels"} for one in some]

    def model(_):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 2, "intermediate_size": 64}
        base = BertForTokenClassification(BertConfig(vocab_size=1000, num_labels=3, **sizes))
        base.classifier.weight.data.zero_()
        lora = LoraConfig(task_type="TOKEN_CLS", r=4, target_modules=["query", "value"])
        return get_peft_model(base, lora).train()

    look = lambda made: [made(**one).logits for one in [*some, *some]]  # noqa: E731
    cached, own, _ = both("bert", look, model=model, steps=(1, 2, 4, 6), batches=rows)
    assert all(torch.equal(a, b) for x, y in zip(cached, own, strict=True) for a, b in zip(x, y, strict=True))


def test_averaged_weights_in_evaluation_do_not_end_the_cache():
    inputs = batch("bert", rows=4)

    def look(model):
        weight = model.get_input_embeddings().weight
        now = weight.detach().clone()
        weight.data.mul_(0.9)
        found = model(**inputs).logits
        weight.data.copy_(now)
        return found

    cached, own, safe = both("bert", look, steps=range(1, 12))
    assert all(map(torch.equal, cached, own)) and safe.cache.off_because is None


def test_evaluation_in_inference_mode_and_with_gradients():
    data, model = loader("bert", count=8, rows=4, length=10), lora_model("bert", BLOCKS, dropout=0.0)
    batches = list(data)
    safe = Safe(model, config({0: 2}), probe=data, total_steps=100)
    safe.freeze(list(safe.units)[:2])
    model.eval()
    expected = [model(**one).logits for one in batches]  # with gradients: the model's own
    for _ in range(4):
        with torch.inference_mode():
            assert all(torch.equal(model(**one).logits, own) for one, own in zip(batches, expected, strict=True))
    assert safe.cache.prefix_cache.evaluation.hits > 0
    model.train()
    model(**batches[0]).loss.backward()
    safe.close()
