"""As few blocks as possible are checkpointed, and the result is the same."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
from adafreeze.costs import SavedBytes
from adafreeze.memory.checkpointing import Checkpointing, Recomputed, fewest_checkpointed, least_recomputed
from adafreeze.model import find_stacks

LIKE = {("layers", index): (10, 5) for index in range(6)}


def additive(costs, plain):
    return lambda chosen: plain - sum(costs[name][0] for name in chosen)


def test_none_if_all_fit():
    assert fewest_checkpointed(LIKE, additive(LIKE, 60), 60) == frozenset()


def test_identical_blocks_from_the_bottom_up():
    chosen = fewest_checkpointed(LIKE, additive(LIKE, 60), 35)
    assert sorted(index for _, index in chosen) == [0, 1, 2]


def test_the_lowest_block_comes_first_even_if_it_frees_a_little_less():
    costs = LIKE | {("layers", 0): (9, 5)}
    assert sorted(index for _, index in fewest_checkpointed(costs, additive(costs, 60), 42)) == [0, 1]


def test_none_returned_if_all_blocks_are_not_enough():
    assert fewest_checkpointed(LIKE, additive(LIKE, 100), 39) is None
    assert fewest_checkpointed({}, lambda chosen: 5, 4) is None


def test_blocks_that_free_nothing_are_not_checkpointed():
    costs = LIKE | {("layers", 0): (0, 5), ("layers", 1): (-3, 5)}
    assert sorted(index for _, index in fewest_checkpointed(costs, additive(costs, 60), 45)) == [2, 3]


def test_different_blocks_by_bytes_freed_per_flop():
    costs = {
        ("a", 0): (10, 100),
        ("a", 1): (10, 10),
        ("a", 2): (40, 40),
        ("a", 3): (2, 1),
    }
    assert fewest_checkpointed(costs, additive(costs, 62), 52) == {("a", 1)}
    assert fewest_checkpointed(costs, additive(costs, 62), 22) == {("a", 2)}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=6),
    st.integers(0, 320),
)
def test_it_fits_if_possible_and_no_chosen_block_is_unnecessary(blocks, excess):
    costs = {("layers", index): block for index, block in enumerate(blocks)}
    peak = additive(costs, 1000)
    chosen = fewest_checkpointed(costs, peak, 1000 - excess)
    if sum(freed for freed, _ in costs.values()) < excess:
        assert chosen is None
        return
    assert peak(chosen) <= 1000 - excess
    flops = {name: cost for name, (_, cost) in costs.items()}
    every = itertools.chain.from_iterable(itertools.combinations(costs, n) for n in range(len(costs) + 1))
    best = min(sum(flops[name] for name in some) for some in every if peak(some) <= 1000 - excess)
    assert sum(flops[name] for name in chosen) <= 2 * best + max(flops.values())  # greedy, and not far off


BETWEEN = {name: (4, 1) for name in LIKE}


def held(recomputed):
    return 60 - 10 * len(recomputed.full) - 4 * len(recomputed.selective)


def test_blocks_are_selective_before_any_is_recomputed_whole():
    chosen = least_recomputed(LIKE, BETWEEN, held, 49)
    assert not chosen.full and sorted(index for _, index in chosen.selective) == [0, 1, 2]


def test_as_few_whole_blocks_as_possible_and_no_more_selective_ones_than_needed():
    chosen = least_recomputed(LIKE, BETWEEN, held, 36)
    assert not chosen.full and len(chosen.selective) == 6
    chosen = least_recomputed(LIKE, BETWEEN, held, 30)
    assert sorted(index for _, index in chosen.full) == [0] and len(chosen.selective) == 5
    chosen = least_recomputed(LIKE, BETWEEN, held, 34)
    assert len(chosen.full) == 1 and len(chosen.selective) == 4
    assert len(least_recomputed(LIKE, BETWEEN, held, 0).full) == 6
    assert least_recomputed(LIKE, BETWEEN, held, -1) is None


@pytest.mark.parametrize("between", [{}, {name: (4, 3) for name in LIKE}], ids=["impossible", "costly"])
def test_without_selective_checkpointing_whole_blocks_are_recomputed(between):
    chosen = least_recomputed(LIKE, between, held, 45)
    assert not chosen.selective and len(chosen.full) == 2


def set_up(family, checkpointed=(), dropout=0.1):
    model = cases.lora_model(family, blocks=4, dropout=dropout, lora_dropout=dropout)
    stacks = find_stacks(model)
    for index in checkpointed:
        stacks[0].blocks[index].gradient_checkpointing = True
    recompute = Checkpointing(model, stacks)
    recompute.install()
    return model, recompute


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_every_choice_gives_the_same_loss_and_gradients(family, dropout):
    batch, results = cases.batch(family), []
    model, recompute = set_up(family, dropout=dropout)
    names = list(recompute.blocks)
    for chosen in ([], names, names[:2], names[1::2], names[-1:]):
        recompute.recomputed = Recomputed(full=frozenset(chosen))
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        with SavedBytes(model) as saved:
            loss = model(**batch).loss
        loss.backward()
        results.append((saved.total, loss, [p.grad for p in model.parameters() if p.requires_grad]))
    for saved, loss, gradients in results[1:]:
        assert torch.equal(loss, results[0][1]) and saved < results[0][0]
        for a, b in zip(gradients, results[0][2], strict=True):
            # With dropout some CPUs' kernels sum in another order, by where in memory a mask lies: measured 3e-8.
            assert torch.equal(a, b) if dropout == 0 else torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_it_replaces_the_models_own_checkpointing_until_restored():
    model, recompute = set_up("llama", checkpointed=(1, 3))
    layers = model.get_base_model().model.layers
    assert [index for _, index in recompute.blocks] == [1, 3]
    assert not any(layer.gradient_checkpointing for layer in layers)
    recompute.restore()
    assert [layer.gradient_checkpointing for layer in layers] == [False, True, False, True]
    assert not any("forward" in vars(layer) for layer in layers)


def test_evaluation_keeps_the_cache_for_generation():
    model, recompute = set_up("gpt2")
    recompute.recomputed = recompute.all_full
    batch = {name: value for name, value in cases.batch("gpt2").items() if name != "labels"}
    with torch.no_grad():
        model.eval()
        assert model(**batch, use_cache=True).past_key_values.get_seq_length() == batch["input_ids"].shape[1]
