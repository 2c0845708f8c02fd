"""A rehearsal on fake tensors counts the bytes and FLOPs of the real step exactly."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model

import cases
from adafreeze.costs import CountFlops, SavedBytes, StorageTracker
from adafreeze.memory import rehearse
from adafreeze.memory.rehearsal import failing_module, largest_that_fits


def adapted(family, kind="lora", dtype=torch.float32, dropout=0.0, checkpointing=False):
    base = cases.base_model(family, dropout=dropout).to(dtype)
    model = get_peft_model(base, cases.adapter(family, kind, dropout)).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def batch_for(family, dtype=torch.float32):
    batch = cases.batch(family, length=None)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def measured(model, batch, gradients):
    """Counts of the real step, without rehearse()."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad and gradients else None
    with StorageTracker() as tracker:
        tracker.hold(*model.parameters(), *model.buffers(), *batch.values())
        tracker.hold(*(p.grad for p in model.parameters() if p.grad is not None))
        with SavedBytes(model) as saved, CountFlops() as forward:
            loss = model(**batch).loss
        with CountFlops() as backward:
            loss.backward()
    return saved.total, tracker.peak, forward.total, backward.total


def counts(step):
    return step.saved, step.peak, step.forward_flops, step.backward_flops


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_bytes_peak_and_flops_are_those_of_the_real_step(family, dtype, dropout, checkpointing):
    model = adapted(family, dtype=dtype, dropout=dropout, checkpointing=checkpointing)
    batch = batch_for(family, dtype)
    assert counts(rehearse(model, batch)) == measured(model, batch, gradients=True)


@pytest.mark.parametrize("kind", ["dora", "ia3"])
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_other_adapters_and_a_first_micro_batch_are_counted_exactly(family, kind):
    model, batch = adapted(family, kind), batch_for(family)
    step = rehearse(model, batch, gradients=False)
    assert counts(step) == measured(model, batch, gradients=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert step.gradients == sum(p.numel() * p.element_size() for p in trained)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_model_on_meta_gives_the_same(family):
    real, batch = adapted(family), batch_for(family)
    with torch.device("meta"):
        model = type(real.get_base_model())(copy.deepcopy(real.get_base_model().config))
    model = get_peft_model(model, cases.adapter(family), low_cpu_mem_usage=True).train()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert rehearse(model, batch) == rehearse(real, batch)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_rehearsal_changes_nothing():
    model, batch = adapted("bert", dropout=0.1), batch_for("bert")
    weights = {name: parameter for name, parameter in model.named_parameters()}
    buffers = {name: buffer for name, buffer in model.named_buffers()}
    values = {name: parameter.detach().clone() for name, parameter in weights.items()}
    model(**batch).loss.backward()
    gradients = {name: parameter.grad for name, parameter in weights.items()}
    torch.manual_seed(3), random.seed(3)
    expected = torch.rand(3), random.random()
    torch.manual_seed(3), random.seed(3)
    attention, dropout = torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.dropout
    with CountFlops() as flops, StorageTracker() as tracker, SavedBytes(model) as saved:
        rehearse(model, batch, target="cuda")
    assert (flops.total, tracker.peak, saved.total) == (0, 0, 0)  # counters around it see nothing
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert all(parameter.grad is gradients[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(parameter, values[name]) for name, parameter in model.named_parameters())
    assert torch.nn.functional.scaled_dot_product_attention is attention and torch.nn.functional.dropout is dropout


def test_tied_weights_count_once():
    model = adapted("gpt2")  # its head is tied to the embeddings
    step = rehearse(model, batch_for("gpt2"))
    once = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in (*model.parameters(), *model.buffers())
    }
    assert step.resident == sum(once.values())


def test_cuda_saves_other_tensors_of_attention_and_dropout():
    plain = [rehearse(adapted("bert"), batch_for("bert"), target=target).saved for target in ("cpu", "cuda")]
    dropped = [rehearse(adapted("bert", dropout=0.1), batch_for("bert"), target=t).saved for t in ("cpu", "cuda")]
    assert plain[1] == pytest.approx(plain[0], rel=0.1)  # log-sum-exp of another layout
    assert dropped[1] < 0.8 * dropped[0]  # no attention probabilities, and masks of one byte


def test_cuda_operators_have_the_same_flops():
    for family in cases.FAMILIES:
        steps = [rehearse(adapted(family), batch_for(family), target=target) for target in ("cpu", "cuda")]
        assert steps[1].forward_flops == steps[0].forward_flops, family


def test_the_share_of_each_block():
    model, batch = adapted("llama"), batch_for("llama")
    blocks = list(model.get_base_model().model.layers)
    step = rehearse(model, batch, parts=blocks)
    saved, flops = zip(*step.parts, strict=True)
    assert len(set(flops)) == 1 and 0 < sum(flops) < step.forward_flops
    assert len(set(saved[1:])) == 1 and 0 < sum(saved) < step.saved


class ReadsValues(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x):
        return {"loss": self.inner(x).sum() if self.inner(x).max() > 0 else self.inner(x).mean()}


def test_a_model_that_reads_values_is_named_and_not_changed():
    model = torch.nn.Sequential(ReadsValues())
    weights = [id(parameter) for parameter in model.parameters()]
    with pytest.raises(Exception) as caught:
        rehearse(model, {"input": torch.ones(2, 4)})
    assert failing_module(caught.value) == "ReadsValues"
    assert [id(parameter) for parameter in model.parameters()] == weights
    real = rehearse(model, {"input": torch.ones(2, 4)}, fake=False)
    assert real.saved > 0 and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("limit", "fits"), [(99, 0), (100, 0), (109, 0), (110, 1), (159, 5), (160, 6), (500, 40), (10**6, 64)]
)
def test_the_largest_micro_batch_is_found(limit, fits):
    asked = set()

    def peak(rows):
        asked.add(rows)
        return 100 + 10 * rows

    assert largest_that_fits(peak, 8, peak(8), held=100, limit=limit, most=64) == fits
    assert len(asked) <= 3


def test_the_largest_micro_batch_if_the_peak_moves_to_another_moment():
    def peak(rows):
        return max(200 + rows, 100 + 10 * rows)

    assert largest_that_fits(peak, 4, peak(4), held=100, limit=300, most=64) == 20


class DropsAMaskOfOnes(torch.nn.Module):
    """Like transformers 4."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x, mask):
        x = self.linear(x)
        return SimpleNamespace(loss=(x if torch.all(mask == 1) else x * mask.log()).exp().sum())


def test_a_given_mask_counts_as_one_with_padding():
    model, x = DropsAMaskOfOnes(), torch.ones(3, 4)
    padded = torch.tensor([1.0, 1.0, 1.0, 0.5])
    expected = measured(model, {"x": x, "mask": padded}, gradients=True)
    for mask in (padded, torch.ones(4)):
        assert counts(rehearse(model, {"x": x, "mask": mask})) == expected
    assert measured(model, {"x": x, "mask": torch.ones(4)}, gradients=True)[0] < expected[0]
