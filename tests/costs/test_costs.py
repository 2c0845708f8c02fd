"""Counted bytes and FLOPs against hand-computed ones."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import cases
from adafreeze.costs import CountFlops, Meter, SavedBytes


def test_a_linear_layer_saves_its_input_and_no_parameter():
    layer = nn.Linear(8, 4)
    x = torch.randn(16, 8)
    with SavedBytes(layer) as saved:
        layer(x).sum()
    assert saved.total == 16 * 8 * 4  # the input, for the weight's gradient; the weight itself does not count


def test_a_storage_counts_once_however_many_views_are_saved():
    x = torch.randn(16, 8, requires_grad=True)
    with SavedBytes(nn.Identity()) as saved:
        _ = x[:8] * x[8:], x.t() * x.t()
    assert saved.total == 16 * 8 * 4


def test_nothing_is_saved_without_gradients():
    layer = nn.Linear(8, 4).requires_grad_(False)
    with SavedBytes(layer) as saved:
        layer(torch.randn(16, 8)).relu()
    assert saved.total == 0


def test_blocks_may_be_nested_and_sparse_tensors_count():
    x = torch.randn(16, 8, requires_grad=True)
    with SavedBytes(nn.Identity()) as outer:
        x.exp()
        with SavedBytes(nn.Identity()) as inner:
            x.exp()
    assert (outer.total, inner.total) == (2 * 512, 512)  # exp saves its result
    values = torch.randn(5, requires_grad=True)
    with SavedBytes(nn.Identity()) as saved:
        torch.sparse.mm(torch.sparse_coo_tensor(torch.arange(5).repeat(2, 1), values, (5, 5)), x[:5])
    assert saved.total > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_recomputes_is_not_saved(reentrant):
    layers = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
    x = torch.randn(16, 8, requires_grad=True)
    with SavedBytes(layers) as whole:
        layers(x)
    with SavedBytes(layers) as saved:
        checkpoint(layers, x, use_reentrant=reentrant)
    assert saved.total <= 16 * 8 * 4 < whole.total


def test_a_linear_layer_is_two_flops_a_weight_a_row():
    layer = nn.Linear(8, 4, bias=False)
    x = torch.randn(16, 8, requires_grad=True)
    with CountFlops() as count:
        y = layer(x)
        assert count.total == 2 * 16 * 8 * 4
        y.sum().backward()
    assert count.total == 3 * 2 * 16 * 8 * 4  # forward, gradient of the input, gradient of the weight


def test_inference_mode_counts_too():
    with torch.inference_mode(), CountFlops() as count:
        nn.Linear(8, 4)(torch.randn(16, 8))
    assert count.total == 2 * 16 * 8 * 4


def test_attention_on_the_cpu_counts_as_its_products():
    batch, heads, length, width = 2, 3, 16, 8
    product = 2 * batch * heads * length * length * width
    counts = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        q, k, v = (torch.randn(batch, heads, length, width, requires_grad=True) for _ in range(3))
        with sdpa_kernel(backend), CountFlops() as count:
            out = nn.functional.scaled_dot_product_attention(q, k, v)
            forward = count.total
            out.sum().backward()
        counts[backend] = (forward, count.total - forward)
    # Forward QKᵀ and PV; backward four gradients, and the fused kernel computes QKᵀ once more.
    assert counts[SDPBackend.MATH] == (2 * product, 4 * product)
    assert counts[SDPBackend.FLASH_ATTENTION] == (2 * product, 5 * product)


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_counting_changes_no_loss_and_no_gradient_by_a_bit(family):
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


def test_the_meter_adds_up_to_what_counting_every_step_gives():
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
    assert summary["steps"] == 6 and len(meter.costs) == 5
    assert summary["flops"] == sum(flops)
    assert summary["peak_saved_bytes"] == max(saved_bytes)
    assert summary["mean_saved_bytes"] == pytest.approx(sum(saved_bytes) / 6)
    assert [cost.saved_bytes for cost in meter.series()] == saved_bytes


def test_the_meter_counts_anew_when_the_state_changes():
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
    costs = [cost.saved_bytes for cost in meter.series()]
    assert costs[0] == costs[1] > costs[2] == costs[3]
