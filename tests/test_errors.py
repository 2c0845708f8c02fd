import pickle

import pytest

from adafreeze import AdafreezeWarning, DataError
from adafreeze.errors import warn


def test_an_error_keeps_its_three_parts_through_another_process():
    error = pickle.loads(pickle.dumps(DataError("Row 3 is empty.", cause="No text.", fix="Remove it.")))
    assert (error.fact, error.cause, error.fix) == ("Row 3 is empty.", "No text.", "Remove it.")
    assert isinstance(error, DataError) and isinstance(error, ValueError)


def test_a_warning_has_the_same_parts():
    with pytest.warns(AdafreezeWarning, match=r"(?s)It is slow.*Cause: .*Fix: "):
        warn("It is slow.", cause="Why.", fix="Do this.")
