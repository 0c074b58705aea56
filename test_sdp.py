"""What proves the method. Each claim is checked against something that knows nothing of the engine: torch's
DistributedDataParallel, autograd on the dense model, arithmetic on the masks. Real gloo processes, no mocks;
float64 where equality is meant.

    pytest                 # all, three to five minutes on two cores
    pytest -k masks        # what needs no processes
    SLOW=1 pytest          # more repeats of what is random

Needs all other files. Read it last, in their order: masks, model, data, engine, train.
"""

import dataclasses
import functools
import itertools
import os
import re
import subprocess
import sys
import textwrap
from argparse import Namespace
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import masks
import sdp
import train
from course import naive
from course.naive import held_values, loss_and_gradients, mean_over_holders
from data import Text, read_bytes
from masks import Unit, UserError, assign, holders_per_unit, spectral_gap
from model import GPTConfig, ResNetConfig, ViTConfig, build, initial_value, units_of
from sdp import SDP, Bucket, Layout, Worker
from support import checkpoint, costs, evaluation
from support.chunks import by_bucket
from support.evaluation import estimate_statistics
from support.machines import make_layout
from support.processes import HERE, read_log, read_summary, slow
from support.testing import some_images

pytest_plugins = ["support.testing", "support.processes"]

SMALL = GPTConfig(vocabulary=50, layers=4, width=16, heads=4, hidden=32, context=8)
SMALL_VIT = ViTConfig(layers=4, width=16, heads=4, hidden=32, classes=5, image=16, patch=4)
SMALL_RESNET = ResNetConfig(width=8, classes=5, image=16)
CONFIGS = {
    "gpt": SMALL,
    "vit": SMALL_VIT,
    "resnet": SMALL_RESNET,
    "resnet-group-norm": ResNetConfig(width=8, norm="group", classes=5, image=16),
}
usual = [pytest.param(CONFIGS[name], id=name) for name in ("gpt", "resnet")]
others = [pytest.param(CONFIGS[name], id=name, marks=slow) for name in ("vit", "resnet-group-norm")]
each_model = pytest.mark.parametrize("config", usual + others)
SCHEMES = [(mode, level) for mode in ("backward", "forward") for level in ("block", "neuron")]
FEWER = [*SCHEMES[::3], *(pytest.param(*scheme, marks=slow) for scheme in SCHEMES[1:3])]


# ---- helpers, from first principles


def adamw(groups):
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


def sgd(groups):
    return torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1)


def dense_model(config=SMALL, dtype=torch.float64):
    model = build(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(model, name, seed=0))
    return model.to(dtype)


@functools.cache
def make_mask(level, workers, coverage=0.5, config=SMALL):
    with torch.device("meta"):
        units = units_of(build(config), level)
    return units, assign(units, workers, holders_per_unit(coverage, workers))


def make_engine(
    mode, level, workers, coverage=0.5, config=SMALL, dtype=torch.float64, optimizer=adamw, machines=1
):
    units, mask = make_mask(level, workers, coverage, config)
    first, layout = functools.partial(initial_value, seed=0), make_layout(machines)
    more = {"dtype": dtype, "layout": layout}
    return SDP(functools.partial(build, config), first, optimizer, units, mask, mode, **more)


def batch(step, worker=None, rows=2, config=SMALL):
    """The batch of a step as (x, targets): one worker's rows of it, or all four workers' rows."""
    rng = np.random.default_rng([7, step])
    mine = slice(None) if worker is None else slice(worker * rows, (worker + 1) * rows)
    if not isinstance(config, GPTConfig):
        images = torch.from_numpy(rng.standard_normal((4 * rows, 3, config.image, config.image)))
        return images[mine], torch.from_numpy(rng.integers(0, config.classes, 4 * rows))[mine]
    numbers = rng.integers(0, config.vocabulary, (4 * rows, config.context + 1))
    tokens = torch.from_numpy(numbers)[mine]
    return tokens[:, :-1], tokens[:, 1:]


def whole_values(engine):
    with evaluation.whole(engine) as model:
        return {name: parameter.clone() for name, parameter in model.named_parameters()}


def owned(engine, of_bucket, config=SMALL):
    """{name: the whole parameter's values, or gradients}, put together from the slices of all owners."""
    with torch.device("meta"):
        parameters = by_bucket(build(config))
    found = {}
    for bucket_name, bucket in engine.buckets.items():
        slices = [None] * engine.processes
        dist.all_gather_object(slices, (engine.layout.my_slice, of_bucket(bucket)))
        flat = torch.cat([values for _, values in sorted(slices, key=lambda each: each[0])])
        for name, parameter in parameters[bucket_name].items():
            found[name], flat = flat[: parameter.numel()].view(parameter.shape), flat[parameter.numel() :]
        assert not len(flat)
    return found


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)


# ---- masks


def test_masks_number_of_holders():
    for workers, coverage, holders in ((1, 0.5, 1), (5, 0.5, 3), (8, 0.4, 3), (8, 0.0625, 1)):
        assert holders_per_unit(coverage, workers) == holders
    for coverage in (0, -0.5, 1.1, float("nan"), 0.06):
        with pytest.raises(UserError, match="--coverage"):
            holders_per_unit(coverage, 8)
    for workers in range(1, 200):
        with pytest.raises(UserError, match="no holders; at least") as caught:
            holders_per_unit(1e-6, workers)
        assert holders_per_unit(float(str(caught.value).split()[-1]), workers) == 1  # works as printed


def test_masks_cover_balance_and_connect():
    """Random cases: every column sums to p; loads of equal units differ by at most one, within each kind; the
    worker graph is connected where there are half as many edges again as a tree has; the same seed gives the
    same mask, whatever numpy's global state."""
    rng, connected = np.random.default_rng(0), 0
    for _ in range(500 if "SLOW" in os.environ else 40):
        workers, kinds = int(rng.integers(1, 17)), int(rng.integers(1, 4))
        units = [
            Unit(f"layer{k}", f"layer{k}", 3 + k) for k in range(kinds) for _ in range(rng.integers(1, 20))
        ]
        fewest = min(sum(u.kind == unit.kind for u in units) for unit in units)
        holders = int(rng.integers(-(-workers // fewest), workers + 1))
        seed, number = int(rng.integers(1000)), int(rng.integers(3))
        mask = assign(units, workers, holders, seed, number)
        assert mask.shape == (workers, len(units)) and mask.dtype == bool
        assert (mask.sum(axis=0) == holders).all()
        for kind in {unit.kind for unit in units}:
            load = mask[:, [unit.kind == kind for unit in units]].sum(axis=1)
            assert load.min() >= 1 and load.max() - load.min() <= 1
        if holders >= 2 and len(units) * (holders - 1) >= 1.5 * (workers - 1):
            assert spectral_gap(mask) > 0, (workers, units, holders, seed)
            connected += 1
        np.random.seed(seed)
        assert (assign(units, workers, holders, seed, number) == mask).all()
        with pytest.raises(UserError, match="--coverage"):
            assign(units, fewest * holders + 1, holders, seed)
    assert connected > 20


def test_masks_are_even_along_the_depth():
    """Of layers 1 to u each worker holds floor(u p / N) or one more, whatever they cost. So it has at most 3
    of ceil(N / p) layers in a row, and some of any 2 ceil(N / p). Where p divides N, it holds at most 2, and
    exactly one of layers 1 to N / p, one of the next N / p, and so on."""
    rng = np.random.default_rng(0)
    for workers, holders in product(range(1, 17), range(1, 17)):
        if holders <= workers:
            layers, run = int(rng.integers(32, 64)), -(-workers // holders)
            costs = rng.integers(1, 9, layers) ** (holders % 2)  # equal for an even number of holders
            units = [Unit(f"blocks.{u}", "blocks", int(cost)) for u, cost in enumerate(costs)]
            mask = assign(units, workers, holders, mask_number=1)
            held = np.pad(
                mask.cumsum(axis=1), ((0, 0), (1, 0))
            )  # of the first u layers, [workers, 1 + layers]
            above = held - np.arange(layers + 1) * holders // workers
            assert above.min() == 0 and above.max() <= 1
            in_a_run = held[:, run:] - held[:, :-run]
            assert in_a_run.max() <= 3 and (held[:, 2 * run :] - held[:, : -2 * run]).min() >= 1
            if workers % holders == 0:
                assert in_a_run.max() <= 2 and (in_a_run[:, ::run] == 1).all()


GAPS = [  # workers, units, holders, and a gap that every seed reaches
    (4, 6, 2, 0.66), (8, 6, 4, 0.66), (8, 12, 2, 0.33), (8, 12, 3, 0.56), (8, 12, 4, 0.71), (8, 12, 6, 0.92),
    (8, 22, 2, 0.38), (8, 22, 3, 0.63), (8, 24, 4, 0.75), (32, 24, 4, 0.30), (16, 16, 2, 0.03),
]  # fmt: skip


@pytest.mark.parametrize("workers, count, holders, gap", GAPS)
def test_masks_mix_well(workers, count, holders, gap):
    units = [Unit(f"blocks.{u}", "blocks", 1) for u in range(count)]
    for seed in range(20 if "SLOW" in os.environ else 3):
        assert spectral_gap(assign(units, workers, holders, seed)) >= gap


def test_masks_of_a_run():
    """New ones every so many steps; at last backward; by the step alone."""
    found = [masks.schedule(step, "forward", 30, resample=4, finish=0.3) for step in range(1, 31)]
    assert [number for number, _ in found] == [(step - 1) // 4 for step in range(1, 31)]
    assert [mode for _, mode in found] == ["forward"] * 21 + ["backward"] * 9
    assert {masks.schedule(step, "backward", 10) for step in range(1, 11)} == {(0, "backward")}
    units = [Unit(f"blocks.{u}", "blocks", 1) for u in range(6)]
    dealt = [assign(units, 8, 4, mask_number=number) for number in range(8)]
    assert len({mask.tobytes() for mask in dealt}) == 8


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("workers, holders, gap, most", [(8, 4, 0.74, 1.15), (4, 2, 0.49, 1.1)])
def test_masks_of_a_resnet_balance_parameters_and_flops(seed, workers, holders, gap, most):
    """Blocks by parameters alone would balance, and split the workers into two groups that never mix."""
    with torch.device("meta"):
        units = units_of(build(ResNetConfig()), "block")
    first, second = 2 * 32 * 32 * 64 * 64 * 9 * 2, 2 * 16 * 16 * 9 * (64 * 128 + 128 * 128)
    assert [unit.flops for unit in units[:3]] == [first, first, second]
    assert [unit.cost for unit in units[:3]] == [73984, 73984, 9 * (64 * 128 + 128 * 128) + 4 * 128]
    mask = assign(units, workers, holders, seed)
    load, flops = (mask @ np.array([getattr(unit, what) for unit in units]) for what in ("cost", "flops"))
    assert (mask.sum(axis=0) == holders).all() and (mask.sum(axis=1) == len(units) / 2).all()
    assert load.max() / load.mean() < most and flops.max() / flops.mean() < 1.15
    assert spectral_gap(mask) > gap
    shown = masks.describe(mask, units, 0.5)
    assert f"has {load.max() / load.mean():.3f} times the mean in parameters" in shown
    assert f"{flops.max() / flops.mean():.3f} in FLOPs" in shown


def test_masks_that_cannot_connect():
    """Two units with two holders each cannot connect four workers: one line says so, and what helps."""
    units = [Unit(f"blocks.{u}", "blocks", 1, 1) for u in range(2)]
    mask = assign(units, workers=4, holders=2)
    assert masks.number_of_groups(mask) == 2 and spectral_gap(mask) == 0
    (line,) = [line for line in masks.describe(mask, units, 0.5).splitlines() if "spectral gap" in line]
    assert "0.000 (2 groups of workers share no unit: --resample, --keep or a larger --coverage" in line


def test_masks_spectral_gap():
    assert spectral_gap(np.ones((5, 7), bool)) == 1
    cliques = np.zeros((4, 6), bool)
    cliques[:2, :3] = cliques[2:, 3:] = True
    assert spectral_gap(cliques) == 0
    mask = make_mask("neuron", 6)[1]
    walk = (mask / mask.sum(axis=1, keepdims=True)) @ (mask / mask.sum(axis=0)).T  # worker -> unit -> worker
    second = np.sort(np.abs(np.linalg.eigvals(walk)))[-2]
    assert spectral_gap(mask) == pytest.approx(1 - second, abs=1e-8)


def test_masks_command(monkeypatch, capsys):
    """It shows a picture that fits, or says in one line what is wrong."""
    command = [sys.executable, "masks.py", "--workers", "8", "--count", "12", "--coverage", "0.4"]
    shown = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout
    rows = [line for line in shown.splitlines() if line.startswith("unit ")]
    assert len(rows) == 12 and all(row.count("█") == 3 and row.count("·") == 5 for row in rows)
    assert "coverage: requested 0.4, actual 0.375 (3 of 8 workers hold each unit)" in shown
    assert "spectral gap: 0." in shown
    for flags in ("--workers 0", "--workers x", "--count 0", "--coverage 2", "--seed -1", "--layers 3"):
        monkeypatch.setattr(sys, "argv", ["masks.py", *flags.split()])
        with pytest.raises(SystemExit) as stop:
            masks.main()
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and flags.split()[0] in line
    for workers, level in product((1, 4, 8, 64, 500), ("block", "neuron")):
        units, mask = make_mask(level, workers, coverage=0.7, config=GPTConfig())
        assert max(map(len, masks.picture(mask, units).splitlines())) <= 120


# ---- the method, saving nothing


@pytest.mark.parametrize("mode, level", [pytest.param("none", "block", marks=slow), *FEWER])
def test_naive_learns(alone, monkeypatch, capsys, mode, level):
    """Its command, on a text that is read faster: better than knowing nothing, which is ln 256."""
    text = read_bytes(HERE / "masks.py", context=64, tests=4)
    monkeypatch.setattr(naive.data, "load", lambda *_, **__: text)
    naive.main(["--mask", mode, "--units", level], steps=12)
    loss, val_loss = re.fullmatch(r"step 12: loss (.+), val_loss (.+)\n", capsys.readouterr().out).groups()
    assert 1 < float(loss) < 4 and 1 < float(val_loss) < 4 < np.log(256)


# ---- the engine


def worked_example():
    """The example in the reading guide, course/reading.md."""
    parameters = {"blocks.0.norm.weight": torch.zeros(3), "blocks.0.mlp.w": torch.zeros(2, 4)}
    mask = np.array([[True, False], [False, True]])
    layout = Layout()
    bucket = Bucket(parameters, {"blocks.0.mlp": [0, 1]}, parameters.get, torch.float32, "cpu", layout)
    has = bucket.has(mask)
    route, _ = layout.routes(bucket, has, ~has, Counter()).both
    tables = (bucket.chunk_edges, bucket.unit_of_chunk, bucket.slice_edges, bucket.my_edges)
    return *(table.tolist() for table in tables), route.from_owners, route.to_workers, route.runs


def test_the_worked_example(in_processes):
    first, second = in_processes(2, worked_example)
    assert first == ([0, 3, 7, 11], [-1, 0, 1], [0, 6, 11], [0, 3, 6, 6], [6, 1], [6, 3], [(0, 6), (0, 3)])
    assert second[3:] == ([0, 0, 1, 5], [3, 4], [1, 4], [(0, 1), (1, 5)])


def test_the_program_in_the_docstring_runs(alone):
    lines = sdp.__doc__.split("A whole program")[1].splitlines()[2:]
    program = list(itertools.takewhile(lambda line: line.startswith("    ") or not line, lines))
    found = {}
    exec(textwrap.dedent("\n".join(program)), found)
    assert found["norm"] > 0 and list(found["engine"].workers) == [0, 1]


def none_and_ddp(config, optimizer):
    """10 steps of both on the same batches, gradient clipping active."""
    rank, n = dist.get_rank(), dist.get_world_size()
    engine = make_engine("none", "block", n, config=config, optimizer=optimizer)
    ddp = DistributedDataParallel(dense_model(config), gradient_as_bucket_view=True)
    matrices = [p for p in ddp.parameters() if p.dim() > 1]
    vectors = [p for p in ddp.parameters() if p.dim() == 1]
    optimizer = optimizer([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
    rows, clipped = 8 // n, 0
    for step in range(10):
        x, y = (t[rank * rows : (rank + 1) * rows] for t in batch(step, config=config))
        with engine.turn(rank) as model:
            loss = model(x, y)
            loss.backward()
        norm, loss_sum = engine.step(1e-2, 0.5, loss.detach())
        ddp_loss = ddp(x, y)
        ddp_loss.backward()
        ddp_norm = torch.nn.utils.clip_grad_norm_(ddp.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        clipped += ddp_norm > 0.5
        assert abs(norm - ddp_norm.item()) < 1e-10
        dist.all_reduce(ddp_loss.detach_())
        assert abs(loss_sum - ddp_loss.item()) < 1e-10
    assert clipped > 3
    values = whole_values(engine)
    assert_close(values, dict(ddp.module.named_parameters()), 1e-10)
    moved = (values["head.weight"] - dense_model(config).head.weight).abs().max()
    assert moved > 0.01


@pytest.mark.parametrize(
    "n, model, optimizer",
    [(1, "gpt", adamw), (2, "gpt", adamw), (4, "gpt", adamw), (4, "resnet", sgd)]
    + [pytest.param(4, model, adamw, marks=slow) for model in ("vit", "resnet-group-norm")],
)
def test_mask_none_equals_ddp(in_processes, n, model, optimizer):
    in_processes(n, none_and_ddp, CONFIGS[model], optimizer)


def only_the_last_pass_communicates():
    traffic = []
    for passes in (1, 3):
        engine = make_engine("backward", "neuron", 2)
        (worker,) = engine.workers
        with engine.turn(worker, passes) as model:
            for i in range(passes):
                before = engine.traffic["push"]
                model(*batch(i, worker)).backward()
                assert (engine.traffic["push"] > before) == (i == passes - 1)
        engine.average()
        traffic.append(dict(engine.traffic))
    assert traffic[0] == traffic[1]
    with pytest.raises(RuntimeError, match="more backward passes"):
        with engine.turn(worker) as model:
            for _ in range(2):
                model(*batch(0, worker)).backward()


def interrupted_turns():
    """Ctrl-C in the middle of a step: the next step is refused, until all have played again."""
    norms = []
    for number_of_passes in (None, 0, 1):  # not interrupted; before and after a backward pass
        engine = make_engine("backward", "neuron", 4)
        first, second, *_ = engine.workers
        if number_of_passes is not None:
            with engine.turn(first) as model:
                model(*batch(0, first)).backward()
            with pytest.raises(KeyboardInterrupt), engine.turn(second) as model:
                for _ in range(number_of_passes):
                    model(*batch(0, second)).backward()
                raise KeyboardInterrupt
            with pytest.raises(RuntimeError, match="have not finished their turns"):
                engine.step(1e-2)
        for worker in engine.workers:
            with engine.turn(worker) as model:
                model(*batch(0, worker)).backward()
        norms += engine.step(1e-2)
    assert norms[0] == norms[1] == norms[2]


def test_an_interrupted_turn_does_not_count(in_processes):
    in_processes(1, interrupted_turns)


def test_only_the_last_pass_communicates(in_processes):
    in_processes(2, only_the_last_pass_communicates)


def gradients_that_arrive(mode, level, same_batch, config, changed=False, machines=1):
    """One step of each worker; what the owners hold against the mean of the trainers' dense gradients."""
    engine = make_engine(mode, level, 4, config=config, machines=machines)
    units, mask = make_mask(level, 4, config=config)
    if changed:  # to this mode and mask, from others
        engine = make_engine("backward" if mode == "forward" else "forward", level, 4, 0.75, config)
        for worker in engine.workers:
            with engine.turn(worker) as model:
                model(*batch(1, worker, config=config)).backward()
        engine.step(lr=0.0)
        mask = assign(units, 4, 2, mask_number=3)
        engine.change(mask, mode)
    dense, mine, of_all = dense_model(config), {}, [None] * engine.processes
    held = [held_values(dense, units, row) for row in mask]
    for worker in engine.workers:
        x, y = batch(0, worker=0 if same_batch else worker, config=config)
        mine[worker] = loss_and_gradients(dense, x, y, mode, held[worker])[1]
    dist.all_gather_object(of_all, mine)
    expected = [gradients for _, gradients in sorted(item for each in of_all for item in each.items())]
    for worker in engine.workers:
        with engine.turn(worker) as model:
            model(*batch(0, worker=0 if same_batch else worker, config=config)).backward()
            assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        assert all(p.grad is None for p in model.parameters())  # freed once they were sent
    engine.average()
    found = owned(engine, lambda bucket: bucket.mean, config)
    assert_close(found, mean_over_holders(expected, held), 1e-12)
    if mode == "backward" and same_batch:
        assert_close(found, expected[0], 1e-12)  # unbiased: the dense gradient itself


@pytest.mark.parametrize("mode, level", SCHEMES)
@each_model
def test_owners_get_the_mean_of_the_holders_gradients(in_processes, mode, level, config):
    if config != SMALL and (mode, level) not in (("backward", "block"), ("forward", "neuron")):
        pytest.skip("these two schemes suffice for images")
    in_processes(4, gradients_that_arrive, mode, level, False, config)
    if config == SMALL:
        in_processes(2, gradients_that_arrive, mode, level, True, config)
        in_processes(4, gradients_that_arrive, mode, level, False, config, False, 2)  # on two machines


@pytest.mark.parametrize("mode, level", SCHEMES)
def test_after_a_change_of_masks_the_same_holds(in_processes, mode, level):
    for n in (4, 2):
        in_processes(n, gradients_that_arrive, mode, level, False, SMALL, True)


def forward_masked_worker(level, config):
    """A worker's own loss and gradients, and what it has allocated, against the dense model."""
    engine, (units, mask) = (
        make_engine("forward", level, 4, config=config),
        make_mask(level, 4, config=config),
    )
    (worker,) = engine.workers
    dense, (x, y) = dense_model(config), batch(3, worker, config=config)
    held = held_values(dense, units, mask[worker])
    expected_loss, expected = loss_and_gradients(dense, x, y, "forward", held)
    with engine.turn(worker) as model:
        loss = model(x, y)
        local = dict(model.named_parameters())
        found = dict(zip(local, torch.autograd.grad(loss, list(local.values()))))
    assert abs(loss.item() - expected_loss.item()) < 1e-12
    assert found.keys() == {n for n in held if held[n].any()}
    assert_close(found, {n: expected[n][held[n] == 1].view_as(found[n]) for n in found}, 1e-12)
    assert all(expected[n][held[n] == 0].abs().sum() == 0 for n in expected)  # naive.py's own zeros
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == 8 * sum(values.sum() for values in held.values())
    assert sum(p.numel() for p in local.values()) < 0.8 * sum(p.numel() for p in dense.parameters())
    return sorted(local)


@pytest.mark.parametrize("level", ["block", "neuron"])
@each_model
def test_forward_masking_is_a_smaller_model(in_processes, level, config):
    names = in_processes(4, forward_masked_worker, level, config)
    assert (len(set(map(tuple, names))) > 1) == (level == "block")  # other workers have other blocks


def pulled_values(mode, level, dtype):
    """After a pull over buffers full of NaN, each worker's parameters are the owners' values to the last
    bit."""
    engine, (units, mask) = make_engine(mode, level, 4, dtype=dtype), make_mask(level, 4)
    masters = owned(engine, lambda bucket: bucket.master)
    dense = dense_model(dtype=torch.float32)
    (worker,) = engine.workers
    assert all(part.values.untyped_storage().nbytes() == 0 for part in engine.workers[worker].parts)
    for part in engine.workers[worker].parts:
        part.values.untyped_storage().resize_(part.values.nbytes)  # as large as `begin` will make it
        part.values.fill_(torch.nan)
    engine.workers[worker].begin()
    engine.workers[worker].wait_for(engine.workers[worker].parts[-1])
    read = 0
    for name, parameter in engine.workers[worker].model.named_parameters():
        master = masters[name.replace(".frozen.", ".")]
        row = mask[worker] if parameter.requires_grad else ~mask[worker]
        here = held_values(dense, units, row)[name.replace(".frozen.", ".")] == 1
        expected = master[here].view_as(parameter).to(dtype)
        assert parameter.dtype == dtype and torch.equal(parameter, expected), name
        read += parameter.numel()
    engine.workers[worker].end(free=False)
    total = sum(master.numel() for master in masters.values())
    assert read == total if mode == "backward" else read < total
    assert all(m.dtype == torch.promote_types(dtype, torch.float32) for m in masters.values())
    everything = {name: value.to(dtype) for name, value in masters.items()}
    assert_close(whole_values(engine), everything, 0)


@pytest.mark.parametrize("mode, level", SCHEMES)
def test_readers_agree_to_the_last_bit(in_processes, mode, level):
    in_processes(4, pulled_values, mode, level, torch.float32 if level == "block" else torch.bfloat16)


def train_four_workers(mode, level, config, machines=1, steps=3):
    engine = make_engine(mode, level, 4, config=config, machines=machines)
    first = whole_values(engine)
    for step in range(steps):
        for worker in engine.workers:
            with engine.turn(worker) as model:
                model(*batch(step, worker, config=config)).backward()
        engine.step(lr=1e-2, clip=1.0)
    if len(engine.workers) > 1:  # nothing of a worker is left when its turn is over
        of_workers = [part.values for worker in engine.workers.values() for part in worker.parts]
        assert all(values.untyped_storage().nbytes() == 0 for values in of_workers)
    return first, whole_values(engine)


def train_naively(mode, level, config, steps=3):
    """The same run by naive.py: the whole model's last values."""
    units, mask = make_mask(level, 4, config=config)
    model = dense_model(config)
    held = [held_values(model, units, row) for row in masks.roles(mode, mask)[0]]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = adamw([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
    for step in range(steps):
        gradients = []
        for worker in range(4):
            x, y = batch(step, worker, config=config)
            gradients.append(loss_and_gradients(model, x, y, mode, held[worker])[1])
        for name, gradient in mean_over_holders(gradients, held).items():
            model.get_parameter(name).grad = gradient
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return dict(model.named_parameters())


@pytest.mark.parametrize("mode, level", [pytest.param("none", "block", marks=slow), *FEWER])
@pytest.mark.parametrize("config", [SMALL, SMALL_VIT, SMALL_RESNET], ids=["gpt", "vit", "resnet"])
def test_processes_do_not_matter(in_processes, mode, level, config):
    """Four workers on 1, 2 and 4 processes, also on two machines: all learn what naive.py does. The initial
    model is the dense one."""
    if config != SMALL and (mode, level) not in (("backward", "block"), ("forward", "neuron")):
        pytest.skip("these two schemes suffice for images")
    layouts = [(1, 1), (4, 1)] + ([(4, 2)] if config == SMALL else [])
    layouts += (
        [(2, 1), (2, 2), (4, 4)] if "SLOW" in os.environ or (config, level) == (SMALL, "neuron") else []
    )
    of_layouts = [in_processes(n, train_four_workers, mode, level, config, m) for n, m in layouts]
    runs, expected = sum(of_layouts, []), train_naively(mode, level, config)
    for first, last in runs:
        assert_close(first, dict(dense_model(config).named_parameters()), 0)
        assert_close(last, expected, 1e-10)
    assert (runs[0][1]["head.weight"] - runs[0][0]["head.weight"]).abs().max() > 0.01


def gradients_alive(worker):
    """The bytes of a worker's gradients now, with the buffers of the pushes under way."""
    own = [p.grad.nbytes for part in worker.parts for p in part.trained if p.grad is not None]
    first = len(worker.unpushed)
    under_way = worker.parts[first : first + len(worker.pushing)]
    return sum(own) + sum(part.routes.push_buffer * part.values.itemsize for part in under_way)


def cost_of_a_step(mode, level, coverage, dtype):
    """Bytes that this process sends in a step, and what stays on it."""
    config, alive, start_push = GPTConfig(context=8), [0], Worker._start_push
    engine = make_engine(mode, level, 4, coverage, config, dtype)
    (worker,) = engine.workers
    with pytest.MonkeyPatch.context() as patch, engine.turn(worker) as model:
        patch.setattr(
            Worker, "_start_push", lambda self: [alive.append(gradients_alive(self)), start_push(self)]
        )
        model(*batch(0, worker, config=config)).backward()
    assert costs.gradient_bytes(engine.workers[worker], 1) == max(alive)
    engine.step(lr=1e-2)
    moments = sum(t.nbytes for s in engine.optimizer.state.values() for t in s.values() if t.dim() > 0)
    # what is here of what the worker has: counted element by element
    units, mask = make_mask(level, 4, coverage, config)
    dense, parts = build(config), {"trains": 0, "reads": 0, "trains_here": 0, "reads_by_others": 0}
    trains, reads = masks.roles(mode, mask)
    trained = held_values(dense, units, trains[worker])
    read_by_others = [held_values(dense, units, reads[w]) for w in range(4) if w != worker]
    for names in map(list, by_bucket(dense).values()):
        cut = -(-sum(dense.get_parameter(name).numel() for name in names) // 4)
        here = slice(worker * cut, (worker + 1) * cut)
        flat = torch.cat([trained[name].flatten() for name in names])
        parts["trains"] += int(flat.sum())
        parts["trains_here"] += int(flat[here].sum())
        for read in read_by_others:
            flat = torch.cat([read[name].flatten() for name in names])
            parts["reads_by_others"] += int(flat[here].sum())
    assert engine.traffic["push"] == dtype.itemsize * (parts["trains"] - parts["trains_here"])
    assert engine.traffic["pull"] == dtype.itemsize * parts["reads_by_others"]
    return engine.traffic["push"], engine.traffic["pull"], moments, costs.memory(engine, worker, 1)


@pytest.mark.parametrize(
    "mode, level, coverage, dtype",
    [(*scheme, 0.5, torch.float32) for scheme in [("none", "block"), *SCHEMES]]
    + [pytest.param(*scheme, 0.75, torch.bfloat16, marks=slow) for scheme in SCHEMES[1:3]],
)
def test_traffic_and_memory_follow_the_law(in_processes, mode, level, coverage, dtype):
    """The README's tables: pushed and pulled are H = S + C (1 - S) of an all-reduce's halves, S the shared
    share; weights H, gradients one layer's and the owner's mean, optimizer 12 / N bytes per parameter."""
    of_ranks = in_processes(4, cost_of_a_step, mode, level, coverage, dtype)
    units, _ = make_mask(level, 4, coverage, GPTConfig())
    params = sum(p.numel() for p in build(GPTConfig()).parameters())
    maskable = sum(unit.cost for unit in units)
    half = (1 - 1 / 4) * params * dtype.itemsize
    law = 1 - maskable / params + coverage * maskable / params
    push, pull = (np.mean([rank[i] for rank in of_ranks]) for i in (0, 1))
    # where slices are cut inside a layer's parameters, a worker's own share of its own slice varies a little
    tolerance = 0.04 if level == "neuron" else 1e-4
    assert push / half == pytest.approx(1 if mode == "none" else law, rel=tolerance)
    assert pull / half == pytest.approx(law if mode == "forward" else 1, rel=tolerance)
    block = sum(p.numel() for p in build(GPTConfig()).blocks["0"].parameters())
    for _, _, moments, memory in of_ranks:
        assert moments == pytest.approx(params * 8 / 4, rel=1e-4)
        gradients = memory["grad_bytes"] - 4 / 4 * params  # without the owner's mean
        assert dtype.itemsize * block <= gradients + 4 * len(units) <= 3.01 * dtype.itemsize * block
        assert memory["optimizer_bytes"] <= 12 / 4 * (params + 4 * len(units) + 8)
    weights = np.mean([memory["weight_bytes"] for *_, memory in of_ranks])
    assert weights == pytest.approx(dtype.itemsize * params * (law if mode == "forward" else 1), rel=0.01)


def validation_loss():
    """evaluation.evaluate with masks on, against the dense model on all held-out windows at once."""
    numbers = np.random.default_rng(5).integers(0, SMALL.vocabulary, 999)
    text = Text([numbers], [numbers[::-1].copy()], SMALL.vocabulary, SMALL.context, tests=25)
    x, y = text.validation()
    logits = dense_model()(x)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
    for mode, level in SCHEMES:
        with evaluation.whole_model(make_engine(mode, level, 4), text, seed=0) as model:
            loss, accuracy = evaluation.evaluate(model, text, 8, torch.device("cpu"))
        assert abs(loss - expected) < 1e-12
        assert accuracy == pytest.approx((logits.argmax(-1) == y).double().mean().item())


@pytest.mark.parametrize("n", [1, 2, 4])
def test_validation_is_of_the_whole_model(in_processes, n):
    in_processes(n, validation_loss)


def validation_of_images(mode, level, config):
    """The same for images: the whole model's statistics from always the same images, whoever computes
    them."""
    images, evaluation.IMAGES = some_images(size=config.image), 128
    with evaluation.whole_model(make_engine(mode, level, 4, config=config), images, seed=0) as model:
        found = evaluation.evaluate(model, images, 8, torch.device("cpu"))
    if dist.get_world_size() == 1:
        dense = dense_model(config)
        estimate_statistics(dense, images.calibration(0, evaluation.IMAGES).split(evaluation.TOGETHER))
        x, y = images.validation()
        expected = torch.nn.functional.cross_entropy(dense(x), y).item()
        accuracy = (dense(x).argmax(-1) == y).double().mean().item()
        assert found == pytest.approx((expected, accuracy), abs=1e-9)
    return found


@pytest.mark.parametrize("model", ["vit", "resnet"])
def test_validation_of_images_does_not_depend_on_processes(in_processes, model):
    for mode, level in (("backward", "block"), ("forward", "neuron")):
        found = [in_processes(n, validation_of_images, mode, level, CONFIGS[model]) for n in (1, 4)]
        for result in sum(found, []):
            assert result == pytest.approx(found[0][0], abs=1e-9)


def learn(mode, dtype):
    engine = make_engine(mode, "neuron", 4, dtype=dtype)
    losses = []
    for _ in range(24):
        total = torch.zeros(())
        for worker in engine.workers:
            with engine.turn(worker) as model:
                loss = model(*batch(0, worker))
                loss.backward()
            total += loss.detach()
        losses.append(engine.step(1e-2, 1.0, total)[1] / 4)
    return losses


@pytest.mark.parametrize("mode", [pytest.param("backward", marks=slow), "forward"])
def test_bfloat16_learns_like_float32(in_processes, mode):
    """bfloat16 weights, gradients and traffic over a float32 master: much the same curve."""
    exact, rounded = (in_processes(2, learn, mode, dtype)[0] for dtype in (torch.float32, torch.bfloat16))
    assert exact[-1] < 0.3 * exact[0]
    np.testing.assert_allclose(rounded, exact, atol=0.25)


def losses_with_drop_path():
    config = dataclasses.replace(SMALL, drop_path=0.5, dropout=0.1)
    engine = make_engine("backward", "block", 4, config=config)
    args = Namespace(micro_batches=1, grad_clip=0.0, workers=4, seed=0)
    batches = [{worker: batch(step, worker) for worker in engine.workers} for step in range(2)]
    return [train.update(engine, of, args, step, 1e-2)[:2] for step, of in enumerate(batches)]


def test_drop_path_does_not_depend_on_processes(in_processes):
    one, four = (in_processes(n, losses_with_drop_path)[0] for n in (1, 4))
    np.testing.assert_allclose(one, four, rtol=1e-10)


def a_step_that_is_not_finite(bad):
    """Rank 1's loss is infinite in the second of three steps: nobody applies it, and the third is as if it
    had not been."""

    def train_with(losses):
        engine, rank = make_engine("backward", "neuron", 2), dist.get_rank()
        for step, scale in losses:
            args = Namespace(micro_batches=1, grad_clip=1.0, workers=2, seed=0)
            module = engine.workers[rank].model
            hook = module.register_forward_hook(lambda *call: call[2] * (scale if rank == 1 else 1))
            norm, loss, _ = train.update(engine, {rank: batch(step, rank)}, args, step, 1e-2)
            hook.remove()
            assert np.isfinite(norm + loss) == (scale == 1)
        return checkpoint.gather_state(engine)

    found, expected = train_with([(0, 1), (1, bad), (2, 1)]), train_with([(0, 1), (2, 1)])
    if dist.get_rank() == 0:
        assert_close(found[0], expected[0], 0)
        for name, of in expected[1].items():
            assert_close(found[1][name], of, 0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_that_is_not_finite_is_skipped_by_all(in_processes, bad):
    in_processes(2, a_step_that_is_not_finite, bad)


def state_on_file(mode, units, path, save, machines=1):
    """Save what an engine has after three steps; or load it into another one, which must then have it too,
    and go on."""
    engine = make_engine(mode, units, 4, machines=machines)
    if not save:
        checkpoint.load_state(engine, *torch.load(path, mmap=True, weights_only=True))
        model, optimizer = checkpoint.gather_state(engine)
        if dist.get_rank() == 0:
            expected = torch.load(path, weights_only=True)
            assert_close(model, expected[0], 0)
            assert optimizer.keys() == expected[1].keys()
            for name, of in expected[1].items():
                assert of.keys() == {"exp_avg", "exp_avg_sq", "step"}
                assert_close(optimizer[name], of, 0)
    for step in range(3) if save else range(3, 5):
        for worker in engine.workers:
            with engine.turn(worker) as model:
                model(*batch(step, worker)).backward()
        engine.step(1e-2, 1.0)
    state = checkpoint.gather_state(engine)
    assert dist.get_rank() == 0 or state == ({}, {})
    if save and dist.get_rank() == 0:
        torch.save(state, path)
    return whole_values(engine)


def test_state_moves_to_other_processes_and_masks(in_processes, tmp_path):
    path = tmp_path / "state"
    in_processes(4, state_on_file, "backward", "block", path, True)
    results = [in_processes(n, state_on_file, "none", "block", path, False)[0] for n in (1, 2, 4)]
    for result in results:  # all are data parallelism, and see the same rows
        assert_close(result, results[0], 1e-10)
    for n, mode, units in ((1, "forward", "neuron"), (4, "forward", "block"), (2, "backward", "neuron")):
        in_processes(n, state_on_file, mode, units, path, False)


def gathered():
    engine = make_engine("backward", "neuron", 3)
    sizes = [int(bucket.chunk_edges[-1]) for bucket in engine.buckets.values()]
    return checkpoint.gather_state(engine)[0], whole_values(engine), sizes


def test_state_of_buckets_that_no_equal_slices_fill(in_processes):
    state, whole, sizes = in_processes(3, gathered)[0]
    assert any(size % 3 for size in sizes)
    assert_close(state, whole, 0)


@pytest.mark.parametrize("mode, level", [pytest.param("none", "block", marks=slow), *FEWER])
def test_train_in_each_mode(ranks, tmp_path, mode, level):
    """The default model for a few steps on two processes: files, and costs against the dense column."""
    flags = ["--mask", mode, "--units", level, "--workers", "4", "--steps", "4", "--eval-every", "2"]
    flags += ["--context", "32"]
    said = ranks(2, "train.py", *flags, "--eval-batches", "2", "--out", tmp_path / "out")
    assert "mean / none" in said and "blocks.0" in said and "val_loss" in said
    log, summary = read_log(tmp_path / "out"), read_summary(tmp_path / "out")
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert [entry["tokens"] for entry in log] == [512, 1024, 1536, 2048]
    assert [entry["step"] for entry in log if "val_loss" in entry] == [2, 4]
    assert all({"loss", "lr", "grad_norm"} <= entry.keys() for entry in log)
    assert log[-1]["loss"] < log[0]["loss"] < 7
    assert summary["final_val_loss"] == log[-1]["val_loss"]
    assert (summary["workers"], summary["processes"], summary["steps"]) == (4, 2, 4)
    assert summary["config"]["units"] == level and summary["config"]["seed"] == 0
    coverage = 1 if mode == "none" else 0.5
    assert (summary["coverage"], summary["holders_per_unit"]) == (coverage, 4 * coverage)
    assert summary["spectral_gap"] > 0 and (summary["spectral_gap"] == 1) == (mode == "none")
    assert [row["worker"] for row in summary["per_worker"]] == [0, 1, 2, 3]
    dense, params, shared = (summary[key] for key in ("dense", "params", "shared_params"))
    held = (shared + 0.5 * (params - shared)) / params  # H of the README; with --mask none all is shared
    rows = summary["per_worker"]
    push, pull = (np.mean([row[key] for row in rows]) / dense[key] for key in ("push_bytes", "pull_bytes"))
    assert push == pytest.approx(held, rel=0.04)
    assert pull == pytest.approx(held if mode == "forward" else 1, rel=0.04)
    for row in rows:
        assert row.keys() == dense.keys() and row["peak_bytes"] is None
        flops, activations = (row[key] / dense[key] for key in ("flops", "activation_bytes"))
        if mode == "none":
            assert flops == activations == 1 and row["held_params"] == shared == params
        else:
            assert flops < {"backward": 0.88, "forward": 0.6}[mode] and activations < 0.95
            assert row["held_params"] == pytest.approx((params + shared) / 2, rel=0.02)
