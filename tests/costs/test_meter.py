"""The meter compared with counting every step."""

import pytest
import torch
from torch.utils.data import default_collate

import cases
from adafreeze.costs import CountFlops, Meter, SavedBytes


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_counting_changes_no_bit_of_loss_and_gradients(family):
    def run(counted):
        model = cases.lora_model(family)
        torch.manual_seed(3)
        meter = Meter(model)
        if counted:
            with meter.step(cases.batch(family)):
                loss = model(**cases.batch(family)).loss
                loss.backward()
            assert meter.summary()["flops"] > 0 and meter.summary()["peak_saved_bytes"] > 0
        else:
            loss = model(**cases.batch(family)).loss
            loss.backward()
        return loss, [p.grad for p in model.parameters() if p.requires_grad]

    (loss, grads), (other_loss, other_grads) = run(True), run(False)
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))


def test_the_meter_equals_counting_every_step():
    model = cases.lora_model("bert")
    batches = [cases.batch("bert", rows, length) for rows, length in ((4, 12), (4, 12), (2, 12), (4, 9), (4, None))]
    padded = {**batches[0], "attention_mask": batches[0]["attention_mask"].clone()}
    padded["attention_mask"][0, -3:] = 0
    batches.append(padded)
    meter, flops, saved_bytes = Meter(model), [], []
    for batch in batches:
        with meter.step(batch):
            model(**batch).loss.backward()
    for batch in batches:
        with CountFlops() as count, SavedBytes(model) as saved:
            model(**batch).loss.backward()
        flops.append(count.total)
        saved_bytes.append(saved.total)
    summary = meter.summary()
    assert summary["steps"] == 6 and len(meter.kinds) == 5
    assert summary["flops"] == sum(flops)
    assert summary["peak_saved_bytes"] == max(saved_bytes)
    assert summary["mean_saved_bytes"] == pytest.approx(sum(saved_bytes) / 6)
    assert [cost.saved_bytes for cost in meter.costs] == saved_bytes


def test_the_meter_counts_again_when_the_state_changes():
    model, state = cases.lora_model("bert"), [0]
    meter = Meter(model, lambda: state[0])
    for state[0] in (0, 0, 1, 1):
        if state[0]:
            for parameter in list(model.base_model.model.bert.parameters()):
                parameter.requires_grad_(False)
        with meter.step(cases.batch("bert")):
            loss = model(**cases.batch("bert")).loss
            if loss.requires_grad:
                loss.backward()
    costs = [cost.saved_bytes for cost in meter.costs]
    assert costs[0] == costs[1] > costs[2] == costs[3]


def test_padding_is_part_of_the_kind_and_values_are_not():
    model = cases.lora_model("bert")
    full = cases.batch("bert")
    other = {**full, "input_ids": full["input_ids"].flip(0)}
    padded = {**full, "attention_mask": full["attention_mask"].clone()}
    padded["attention_mask"][0, -3:] = 0
    meter = Meter(model)
    kinds = []
    for batch in (full, other, padded):
        with meter.step(batch):
            model(**batch).loss.backward()
        kinds.append(len(meter.kinds))
    assert kinds == [1, 1, 2]


def test_evaluation_is_another_kind():
    model, batch = cases.lora_model("bert"), cases.batch("bert")
    meter = Meter(model)
    for training in (True, False):
        model.train(training)
        with meter.step(batch):
            model(**batch)
    training, evaluation = meter.costs
    assert training.flops == evaluation.flops and training.saved_bytes > evaluation.saved_bytes  # no dropout masks


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_step_saves_what_its_forward_pass_saved(reentrant):
    model, batch = cases.lora_model("llama"), cases.batch("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with SavedBytes(model) as saved:
        loss = model(**batch).loss
        forward = saved.total
        loss.backward()
    meter = Meter(model)
    with meter.step(batch):
        model(**batch).loss.backward()
    assert meter.summary()["peak_saved_bytes"] == forward


def test_a_step_that_fails_is_not_counted():
    meter = Meter(cases.lora_model("bert"))
    with pytest.raises(KeyError), meter.step({}):
        raise KeyError
    assert meter.summary() == {"steps": 0, "flops": 0, "peak_saved_bytes": 0, "mean_saved_bytes": 0.0}


def test_a_batch_may_contain_more_than_tensors():
    model = cases.lora_model("vit")
    batch = default_collate([cases.sample("vit", index) for index in range(4)]) | {"names": ["a", "b"]}
    meter = Meter(model)
    with meter.step(batch):
        model(pixel_values=batch["pixel_values"], labels=batch["labels"]).loss.backward()
    assert meter.summary()["steps"] == 1 and meter.summary()["flops"] > 0
