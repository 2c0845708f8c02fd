"""With which settings a resumed run goes on: those given now, and of the others the checkpoint's."""

from __future__ import annotations

import json
import logging
import warnings

import pytest
import torch
from resumed_cases import begun, given, loader, measured, pieces, resumed, train, trained_weights

import cases
from adafreeze import AdafreezeWarning, RunError, Safe, SafeConfig
from adafreeze.loop.state import sealed, settings_after

STEPS = 30
OTHERS = {"warmup": 0.2, "ramp_end": 0.5, "freeze_share": 0.4, "lr_scale": 1.0, "wait_for_loss": False, "seed": 3}


@pytest.mark.parametrize("reached", [3, 9, 20])  # in the warm-up, while the ramp rises, after it
def test_a_checkpoint_of_other_defaults_goes_on_with_its_own_settings_to_the_last_bit(reached, caplog):
    whole = begun(reached, STEPS, given(**OTHERS))
    with caplog.at_level(logging.INFO, logger="adafreeze"), warnings.catch_warnings():
        warnings.simplefilter("error", AdafreezeWarning)
        again = resumed(whole, STEPS)  # by our defaults a third would be frozen before step 0, and its moments freed
    model, optimizer, safe = again
    (line,) = [said for said in caplog.messages if said.startswith("Settings taken from the checkpoint")]
    for name, value in {"freeze_at_start": 0.0, "cache": "off", **OTHERS}.items():
        assert f"{name}={value!r}" in line
    assert safe.config == whole[2].config and safe.frozen == whole[2].frozen
    assert safe.decider.probe.digest() == whole[2].decider.probe.digest()
    assert train(model, optimizer, safe, STEPS) == train(*whole, STEPS)
    assert safe.frozen == whole[2].frozen and measured(safe) == measured(whole[2], after=reached)
    mine, other = trained_weights(model), trained_weights(whole[0])
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    safe.close()
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def test_settings_that_are_given_win_and_are_named_with_what_they_were():
    run = begun(9, STEPS, given(freeze_share=0.4, dry_run=True))
    with pytest.warns(AdafreezeWarning) as caught:
        _, _, safe = resumed(run, STEPS, given(freeze_share=0.7, dry_run=False))
    (told,) = [str(one.message) for one in caught if "differ from those of the checkpoint" in str(one.message)]
    assert "freeze_share was 0.4 and is 0.7; dry_run was True and is False." in told
    assert safe.config.freeze_share == 0.7 and not safe.config.dry_run


def test_a_default_that_is_given_is_given():
    run = begun(3, STEPS, given(freeze_share=0.4))
    with pytest.warns(AdafreezeWarning, match=r"freeze_share was 0\.4 and is 0\.6"):
        _, _, safe = resumed(run, STEPS, given(freeze_share=0.6))
    assert safe.config.freeze_share == 0.6


def test_of_the_same_settings_nothing_is_said(caplog):
    run = begun(9, STEPS, given(freeze=["model.layers.0"]))
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="adafreeze"), warnings.catch_warnings():
        warnings.simplefilter("error", AdafreezeWarning)
        _, _, safe = resumed(run, STEPS, given(freeze=["model.layers.0"]))
    assert not [r for r in caplog.records if "checkpoint" in r.message or "anew" in r.message]
    assert "replan" not in [event["event"] for event in safe.journal.events]


def test_units_of_the_checkpoint_are_those_of_the_resumed_run():
    run = begun(STEPS - 2, STEPS, given(granularity="site", warmup=0.2, ramp_end=0.5))
    assert run[2].frozen
    _, _, safe = resumed(run, STEPS)
    assert safe.frozen == run[2].frozen and list(safe.units) == list(run[2].units)


def test_a_checkpoint_of_another_model_is_refused_and_the_model_left_alone():
    _, _, safe = begun(20, STEPS, given())
    state = json.loads(json.dumps(safe.state_dict()))
    model, optimizer = pieces(3)
    again = Safe(model, optimizer=optimizer, probe=loader(), total_steps=STEPS)
    state["frozen"] = ["model.layers.5"]
    with pytest.raises(RunError, match=r"'model\.layers\.5', which is no unit"):
        again.load_state_dict(sealed({k: v for k, v in state.items() if k not in ("version", "checksum")}))
    assert again.config == SafeConfig() and again.frozen == {"model.layers.0"}
    again.close()


def test_batches_that_can_be_gone_through_once_are_drawn_from_once():
    run = begun(3, STEPS, given())
    state = json.loads(json.dumps(run[2].state_dict()))
    model, optimizer = pieces()
    model.load_state_dict(run[0].state_dict())
    once = iter([cases.batch("llama", rows=16)])
    safe = Safe(model, optimizer=optimizer, probe=once, total_steps=STEPS)
    drawn = safe.decider.probe.digest()
    with pytest.warns(AdafreezeWarning, match="probe differs"):
        safe.load_state_dict(state)
    assert safe.decider.probe.digest() == drawn and safe.config.freeze_at_start == 0


def test_other_settings_of_the_schedule_lay_it_out_anew():
    run = begun(12, STEPS, given(warmup=0.1, ramp_end=0.3, overhead=1.0, min_measurements=1))
    wanted = given(warmup=0.1, ramp_end=0.9, overhead=1.0, min_measurements=1)
    with pytest.warns(AdafreezeWarning, match=r"ramp_end was 0\.3 and is 0\.9"):
        model, optimizer, safe = resumed(run, STEPS, wanted)
    train(model, optimizer, safe, STEPS)
    assert safe.decider.plan[-1] == 27 == measured(safe)[-1]


def test_scores_of_another_kind_are_not_mixed():
    run = begun(12, STEPS, given())
    assert run[2].scores
    with pytest.warns(AdafreezeWarning, match="score was 'cka' and is 'weight_change'"):
        model, optimizer, safe = resumed(run, STEPS, given(score="weight_change"))
    assert not safe.scores
    train(model, optimizer, safe, 22)
    assert safe.scores and all(0 < score < 1 for score in safe.scores.values())


# Functions, of which a checkpoint has the name.


def lowest(situation):
    return [name for block in situation.chains[0][:2] for name in block] if situation.ramp > 0 else []


class Chooser:
    def __call__(self, situation):
        return []


def test_a_function_is_known_again_by_its_name():
    run = begun(9, STEPS, given(policy=lowest))
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdafreezeWarning)
        _, _, safe = resumed(run, STEPS, given(policy=lowest))
        assert safe.config.policy is lowest
        settings_after(SafeConfig(policy=Chooser()), SafeConfig(policy=Chooser()).to_dict())


def test_a_function_that_was_not_given_again_is_named_with_what_is_used():
    run = begun(9, STEPS, given(policy=lowest))
    with pytest.warns(AdafreezeWarning) as caught:
        _, _, safe = resumed(run, STEPS)
    (told,) = [str(one.message) for one in caught if "function" in str(one.message)]
    assert "SafeConfig.policy was the function 'lowest'" in told and "and is 'share' now" in told
    assert "SafeConfig(policy=lowest)" in told and "keeps only its name" in told
    assert safe.config.policy == "share"


def test_a_function_in_the_place_of_a_name_is_given():
    run = begun(9, STEPS, given())
    with pytest.warns(AdafreezeWarning, match="policy was 'share' and is 'lowest'"):
        _, _, safe = resumed(run, STEPS, given(policy=lowest))
    assert safe.config.policy is lowest


# Settings that do not go together.


def test_what_does_not_go_with_what_is_given_is_left_out_and_named(tmp_path):
    kept = SafeConfig(cache="disk", cache_dir=tmp_path, freeze_share=0.3).to_dict()
    with pytest.warns(AdafreezeWarning, match=r"cache was 'disk' and is 'ram'; cache_dir was .+ and is None"):
        config, differing = settings_after(SafeConfig(cache="ram"), kept)
    assert config == SafeConfig(cache="ram", freeze_share=0.3) and differing == {"cache", "cache_dir"}
    kept = SafeConfig(warmup=0.8, ramp_end=0.9).to_dict()
    assert settings_after(SafeConfig(), kept)[0] == SafeConfig(warmup=0.8, ramp_end=0.9)
    with pytest.warns(AdafreezeWarning, match=r"warmup of the checkpoint contradicts what was given"):
        config, _ = settings_after(SafeConfig(ramp_end=0.6), kept)
    assert (config.warmup, config.ramp_end) == (0.5, 0.6)


def test_what_was_taken_is_not_given_later():
    config, _ = settings_after(SafeConfig(seed=1), SafeConfig(freeze_share=0.3, seed=1).to_dict())
    assert config.given == {"seed"}
    again, differing = settings_after(config, SafeConfig(freeze_share=0.2, seed=1).to_dict())
    assert again.freeze_share == 0.2 and not differing
