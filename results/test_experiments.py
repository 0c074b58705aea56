"""The rules of the trials, on invented runs; one real run; and the tables of results/log.md."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data import ARRAYS, read_images
from masks import UserError
from results import experiments
from results.experiments import EXPERIMENTS, Arm, Experiment
from scripts.export import load_model
from scripts.prepare import new_arrays
from support.processes import HERE

pytest_plugins = ["support.testing", "support.processes"]

TINY = "--layers 1 --width 16 --heads 2 --hidden 16 --context 16 --batch-size 4 --eval-batches 2 --steps 2"
ROUNDS = (("--drop-path 0.1", "--dropout 0.1"), ("--weight-decay 1",))


@pytest.fixture
def trial(monkeypatch, tmp_path):
    """An experiment of two arms in an empty folder."""
    arms = {"dense": Arm("--mask none", ROUNDS), "two": Arm("--mask none --workers 1", ROUNDS, members=2)}
    prepare = partial(experiments.write_texts, source="asyncio")
    data = "--data text --data-dir datasets/trial/{part}.txt"
    monkeypatch.setitem(EXPERIMENTS, "trial", Experiment(prepare, data, f"{TINY} --workers 2", arms))
    monkeypatch.chdir(tmp_path)
    return "trial"


def invent(losses):
    """A `train` that only leaves what a run would, with the losses of the first of `losses`, {words of its
    flags: curve}, that fits."""
    calls = []

    def train(flags, out):
        calls.append(" ".join(flags))
        curve = next(curve for words, curve in losses.items() if words in calls[-1])
        out.mkdir(parents=True)
        entries = [{"step": i, "val_loss": loss, "val_accuracy": 0.5, "flops": i, "sent_bytes": i}
                   for i, loss in enumerate(curve)]  # fmt: skip
        (out / "log.jsonl").write_text(
            "".join(json.dumps(entry) + "\n" for entry in [{"step": -1}, *entries])
        )
        rows = [{key: worker for key in experiments.COST_KEYS} for worker in (1, 3)]
        (out / "summary.json").write_text(json.dumps({"per_worker": rows}))

    return train, calls


def test_tuning_keeps_what_is_best_and_reports_on_another_text(trial, monkeypatch, capsys):
    report = {f"--seed {seed} ": [9, 4 + seed, 5] for seed in range(6)}
    invented, calls = invent(
        report | {"--dropout 0.1 --weight-decay": [3, 2.5], "--dropout": [3, 2], "": [3, 2.6]}
    )
    monkeypatch.setattr(experiments, "train", invented)
    monkeypatch.setattr(experiments, "averaged_loss", lambda outs: 1.0 + len(outs))
    experiments.main([trial, "--jobs", "2"])
    assert len(calls) == len(set(calls)) == (4 + 3) + (4 + 6)
    for call in calls:
        assert ("tune.txt" if "--seed 100 " in call else "report.txt") in call
        assert "--seed 100 " in call or "--dropout 0.1 --seed" in call  # the best, without weight decay
    dense, two = capsys.readouterr().out.splitlines()[2:]
    cells = "`--mask none --dropout 0.1` | 1.00 / 1.00 / 1.00 | 4 | 2.000 | 5.000 (4.000 to 6.000)"
    assert dense == f"| dense | {cells} | 5.000 (5.000 to 5.000) |"
    assert two.endswith("| 4 | 2.000 | - | 3.000 (3.000 to 3.000) |")
    experiments.main([trial])
    assert len(calls) == 17  # nothing is trained again
    Path("results/trial/dense-dropout-0.1-1.json").unlink()
    shutil.rmtree("runs/trial/dense-dropout-0.1-1")
    experiments.main([trial])
    assert len(calls) == 18 and dense in capsys.readouterr().out  # what was missing is trained
    monkeypatch.setitem(EXPERIMENTS, "trial", EXPERIMENTS["trial"]._replace(flags="--steps 9"))
    with pytest.raises(SystemExit):
        experiments.main([trial])
    assert "was trained with other flags" in capsys.readouterr().err


def test_texts_share_what_is_learnt(tmp_path):
    experiments.write_texts(tmp_path, "asyncio")
    tune, report = ((tmp_path / name).read_bytes() for name in ("tune.txt", "report.txt"))
    part = len(tune) // 10
    assert tune[: 9 * part] == report[: 9 * part] and tune[9 * part :] != report[9 * part :]
    experiments.write_texts(tmp_path, "asyncio", size=1100)
    assert (tmp_path / "tune.txt").read_bytes() == tune[:1000]
    with pytest.raises(UserError, match="is not in this version of Python"):
        experiments.write_texts(tmp_path, "nothing")


def test_images_share_what_is_learnt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run python -m scripts.prepare cifar10"):
        experiments.write_images(Path("datasets/images"))
    images = np.arange(25 * 3 * 32 * 32, dtype=np.uint8).reshape(25, 3, 32, 32)
    with new_arrays(Path("datasets/cifar10"), 32, 32, range(10)) as out:
        for name, array in zip(ARRAYS, (images[:20], np.arange(20) % 10, images[20:], np.arange(5))):
            np.save(out / f"{name}.npy", array)
    experiments.write_images(Path("datasets/images"))
    tune, report = (read_images("cifar10", f"datasets/images/{part}") for part in ("tune", "report"))
    for part, held_out, labels in ((tune, images[18:20], [8, 9]), (report, images[20:], [0, 1, 2, 3, 4])):
        assert (part.train == images[:18]).all() and (part.labels == np.arange(18) % 10).all()
        assert (part.test == held_out).all() and (part.test_labels == labels).all()


def test_a_run_that_was_given_up_is_the_worst(trial, monkeypatch):
    """A learning rate with which nothing stays finite ends a run, and not the trial."""
    experiments.write_texts(Path("datasets/trial"), "asyncio")
    wild = "--lr 1e30 --steps 20 --warmup 0"
    result = experiments.run_once(trial, "dense", wild, experiments.TUNING_SEED)
    assert result["curve"] == [] and experiments.scores(trial, result) == [np.inf]


def test_a_real_run_and_an_average(trial, monkeypatch, alone):
    """The mean of two models' probabilities, against the models themselves."""
    experiments.write_texts(Path("datasets/trial"), "asyncio")
    with pytest.raises(UserError, match="train.py .*--no-flag .*unrecognized"):
        experiments.run_once(trial, "two", "--no-flag", 0)
    monkeypatch.setattr(experiments, "train", lambda flags, out: train.main([*flags, "--out", str(out)]))
    results = [experiments.run_once(trial, "two", "", seed) for seed in (0, 1)]
    assert [entry["step"] for entry in results[0]["curve"]] == [2] and results[0]["costs"]["flops"] > 0
    outs = [Path(f"runs/trial/two-{seed}") for seed in (0, 1)]
    text = np.fromfile("datasets/trial/report.txt", np.uint8)
    held_out = torch.from_numpy(text[len(text) * 9 // 10 :].astype(np.int64))
    begins = np.linspace(0, len(held_out) - 17, 8).astype(int)
    windows = torch.stack([held_out[begin : begin + 17] for begin in begins])
    with torch.no_grad():
        a, b = (load_model(out / "ckpt.pt")(windows[:, :-1]).softmax(-1) for out in outs)
    expected = -((a + b) / 2).gather(-1, windows[:, 1:, None]).log().mean().item()
    assert experiments.averaged_loss(outs) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if (HERE / "results" / name).exists()])
def test_results_are_those_of_the_files(name, monkeypatch):
    """Each arm has as many tuning runs, and the table of an experiment stands in results/log.md."""
    monkeypatch.chdir(HERE)
    monkeypatch.delattr(experiments, "train")  # nothing is missing
    tried = {sum(map(len, arm.rounds)) for arm in EXPERIMENTS[name].arms.values()}
    assert len(tried) == 1
    assert experiments.table(name) in Path("results/log.md").read_text()


def test_levers_are_those_of_the_files():
    text = (HERE / "results/log.md").read_text()
    for path in sorted((HERE / "results/levers").glob("*.json")):
        run = json.loads(path.read_text())
        rows = [line for line in text.splitlines() if line.startswith(f"| {run['arm']} |")]
        assert len(rows) == 1 and rows[0].endswith(f"| {run['curve'][-1]['val_loss']:.3f} |")


def test_even_masks_are_those_of_the_files():
    """Each row of the table has the mean and the spread of its kept runs."""
    rows = [line.split(" | ") for line in (HERE / "results/log.md").read_text().splitlines()]
    for arm in ("backward-blocks", "forward-blocks", "forward-neurons", "dense-5"):
        runs = [json.loads(path.read_text()) for path in (HERE / "results/even").glob(f"{arm}-?.json")]
        losses = [run["curve"][-1]["val_loss"] for run in runs]
        (row,) = (row for row in rows if row[0] == f"| {arm}")
        shown = f"{sum(losses) / len(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"
        assert row[-2:] == [shown, f"{len(runs)} |"] and len(runs) == 3
