"""Exercise 2, a new kind of unit: change model.py, then run `pytest course/exercise_2.py`."""

from model import build, units_of
from test_sdp import SMALL, gradients_that_arrive

pytest_plugins = ["support.testing", "support.processes"]


def test_units_of_the_mlp(in_processes):
    units = units_of(build(SMALL), "mlp")
    assert {unit.layer for unit in units} == {f"blocks.{i}.mlp" for i in range(SMALL.layers)}
    in_processes(4, gradients_that_arrive, "backward", "mlp", False, SMALL)
