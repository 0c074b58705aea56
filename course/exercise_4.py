"""Exercise 4, a compressed push: change sdp.py, then run `pytest course/exercise_4.py`."""

import numpy as np
import torch

from test_sdp import batch, make_engine

pytest_plugins = ["support.testing", "support.processes"]


def bytes_and_norm(wire):
    """What a process pushes and pulls in a step, and the norm of the averaged gradient."""
    engine = make_engine("forward", "block", 4, dtype=torch.float32)
    for worker in engine.workers.values():
        for part in worker.parts:
            part.wire = wire
    for worker in engine.workers:
        with engine.turn(worker) as model:
            model(*batch(0, worker)).backward()
    (norm,) = engine.step(1e-3)
    return engine.traffic["push"], engine.traffic["pull"], norm


def test_push_is_halved(in_processes):
    whole = np.array(in_processes(4, bytes_and_norm, None))
    half = np.array(in_processes(4, bytes_and_norm, torch.bfloat16))
    assert whole[:, 0].sum() == whole[:, 1].sum() == half[:, 1].sum() == 2 * half[:, 0].sum()
    np.testing.assert_allclose(half[:, 2], whole[:, 2], rtol=0.01)
