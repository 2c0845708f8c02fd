"""The loop: what it changes, what it must not change, and what it says when something is wrong."""

import copy
import math
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

import cases
from adafreeze import AdafreezeWarning, ConfigError, ModelError, ProbeError, RunError, Safe, SafeConfig
from adafreeze.loop.state import sealed
from adafreeze.measure.scorer import Scorer


def train(model, batches, safe_settings=None, total_steps=None, lr=1e-2, **safe_arguments):
    """A plain loop. Returns (losses, safe)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.1)
    safe = None
    if safe_settings is not None:
        arguments = {"probe": cases.loader("llama"), "total_steps": total_steps or len(batches), **safe_arguments}
        safe = Safe(model, SafeConfig(**safe_settings), optimizer=optimizer, **arguments)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if safe is not None:
            safe.step()
    return losses, safe


def anatomy(model):
    """All that a module is made of but for the values of its tensors."""
    parts = {}
    for name, module in model.named_modules():
        own = {k: v for k, v in module.__dict__.items() if k not in ("_parameters", "_modules", "_buffers")}
        parts[name] = (
            type(module),
            {k: (list(v) if "hooks" in k else v) for k, v in own.items() if not callable(v) or k == "forward"},
            [(n, id(p), p.requires_grad) for n, p in module._parameters.items() if p is not None],
            [(n, id(child)) for n, child in module._modules.items()],
        )
    return parts


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_losses_are_the_same_to_the_bit_until_the_first_freeze(family):
    def run(with_safe):
        model = cases.lora_model(family)  # dropout on
        torch.manual_seed(7)
        loader = cases.loader(family, count=40)
        batches = (batch for _ in range(2) for batch in loader)  # drawn as the loop goes: order depends on the state
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        safe = (
            Safe(model, SafeConfig(dry_run=True), optimizer=optimizer, probe=loader, total_steps=20)
            if with_safe
            else None
        )
        losses, seen = [], []
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            seen.append(float(batch[next(iter(batch))].double().sum()))
            if safe:
                safe.step()
        if safe:
            assert sum(event["event"] == "measure" for event in safe.journal.events) >= 6
        return losses, seen

    assert run(True) == run(False)


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_gradients_above_the_prefix_are_those_of_a_run_without_it(family):
    model = cases.lora_model(family, dropout=0.0)
    twin = copy.deepcopy(model)
    safe = Safe(model, probe=cases.loader(family), total_steps=10)
    names = list(safe.units)[:2]
    safe.freeze(names)
    assert sum(safe.prefixes.values()) == 2
    model(**cases.batch(family)).loss.backward()
    twin(**cases.batch(family)).loss.backward()
    pairs = list(zip(model.named_parameters(), twin.named_parameters(), strict=True))
    compared = 0
    for (name, mine), (_, plain) in pairs:
        if mine.requires_grad:
            compared += 1
            assert torch.equal(mine.grad, plain.grad), name
    assert compared
    assert any(plain.grad is not None and mine.grad is None for (_, mine), (_, plain) in pairs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_survive_checkpointing_above_the_prefix(reentrant):
    model = cases.lora_model("llama", dropout=0.0)
    twin = copy.deepcopy(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    safe = Safe(model, probe=cases.loader("llama"), total_steps=10)
    safe.freeze(list(safe.units)[:2])
    model(**cases.batch("llama")).loss.backward()
    twin(**cases.batch("llama")).loss.backward()
    for (name, mine), (_, plain) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        if mine.requires_grad:
            assert torch.equal(mine.grad, plain.grad), name


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_close_leaves_the_model_as_it_was(family):
    model = cases.lora_model(family, lora_dropout=0.1)
    before = anatomy(model)
    batches = [cases.batch(family)] * 20
    _, safe = train(model, batches, {"freeze_share": 0.9}, probe=cases.loader(family))
    assert safe.frozen
    assert anatomy(model) != before
    safe.close()
    after = anatomy(model)
    for name in before:
        assert after[name] == before[name], name
    assert safe.frozen, "what was frozen is still told after the end"
    safe.close()  # twice is fine


def test_dropout_below_the_boundary_is_off_and_above_it_on():
    model = cases.lora_model("bert", dropout=0.5, lora_dropout=0.5)
    safe = Safe(model, SafeConfig(cache="off"), probe=cases.loader("bert"), total_steps=10)
    safe.freeze(list(safe.units)[:2])
    model.train()
    seen = {1: [], 3: []}
    for index in seen:
        safe.stacks[0].blocks[index].register_forward_hook(
            lambda _m, _i, o, i=index: seen[i].append(cases.first_tensor(o))
        )
    model(**cases.batch("bert"))
    model(**cases.batch("bert"))
    assert torch.equal(*seen[1])
    assert not torch.equal(*seen[3])


def test_evaluation_bypasses_the_prefix():
    model = cases.lora_model("bert")
    model.eval()
    expected = model(**cases.batch("bert")).logits
    safe = Safe(model, probe=cases.loader("bert"), total_steps=10)
    safe.freeze(list(safe.units)[:3])
    model.train()
    model.eval()
    assert torch.equal(model(**cases.batch("bert")).logits, expected)
    generating = cases.lora_model("llama").eval()
    ids = cases.batch("llama", rows=1)["input_ids"]
    expected = generating.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    safe = Safe(generating, probe=cases.loader("llama"), total_steps=10)
    safe.freeze(list(safe.units)[:3])
    assert torch.equal(generating.generate(input_ids=ids, max_new_tokens=4, do_sample=False), expected)


def test_a_decoder_has_no_prefix_while_its_encoder_trains():
    model = cases.lora_model("t5", dropout=0.0)
    twin = copy.deepcopy(model)
    safe = Safe(model, SafeConfig(freeze_at_start=0), probe=cases.loader("t5"), total_steps=10)
    decoder = [name for name in safe.units if name.startswith("decoder.")]
    encoder = [name for name in safe.units if name.startswith("encoder.")]
    safe.freeze(decoder[:3])
    assert safe.prefixes == {"encoder.block": 0, "decoder.block": 0}
    model(**cases.batch("t5")).loss.backward()
    twin(**cases.batch("t5")).loss.backward()
    for (name, mine), (_, plain) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        if "encoder." in name and plain.requires_grad:
            assert torch.equal(mine.grad, plain.grad), name
    safe.freeze(encoder)
    assert safe.prefixes == {"encoder.block": 4, "decoder.block": 3}


def test_a_causal_lm_whose_every_adapter_scores_zero_keeps_its_last_unit():
    model = cases.lora_model("llama")
    for min_live_blocks in (0, 1):
        settings = {"score": lambda *_: 0.0, "min_live_blocks": min_live_blocks}
        _, safe = train(model, [cases.batch("llama")] * 20, {**settings, "policy": "threshold"})
        assert set(safe.units) - safe.frozen == {list(safe.units)[-1]}
        safe.close()
        _, safe = train(model, [cases.batch("llama")] * 20, {**settings, "freeze_at_start": 0})
        assert not safe.frozen, "by shares of nothing, nothing is judged"
        safe.close()


def plant_a_sink(model):
    """Token 2, which starts every sample, gets an embedding a thousand times longer than any other."""
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[2] *= 1000 * embeddings.norm(dim=1).mean() / embeddings[2].norm()
    # Without this the norm before each layer hides the sink from the layers' own inputs, not from the residual.
    return model


def test_attention_sinks_do_not_flatten_the_scores_of_a_decoder():
    def scores(normalize_rows):
        model = plant_a_sink(cases.lora_model("llama"))
        settings = {"normalize_rows": normalize_rows, "dry_run": True, "overhead": 1.0}  # a probe of many tokens
        _, safe = train(model, [cases.batch("llama")] * 10, settings, total_steps=30)
        return safe.scores

    flat, separated = scores(False), scores(True)
    print(flat, separated)
    assert max(flat.values()) < 1e-4
    assert min(separated.values()) > 1e-2
    assert max(separated.values()) > 1.5 * min(separated.values())


@pytest.mark.parametrize("score", ["cka", "cka_debiased", "local_cka", "grad_norm", "weight_change", "random"])
def test_every_score_freezes_something(score):
    model = cases.lora_model("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdafreezeWarning)
        _, safe = train(
            model, [cases.batch("bert")] * 30, {"score": score, "freeze_share": 0.8}, probe=cases.loader("bert")
        )
    assert safe.frozen and len(safe.frozen) < 4
    assert not [event for event in safe.journal.events if event["event"] == "measure_failed"]


def test_sites_are_scored_on_their_own_output():
    model = cases.lora_model("bert")
    _, safe = train(
        model,
        [cases.batch("bert")] * 30,
        {"granularity": "site", "freeze_share": 0.6},
        probe=cases.loader("bert"),
    )
    assert len(safe.units) == 8
    assert all(name.endswith(("query", "value")) for name in safe.scores)
    assert safe.frozen


def test_the_paper_freezes_units_wherever_they_stand(monkeypatch):
    scripted = [0.5, 0.001, 0.5, 0.001]
    monkeypatch.setattr(Scorer, "measure", lambda self, prefix: dict(zip(self.units, scripted, strict=True)))
    _, safe = train(cases.lora_model("llama"), [cases.batch("llama")] * 30, {"policy": "threshold", "threshold": 0.01})
    assert sorted(name[-1] for name in safe.frozen) == ["1", "3"]
    assert sum(safe.prefixes.values()) == 0


def test_non_finite_activations_skip_the_measurement_and_training_goes_on():
    model = cases.lora_model("llama")
    weight = next(p for n, p in model.named_parameters() if "layers.2" in n and p.requires_grad)
    with torch.no_grad():
        weight.fill_(math.nan)
    with pytest.warns(AdafreezeWarning, match="scores at step .* are NaN or infinite"):
        losses, safe = train(model, [cases.batch("llama")] * 20, {})
    assert len(losses) == 20
    assert not {"model.layers.2", "model.layers.3"} & set(safe.frozen)


def test_a_failing_measurement_warns_and_training_goes_on():
    def broken(before, after):
        raise ZeroDivisionError("my score is broken")

    with pytest.warns(AdafreezeWarning, match="ZeroDivisionError: my score is broken"):
        losses, safe = train(
            cases.lora_model("llama"), [cases.batch("llama")] * 20, {"score": broken, "freeze_at_start": 0}
        )
    assert len(losses) == 20 and not safe.frozen


def test_a_probe_larger_than_memory_is_named(monkeypatch):
    import psutil

    free = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.warns(AdafreezeWarning, match="needs .* MiB of host memory") as caught:
        train(cases.lora_model("llama"), [cases.batch("llama")] * 3, {})
    assert any("probe_tokens=" in str(warning.message) for warning in caught)


def start(model=None, probe=None, config=None, **arguments):
    arguments = {"total_steps": 10, **arguments}
    model = model if model is not None else cases.lora_model("llama")
    return Safe(model, config, probe=cases.loader("llama") if probe is None else probe, **arguments)


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ([], "The probe is empty"),
        (DataLoader(cases.Samples("llama", 0), batch_size=2, collate_fn=cases.collate), "The probe is empty"),
        ([{"labels": torch.ones(2, 3)}], "contains only labels"),
        ([torch.ones(2, 3)], "A probe batch is a Tensor"),
        ([(torch.ones(2, 3), torch.ones(2))], "A probe batch is a tuple"),
        (7, "cannot be drawn from int"),
        ([{"input_ids": torch.full((2, 5), 10**6)}], "The model does not take the probe"),
    ],
)
def test_bad_probes_are_refused_with_the_reason(probe, message):
    with pytest.raises(ProbeError, match=message) as caught:
        start(probe=probe)
    assert "Fix:" in str(caught.value)


def test_a_padded_probe_without_a_mask_is_warned_of():
    batch = cases.collate([cases.sample("llama", 0, 12), cases.sample("llama", 1, 5)])
    del batch["attention_mask"]
    with pytest.warns(AdafreezeWarning, match="padded rows and no attention_mask"):
        safe = start(probe=[batch])
    assert int(safe.decider.probe.chunks[0]["real_tokens"].sum()) == 17


def test_packed_rows_without_a_mask_are_no_reason_to_warn(recwarn):
    batch = cases.collate([cases.sample("llama", 0, 12), cases.sample("llama", 1, 5)])
    del batch["attention_mask"]
    batch["position_ids"] = torch.arange(12).repeat(2, 1)
    safe = start(probe=[batch])
    assert not [warning for warning in recwarn if "attention_mask" in str(warning.message)]
    assert int(safe.decider.probe.chunks[0]["real_tokens"].sum()) == 17


def test_a_one_way_stream_is_not_used_up():
    class Stream(torch.utils.data.IterableDataset):
        taken = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.taken += 1
            return cases.sample("llama", self.taken)

    stream = Stream()
    with pytest.raises(ProbeError, match="without using up samples"):
        start(probe=DataLoader(stream, batch_size=2, collate_fn=cases.collate))
    assert stream.taken == 0


def test_models_without_adapters_are_refused():
    with pytest.raises(ModelError, match="has no adapters"):
        start(cases.base_model("llama"))
    with pytest.raises(ModelError, match="No stack of transformer blocks"):
        start(torch.nn.Linear(3, 3))
    frozen = cases.lora_model("llama")
    frozen.requires_grad_(False)
    with pytest.raises(ModelError, match="No trainable adapter"):
        start(frozen)


@pytest.mark.parametrize(
    "argument",
    [
        {"config": {"seed": 1}},
        {"config": SafeConfig},
        {"optimizer": "adamw"},
        {"total_steps": True},
        {"samples_per_epoch": "400"},
        {"samples_per_epoch": -1},
        {"samples_per_step": 0},
        {"batch_size": 2.5},
    ],
)
def test_arguments_of_another_type_are_named(argument):
    with pytest.raises(ConfigError, match=f"{next(iter(argument))} is .*must be"):
        start(**argument)


def test_training_in_evaluation_mode_is_warned_of_once():
    model, inputs = cases.lora_model("bert").eval(), cases.batch("bert")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    safe = Safe(model, optimizer=optimizer, probe=inputs, total_steps=10)
    with pytest.warns(AdafreezeWarning, match="trains in evaluation mode") as caught:
        for _ in range(3):
            model(**inputs).loss.backward()
            optimizer.step()
            safe.step()
    safe.close()
    assert sum("evaluation mode" in str(one.message) for one in caught) == 1


def test_a_score_that_returns_no_number_is_named():
    safe = start(config=SafeConfig(score=lambda before, after: torch.ones(3), warmup=0.0), total_steps=12)
    with pytest.warns(AdafreezeWarning, match="which is not a number"):
        for _ in range(12):
            safe.step()
    safe.close()


def test_bad_arguments_are_refused():
    with pytest.raises(ConfigError, match="total_steps is 0"):
        start(total_steps=0)
    with pytest.raises(ConfigError, match="There is no unit"):
        start(config=SafeConfig(freeze=("model.layers.9",)))
    with pytest.raises(RunError, match=r"nn\.DataParallel"):
        start(torch.nn.DataParallel(cases.lora_model("llama")))
    with pytest.raises(RunError, match="cannot be written"):
        start(journal="/dev/null/journal.jsonl")


def test_units_freeze_by_hand_from_the_start():
    safe = start(config=SafeConfig(freeze=("model.layers.0", "model.layers.1")))
    assert safe.prefixes == {"model.layers": 2}


def test_each_freeze_is_said_in_one_line(caplog):
    with caplog.at_level("INFO", logger="adafreeze"):
        _, safe = train(cases.lora_model("llama", blocks=3), [cases.batch("llama")] * 20, {"freeze_share": 0.9})
    said = [message for message in caplog.messages if "units are frozen" in message]
    freezes = [event for event in safe.journal.events if event["event"] == "freeze"]
    assert len(said) == len(freezes) >= 1
    step, frozen = freezes[-1]["step"], freezes[-1]["frozen"]
    assert said[-1].startswith(f"Step {step} of 20: {frozen} of 3 units are frozen, {frozen} of 3 blocks are in the")


def test_a_user_who_unfreezes_is_told_once_and_the_freeze_holds():
    model = cases.lora_model("llama")
    safe = start(model)
    safe.freeze(list(safe.units)[:2])
    frozen = list(safe.freezer.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AdafreezeWarning)
        for _ in range(3):
            for parameter in frozen:
                parameter.requires_grad_(True)
            model(**cases.batch("llama")).loss.backward()
    told = [w for w in caught if issubclass(w.category, AdafreezeWarning)]
    assert len(told) == 1 and "were frozen again" in str(told[0].message)
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_state_round_trip_and_its_errors():
    model = cases.lora_model("llama")
    _, safe = train(model, [cases.batch("llama")] * 20, {"freeze_share": 0.6}, total_steps=60)
    assert safe.frozen
    state = safe.state_dict()
    safe.close()
    fresh = start(model, config=SafeConfig(freeze_share=0.6), total_steps=60)
    fresh.load_state_dict(state)
    assert fresh.frozen == set(state["frozen"]) and fresh.state_dict() == state
    with pytest.raises(RunError, match="has version 99"):
        fresh.load_state_dict({**state, "version": 99})
    with pytest.raises(RunError, match="which is no unit of this model"):
        fresh.load_state_dict(sealed({**state, "frozen": ["elsewhere"]}))


def test_two_towers_each_have_a_prefix_of_their_own():
    class Towers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = cases.base_model("bert", dropout=0.0).bert
            self.two = cases.base_model("bert", dropout=0.0).bert

        def forward(self, input_ids, attention_mask, labels=None):
            a = self.one(input_ids=input_ids, attention_mask=attention_mask).pooler_output
            b = self.two(input_ids=input_ids, attention_mask=attention_mask).pooler_output
            return (a * b).sum()

    model = get_peft_model(Towers(), LoraConfig(r=4, target_modules=["query"])).train()
    safe = start(model, probe=cases.loader("bert"))
    assert safe.decider.chains == tuple(tuple((f"{n}.encoder.layer.{i}",) for i in range(4)) for n in ("one", "two"))
    safe.freeze(["one.encoder.layer.0", "two.encoder.layer.0", "two.encoder.layer.1"])
    assert safe.prefixes == {"one.encoder.layer": 1, "two.encoder.layer": 2}
    model(**cases.batch("bert")).backward()


def test_a_dry_run_says_what_would_freeze_and_freezes_nothing(caplog):
    model = cases.lora_model("bert")
    _, safe = train(model, [cases.batch("bert")] * 20, {"dry_run": True}, probe=cases.loader("bert"))
    would = [event for event in safe.journal.events if event["event"] == "would_freeze"]
    start, *said = [record.message for record in caplog.records if "would freeze" in record.message]
    assert start.startswith("Before step 0 1 units would freeze (freeze_at_start)")
    assert would.pop(0)["step"] == 0
    assert said == [f"Step {e['step']} of 20: {len(e['units'])} of 4 units would freeze." for e in would] != []
    assert not safe.frozen


def test_what_the_batch_alone_changes_counts_as_zero():
    """In low precision kernels round otherwise in other batches; here a hook does so, visibly."""
    model = cases.lora_model("bert", dropout=0.0)
    torch.manual_seed(1)
    noise = 0.05 * torch.randn(8, 1, 32)
    embeddings = model.base_model.model.bert.embeddings
    embeddings.register_forward_hook(lambda _m, _i, o: o if len(o) == 1 else o + noise[: len(o)])
    _, safe = train(
        model, [cases.batch("bert")] * 20, {"dry_run": True, "freeze_at_start": 0}, probe=cases.loader("bert"), lr=1e-4
    )
    assert min(safe.decider.scorer.floor.values()) > 1e-6
    assert set(safe.scores.values()) == {0.0}
    quiet = cases.lora_model("bert", dropout=0.0)
    _, safe = train(
        quiet, [cases.batch("bert")] * 20, {"dry_run": True, "freeze_at_start": 0}, probe=cases.loader("bert"), lr=1e-4
    )
    assert max(safe.decider.scorer.floor.values()) < 1e-9
    assert min(safe.scores.values()) > 0


def test_hidden_states_are_captured_once_where_a_safe_looked_at_the_model_first():
    """transformers installs hooks for that in the first pass, and marks the model: both go, or neither."""
    model = cases.lora_model("bert")
    expected = model(**cases.batch("bert"), output_hidden_states=True)
    fresh = cases.lora_model("bert")
    fresh.config.output_hidden_states = True
    safe = Safe(fresh, SafeConfig(freeze_at_start=0), probe=cases.loader("bert"), total_steps=10)
    found = fresh(**cases.batch("bert"))
    safe.close()
    again = fresh(**cases.batch("bert"))
    assert len(expected.hidden_states) == len(found.hidden_states) == len(again.hidden_states) == 5
