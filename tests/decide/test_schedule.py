import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
from adafreeze import Safe, SafeConfig
from adafreeze.decide import Losses, LossFall, PolicyInput, Settling, choose, cubic_ramp, measurement_steps
from adafreeze.loop.watch import Watch
from adafreeze.measure.scorer import Scorer


def test_the_published_threshold_and_the_step_at_which_each_unit_freezes():
    # τ_T = 0.02, t_w = 20, t_f = 60:  τ(t) = 0.02 − 0.02·(1 − (t − 20)/40)³
    #   t = 20: 0                    t = 30: 0.02·(1 − 0.75³) = 0.02·0.578125 = 0.0115625
    #   t = 40: 0.02·(1 − 0.5³) = 0.0175     t = 50: 0.02·(1 − 0.25³) = 0.0196875     t = 60: 0.02
    by_hand = {10: 0.0, 20: 0.0, 30: 0.0115625, 40: 0.0175, 50: 0.0196875, 60: 0.02, 90: 0.02}
    for step, tau in by_hand.items():
        assert 0.02 * cubic_ramp(step, 20, 60) == pytest.approx(tau, abs=1e-15)
    # Scripted scores: a is below τ at once, b from 40 on (0.0115625 < 0.012 < 0.0175), c from 50 on, d only
    # meets τ_T exactly and must not freeze (the score has to be below), e never.
    scores = {"a": 0.001, "b": 0.012, "c": 0.0195, "d": 0.02, "e": 0.5}
    frozen, frozen_at = frozenset(), {}
    for step in range(10, 100, 10):
        situation = PolicyInput(
            step, cubic_ramp(step, 20, 60), scores, (tuple((n,) for n in scores),), frozen, threshold=0.02
        )
        for name in choose("threshold", situation):
            frozen_at[name] = step
            frozen |= {name}
    assert frozen_at == {"a": 30, "b": 40, "c": 50}


def test_the_warm_up_ends_when_scores_and_choice_have_stood_still():
    settling = Settling(patience=2, tolerance=0.1)
    a, b = frozenset("a"), frozenset("b")
    assert not settling.update({"a": 0.0, "b": 1.0}, a)  # the first has nothing to be compared with
    assert not settling.update({"a": 0.05, "b": 1.0}, a)  # calm once
    assert not settling.update({"a": 0.05, "b": 1.2}, a)  # moved by 0.2 > 0.1·1.2
    assert not settling.update({"a": 0.05, "b": 1.2}, b)  # another choice
    assert not settling.update({"a": 0.05, "b": 1.2}, b)  # calm once
    assert settling.update({"a": 0.05, "b": 1.3}, b)  # 0.1 ≤ 0.1·1.3: calm twice


def test_zeros_and_numbers_that_are_not_finite_never_settle():
    settling = Settling(1, 0.1)
    for scores in ({"a": 0.0}, {"a": 0.0}, {"a": math.nan}, {"a": math.nan}, {"a": math.inf}, {"a": math.inf}, {}, {}):
        assert not settling.update(scores, frozenset())


def test_settling_takes_up_its_state():
    one = Settling(2, 0.1)
    one.update({"a": 1.0}, frozenset("a"))
    one.update({"a": 1.0}, frozenset("a"))
    two = Settling(2, 0.1)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert two.update({"a": 1.0}, frozenset("a"))


def window(mean, spread=0.0, count=16):
    """Losses ``mean ± spread``, as the loop hands them on."""
    losses = [mean + spread * (-1) ** n for n in range(count)]
    return Losses(len(losses), sum(losses), sum(loss**2 for loss in losses))


def falls(*windows):
    fall = LossFall()
    return [fall.update(losses) for losses in windows]


def test_the_loss_falls_fast_while_it_falls_by_more_than_on_average():
    # Falls of 0.1, 0.4, 0.3, 0.1; on average so far 0.1, 0.25, 0.267, 0.225.
    assert falls(*map(window, (1.8, 1.7, 1.3, 1.0, 0.9))) == [False, False, True, True, False]
    assert falls(*map(window, (2.0, 1.5, 1.0, 0.5))) == [False] * 4  # as fast as on average is not faster
    assert falls(*map(window, (1.0, 1.5, 1.6, 1.7))) == [False] * 4
    # By 0.2, after 0. A standard error is s/√15, that of the difference √2 as much: twice that is 0.730·s.
    assert falls(window(1.0, 0.25), window(1.0, 0.25), window(0.8, 0.25))[-1] is True
    assert falls(window(1.0, 0.3), window(1.0, 0.3), window(0.8, 0.3))[-1] is False


def test_where_there_are_no_losses_or_none_that_can_be_judged_none_falls():
    none, broken = Losses(), Losses(16, math.nan, math.nan)
    assert falls(*[none] * 5) == falls(*[broken] * 5) == falls(*[window(math.inf)] * 5) == [False] * 5
    assert falls(*[window(mean, count=1) for mean in (1.8, 1.7, 1.3, 1.0, 0.9)]) == [False] * 5
    # They are passed over: what is judged is the losses that there are.
    assert falls(window(1.8), none, window(1.7), broken, window(1.3)) == [False, False, False, False, True]


def test_the_fall_takes_up_its_state():
    for count in range(4):
        one, two = LossFall(), LossFall()
        for mean in (1.8, 1.7, 1.3, 1.0)[:count]:
            one.update(window(mean, 0.1))
        two.load_state_dict(json.loads(json.dumps(one.state_dict())))
        assert [one.update(window(mean, 0.1)) for mean in (0.6, 0.5)] == [
            two.update(window(mean, 0.1)) for mean in (0.6, 0.5)
        ]


@settings(deadline=None)  # timing decides no test
@given(st.integers(1, 10**6), st.integers(1, 100))
def test_measurements_are_spread_and_end_at_the_end(until, count):
    steps = measurement_steps(until, count)
    assert steps[-1] == until and steps[0] >= 1
    assert len(steps) == min(until, count) == len(set(steps))
    assert list(steps) == sorted(steps)


@settings(deadline=None)  # timing decides no test
@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 300))
def test_the_ramp_rises_from_zero_to_one(a, b, step):
    start, end = min(a, b), max(a, b)
    now, later = cubic_ramp(step, start, end), cubic_ramp(step + 1, start, end)
    assert 0 <= now <= later <= 1
    assert cubic_ramp(end, start, end) == 1


TIMES = {"freeze_at_start": 0.0, "warmup": 0.1, "ramp_end": 0.3}


def freeze_steps(monkeypatch, scripted, measurements=30, **settings):
    """Run the real loop over 100 steps without training. Returns (t_w, {block: step at which it froze})."""
    monkeypatch.setattr(Scorer, "prepare", lambda self, run_samples, most: min(most, measurements))
    monkeypatch.setattr(Scorer, "measure", lambda self, prefix: dict(zip(self.units, scripted(), strict=True)))
    model = cases.lora_model("llama", blocks=len(scripted()))
    safe = Safe(model, SafeConfig(**TIMES, **settings), probe=cases.loader("llama"), total_steps=100)
    frozen_at = {int(name.split(".")[-1]): safe.steps for _ in range(100) for name in safe.step()}
    return safe.warmup_end, frozen_at


def test_the_loop_freezes_by_the_threshold_at_the_hand_computed_steps(monkeypatch):
    # Measured at every step up to t_f = 0.3 · 100 = 30. Scores stand still: the first measurement has none before it,
    # the 2nd is calm once, the 3rd twice, so t_w = 3. From there τ(t) = 0.02·(1 − (1 − (t − 3)/27)³):
    #   block 0, 0.001:  τ(3) = 0,  τ(4) = 0.02·(1 − (26/27)³) = 0.02·2107/19683 = 0.00214          -> 4
    #   block 1, 0.014:  τ(11) = 0.02·(1 − (19/27)³) = 0.02·12824/19683 = 0.01303,
    #                    τ(12) = 0.02·(1 − (2/3)³) = 0.02·19/27 = 0.01407                           -> 12
    #   block 3, 0.0175: τ = 0.0175 where 1 − (t − 3)/27 = 0.5, at t = 16.5                         -> 17
    #   block 2, 0.02:   τ(30) = 0.02 is not above it                                               -> never
    scores = [0.001, 0.014, 0.02, 0.0175]
    t_w, steps = freeze_steps(monkeypatch, lambda: scores, policy="threshold", threshold=0.02)
    assert (t_w, steps) == (3, {0: 4, 1: 12, 3: 17})


def test_the_loop_freezes_by_share_at_the_hand_computed_steps(monkeypatch):
    # Scores 1, 2, 3, 14 sum to 20; 0.3 of it is 6. Blocks 0, 0–1, 0–2 sum to 1, 3, 6: ramp ≥ 1/6, 1/2, 1. t_w = 3:
    #   ramp(4) = 2107/19683 = 0.107,  ramp(5) = 1 − (25/27)³ = 4058/19683 = 0.206                  -> 5
    #   ramp(8) = 1 − (22/27)³ = 9035/19683 = 0.459,  ramp(9) = 1 − (21/27)³ = 10422/19683 = 0.529  -> 9
    #   ramp(30) = 1                                                                                -> 30
    t_w, steps = freeze_steps(monkeypatch, lambda: [1.0, 2.0, 3.0, 14.0], freeze_share=0.3)
    assert (t_w, steps) == (3, {0: 5, 1: 9, 2: 30})


def test_scores_that_never_settle_end_the_warm_up_at_its_limit(monkeypatch):
    # The top block's score grows by half each time, so t_w = 0.1 · 100 = 10. τ(11) = 0.02·(1 − 0.95³) = 0.00285.
    growing = [1.0]

    def scripted():
        growing[0] *= 1.5
        return [0.001, growing[0]]

    t_w, steps = freeze_steps(monkeypatch, scripted, policy="threshold", threshold=0.02)
    assert (t_w, steps) == (10, {0: 11})


def test_between_measurements_nothing_freezes_and_the_ramp_goes_on(monkeypatch):
    # Six measurements: 5, 10, 15, 20, 25, 30. They would settle at 15, after the limit, so t_w = 10 at step 10.
    #   τ(15) = 0.02·(1 − 0.75³) = 0.0115625   τ(20) = 0.0175   τ(25) = 0.0196875   τ(30) = 0.02
    t_w, steps = freeze_steps(
        monkeypatch, lambda: [0.012, 0.0001, 0.0196, 0.0198], measurements=6, policy="threshold", threshold=0.02
    )
    assert (t_w, steps) == (10, {1: 15, 0: 20, 2: 25})  # block 3, below τ at 30, is the last live one
    # One patient measurement less, and the warm-up has the same end: 10 is the limit as well.
    t_w, _ = freeze_steps(
        monkeypatch, lambda: [0.012, 0.5], measurements=6, policy="threshold", threshold=0.02, settle_patience=1
    )
    assert t_w == 10
    # Two measurements: 15, 30. The limit passed unseen at 10, from where the ramp counts.
    t_w, steps = freeze_steps(monkeypatch, lambda: [0.011, 0.5], measurements=2, policy="threshold", threshold=0.02)
    assert (t_w, steps) == (10, {0: 15})


def test_the_warm_up_goes_on_while_the_loss_falls_fast_and_no_longer_than_the_ramp(monkeypatch, caplog):
    # Measured every 2 steps. The scores have settled at 6, and block 0 could freeze at 8; the limit is 10.
    def run(losses, **settings):
        given = iter(losses)
        monkeypatch.setattr(Watch, "take_losses", lambda self: window(next(given)))
        return freeze_steps(monkeypatch, lambda: [0.001, 0.5], measurements=15, freeze_share=0.5, **settings)

    faster = [3.0, 2.99, 2.95, 2.88, 2.78, 2.65, 2.48, 2.27, 2.0, 1.65]  # up to step 20
    slower = [1.6, 1.58, 1.57, 1.56, 1.55]
    assert run(faster + slower) == (10, {0: 22})
    said = [record.message for record in caplog.records if "freezing postponed" in record.message]
    assert len(said) == 1 and "Step 6 of 100: freezing postponed to step 30 at most" in said[0]
    assert run(faster + slower, wait_for_loss=False) == (6, {0: 8})
    assert run([*faster, 1.25, 0.8, 0.3, -0.3, -1.0]) == (10, {0: 30})  # no longer than the ramp
    assert run([3.0, 2.8, 2.7, 2.65, 2.62, 2.6, *faster]) == (6, {0: 8})  # what comes later does not matter


def test_losses_are_those_that_the_model_returns_in_training():
    model, batch = cases.lora_model("llama"), cases.batch("llama")
    safe = Safe(model.train(), probe=batch, total_steps=9)
    losses = [float(model(**batch).loss.detach()) for _ in range(2)]
    with torch.no_grad():
        model(**batch)
    model.eval()(**batch)
    model.train()(**{name: value for name, value in batch.items() if name != "labels"})
    losses.append(float(model(**batch, return_dict=False)[0].detach()))
    kept = json.loads(json.dumps(safe.state_dict()))["watch"]["losses"]
    assert kept == list(safe._watch.take_losses()) == pytest.approx([3, sum(losses), sum(x**2 for x in losses)])
    assert safe._watch.take_losses() == Losses()
    safe.close()


scores_of_three = st.lists(st.one_of(st.floats(), st.sampled_from([0.0, -0.0, 1.0, 1.0])), min_size=3, max_size=3)


@settings(deadline=None)  # timing decides no test
@given(st.lists(scores_of_three, min_size=1, max_size=12), st.integers(1, 4), st.floats(0, 1))
def test_settling_takes_patience_and_numbers_that_can_be_judged(history, patience, tolerance):
    settling = Settling(patience, tolerance)
    calm = 0
    for index, scores in enumerate(history):
        settled = settling.update(dict(zip("abc", scores, strict=True)), frozenset())
        before = history[index - 1] if index else scores
        usable = index > 0 and all(map(math.isfinite, scores)) and max(scores) > 0
        largest = max(scores)
        calm = (
            calm + 1
            if usable and all(abs(a - b) <= tolerance * largest for a, b in zip(scores, before, strict=True))
            else 0
        )
        assert settled == (calm >= patience)
