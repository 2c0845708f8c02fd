"""A run that goes on for longer or shorter than planned measures and freezes as one that was planned so."""

from __future__ import annotations

import logging

import pytest
import torch
from resumed_cases import begun, given, measured, resumed, train

from adafreeze.decide.run_length import RunLength
from adafreeze.decide.schedule import measurement_steps

# Large budgets, so that how many measurements there are follows from the settings alone.
SETTINGS = {"overhead": 1.0, "min_measurements": 6, "wait_for_loss": False}


@pytest.fixture(scope="module")
def planned():
    """Safe of a run that was planned for so many steps from the start, at its end."""
    found = {}

    def run(steps):
        if steps not in found:
            found[steps] = begun(steps, steps, given(**SETTINGS))[2]
        return found[steps]

    return run


@pytest.mark.parametrize(
    ("then", "reached", "now"),
    [
        (12, 6, 48),  # in the warm-up; it was to end at 6
        (12, 9, 48),  # the warm-up has ended, and more has frozen than would have by then
        (12, 12, 48),  # its last step: all measurements lie behind
        (24, 5, 48),
        (48, 6, 24),
        (48, 15, 24),
    ],
)
def test_another_number_of_steps_is_as_if_planned_so_from_the_step_reached(then, reached, now, planned, caplog):
    run = begun(reached, then, given(**SETTINGS))
    before = run[2].frozen
    with caplog.at_level(logging.INFO, logger="adafreeze"):
        model, optimizer, safe = resumed(run, now, given(**SETTINGS))
    assert f"Resumed at step {reached} with {now} steps now, {then} planned then." in caplog.text
    assert f"the ramp rises until step {int(0.7 * now)}" in caplog.text
    train(model, optimizer, safe, now)
    assert measured(safe) == measured(planned(now), after=reached)
    assert before | planned(now).frozen <= safe.frozen
    assert before or safe.frozen == planned(now).frozen
    (event,) = [event for event in safe.journal.events if event["event"] == "replan"]
    assert (event["step"], event["total_steps"]) == (reached, now)


def test_beyond_the_new_end_of_the_ramp_one_measurement_decides(caplog):
    run = begun(20, 60, given(**SETTINGS))
    assert not run[2].frozen  # the warm-up was to last until step 30
    with caplog.at_level(logging.INFO, logger="adafreeze"):
        model, optimizer, safe = resumed(run, 24, given(**SETTINGS))
    assert "the ramp has ended (step 16)" in caplog.text
    train(model, optimizer, safe, 24)
    assert measured(safe) == [21] and safe.frozen
    assert safe.decider.ramp(21) == 1.0


def test_where_everything_was_decided_nothing_is_measured_again():
    run = begun(40, 48, given(**SETTINGS))  # its ramp ended at 33
    model, optimizer, safe = resumed(run, 44, given(**SETTINGS))
    train(model, optimizer, safe, 44)
    assert measured(safe) == [] and safe.frozen == run[2].frozen


def test_a_warm_up_that_has_ended_has_ended():
    run = begun(9, 12, given(**SETTINGS))
    ended = run[2].warmup_end
    assert ended is not None and ended <= 6
    _, _, safe = resumed(run, 48, given(**SETTINGS))
    assert safe.warmup_end == ended
    assert 0 < safe.decider.ramp(9) < run[2].decider.ramp(9)


def test_the_new_schedule_survives_another_stop(planned):
    first = begun(6, 12, given(**SETTINGS))
    second = resumed(first, 48, given(**SETTINGS))
    third = resumed(second, 48, given(**SETTINGS))  # before it has measured: the schedule is still to be laid out
    train(*second, 20)
    train(*third, 20)
    fourth = resumed(second, 48, given(**SETTINGS))
    assert train(*second, 48) == train(*third, 48) == train(*fourth, 48)
    assert measured(second[2]) == measured(third[2]) == measured(planned(48), after=6)
    assert measured(fourth[2]) == measured(planned(48), after=20)
    assert second[2].frozen == third[2].frozen == fourth[2].frozen


@pytest.mark.parametrize("score", ["cka", "weight_change", "grad_norm"])
def test_what_scores_compare_with_is_that_of_before(score):
    """Pre-trained outputs, or weights and gradients at the last measurement."""
    run = begun(6, 48, given(score=score, **SETTINGS))
    found = []
    for steps in (48, 60):
        model, optimizer, safe = resumed(run, steps, given(score=score, **SETTINGS))
        for _ in range(2):  # the first may lay out the schedule, and not measure
            train(model, optimizer, safe, safe.steps + 1)
        moving = [e["scores"] for e in safe.journal.events if e["event"] == "measure"][:1]
        found.append(safe.decider.scorer.measure({}) if score == "cka" else moving[0])
    assert found[0] == found[1] and len(found[0]) == 6 and any(found[0].values())


def test_another_batch_size_is_told_of_and_counts_from_here_on(caplog):
    run = begun(6, 24, given(**SETTINGS), samples_per_step=4)
    with caplog.at_level(logging.INFO, logger="adafreeze"):
        model, optimizer, safe = resumed(run, 48, given(**SETTINGS), samples_per_step=2)
    assert "48 steps now, 24 planned then, 2 samples per step and process now, 4 planned then" in caplog.text
    train(model, optimizer, safe, 7, rows=2)
    assert safe.length.rows_per_sample == 1  # the average over all steps is 3.7 rows
    train(model, optimizer, safe, 48, rows=2)
    assert measured(safe) == [step for step in measurement_steps(33, len(safe.decider.plan)) if step > 6]


def at(steps, rows, *args, state=None):
    """A RunLength that has come to this step, or that continues from ``state``."""
    length = RunLength(*args)
    changes = length.load_state_dict(state) if state is not None else []
    length.steps, length.rows = steps, rows
    return length, changes


def test_another_number_of_processes_is_told_of():
    state = at(6, 24, 24, 4, 32, 2)[0].state_dict()
    assert RunLength(48, 4, 32, 1).load_state_dict(state) == [
        "48 steps now, 24 planned then",
        "1 processes now, 2 planned then",
    ]
    assert RunLength(24, 4, 32, 2).load_state_dict(state) == []


def test_samples_of_a_step_that_nobody_tells_are_counted_from_the_step_reached():
    begun, _ = at(6, 24, 24, None, 32, 1)
    assert RunLength(24, None, 32, 1).state_dict()["samples_per_step"] is None and begun.step_samples == 4
    again, _ = at(6, 24, 48, None, 32, 1, state=begun.state_dict())
    assert again.step_samples == 4
    again.steps, again.rows = 8, 28
    assert (again.step_samples, again.epoch_steps, again.progress.remaining) == (2, 16, 80)
    third, changes = at(10, 32, 48, None, 32, 1, state=again.state_dict())
    assert changes == [] and third.step_samples == 2


def test_one_epoch_that_becomes_several_may_use_the_cache():
    run = begun(6, 8, given(freeze_at_start=0.34, cache="ram"))
    assert run[2].cache.off_because == "no sample comes twice in one epoch"
    model, optimizer, safe = resumed(run, 24, given(freeze_at_start=0.34, cache="ram"))
    assert safe.cache.off_because is None
    train(model, optimizer, safe, 20)
    assert safe.cache.logs()["safe/cache_hit_rate"] > 0
    safe.close()


def test_fewer_epochs_without_repeats_switch_the_cache_off():
    run = begun(6, 24, given(freeze_at_start=0.34, cache="ram"))
    model, optimizer, safe = resumed(run, 8, given(freeze_at_start=0.34, cache="ram"))
    with torch.random.fork_rng():
        train(model, optimizer, safe, 8)
    assert safe.cache.off_because == "no sample comes twice in one epoch"
