"""Several machines, and workers of unequal size: against arithmetic, and against the dense model in float64.

SLOW=1 in the environment tries more masks. What crosses real interfaces is counted in scripts/test_wire.py.
"""

import os
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist

import train
from course.naive import held_values, loss_and_gradients, mean_over_holders
from masks import Unit, UserError, assign, number_of_groups, roles, spectral_gap
from model import build, initial_value
from sdp import SDP
from support.chunks import by_bucket
from support.machines import make_layout, spread
from support.processes import TINY, Ranks, read_log, read_summary
from support.test_engine import buffers_of_a_step
from test_sdp import (
    SCHEMES,
    SMALL,
    adamw,
    assert_close,
    batch,
    dense_model,
    make_engine,
    make_mask,
    owned,
    state_on_file,
    whole_values,
)  # fmt: skip

pytest_plugins = ["support.testing", "support.processes"]

FEW = [("none", "block"), *(SCHEMES if "SLOW" in os.environ else SCHEMES[::3])]


# ---- several machines


def counted(mode, level, machines, mask):
    """The bytes that cross between machines in a step: as the engine counts them, and element by element."""
    engine, (units, _) = make_engine(mode, level, 4, machines=machines), make_mask(level, 4)
    engine.change(mask, mode)
    (worker,) = engine.workers
    with engine.turn(worker) as model:
        model(*batch(0, worker)).backward()
    engine.step(1e-2)
    crossed = torch.tensor(engine.traffic["between_machines"])
    dist.all_reduce(crossed)
    per_machine = 4 // machines
    expected, dense = 0, build(SMALL)
    for named in (list(of_bucket.items()) for of_bucket in by_bucket(dense).values()):
        for role in roles(mode, mask):  # pushed, then pulled
            size = sum(p.numel() for _, p in named)
            at = (torch.arange(size) // -(-size // 4)) % machines  # slices are numbered place by place
            if machines == 4:
                at = torch.arange(size) // -(-size // 4)
            for machine in range(machines):
                rows = role[machine * per_machine : (machine + 1) * per_machine].any(axis=0)  # of any worker
                held = held_values(dense, units, rows)
                here = torch.cat([held[n].flatten() for n, _ in named]) == 1
                expected += (here & (at != machine)).sum().item() * 8
    return crossed.item(), expected


@pytest.mark.parametrize("mode, level", FEW)
def test_what_crosses_between_machines(in_processes, mode, level):
    """Each value once to every machine that has a reader, and once from every machine that has a trainer."""
    units, by_worker = make_mask(level, 4)
    by_machine = assign(units, 2, 1).repeat(2, axis=0)
    found = []
    for machines, mask in ((1, by_worker), (2, by_worker), (2, by_machine), (4, by_worker)):
        ((crossed, expected), *_) = in_processes(4, counted, mode, level, machines, mask)
        assert crossed == expected
        found.append(crossed)
    assert found[0] == 0 and found[2] <= found[1] <= found[3]
    assert found[2] < found[1] or mode == "none"


def test_equal_columns_lie_apart():
    units = [Unit(f"blocks.{u}", "block", 1) for u in range(12)]
    for machines, holders in ((2, 1), (4, 2), (4, 1)):
        dealt = assign(units, machines, holders)
        mask = spread(dealt, units)
        assert sorted(map(tuple, mask.T)) == sorted(map(tuple, dealt.T))
        patterns = [tuple(column) for column in mask.T]
        kinds = len(set(patterns))
        assert len(set(patterns[:kinds])) == kinds  # each once, before any comes again
    unlike = [unit._replace(cost=u + 1) for u, unit in enumerate(units)]
    assert (spread(dealt, unlike) == dealt).all()


def two_runs(machines):
    """The values after three steps in bfloat16, twice."""
    results = []
    for _ in range(2):
        engine = make_engine("backward", "neuron", 4, dtype=torch.bfloat16, machines=machines)
        for step in range(3):
            for worker in engine.workers:
                with engine.turn(worker) as model:
                    model(*batch(step, worker)).backward()
            engine.step(1e-2, 1.0)
        results.append(whole_values(engine))
    return results


def test_a_layout_gives_the_same_bits_each_time(in_processes):
    for first, second in in_processes(4, two_runs, 2):
        assert_close(first, second, 0)


def test_checkpoints_move_between_machines(in_processes, tmp_path):
    for before in (1, 2) if "SLOW" in os.environ else (2,):
        scheme = "forward", "block", tmp_path / "state"
        in_processes(4, state_on_file, *scheme, True, before)
        results = [in_processes(4, state_on_file, *scheme, False, machines)[0] for machines in (1, 2, 4)]
        for result in results:
            assert_close(result, results[0], 1e-10)


def test_buffers_take_four_layers_at_most(in_processes):
    assert 2 < max(in_processes(4, buffers_of_a_step, "backward", "neuron", torch.float32, 2)) <= 4


def start(said, machine_of, *flags):
    return Ranks(said, len(machine_of), "train.py", *TINY, "--steps", 2, *flags, machine_of=machine_of)


def test_train_on_two_machines(tmp_path):
    """What crosses follows H; the table shows it beside a ring of DDP."""
    flags = ["--layers", 4, "--mask", "forward", "--assign", "machine", "--out", tmp_path / "run"]
    with start(tmp_path / "said", [0, 0, 1, 1], *flags) as run:
        assert run.finish() == [0] * 4, run.text()
    summary, text = read_summary(tmp_path / "run"), run.text()
    assert re.search(r"machine +0 +0 +1 +1\n", text) and "to other machines, MB" in text
    assert "or a larger --coverage helps" in text and summary["machines"] == 2
    rows, dense, params = summary["per_worker"], summary["dense"], summary["params"]
    assert dense["between_machines_bytes"] * 2 == pytest.approx(4 * 2 * params * 3 / 4, rel=1e-3)
    assert summary["unmasked"]["between_machines_bytes"] * 2 == 4 * 2 * params / 2  # 2 P (M - 1) / M
    sent, held = sum(row["between_machines_bytes"] for row in rows), (summary["shared_params"] + params) / 2
    assert sent / 2 == pytest.approx(4 * 2 * held / 2, rel=0.02)  # a machine's: 2 H P (M - 1) / M, float32


def test_machines_of_unequal_size(tmp_path):
    """They exchange as one would, and say so; masks by machine are refused."""
    with start(tmp_path / "said", [0, 0, 1], "--batch-size", 9, "--coverage", 0.6) as run:
        assert run.finish() == [0, 0, 0], run.text()
    assert run.text().count("machines have unequal numbers of processes") == 1
    flags = ["--batch-size", 12, "--assign", "machine", "--layers", 4, "--mask", "forward", "--workers", 6]
    with start(tmp_path / "said 2", [0, 0, 1], *flags) as run:
        run.processes[0].join()
        assert run.processes[0].exitcode == 2
    assert "--assign machine: machines have unequal" in run.text() and "Traceback" not in run.text()


def test_one_process_plays_machines(alone, capsys, tmp_path):
    flags = [*TINY, "--layers", "4", "--workers", "8", "--assign", "machine", "--steps", "2"]
    train.main([*flags, "--machines", "2", "--coverage", "0.5", "--out", str(tmp_path / "run")])
    text, summary = capsys.readouterr().out, read_summary(tmp_path / "run")
    assert re.search(r"machine +0 +0 +0 +0 +1 +1 +1 +1\n", text)
    assert len(re.findall(r"blocks\.\d +(█ +█ +█ +█ +· +· +· +·|· +· +· +· +█ +█ +█ +█)\n", text)) == 4
    assert summary["spectral_gap"] == 0 and summary["holders_per_unit"] == 4
    assert "to other machines" not in text  # nothing was sent


# ---- workers of unequal size


@pytest.mark.parametrize("level", ["block", "neuron"])
@pytest.mark.parametrize("capacity", [[3, 1, 1, 1], [1, 2, 2, 3]])
def test_masks_follow_the_capacity(level, capacity):
    units, _ = make_mask(level, 4)
    for seed in range(20 if "SLOW" in os.environ else 2):
        mask = assign(units, 4, 2, seed, capacity=capacity)
        assert (mask.sum(axis=0) == 2).all() and number_of_groups(mask) == 1 and spectral_gap(mask) > 0
        for of_kind in {unit.kind for unit in units}:
            those = [unit.kind == of_kind for unit in units]
            share = 2 * sum(those) * np.array(capacity) / sum(capacity)
            assert abs(mask[:, those].sum(axis=1) - share).max() < 1 + 1e-9
        assert (assign(units, 4, 2, seed, capacity=[5] * 4) == assign(units, 4, 2, seed)).all()
    with pytest.raises(UserError, match="--capacity"):
        assign(units, 4, 2, capacity=[4, 1, 1, 1])


def unequal_engine(mode, level, capacity, rows):
    units, _ = make_mask(level, 4)
    mask = assign(units, 4, 2, capacity=capacity) if mode != "none" else np.ones((4, len(units)), bool)
    weights = [4 * number / sum(rows) for number in rows]
    first = partial(initial_value, seed=0)
    more = {"dtype": torch.float64, "layout": make_layout(capacity=capacity), "weights": weights}
    return SDP(partial(build, SMALL), first, adamw, units, mask, mode, **more), units, mask


def unequal_gradients(mode, level, capacity, rows):
    """What the owners hold after a step of unequal rows, against the dense gradients of the same rows."""
    engine, units, mask = unequal_engine(mode, level, capacity, rows)
    edges, dense, gradients, weights = np.cumsum([0, *rows]), dense_model(), [], []
    x, y = batch(0)
    for worker in range(4):
        mine = slice(edges[worker], edges[worker + 1])
        held = held_values(dense, units, mask[worker])
        gradients.append(loss_and_gradients(dense, x[mine], y[mine], mode, held)[1])
        weights.append({name: rows[worker] * values for name, values in held.items()})
    for worker in engine.workers:
        mine = slice(edges[worker], edges[worker + 1])
        with engine.turn(worker) as model:
            (engine.weights[worker] * model(x[mine], y[mine])).backward()
    engine.average()
    found = owned(engine, lambda bucket: bucket.mean)
    assert_close(found, mean_over_holders(gradients, weights), 1e-12)  # each row counts once
    if mode == "none":
        loss = dense(x[: sum(rows)], y[: sum(rows)])
        of_batch = torch.autograd.grad(loss, list(dense.parameters()))
        assert_close(found, dict(zip(gradients[0], of_batch)), 1e-12)  # of the whole batch
    return sum(bucket.master.numel() for bucket in engine.buckets.values())


@pytest.mark.parametrize("mode, level", FEW)
def test_unequal_workers_have_the_gradients_of_their_rows(in_processes, mode, level):
    """Each row counts as much as any other; owned slices follow the capacity."""
    params = sum(p.numel() for p in build(SMALL).parameters())
    for n in (4, 2):
        owned_by = in_processes(n, unequal_gradients, mode, level, [3, 1, 1, 1], [3, 1, 2, 2])
        shares = np.reshape([3, 1, 1, 1], (n, -1)).sum(axis=1) / 6
        np.testing.assert_allclose(np.array(owned_by) / params, shares, atol=0.01)


def test_train_unequal_workers(ranks, tmp_path):
    """Held parameters follow the capacity within a unit; the table shows each worker's memory."""
    flags = ["--layers", 6, "--mask", "forward", "--capacity", "3,1,1,1", "--rows", "2,1,1,1"]
    flags += ["--batch-size", 10, "--steps", 2, "--out", tmp_path / "run"]
    text = ranks(4, "train.py", *TINY, *flags)
    summary, line = read_summary(tmp_path / "run"), text.split("of each worker, MB: ")[1].splitlines()[0]
    rows, params, shared = summary["per_worker"], summary["params"], summary["shared_params"]
    block = (params - shared) / 6
    for row, share in zip(rows, (1, 1 / 3, 1 / 3, 1 / 3)):
        assert abs(row["held_params"] - shared - share * 6 * block) <= block
    assert rows[0]["flops"] > 2.5 * rows[1]["flops"]
    memory = [float(number) for number in line.split(", ")]
    assert len(memory) == 4 and memory[0] > 2 * max(memory[1:])
    assert [entry["tokens"] for entry in read_log(tmp_path / "run")] == [320, 640]
