"""A plan predicts what the run measures: saved bytes exactly, the peak of a step within 3 %."""

import dataclasses
import json
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

import cases
from adafreeze import AdafreezeWarning, ConfigError, ModelError, Safe, SafeConfig, plan
from adafreeze.costs import CountFlops, SavedBytes, StorageTracker
from adafreeze.costs.devices import GPUS
from adafreeze.costs.memory import bytes_of
from adafreeze.memory import _planner, checkpointing
from adafreeze.model import find_stacks

TASKS = {
    **dict.fromkeys(("bert", "roberta"), "text-classification"),
    **dict.fromkeys(("gpt2", "llama", "qwen3"), "causal-lm"),
    "t5": "seq2seq-lm",
    "vit": "image-classification",
}
WAYS = {
    "lora": {},
    "lora-dropout": {"dropout": 0.1},
    "lora-bf16": {"dtype": torch.bfloat16},
    "lora-bf16-dropout-checkpointed": {"dtype": torch.bfloat16, "dropout": 0.1, "checkpointing": True},
    "dora": {"kind": "dora"},
    "ia3-checkpointed": {"kind": "ia3", "checkpointing": True},
    "ia3-bf16": {"kind": "ia3", "dtype": torch.bfloat16},
}
ROWS, LENGTH = 6, 20


def planned(family, kind="lora", dropout=0.0, dtype=torch.float32, checkpointing=False, **options):
    config = cases.base_model(family, dropout=dropout).config
    settings = {"target": "cpu", "optim": "adamw_torch", "accumulate": True, "batch_size": ROWS, **options}
    return plan(
        config, cases.adapter(family, kind, dropout), task=TASKS[family], max_length=LENGTH, dtype=dtype,
        checkpointing=checkpointing, **settings,
    )  # fmt: skip


def batch_of(family, dtype):
    batch = cases.batch(family, rows=ROWS, length=LENGTH)
    if "attention_mask" in batch:
        batch["attention_mask"][0, -1] = 0
    if family == "t5":
        batch["labels"] = batch["input_ids"].clone()
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def measured(family, depths, kind="lora", dropout=0.0, dtype=torch.float32, checkpointing=False, config=None):
    """Saved bytes, peak and FLOPs at each depth, of the second step with a real model and optimizer."""
    model = get_peft_model(
        cases.base_model(family, dropout=dropout).to(dtype), cases.adapter(family, kind, dropout)
    ).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = batch_of(family, dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    settings = SafeConfig(cache="off", freeze_at_start=0, **config or {})
    safe = Safe(model, settings, optimizer=optimizer, probe=batch, total_steps=1000, samples_per_step=ROWS)
    found = []
    for depth in depths:
        names = [name for name in list(safe.units)[:depth] if name not in safe.frozen]
        safe.freeze(names)
        model(**batch).loss.backward()
        optimizer.step()
        with StorageTracker() as tracker:
            state = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
            tracker.hold(*model.parameters(), *model.buffers(), *batch.values(), *state)
            tracker.hold(*(p.grad for p in model.parameters() if p.grad is not None))
            with SavedBytes(model) as saved, CountFlops() as forward:
                loss = model(**batch).loss
            with CountFlops() as backward:
                loss.backward()
            del loss
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append((saved.total, tracker.peak, forward.total, backward.total))
    safe.close()
    return found


# All settings of one family and the richest of some others; the rest are slow.
BRIEF = [("llama", "lora"), ("llama", "ia3-checkpointed")]
BRIEF += [(family, "lora-bf16-dropout-checkpointed") for family in ("bert", "llama", "vit")]
EVERY = [(family, way) for family in cases.FAMILIES for way in WAYS]


@pytest.mark.parametrize(("family", "way"), cases.slow_but(BRIEF, EVERY))
def test_a_plan_predicts_what_the_run_measures_at_every_depth(family, way):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps = planned(family, **WAYS[way]).steps
        real = measured(family, [step.prefix for step in steps], **WAYS[way])
    assert len(steps) >= 4
    for step, (saved, peak, forward, backward) in zip(steps, real, strict=True):
        assert step.saved == saved, step.prefix
        assert step.peak == pytest.approx(peak, rel=0.03), step.prefix
        assert (step.forward_flops, step.backward_flops) == (forward, backward), step.prefix
        assert step.weights + step.adapters + step.optimizer + step.saved + step.transient == step.peak


@pytest.mark.parametrize("family", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_without_accumulation_gradients_take_no_memory_in_the_forward_pass(family):
    first, later = (planned(family, accumulate=accumulate).plain for accumulate in (False, True))
    assert first.saved == later.saved and later.peak - first.gradients <= first.peak < later.peak


def test_parts_of_the_memory():
    step = planned("llama").plain
    model = get_peft_model(cases.base_model("llama"), cases.adapter("llama"))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert step.adapters == step.gradients == bytes_of(trained)
    assert step.weights == bytes_of(p for p in (*model.parameters(), *model.buffers()) if not p.requires_grad)
    assert step.optimizer == 2 * step.adapters + 4 * len(trained)


@pytest.mark.parametrize(
    "family", [f if f == "bert" else pytest.param(f, marks=pytest.mark.slow) for f in cases.FAMILIES]
)
def test_a_deeper_prefix_needs_less_memory_and_compute_and_the_cache_even_less(family):
    made = planned(family)
    peaks, flops, cached = zip(*((s.peak, s.flops, s.cached_flops) for s in made.steps), strict=True)
    assert list(peaks) == sorted(peaks, reverse=True) and list(flops) == sorted(flops, reverse=True)
    assert cached[0] == flops[0] and all(c < f for c, f in zip(cached[1:], flops[1:], strict=True))
    assert made.checkpointed.peak < made.plain.peak and made.checkpointed.flops > made.plain.flops
    assert made.steps[-1].prefix >= made.blocks - (2 if family == "t5" else 1)


def high_stack():
    return LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=7,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("target", "dropout", "memory"), [("cpu", 0.0, None), pytest.param("cuda", 0.1, "2GiB", marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_extrapolating_from_a_few_identical_blocks_changes_nothing(target, dropout, memory, monkeypatch):
    settings = {"target": target, "batch_size": 4, "max_length": 24, "device_memory": memory}
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=dropout)
    few = plan(high_stack(), lora, **settings)
    monkeypatch.setattr(_planner, "all_alike", lambda stack: False)
    assert plan(high_stack(), lora, **settings) == few


def test_blocks_with_different_adapters_are_not_identical():
    config = high_stack()
    model = get_peft_model(
        type(cases.base_model("llama"))(config), LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1, 5])
    )
    stack = find_stacks(model)[0]
    assert not _planner.all_alike(stack)
    assert _planner.all_alike(find_stacks(cases.lora_model("llama", blocks=6))[0])


def test_planning_does_not_change_a_module():
    model = cases.lora_model("llama", dropout=0.1, lora_dropout=0.1).eval()
    batch = cases.batch("llama")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    parameters = [(id(p), p.requires_grad, p.grad) for p in model.parameters()]
    with torch.no_grad():
        logits = model(**batch).logits
    state = torch.get_rng_state()
    made = plan(model, inputs=batch, target="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert made.plain.saved > 0 and made.settings["batch_size"] == len(batch["input_ids"])
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert [(id(p), p.requires_grad, p.grad) for p in model.parameters()] == parameters
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, logits)


def test_micro_batches_with_the_checkpointing_that_was_asked_for():
    without, made = (planned("llama", device_memory="8MiB", checkpointing=flag) for flag in (False, True))
    assert made.plain.peak == made.checkpointed.peak < without.plain.peak
    fits = made.micro_batches
    assert set(fits) == {"plain", "safe", "checkpointed"}
    assert without.micro_batches["plain"] < fits["plain"] <= fits["safe"] <= fits["checkpointed"]
    assert without.micro_batches["checkpointed"] == fits["checkpointed"]


def test_micro_batches_that_fit():
    everything = planned("bert", device_memory="64MiB")
    fits = [everything.micro_batches[name] for name in ("checkpointed", "safe", "plain")]
    assert 4096 > fits[0] > fits[1] > fits[2] > 100 and not everything.advice
    held = everything.plain.peak - everything.plain.saved - everything.plain.transient
    limit = held + (everything.plain.peak - held) // 2  # of six samples
    some = planned("bert", device_memory=limit)
    assert some.micro_batches["plain"] in (2, 3)
    for rows, fits in ((some.micro_batches["plain"], True), (some.micro_batches["plain"] + 1, False)):
        assert (planned("bert", batch_size=rows).plain.peak <= limit) == fits
    nothing = planned("bert", device_memory=held)
    assert nothing.micro_batches == {"plain": 0, "safe": 0, "selective": 0, "checkpointed": 0}
    assert any("per_device_train_batch_size 1" in line for line in nothing.advice)


@pytest.mark.parametrize("family", ["bert", pytest.param("t5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_checkpointing_is_predicted_at_every_depth(family, dtype):
    way = {"dtype": dtype, "dropout": 0.1}
    made = planned(family, **way)
    assert [step.prefix for step in made.selective] == [step.prefix for step in made.steps]
    real = measured(family, [step.prefix for step in made.selective], **way, config={"checkpointing": "selective"})
    for step, (saved, peak, forward, backward) in zip(made.selective, real, strict=True):
        assert step.saved == saved, step.prefix
        assert step.peak == pytest.approx(peak, rel=0.03), step.prefix
        assert (step.forward_flops, step.backward_flops) == (forward, backward), step.prefix


@cases.refuses_changes_in_place
def test_a_model_that_changes_a_product_in_place_has_no_selective_plan(monkeypatch):
    from transformers.models.bert.modeling_bert import BertIntermediate

    monkeypatch.setattr(BertIntermediate, "forward", lambda self, x: self.dense(x).mul_(1.0))
    monkeypatch.setattr(checkpointing, "LEAST_INNER", 8)  # so that products of this small model are kept
    made = planned("bert")
    assert not made.selective
    assert any("No selective checkpointing" in cause for cause in made.causes)


# Causes.


@pytest.mark.slow
def test_float32_adapters_on_a_half_precision_base_that_cannot_be_lean():
    assert any("float32 on a bfloat16 base" in cause for cause in planned("llama", "dora", dtype="bfloat16").causes)
    narrow = planned("llama", "dora", dtype="bfloat16", autocast_adapter_dtype=False)
    assert not any("float32" in cause for cause in narrow.causes)
    assert narrow.plain.saved < planned("llama", "dora", dtype="bfloat16").plain.saved


def test_lean_adapters_need_neither_other_dtypes_nor_other_dropout():
    made = planned("llama", dtype="bfloat16", dropout=0.1)
    assert not made.causes
    assert made.steps[0].saved < made.plain.saved and made.steps[0].peak < made.plain.peak


@pytest.mark.slow
def test_adapter_dropout_on_seven_targets():
    made, without = (
        plan(
            high_stack(), LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, use_dora=True),
            batch_size=4, max_length=24, target="cpu",
        )
        for dropout in (0.05, 0.0)
    )  # fmt: skip
    (cause,) = [cause for cause in made.causes if "dropout" in cause]
    assert f"{made.plain.saved / without.plain.saved - 1:+.0%}" in cause and "dropout" not in " ".join(without.causes)
    assert made.steps[1].saved < made.plain.saved


def test_trainable_embeddings_leave_no_prefix():
    config = cases.base_model("bert").config
    lora = LoraConfig(r=4, target_modules=["query"], modules_to_save=["word_embeddings"])
    made = plan(config, lora, task="text-classification", batch_size=4, max_length=24)
    (cause,) = [cause for cause in made.causes if "word_embeddings" in cause]
    assert "LoraConfig(modules_to_save=...) without 'word_embeddings'" in cause
    assert [step.prefix for step in made.steps] == [0]


def live_norm_model():
    model = get_peft_model(cases.base_model("llama", blocks=6), cases.adapter("llama"))
    model.get_base_model().model.layers[2].input_layernorm.weight.requires_grad_(True)
    return model


def test_nothing_freezes_above_a_parameter_that_always_trains():
    made = plan(live_norm_model(), inputs=batch_of("llama", torch.float32), target="cpu")
    assert [step.prefix for step in made.steps] == [0, 2]
    (cause,) = [cause for cause in made.causes if "cannot join" in cause]
    assert cause.startswith("4 of 6 units") and "requires_grad_(False) on model.layers.2.input_layernorm" in cause
    safe = Safe(live_norm_model(), SafeConfig(freeze_at_start=1.0), probe=cases.loader("llama"), total_steps=9)
    assert safe.prefixes == {"model.layers": made.steps[-1].prefix}


# Blocks without adapters below, in and above the prefix; at least one adapted block is live.
@pytest.mark.parametrize(
    ("layers", "prefixes"),
    cases.slow_but(
        [([3, 4, 5], [3, 4, 5]), ([1, 4], [1, 4]), ([0], [0])],
        [([3, 4, 5], [3, 4, 5]), ([0, 1, 2], [0, 1, 2]), ([1, 4], [1, 4]), ([2], [2]), ([0], [0]), ([0, 5], [0, 5])],
    ),
    ids=str,
)
def test_blocks_without_adapters(layers, prefixes):
    def lora():
        return LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=layers)

    with warnings.catch_warnings():
        warnings.simplefilter("error", AdafreezeWarning)
        made = plan(
            cases.base_model("llama", blocks=6).config, lora(), batch_size=ROWS, max_length=LENGTH, target="cpu"
        )
    assert [step.prefix for step in made.steps] == prefixes
    model = get_peft_model(cases.base_model("llama", blocks=6, dropout=0.0), lora()).train()
    safe = Safe(model, SafeConfig(cache="off", freeze_at_start=0), probe=cases.loader("llama"), total_steps=1000)
    batch = batch_of("llama", torch.float32)
    for step in made.steps[1:]:
        names = [n for n, u in safe.units.items() if u.block < step.prefix and n not in safe.frozen]
        safe.freeze(names)
        assert safe.prefixes == {"model.layers": step.prefix}
        with SavedBytes(model) as saved:
            model(**batch).loss.backward()
        assert saved.total == step.saved
    safe.close()


class NoLoss(torch.nn.Module):
    """A model whose loss is computed outside."""

    def __init__(self, returned):
        super().__init__()
        self.model, self.returned = cases.base_model("llama").model, returned

    def forward(self, **inputs):
        hidden = self.model(**inputs).last_hidden_state
        return {"tensor": hidden, "tuple": (hidden, hidden.mean(1)), "dict": {"embedding": hidden.mean(1)}}[
            self.returned
        ]


@pytest.mark.parametrize(
    "returned", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("tensor", "tuple")), "dict"]
)
def test_a_model_without_a_loss_is_planned_by_what_it_returns(returned):
    model = get_peft_model(NoLoss(returned), cases.adapter("llama"))
    inputs = {name: value for name, value in batch_of("llama", torch.float32).items() if name != "labels"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdafreezeWarning)
        made = plan(model, inputs=inputs, target="cpu")
    assert [step.prefix for step in made.steps] == [0, 1, 2, 3]
    with SavedBytes(model) as saved:
        output = model(**inputs)
        if returned == "tensor":  # may be logits: planned with a cross-entropy loss
            torch.nn.functional.log_softmax(output, -1).sum()
    assert made.plain.saved == saved.total
    assert made.steps[-1].saved < made.plain.saved


def test_a_model_that_returns_nothing_with_a_gradient_is_refused():
    model = get_peft_model(NoLoss("tensor"), cases.adapter("llama"))
    model.get_base_model().forward = lambda **inputs: {
        "embedding": NoLoss.forward(model.get_base_model(), **inputs).detach()
    }
    inputs = {name: value for name, value in cases.batch("llama").items() if name != "labels"}
    with pytest.raises(ModelError, match="Nothing that the model returns has a gradient"):
        plan(model, inputs=inputs, target="cpu")


class Pictures(torch.nn.Module):
    """A text model that takes the patches of all samples in one tensor, four per sample, like Qwen-VL."""

    def __init__(self):
        super().__init__()
        self.text, self.proj = cases.base_model("llama"), torch.nn.Linear(6, 32)

    def forward(self, input_ids, pixel_values, image_grid_thw, labels):
        embeds = self.text.get_input_embeddings()(input_ids).clone()
        patches = self.proj(pixel_values)
        assert len(patches) == 4 * len(image_grid_thw) == 4 * len(input_ids)
        embeds[:, :4] = patches.view(len(input_ids), 4, -1)
        return self.text(inputs_embeds=embeds, labels=labels)


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_inputs_with_several_entries_per_sample(rows):
    ids = cases.batch("llama", rows=rows)["input_ids"]
    inputs = {"pixel_values": torch.randn(4 * rows, 6), "image_grid_thw": torch.tensor([[1, 2, 2]] * rows)}
    model = get_peft_model(Pictures(), cases.adapter("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdafreezeWarning)
        made = plan(model, inputs={**inputs, "input_ids": ids, "labels": ids}, target="cpu", device_memory="1MiB")
    assert made.settings["batch_size"] == rows
    with SavedBytes(model) as saved:
        model(**inputs, input_ids=ids, labels=ids)
    assert made.plain.saved == saved.total
    fits = made.micro_batches["plain"]
    assert fits > rows
    more = plan(model, inputs={
        "pixel_values": torch.randn(4 * fits, 6), "image_grid_thw": torch.tensor([[1, 2, 2]] * fits),
        "input_ids": (ids := cases.batch("llama", rows=fits)["input_ids"]), "labels": ids,
    }, target="cpu")  # fmt: skip
    assert more.plain.peak <= 2**20


def test_how_many_samples_fit_is_unknown_if_inputs_cannot_be_resized():
    ids = cases.batch("llama", rows=2)["input_ids"]
    inputs = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(24).view(1, 24)[:, :12].expand(1, 12)}

    class OnlyTwo(Pictures):
        def forward(self, input_ids, labels, position_ids):
            if len(input_ids) != 2:
                raise ValueError("two samples")
            return self.text(input_ids=input_ids, labels=labels)

    model = get_peft_model(OnlyTwo(), cases.adapter("llama"))
    with pytest.warns(AdafreezeWarning, match="How many samples fit is not known: .*only with 2 samples"):
        made = plan(model, inputs=inputs, target="cpu", device_memory="1MiB")
    assert made.micro_batches == {} and len(made.steps) == 4


def test_embeddings_that_require_grad_are_a_cause():
    model = cases.lora_model("llama")
    assert not any("require grad" in cause for cause in plan(model, inputs=cases.batch("llama")).causes)
    model.enable_input_require_grads()
    assert any("require grad" in cause for cause in plan(model, inputs=cases.batch("llama")).causes)


def test_a_quantized_base_is_marked_as_an_estimate():
    plain, nf4, int8 = (planned("llama", dtype="bfloat16", quantization=q) for q in (None, "nf4", "int8"))
    assert nf4.plain.weights < int8.plain.weights < plain.plain.weights
    assert plain.plain.saved == nf4.plain.saved and not plain.estimated
    assert nf4.estimated and "nf4" in nf4.estimated[0]


def test_mixed_precision_saves_less():
    plain, mixed = (planned("llama", mixed_precision=mixed) for mixed in (False, True))
    assert mixed.plain.saved < plain.plain.saved


# Models that cannot be rehearsed.


def test_a_model_that_reads_its_values_is_measured_for_real(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    expected = planned("llama")
    original = LlamaMLP.forward

    def reads_values(self, x):
        assert x.detach().abs().max().item() >= 0
        return original(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", reads_values)
    with pytest.warns(AdafreezeWarning, match="LlamaMLP cannot be built or run without data"):
        made = planned("llama")
    assert [s.saved for s in made.steps] == [s.saved for s in expected.steps]
    assert [s.peak for s in made.steps] == pytest.approx([s.peak for s in expected.steps], rel=0.03)


def test_a_model_that_reads_values_while_it_is_built_is_measured_for_real(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaModel

    expected = planned("llama")
    original = LlamaModel.__init__

    def reads_values(self, *args, **kwargs):
        original(self, *args, **kwargs)
        torch.ones(4).numpy()

    monkeypatch.setattr(LlamaModel, "__init__", reads_values)
    with pytest.warns(AdafreezeWarning, match="cannot be built or run without data"):
        made = planned("llama")
    assert [s.saved for s in made.steps] == [s.saved for s in expected.steps]


# Bad input.


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"task": "chat"}, ConfigError, "task"),
        ({"target": "tpu"}, ConfigError, "target"),
        ({"quantization": "int2"}, ConfigError, "quantization"),
        ({"optim": "adamm"}, ConfigError, "optim"),
        ({"dtype": "int8"}, ConfigError, "dtype"),
        ({"batch_size": 0}, ConfigError, "empty"),
        ({"max_length": 0}, ConfigError, "empty"),
        ({"max_length": 65}, ConfigError, "the model reads 64 tokens"),
        ({"device_memory": "RTX 9090"}, ConfigError, "no GPU of that name"),
        ({"device_memory": "6 parsecs"}, ConfigError, "parsecs"),
        ({"device_memory": "4090"}, ConfigError, r"(?s)3\.99 KiB.*--device_memory 'RTX 4090'"),
        ({"device_memory": "24"}, ConfigError, r"(?s)24 B.*--device_memory 24GiB"),
        ({"device_memory": 0}, ConfigError, "device_memory"),
        ({"device_memory": -1}, ConfigError, "device_memory"),
        ({"device_memory": "500MiB"}, ConfigError, "CUDA itself needs"),
    ],
)
def test_bad_settings(options, error, text):
    config = cases.base_model("llama").config
    with pytest.raises(error, match=text) as caught:
        plan(config, cases.adapter("llama"), **{"max_length": 16, **options})
    assert caught.value.fix


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"hidden_size": 64}', "model_type"),
        ('{"model_type": "bert", "hidden_size": 65}', "not a multiple"),
        ('{"model_type": "bert", "hidden_size": "many"}', "cannot be loaded|can be built"),
        ('{"model_type": "bert", ', "not a valid JSON|JSON"),
        ('{"model_type": "unheard-of"}', "unheard-of"),
        ('{"model_type": "vit"}', "does not do text-classification"),
    ],
)
def test_bad_configurations(tmp_path, content, text):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=text):
        plan(str(tmp_path / "config.json"), cases.adapter("bert"), task="text-classification", max_length=16)


def test_a_missing_model_or_adapter_is_refused(tmp_path):
    with pytest.raises(ModelError, match="There is no configuration"):
        plan(str(tmp_path / "config.json"), cases.adapter("bert"))
    with pytest.raises(ModelError, match="no adapters"):
        plan(cases.base_model("llama"), inputs=cases.batch("llama"))


def test_a_plan_is_plain_data():
    made = planned("bert", device_memory="1GiB")
    assert json.loads(json.dumps(made.to_dict()))["plain"] == dataclasses.asdict(made.plain)
    assert all(isinstance(size, int) and size > 4 for size in GPUS.values())
