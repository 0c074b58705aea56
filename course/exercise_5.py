"""Exercise 5, a new model: change model.py, then run `pytest course/exercise_5.py`."""

import json

import pytest

import train

pytest_plugins = ["support.testing", "support.processes"]


@pytest.mark.parametrize("level", ["block", "neuron"])
def test_mlp_trains(alone, tmp_path, small_cifar, level):
    flags = f"--model mlp --data cifar10 --batch-size 8 --steps 2 --mask forward --units {level}".split()
    train.main([*flags, "--data-dir", str(small_cifar), "--out", str(tmp_path / "run")])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert all(row["held_params"] < summary["params"] for row in summary["per_worker"])
