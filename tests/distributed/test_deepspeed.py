"""DeepSpeed ZeRO 0 to 3 on the CPU, two processes: what froze stands still, what lives learns as without DeepSpeed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch
from peft import VBLoRAConfig, get_peft_model

from adafreeze.errors import RunError
from adafreeze.freeze.parallel.deepspeed import DeepSpeedZero, engine_of, is_deepspeed, param_groups
from adafreeze.model import find_stacks, find_units
from adafreeze.model.backends import PeftBackend

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.xdist_group("deepspeed")  # one start of the processes serves all

WORKER = Path(__file__).with_name("_zero_worker.py")
FREEZE_AT = 3
STAGES = (0, 1, 2, 3)
FLAT = (1, 2, 3)
PRECISIONS = [("bf16", 0), ("bf16", 1), ("bf16", 2), ("bf16", 3), ("fp16", 0), ("fp16", 2), ("fp16", 3)]
# Sums of four gradients in another order, through six AdamW steps of 2e-2 that divide by their root: measured 1e-6.
TOLERANCE = 1e-5

RUNS = {
    "plain llama": {"stage": None},
    "plain bert": {"stage": None, "family": "bert"},
    **{f"llama {stage}": {"stage": stage} for stage in STAGES},
    **{f"bert {stage}": {"stage": stage, "family": "bert"} for stage in STAGES},
    **{f"untold {stage}": {"stage": stage, "tell": False} for stage in STAGES},
    **{f"{kind} {stage}": {"stage": stage, "precision": kind, "masters": stage > 0} for kind, stage in PRECISIONS},
    "overflow": {"stage": 2, "precision": "fp16", "power": 24, "steps": 9},
    "parts of groups": {"stage": 3, "sub_group_size": 100},
    "offloaded 2": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "offloaded 3": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    **{f"ungrouped {stage}": {"do": "refused", "stage": stage} for stage in STAGES},
    "sideways": {"do": "refused", "how": "sideways"},
    "renamed": {"do": "refused", "how": "renamed"},
    **{f"resumed {stage}": {"do": "resumed", "stage": stage} for stage in STAGES},
    "resumed bf16": {"do": "resumed", "stage": 1, "precision": "bf16"},
    "released": {"do": "released"},
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks tell of all runs."""
    folder = tmp_path_factory.mktemp("zero")
    outputs = [(folder / f"rank{rank}.txt").open("w") for rank in (0, 1)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), str(rank), "2", json.dumps(RUNS)],
            stdout=output, stderr=subprocess.STDOUT, env=environment,
        )
        for rank, output in enumerate(outputs)
    ]  # fmt: skip
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process, output in zip(processes, outputs, strict=True):
            process.kill()
            output.close()
    assert codes == [0, 0], (folder / "rank0.txt").read_text()[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def told(ranks, name):
    for answers in ranks:
        assert not isinstance(answers[name], str), answers[name]
    return [answers[name] for answers in ranks]


def moved(run, names, start=FREEZE_AT - 1):
    """How far the farthest of ``names`` is after the run from where it was at the freeze."""
    first, last = run["weights"][start], run["weights"][-1]
    return max(float((last[name] - first[name]).abs().max()) for name in names)


def live(run):
    return [name for name in run["weights"][0] if name not in run["frozen"]]


def stands_still(run):
    at_freeze = run["weights"][FREEZE_AT - 1]
    return all(
        torch.equal(weights[name], at_freeze[name]) for weights in run["weights"][FREEZE_AT:] for name in run["frozen"]
    )


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_weights_do_not_move_by_one_bit_and_live_ones_learn_as_without_deepspeed(ranks, family, stage):
    plain = told(ranks, f"plain {family}")[0]
    for run in told(ranks, f"{family} {stage}"):
        assert len(run["frozen"]) == 8 and stands_still(run)
        for sharded, whole in zip(run["weights"], plain["weights"], strict=True):
            for name in whole:
                torch.testing.assert_close(sharded[name], whole[name], rtol=0, atol=TOLERANCE)
        assert moved(run, live(run)) > 1e-2


@pytest.mark.parametrize("stage", FLAT)
def test_the_copies_that_are_stepped_stand_still_too(ranks, stage):
    for run in told(ranks, f"llama {stage}"):
        last, at_freeze = run["masters"][-1], run["masters"][FREEZE_AT - 1]
        assert [torch.equal(a, b) for a, b in zip(last, at_freeze, strict=True)] == [True, True, False, False]


@pytest.mark.parametrize("stage", FLAT)
def test_a_run_that_is_not_told_of_the_freeze_moves_what_froze(ranks, stage):
    for run in told(ranks, f"untold {stage}"):
        assert moved(run, run["frozen"]) > 1e-2


def test_without_flat_copies_a_freeze_holds_by_itself(ranks):
    assert all(stands_still(run) for run in told(ranks, "untold 0"))


@pytest.mark.parametrize(("precision", "stage"), PRECISIONS)
def test_frozen_weights_and_their_float32_copies_stand_still_in_half_precision(ranks, precision, stage):
    for run in told(ranks, f"{precision} {stage}"):
        assert stands_still(run) and moved(run, live(run)) > 1e-3
        if stage:
            last, at_freeze = run["masters"][-1], run["masters"][FREEZE_AT - 1]
            assert [torch.equal(a, b) for a, b in zip(last, at_freeze, strict=True)] == [True, True, False, False]


def test_steps_that_overflow_after_the_freeze_are_skipped_as_ever(ranks):
    for run in told(ranks, "overflow"):
        assert FREEZE_AT < run["skipped"][-1] < 9
        assert stands_still(run) and moved(run, live(run)) > 1e-3


@pytest.mark.parametrize("name", ["parts of groups", "offloaded 2", "offloaded 3"])
def test_frozen_weights_stand_still_in_other_layouts(ranks, name):
    plain = told(ranks, "plain llama")[0]
    for run in told(ranks, name):
        assert stands_still(run)
        for key in live(run):
            torch.testing.assert_close(run["weights"][-1][key], plain["weights"][-1][key], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("stage", STAGES)
def test_schedulers_and_logs_see_nothing_of_the_freeze(ranks, stage):
    for run in told(ranks, f"llama {stage}"):
        assert run["lrs"] == [[pytest.approx(2e-2 * (1 - 0.08 * (step + 1)))] for step in range(6)]


@pytest.mark.parametrize("stage", FLAT)
def test_groups_that_mix_units_are_refused_by_name(ranks, stage):
    for kind, message in (answers[f"ungrouped {stage}"] for answers in ranks):
        assert kind == "RunError"
        assert "model.layers.0, model.layers.1" in message and f"ZeRO-{stage}" in message
        assert "adafreeze.param_groups(model)" in message and "optimizer_cls_and_kwargs" in message


def test_groups_do_not_matter_where_nothing_is_flat(ranks):
    assert told(ranks, "ungrouped 0") == [None, None]


def test_an_optimizer_that_moves_weights_at_a_learning_rate_of_0_is_stopped(ranks):
    for kind, message in told(ranks, "sideways"):
        assert kind == "RunError" and "Sideways moves weights at lr=0" in message


def test_a_deepspeed_of_another_make_is_refused(ranks):
    for kind, message in told(ranks, "renamed"):
        assert kind == "RunError" and "its optimizer is a Another" in message and "0.19.8" in message


@pytest.mark.parametrize("name", [*(f"resumed {stage}" for stage in STAGES), "resumed bf16"])
def test_a_resumed_run_is_that_which_was_never_stopped(ranks, name):
    for rank, run in enumerate(told(ranks, name)):
        assert set(run["flags"]) == {False}
        assert run["adapter"] is None if rank and "3" in name else len(run["adapter"]) == len(run["saved"])
        for key, saved in run["saved"].items():
            assert torch.equal(run["loaded"][key], saved)
            assert torch.equal(run["onward"][key], run["straight"][key])


def test_release_takes_everything_back(ranks):
    for run in told(ranks, "released"):
        assert run == {"moved": True, "left": [], "hooks": [0, 0]}


def test_there_is_one_group_for_each_unit_and_one_for_the_rest():
    model = cases.lora_model("bert", modules_to_save=["classifier"])
    groups = param_groups(model, weight_decay=0.1, lr=1e-3)
    units = find_units(model, find_stacks(model), PeftBackend(model))
    assert [group.get("adafreeze_unit") for group in groups] == [*units, None]
    for group, unit in zip(groups, units.values(), strict=False):
        assert {id(p) for p in group["params"]} == {id(p) for p in unit.parameters()}
        assert (group["weight_decay"], group["lr"]) == (0.1, 1e-3)
    assert {id(p) for group in groups for p in group["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    sites = param_groups(model, granularity="site")
    assert len(sites) == 2 * len(units) + 1 and "lr" not in sites[0]


@pytest.mark.filterwarnings("ignore:.*units share parameters")
def test_what_units_share_has_a_group_of_its_own():
    torch.manual_seed(0)
    config = VBLoRAConfig(r=2, num_vectors=8, vector_length=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(cases.base_model("llama"), config)
    *units, bank = param_groups(model)
    assert [group["adafreeze_unit"] for group in units] == [f"model.layers.{block}" for block in range(4)]
    assert "adafreeze_unit" not in bank and len(bank["params"]) == 1
    torch.optim.AdamW([*units, bank], lr=1e-3)  # which refuses a parameter in two groups


def test_a_plain_model_is_not_deepspeeds():
    model = cases.lora_model("llama")
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-3)
    assert engine_of(model) is None and not is_deepspeed(model, optimizer)
    with pytest.raises(RunError, match=r"deepspeed\.initialize"):
        DeepSpeedZero(None, optimizer, {})
