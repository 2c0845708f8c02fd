"""Two and three processes train like one process on the same global batch, and no frozen bit moves."""

from __future__ import annotations

import pytest
import torch
import worker
from launch import found, start, wait

EXACT = ["ddp", "bert", "t5", "find_unused", "static_graph", "bucket_view", "small_buckets", "builtin_hook", "hidden"]
BY_HAND = ["by_hand", "hidden_by_hand"]
OTHER = ["accumulate", "bytes", "budget", "grad_norm", "fp16_hook", "power_sgd", "own_minds", "wander"]
OFFLOAD = ["offload", "offload_before"]
FSDP = ["fsdp2", "fsdp2_bert", "fsdp2_t5", "fsdp2_local"]
LEAN = ["autocast", "fsdp2_autocast"]
ALL = [*EXACT, *BY_HAND, *OTHER, *OFFLOAD, *FSDP, *LEAN]
# The others show the same already.
SLOW = {
    *("static_graph", "bucket_view", "small_buckets", "builtin_hook", "hidden", "hidden_by_hand"),
    *("fsdp2_local", "fsdp2_autocast", "offload_before"),
}
FAMILY = {"bert": "bert", "t5": "t5", "fsdp2_bert": "bert", "fsdp2_t5": "t5"}


def scenarios(names):
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory, request):
    """The scenarios of the tests that were selected on two ranks, in one start of the processes."""
    folder = tmp_path_factory.mktemp("two")
    calls = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    selected = {call.params.get("name") for call in calls} | set(OTHER)
    names = [name for name in ALL if name in selected]
    wait(start("worker.py", 2, folder, *names, CACHE_DIR=str(folder / "cache")), folder)
    return folder


@pytest.fixture(scope="module")
def alone():
    """``alone(family, **settings)``: one process with the rows of two ranks."""
    kept = {}

    def run(family="llama", **settings):
        key = family, str(settings)
        if key not in kept:
            kept[key] = worker.train(family, lambda model: model, 0, 1, virtual=2, **settings)
        return kept[key]

    return run


def largest_difference(one: dict, other: dict) -> float:
    return max(
        float((torch.tensor(one["weights"][name]) - torch.tensor(other["weights"][name])).abs().max())
        for name in one["weights"]
    )


@scenarios(ALL)
def test_ranks_agree_at_every_step_and_nothing_frozen_moves(two, name):
    first, second = found(two, name, 0), found(two, name, 1)
    assert first["history"] == second["history"] and first["history"][-1], "nothing froze"
    assert first["weights"] == second["weights"]
    assert not first["moved"] and not second["moved"]
    assert first["trainable_after_close"] > first["trainable"]
    steps = [len(names) for names in first["history"]]
    assert steps == sorted(steps)
    assert "freeze" in second["events"] and second["scores"] == first["scores"]


@scenarios(EXACT)
def test_ddp_is_bit_identical_to_one_process(two, alone, name):
    one, many = alone(FAMILY.get(name, "llama")), found(two, name)
    assert many["history"] == one["history"]
    assert many["weights"] == one["weights"]


@scenarios(BY_HAND)
def test_frozen_by_hand_before_the_first_step(two, alone, name):
    one = alone(config={"freeze": ["model.layers.0"], "policy": "bottom_up"})
    many = found(two, name)
    assert many["history"][0] == ["model.layers.0"]
    assert many["weights"] == one["weights"]


def test_accumulation_with_no_sync(two, alone):
    # The parts of a step are added in another order: 1e-7 of a gradient, amplified by AdamW.
    assert largest_difference(found(two, "accumulate"), alone(accumulate=2)) < 1e-4


def test_a_budget_is_kept_and_changes_no_weight(two, alone):
    many = found(two, "budget")
    assert many["events"].count("recompute") > 1 and many["logs"]["safe/planned_peak_mib"] < worker.BUDGET / 2**20
    assert many["weights"] == alone()["weights"]


def test_gradient_norms_use_averaged_gradients(two, alone):
    assert found(two, "grad_norm")["weights"] == alone(config={"score": "grad_norm"})["weights"]


def test_fewer_bytes_are_sent_after_each_freeze(two, alone):
    many = found(two, "bytes")
    assert many["weights"] == alone()["weights"]
    frozen = [len(names) for names in many["history"]]
    per_unit = many["bytes"][0] / 3  # one of four is frozen before the first step
    # Units that freeze after a step are not sent in the next.
    assert many["bytes"][1:] == [per_unit * (4 - count) for count in frozen[:-1]]


def test_comm_hooks_still_work_after_a_freeze(two, alone):
    assert largest_difference(found(two, "fp16_hook"), alone()) < 0.05
    assert found(two, "power_sgd")["history"][-1]


def test_rank_0_decides_for_all_ranks(two):
    assert found(two, "own_minds")["history"][-1] == ["model.layers.0"]


def test_ranks_share_a_cache_on_disk(two):
    for rank in (0, 1):
        cache = found(two, "wander", rank)["cache"]
        # Of 24 samples each rank computes the 12 of its first epoch; the next five epochs find all.
        assert cache["misses"] == 12 and cache["hits"] + cache["advanced"] == 5 * 12


@scenarios(OFFLOAD)
def test_each_rank_moves_its_own_weights(two, alone, name):
    for rank in (0, 1):
        many = found(two, name, rank)
        assert "offload" in many["events"] and "offload_off" not in many["events"]
        assert many["logs"]["safe/offloaded_mib"] > 0 and many["cache"]["misses"] <= 12
        assert many["weights"] == alone(config={"freeze_at_start": 0.5})["weights"]


@scenarios(LEAN)
def test_lean_layers_train_like_one_process_whose_layers_are_not(two, alone, name):
    one, many = alone(autocast=True, config={"lean": False}), found(two, name)
    assert many["history"] == one["history"]
    assert many["logs"]["safe/saved_mib"] < one["logs"]["safe/saved_mib"]
    if name == "autocast":
        assert many["weights"] == one["weights"]
    else:
        assert largest_difference(many, one) < 1e-4


@scenarios(FSDP)
def test_fsdp2_equals_one_process_up_to_rounding(two, alone, name):
    settings = {"config": {"score": "local_cka"}} if name == "fsdp2_local" else {}
    one, many = alone(FAMILY.get(name, "llama"), **settings), found(two, name)
    assert many["history"] == one["history"]
    # Reduce-scatter adds in another order: 1e-7 of a gradient, amplified by AdamW.
    assert largest_difference(many, one) < 1e-4
    assert "cache_hit_rate" not in str(many["logs"])


def test_three_ranks(tmp_path, alone):
    wait(start("worker.py", 3, tmp_path, "ddp", "fsdp2"), tmp_path)
    one = worker.train("llama", lambda model: model, 0, 1, virtual=3)
    for name in ("ddp", "fsdp2"):
        ranks = [found(tmp_path, name, rank) for rank in range(3)]
        assert ranks[0]["history"] == ranks[1]["history"] == ranks[2]["history"] == one["history"]
        assert ranks[0]["weights"] == ranks[1]["weights"] == ranks[2]["weights"]
        assert not any(rank["moved"] for rank in ranks)
        assert largest_difference(ranks[0], one) < 1e-4  # thirds round


def test_a_rank_that_differs_stops_all_ranks_and_is_named(tmp_path):
    wait(start("worker.py", 3, tmp_path, "disagree"), tmp_path)
    for rank in range(3):
        error = found(tmp_path, "disagree", rank)["error"]
        assert "'model.layers.1' is frozen on rank 1, not on 0 and 2" in error and "Fix: " in error
