"""train.py on images, with shared blocks, alone and with changed ideas; its schedule and its optimizers."""

import time

import numpy as np
import pytest
import torch

import train
from data import load_batches
from masks import assign
from model import ResNetConfig, build
from sdp import SDP
from support import evaluation
from support.processes import TINY, read_log, read_summary, slow

pytest_plugins = ["support.testing", "support.processes"]


@pytest.mark.parametrize(
    "model, kind, mode",
    [("resnet18", "block", "forward"), pytest.param("vit", "neuron", "backward", marks=slow)],
)
def test_train_on_images(ranks, tmp_path, small_cifar, model, kind, mode):
    width = {"resnet18": "8", "vit": "32"}[model]
    flags = ["--model", model, "--width", width, "--units", kind, "--mask", mode, "--workers", "4"]
    flags += ["--epochs", "2", "--batch-size", "8", "--data-dir", small_cifar, "--out", tmp_path / "out"]
    assert "nats per image" in ranks(2, "train.py", *flags)
    log, summary = read_log(tmp_path / "out"), read_summary(tmp_path / "out")
    assert [entry["images"] for entry in log] == [8, 16, 24, 32]  # 2 epochs of 15 images are 3.75 batches
    assert summary["final_val_accuracy"] == log[-1]["val_accuracy"]
    assert summary["final_val_accuracy"] * 3 == pytest.approx(round(summary["final_val_accuracy"] * 3))
    sgd, dense, params = model == "resnet18", summary["dense"], summary["params"]
    assert dense["optimizer_bytes"] == (4 if sgd else 8) * params
    for row in summary["per_worker"]:
        assert row["flops"] < dense["flops"] and row["held_params"] < 0.75 * params
        assert row["activation_bytes"] < dense["activation_bytes"]
        assert row["optimizer_bytes"] == pytest.approx(params * (8 if sgd else 12) / 2, rel=0.01)


def test_train_with_shared_blocks(alone, capsys, tmp_path, small_cifar, monkeypatch):
    monkeypatch.setattr(evaluation, "IMAGES", 64)
    flags = ["--model", "resnet18", "--width", "8", "--mask", "forward", "--keep", "strided", "--steps", "1"]
    flags += ["--batch-size", "8", "--data-dir", str(small_cifar), "--out", str(tmp_path / "out")]
    train.main(flags)
    assert "with blocks 0, 2, 4, 6" in capsys.readouterr().out
    summary, whole = read_summary(tmp_path / "out"), build(ResNetConfig(width=8))
    held = sum(p.numel() for i in (1, 3, 5, 7) for p in whole.blocks[str(i)].branch.parameters())
    assert summary["shared_params"] == summary["params"] - held


@pytest.mark.parametrize("wrong", [np.ones((2, 4), bool), np.eye(4, 2, dtype=bool), np.zeros((4, 2), bool)])
def test_an_assign_that_returns_no_mask(alone, wrong):
    with pytest.raises(ValueError, match="assign: must return .workers, units."):
        train.main([*TINY, "--steps", "1"], assign=lambda *_: wrong)


def test_an_uneven_assign_is_described(alone, capsys):
    uneven = np.array([[True, False], [True, True], [True, False], [True, False]])
    train.main([*TINY, "--steps", "0"], assign=lambda *_: uneven)
    assert "actual 0.625 (1 or 4 of 4 workers hold each unit)" in capsys.readouterr().out


def test_train_alone(alone, capsys, tmp_path):
    """One process plays four workers. --mask none on 1 and 4 workers has the same model and batches."""
    train.main([*TINY, "--mask", "forward", "--steps", "1"])
    assert "plays 4 workers" in capsys.readouterr().out
    losses = []
    for workers in ("1", "4"):
        flags = ["--mask", "none", "--workers", workers, "--steps", "3", "--dtype", "float64", "--out"]
        train.main([*TINY, *flags, str(tmp_path / workers)])
        losses.append([entry["loss"] for entry in read_log(tmp_path / workers)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)


def test_train_with_changed_ideas(alone, tmp_path, monkeypatch):
    """main takes another way to assign, another engine, and a function to be called before each step. Each
    mask is dealt once, and no batch is loaded while workers change."""
    numbers, steps, clips, loading = [], [], [], []

    def load_slowly(data, engine, args, step):
        loading.append(step)
        time.sleep(0.05)
        batches = load_batches(data, engine, args, step)
        loading.clear()
        return batches

    def assign_and_note(units, workers, holders, seed, mask_number):
        numbers.append(mask_number)
        return assign(units, workers, holders, seed, mask_number)

    class Noting(SDP):
        def change(self, mask, mode):
            assert not loading
            super().change(mask, mode)

        def step(self, lr, clip=0.0, *more):
            clips.append(clip)
            return super().step(lr, clip, *more)

    def before_step(step, engine, batches):
        steps.append((step, sorted(batches), type(engine)))
        return {"noted": step}

    monkeypatch.setattr(train, "load_batches", load_slowly)
    flags = [*TINY, "--steps", "5", "--resample", "2", "--out", str(tmp_path)]
    train.main(flags, assign=assign_and_note, engine=Noting, before_step=before_step)
    assert numbers == [0, 1, 2] and clips == [1.0] * 5
    assert steps == [(step, [0, 1, 2, 3], Noting) for step in range(1, 6)]
    assert [entry["noted"] for entry in read_log(tmp_path)] == [1, 2, 3, 4, 5]


def test_learning_rate():
    args, _ = train.parse(["--steps", "100", "--warmup", "10", "--lr", "1"], train.make_parser())
    rates = [train.learning_rate(step, args) for step in range(1, 101)]
    assert rates[0] == 0.1 and rates[9] == 1.0 == max(rates) and rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[9:], rates[10:]))
    args, _ = train.parse(["--steps", "1", "--warmup", "0", "--lr", "1"], train.make_parser())
    assert train.learning_rate(1, args) > 0


def test_sgd_has_nesterov_momentum():
    args, _ = train.parse(["--model", "resnet18", "--lr", "0.1", "--weight-decay", "0"], train.make_parser())
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = train.make_optimizer(args, [{"params": [parameter]}])
    for _ in range(2):
        parameter.grad = torch.ones(1)
        optimizer.step()
    assert parameter.item() == pytest.approx(1 - 0.1 * ((1 + 0.9) + (1 + 0.9 * 1.9)))
