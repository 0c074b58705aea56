"""Exercise 3, masks between machine and worker: write course/partly.py; `pytest course/exercise_3.py`."""

from functools import partial

import train
from course.partly import partly
from masks import Unit, spectral_gap
from support.processes import TINY

pytest_plugins = ["support.testing", "support.processes"]


def test_the_dial():
    units, found = [Unit(f"blocks.{u}", "block", 1) for u in range(12)], []
    for fraction in (0, 0.5, 1):
        mask = partly(units, 8, 4, machines=2, fraction=fraction)
        assert mask.shape == (8, 12) and (mask.sum(axis=0) == 4).all() and (mask.sum(axis=1) == 6).all()
        held_by_machine = mask.reshape(2, 4, 12).any(axis=1)  # [machines, units]
        found.append((held_by_machine.mean(), spectral_gap(mask)))
    (all_of_it, wide), (more, some), (half, none) = found
    assert half == 0.5 and none == 0 and half < more < all_of_it and none < some < wide


def test_it_trains(alone, capsys):
    flags = [*TINY, "--layers", "4", "--workers", "8", "--mask", "forward", "--steps", "2"]
    train.main(flags, assign=partial(partly, fraction=0.5))
    assert "4 of 8 workers hold each unit" in capsys.readouterr().out
