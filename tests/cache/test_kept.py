"""States that outlive a run: the next one finds them, computes none of them again, and trains the same to the bit."""

import pytest
import torch
from peft import get_peft_model

from adafreeze import SafeConfig
from adafreeze.cache.kept import stores_in
from adafreeze.model import find_stacks
from cached_run import BLOCKS, COUNT, ROWS, assert_same, counts, epochs, train
from cases import adapter, base_model, lora_model

HALF = BLOCKS // 2


def settings(tmp_path=None, **more):
    kept = {"cache": "off"} if tmp_path is None else {"cache_dir": tmp_path, "keep_cache": True}
    at_start = {"freeze_at_start": 0.5, "policy": lambda _: [], "warmup": 1.0, "ramp_end": 1.0, "score": "random"}
    return SafeConfig(**at_start | kept | more)


class Calls:
    """Counts the calls of the blocks of the prefix themselves, below all that adafreeze puts around them."""

    def __init__(self, model, monkeypatch):
        self.count = 0
        inside = {id(block) for stack in find_stacks(model) for block in stack.blocks[:HALF]}
        kind = type(find_stacks(model)[0].blocks[0])
        original = kind.forward

        def forward(block, *args, **kwargs):
            self.count += id(block) in inside
            return original(block, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", forward)


def evaluated(model, batches):
    model.eval()
    with torch.no_grad():
        return [model(**one).logits for one in batches]


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_the_second_run_computes_nothing_below_the_boundary(family, tmp_path, monkeypatch):
    batches = list(epochs(family, epochs=2))
    train(family, settings(tmp_path), batches, model=lora_model(family, BLOCKS))
    model, other = lora_model(family, BLOCKS), lora_model(family, BLOCKS)
    control = train(family, settings(), batches, model=other)
    calls = Calls(model, monkeypatch)
    seen = []
    again = train(family, settings(tmp_path), batches, model=model, after=lambda *_: seen.append(calls.count))
    assert_same(again, control)
    assert counts(again[2])[1:] == (0, 0)
    assert seen[-1] - seen[0] == 0 and again[2].cache.off_because is None


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_another_seed_rank_head_and_kind_of_adapter_find_the_same_states(family, tmp_path):
    batches = list(epochs(family, epochs=2))
    train(family, settings(tmp_path), batches, model=lora_model(family, BLOCKS))
    (store,) = stores_in(tmp_path)
    assert store.samples == COUNT
    shuffled = list(epochs(family, epochs=2, seed=11))
    torch.manual_seed(99)
    for kind in ("lora", "ia3", "dora"):
        model, control = (
            get_peft_model(base_model(family, BLOCKS), adapter(family, kind, dropout=0.1)) for _ in range(2)
        )
        control.load_state_dict(model.state_dict())
        runs = [
            train(family, settings(folder), shuffled, model=one.train())
            for one, folder in ((model, tmp_path), (control, None))
        ]
        assert_same(*runs)
        assert counts(runs[0][2])[2] <= ROWS, kind  # the first batch shows what padding does
        assert len(stores_in(tmp_path)) == 1


@pytest.mark.parametrize("how", [False, "pissa"])
def test_adapters_that_do_something_from_the_start_are_not_kept(how, tmp_path):
    batches = list(epochs("bert", epochs=2))
    runs = [
        train("bert", settings(folder), batches, model=lora_model("bert", BLOCKS, init_lora_weights=how))
        for folder in (tmp_path, None)
    ]
    assert_same(*runs)
    (event,) = [event for event in runs[0][2].journal.events if event["event"] == "cache_not_kept"]
    assert "do something from the start" in event["reason"] and not stores_in(tmp_path)
    assert counts(runs[0][2])[0] == COUNT  # cached for this run


def test_one_changed_weight_is_another_model(tmp_path):
    batches = list(epochs("bert", epochs=2))
    train("bert", settings(tmp_path), batches, model=lora_model("bert", BLOCKS))
    model = lora_model("bert", BLOCKS)
    find_stacks(model)[0].blocks[0].output.dense.weight.data[0, 0] += 1e-6
    safe = train("bert", settings(tmp_path), batches, model=model)[2]
    assert counts(safe)[2] == COUNT and len(stores_in(tmp_path)) == 2


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "vit"])
def test_evaluation_is_served_and_equals_the_model_s_own(family, tmp_path, monkeypatch):
    batches, others = list(epochs(family, epochs=2)), list(epochs(family, epochs=1, seed=8, count=10))
    seen, calls = {}, {}

    def evaluates(name):
        def after(safe, model):
            if safe.steps % 2 == 0:
                before = calls[name].count if name in calls else 0
                seen.setdefault(name, []).append(evaluated(model, others))
                if name in calls:
                    calls.setdefault("made", []).append(calls[name].count - before)
                model.train()

        return after

    model = lora_model(family, BLOCKS)
    calls["cached"] = Calls(model, monkeypatch)
    safe = train(family, settings(tmp_path), batches, model=model, after=evaluates("cached"))
    control = train(family, settings(), batches, model=lora_model(family, BLOCKS), after=evaluates("own"))
    assert_same(safe, control)
    for mine, own in zip(seen["cached"], seen["own"], strict=True):
        assert all(map(torch.equal, mine, own))
    assert family == "t5" or (calls["made"][-1] == 0 and calls["made"][0] > 0)
    del calls["cached"]
    again = train(family, settings(tmp_path), batches, model=lora_model(family, BLOCKS), after=evaluates("again"))
    assert all(
        torch.equal(a, b) for x, y in zip(seen["again"], seen["own"], strict=True) for a, b in zip(x, y, strict=True)
    )
    (event,) = [event for event in again[2].journal.events if event["event"] == "cache"]
    assert event["evaluation_misses"] == 0 and event["evaluation_hits"] == 4 * 10
