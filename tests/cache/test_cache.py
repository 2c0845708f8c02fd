"""Training with the prefix cache equals training without it, and some passes bypass it."""

import contextlib
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from adafreeze import Safe, SafeCallback
from adafreeze.cache.codec import CODECS
from adafreeze.costs import Meter, expected_ratios
from cached_run import BLOCKS, COUNT, ROWS, config, counts, epochs, frozen, pad_to, same_without, train
from cases import FAMILIES, TARGETS, Samples, base_model, batch, collate, lora_model, sample


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_bit_identical_at_fixed_padding(family, tier, tmp_path):
    safe = same_without(family, depths={2: 2}, cache=tier, folder=tmp_path)
    # Frozen from the third step on: six samples of the first epoch, the other eight of the second, are computed.
    assert counts(safe) == (6 + 14, 0, 6 + 8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_at_dynamic_padding_each_step_agrees_from_equal_weights(family, tier, tmp_path):
    folder = {"cache_dir": tmp_path} if tier == "disk" else {}
    batches = list(epochs(family, collator=collate))
    twin = lora_model(family, BLOCKS, dropout=0.0)
    model = lora_model(family, BLOCKS, dropout=0.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    settings = config({2: 2, 7: 3}, cache=tier, **folder)
    safe = Safe(model, settings, optimizer=optimizer, probe=batches[:2], total_steps=12, samples_per_epoch=COUNT)
    for one in batches:
        twin.load_state_dict(model.state_dict())
        loss, expected = model(**one).loss, twin(**one).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        loss.backward()
        expected.backward()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            if p.requires_grad:
                assert float((p.grad - q.grad).norm()) <= 1e-5 * float(q.grad.norm()) + 1e-9, name
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        twin.zero_grad()
        safe.step()
    safe.close()
    hits, advanced, misses = counts(safe)
    assert hits and advanced and misses == COUNT


@pytest.mark.parametrize("family", ["bert", "llama", pytest.param("t5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_a_prefix_that_grows_twice_mid_epoch_advances_its_entries(family, tier, tmp_path):
    depths = {1: 1, 5: 3, 10: 6} if family == "t5" else {1: 1, 5: 2, 10: 3}  # T5's third reaches into the decoder
    safe = same_without(family, epochs(family, epochs=4), depths, cache=tier, folder=tmp_path)
    assert [event["prefixes"] for event in safe.journal.events if event["event"] == "freeze"][-1] == (
        {"encoder.block": 4, "decoder.block": 2} if family == "t5" else dict.fromkeys(safe.prefixes, 3)
    )
    hits, advanced, misses = counts(safe)
    assert misses == COUNT  # each sample goes through the embeddings once
    # Second growth: the 6 samples used at depth 1 and again at depth 1 before it are advanced, and so on.
    assert advanced >= 2 * COUNT - ROWS and hits


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_partial_hits_when_half_of_the_samples_fit_in_the_budget(family):
    budget = 7 * (17 if family == "vit" else 12) * 32 * 4
    safe = same_without(family, depths={2: 2}, cache_budget=budget)
    hits, _, misses = counts(safe)
    assert 0 < hits < 20 and misses > 14
    full = [event for event in safe.journal.events if event["event"] == "cache_full"]
    assert len(full) == 1 and full[0]["tier"] == "memory" and full[0]["nbytes"] <= budget


def test_gradient_accumulation():
    for depths in ({1: 2}, {1: 1, 3: 3}):
        assert counts(same_without("bert", epochs("bert", count=16), depths, accumulate=2, count=16))[0]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_checkpointing_above_the_prefix(family, reentrant):
    def model():
        made = lora_model(family, BLOCKS)
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            made.enable_input_require_grads()
        return made

    assert counts(same_without(family, depths={2: 2}, model=model)) == (20, 0, 14)


def test_duplicates_in_one_batch():
    rows = [sample("bert", index % 3, 12) for index in range(8)]
    assert counts(same_without("bert", [pad_to(16)(rows) for _ in range(8)], count=8)) == (6 * 8, 0, 8)


@pytest.mark.parametrize(
    ("dtype", "per_token", "tolerance"), [("bfloat16", 2 * 32, 1e-2), ("float8_e4m3fn", 36, 5e-2), ("int8", 36, 1e-2)]
)
def test_states_in_fewer_bits_take_less_room_and_round(dtype, per_token, tolerance):
    batches = list(epochs("bert"))
    exact, rounded = train("bert", config(), batches), train("bert", config(cache_dtype=dtype), batches)
    sizes = [
        next(e for e in run[2].journal.events if e["event"] == "cache")["nbytes"]["memory"] for run in (exact, rounded)
    ]
    assert sizes[1] * 4 * 32 == sizes[0] * per_token
    torch.testing.assert_close(torch.tensor(rounded[0]), torch.tensor(exact[0]), rtol=tolerance, atol=0)
    assert rounded[0] != exact[0] and counts(rounded[2]) == counts(exact[2])


@pytest.mark.parametrize(("name", "error"), [("bfloat16", 2**-8), ("float8_e4m3fn", 2**-4), ("int8", 1 / 254)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_bounded_by_the_largest_value_of_a_token_and_repeats(name, error, dtype):
    codec, generator = CODECS[name], torch.Generator().manual_seed(0)
    states = torch.randn(5, 7, 33, generator=generator).to(dtype) * torch.logspace(-9, 9, 7)[None, :, None].to(dtype)
    states[0, 0], states[1, 1, 0] = 0, 1e6  # a token of zeros, and an attention sink
    back = codec.round(states)
    assert back.dtype == dtype and torch.equal(codec.round(back), back)
    largest = states.float().abs().amax(-1, keepdim=True)
    assert bool(((back.float() - states.float()).abs() <= (error + 2**-8 * (dtype == torch.bfloat16)) * largest).all())


def test_a_sample_has_one_entry_under_autocast_and_one_outside():
    model, inputs, safe = frozen("bert")
    contexts = [contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)] * 2
    contexts = [contexts[n] for n in (0, 1, 0, 1, 1, 0, 0)]

    def losses():
        found = []
        for context in contexts:
            with context:
                found.append(model(**inputs).loss.item())
        return found

    cached = losses()
    safe.prefix.server = None
    assert cached == losses() and len(set(cached)) == 2
    safe.close()
    assert counts(safe) == (5 * 4, 0, 2 * 4)


def test_trainer_logs_with_the_callback(tmp_path):
    def run(cache):
        torch.manual_seed(0)
        callback = SafeCallback(config({3: 2}, cache=cache))
        arguments = TrainingArguments(
            output_dir=tmp_path, num_train_epochs=3, per_device_train_batch_size=ROWS, logging_steps=1, report_to=[],
            save_strategy="no", eval_strategy="epoch", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(
            model=lora_model("bert", BLOCKS),
            args=arguments,
            train_dataset=Samples("bert", COUNT),
            eval_dataset=Samples("bert", 4),
            data_collator=pad_to(16),
            callbacks=[callback],
        )
        trainer.train()
        return trainer, callback

    (cached, callback), (without, _) = run("auto"), run("off")
    assert [e["loss"] for e in cached.state.log_history if "loss" in e] == [
        e["loss"] for e in without.state.log_history if "loss" in e
    ]
    evaluations = [[e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (cached, without)]
    assert evaluations[0] == evaluations[1] and len(evaluations[0]) == 3
    last = [e for e in cached.state.log_history if "loss" in e][-1]
    assert last["safe/cache_hit_rate"] == 1.0 and last["safe/cache_memory_mib"] > 0
    hits, _, misses = counts(callback.safe)
    assert hits + misses == 2 + 2 * COUNT and misses <= COUNT


@pytest.mark.parametrize("depths", [{1: 4}, {10: 3, 40: 4}])
def test_counted_flops_match_the_theory(depths):
    torch.manual_seed(0)
    shape = BertConfig(vocab_size=64, hidden_size=96, num_hidden_layers=6, num_attention_heads=2, intermediate_size=384)
    network = get_peft_model(BertForSequenceClassification(shape), LoraConfig(r=1, target_modules=["query", "value"]))
    batches = list(epochs("bert", count=120, epochs=10))  # so many that looking before serving costs next to nothing
    plain = Meter(network.train())
    with plain.step(batches[0]):
        network(**batches[0]).loss.backward()
    meters = []

    def step(safe, model, batch):
        if not meters:
            meters.append(Meter(model, lambda: safe.state_key, lambda: safe.nested_flops))
        with meters[0].step(batch):
            model(**batch).loss.backward()

    _, _, safe = train("bert", config(depths), batches, model=network, count=120, step=step)
    counted = meters[0].summary()["flops"] / (plain.summary()["flops"] * len(batches))
    frozen = {
        event["step"]: event["prefixes"]["bert.encoder.layer"]
        for event in safe.journal.events
        if event["event"] == "freeze"
    }
    prefix = [max((depth for at, depth in frozen.items() if at <= number), default=0) for number in range(len(batches))]
    _, theory = expected_ratios(6, prefix, steps_per_epoch=30)
    assert counted == pytest.approx(theory, rel=0.03)
    assert counted < 0.9 * expected_ratios(6, prefix)[1]


def test_workers_fork_while_the_store_is_open(tmp_path):
    callback = SafeCallback(config({1: 2}, cache="disk", cache_dir=tmp_path / "cache"))
    arguments = TrainingArguments(
        output_dir=tmp_path, num_train_epochs=4, per_device_train_batch_size=ROWS, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=True, dataloader_num_workers=2,
    )  # fmt: skip
    model, data = lora_model("bert", BLOCKS), Samples("bert", COUNT)
    Trainer(model=model, args=arguments, train_dataset=data, data_collator=pad_to(16), callbacks=[callback]).train()
    assert counts(callback.safe)[0] >= 2 * COUNT and counts(callback.safe)[2] <= COUNT


def test_positional_arguments_are_looked_up():
    model, inputs, safe = frozen("bert")
    expected = model(**inputs).loss.item()
    for _ in range(2):
        assert model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"]).loss.item() == expected
    assert counts_now(safe) == (8, 4)
    safe.close()


# Who is sent past it.


def cached_and_filled(family):
    """A model without dropout whose cache stores ``batch(family)`` at depth 2."""
    model, inputs, safe = frozen(family)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    for _ in range(3):
        model(**inputs)
    assert counts_now(safe) == (8, 4)
    return model, inputs, safe


def counts_now(safe):
    return safe.cache.prefix_cache.stats.hits, safe.cache.prefix_cache.stats.misses


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_reference_pass_gives_the_pretrained_logits(family):
    model, inputs, safe = cached_and_filled(family)
    expected = base_model(family, BLOCKS, dropout=0.0).train()(**inputs).logits
    now = counts_now(safe)
    with model.disable_adapter():  # training mode, with gradients, the very samples that are held
        assert model.training and torch.is_grad_enabled()
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
    assert counts_now(safe) == now
    model(**inputs)
    assert counts_now(safe)[0] == now[0] + 4  # and then it serves again
    safe.close()


@pytest.mark.parametrize("with_gradients", [False, True])
def test_trl_reference_passes_between_steps_give_the_pretrained_logits(with_gradients):
    use_adapter = pytest.importorskip("trl.trainer.utils").use_adapter
    model, inputs, safe = cached_and_filled("llama")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    expected = base_model("llama", BLOCKS, dropout=0.0).train()(**inputs).logits
    now = counts_now(safe)
    for step in range(1, 4):
        with torch.set_grad_enabled(with_gradients), use_adapter(model, None):
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert counts_now(safe) == (now[0] + 4 * step, now[1])  # the training pass alone is served, each time
    safe.close()


def test_another_adapter_is_not_served_from_entries_of_the_trained_one():
    model, inputs, safe = cached_and_filled("bert")
    model.add_adapter("other", LoraConfig(target_modules=TARGETS["bert"], r=2, init_lora_weights=False))
    now = counts_now(safe)
    model.set_adapter("other")
    other = model(**inputs).logits
    assert counts_now(safe) == now
    model.set_adapter("default")
    assert not torch.allclose(model(**inputs).logits, other)
    safe.close()


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_evaluation_and_all_hidden_states_bypass_it(family):
    model, inputs, safe = cached_and_filled(family)
    now = counts_now(safe)
    states = model(**inputs, output_hidden_states=True).hidden_states
    model.config.output_hidden_states = True
    for given in (states, model(**inputs).hidden_states):
        assert len(given) == BLOCKS + 1
        assert not any(torch.allclose(a, b) for a, b in itertools.pairwise(given))
    model.config.output_hidden_states = False
    with torch.no_grad():
        model(**inputs)
    model.eval()
    model(**inputs)
    if family == "llama":
        model.generate(input_ids=inputs["input_ids"][:1, :4], max_new_tokens=3)
    assert counts_now(safe) == now
    safe.close()


def test_an_inner_model_called_between_steps_is_not_served_the_last_batch():
    model, inputs, safe = cached_and_filled("bert")
    other = batch("bert", rows=3, length=9)
    expected = model(**other).logits
    model(**inputs)
    torch.testing.assert_close(model.base_model.model(**other).logits, expected, rtol=1e-5, atol=1e-6)
    safe.close()


def test_changed_weights_are_hashed_again():
    model, inputs, safe = cached_and_filled("bert")
    before = model(**inputs).logits
    with torch.no_grad():
        safe.stacks[0].blocks[0].output.dense.weight.mul_(1.5)
    safe.prefix.server, server = None, safe.prefix.server
    expected = model(**inputs).logits
    safe.prefix.server = server
    assert not torch.allclose(expected, before)
    now = counts_now(safe)
    assert torch.equal(model(**inputs).logits, expected) and counts_now(safe) == (now[0], now[1] + 4)
    assert torch.equal(model(**inputs).logits, expected) and counts_now(safe) == (now[0] + 4, now[1] + 4)
    for _ in range(4):
        with torch.no_grad():
            safe.stacks[0].blocks[0].output.dense.weight.mul_(1.1)
        model(**inputs)
    assert "keep changing" in safe.cache.prefix_cache.off
    safe.close()


def test_close_restores_the_model():
    model, _, safe = cached_and_filled("llama")
    safe.close()
    model.train()
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert not any("forward" in module.__dict__ or "merge" in module.__dict__ for module in model.modules())
