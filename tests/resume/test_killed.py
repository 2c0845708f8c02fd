"""Runs that are killed again and again come to what a run comes to that was never stopped."""

from __future__ import annotations

import json

import pytest
from forge import KILLED, Forge, assert_alike, lines, moments, told

import cases

RAMP_END = 21  # of 30 steps, see killed.config


@pytest.fixture(scope="module")
def forge():
    forge = Forge()
    yield forge
    forge.close()


@pytest.fixture(scope="module")
def never_stopped(forge, tmp_path_factory):
    """Folder and result of the run that was never stopped, without a cache: one for each host, family and settings."""
    found = {}

    def run(**job):
        key = json.dumps(job, sort_keys=True)
        if key not in found:
            folder = tmp_path_factory.mktemp("whole")
            found[key] = folder, forge.finish(folder, cache="off", **job)
        return found[key]

    return run


def killed(forge, folder, at, **job):
    """The result of a run that was killed at these moments, one after the other, each time resumed."""
    for step, place in at:
        status = forge.run(folder, step=step, place=place, **job)
        assert status == KILLED, (step, place, status, (folder / "log.txt").read_text()[-2000:])
    return forge.finish(folder, **job)


def assert_same_result(result, expected):
    """Weights, optimizer, random state and what adafreeze knows."""
    for part in ("weights", "optimizer", "random"):
        assert_alike(result[part], expected[part], part)
    for name in ("length", "frozen", "probe"):
        assert result["state"][name] == expected["state"][name], name
    for name in ("scores", "warmup_end", "plan", "settling"):
        assert result["state"]["deciding"][name] == expected["state"]["deciding"][name], name


def assert_same_run(one, other):
    """And two folders, their journals."""
    (folder, result), (whole, expected) = one, other
    assert_same_result(result, expected)
    written = [json.dumps(line) for line in lines(folder)]
    assert len(set(written)) == len(written)
    assert told(folder) == told(whole)


CHAINS = [("bert", "off"), ("bert", "disk"), ("llama", "ram"), ("llama", "disk")]
# Bert has dropout, Llama none. The run that was never stopped has no cache: with one it comes to the same.
BRIEF = [("trainer", "bert", "off"), ("trainer", "llama", "disk"), ("loop", "bert", "disk"), ("loop", "llama", "ram")]
EVERY = [(host, *chain) for host in ("trainer", "loop") for chain in CHAINS]


@pytest.mark.parametrize(("host", "family", "cache"), cases.slow_but(BRIEF, EVERY))
def test_killed_ten_times_it_is_the_run_that_was_never_stopped(host, family, cache, forge, never_stopped, tmp_path):
    if host == "trainer" and cases.LOSES_THE_EPOCH:
        pytest.skip("accelerate before 1.15 loses the epoch")
    whole = never_stopped(host=host, family=family)
    freezes = {event["step"] for event in lines(whole[0]) if event["event"] == "freeze" and event["step"]}
    at = moments(f"{host} {family} {cache}", host)
    assert freezes and min(freezes) > at[2][0] and max(freezes) <= RAMP_END < at[7][0]
    result = killed(forge, tmp_path, at, host=host, family=family, cache=cache)
    assert_same_run((tmp_path, result), whole)
    assert "resume" in [line["event"] for line in lines(tmp_path)]
    assert not list((tmp_path / "prefixes").glob("*"))  # what the kills left was found again, and cleared at the end


@pytest.mark.parametrize("score", ["grad_norm", "weight_change"])
def test_scores_that_add_up_go_on_where_they_were(score, forge, never_stopped, tmp_path):
    job = {"host": "loop", "family": "llama", "config": {"score": score}}
    whole = never_stopped(**job)
    assert_same_run((tmp_path, killed(forge, tmp_path, [(9, "forward"), (17, "backward")], cache="off", **job)), whole)


def test_what_a_memory_budget_has_recomputed_is_the_same_after_a_kill(forge, never_stopped, tmp_path):
    job = {"host": "loop", "family": "bert"}
    roomy, _ = never_stopped(**job, config={"memory_budget": "1GiB"})
    most = next(line["plain_peak"] for line in lines(roomy) if line["event"] == "recompute")
    job["config"] = {"memory_budget": int(0.9 * most)}
    whole = never_stopped(**job)
    assert any(line["blocks"] or line["selective"] for line in lines(whole[0]) if line["event"] == "recompute")
    assert_same_run((tmp_path, killed(forge, tmp_path, [(8, "forward"), (19, "saving")], cache="off", **job)), whole)


def test_a_killed_run_finds_its_disk_cache_again(forge, tmp_path):
    job = {"host": "loop", "family": "llama", "cache": "disk"}
    assert forge.run(tmp_path, step=25, place="forward", **job) == KILLED
    (left,) = (tmp_path / "prefixes").glob("prefix-*")
    assert (left / "data.mdb").stat().st_size > 0
    forge.finish(tmp_path, **job)
    (counts,) = [line for line in lines(tmp_path) if line["event"] == "cache"]
    # Steps 25 to 30 of four samples, all of which the run had computed at this depth before.
    assert (counts["hits"], counts["advanced"], counts["misses"], counts["damaged"]) == (24, 0, 0, 0)


# Filling the states stores each sample; moving writes a file for each of two blocks and replaces each weight.
OFFLOAD_DEATHS = {
    "filling": [(None, "call:store.put:2"), (None, "call:offloaded.write:2")],
    "moving": [(None, "call:offloaded._swap:9"), (12, "backward"), (None, "call:offloaded._swap:12")],
}
OFFLOADED = [
    (host, deaths, fill) for host in ("trainer", "loop") for deaths in OFFLOAD_DEATHS for fill in ("before", None)
]


@pytest.mark.parametrize(
    ("host", "deaths", "fill"), cases.slow_but([("trainer", "filling", "before"), ("loop", "moving", None)], OFFLOADED)
)
def test_killed_while_weights_move_it_is_the_run_whose_weights_stay(host, deaths, fill, forge, never_stopped, tmp_path):
    settings = {"freeze_at_start": 0.5, "fill": fill, "cache": "disk", "cache_dir": str(tmp_path / "prefixes")}
    job = {"host": host, "family": "llama", "cache": "disk"}
    _, whole = never_stopped(host=host, family="llama", config={"freeze_at_start": 0.5})
    # Those that die before their first save begin anew.
    assert_same_result(
        killed(forge, tmp_path, OFFLOAD_DEATHS[deaths], **job, config=settings | {"offload": "disk"}), whole
    )
    assert "offload" in [line["event"] for line in lines(tmp_path)]
    assert not list((tmp_path / "prefixes").glob("*"))
