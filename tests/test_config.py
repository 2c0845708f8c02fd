import copy
import dataclasses
import inspect
import math
import pickle

import pytest

from adafreeze import ConfigError, SafeConfig
from adafreeze.train.arguments import parse


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "ckaa"}, r"SafeConfig.score is 'ckaa'"),
        ({"policy": "treshold"}, r"SafeConfig.policy is 'treshold'"),
        ({"granularity": "layer"}, r"SafeConfig.granularity is 'layer'"),
        ({"freeze_share": 1.2}, r"SafeConfig.freeze_share is 1.2"),
        ({"freeze_share": -0.1}, r"between 0 and 1"),
        ({"freeze_share": math.nan}, r"freeze_share is nan"),
        ({"freeze_share": "a lot"}, r"freeze_share is 'a lot'"),
        ({"freeze_share": True}, r"freeze_share is True"),
        ({"threshold": -1}, r"SafeConfig.threshold"),
        ({"overhead": 2}, r"SafeConfig.overhead"),
        ({"warmup": 0.5, "ramp_end": 0.3}, r"ramp_end \(0.3\) is before warmup \(0.5\)"),
        ({"min_live_blocks": -1}, r"at least 0"),
        ({"min_live_blocks": 1.5}, r"whole number"),
        ({"probe_tokens": 1}, r"SafeConfig.probe_tokens is 1"),
        ({"min_measurements": 0}, r"SafeConfig.min_measurements is 0"),
        ({"settle_patience": 0}, r"SafeConfig.settle_patience is 0"),
        ({"settle_tolerance": math.inf}, r"SafeConfig.settle_tolerance is inf"),
        ({"warmup": None}, r"SafeConfig.warmup is None"),
        ({"warmup": -0.1}, r"SafeConfig.warmup is -0.1"),
        ({"ramp_end": 1.5}, r"SafeConfig.ramp_end is 1.5"),
        ({"overhead": math.nan}, r"SafeConfig.overhead is nan"),
        ({"policy": ["share"]}, r"SafeConfig.policy is \['share'\]"),
        ({"score": None}, r"SafeConfig.score is None"),
        ({"granularity": max}, r"SafeConfig.granularity is <built-in"),
        ({"min_live_blocks": True}, r"SafeConfig.min_live_blocks is True"),
        ({"dry_run": "no"}, r"SafeConfig.dry_run is 'no'"),
        ({"normalize_rows": None}, r"SafeConfig.normalize_rows is None"),
        ({"seed": -1}, r"SafeConfig.seed is -1"),
        ({"seed": "0"}, r"SafeConfig.seed is '0'"),
        ({"freeze": "bert.encoder.layer.0"}, r"SafeConfig.freeze is 'bert.encoder.layer.0'"),
        ({"freeze": [1, 2]}, r"SafeConfig.freeze is \[1, 2\]"),
        ({"freeze": None}, r"SafeConfig.freeze is None"),
    ],
)
def test_bad_values_are_named_with_their_range_and_a_fix(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        SafeConfig(**settings)
    assert "Fix:" in str(caught.value)


def test_unknown_fields_are_named():
    with pytest.raises(ConfigError, match="has no field 'freeze_shares'") as caught:
        SafeConfig.from_dict({"freeze_shares": 0.1})
    assert "freeze_share," in str(caught.value)
    with pytest.raises(ConfigError, match="has no field 'tau'"):
        SafeConfig.paper(tau=0.1)
    with pytest.raises(ConfigError, match="has no field 'frezze'") as caught:
        SafeConfig(frezze=["layers.0"])
    assert "Did you mean 'freeze'?" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, 1 / 3),
        ({"freeze_share": 0}, 0.0),
        ({"freeze_at_start": 0.0}, 0.0),
        ({"policy": "bottom_up"}, 0.0),
        ({"policy": lambda situation: []}, 0.0),
        ({"freeze": ["a"]}, 0.0),
        ({"freeze": ["a"], "freeze_at_start": 0.5}, 0.5),
    ],
)
def test_a_third_is_frozen_at_the_start_unless_something_else_is_said(settings, share):
    assert SafeConfig(**settings).share_at_start == share


def test_what_is_not_said_stays_unsaid_when_other_settings_change():
    config = SafeConfig()
    assert dataclasses.replace(config, policy="threshold").share_at_start == 0
    assert SafeConfig.from_dict({**config.to_dict(), "freeze": ["a"]}).share_at_start == 0
    assert dataclasses.replace(SafeConfig(policy="threshold"), policy="share").share_at_start == 1 / 3


def test_plain_values_round_trip_and_functions_by_name():
    config = SafeConfig(freeze=("a",), freeze_share=0.2)
    assert SafeConfig.from_dict(config.to_dict()) == config
    assert SafeConfig(score=max).to_dict()["score"] == "max"
    published = {"freeze_at_start": 0.0, "warmup": 0.3, "ramp_end": 0.5, "lr_scale": 1.0, "wait_for_loss": False}
    published["lean"] = False
    assert SafeConfig.paper(threshold=0.002) == SafeConfig(policy="threshold", threshold=0.002, **published)


def test_the_fix_is_a_line_that_works():
    for settings in (
        {"score": "ckaa"},
        {"lr_scale": "cube"},
        {"lr_scale": 0},
        {"policy": 3},
        {"granularity": "layer"},
        {"freeze_share": math.nan},
        {"threshold": 7},
        {"warmup": 0.9, "ramp_end": 0.3},
        {"min_measurements": 0},
        {"min_live_blocks": -1},
        {"seed": 1.5},
        {"dry_run": 2},
        {"freeze": "bert.encoder.layer.0"},
    ):
        with pytest.raises(ConfigError) as caught:
            SafeConfig(**settings)
        assert isinstance(eval(caught.value.fix, {"SafeConfig": SafeConfig}), SafeConfig)


def test_a_scale_may_come_as_text():
    assert SafeConfig(lr_scale="1.5").lr_scale == 1.5 and SafeConfig(lr_scale=2).lr_scale == 2
    for bad in (True, "nan", "big", None, 11):
        with pytest.raises(ConfigError, match="lr_scale"):
            SafeConfig(lr_scale=bad)


def test_a_config_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SafeConfig().freeze_share = 0.5
    assert SafeConfig(freeze=["a", "b"]).freeze == ("a", "b")
    assert SafeConfig(freeze=(name for name in "ab")).freeze == ("a", "b")


def test_the_ends_of_each_range_are_allowed():
    SafeConfig(freeze_share=0, threshold=0, warmup=0, ramp_end=0, settle_tolerance=0, overhead=0, min_live_blocks=0)
    SafeConfig(freeze_share=1, threshold=1, warmup=1, ramp_end=1, settle_tolerance=1, overhead=1)


# What was given.


def test_a_config_knows_which_fields_were_given():
    assert SafeConfig().given == frozenset()
    assert SafeConfig("share", freeze_share=0.6, seed=0).given == {"policy", "freeze_share", "seed"}
    assert SafeConfig.from_dict({"warmup": 0.5}).given == {"warmup"}
    assert {"policy", "warmup", "threshold"} <= SafeConfig.paper(threshold=0.2).given
    assert parse(["--model_name_or_path", "m", "--output_dir", "o"]).safe.given == frozenset()
    flags = ["--freeze_share", "0.6", "--dry_run"]
    assert parse(["--model_name_or_path", "m", "--output_dir", "o", *flags]).safe.given == {"freeze_share", "dry_run"}


def test_what_adafreeze_changes_is_not_given():
    config = SafeConfig(seed=0).changed(cache="off", cache_dir=None)
    assert config == SafeConfig(cache="off") and config.given == {"seed"}
    assert config.changed(seed=3).given == {"seed"}
    with pytest.raises(ConfigError, match="freeze_share is 2"):
        config.changed(freeze_share=2)


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_and_pickles_know_it_too(twin):
    assert twin(SafeConfig(seed=0)).given == {"seed"} and twin(SafeConfig(seed=0)) == SafeConfig()


def test_what_was_given_shows_nowhere_else():
    given, unsaid = SafeConfig(seed=0, freeze_share=0.6), SafeConfig()
    assert given == unsaid and hash(given) == hash(unsaid) and repr(given) == repr(unsaid)
    assert given.to_dict() == unsaid.to_dict() == dataclasses.asdict(given) and "_given" not in repr(given)
    assert list(inspect.signature(SafeConfig).parameters) == [field.name for field in dataclasses.fields(SafeConfig)]
