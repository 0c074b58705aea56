"""Exercise 3, workers of unequal capacity: change masks.py, then run `pytest course/exercise_3.py`."""

import numpy as np
import pytest

from masks import Unit, assign, number_of_groups


@pytest.mark.parametrize("capacity", [[3, 1, 1, 1], [2, 2, 1, 1], [1, 1, 1, 1]])
def test_loads_follow_the_capacities(capacity):
    mask = assign([Unit(f"{u}", "unit", 1) for u in range(12)], 4, 2, capacity=capacity)
    share = 12 * 2 * np.array(capacity) / sum(capacity)
    assert (mask.sum(axis=0) == 2).all() and abs(mask.sum(axis=1) - share).max() <= 1
    assert number_of_groups(mask) == 1


def test_equal_capacities_change_nothing():
    units = [Unit(f"{u}", "unit", 1) for u in range(12)]
    assert (assign(units, 4, 2, capacity=[5, 5, 5, 5]) == assign(units, 4, 2)).all()
