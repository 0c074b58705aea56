"""Exercise 1, another way to assign: write course/groups.py, then run `pytest course/exercise_1.py`."""

import train
from course.groups import groups
from masks import Unit, number_of_groups, spectral_gap
from support.processes import TINY

pytest_plugins = ["support.testing", "support.processes"]


def test_groups_share_nothing():
    mask = groups([Unit(f"{u}", "unit", 1) for u in range(12)], workers=8, holders=2)
    assert mask.shape == (8, 12) and mask.dtype == bool
    assert (mask.sum(axis=0) == 2).all() and (mask.sum(axis=1) == 3).all()
    assert number_of_groups(mask) == 4 and spectral_gap(mask) == 0


def test_groups_train(alone, capsys):
    train.main([*TINY, "--layers", "4", "--mask", "forward", "--steps", "2"], assign=groups)
    assert "2 groups of workers share no unit" in capsys.readouterr().out
