import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adafreeze import ConfigError
from adafreeze.decide import POLICIES, PolicyInput, choose, is_prefix_only, prefix_only


def chain(*scores, prefix="u"):
    return {f"{prefix}{index}": score for index, score in enumerate(scores)}


def situation(scores, ramp=1.0, **settings):
    return PolicyInput(0, ramp, scores, settings.pop("chains", (tuple((n,) for n in scores),)), **settings)


def test_share_freezes_the_longest_prefix_within_its_part_of_the_score():
    scores = chain(1, 2, 3, 4)  # total 10
    assert choose("share", situation(scores, freeze_share=0.3)) == ["u0", "u1"]  # 3 ≤ 3
    assert choose("share", situation(scores, freeze_share=0.29)) == ["u0"]
    assert choose("share", situation(scores, freeze_share=0.3, ramp=0.5)) == ["u0"]  # 1 ≤ 1.5 < 3
    assert choose("share", situation(scores, freeze_share=1.0, ramp=0.0)) == []


def test_share_counts_what_is_frozen_already():
    scores = chain(1, 2, 3, 4)
    assert choose("share", situation(scores, freeze_share=0.3, frozen=frozenset(["u0"]))) == ["u1"]
    assert choose("share", situation(scores, freeze_share=0.2, frozen=frozenset(["u0"]))) == []


def test_share_stops_at_a_unit_that_cannot_be_judged():
    assert choose("share", situation(chain(0, math.nan, 0, 9), freeze_share=0.5)) == ["u0"]
    missing = {"u0": 0.0, "u2": 9.0}
    chains = ((("u0",), ("u1",), ("u2",)),)
    assert choose("share", situation(missing, freeze_share=0.5, chains=chains)) == ["u0"]


def test_share_goes_on_above_a_block_frozen_by_hand_before_it_was_measured():
    # u0 is in the prefix from the start, so no measurement ever scores it; total 10, u1 = 1 ≤ 1.5 < u1 + u2 = 3
    chains = (tuple((name,) for name in ("u0", "u1", "u2", "u3")),)
    scores = {"u1": 1.0, "u2": 2.0, "u3": 7.0}
    assert choose("share", situation(scores, freeze_share=0.15, chains=chains, frozen=frozenset(["u0"]))) == ["u1"]


def test_share_freezes_nothing_by_sums_beyond_the_floats():
    assert choose("share", situation(chain(1e308, 1e308, 1e308), freeze_share=0.0)) == []


def test_share_gives_each_chain_its_own_part():
    one, two = chain(1, 9, prefix="a"), chain(100, 900, prefix="b")
    chains = (tuple((n,) for n in one), tuple((n,) for n in two))
    assert choose("share", situation({**one, **two}, freeze_share=0.1, chains=chains)) == ["a0", "b0"]


def test_blocks_without_units_do_not_interrupt_a_prefix():
    scores = chain(1, 1, 8)
    chains = (((), ("u0",), (), ("u1",), ("u2",)),)
    assert choose("share", situation(scores, freeze_share=0.2, chains=chains)) == ["u0", "u1"]


def test_where_nothing_has_moved_share_freezes_nothing():
    assert choose("share", situation(chain(0, 0, 0))) == []
    assert choose("share", situation(chain(0, 0, 1), freeze_share=0.0)) == []


def test_what_must_stay_live_stays():
    everything = {"freeze_share": 1.0}
    assert choose("share", situation(chain(9, 1, 1), **everything)) == ["u0", "u1"]
    assert choose("share", situation(chain(9, 1, 1), min_live_blocks=2, **everything)) == ["u0"]
    assert choose("share", situation(chain(9, 1, 1), min_live_blocks=0, **everything)) == ["u0", "u1"]
    with_head = situation(chain(9, 1, 1), min_live_blocks=0, something_else_trains=True, **everything)
    assert choose("share", with_head) == ["u0", "u1", "u2"]
    assert choose("threshold", situation(chain(0, 0, 0))) == ["u0", "u1"]
    assert choose("threshold", situation(chain(0, 0, 0), min_live_blocks=0)) == ["u0", "u1"]  # nothing else trains


def test_threshold_keeps_the_highest_scored_live():
    scores = chain(0.001, 0.003, 0.002)
    assert choose("threshold", situation(scores, threshold=0.01)) == ["u0", "u2"]
    assert choose("threshold", situation(scores, threshold=0.01, min_live_blocks=2)) == ["u0"]
    assert choose("threshold", situation(scores, threshold=0.01, frozen=frozenset(["u0", "u2"]))) == []


def test_the_last_live_unit_is_the_highest_scored_except_above_a_prefix():
    scores = chain(0.001, 0.003, 0.002)
    assert choose("threshold", situation(scores, min_live_blocks=0)) == ["u0", "u2"]
    assert choose(POLICIES["threshold"], situation(scores, min_live_blocks=0)) == ["u0", "u2"]
    assert choose("threshold", situation(scores, min_live_blocks=0, something_else_trains=True)) == ["u0", "u1", "u2"]
    for policy in ("share", POLICIES["share"]):  # by name or as the function: trimmed from the top
        assert choose(policy, situation(scores, freeze_share=1.0, min_live_blocks=0)) == ["u0", "u1"]
        assert choose(policy, situation(scores, freeze_share=1.0, min_live_blocks=2)) == ["u0"]
    equals = situation(chain(0.001, 0.001, 0.001), min_live_blocks=0)
    assert choose("threshold", equals) == ["u0", "u1"]


def test_what_froze_before_does_not_speak_for_its_block():
    # Block 0 holds a1 (frozen, 0.9) and a2 (0.001); block 1 holds b1 (0.002): b1 is worth more than a2.
    scores = {"a1": 0.9, "a2": 0.001, "b1": 0.002}
    now = situation(scores, chains=((("a1", "a2"), ("b1",)),), frozen=frozenset(["a1"]))
    assert choose("threshold", now) == ["a2"]


def test_bottom_up_goes_by_place_alone():
    assert choose("bottom_up", situation(chain(9, 9, 0, 0), freeze_share=0.5)) == ["u0", "u1"]
    assert choose("bottom_up", situation(chain(9, 9, 0, 0), freeze_share=0.5, ramp=0.5)) == ["u0"]
    assert len(choose("bottom_up", situation(chain(*range(50)), freeze_share=0.58))) == 29  # 28.999… in floats
    scores = chain(9, 9, 0, 0)
    upper = (((), (), *((name,) for name in scores)),)  # of six blocks the upper four have adapters
    assert choose("bottom_up", situation(scores, chains=upper, freeze_share=0.5)) == ["u0", "u1"]


def test_sites_of_one_block_count_as_one_live_block():
    scores = {"a1": 1.0, "a2": 1.0, "b1": 1.0, "b2": 1.0}
    chains = ((("a1", "a2"), ("b1", "b2")),)
    assert choose("share", situation(scores, chains=chains, freeze_share=1.0)) == ["a1", "a2"]


def test_a_policy_of_ones_own_and_a_name_it_made_up():
    assert choose(lambda s: [n for n in s.scores if s.scores[n] < 2], situation(chain(5, 1, 1))) == ["u1", "u2"]
    with pytest.raises(ConfigError, match="returned 'nowhere'") as caught:
        choose(lambda s: ["nowhere"], situation(chain(1, 2)))
    assert "u0" in str(caught.value)


@pytest.mark.parametrize("answer", [None, "u0", 3, [None], [["u0"]], [0]])
def test_a_policy_that_returns_no_names_is_told_what_it_returned(answer):
    def mine(situation):
        return answer

    shown = answer[0] if isinstance(answer, list) else answer
    with pytest.raises(ConfigError) as caught:
        choose(mine, situation(chain(1, 2)))
    assert caught.value.fact.startswith(f"The policy 'mine' returned {shown!r}, but ")


def test_a_policy_may_return_any_iterable_in_any_order_with_repeats():
    for answer in (["u1", "u0", "u1"], {"u1", "u0"}, iter(["u0", "u1"]), {"u1": 1, "u0": 2}, ()):
        expected = ["u0", "u1"] if answer != () else []
        assert choose(lambda s, answer=answer: answer, situation(chain(1, 1, 1))) == expected


def test_scores_that_are_zero_missing_or_not_numbers_at_either_end_of_the_ramp():
    every = ("share", "threshold", "bottom_up")
    zeros, nothing = chain(0.0, -0.0, 0.0), dict.fromkeys(chain(1, 1, 1), math.nan)
    three = ((("u0",), ("u1",), ("u2",)),)
    for scores in (zeros, nothing, {}):
        assert [choose(policy, situation(scores, ramp=0.0, chains=three, freeze_share=1)) for policy in every] == [
            []
        ] * 3
    # At the end of the ramp: share has nothing to judge by, threshold freezes what did not move (but one), bottom_up
    # does not look.
    assert [choose(policy, situation(zeros, freeze_share=0.5)) for policy in every] == [[], ["u0", "u1"], ["u0"]]
    for scores in (nothing, {}):
        chosen = [choose(policy, situation(scores, chains=three, freeze_share=0.5)) for policy in every]
        assert chosen == [[], [], ["u0"]]


def test_infinity_never_freezes_and_never_lends_its_size_to_the_total():
    # 1 ≤ 0.15 · 10 if the infinite score is left out of the total; were it counted, everything below would freeze
    assert choose("share", situation(chain(1, 4, 5, math.inf), freeze_share=0.15)) == ["u0"]
    assert choose("share", situation(chain(-math.inf, 0, 9), freeze_share=0.5)) == []
    assert choose("threshold", situation(chain(-math.inf, 1, 1))) == []


def test_each_chain_is_guarded_by_itself():
    one, two = chain(0, 0, prefix="a"), chain(0, 9, prefix="b")
    chains = (tuple((n,) for n in one), tuple((n,) for n in two))
    now = situation({**one, **two}, chains=chains)
    assert choose("threshold", now) == ["a0", "b0"]  # a1 is the last of its chain, b1 scores above
    head = situation({**one, **two}, chains=chains, min_live_blocks=0)
    assert choose("threshold", head) == ["a0", "a1", "b0"]  # b1 trains: a may go as a whole
    assert choose("share", situation({**one, **two}, chains=chains, freeze_share=0.1)) == ["b0"]  # a: total 0


def test_empty_chains_and_chains_without_units():
    for chains in ((), ((),), (((), ()),)):
        for policy in POLICIES:
            assert choose(policy, situation({}, chains=chains, freeze_share=1.0)) == []


numbers = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0.0, -0.0, 0.1, 0.1]), st.floats(0, 1)
)


@settings(deadline=None)  # timing decides no test
@given(
    st.sampled_from(sorted(POLICIES)),
    st.lists(st.lists(numbers, min_size=1, max_size=8), min_size=1, max_size=24),
    st.floats(0, 1),
    st.integers(0, 4),
    st.booleans(),
)
def test_over_any_history_the_frozen_set_only_grows_and_the_guard_holds(policy, history, share, least, head):
    units = [f"u{index}" for index in range(len(history[0]))]
    frozen = frozenset()
    for step, numbers in enumerate(history):
        scores = dict(zip(units, numbers, strict=False))
        now = situation(
            scores,
            ramp=step / len(history),
            chains=(tuple((unit,) for unit in units),),
            freeze_share=share,
            threshold=share,
            min_live_blocks=least,
            something_else_trains=head,
            frozen=frozen,
        )
        names = choose(policy, now)
        assert not set(names) & frozen and set(names) <= set(units) and len(set(names)) == len(names)
        frozen |= set(names)
        live = len(units) - len(frozen)
        assert live >= min(least, len(units))
        assert live >= 1 or head
        if policy in ("share", "bottom_up"):
            assert frozen == set(units[: len(frozen)]), "a prefix"
        assert all(math.isfinite(scores.get(name, 0.0)) or policy == "bottom_up" for name in names)


def sites(chain_sizes):
    """Names by chain, block and site: blocks hold 0, 1 or 2 units."""
    return tuple(
        tuple(tuple(f"{c}.{b}.{s}" for s in range(size)) for b, size in enumerate(sizes))
        for c, sizes in enumerate(chain_sizes)
    )


@settings(deadline=None)  # timing decides no test
@given(
    st.sampled_from([*sorted(POLICIES), "greedy"]),
    st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=3),
    st.data(),
    st.integers(0, 3),
    st.booleans(),
)
def test_the_guard_holds_over_several_chains_of_sites_and_empty_blocks(policy, chain_sizes, data, least, head):
    chains = sites(chain_sizes)
    order = [name for blocks in chains for block in blocks for name in block]
    scores = {name: data.draw(numbers) for name in order if data.draw(st.booleans())}
    frozen = frozenset(name for name in order if data.draw(st.integers(0, 3)) == 0)
    now = situation(
        scores, chains=chains, frozen=frozen, min_live_blocks=least, something_else_trains=head, freeze_share=1.0
    )
    names = choose((lambda s: order) if policy == "greedy" else policy, now)
    assert names == [name for name in order if name in set(names)], "bottom to top, once"
    assert not set(names) & frozen
    gone = frozen | set(names)

    def live(blocks, without):
        return sum(any(name not in without for name in block) for block in blocks)

    for blocks in chains:
        assert live(blocks, gone) >= min(least, live(blocks, frozen))
    assert head or not names or set(order) - gone


@settings(deadline=None)  # timing decides no test
@given(
    st.sampled_from(["share", "bottom_up"]),
    st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=3),
    st.data(),
    st.floats(0, 1),
    st.integers(0, 3),
    st.booleans(),
)
def test_what_was_a_prefix_of_each_chain_stays_one(policy, chain_sizes, data, freeze_share, least, head):
    chains = sites(chain_sizes)
    frozen = set()
    for blocks in chains:
        frozen |= {name for block in blocks[: data.draw(st.integers(0, len(blocks)))] for name in block}
    scores = {name: data.draw(numbers) for blocks in chains for block in blocks for name in block}
    settings = {"min_live_blocks": least, "something_else_trains": head, "freeze_share": freeze_share}
    names = choose(policy, situation(scores, chains=chains, frozen=frozenset(frozen), **settings))
    gone = frozen | set(names)
    for blocks in chains:
        units = [name for block in blocks for name in block]
        assert gone & set(units) == set(units[: len(gone & set(units))])


@settings(deadline=None)  # timing decides no test
@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_later_ramp_never_freezes_less(scores, freeze_share, a, b):
    for policy in POLICIES:
        settings = {"freeze_share": freeze_share, "threshold": freeze_share}
        early, late = (set(choose(policy, situation(chain(*scores), ramp=ramp, **settings))) for ramp in sorted((a, b)))
        assert early <= late


def test_a_policy_that_declares_itself_prefix_only_keeps_the_top_live():
    scores = chain(9, 9, 1, 1)

    def mine(given):
        return ["u0", "u1", "u2", "u3"]

    everything = situation(scores, min_live_blocks=2)
    assert choose(mine, everything) == ["u2", "u3"]  # the highest scores stay live
    assert choose(prefix_only(mine), everything) == ["u0", "u1"]

    class Mine:
        prefix_only = True

        def __call__(self, given):
            return ["u0", "u1", "u2", "u3"]

    assert choose(Mine(), everything) == ["u0", "u1"] and is_prefix_only(Mine()) and not is_prefix_only("threshold")


@pytest.mark.parametrize("policy", ["share", "bottom_up"])
def test_a_unit_that_never_had_a_gradient_is_none_to_leave_live(policy):
    scores = chain(1, 1, 1, 1, 1, 1)
    everything = {"freeze_share": 1.0, "min_live_blocks": 1}
    assert choose(policy, situation(scores, **everything))[-1] == "u4"
    read = frozenset(["u0", "u1", "u2"])  # a head that reads the middle
    assert choose(policy, situation(scores, learning=read, **everything)) == ["u0", "u1"]
    none = situation(scores, learning=frozenset(["elsewhere"]), **everything)
    assert choose(policy, none)[-1] == "u4"  # of this chain nothing is known


def test_the_last_unit_that_learns_never_freezes():
    scores = {**chain(0, 0, prefix="a"), **chain(1, 1, prefix="b")}
    chains = tuple(tuple((f"{one}{n}",) for n in range(2)) for one in "ab")
    alone = {"chains": chains, "min_live_blocks": 0, "threshold": 9.0}
    assert "b0" not in choose("threshold", situation(scores, learning=frozenset(["b0"]), **alone))
    assert "b0" in choose("threshold", situation(scores, learning=frozenset(["b0", "b1"]), **alone))
