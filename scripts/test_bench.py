"""Tests of dense.py, bench.py and alignment.py, against autograd on the dense model in float64."""

import json
import zlib
from argparse import Namespace
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.func import functional_call
from torch.nn.functional import cosine_similarity
from torch.utils._python_dispatch import TorchDispatchMode

import train
from masks import assign, spectral_gap
from model import GPTConfig, build, initial_value, units_of
from scripts import alignment, bench
from scripts.alignment import cyclic
from scripts.dense import Dense
from sdp import SDP
from support import costs, launch
from support.chunks import by_bucket
from support.processes import TINY, Ranks, assert_same_checkpoint, read_log, read_summary, slow

pytest_plugins = ["support.testing", "support.processes"]

SMALL = GPTConfig(vocabulary=50, layers=4, width=16, heads=4, hidden=32, context=8)
needs_fsdp = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="an old torch")
DENSE = ["ddp", pytest.param("fsdp", marks=needs_fsdp)]
each_engine = pytest.mark.parametrize("mode", ["none", *DENSE])
adamw = partial(torch.optim.AdamW, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
BAD = ["--workers 4", "--resume", "--finish 0.5", "--resample 5", "--epochs 1", "--mask none", "--out ."]
BAD += ["--device cpu", "--device cuda"]


# ---- helpers


@cache
def units_and_mask(level, workers, config):
    with torch.device("meta"):
        units = units_of(build(config), level)
    return units, assign(units, workers, workers // 2)


def make_engine(mode, level="block", workers=2, config=SMALL, dtype=torch.float64):
    engine, first = Dense if mode in ("ddp", "fsdp") else SDP, partial(initial_value, seed=0)
    units, mask = units_and_mask(level, workers, config)
    return engine(partial(build, config), first, adamw, units, mask, mode, dtype)


def dense_model(dtype=torch.float64):
    model = build(SMALL)
    model.load_state_dict({name: initial_value(model, name, seed=0) for name in model.state_dict()})
    return model.to(dtype)


def batch(step, worker=None, rows=2):
    """(x, targets) of a step: one worker's rows, or those of all."""
    mine = slice(None) if worker is None else slice(worker * rows, (worker + 1) * rows)
    numbers = np.random.default_rng([7, step]).integers(0, SMALL.vocabulary, (8, SMALL.context + 1))
    tokens = torch.from_numpy(numbers)[mine]
    return tokens[:, :-1], tokens[:, 1:]


def flags(micro_batches=1, workers=2):
    return Namespace(micro_batches=micro_batches, grad_clip=0.5, workers=workers, seed=0)


# ---- DDP and FSDP


class Collectives(TorchDispatchMode):
    """Counts the bytes that all-gathers bring together, and the reductions."""

    gathered = reductions = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.gathered += arguments[0].nbytes if "allgather" in str(function) else 0
        self.reductions += "c10d" in str(function) and "reduce" in str(function)
        return function(*arguments, **(options or {}))


def five_steps(mode, passes):
    """Of two processes, against the dense model on one. Returns what a step moved and took."""
    engine, dense, rank = make_engine(mode), dense_model(), dist.get_rank()
    matrices, vectors = ([p for p in dense.parameters() if (p.dim() == 1) == flat] for flat in (False, True))
    optimizer = adamw([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
    for step in range(5):
        with Collectives() as seen:
            norm, loss, _ = train.update(engine, {rank: batch(step, rank, 4)}, flags(passes), step, 1e-2)
        dense_loss = dense(*batch(step))
        dense_loss.backward()
        dense_norm = torch.nn.utils.clip_grad_norm_(dense.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert (loss, norm) == pytest.approx((dense_loss.item(), dense_norm.item()), abs=1e-10)
    sent = {key: total / 5 for key, total in engine.traffic.items()}
    memory = Dense.memory if isinstance(engine, Dense) else costs.memory
    return seen.gathered, seen.reductions, sent, memory(engine, rank, passes)


@pytest.mark.parametrize("passes", [pytest.param(1, marks=slow), 4])
@each_engine
def test_engines_and_micro_batches_equal_the_dense_model(in_processes, mode, passes):
    (gathered, reductions, sent, memory), _ = in_processes(2, five_steps, mode, passes)
    params = sum(p.numel() for p in build(SMALL).parameters())
    if mode == "ddp":
        assert list(memory.values()) == [8 * params, 8 * params, 16 * params]
        assert sent == {"pull": 4 * params, "push": 4 * params} and reductions == 1 + 1  # of the norm
    if mode == "fsdp":
        assert sent["pull"] == pytest.approx(gathered / 2, rel=1e-6)  # each process sends its half
        assert 4 * params < memory["weight_bytes"] < 8 * params and reductions == SMALL.layers + 1 + 1
        assert memory["grad_bytes"] == pytest.approx((4 if passes == 1 else 12) * params, rel=0.01)
        assert memory["optimizer_bytes"] == pytest.approx(8 * params, rel=0.01)


def norms_and_losses(mode, dtype, factors):
    """Of steps {number: factor of rank 1's loss}."""
    engine, rank, found = make_engine(mode, dtype=dtype), dist.get_rank(), []
    if mode == "ddp" and dtype == torch.bfloat16:  # the optimizer begins with what was not rounded
        exact = dense_model(torch.float32).parameters()
        assert all(torch.equal(*pair) for pair in zip(engine.masters, exact, strict=True))
    for step, factor in factors.items():
        by = factor if rank == 1 else 1
        model, mine = engine.workers[rank].model, {rank: batch(step, rank, rows=4)}
        hook = model.register_forward_hook(lambda module, inputs, loss, by=by: loss * by)
        found.append(train.update(engine, mine, flags(), step, 1e-3)[:2])
        hook.remove()
    return found


@each_engine
def test_engines_learn_alike_in_bfloat16(in_processes, mode):
    steps = dict.fromkeys(range(4), 1)
    found = np.array(in_processes(2, norms_and_losses, mode, torch.bfloat16, steps)[0])
    exact = np.array(in_processes(2, norms_and_losses, "none", torch.float32, steps)[0])
    np.testing.assert_allclose(found[:, 1], exact[:, 1], rtol=3e-3)
    np.testing.assert_allclose(found[0], exact[0], rtol=5e-3)


@pytest.mark.parametrize("bad", [float("nan")])
@pytest.mark.parametrize("mode", DENSE)
def test_fault_a_step_that_is_not_finite(in_processes, mode, bad):
    """The next ones are as if it had not been."""
    found, _ = in_processes(2, norms_and_losses, mode, torch.float64, {0: 1, 1: bad, 2: 1, 3: 1})
    expected, _ = in_processes(2, norms_and_losses, mode, torch.float64, {0: 1, 2: 1, 3: 1})
    assert not np.isfinite(found.pop(1)).any() and found == expected


# ---- the benchmark


@needs_fsdp
def test_bench(ranks, tmp_path):
    said = ranks(2, "scripts.bench", *TINY, "--steps", 2, "--units", "neuron", "--out", tmp_path)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert list(found) == ["ddp", "fsdp", "sdp-none", "sdp-backward", "sdp-forward"]
    keys = {"step_ms", "step_ms_spread", "tokens_per_s", "static_bytes", "activation_bytes", "peak_bytes"}
    for name, row in found.items():
        assert row.keys() == keys | {"sent_bytes", "flops", "vs_ddp"} and name in said
        assert row["vs_ddp"] == pytest.approx(row["step_ms"] / found["ddp"]["step_ms"])
        assert row["tokens_per_s"] == pytest.approx(8 * 32 / row["step_ms"] * 1e3)
    flops, sent, saved = (
        {name: row[key] / found["ddp"][key] for name, row in found.items()}
        for key in ("flops", "sent_bytes", "activation_bytes")
    )
    assert flops["fsdp"] == flops["sdp-none"] == saved["fsdp"] == saved["sdp-none"] == 1
    assert 1 < sent["fsdp"] < 1.5 and sent["sdp-none"] == pytest.approx(1, rel=0.02)
    assert flops["sdp-forward"] < flops["sdp-backward"] < 1 and saved["sdp-forward"] < 0.95


@slow
def test_bench_on_two_machines(tmp_path):
    """It has the exchange that training has there, with the same bytes."""
    flags = [*TINY, "--layers", 3, "--units", "neuron", "--steps", 1, "--out"]
    programs = [("scripts.bench", tmp_path / "bench"), ("train.py", tmp_path / "train", "--mask", "forward")]
    for program, *more in programs:
        with Ranks(tmp_path / f"said {program}", 4, program, *flags, *more, machine_of=[0, 0, 1, 1]) as run:
            assert run.finish() == [0] * 4, run.text()
    rows = read_summary(tmp_path / "train")["per_worker"]
    sent = sum(max(row[key] for row in rows) for key in ("push_bytes", "pull_bytes"))
    assert json.loads((tmp_path / "bench" / "bench.json").read_text())["sdp-forward"]["sent_bytes"] == sent


@pytest.mark.parametrize("flag", BAD)
def test_bench_refuses(alone, capsys, monkeypatch, tmp_path, flag):
    start = launch.start
    if flag == "--device cuda":  # as if several processes shared a GPU
        monkeypatch.setattr(launch, "start", lambda *_: (torch.device("cuda"), start("cpu", 60)))
    monkeypatch.delattr(torch.cpu.Stream, "record_event", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench.json").touch()
    with pytest.raises(SystemExit) as stop:
        bench.main([*TINY, *flag.split()])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and f"error: {flag.split()[0]}" in said


# ---- alignment


def held(name, parameter, units, row):
    """1 where a worker with this row of the mask has the parameter, else 0."""
    columns = [u for u, unit in enumerate(units) if name.startswith(f"{unit.layer}.")]
    chunks = torch.tensor(row[columns] if columns else [1.0], dtype=torch.float64)
    rows = chunks.repeat_interleave(len(parameter) // len(chunks))
    return rows.view(-1, *[1] * (parameter.dim() - 1)).expand_as(parameter)


def gradient(config, worker, units, row, level):
    """In step 1, of the dense model in which only the units of this row contribute; flat."""
    parameters, changed, model = dict(dense_model().named_parameters()), {}, build(config)
    for name, parameter in parameters.items():
        rows = held(name, parameter, units, row) if name.endswith((".o", ".down")) else torch.ones(1)
        changed[name] = parameter * rows / (rows.mean() if level == "neuron" else 1)
    torch.manual_seed(zlib.crc32(f"0 1 {worker}".encode()))  # as in train.play
    loss = functional_call(model, changed, batch(0, worker))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters.values()))])


def check_alignment(mode, level, drop_path):
    """Against the dense model. Returns what was found."""
    config, own, whole, has = replace(SMALL, drop_path=drop_path), [], [], []
    engine = make_engine(mode, level, workers=4, config=config)
    batches = {worker: batch(0, worker) for worker in engine.workers}
    found = alignment.compare(engine, batches, flags(1 if drop_path else 2, workers=4), 1)
    assert list(found["workers"]) == list(found["owners"]) == [*engine.buckets, "all"]
    if engine.rank > 0:
        return None  # all have found the same
    parameters = dict(dense_model().named_parameters())
    for worker, row in enumerate(engine.trains):
        own.append(gradient(config, worker, engine.units, row | (mode == "backward"), level))
        whole.append(gradient(config, worker, engine.units, row | True, level))
        has.append(torch.cat([held(n, p, engine.units, row).flatten() for n, p in parameters.items()]))
    sizes = {name: sum(p.numel() for p in each.values()) for name, each in by_bucket(dense_model()).items()}
    layer_of = np.repeat([*sizes], [*sizes.values()])
    for layer in found["owners"]:
        here = torch.from_numpy((layer_of == layer) | (layer == "all"))
        a, b, h = (torch.stack(each)[:, here] for each in (own, whole, has))  # (workers, numbers)
        owners = cosine_similarity((a * h).sum(0) / h.sum(0), b.sum(0), dim=0).item()
        workers = [each or None for each in cosine_similarity(a * h, b * h).tolist()]
        assert found["owners"][layer] == pytest.approx(owners, abs=1e-12)
        assert found["workers"][layer] == pytest.approx(workers, abs=1e-12)
    return found["workers"]["all"]


@pytest.mark.parametrize("level, drop_path", [pytest.param("block", 0.5, marks=slow), ("neuron", 0)])
def test_alignment_of_gradients(in_processes, level, drop_path):
    """In backward masking each worker's gradient is that of the whole model; in forward masking it is not."""
    for n in (2, 4):
        backward = in_processes(n, check_alignment, "backward", level, drop_path)[0]
        # Absent blocks draw no rows to skip, so the others would skip other rows than in the whole model.
        forward = in_processes(n, check_alignment, "forward", level, 0)[0]
        assert backward == pytest.approx([1] * 4, abs=1e-12) and max(forward) < 0.99


def test_train_is_not_changed_by_looking_on(ranks, tmp_path):
    """The same model, bit for bit, and the same log but for its key, at steps K, 2 K, ..."""
    more = "--workers 4 --units neuron --drop-path 0.2 --steps 5".split()
    ranks(2, "train.py", *TINY, *more, "--out", tmp_path / "without")
    said = ranks(2, "scripts.alignment", *TINY, *more, "--every", 2, "--out", tmp_path / "with")
    assert_same_checkpoint(tmp_path / "with" / "ckpt.pt", tmp_path / "without" / "ckpt.pt")
    log = read_log(tmp_path / "with")
    found = {entry["step"]: entry.pop("alignment") for entry in log if "alignment" in entry}
    assert log == read_log(tmp_path / "without") and list(found) == [2, 4]
    means = json.loads((tmp_path / "with" / "alignment.json").read_text())
    for of in ("workers", "owners"):
        expected = np.mean([each[of]["all"] for each in found.values()])
        assert means[of]["all"] == pytest.approx(expected) and f"{of} {expected:.4f}" in said
    per_worker = [read_summary(tmp_path / name)["per_worker"] for name in ("with", "without")]
    assert per_worker[0] == per_worker[1] and said.count("cosine similarity") == 1


def test_alignment_of_cyclic_masks(alone, tmp_path):
    alignment.main([*TINY, *f"--units neuron --steps 1 --cyclic --out {tmp_path}".split()])
    units = units_of(build(GPTConfig(layers=2, width=32, hidden=32, context=32)), "neuron")
    assert read_summary(tmp_path)["spectral_gap"] == spectral_gap(cyclic(units, 4, 2))
