import copy
import pickle

import pytest

from adafreeze import AdafreezeWarning, DataError, errors
from adafreeze.errors import AdafreezeError, warn


def test_an_error_keeps_its_two_parts_through_another_process():
    error = pickle.loads(pickle.dumps(DataError("Row 3 is empty.", fix="Remove it.")))
    assert (error.fact, error.fix) == ("Row 3 is empty.", "Remove it.")
    assert isinstance(error, DataError) and isinstance(error, ValueError)


def test_a_warning_has_the_same_parts():
    with pytest.warns(AdafreezeWarning, match=r"(?s)It is slow\.\n  Fix: Do this\."):
        warn("It is slow.", fix="Do this.")


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AdafreezeError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling_and_copying_whole(kind):
    assert len(KINDS) >= 6
    error = kind("A fact.", fix="A fix.")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(error, protocol))
        assert type(again) is kind and str(again) == str(error)
        assert (again.fact, again.fix) == ("A fact.", "A fix.")
    assert str(copy.deepcopy(error)) == str(error) == "A fact.\n  Fix: A fix."


def test_a_warning_points_at_the_caller_of_whoever_warns():
    def library():
        warn("It is slow.", fix="Do this.")

    with pytest.warns(AdafreezeWarning) as caught:
        library()
    assert caught[0].filename == __file__
