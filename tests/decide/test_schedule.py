import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adafreeze.decide import Settling, Situation, choose, cubic_ramp, measurement_steps


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
        situation = Situation(
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


@given(st.integers(1, 10**6), st.integers(1, 100))
def test_measurements_are_spread_and_end_at_the_end(until, count):
    steps = measurement_steps(until, count)
    assert steps[-1] == until and steps[0] >= 1
    assert len(steps) == min(until, count) == len(set(steps))
    assert list(steps) == sorted(steps)


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 300))
def test_the_ramp_rises_from_zero_to_one(a, b, step):
    start, end = min(a, b), max(a, b)
    now, later = cubic_ramp(step, start, end), cubic_ramp(step + 1, start, end)
    assert 0 <= now <= later <= 1
    assert cubic_ramp(end, start, end) == 1
