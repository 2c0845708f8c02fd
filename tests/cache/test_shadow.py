"""What no rule foresees shows in a check on the real batch; training then goes on as without the cache."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from adafreeze.cache import PrefixCache
from cached_run import (
    BLOCKS,
    COUNT,
    ROWS,
    assert_same,
    by_step,
    config,
    counts,
    epochs,
    frozen,
    pad_to,
    same_without,
    train,
)
from cases import lora_model, sample


def off_reason(safe):
    return safe.cache.off_because


def in_block(model, change, index=0):
    """Let ``change(block, hidden states)`` be part of what block ``index`` computes."""
    block = model.base_model.model.bert.encoder.layer[index]
    original = type(block).forward

    class Changed(type(block)):
        def forward(self, *args, **kwargs):
            output = original(self, *args, **kwargs)
            if isinstance(output, tuple):
                return (change(self, output[0]), *output[1:])
            return change(self, output)

    block.__class__ = Changed
    return model


def embeddings_of(model):
    return model.base_model.model.bert.embeddings


# Planted faults: each run must be what it is without the cache, and the cache off with a reason.

WORLD = {"factor": 1.0}


def of_the_epoch(safe, _model):
    WORLD["factor"] = 1.0 + 0.5 * (safe.steps // 4)


FAULTS = {
    "reads a global": (
        lambda _, hidden: hidden + WORLD["factor"] * torch.linspace(-1, 1, hidden.shape[-1]),
        "are not those of the model's own pass",
    ),
    "depends on the place in the batch": (
        lambda _, hidden: hidden + 0.3 * torch.arange(len(hidden)).view(-1, 1, 1),
        "its place in the batch",
    ),
    "depends on the others in the batch": (
        lambda _, hidden: hidden - hidden.mean(0, keepdim=True),
        "the other samples",
    ),
    "draws noise": (lambda _, hidden: hidden + 0.1 * torch.randn_like(hidden), "another output each time"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_block_that_depends_on_more_than_its_sample_ends_the_cache(name):
    change, reason = FAULTS[name]

    def model():
        WORLD["factor"] = 1.0
        return in_block(lora_model("bert", BLOCKS), change)

    after = of_the_epoch if name == "reads a global" else None
    assert reason in off_reason(same_without("bert", model=model, after=after))


def test_a_block_that_counts_its_passes_is_not_skipped():
    def counting(block, hidden):
        block.passes = getattr(block, "passes", 0) + 1
        return hidden

    models = [in_block(lora_model("bert", BLOCKS), counting) for _ in range(2)]
    safe = same_without("bert", epochs("bert", epochs=2), model=iter(models).__next__)
    passes = [model.base_model.model.bert.encoder.layer[0].passes for model in models]
    assert passes[0] == passes[1] and "writes to" in off_reason(safe)


def test_buffers_below_the_prefix_are_written_once_a_pass():
    """A BatchNorm in evaluation of statistics would see every sample twice where a nested pass left its trace."""

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, hidden):
            self.seen += len(hidden)
            return hidden

    counters = []

    def model():
        made = lora_model("bert", BLOCKS)
        counters.append(Counted())
        embeddings_of(made).LayerNorm = nn.Sequential(embeddings_of(made).LayerNorm, counters[-1])
        return made

    safe = same_without("bert", model=model)
    assert counters[0].seen == counters[1].seen and counts(safe)[0]


class Classifier(nn.Module):
    """An encoder, and a head on what ``pooled`` returns."""

    def __init__(self):
        super().__init__()
        self.model, self.head = encoder(), nn.Linear(32, 2)
        self.config = self.model.config

    def forward(self, labels, **inputs):
        logits = self.head(self.pooled(**inputs))
        return _Output(F.cross_entropy(logits, labels), logits)


class PaddingHead(Classifier):
    """Reads the hidden states where there is no text."""

    def pooled(self, input_ids, attention_mask):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        padding = (1 - attention_mask)[..., None].to(hidden.dtype)
        return (hidden * padding).sum(1) / padding.sum(1).clamp(min=1)


class _Output(dict):
    def __init__(self, loss, logits):
        super().__init__(loss=loss, logits=logits)
        self.loss, self.logits = loss, logits


def encoder(**more):
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **more}
    bert = BertModel(BertConfig(**shape, num_hidden_layers=BLOCKS, max_position_embeddings=40, **settings))
    return get_peft_model(bert, LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=True))


def test_whole_rows_are_stored_if_the_head_reads_padding():
    safe = same_without("bert", model=lambda: PaddingHead().train())
    assert safe.cache.prefix_cache.padding.whole_rows and counts(safe)[0]


# Several calls of a stack in one pass.


class Calls(nn.Module):
    """An encoder that is called several times: its loss compares the samples of a batch, and is 0 for one alone."""

    def __init__(self, calls, third=None):
        super().__init__()
        self.encoder, self.calls, self.third = encoder(), calls, third

    def forward(self, **texts):
        vectors = []
        for call in range(self.calls):
            name = ("", "positive_", "negative_")[call]
            more = self.third() if self.third is not None and call == 2 else {}
            out = self.encoder(input_ids=texts[f"{name}input_ids"], **more).last_hidden_state
            vectors.append(F.normalize(out.mean(1), dim=-1))
        scores = torch.cat([vectors[0] @ other.T for other in vectors[1:]], 1) * 10
        return _Output(F.cross_entropy(scores, torch.arange(len(scores))), scores)


def texts(calls, epochs=4, count=12, seed=3):
    generator, batches = torch.Generator().manual_seed(seed), []
    names = ("input_ids", "positive_input_ids", "negative_input_ids")[:calls]
    for _ in range(epochs):
        for rows in torch.randperm(count, generator=generator).split(4):
            batches.append(
                {
                    name: torch.stack([sample("bert", 100 * n + int(row), 10)["input_ids"] for row in rows])
                    for n, name in enumerate(names)
                }
            )
    return batches


@pytest.mark.parametrize("calls", [2, 3])
def test_a_stack_that_is_called_several_times_has_states_for_each_call(calls):
    safe = same_without("bert", texts(calls), {1: 1, 5: 2}, model=lambda: Calls(calls).train(), count=12)
    hits, _, misses = counts(safe)
    assert hits >= 12 and misses and off_reason(safe) is None


def test_a_random_third_call_ends_the_cache():
    def positions():
        return {"position_ids": torch.randint(0, 30, (1, 10))}

    assert off_reason(same_without("bert", texts(3), model=lambda: Calls(3, positions).train(), count=12))


# Boundaries of other shapes.


class Flattened(nn.Module):
    """Two views of each text in one batch: side by side, or one after the other."""

    def __init__(self, interleaved):
        super().__init__()
        self.encoder, self.interleaved = encoder(), interleaved

    def forward(self, input_ids):
        flat = input_ids.transpose(0, 1).flatten(0, 1) if self.interleaved else input_ids.flatten(0, 1)
        vectors = F.normalize(self.encoder(input_ids=flat).last_hidden_state.mean(1), dim=-1)
        vectors = vectors.unflatten(0, (2, -1)) if self.interleaved else vectors.unflatten(0, (-1, 2)).transpose(0, 1)
        scores = vectors[0] @ vectors[1].T * 10
        return _Output(F.cross_entropy(scores, torch.arange(len(scores))), scores)


def views(epochs=3):
    return [{"input_ids": torch.stack([one["input_ids"], one["positive_input_ids"]], 1)} for one in texts(2, epochs)]


@pytest.mark.parametrize("interleaved", [False, True])
def test_several_rows_of_a_sample_are_stored_together(interleaved):
    safe = same_without("bert", views(), model=lambda: Flattened(interleaved).train(), count=12)
    (layout,) = next(iter(safe.cache.prefix_cache.kinds.known.values())).layouts.values()
    assert (layout.rows, layout.interleaved) == (2, interleaved)
    assert counts(safe) == (8 + 12, 0, 8 + 4)


class Block(nn.TransformerEncoderLayer):
    pass


class SequenceFirst(nn.Module):
    """torch's own encoder; the samples are the second dimension unless batch_first."""

    def __init__(self, batch_first):
        super().__init__()
        torch.manual_seed(0)
        self.batch_first = batch_first
        self.embeddings, self.head = nn.Embedding(64, 32), nn.Linear(32, 2)
        layer = Block(32, 4, 64, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, BLOCKS, enable_nested_tensor=False)

    def forward(self, input_ids, labels):
        hidden = self.embeddings(input_ids)
        hidden = self.encoder(hidden if self.batch_first else hidden.transpose(0, 1))
        logits = self.head(hidden.mean(1 if self.batch_first else 0))
        return _Output(F.cross_entropy(logits, labels), logits)


@pytest.mark.parametrize("batch_first", [False, True])
def test_samples_may_be_the_second_dimension(batch_first):
    lora = LoraConfig(r=4, target_modules=["linear1", "linear2"])
    # With the samples second, some processors round a product of fewer rows differently.
    batches = [{n: one[n] for n in ("input_ids", "labels")} for one in epochs("bert", count=4 * ROWS)]

    def model():
        return get_peft_model(SequenceFirst(batch_first), lora).train()

    one = model().eval()

    def alone(ids):
        return one(input_ids=ids, labels=torch.zeros(len(ids)).long()).logits

    with torch.no_grad():  # a batch with samples that are not stored yet computes only these
        every = [batch["input_ids"] for batch in batches]
        exact = all(torch.equal(alone(ids)[:rows], alone(ids[:rows])) for ids in every for rows in range(1, len(ids)))
    safe = same_without("bert", batches, model=model, count=4 * ROWS, exact=exact)
    assert counts(safe)[0] >= 4 * ROWS


def test_batches_of_one():
    for rows in (1, 3):
        batches = [
            pad_to(16)([sample("bert", index) for index in range(start, min(start + rows, 7))])
            for _ in range(3)
            for start in range(0, 7, rows)
        ]
        assert counts(same_without("bert", batches, count=7))[0] >= 7


# Keys.


class Joined(Classifier):
    """Joins a text and a candidate label, under any name."""

    def pooled(self, input_ids, **candidate):
        ids = torch.cat([input_ids, *candidate.values()], 1)
        return self.model(input_ids=ids).last_hidden_state.mean(1)


@pytest.mark.parametrize("name", ["label_input_ids", "start_positions", "use_cache_ids", "labels_of_another_text"])
def test_no_input_is_left_out_of_a_key_by_its_name(name):
    generator, batches = torch.Generator().manual_seed(1), []
    for _ in range(4):
        for pairs in torch.randperm(12, generator=generator).split(4):
            batches.append(
                {
                    "input_ids": torch.stack([sample("bert", int(n) // 4, 8)["input_ids"] for n in pairs]),
                    name: torch.stack([torch.tensor([10 + int(n) % 4, 20]) for n in pairs]),
                    "labels": (pairs % 4 == 0).long(),
                }
            )

    assert counts(same_without("bert", batches, model=lambda: Joined().train(), count=12))[0] >= 12


class Wrapped(nn.Module):
    """A T5 inside a module that has no configuration."""

    def __init__(self):
        super().__init__()
        self.t5 = lora_model("t5", BLOCKS, target_modules=r".*decoder.*\.(q|v)")

    def forward(self, **inputs):
        return self.t5(**inputs)


@pytest.mark.parametrize("length", [6, 10])
def test_several_targets_of_one_source_in_a_wrapper_without_configuration(length):
    batches = []
    for _ in range(4):
        for first in (0, 4, 8):
            rows = [sample("t5", (first + row) // 4, 10) for row in range(4)]
            targets = [sample("bert", first + row, length)["input_ids"] for row in range(4)]
            batches.append(
                {
                    "input_ids": torch.stack([row["input_ids"] for row in rows]),
                    "attention_mask": torch.ones(4, 10, dtype=torch.long),
                    "labels": torch.stack(targets),
                }
            )

    depths = {1: BLOCKS + 2}  # only the decoder has adapters
    assert counts(same_without("t5", batches, depths, model=lambda: Wrapped().train(), count=12))[0] >= 12


# Who reads what would be skipped.


@pytest.mark.parametrize("undo", [2, None])
def test_a_change_of_what_enters_in_the_step_of_a_growth_is_named(undo):
    undone = {}

    def after(safe, model):
        if safe.steps == 7:
            undone["by"] = one_row_written_to(model)
        if undo is not None and safe.steps == 7 + undo:
            undone["by"]()

    def model():
        return lora_model("bert", BLOCKS, dropout=0.0)

    safe = same_without("bert", epochs("bert", epochs=5), {1: 1, 8: 2}, model=model, after=after)
    reasons = [event["reason"] for event in safe.journal.events if event["event"] in ("cache_waits", "cache_off")]
    assert len(reasons) == 1 and "what enters the frozen prefix" in reasons[0]


def scaled(model):
    model.base_model.model.bert.encoder.layer[0].attention.self.query.scaling["default"] *= 0.5


def test_adapters_that_are_scaled_in_mid_run_are_named():
    safe = late(scaled)
    (waits,) = [event for event in safe.journal.events if event["event"] == "cache_waits"]
    assert "scaled differently" in waits["reason"]


@pytest.mark.parametrize("name", ["output_hidden_states", "use_cache"])
def test_passes_that_ask_for_more_than_the_last_states_are_named(name):
    family = "bert" if name == "output_hidden_states" else "llama"
    batches = [{**one, name: True} for one in epochs(family)]
    safe = same_without(family, batches, model=lambda: lora_model(family, BLOCKS, dropout=0.0))
    (waits,) = [event for event in safe.journal.events if event["event"] == "cache_waits"]
    assert name in waits["reason"] and not safe.cache.prefix_cache.stats.looked_up


def test_equal_widths_of_encoder_and_decoder_are_not_mistaken():
    def padded(samples):
        made = pad_to(16)(samples)
        return {**made, "labels": F.pad(made["labels"], (0, 16 - made["labels"].shape[1]), value=-100)}

    batches = epochs("t5", count=4 * ROWS, epochs=4, collator=padded)
    safe = same_without("t5", batches, model=lambda: lora_model("t5", BLOCKS, dropout=0.0), count=4 * ROWS)
    assert not safe.cache.prefix_cache.padding.whole_rows and counts(safe)[0] >= 4 * ROWS


def test_a_user_hook_on_a_prefix_block_sees_what_the_block_computes():
    outputs = []

    def model():
        made, seen = lora_model("bert", BLOCKS, dropout=0.0), []
        block = made.base_model.model.bert.encoder.layer[0]
        block.register_forward_hook(lambda _m, _i, output: seen.append(output[0].detach().clone()))
        outputs.append(seen)
        return made

    safe = same_without("bert", model=model)
    seen, expected = outputs
    assert len(seen) == len(expected) and all(map(torch.equal, seen, expected))
    (waits,) = [event for event in safe.journal.events if event["event"] == "cache_waits"]
    assert "a hook of yours reads BertLayer" in waits["reason"]


def test_a_temporary_user_hook_runs_the_prefix_only_while_it_is_there():
    model, inputs, safe = frozen("bert")
    for _ in range(3):
        model(**inputs)
    hits = safe.cache.prefix_cache.stats.hits
    seen = []
    handle = safe.stacks[0].blocks[1].register_forward_hook(lambda _m, args, output: seen.append(args))
    model(**inputs)
    handle.remove()
    assert len(seen) == 1 and safe.cache.prefix_cache.stats.hits == hits
    model(**inputs)
    assert len(seen) == 1 and safe.cache.prefix_cache.stats.hits == hits + 4
    safe.close()


def test_a_user_hook_elsewhere_is_called_once_per_pass():
    called = []

    def model():
        made, calls = lora_model("bert", BLOCKS), []
        for module in (embeddings_of(made), made.base_model.model.classifier):
            module.register_forward_hook(lambda m, _i, _o: calls.append(type(m).__name__))
        called.append(calls)
        return made

    safe = same_without("bert", model=model)
    assert called[0] == called[1] and counts(safe)[0]


def test_calls_of_the_inner_model_are_served_too():
    model, inputs, safe = frozen("bert")
    losses = [model.get_base_model()(**inputs).loss.item() for _ in range(4)]
    assert len(set(losses)) == 1 and safe.cache.prefix_cache.stats.hits == 12
    safe.close()


# What it costs.


def test_shadow_checks_are_repeated_at_intervals_that_follow_from_flops():
    batches = list(epochs("bert", count=16, epochs=3))
    safe = train("bert", config({1: 2}), batches, count=16)[2]
    (kind,) = [one for one in safe.cache.prefix_cache.kinds.known.values() if "stored" in one.verified]
    # Two of four blocks: 1 + 1 forward passes of a half against three of a half in a step; at most 0.2 %.
    assert kind.interval == pytest.approx(1 / 0.002 * 2 / 3, rel=0.2)


def test_calls_of_a_part_of_the_model_are_noted_once(caplog):
    model, inputs, safe = frozen("bert")
    bert = model.get_base_model().bert
    with caplog.at_level("INFO", "adafreeze"):
        for _ in range(6):
            bert(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert caplog.text.count("training calls a part of the model") == 1 and not safe.cache.prefix_cache.stats.looked_up
    safe.close()


def test_a_cache_that_is_off_early_is_not_announced_as_on(caplog):
    with caplog.at_level("INFO", "adafreeze"):
        model = in_block(lora_model("bert", BLOCKS), FAULTS["draws noise"][0])
        train("bert", config({1: 2}, freeze=("bert.encoder.layer.0",)), list(epochs("bert")), model=model)
    lines = [record.message for record in caplog.records if record.message.startswith("Prefix cache")]
    assert len(lines) == 1 and lines[0].startswith("Prefix cache off: the prefix gives")


# What changes below the boundary in mid-run, when samples are held already.


def late(change, at=6, undo=None):
    """The Safe of a run in which ``change(model)`` is made after step ``at``, and for some steps if ``undo``."""
    undone = {}

    def after(safe, model):
        if safe.steps == at:
            undone["by"] = change(model)
        if undo is not None and safe.steps == at + undo:
            undone["by"]()

    batches = epochs("bert", epochs=4)
    return same_without("bert", batches, model=lambda: lora_model("bert", BLOCKS, dropout=0.0), after=after)


def written_to(model):
    weight = embeddings_of(model).word_embeddings.weight
    generator = torch.Generator().manual_seed(1)
    before = weight.data.clone()
    weight.data.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return lambda: weight.data.copy_(before)


def hooked(model):
    handle = embeddings_of(model).register_forward_hook(lambda _m, _i, output: output + 0.3)
    return handle.remove


def patched_embeddings(model):
    module = embeddings_of(model)
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs) + 0.3
    return lambda: module.__dict__.pop("forward")


def replaced_weight(model):
    weight = model.base_model.model.bert.encoder.layer[0].output.dense.weight
    weight.data = weight.data * 1.5


def block_written_to(model):
    """In place and through ``.data``, as moving averages and noise on weights are: no version counter moves."""
    weight = model.base_model.model.bert.encoder.layer[0].output.dense.weight
    weight.data.mul_(1.5)
    return lambda: weight.data.div_(1.5)


def all_columns_but_the_first(model):
    weight = model.base_model.model.bert.encoder.layer[0].output.dense.weight
    weight.data[:, 1:].mul_(2.0)


def scaled_attention(model):
    """An attribute, which no version counts."""
    model.base_model.model.bert.encoder.layer[0].attention.self.scaling *= 4


def submodule_patched(model):
    module = model.base_model.model.bert.encoder.layer[1].output
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs) + 0.3


def weights_swapped(model):
    first, second = (model.base_model.model.bert.encoder.layer[n].output.dense.weight for n in (0, 1))
    first.data, second.data = second.data, first.data


def adapter_written_to(model):
    weight = model.base_model.model.bert.encoder.layer[1].attention.self.query.lora_B["default"].weight
    weight.data.add_(0.2)


def replaced_module(model):
    output = model.base_model.model.bert.encoder.layer[0].output
    torch.manual_seed(7)
    output.dense = nn.Linear(64, 32).requires_grad_(False)


def patched_block(model):
    block = model.base_model.model.bert.encoder.layer[1]
    original = block.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        return (output[0] + 0.3, *output[1:]) if isinstance(output, tuple) else output + 0.3

    block.forward = forward


@pytest.mark.parametrize(
    "change",
    [
        *(written_to, hooked, patched_embeddings),
        *(replaced_weight, block_written_to, adapter_written_to, replaced_module, patched_block),
        *(all_columns_but_the_first, scaled_attention, submodule_patched, weights_swapped),
    ],
)
def test_a_change_below_the_boundary_counts_from_the_next_pass_on(change):
    assert counts(late(change))[0]


def one_row_written_to(model):
    """The embedding of token 5, which no digest of a few elements sees."""
    weight = embeddings_of(model).word_embeddings.weight
    before = weight.data[5].clone()
    weight.data[5] = weight.data[6]
    return lambda: weight.data[5].copy_(before)


@pytest.mark.parametrize("change", [one_row_written_to, hooked])
def test_passes_are_served_again_when_a_change_is_undone(change):
    safe = late(change, undo=2)
    (waits,) = [event for event in safe.journal.events if event["event"] == "cache_waits"]
    assert "what enters the frozen prefix" in waits["reason"]
    assert off_reason(safe) is None and counts(safe)[0] >= COUNT


@pytest.mark.parametrize("change", [written_to, block_written_to])
def test_weights_that_change_and_change_back_are_followed(change):
    safe = late(change, undo=2)
    assert off_reason(safe) is None and counts(safe)[0]


@pytest.mark.parametrize("cache", ["ram", "off"])
@pytest.mark.parametrize("place", ["encoder.layer.1.output.dense", "embeddings.word_embeddings"])
def test_a_parameter_unfrozen_mid_run_gets_its_gradient(place, cache, caplog):
    """Gradual unfreezing: base weights that the optimizer holds from the start train from some step on."""

    def gradient(depths):
        model = lora_model("bert", BLOCKS, dropout=0.0)
        weight = model.base_model.model.bert.get_submodule(place).weight
        found = []

        def after(safe, _model):
            if safe.steps == 6:
                weight.requires_grad_(True)
            if safe.steps == 9:
                found.append(weight.requires_grad)

        trained = train("bert", config(depths, cache=cache), list(epochs("bert")), model=model, after=after)
        number = [id(p) for p in model.parameters()].index(id(weight))
        return [step[number] for step in trained[1]], trained[2], found

    with caplog.at_level("INFO", "adafreeze"):
        gradients, safe, trains = gradient({1: 3})
    assert trains == [True] and all(g is None for g in gradients[:6])
    assert all(g is not None and float(g.abs().max()) > 0 for g in gradients[6:])
    left = {"encoder.layer.1.output.dense": 1, "embeddings.word_embeddings": 0}[place]
    assert list(safe.prefixes.values()) == [left]
    assert "was made trainable" in caplog.text or "something that trains feeds" in caplog.text


# What one look cannot show: what comes later, or at another place, in other company, at another width.


class Gate(nn.Module):
    """A head with a part that reads padding, or a lower block, behind a gate that begins at zero."""

    def __init__(self, reads):
        super().__init__()
        self.model, self.reads = encoder(), reads
        self.config = self.model.config
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(32, 2), nn.Linear(32, 2)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, attention_mask, labels):
        if self.reads == "padding":
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            other = hidden.mean(1)
        else:
            bert = self.model.base_model.model
            mask = (1 - attention_mask[:, None, None].to(torch.float32)) * -1e9
            hidden, made = bert.embeddings(input_ids=input_ids), []
            for block in bert.encoder.layer:
                hidden = block(hidden, mask)
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
                made.append(hidden)
            other = made[0][:, 0]
        logits = self.first(hidden[:, 0]) + self.gate * self.second(other)
        return _Output(F.cross_entropy(logits, labels), logits)


@pytest.mark.parametrize("reads", ["padding", "a lower block"])
def test_reads_behind_a_gate_that_starts_at_zero(reads):
    safe = same_without("bert", epochs("bert", epochs=6), model=lambda: Gate(reads).train())
    assert safe.cache.prefix_cache.padding.whole_rows if reads == "padding" else "differs" in off_reason(safe)


def test_a_head_that_starts_at_zero_shows_nothing_about_padding():
    """With accumulation, its gradient is zero in several passes, and after them it reads padding."""

    def model():
        made = PaddingHead().train()
        nn.init.zeros_(made.head.weight)
        nn.init.zeros_(made.head.bias)
        return made

    same_without("bert", epochs("bert", epochs=8), model=model, accumulate=4)


def test_a_loss_outside_the_model_that_begins_to_read_padding_is_noticed(caplog):
    """Of a library's model: until then padding is left out, and from the next pass on it is not."""

    def run(cache):
        def step(safe, model, one):
            hidden = model(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).last_hidden_state
            loss = (hidden[:, 0] if safe.steps < 20 else hidden)[..., :4].sum(-1).exp().mean()
            loss.backward()
            losses.append(loss.item())

        losses: list[float] = []
        batches = list(epochs("bert", epochs=8, collator=pad_to(1)))
        trained = train("bert", config({1: 2}, cache=cache), batches, model=encoder().train(), step=step)
        return losses, trained[2]

    with caplog.at_level("INFO", "adafreeze"):
        (losses, safe), (expected, _) = run("ram"), run("off")
    differ = [n for n, (a, b) in enumerate(zip(losses, expected, strict=True)) if a != pytest.approx(b, rel=1e-4)]
    assert differ[:1] == [20] and safe.cache.prefix_cache.padding.whole_rows
    assert "the loss has begun to read padding" in caplog.text


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_position_embeddings_that_depend_on_the_length_of_the_batch(rope):
    def model():
        torch.manual_seed(0)
        parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 10}
        if rope == "longrope":
            parameters |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        settings = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=BLOCKS, num_attention_heads=4,
            max_position_embeddings=10, rope_parameters=parameters, pad_token_id=0,
        )  # fmt: skip
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        return get_peft_model(LlamaForCausalLM(settings), lora).train()

    def run(cache):
        in_order = [one for n in (0, 0, 1, 2, 3) for one in epochs("llama", epochs=1, seed=n, collator=pad_to(1))]
        return train("llama", config({1: 2}, cache=cache), in_order, model=model())

    cached, without = run("ram"), run("off")
    assert cached[0] == pytest.approx(without[0], rel=2e-5)
    assert cached[2].cache.prefix_cache.padding.whole_rows if rope == "longrope" else "dynamic" in off_reason(cached[2])


@pytest.mark.parametrize("threshold", range(10, 16))
@pytest.mark.parametrize("index", [0, 1])
def test_a_block_that_changes_at_some_width_of_the_batch_ends_the_cache(index, threshold):
    """The prefix grows by block 1 in mid-run; widths that its block 0 has passed show nothing about it."""

    def wide(_, hidden):
        return hidden + 0.5 * (hidden.shape[1] > threshold) * torch.linspace(-1, 1, hidden.shape[-1])

    def run(cache):
        batches = [
            pad_to(width)([sample("bert", row, 6 + row % 4) for row in rows])
            for width in (10, 12, 10, 14, 11, 16, 10, 13, 12, 16, 10, 16, 15)
            for rows in ((0, 5, 2, 7), (4, 1, 6, 3))
        ]
        model = in_block(lora_model("bert", BLOCKS, dropout=0.0), wide, index)
        return train("bert", config({1: 1, 9: 2}, cache=cache), batches, model=model, count=8)

    (losses, _, safe), (expected, _, _) = run("ram"), run("off")
    assert losses == pytest.approx(expected, rel=1e-5)
    assert "width of its batch" in off_reason(safe) or "differs" in off_reason(safe)


@pytest.mark.parametrize("again", [1, 2])
def test_a_block_that_treats_one_row_of_a_batch_differently_ends_the_cache(again):
    """Each batch may come several times running (PPO's inner epochs), which shows nothing of other places."""

    def special(_, hidden):
        mask = (torch.arange(len(hidden)) == 1).to(hidden.dtype).view(-1, 1, 1)
        return hidden + 0.5 * mask * torch.linspace(-1, 1, hidden.shape[-1])

    def model():
        return in_block(lora_model("bert", BLOCKS, dropout=0.0), special)

    batches = [one for one in epochs("bert", epochs=4) for _ in range(again)]
    assert off_reason(same_without("bert", batches, model=model))


@pytest.mark.parametrize("before", [True, False])
def test_a_weight_written_to_around_a_growth_step(before):
    def run(cache):
        model = lora_model("bert", BLOCKS, dropout=0.0)
        weight = model.base_model.model.bert.encoder.layer[0].output.dense.weight

        def write(at):
            def policy(situation):
                if situation.step == 6 and before and not at:
                    at.append(weight.data.mul_(3.0))
                return by_step({1: 1, 6: 2})(situation)

            return policy

        def after(safe, _model):
            if safe.steps == 6 and not before:
                weight.data.mul_(3.0)

        settings = config({1: 1}, cache=cache, policy=write([]))
        return train("bert", settings, list(epochs("bert", epochs=4)), model=model, after=after)

    cached = run("ram")
    assert_same(cached, run("off"))
    assert counts(cached[2])[0]


def test_a_block_that_trains_for_some_steps_is_hashed_again():
    def run(cache):
        model = lora_model("bert", BLOCKS, dropout=0.0)
        weight = model.base_model.model.bert.encoder.layer[1].output.dense.weight
        batches = list(epochs("bert", epochs=5))

        def after(safe, _model):
            if safe.steps in (5, 8):
                weight.requires_grad_(safe.steps == 5)
                if safe.steps == 8:
                    safe.prefix.update()
                    safe.freezing.follow_prefix()

        settings = config({1: 3}, cache=cache)
        return train("bert", settings, batches, model=model, after=after)

    cached, without = run("ram"), run("off")
    assert cached[0] == pytest.approx(without[0], rel=1e-5)


def test_hidden_states_requested_inside_the_model_from_some_step_on():
    class Asks(Classifier):
        asks = False

        def pooled(self, **inputs):
            output = self.model(**inputs, output_hidden_states=self.asks)
            return (output.hidden_states[1] if self.asks else output.last_hidden_state)[:, 0]

    def after(safe, model):
        model.asks = safe.steps >= 8

    safe = same_without("bert", epochs("bert", epochs=4), model=lambda: Asks().train(), after=after)
    (waits,) = [event for event in safe.journal.events if event["event"] == "cache_waits"]
    assert "records what the blocks" in waits["reason"]


class Masks(Classifier):
    """Makes its own attention mask, and another one from some step on."""

    def __init__(self):
        super().__init__()
        self.causal = False

    def pooled(self, input_ids, attention_mask):
        count, width = input_ids.shape
        visible = torch.ones(width, width, dtype=torch.bool)
        visible = visible.tril() if self.causal else visible
        mask = visible.expand(count, 1, width, width) & attention_mask[:, None, None].bool()
        return self.model(input_ids=input_ids, attention_mask=mask).last_hidden_state[:, 0]


@pytest.mark.parametrize("change", ["flag", "hook"])
def test_masks_and_rotary_tables_may_change_mid_run(change):
    def model():
        return Masks().train() if change == "flag" else lora_model("llama", BLOCKS, dropout=0.0)

    def after(safe, model):
        if safe.steps == 8 and change == "flag":
            model.causal = True
        elif safe.steps == 8:
            rotary = next(m for m in model.modules() if type(m).__name__ == "LlamaRotaryEmbedding")
            rotary.register_forward_hook(lambda _m, _i, output: tuple(0.5 * one for one in output))

    family = "bert" if change == "flag" else "llama"
    assert counts(same_without(family, epochs(family, epochs=4), model=model, after=after))[0]


def test_passes_without_adapters_and_annealed_scales_are_not_new_kinds(monkeypatch):
    """DPO's reference passes turn adapters off and on in each step; a wrapper may anneal a coefficient."""

    class Annealed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.scale = lora_model("bert", BLOCKS, dropout=0.0), 1.0
            self.config = self.model.config

        def forward(self, **inputs):
            output = self.model(**inputs)
            return _Output(self.scale * output.loss, output.logits)

    hashed = []
    again = PrefixCache._hash_again
    monkeypatch.setattr(PrefixCache, "_hash_again", lambda cache: hashed.append(1) or again(cache))

    def run(cache):
        model = Annealed().train()

        def step(_safe, model, one):
            with model.model.disable_adapter():
                reference = model(**one).loss.detach()
            model.scale *= 0.99
            (model(**one).loss - reference).backward()

        return train("bert", config({1: 2}, cache=cache), list(epochs("bert", epochs=4)), model=model, step=step)

    cached, without = run("ram"), run("off")
    assert all(map(torch.equal, cached[2].weights, without[2].weights))
    assert counts(cached[2])[0] >= COUNT and off_reason(cached[2]) is None
    assert not hashed and len(cached[2].cache.prefix_cache.kinds.known) <= 4
