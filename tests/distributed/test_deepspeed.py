"""DeepSpeed ZeRO 0 to 3 on two CPU processes: frozen weights do not move, live ones train as without DeepSpeed."""

import json

import pytest
import torch
import worker
from launch import start, wait

from adafreeze.parallel.deepspeed import _LAYOUTS

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.xdist_group("deepspeed")  # all tests share one start of the processes

FREEZE_AT = 3
STAGES = (0, 1, 2, 3)
FLAT = (1, 2, 3)
FAMILIES = [("llama", stage) for stage in STAGES] + [("bert", 0), ("bert", 2)]
HALF = {
    **{f"bf16 {stage}": {"precision": "bf16", "stage": stage} for stage in STAGES},
    **{f"fp16 {stage}": {"precision": "fp16", "stage": stage} for stage in (0, 2)},
    "bf16, gradients in fp32": {"precision": "bf16", "stage": 1, "grads": "fp32"},
}
# Four gradients are added in another order, through six AdamW steps of 2e-2: measured 1e-6.
TOLERANCE = 1e-5
LAYOUTS = {
    "mixed 1": {"stage": 1, "mixed": True},
    "mixed 2": {"stage": 2, "mixed": True, "round_robin_gradients": True},
    "mixed 3": {"stage": 3, "mixed": True, "sub_group_size": 100, "offload_optimizer": {"device": "cpu"}},
    "offloaded 2": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}
SCORES = [("grad_norm", 0), ("grad_norm", 1), ("weight_change", 2), ("weight_change", 3)]
# Runs by scores in a plain loop: settings of the run and of SafeConfig.
SAFE = {
    **{f"safe {stage}": {"stage": stage} for stage in STAGES},
    "safe bert": {"stage": 2, "family": "bert"},
    "safe t5": {"stage": 3, "family": "t5"},
    "safe inside": {"stage": 2, "inside": True},
    "safe local": {"stage": 2, "score": "local_cka"},
    "safe weights": {"stage": 2, "score": "weight_change"},
    "safe gradients": {"stage": 0, "score": "grad_norm"},
    "safe by hand": {"stage": 2, "freeze": ["model.layers.0"], "policy": "bottom_up"},
    **{f"safe offload {stage}": {"stage": stage, "freeze_at_start": 0.5, "offload": "disk"} for stage in (0, 1, 2)},
}

RUNS = {
    "plain llama": {"stage": None},
    "plain bert": {"stage": None, "family": "bert"},
    **{f"{family} {stage}": {"stage": stage, "family": family, "masters": stage > 0} for family, stage in FAMILIES},
    **{f"not notified {stage}": {"stage": stage, "notify": False} for stage in (0, 1, 2)},
    **{name: {**settings, "masters": True} for name, settings in HALF.items()},
    "overflow": {"stage": 2, "precision": "fp16", "power": 24, "steps": 9},
    **LAYOUTS,
    **{f"sideways {stage}": {"stage": stage, "optimizer": "Sideways"} for stage in (1, 2)},
    **{how: {"do": "refused", "how": how} for how in ("renamed", "by itself", "another model")},
    **{f"refused {score} {stage}": {"do": "refused", "stage": stage, "score": score} for score, stage in SCORES},
    "refused budget": {"do": "refused", "memory_budget": "1GiB"},
    "refused offload": {"do": "refused", "stage": 3, "offload": "disk"},
    **{f"resumed {stage}": {"do": "resumed", "stage": stage} for stage in (0, 1, 2)},
    "resumed bf16": {"do": "resumed", "stage": 1, "precision": "bf16"},
    "released": {"do": "released"},
    **{name: {"do": "safely", **settings} for name, settings in SAFE.items()},
    **{
        f"{'lean' if lean else 'not lean'} {stage}": {"do": "safely", "stage": stage, "lora_dropout": 0.1, "lean": lean}
        for stage in STAGES
        for lean in (True, False)
    },
    **{f"safe stopped {stage}": {"do": "safely", "stage": stage, "stop": 10} for stage in (0, 2)},
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of all runs on both ranks."""
    folder = tmp_path_factory.mktemp("zero")
    processes = start("_zero_worker.py", 2, folder, json.dumps(RUNS), DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    wait(processes, folder, seconds=900)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def results(ranks, name):
    for answers in ranks:
        assert not isinstance(answers[name], str), answers[name]
    return [answers[name] for answers in ranks]


def moved(run, names, start=FREEZE_AT - 1):
    """The largest change of the weights ``names`` since the freeze."""
    first, last = run["weights"][start], run["weights"][-1]
    return max(float((last[name] - first[name]).abs().max()) for name in names)


def live(run):
    return [name for name in run["weights"][0] if name not in run["frozen"]]


def stands_still(run):
    at_freeze = run["weights"][FREEZE_AT - 1]
    return all(
        torch.equal(weights[name], at_freeze[name]) for weights in run["weights"][FREEZE_AT:] for name in run["frozen"]
    )


@pytest.mark.parametrize(("family", "stage"), FAMILIES)
def test_frozen_weights_do_not_move_and_live_ones_train_as_without_deepspeed(ranks, family, stage):
    plain = results(ranks, f"plain {family}")[0]
    for run in results(ranks, f"{family} {stage}"):
        assert len(run["frozen"]) == 8 and stands_still(run)
        for sharded, whole in zip(run["weights"], plain["weights"], strict=True):
            for name in whole:
                torch.testing.assert_close(sharded[name], whole[name], rtol=0, atol=TOLERANCE)
        assert moved(run, live(run)) > 1e-2


def copies_stand_still(run):
    """Only the copies of frozen weights do not move."""
    last, at_freeze = run["masters"][-1], run["masters"][FREEZE_AT - 1]
    assert {name for name in last if torch.equal(last[name], at_freeze[name])} == set(run["frozen"]) & set(last)
    return set(last)


@pytest.mark.parametrize("stage", FLAT)
def test_the_flat_copies_do_not_move(ranks, stage):
    of_ranks = [copies_stand_still(run) for run in results(ranks, f"llama {stage}")]
    assert set.union(*of_ranks) == set(results(ranks, f"llama {stage}")[0]["weights"][0])


@pytest.mark.parametrize("stage", [1, 2])
def test_without_after_freeze_frozen_weights_move(ranks, stage):
    for run in results(ranks, f"not notified {stage}"):
        assert moved(run, run["frozen"]) > 1e-2


def test_without_flat_copies_frozen_weights_do_not_move(ranks):
    assert all(stands_still(run) for run in results(ranks, "not notified 0"))


@pytest.mark.parametrize("name", HALF)
def test_frozen_weights_and_their_float32_copies_do_not_move_in_half_precision(ranks, name):
    for run in results(ranks, name):
        assert stands_still(run) and moved(run, live(run)) > 1e-3
        assert copies_stand_still(run)


def test_the_runs_cover_all_optimizers_but_the_fused_one(ranks):
    seen = {ranks[0][name]["optimizer"] for name in ("llama 2", "llama 3", *HALF)}
    assert seen == set(_LAYOUTS) - {"FP16_Optimizer"}


def test_steps_that_overflow_after_the_freeze_are_skipped(ranks):
    for run in results(ranks, "overflow"):
        assert FREEZE_AT < run["skipped"][-1] < 9
        assert stands_still(run) and moved(run, live(run)) > 1e-3


@pytest.mark.parametrize("name", LAYOUTS)
def test_frozen_weights_do_not_move_in_other_layouts(ranks, name):
    plain = results(ranks, "plain llama")[0]
    for run in results(ranks, name):
        assert stands_still(run)
        for key in live(run):
            torch.testing.assert_close(run["weights"][-1][key], plain["weights"][-1][key], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("stage", STAGES)
def test_schedulers_and_logs_are_unchanged(ranks, stage):
    for run in results(ranks, f"llama {stage}"):
        assert run["lrs"] == [[pytest.approx(2e-2 * (1 - 0.08 * (step + 1)))] for step in range(6)]


@pytest.mark.parametrize("stage", [1, 2])
def test_an_optimizer_that_ignores_gradients_does_not_move_frozen_weights(ranks, stage):
    for run in results(ranks, f"sideways {stage}"):
        assert stands_still(run) and moved(run, live(run)) > 1e-3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("renamed", "its optimizer is a Another"),
        ("by itself", "a DeepSpeedZeroOptimizer that steps by itself"),
        ("another model", "DeepSpeed's DeepSpeedZeroOptimizer, but the model is neither"),
        ("refused grad_norm 1", "ZeRO-1 takes gradients away"),
        ("refused weight_change 3", "ZeRO-3 keeps every weight in pieces"),
        ("refused budget", "cannot be rehearsed"),
        ("refused offload", "ZeRO-3 spreads the weights over the ranks already"),
    ],
)
def test_unsupported_runs_are_refused_before_the_first_step(ranks, name, message):
    for kind, text in results(ranks, name):
        assert kind == "RunError" and message in text and "Fix: " in text


@pytest.mark.parametrize("name", ["refused grad_norm 0", "refused weight_change 2"])
def test_supported_scores_are_accepted(ranks, name):
    assert results(ranks, name) == [None, None]


@pytest.mark.parametrize("name", [*(f"resumed {stage}" for stage in (0, 1, 2)), "resumed bf16"])
def test_a_resumed_run_equals_one_that_never_stopped(ranks, name):
    for run in results(ranks, name):
        assert set(run["flags"]) == {False}
        assert len(run["adapter"]) == len(run["saved"])
        for key, saved in run["saved"].items():
            assert torch.equal(run["loaded"][key], saved)
            assert torch.equal(run["onward"][key], run["straight"][key])


def test_release_undoes_everything(ranks):
    for run in results(ranks, "released"):
        assert run == {"moved": True, "left": [], "hooks": [0, 0]}


@pytest.fixture(scope="module")
def alone():
    """``alone(family, **config)``: one process without DeepSpeed with the rows of two ranks."""
    kept = {}

    def run(family="llama", **config):
        key = family, str(config)
        if key not in kept:
            kept[key] = worker.train(family, lambda model: model, 0, 1, virtual=2, config=config)
        return kept[key]

    return run


@pytest.mark.parametrize("name", SAFE)
def test_safe_decides_and_trains_as_without_deepspeed(ranks, alone, name):
    config = {key: value for key, value in SAFE[name].items() if key not in ("stage", "inside", "offload")}
    plain, (first, second) = alone(**config), results(ranks, name)
    assert first["history"] == second["history"] == plain["history"] and first["history"][-1], "nothing froze"
    assert not first["moved"] and not second["moved"]
    assert first["scores"] == second["scores"]
    assert ("offload" in SAFE[name]) == (first["logs"].get("safe/offloaded_mib", 0) > 0)
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key])
        # Gradients are added in another order: 1e-7, amplified by 24 steps of AdamW.
        torch.testing.assert_close(value.flatten(), torch.tensor(plain["weights"][key]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_lean_layers_change_nothing_but_what_is_saved(ranks, stage):
    for lean, other in zip(results(ranks, f"lean {stage}"), results(ranks, f"not lean {stage}"), strict=True):
        assert lean["history"] == other["history"]
        assert all(torch.equal(lean["weights"][name], weight) for name, weight in other["weights"].items())
        saved, more = (run["logs"]["safe/saved_mib"] for run in (lean, other))
        # ZeRO-3 has hooks on A and B, so PEFT's forward runs; what is saved there includes gathered weights.
        assert stage == 3 or saved < more


@pytest.mark.parametrize("stage", STAGES)
def test_safe_reports_the_stage_and_caches_the_prefix_below_zero_3(ranks, stage):
    run = results(ranks, f"safe {stage}")[0]
    assert run["parallel"] == f"DeepSpeed ZeRO-{stage}"
    assert ("safe/cache_hit_rate" in run["logs"]) == (stage < 3)


@pytest.mark.parametrize("stage", [0, 2])
def test_safe_resumes_bit_identically_from_a_deepspeed_checkpoint(ranks, stage):
    for whole, parts in zip(results(ranks, f"safe {stage}"), results(ranks, f"safe stopped {stage}"), strict=True):
        assert parts["history"] == whole["history"] and whole["history"][9], "nothing was frozen at the stop"
        assert not parts["moved"]
        for name, value in whole["weights"].items():
            assert torch.equal(parts["weights"][name], value)
