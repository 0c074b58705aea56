"""What a run tells: before it begins, in each step, and at its end."""

import importlib.machinery
import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import train
from scripts.export import load_model
from sdp import SDP
from support.costs import MEMORY, SENT
from support.evaluation import continue_text
from support.processes import TINY, read_log, read_summary, slow

pytest_plugins = ["support.testing", "support.processes"]


def read_table(text):
    """{title: [numbers]} of the table that a run prints."""
    rows = {}
    for line in text.splitlines():
        if ", MB " in line or line.startswith("GFLOP"):
            rows[line[:24].strip()] = [float(number) for number in line[24:].split()[:4]]
    return rows


@pytest.mark.parametrize(
    "processes, flags",
    [
        (4, "--mask forward --units neuron --micro-batches 2"),
        (2, "--mask backward --optimizer sgd --rows 1,1,1,5 --batch-size 16"),
        pytest.param(4, "--mask none --dtype bfloat16", marks=slow),
        pytest.param(4, "--mask forward --layers 4 --capacity 1,2,2,3", marks=slow),
    ],
)
def test_a_forecast_comes_true(alone, ranks, tmp_path, capsys, monkeypatch, processes, flags):
    """--steps 0 prints what two steps measure: for the fullest worker, without masks, and for a dense one."""
    flags = [*TINY, *flags.split(), "--workers", "4"]
    ranks(processes, "train.py", *flags, "--steps", "2", "--out", tmp_path / "out")
    measured = read_summary(tmp_path / "out")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    train.main([*flags, "--steps", "0"])
    forecast = read_table(capsys.readouterr().out)
    for title, key, unit in (
        ("weights, MB", "weight_bytes", 1e6),
        ("gradients, MB", "grad_bytes", 1e6),
        ("master + optimizer, MB", "optimizer_bytes", 1e6),
        ("activations saved, MB", "activation_bytes", 1e6),
        ("pushed per step, MB", "push_bytes", 1e6),
        ("pulled per step, MB", "pull_bytes", 1e6),
        ("GFLOP per step", "flops", 1e9),
    ):
        worker, fsdp, unmasked, dense = forecast[title]
        largest = max(row[key] for row in measured["per_worker"]) / unit
        assert worker == pytest.approx(largest, rel=0.005, abs=0.001), title  # slices are of unequal content
        if "--rows" not in flags and "--capacity" not in flags:  # else the largest is not the mean
            assert unmasked == pytest.approx(measured["unmasked"][key] / unit, rel=0.005, abs=0.001), title
        assert dense == pytest.approx(measured["dense"][key] / unit, abs=0.001)
        if title != "activations saved, MB" and "step" not in title:
            assert fsdp == pytest.approx(dense / processes, abs=0.001)


@pytest.mark.parametrize("flags", ["--workers 4 --assign machine --machines 2", "--resume CKPT --compile"])
def test_a_forecast_of_odd_flags(alone, trained, capsys, flags):
    """Also after a run in this process that was interrupted."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    train.main([*TINY, "--steps", "0", *flags.replace("CKPT", str(trained / "ckpt.pt")).split()])
    assert read_table(capsys.readouterr().out)["GFLOP per step"][0] > 0


def test_a_forecast_allocates_nothing(alone, tmp_path):
    """All that an owner has has a shape and no memory; and --out stays as it was."""
    engines = []

    class Kept(SDP):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            engines.append(self)

    train.main([*TINY, "--steps", "0", "--out", str(tmp_path / "out")], engine=Kept)
    for engine in engines:
        assert all(isinstance(bucket.master, FakeTensor) for bucket in engine.buckets.values())
    assert not (tmp_path / "out").exists() and not torch.distributed.is_initialized()


def test_a_run_says_what_was_saved(ranks, tmp_path):
    """In one line, then 200 bytes of text, as the model of the checkpoint has them."""
    text = ranks(2, "train.py", *TINY, "--mask", "forward", "--steps", "2", "--out", tmp_path / "out")
    summary = read_summary(tmp_path / "out")
    shares = []
    for keys, what in ((MEMORY, "memory"), (["flops"], "FLOPs"), (SENT, "bytes sent")):
        own = sum(row[key] for row in summary["per_worker"] for key in keys) / 2
        shares.append(f"{100 * own / sum(summary['unmasked'][key] for key in keys):.0f} % of the {what}")
    line = f"compared with --mask none: {', '.join(shares)}"
    sample = bytes(continue_text(load_model(tmp_path / "out" / "ckpt.pt"), b"\n", 200))
    expected = f"{line}\na sample of 200 bytes:\n{sample.decode(errors='replace')}".splitlines()
    assert text.splitlines()[-len(expected) :] == expected


def test_one_line_a_validation_without_a_terminal(alone, capsys):
    """And no bar. Each tells how long the rest will take."""
    train.main([*TINY, "--steps", "4", "--eval-every", "2"])
    said = capsys.readouterr()
    lines = [line for line in said.out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4"]
    assert all(" loss " in line and line.endswith(" left") for line in lines) and not said.err


def test_help_has_groups(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    said = capsys.readouterr().out
    places = [said.index(f"\n{title}:\n") for title in ("method", "model", "data", "optimisation", "run")]
    assert places == sorted(places)
    assert said.index("\nmethod:") < said.index("  --mask {") < said.index("\nmodel:")


class InventedWandb(nullcontext):
    """The part of Weights & Biases that is used: a run, which logs."""

    def __init__(self):
        super().__init__(self)
        self.Error, self.__spec__ = KeyError, importlib.machinery.ModuleSpec("wandb", None)
        self.started, self.entries = [], []

    def init(self, **how):
        self.started.append(how)
        return self

    def log(self, entry, step):
        assert step == entry["step"]
        self.entries.append(json.loads(json.dumps(entry)))


def test_wandb_gets_what_the_log_has(alone, monkeypatch, tmp_path):
    wandb = InventedWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train.main([*TINY, "--steps", "3", "--wandb", "sdp", "--out", str(tmp_path / "out")])
    (how,) = wandb.started
    assert how["project"] == "sdp" and how["config"]["steps"] == 3
    entries = [{key: value for key, value in entry.items() if key != "step_ms"} for entry in wandb.entries]
    assert entries == read_log(tmp_path / "out") and len(entries) == 3


def test_wandb_that_cannot_be_used(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(__spec__=None))  # is not installed
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    assert "--wandb sdp: needs its package; pip install wandb" in refused(*TINY, "--wandb", "sdp")
    wandb = InventedWandb()
    monkeypatch.setattr(wandb, "init", lambda **_: {}["no login"])
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(train, "find_spec", lambda name: wandb)
    assert "--wandb sdp: 'no login'" in refused(*TINY, "--wandb", "sdp")
