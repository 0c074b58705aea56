"""Exercise 6, another owner rule: change sdp.py, then run `pytest course/exercise_6.py`."""

import numpy as np
import pytest

from model import build
from support import checkpoint
from test_sdp import SMALL, make_engine

pytest_plugins = ["support.testing", "support.processes"]


def owned_and_gathered():
    """How many parameters this process owns, and the shapes of what it gathers."""
    engine = make_engine("backward", "neuron", 4)
    state, _ = checkpoint.gather_state(engine)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    return sum(bucket.master.numel() for bucket in engine.buckets.values()), shapes


def test_process_0_owns_half_as_much(in_processes):
    (first, gathered), *others = in_processes(4, owned_and_gathered)
    assert first == pytest.approx(np.mean([owned for owned, _ in others]) / 2, rel=0.02)
    assert gathered == {name: parameter.shape for name, parameter in build(SMALL).named_parameters()}
    assert all(shapes == {} for _, shapes in others)
