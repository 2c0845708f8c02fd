"""Where the prefix cache cannot help or would be wrong, it is off or stores whole rows, with one line that says why."""

import itertools
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    LongformerConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from adafreeze import Safe, SafeCallback, SafeConfig
from adafreeze.cache.run import expected_savings
from adafreeze.cache.stats import LEAST_TIMED, CacheStats, Repeats
from adafreeze.measure.draw import varies
from cached_run import BLOCKS, COUNT, config, counts, epochs, pad_to, same_without, train
from cases import TEXT, Samples, batch, collate, loader, lora_model, sample


def off_reason(safe):
    return next((e["reason"] for e in safe.journal.events if e["event"] == "cache_off"), None)


def freeze_two(model, inputs, **arguments):
    safe = Safe(model, config(), probe=inputs, total_steps=100, samples_per_epoch=40, **arguments)
    safe.freeze(list(safe.units)[:2])
    return safe


# What is expected.


def test_one_line_after_the_first_step_predicts_the_savings(caplog):
    caplog.set_level(logging.INFO, "adafreeze")
    data = loader("bert", count=40, rows=4)
    model = lora_model("bert", 6)
    safe = Safe(model, SafeConfig(), probe=data, total_steps=60, samples_per_step=4)
    assert "cache" not in caplog.text
    for inputs in itertools.islice(data, 2):
        model(**inputs).loss.backward()
        safe.step()
    (line,) = [r.getMessage() for r in caplog.records if "cache" in r.getMessage()]
    # 3 of 6, two of them from the start: of 11.75 for a plain step, backward 2 less in all 60 steps and 1 more in 24;
    # of the six epochs the second to fifth find 2, 2, 2 and 2.4 blocks looked up, the last 3. So 11.75 − 2.4 − 1.9. Of
    # a block's 12 products of d × d, the lowest that trains does without three in its backward.
    assert line.startswith("Prefix cache on: 6 epochs.")
    assert "63% (80% without cache) with 3 of 6 blocks frozen, 58% (76% without cache) with 4 of 6 blocks" in line
    assert line.endswith("by 60% of the run and 2 from the start.")


def test_expected_savings_if_nothing_is_frozen_at_the_start():
    line = expected_savings(6, 10, 60, 0.4)
    # 3 of 6: of 60 steps 24 are plain, 6 freeze and fill (8.75 of 11.75), 10 find six tenths of the samples (6.95), 20
    # find all (5.75).
    assert "74% (85% without cache) with 3 of 6" in line and "65% (80% without cache) with 4 of 6 blocks" in line


@pytest.mark.parametrize("steps", [3, 10])
def test_the_cache_is_off_for_one_epoch(steps, caplog):
    caplog.set_level(logging.INFO, "adafreeze")
    data = loader("bert", count=40, rows=4)
    safe = Safe(lora_model("bert", BLOCKS), config(), probe=data, total_steps=steps, samples_per_step=4)
    assert "Prefix cache off: no sample comes twice in one epoch." in caplog.text
    safe.freeze(list(safe.units)[:2])
    assert safe.cache.prefix_cache is None and safe.prefix.server is None


def test_if_the_batch_size_is_not_known_the_run_length_is_judged_after_the_first_step():
    batches = list(epochs("bert", epochs=1))
    _, _, safe = train("bert", config(), batches)
    (event,) = [e for e in safe.journal.events if e["event"] == "cache_outlook"]
    assert event["off"] == "no sample comes twice in one epoch" and event["step"] == 1
    assert not any(e["event"] == "cache" for e in safe.journal.events)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"cache": "off"}, "cache='off'"), ({"prefix_dropout": True}, "prefix_dropout=True")],
)
def test_switched_off_by_the_user(settings, reason):
    _, _, safe = train("bert", config(**settings), epochs("bert"))
    (event,) = [e for e in safe.journal.events if e["event"] == "cache_outlook"]
    assert event["off"].startswith(reason) and safe.cache.prefix_cache is None


def test_prefix_dropout_keeps_dropout_on():
    model = lora_model("bert", BLOCKS, dropout=0.5)
    inputs = batch("bert")
    safe = Safe(model, config(prefix_dropout=True), probe=inputs, total_steps=100)
    safe.freeze(list(safe.units)[:2])
    seen = []
    safe.stacks[0].blocks[1].register_forward_hook(lambda _m, _i, output: seen.append(output))
    model(**inputs)
    model(**inputs)
    assert not torch.equal(*seen) and not seen[0].requires_grad
    safe.close()


def masking_collator():
    from tokenizers import Tokenizer, models

    words = {f"w{n}": n for n in range(62)} | {"[MASK]": 62, "[PAD]": 63}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words)), mask_token="[MASK]", pad_token="[PAD]"
    )
    return DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)


class Augmented(Samples):
    def __getitem__(self, index):
        one = super().__getitem__(index)
        return one | {"pixel_values": one["pixel_values"] + 0.1 * torch.randn(3, 16, 16)}


def test_masking_and_augmentation_are_detected_without_changing_random_state():
    texts = Samples("bert", 16, length=12)
    plain = torch.utils.data.DataLoader(texts, collate_fn=collate)
    masked = torch.utils.data.DataLoader(
        [{"input_ids": texts[n]["input_ids"]} for n in range(16)], collate_fn=masking_collator()
    )
    augmented = torch.utils.data.DataLoader(Augmented("vit", 16), collate_fn=collate)
    before = torch.get_rng_state()
    assert not varies(plain) and varies(masked) and varies(augmented)
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_in_a_trainer_disables_the_cache(tmp_path):
    callback = SafeCallback(config({1: 2}, cache="auto"))
    arguments = TrainingArguments(
        output_dir=tmp_path, num_train_epochs=3, per_device_train_batch_size=4, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    model = lora_model("vit", BLOCKS)
    Trainer(
        model=model, args=arguments, train_dataset=Augmented("vit", 8), data_collator=collate, callbacks=[callback]
    ).train()
    assert callback.safe.prefixes == {"vit.layers": 2} and callback.safe.cache.prefix_cache is None
    (event,) = [e for e in callback.safe.journal.events if e["event"] == "cache_outlook"]
    assert "augmentation" in event["off"] and event["step"] == 0


# While it runs.


def test_the_cache_ends_after_an_epoch_without_repeats():
    generator = torch.Generator().manual_seed(0)

    def never_the_same():
        for one in epochs("bert"):
            yield one | {"input_ids": torch.randint(3, 64, one["input_ids"].shape, generator=generator)}

    assert "came a second time" in off_reason(same_without("bert", never_the_same()))


def test_inputs_that_are_not_by_sample_end_the_cache():
    model, inputs = lora_model("llama", BLOCKS), batch("llama", rows=2, length=8)
    safe = freeze_two(model, inputs)
    model(**inputs, cu_seq_lens_q=torch.tensor([0, 4, 8, 16]))
    assert "cu_seq_lens_q" in off_reason(safe)


def test_layer_drop_ends_the_cache():
    model, inputs = lora_model("bert", BLOCKS), batch("bert")
    model.config.encoder_layerdrop = 0.1
    safe = freeze_two(model, inputs)
    model(**inputs)
    assert "layer drop leaves out blocks" in off_reason(safe)


def test_patches_of_all_images_in_one_tensor_end_the_cache():
    model, inputs = lora_model("llama", BLOCKS), batch("llama", rows=2, length=8)
    safe = freeze_two(model, inputs)
    model(**inputs, pixel_values=torch.zeros(32, 16))
    assert "pixel_values has the shape (32, 16), which is not one entry per sample" in off_reason(safe)


def test_padding_in_the_decoder_shows_nothing_about_the_encoder():
    def sizes(target):
        def made(samples):
            text = collate([{**one, "input_ids": one["input_ids"][:8]} for one in samples])
            del text["attention_mask"]
            text["attention_mask"] = torch.ones_like(text["input_ids"])
            text["labels"][1, target:] = -100
            return text

        return made

    first, later = list(epochs("t5", epochs=2, collator=sizes(3))), list(epochs("t5", epochs=2))
    cached = train("t5", config({1: 5}), first + later)
    without = train("t5", config({1: 5}, cache="off"), first + later)
    torch.testing.assert_close(cached[0], without[0], rtol=1e-5, atol=0)  # the width changes: not to the last bit
    assert cached[2].cache.prefix_cache.padding.known == {0, 1}


def test_neftune_noise_ends_the_cache(tmp_path):
    def run(cache):
        torch.manual_seed(0)
        model = lora_model("bert", BLOCKS)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, report_to=[],
            save_strategy="no", disable_tqdm=True, neftune_noise_alpha=5, logging_steps=1, use_cpu=True,
        )  # fmt: skip
        callback = SafeCallback(config({1: 2}, cache=cache))
        trainer = Trainer(
            model=model, args=arguments, train_dataset=Samples("bert", 12), data_collator=collate, callbacks=[callback]
        )
        trainer.train()
        return [e["loss"] for e in trainer.state.log_history if "loss" in e], callback.safe

    losses, safe = run("auto")
    assert "NEFTune" in off_reason(safe)
    assert losses == run("off")[0]


@pytest.mark.parametrize("cycle", ["merge_adapter", "one_site"])
def test_merging_adapters_between_steps_ends_the_cache(cycle):
    model, inputs = lora_model("llama", BLOCKS), batch("llama")
    safe = freeze_two(model, inputs)
    model(**inputs)
    if cycle == "merge_adapter":
        model.merge_adapter()
        model.unmerge_adapter()
    else:
        _, site = next(safe.backend.sites(safe.stacks[0].blocks[1]))
        site.merge()
        site.unmerge()
    assert "merged" in off_reason(safe)
    model(**inputs).loss.backward()
    safe.close()


def test_router_logits_of_lower_blocks_run_the_prefix():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    small = MixtralConfig(
        vocab_size=64, **shape, num_hidden_layers=BLOCKS, num_local_experts=4, output_router_logits=True, pad_token_id=0
    )
    model = get_peft_model(MixtralForCausalLM(small), LoraConfig(target_modules=["q_proj"], r=2)).train()
    inputs = batch("llama")
    safe = freeze_two(model, inputs)
    expected = model(**inputs).loss
    expected.backward()
    for _ in range(3):
        assert torch.equal(model(**inputs).loss, expected)
    (waits,) = [event for event in safe.journal.events if event["event"] == "cache_waits"]
    assert "records what the blocks of model.layers return" in waits["reason"]


def test_the_gradient_shows_labels_on_padding_and_whole_rows_are_stored(caplog):
    caplog.set_level(logging.INFO, "adafreeze")

    batches = [one | {"labels": one["input_ids"].clone()} for one in epochs("gpt2")]
    safe = same_without("gpt2", batches, {2: 2})
    assert "stored as whole rows" in caplog.text and counts(safe)[0] >= COUNT


def padded_on_the_left(samples):
    """Decoders with no label on a first token, which is predicted from the last padded position."""
    if samples[0]["labels"].ndim:
        samples = [one | {"labels": one["labels"].index_fill(0, torch.tensor([0]), -100)} for one in samples]
    turned = [{name: value.flip(0) if value.ndim else value for name, value in one.items()} for one in samples]
    return {name: value.flip(1) if value.ndim > 1 else value for name, value in pad_to(16)(turned).items()}


@pytest.mark.parametrize(("family", "whole"), [("gpt2", True), ("bert", True), ("llama", False), ("qwen3", False)])
def test_left_padding_matters_with_absolute_positions_only(family, whole):
    batches = list(epochs(family, collator=padded_on_the_left))
    assert not batches[0]["attention_mask"][:, 0].all() and batches[0]["attention_mask"][:, -1].all()
    safe = same_without(family, batches, {2: 2})
    assert safe.cache.prefix_cache.padding.whole_rows is whole
    assert counts(safe)[0] >= COUNT


def longformer():
    torch.manual_seed(0)
    window = {"attention_window": [8] * BLOCKS, "max_position_embeddings": 40}
    shape = LongformerConfig(**TEXT, **window, num_hidden_layers=BLOCKS)
    model = AutoModelForSequenceClassification.from_config(shape)
    return get_peft_model(model, LoraConfig(target_modules=["query", "value"], r=2)).train()


@pytest.mark.parametrize("widths", [(16, 24, 20), (20, 16, 24)])
def test_whole_rows_are_stored_for_a_model_that_pads_to_a_window(widths):
    epoch = [pad_to(width)([sample("bert", 4 * n + row, 12) for row in range(4)]) for n, width in enumerate(widths)]
    safe = same_without("longformer", epoch * 3, model=longformer, count=12)
    assert safe.cache.prefix_cache.padding.whole_rows and counts(safe) == (8 + 12, 0, 12)


def test_a_width_that_the_model_pads_is_noticed_before_entries_are_served_at_it():
    """Samples that were all held at a multiple of the window come again at a width that is none."""
    model, rows = longformer(), [sample("bert", row, 8) for row in range(4)]
    safe = freeze_two(model, pad_to(16)(rows))
    for width in (16, 16, 12, 12, 12):
        model(**pad_to(width)(rows)).loss.backward()
    cache = safe.cache.prefix_cache
    assert cache.off is None and cache.padding.known == {0} and cache.padding.whole_rows
    # Stored at 16, found at 16; at 12 what is found is not admitted, then whole rows are stored, then found.
    assert (cache.stats.hits, cache.stats.misses) == (4 + 4, 4 + 4 + 4)
    safe.close()


def test_without_the_length_of_an_epoch_nothing_is_stored_before_samples_repeat():
    generator = torch.Generator().manual_seed(0)
    fresh = [
        one | {"input_ids": torch.randint(3, 64, one["input_ids"].shape, generator=generator)}
        for one in epochs("bert", epochs=2)
    ]
    batches = [*fresh, *epochs("bert", epochs=6)]
    written = []

    def look(safe, _model):
        if safe.cache.prefix_cache is not None and safe.cache.prefix_cache.off is None:
            written.append((safe.steps, safe.cache.prefix_cache.store.nbytes["memory"]))

    safe = same_without("bert", batches, after=look, count=None)
    assert len(fresh) == 8 and all(held == 0 for step, held in written if step <= 8 + 4)  # an epoch shows nothing
    assert off_reason(safe) is None and counts(safe)[0] >= COUNT


def test_one_accidental_repeat_is_no_reason_to_store_samples():
    repeats = Repeats()
    keys = [bytes([n]) * 16 for n in range(200)]
    assert not repeats.see(keys[:100]) and not repeats.see([keys[0], *keys[100:]])
    assert repeats.see(keys[:3])


def test_reading_slower_than_computing_ends_the_cache():
    worth = CacheStats(torch.device("cpu"))
    worth.hits = 100
    worth.compute.seconds, worth.compute.work, worth.compute.passes = 1.0, 10_000, LEAST_TIMED
    worth.read.seconds, worth.read.work, worth.read.passes = 1.0, 1_000, LEAST_TIMED
    assert worth.verdict(blocks=11, epoch=100, run=500) is None
    assert "looking up a position takes 1000.0 µs, and computing its 9 blocks 900.0" in worth.verdict(9, 100, 500)
    worth.read.passes -= 1  # too few to say
    assert worth.verdict(9, 100, 500) is None


def test_a_failure_ends_the_cache_but_not_the_run(monkeypatch):
    def breaks(safe, _model):
        if safe.steps == 6 and safe.cache.prefix_cache is not None:
            monkeypatch.setattr(safe.cache.prefix_cache.store, "read", lambda *_: 1 / 0)

    assert "ZeroDivisionError" in off_reason(same_without("bert", after=breaks))


def test_a_budget_below_one_sample_ends_the_cache():
    _, _, safe = train("bert", config(cache_budget=1000), epochs("bert"))
    assert off_reason(safe) == "its budget is 1,000 bytes, and one sample takes 1,024"


def test_expected_savings_without_an_epoch_and_of_a_long_run():
    assert (
        expected_savings(6, None, 100, 0.3) == "Prefix cache on: a sample seen before starts above the frozen prefix."
    )
    assert "58% (76% without cache) with 4 of 6 blocks" in expected_savings(6, 100_000, 600_000, 0.3)


def test_rows_into_which_a_sampler_packs_other_samples_each_epoch_switch_it_off(tmp_path):
    def in_one_row(samples):
        ids = torch.cat([torch.as_tensor(one["input_ids"]) for one in samples])[None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    class Packed(Trainer):
        def get_train_dataloader(self):
            class Batches:
                def __len__(self):
                    return 8

                def __iter__(self):
                    yield from torch.randperm(32).reshape(8, 4).tolist()

            return torch.utils.data.DataLoader(self.train_dataset, batch_sampler=Batches(), collate_fn=in_one_row)

    callback = SafeCallback(SafeConfig(freeze_at_start=0.5, freeze_share=0.0))
    arguments = TrainingArguments(
        output_dir=tmp_path, num_train_epochs=6, per_device_train_batch_size=1, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    Packed(lora_model("llama", BLOCKS), arguments, train_dataset=Samples("llama", 32), callbacks=[callback]).train()
    (event,) = [e for e in callback.safe.journal.events if e["event"] == "cache_off"]
    assert "came a second time" in event["reason"] and 8 < event["step"] < 24
