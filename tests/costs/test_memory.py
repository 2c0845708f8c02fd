"""Saved and live bytes against hand-computed ones."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cases
from adafreeze.costs import SavedBytes, StorageTracker


def test_a_linear_layer_saves_its_input_and_no_parameter():
    layer = nn.Linear(8, 4)
    x = torch.randn(16, 8)
    with SavedBytes(layer) as saved:
        layer(x).sum()
    assert saved.total == 16 * 8 * 4  # the input, for the weight's gradient; the weight itself does not count


def test_a_storage_with_many_saved_views_counts_once():
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


def test_a_small_network_by_hand():
    # float32, 16 rows. Linear(8, 64): its input, 16·8, and the weight, which is a parameter and does not count.
    # GELU: its input, 16·64. Linear(64, 8): its input, 16·64. Sum: nothing. Bytes: 4·(128 + 1024 + 1024) = 8704.
    network = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
    with SavedBytes(network) as saved:
        network(torch.randn(16, 8)).sum()
    assert saved.total == 4 * (16 * 8 + 16 * 64 + 16 * 64) == 8704
    # With the first layer frozen neither it nor GELU has a gradient: only the second layer's input is saved.
    network[0].requires_grad_(False)
    with SavedBytes(network) as saved:
        network(torch.randn(16, 8)).sum()
    assert saved.total == 4 * 16 * 64


def test_buffers_and_views_of_parameters_do_not_count():
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(8, 8))
    model.register_buffer("scale", torch.randn(8, 8))
    x = torch.randn(8, 8, requires_grad=True)

    def products():  # each saves both factors, or views of them
        return x[:4] * model.weight.t()[:4], x[:4] * model.scale[:4]

    with SavedBytes(model) as saved:
        products()
    assert saved.total == 8 * 8 * 4  # x alone, once
    with SavedBytes(nn.Identity()) as saved:
        products()
    assert saved.total == 3 * 8 * 8 * 4  # weights of another model count


def test_a_saved_view_keeps_its_whole_base():
    x = torch.randn(16, 8, requires_grad=True)
    with SavedBytes(nn.Identity()) as saved:
        _ = x[:1] * x[:1]
    assert saved.total == 16 * 8 * 4


def test_dropout_counts_its_mask_each_time():
    x = torch.randn(16, 8, requires_grad=True)
    with SavedBytes(nn.Identity()) as one:
        nn.functional.dropout(x, 0.5)
    with SavedBytes(nn.Identity()) as two:
        nn.functional.dropout(x, 0.5)
        nn.functional.dropout(x, 0.5)
    assert 16 * 8 <= one.total <= 16 * 8 * 4 and two.total == 2 * one.total


def test_counters_of_two_models_each_ignore_their_own_weights():
    one, two = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    x = torch.randn(16, 8, requires_grad=True)
    with SavedBytes(one) as of_one, SavedBytes(two) as of_two:
        two(one(x))  # saved: both inputs (512 each) and both weights (256 each), each weight known to one of them
    assert of_one.total == of_two.total == 512 + 512 + 256


def test_an_error_removes_the_counter():
    x = torch.randn(16, 8, requires_grad=True)
    broken = SavedBytes(nn.Identity())
    with pytest.raises(KeyError), broken:
        raise KeyError
    with SavedBytes(nn.Identity()) as saved:
        x.exp()
    assert (saved.total, broken.total) == (512, 0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_saves_its_input_and_recomputed_tensors_do_not_count(reentrant):
    layers = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
    x = torch.randn(16, 8, requires_grad=True)
    with SavedBytes(layers) as saved:
        out = checkpoint(layers, x, use_reentrant=reentrant)
        forward = saved.total
        out.sum().backward()
    assert forward == saved.total == 16 * 8 * 4
    assert layers[0].weight.grad is not None


def test_counting_does_not_change_a_gradient():
    grads = []
    for counted in (False, True):
        model, batch = cases.lora_model("bert"), cases.batch("bert")
        torch.manual_seed(3)
        if counted:
            with SavedBytes(model):
                model(**batch).loss.backward()
        else:
            model(**batch).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_tracker_counts_what_is_alive_and_its_peak():
    with StorageTracker() as tracker:
        a = torch.ones(256)
        b = a + 1
        view = b[:4]
        assert tracker.now == 2 * 1024
        del b
        assert tracker.now == 2 * 1024  # the view keeps it
        del view
        assert tracker.now == 1024 and tracker.peak == 2 * 1024
        tracker.reset_peak()
        assert tracker.peak == 1024
        tracker.hold(a, a[1:], torch.ones(1))
    assert tracker.now == 1024  # the one element is freed again


def test_the_tracker_rounds_like_the_allocator():
    with StorageTracker(rounding=512) as tracker:
        kept = [torch.ones(1), torch.ones(129)]
        assert tracker.now == 512 + 1024 and len(kept) == 2


def test_a_reused_address_is_counted_again():
    with StorageTracker() as tracker:
        for _ in range(20):
            one = torch.ones(1024)
            assert tracker.now == 4096
            del one
            assert tracker.now == 0
    assert tracker.peak == 4096


def test_the_tracker_counts_recomputed_tensors_and_saved_bytes_does_not():
    family = "bert"
    peaks, saved = [], []
    for checkpointing in (False, True):
        model, batch = cases.lora_model(family, blocks=8), cases.batch(family, rows=8, length=24)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with StorageTracker() as tracker:
            with SavedBytes(model) as count:
                loss = model(**batch).loss
            loss.backward()
        peaks.append(tracker.peak), saved.append(count.total)
    assert saved[1] < 0.2 * saved[0] and saved[1] / saved[0] < peaks[1] / peaks[0] < 0.6
