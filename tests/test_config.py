import math

import pytest

from adafreeze import ConfigError, SafeConfig


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
    ],
)
def test_bad_values_are_named_with_their_range_and_a_fix(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        SafeConfig(**settings)
    assert "Cause:" in str(caught.value) and "Fix:" in str(caught.value)


def test_unknown_fields_are_named():
    with pytest.raises(ConfigError, match="has no field 'freeze_shares'") as caught:
        SafeConfig.from_dict({"freeze_shares": 0.1})
    assert "freeze_share," in str(caught.value)
    with pytest.raises(ConfigError, match="has no field 'tau'"):
        SafeConfig.paper(tau=0.1)


def test_plain_values_round_trip_and_functions_by_name():
    config = SafeConfig(freeze=("a",), freeze_share=0.2)
    assert SafeConfig.from_dict(config.to_dict()) == config
    assert SafeConfig(score=max).to_dict()["score"] == "max"
    assert SafeConfig.paper(threshold=0.002) == SafeConfig(policy="threshold", threshold=0.002)
