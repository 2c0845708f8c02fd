"""What no rule foresees is seen in the shadow of a real step: training goes on as without the cache, and it is said."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from adafreeze import Safe
from adafreeze.cache import PrefixCache
from cached_run import BLOCKS, COUNT, assert_same, by_step, config, counts, epochs, pad_to, train
from cases import batch, lora_model, sample


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


# Planted faults: each run must be what it is without the cache, and the cache off with a reason.

WORLD = {"factor": 1.0}


def of_the_epoch(safe, _model):
    WORLD["factor"] = 1.0 + 0.5 * (safe.steps // 4)


FAULTS = {
    "reads a global": (
        lambda _, hidden: hidden + WORLD["factor"] * torch.linspace(-1, 1, hidden.shape[-1]),
        "others than a pass of the model gives now",
    ),
    "depends on the place in the batch": (
        lambda _, hidden: hidden + 0.3 * torch.arange(len(hidden)).view(-1, 1, 1),
        "its place in the batch",
    ),
    "depends on the others in the batch": (lambda _, hidden: hidden - hidden.mean(0, keepdim=True), "the others in it"),
    "draws noise": (lambda _, hidden: hidden + 0.1 * torch.randn_like(hidden), "another output each time"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_block_that_does_what_no_cache_can_know_switches_it_off(name):
    change, reason = FAULTS[name]

    def run(cache):
        WORLD["factor"] = 1.0
        model = in_block(lora_model("bert", BLOCKS), change)
        after = of_the_epoch if name == "reads a global" else None
        return train("bert", config({1: 2}, cache=cache), list(epochs("bert")), model=model, after=after)

    cached = run("ram")
    assert_same(cached, run("off"))
    assert reason in off_reason(cached[2])


def test_a_block_that_counts_its_passes_is_not_skipped_and_counts_right():
    def counting(block, hidden):
        block.passes = getattr(block, "passes", 0) + 1
        return hidden

    def run(cache):
        model = in_block(lora_model("bert", BLOCKS), counting)
        return model, train("bert", config({1: 2}, cache=cache), list(epochs("bert", epochs=2)), model=model)

    (model, cached), (twin, without) = run("ram"), run("off")
    assert_same(cached, without)
    passes = [m.base_model.model.bert.encoder.layer[0].passes for m in (model, twin)]
    assert passes[0] == passes[1] and "writes to" in off_reason(cached[2])


def test_buffers_below_the_prefix_are_written_once_a_pass():
    """A BatchNorm in evaluation of statistics would see every sample twice where a nested pass left its trace."""

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, hidden):
            self.seen += len(hidden)
            return hidden

    def run(cache):
        model = lora_model("bert", BLOCKS)
        embeddings = model.base_model.model.bert.embeddings
        embeddings.LayerNorm = nn.Sequential(embeddings.LayerNorm, Counted())
        trained = train("bert", config({1: 2}, cache=cache), list(epochs("bert")), model=model)
        return trained, float(embeddings.LayerNorm[1].seen)

    (cached, seen), (without, expected) = run("ram"), run("off")
    assert_same(cached, without)
    assert seen == expected and counts(cached[2])[0]


class PaddingHead(nn.Module):
    """Reads the hidden states where there is no text."""

    def __init__(self, model):
        super().__init__()
        self.model, self.head = model, nn.Linear(32, 2)
        self.config = model.config

    def forward(self, input_ids, attention_mask, labels):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        padding = (1 - attention_mask)[..., None].to(hidden.dtype)
        logits = self.head((hidden * padding).sum(1) / padding.sum(1).clamp(min=1))
        loss = F.cross_entropy(logits, labels)
        return _Output(loss, logits)


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


def test_a_head_that_reads_the_padding():
    def run(cache):
        model = PaddingHead(encoder()).train()
        return train("bert", config({1: 2}, cache=cache), list(epochs("bert")), model=model)

    cached = run("ram")
    assert_same(cached, run("off"))
    assert cached[2].cache.prefix_cache.safety.whole_rows and counts(cached[2])[0]


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
def test_a_stack_that_is_called_several_times_is_served_each_call_its_own(calls):
    def run(cache):
        settings = config({1: 1, 5: 2}, cache=cache)
        return train("bert", settings, texts(calls), model=Calls(calls).train(), count=12)

    cached = run("ram")
    assert_same(cached, run("off"))
    hits, _, misses = counts(cached[2])
    assert hits >= 12 and misses and off_reason(cached[2]) is None


def test_a_third_call_that_differs_by_chance_is_seen():
    def positions():
        return {"position_ids": torch.randint(0, 30, (1, 10))}

    def run(cache):
        torch.manual_seed(9)
        return train("bert", config({1: 2}, cache=cache), texts(3), model=Calls(3, positions).train(), count=12)

    cached = run("ram")
    assert_same(cached, run("off"))
    assert off_reason(cached[2])


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
def test_several_rows_of_a_sample_are_held_together(interleaved):
    def run(cache):
        return train("bert", config({1: 2}, cache=cache), views(), model=Flattened(interleaved).train(), count=12)

    cached = run("ram")
    assert_same(cached, run("off"))
    (layout,) = next(iter(cached[2].cache.prefix_cache.safety.situations.values())).layouts.values()
    assert (layout.rows, layout.interleaved) == (2, interleaved)
    assert counts(cached[2]) == (8 + 12, 0, 8 + 4)


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
def test_a_stack_whose_samples_are_the_second_dimension(batch_first):
    def run(cache):
        model = get_peft_model(SequenceFirst(batch_first), LoraConfig(r=4, target_modules=["linear1", "linear2"]))
        batches = [{n: one[n] for n in ("input_ids", "labels")} for one in epochs("bert", collator=pad_to(16))]
        return train("bert", config({1: 2}, cache=cache), batches, model=model.train())

    cached = run("ram")
    assert_same(cached, run("off"))
    assert counts(cached[2])[0] >= COUNT


def test_a_batch_of_one_and_a_last_batch_of_one():
    for rows in (1, 3):
        batches = [
            pad_to(16)([sample("bert", index) for index in range(start, min(start + rows, 7))])
            for _ in range(3)
            for start in range(0, 7, rows)
        ]
        cached = train("bert", config({1: 2}), batches, count=7)
        assert_same(cached, train("bert", config({1: 2}, cache="off"), batches, count=7))
        assert counts(cached[2])[0] >= 7


# Keys.


class Joined(nn.Module):
    """Joins a text and a candidate label, whatever it is called."""

    def __init__(self, name):
        super().__init__()
        self.encoder, self.head, self.name = encoder(), nn.Linear(32, 2), name

    def forward(self, input_ids, labels, **more):
        hidden = self.encoder(input_ids=torch.cat([input_ids, more[self.name]], 1)).last_hidden_state
        logits = self.head(hidden.mean(1))
        return _Output(F.cross_entropy(logits, labels), logits)


@pytest.mark.parametrize("name", ["label_input_ids", "start_positions", "use_cache_ids", "labels_of_another_text"])
def test_nothing_is_left_out_of_a_key_by_its_name(name):
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

    def run(cache):
        return train("bert", config({1: 2}, cache=cache), batches, model=Joined(name).train(), count=12)

    cached = run("ram")
    assert_same(cached, run("off"))
    assert counts(cached[2])[0] >= 12


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

    def run(cache):
        settings = config({1: BLOCKS + 2}, cache=cache)  # adapters are in the decoder alone
        return train("t5", settings, batches, model=Wrapped().train(), count=12)

    cached = run("ram")
    assert_same(cached, run("off"))
    assert counts(cached[2])[0] >= 12


# Who reads what would be skipped.


def test_a_users_hook_on_a_block_of_the_prefix_sees_what_the_block_computes():
    def run(cache):
        model, seen = lora_model("bert", BLOCKS, dropout=0.0), []
        block = model.base_model.model.bert.encoder.layer[0]
        block.register_forward_hook(lambda _m, _i, output: seen.append(output[0].detach().clone()))
        trained = train("bert", config({1: 2}, cache=cache), list(epochs("bert")), model=model)
        return trained, seen

    (cached, seen), (without, expected) = run("ram"), run("off")
    assert_same(cached, without)
    assert len(seen) == len(expected) and all(map(torch.equal, seen, expected))
    (waits,) = [event for event in cached[2].journal.events if event["event"] == "cache_waits"]
    assert "a hook of yours reads BertLayer" in waits["reason"]


def test_a_hook_that_is_there_in_some_passes_only_holds_up_those_alone():
    model, inputs = lora_model("bert", BLOCKS, dropout=0.0), batch("bert")
    safe = Safe(model, config(), probe=inputs, total_steps=100, samples_per_epoch=40)
    safe._freeze(list(safe.units)[:2], by="hand")
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


def test_a_users_hook_elsewhere_is_called_once_a_pass():
    def run(cache):
        model, calls = lora_model("bert", BLOCKS), []
        for module in (model.base_model.model.bert.embeddings, model.base_model.model.classifier):
            module.register_forward_hook(lambda m, _i, _o: calls.append(type(m).__name__))
        return train("bert", config({1: 2}, cache=cache), list(epochs("bert")), model=model), calls

    (cached, calls), (without, expected) = run("ram"), run("off")
    assert_same(cached, without)
    assert calls == expected and counts(cached[2])[0]


def test_the_inner_model_is_served_too_where_a_loss_function_calls_it():
    model, inputs = lora_model("bert", BLOCKS, dropout=0.0), batch("bert")
    safe = Safe(model, config(), probe=inputs, total_steps=100, samples_per_epoch=40)
    safe._freeze(list(safe.units)[:2], by="hand")
    losses = [model.get_base_model()(**inputs).loss.item() for _ in range(4)]
    assert len(set(losses)) == 1 and safe.cache.prefix_cache.stats.hits == 12
    safe.close()


# What it costs.


def test_looking_again_comes_at_times_that_follow_from_flops_and_costs_little():
    batches = list(epochs("bert", count=16, epochs=3))
    safe = train("bert", config({1: 2}), batches, count=16)[2]
    (situation,) = [one for one in safe.cache.prefix_cache.safety.situations.values() if "held" in one.verified]
    # Two of four blocks: 1 + 1 forward passes of a half against three of a half in a step; at most 0.2 %.
    assert situation.spot == pytest.approx(1 / 0.002 * 2 / 3, rel=0.2)


def test_a_part_of_the_model_that_is_called_in_its_place_is_said_to_be_looked_up_never(caplog):
    model, inputs = lora_model("bert", BLOCKS, dropout=0.0), batch("bert")
    safe = Safe(model, config(), probe=inputs, total_steps=100, samples_per_epoch=40)
    safe._freeze(list(safe.units)[:2], by="hand")
    bert = model.get_base_model().bert
    with caplog.at_level("INFO", "adafreeze"):
        for _ in range(6):
            bert(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert caplog.text.count("training calls a part of the model") == 1 and not safe.cache.prefix_cache.stats.looked_up
    safe.close()


def test_a_cache_that_went_off_before_its_line_is_not_said_to_be_on(caplog):
    with caplog.at_level("INFO", "adafreeze"):
        model = in_block(lora_model("bert", BLOCKS), FAULTS["draws noise"][0])
        train("bert", config({1: 2}, freeze=("bert.encoder.layer.0",)), list(epochs("bert")), model=model)
    lines = [record.message for record in caplog.records if record.message.startswith("Prefix cache")]
    assert len(lines) == 1 and lines[0].startswith("Prefix cache off: the prefix gives")


# What changes below the boundary in mid-run, when samples are held already.


def late(change, at=6, undo=None, depths=None):
    """A run with the cache and one without, in both of which ``change(model)`` is made after step ``at``."""

    def after(safe, model):
        if safe.steps == at:
            after.undo = change(model)
        if undo is not None and safe.steps == at + undo:
            after.undo()

    def run(cache):
        model = lora_model("bert", BLOCKS, dropout=0.0)
        return train(
            "bert", config(depths or {1: 2}, cache=cache), list(epochs("bert", epochs=4)), model=model, after=after
        )

    return run("ram"), run("off")


def embeddings_of(model):
    return model.base_model.model.bert.embeddings


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
def test_what_somebody_changes_below_the_boundary_counts_from_the_next_pass_on(change):
    cached, without = late(change)
    assert_same(cached, without)
    assert counts(cached[2])[0]


def one_row_written_to(model):
    """The embedding of token 5, which no digest of a few elements sees."""
    weight = embeddings_of(model).word_embeddings.weight
    before = weight.data[5].clone()
    weight.data[5] = weight.data[6]
    return lambda: weight.data[5].copy_(before)


@pytest.mark.parametrize("change", [one_row_written_to, hooked])
def test_what_was_changed_for_some_passes_and_put_back_is_served_again(change):
    cached, without = late(change, undo=2)
    assert_same(cached, without)
    (waits,) = [event for event in cached[2].journal.events if event["event"] == "cache_waits"]
    assert "what enters the frozen prefix" in waits["reason"]
    assert off_reason(cached[2]) is None and counts(cached[2])[0] >= COUNT


@pytest.mark.parametrize("change", [written_to, block_written_to])
def test_weights_that_are_written_to_and_put_back_give_what_they_then_give(change):
    cached, without = late(change, undo=2)
    assert_same(cached, without)
    assert off_reason(cached[2]) is None and counts(cached[2])[0]


@pytest.mark.parametrize("cache", ["ram", "off"])
@pytest.mark.parametrize("place", ["encoder.layer.1.output.dense", "embeddings.word_embeddings"])
def test_what_is_unfrozen_in_mid_run_gets_its_gradient(place, cache, caplog):
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
def test_what_is_read_behind_a_gate_that_begins_at_zero(reads):
    def run(cache):
        batches = list(epochs("bert", epochs=6))
        return train("bert", config({1: 2}, cache=cache), batches, model=Gate(reads).train())

    cached = run("ram")
    assert_same(cached, run("off"))
    whole_rows = cached[2].cache.prefix_cache.safety.whole_rows
    assert whole_rows if reads == "padding" else "differs" in off_reason(cached[2])


def test_a_head_that_begins_at_zero_shows_nothing_of_padding():
    """With accumulation, its gradient is zero in several passes, and after them it reads padding."""

    def run(cache):
        model = PaddingHead(encoder()).train()
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
        return train("bert", config({1: 2}, cache=cache), list(epochs("bert", epochs=8)), model=model, accumulate=4)

    assert_same(run("ram"), run("off"))


def test_a_loss_outside_the_model_that_begins_to_read_padding_is_heard(caplog):
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
    assert differ[:1] == [20] and safe.cache.prefix_cache.safety.whole_rows
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
    assert cached[2].cache.prefix_cache.safety.whole_rows if rope == "longrope" else "dynamic" in off_reason(cached[2])


@pytest.mark.parametrize("again", [1, 2])
def test_a_block_that_treats_one_row_of_a_batch_differently(again):
    """Each batch may come several times running (PPO's inner epochs), which shows nothing of other places."""

    def special(_, hidden):
        mask = (torch.arange(len(hidden)) == 1).to(hidden.dtype).view(-1, 1, 1)
        return hidden + 0.5 * mask * torch.linspace(-1, 1, hidden.shape[-1])

    def run(cache):
        model = in_block(lora_model("bert", BLOCKS, dropout=0.0), special)
        batches = [one for one in epochs("bert", epochs=4) for _ in range(again)]
        return train("bert", config({1: 2}, cache=cache), batches, model=model)

    cached = run("ram")
    assert_same(cached, run("off"))
    assert off_reason(cached[2])


@pytest.mark.parametrize("before", [True, False])
def test_a_weight_that_is_written_to_around_the_step_that_deepens_the_prefix(before):
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


def test_a_block_that_trains_for_some_steps_and_comes_back_is_another_one():
    def run(cache):
        model = lora_model("bert", BLOCKS, dropout=0.0)
        weight = model.base_model.model.bert.encoder.layer[1].output.dense.weight
        batches = list(epochs("bert", epochs=5))

        def after(safe, _model):
            if safe.steps in (5, 8):
                weight.requires_grad_(safe.steps == 5)
                if safe.steps == 8:
                    safe.prefix.update()
                    safe.cache.prefix_changed()

        settings = config({1: 3}, cache=cache)
        return train("bert", settings, batches, model=model, after=after)

    cached, without = run("ram"), run("off")
    assert cached[0] == pytest.approx(without[0], rel=1e-5)


def test_hidden_states_that_are_asked_for_inside_from_some_step_on():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.asks = encoder(), False
            self.config = self.model.config
            self.head = nn.Linear(32, 2)

        def forward(self, input_ids, attention_mask, labels):
            output = self.model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=self.asks)
            hidden = output.hidden_states[1] if self.asks else output.last_hidden_state
            logits = self.head(hidden[:, 0])
            return _Output(F.cross_entropy(logits, labels), logits)

    def run(cache):
        torch.manual_seed(4)
        model = Asks().train()

        def after(safe, _model):
            model.asks = safe.steps >= 8

        return train("bert", config({1: 2}, cache=cache), list(epochs("bert", epochs=4)), model=model, after=after)

    cached, without = run("ram"), run("off")
    assert_same(cached, without)
    assert [len(hidden) for hidden in (cached[0], without[0])] == [16, 16]
    (waits,) = [event for event in cached[2].journal.events if event["event"] == "cache_waits"]
    assert "records what the blocks" in waits["reason"]


class Masks(nn.Module):
    """Makes its own attention mask, and another one from some step on."""

    def __init__(self):
        super().__init__()
        self.model, self.causal = encoder(), False
        self.config, self.head = self.model.config, nn.Linear(32, 2)

    def forward(self, input_ids, attention_mask, labels):
        count, width = input_ids.shape
        visible = torch.ones(width, width, dtype=torch.bool)
        visible = visible.tril() if self.causal else visible
        mask = visible.expand(count, 1, width, width) & attention_mask[:, None, None].bool()
        hidden = self.model(input_ids=input_ids, attention_mask=mask).last_hidden_state
        logits = self.head(hidden[:, 0])
        return _Output(F.cross_entropy(logits, labels), logits)


@pytest.mark.parametrize("change", ["flag", "hook"])
def test_what_enters_the_blocks_beside_hidden_states_may_change_in_mid_run(change):
    def run(cache):
        torch.manual_seed(4)
        model = Masks().train() if change == "flag" else lora_model("llama", BLOCKS, dropout=0.0)

        def after(safe, _model):
            if safe.steps == 8 and change == "flag":
                model.causal = True
            elif safe.steps == 8:
                rotary = next(m for m in model.modules() if type(m).__name__ == "LlamaRotaryEmbedding")
                rotary.register_forward_hook(lambda _m, _i, output: tuple(0.5 * one for one in output))

        family = "bert" if change == "flag" else "llama"
        return train(family, config({1: 2}, cache=cache), list(epochs(family, epochs=4)), model=model, after=after)

    cached = run("ram")
    assert_same(cached, run("off"))
    assert counts(cached[2])[0]


def test_passes_without_adapters_and_annealed_scales_make_nothing_be_looked_at_again(monkeypatch):
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
    assert not hashed and len(cached[2].cache.prefix_cache.safety.situations) <= 4
