"""A memory budget holds in every step of a whole run, and changes nothing else."""

import functools
import itertools
import re
import warnings

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    Trainer,
    TrainingArguments,
)

import cases
from adafreeze import AdafreezeWarning, ConfigError, RunError, Safe, SafeCallback, SafeConfig
from adafreeze.costs import SavedBytes, StorageTracker
from adafreeze.memory.checkpointing import NOTHING, Recomputed

SHAPE = {"vocab_size": 64, "hidden_size": 64, "num_attention_heads": 4, "pad_token_id": 0}


def make(family, blocks=8, dropout=0.0, **lora):
    torch.manual_seed(0)
    if family == "bert":
        p = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        config = BertConfig(**SHAPE, **p, intermediate_size=256, num_hidden_layers=blocks)
        model, targets = AutoModelForSequenceClassification.from_config(config), ["query", "value"]
    else:
        config = LlamaConfig(**SHAPE, intermediate_size=192, num_key_value_heads=2, num_hidden_layers=blocks)
        model, targets = AutoModelForCausalLM.from_config(config), ["q_proj", "v_proj"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, lora_dropout=dropout, **lora)).train()


def train(model, family, budget=None, steps=16, rows=16, accumulate=1, after=None, **config):
    """A run on batches of many lengths; losses, the most bytes alive in each step, and the Safe, still open."""
    torch.manual_seed(1)
    loader = DataLoader(cases.Samples(family, 48), batch_size=rows, shuffle=True, collate_fn=cases.collate)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    torch.manual_seed(2)
    losses, peaks = [], []
    with StorageTracker() as tracker:
        tracker.hold(*model.parameters(), *model.buffers())
        settings = SafeConfig(
            memory_budget=budget, **{"freeze_at_start": 0, "cache": "off", "probe_tokens": 64, **config}
        )
        safe = Safe(model, settings, optimizer=optimizer, probe=loader, total_steps=steps)
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        for _ in range(steps):
            tracker.reset_peak()
            for batch in itertools.islice(batches, accumulate):
                loss = model(**batch).loss
                loss.backward()
                losses.append(loss.item())
                del loss, batch
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            safe.step()
            peaks.append(tracker.peak)
            if after is not None:
                after(safe)
    return losses, peaks, safe


def held_before(model):
    return sum(tensor.untyped_storage().nbytes() for tensor in (*model.parameters(), *model.buffers()))


def choices(safe):
    return [event for event in safe.journal.events if event["event"] == "recompute"]


@functools.cache
def plain_run(family, blocks=8, dropout=0.0, steps=16, accumulate=1):
    """Losses, the model after it, and (bytes always there, the most that a step held)."""
    model = make(family, blocks, dropout)
    losses, peaks, safe = train(model, family, steps=steps, accumulate=accumulate)
    safe.close()
    return losses, model, (held_before(model), max(peaks))


def run_pair(family, blocks, share, dropout=0.0, steps=16, accumulate=1, **options):
    losses, plain, (held, most) = plain_run(family, blocks, dropout, steps, accumulate)
    limit = int(held + share * (most - held))
    model = make(family, blocks, dropout)
    return (losses, plain), (*train(model, family, limit, steps, accumulate=accumulate, **options), model), limit


BRIEF = [("llama", 8, 0.75)]
EVERY = [(f, n, s) for f in ("bert", "llama") for n in (8, 12) for s in (0.35, 0.5, 0.75)]


@pytest.mark.parametrize(("family", "blocks", "share"), cases.slow_but(BRIEF, EVERY))
def test_every_step_stays_under_the_budget_and_nothing_else_changes(family, blocks, share):
    (losses, plain), (budgeted, peaks, safe, model), limit = run_pair(
        family, blocks, share, dropout=0.1 if blocks == 8 else 0.0
    )
    assert max(peaks) <= limit
    assert budgeted == losses  # to the bit, with dropout too
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert sum(safe.prefixes.values()) > blocks // 2  # the run froze, and in time
    before = [event for event in choices(safe) if not any(event["prefixes"].values())]
    after = [event for event in choices(safe) if any(event["prefixes"].values())]
    assert all(event["blocks"] for event in before)
    assert max(len(e["blocks"]) for e in after) < min(len(e["blocks"]) for e in before)  # released as it grows
    assert all(event["peak"] <= limit < event["plain_peak"] for event in before)


def test_as_few_blocks_as_possible_are_checkpointed():
    _, (_, _, safe, _), limit = run_pair("bert", 8, 0.5)
    event = max(choices(safe), key=lambda event: len(event["blocks"]))
    names = [(path, int(index)) for path, index in (name.rsplit(".", 1) for name in event["blocks"])]
    fewer = Recomputed(full=frozenset(sorted(names)[:-1]))
    length = event["shapes"][0][1]
    budget = Safe(
        make("bert", 8), SafeConfig(memory_budget=limit, probe_tokens=64), probe=cases.loader("bert"), total_steps=9
    ).budget
    step = budget._rehearse(fewer, (), cases.batch("bert", rows=16, length=length))
    assert budget._total(step) > limit


@pytest.mark.slow
def test_with_accumulation():
    (losses, _), (budgeted, peaks, *_), limit = run_pair("llama", 8, 0.5, accumulate=3, steps=8)
    assert max(peaks) <= limit and budgeted == losses


@pytest.mark.parametrize("cache", ["ram", pytest.param("disk", marks=pytest.mark.slow)])
def test_with_the_cache(cache, tmp_path):
    options = {"cache": cache, "warmup": 0.2, "ramp_end": 0.3} | ({"cache_dir": tmp_path} if cache == "disk" else {})
    _, (_, peaks, safe, _), limit = run_pair("bert", 8, 0.5, **options)
    assert max(peaks) <= limit and safe.logs()["safe/cache_hit_rate"] > 0.3
    assert cache == "disk" or 0 < safe.cache.memory < limit - held_before(safe.model)


@pytest.mark.parametrize("reentrant", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.slow
def test_only_blocks_that_the_user_checkpoints_are_candidates(reentrant):
    def checkpointed():
        model = make("llama", 8)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model

    model = checkpointed()
    losses, peaks, safe = train(model, "llama", "1GiB")
    assert {len(event["blocks"]) for event in choices(safe)} == {0}  # all fits: all is released
    plain, _, (held, most) = plain_run("llama")
    assert losses == plain and max(peaks) <= most
    safe.close()
    assert all(layer.gradient_checkpointing for layer in model.get_base_model().model.layers)

    limit = int(held + 0.5 * (most - held))
    budgeted, peaks, safe = train(checkpointed(), "llama", limit)
    assert max(peaks) <= limit and budgeted == plain and 0 < max(len(e["blocks"]) for e in choices(safe)) < 8


def test_every_second_block_checkpointed_by_the_user():
    model = make("llama", 8)
    for layer in list(model.get_base_model().model.layers)[::2]:
        layer.gradient_checkpointing = True
    safe = Safe(model, SafeConfig(memory_budget="1GiB"), probe=cases.loader("llama"), total_steps=9)
    assert [index for _, index in safe.budget.checkpointing.blocks] == [0, 2, 4, 6]


def test_close_restores_the_model():
    model = make("bert", 8)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    hooks = len(model._forward_pre_hooks)
    _, _, safe = train(model, "bert", int(held_before(model) + 2**21), steps=4)
    assert "forward" in vars(model.get_base_model().bert.encoder.layer[0])
    safe.close()
    assert len(model._forward_pre_hooks) == hooks
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys(), name


def test_evaluation_and_passes_without_gradients_are_not_checkpointed():
    model = make("bert", 8)
    _, _, safe = train(model, "bert", int(held_before(model) + 2**21), steps=2, warmup=1.0, ramp_end=1.0)
    assert safe.budget.checkpointing.recomputed.full
    batch = cases.batch("bert")
    with torch.no_grad():
        expected = make("bert", 8).eval()
        expected.load_state_dict(model.state_dict())
        assert torch.equal(model.eval()(**batch).logits, expected(**batch).logits)


def test_counters_around_a_step_do_not_see_its_rehearsal():
    model, batch = make("bert", 8), cases.batch("bert", rows=16, length=24)
    with SavedBytes(model) as plain:
        model(**batch)
    Safe(model, SafeConfig(memory_budget="1GiB", freeze_at_start=0), probe=cases.loader("bert"), total_steps=9)
    with SavedBytes(model) as saved:
        model(**batch)
    assert saved.total == plain.total


# What cannot be.


def test_a_budget_that_cannot_be_met_names_the_micro_batch_that_fits():
    model = make("bert", 8)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    limit = held_before(model) + 2**20
    with pytest.raises(RunError, match="cannot be met") as caught:
        Safe(model, SafeConfig(memory_budget=limit), probe=cases.loader("bert", rows=64), total_steps=9)
    assert "weights, gradients and optimizer state" in str(caught.value)
    fits, part = int(re.search(r"micro-batch of (\d+) fits", caught.value.fact)[1]), int(caught.value.fix.split()[1])
    assert caught.value.fix == f"--per_device_train_batch_size {part} --gradient_accumulation_steps {64 // part}"
    assert part <= fits < 2 * part and 64 % part == 0  # of 64 rows as many make a step
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not model._forward_pre_hooks
    Safe(model, SafeConfig(memory_budget=limit), probe=cases.loader("bert", rows=fits), total_steps=9).close()
    with pytest.raises(RunError):
        Safe(model, SafeConfig(memory_budget=limit), probe=cases.loader("bert", rows=fits + 1), total_steps=9)


@pytest.mark.slow
def test_blocks_frozen_at_the_start_need_a_smaller_budget():
    def enough(budget: int, **config) -> bool:
        try:
            options = SafeConfig(memory_budget=budget, **config)
            Safe(make("bert", 8), options, probe=cases.loader("bert", rows=32), total_steps=9).close()
        except RunError:
            return False
        return True

    low, high = 0, 64
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle * 2**19) else (middle, high)
    assert not enough(low * 2**19)
    assert enough(low * 2**19, freeze_at_start=0.75)


def test_a_budget_below_the_weights_names_the_bytes_of_one_sample():
    model = make("bert", 8)
    with pytest.raises(RunError, match="one sample takes") as caught:
        Safe(model, SafeConfig(memory_budget="1MiB"), probe=cases.loader("bert"), total_steps=9)
    enough = re.search(r'SafeConfig\(memory_budget="(\d+MiB)"\)', caught.value.fix)[1]
    Safe(model, SafeConfig(memory_budget=enough), probe=cases.loader("bert"), total_steps=9).close()


@pytest.mark.parametrize("budget", [0, -1, "6 parsecs", "", "-3GiB", True, 1.5, float("nan"), [6], "0.0", "auto "])
def test_an_invalid_budget_is_refused(budget):
    with pytest.raises(ConfigError, match="memory_budget"):
        SafeConfig(memory_budget=budget)


def test_a_budget_above_the_device_is_refused():
    with pytest.raises(ConfigError, match="the device has"):
        Safe(make("bert"), SafeConfig(memory_budget="900TiB"), probe=cases.loader("bert"), total_steps=9)


@pytest.mark.parametrize("budget", ["auto", 0.5, "0.5", 1.0])
def test_shares_of_the_device(budget):
    safe = Safe(make("bert"), SafeConfig(memory_budget=budget), probe=cases.loader("bert"), total_steps=9)
    total = psutil.virtual_memory().total
    assert 0 < safe.budget.limit <= total
    if budget != "auto":
        assert safe.budget.limit == int(float(budget) * total)


def test_a_batch_longer_than_the_probe_warns_once_and_trains_on():
    model = make("bert")
    probe = cases.batch("bert", rows=16, length=8)
    small = Safe(model, SafeConfig(memory_budget="1GiB", freeze_at_start=0), probe=probe, total_steps=9)
    limit = small.budget._choice((), probe).peak
    small.close()
    safe = Safe(model, SafeConfig(memory_budget=limit, freeze_at_start=0), probe=probe, total_steps=9)
    model(**probe).loss.backward()
    with pytest.warns(AdafreezeWarning, match="all blocks checkpointed") as caught:
        for length in (60, 64):
            model(**cases.batch("bert", rows=16, length=length)).loss.backward()
    assert sum("all blocks checkpointed" in str(one.message) for one in caught) == 1
    assert len(safe.budget.checkpointing.recomputed.full) >= 7


def test_a_model_that_reads_values_checkpoints_all_blocks_with_a_warning():
    model = make("bert", 4)
    block = model.get_base_model().bert.encoder.layer[2]
    original = block.forward

    def reads_values(hidden_states, *args, **kwargs):
        assert hidden_states.abs().max().item() >= 0
        return original(hidden_states, *args, **kwargs)

    block.forward = reads_values
    batch = cases.batch("bert")
    expected = model(**batch).loss
    with pytest.warns(AdafreezeWarning, match="does not run on fake tensors"):
        safe = Safe(model, SafeConfig(memory_budget="1GiB"), probe=batch, total_steps=9)
    assert torch.equal(model(**batch).loss, expected)
    assert len(safe.budget.checkpointing.recomputed.full) == 4
    safe.budget.measured_peak = lambda: 2 * 2**30
    with pytest.warns(AdafreezeWarning, match=r"A step holds 2\.00 GiB .* more than the memory budget of 1\.00 GiB"):
        model(**batch)


# Corrections by the allocator's peak.


def measured_by(safe, beyond):
    """An allocator that holds ``beyond`` bytes more than is planned by counting."""
    budget = safe.budget
    budget.measured_peak = lambda: budget._current.peak - budget.excess + beyond if budget._current is not None else 0


@pytest.mark.slow
def test_a_peak_above_the_plan_checkpoints_more_and_a_reset_peak_no_less():
    _, _, (held, most) = plain_run("bert")
    limit = int(held + 0.6 * (most - held))
    counts, late = {}, {"min_measurements": 1, "warmup": 1.0, "ramp_end": 1.0}
    more = int(0.2 * (most - held))
    for beyond in (0, more, -most):  # the last was seen on an H100 whose user had reset its statistics
        model = make("bert")
        counted, keys = [], []

        def note_count(safe, beyond=beyond, counted=counted, keys=keys):
            measured_by(safe, beyond)
            keys.append(safe.state_key)
            counted.append(len(safe.budget.checkpointing.recomputed.full))

        *_, safe = train(model, "bert", limit, steps=14, after=note_count, **late)
        counts[beyond] = counted[-2]
        assert safe.budget.excess == max(0, beyond)
        assert len({key[-2] for key in keys}) == 1 + (beyond > 0)  # a meter counts such a step anew
        corrected = [event for event in safe.journal.events if event["event"] == "budget_corrected"]
        assert [event["excess"] for event in corrected] == [beyond] * (beyond > 0)
        state = safe.state_dict()["budget"]
        safe.close()
        again = Safe(make("bert"), SafeConfig(memory_budget=limit), probe=cases.loader("bert"), total_steps=9)
        again.budget.load_state_dict(state)
        assert again.budget.excess == safe.budget.excess
        assert again.budget._choices == safe.budget._choices
    assert counts[-most] == counts[0] < counts[more]


@pytest.mark.slow
def test_the_excess_of_a_short_batch_is_added_to_a_long_one_not_scaled():
    short, long = cases.batch("bert", rows=4, length=8), cases.batch("bert", rows=16, length=24)

    def run(limit, beyond, *batches):
        model = make("bert")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        config = SafeConfig(memory_budget=limit, cache="off", probe_tokens=64)
        safe = Safe(model, config, optimizer=optimizer, probe=long, total_steps=99)
        measured_by(safe, beyond)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found = safe.budget._current
        safe.close()
        return found

    needed = run("1GiB", 0, long, long).peak
    workspace = needed // 20
    for first in (short, long):
        assert run(needed + 2 * workspace, workspace, first, first, long, long, long).recomputed == NOTHING
    assert run(needed + workspace // 2, workspace, short, short, long, long, long).recomputed != NOTHING


# Through Trainer.


def test_trainer_with_its_own_checkpointing_and_logs(tmp_path):
    def run(budget, checkpointing):
        model = make("llama", 8)
        args = TrainingArguments(
            output_dir=tmp_path, max_steps=6, per_device_train_batch_size=16, logging_steps=1, report_to=[],
            save_strategy="no", gradient_checkpointing=checkpointing, disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(
            model, args, train_dataset=cases.Samples("llama", 48), data_collator=cases.collate,
            callbacks=[SafeCallback(SafeConfig(memory_budget=budget, cache="off", probe_tokens=64))],
        )  # fmt: skip
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    plain = run(None, False)
    budgeted = run(0.9, True)
    assert [entry["loss"] for entry in budgeted] == [entry["loss"] for entry in plain]
    assert all(entry["safe/recomputed_blocks"] == 0 for entry in budgeted)
    assert all(entry["safe/planned_peak_mib"] > 0 for entry in budgeted) and "safe/planned_peak_mib" not in plain[0]
    tight = run(int(held_before(make("llama", 8)) + 3 * 2**20), False)
    assert [entry["loss"] for entry in tight] == [entry["loss"] for entry in plain]
    assert tight[0]["safe/recomputed_blocks"] > 0


def test_without_a_budget_the_log_suggests_one(caplog):
    with caplog.at_level("INFO", logger="adafreeze"):
        Safe(make("bert"), SafeConfig(), probe=cases.loader("bert"), total_steps=9)
    assert (
        "The first steps have the peak of the run: a larger freeze_at_start or a memory_budget lowers it" in caplog.text
    )


@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "family", [f if f != "t5" else pytest.param(f, marks=pytest.mark.slow) for f in cases.FAMILIES]
)
def test_every_family_under_a_budget(family, dropout):
    def once(budget):
        model = cases.lora_model(family, blocks=4, dropout=dropout, lora_dropout=dropout)
        safe = Safe(
            model, SafeConfig(memory_budget=budget, freeze_at_start=0), probe=cases.batch(family, rows=8), total_steps=9
        )
        torch.manual_seed(4)
        loss = model(**cases.batch(family, rows=8)).loss
        loss.backward()
        return loss, [p.grad for p in model.parameters() if p.requires_grad], safe

    loss, gradients, safe = once("1GiB")
    choice = safe.budget._choice((), cases.batch(family, rows=8))
    for share in (0.5, 0.67):
        again, others, safe = once(int(choice.held + (choice.peak - choice.held) * share))
        assert safe.budget.checkpointing.recomputed != NOTHING and not safe.budget._failed
        assert torch.equal(loss, again)
        for a, b in zip(gradients, others, strict=True):
            # Gradients that meet at a block's input are summed in another order: measured 3e-8.
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_autocast_around_the_step_is_part_of_it(family):
    """In a loop of one's own; under Trainer the model's forward does it, so the check before step 0 sees it too."""
    batch = cases.batch(family, rows=2, length=16)
    limits = {}
    for share in (None, 0.8):
        model = make(family, 4)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        budget = "1GiB" if share is None else int(held_before(model) + share * (limits["most"] - held_before(model)))
        with StorageTracker() as tracker:
            tracker.hold(*model.parameters(), *model.buffers())
            settings = SafeConfig(memory_budget=budget, freeze_at_start=0, freeze_share=0, cache="off", probe_tokens=64)
            with warnings.catch_warnings():
                warnings.simplefilter("error", AdafreezeWarning)
                safe = Safe(model, settings, optimizer=optimizer, probe=batch, total_steps=5)
                for _ in range(3):
                    tracker.reset_peak()
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = model(**batch).loss
                    loss.backward()
                    del loss
                    optimizer.step()
                    optimizer.zero_grad()
        limits["most"] = max(limits.get("most", 0), tracker.peak)
        assert share is None or tracker.peak <= budget
        assert safe.budget._current.peak >= tracker.peak
        safe.close()


def test_what_trains_is_part_of_a_step():
    model, batch = make("bert", 4), cases.batch("bert", rows=16, length=20)
    safe = Safe(model, SafeConfig(memory_budget="1GiB", freeze_at_start=0), probe=batch, total_steps=9)
    model(**batch).loss.backward()
    before = safe.budget._current.peak
    for layer in model.get_base_model().bert.encoder.layer:
        layer.intermediate.dense.weight.requires_grad_(True)
    model(**batch).loss.backward()
    assert safe.budget._current.peak > before


@cases.refuses_changes_in_place
def test_a_model_that_selective_checkpointing_breaks_recomputes_whole_blocks(monkeypatch, caplog):
    from transformers.models.bert.modeling_bert import BertIntermediate

    monkeypatch.setattr(BertIntermediate, "forward", lambda self, x: self.dense(x).mul_(1.0))
    probe = cases.batch("bert", rows=16, length=20)
    model = make("bert", 4)
    safe = Safe(model, SafeConfig(memory_budget="1GiB", freeze_at_start=0), probe=probe, total_steps=9)
    peak = safe.budget._choice((), probe).peak
    safe.close()
    with caplog.at_level("INFO", logger="adafreeze"):
        safe = Safe(model, SafeConfig(memory_budget=peak - 1000, freeze_at_start=0), probe=probe, total_steps=9)
    assert "recomputes whole blocks only" in caplog.text
    model(**probe).loss.backward()
    recomputed = safe.budget.checkpointing.recomputed
    assert len(recomputed.full) == 1 and not recomputed.selective


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lean_adapters_need_less_recomputing(dropout):
    probe = cases.batch("bert", rows=16, length=20)

    def choice(limit, lean):
        model = make("bert", 4, dropout)
        config = SafeConfig(memory_budget=limit, freeze_at_start=0, lean=lean)
        safe = Safe(model, config, probe=probe, total_steps=9)
        try:
            return safe.budget._choice((), probe)
        finally:
            safe.close()

    plain = choice("1GiB", False).peak
    assert choice("1GiB", True).peak < plain if dropout else choice("1GiB", True).peak == plain
