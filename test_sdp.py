"""The claims, each checked against something that knows nothing of the engine: torch's
DistributedDataParallel, autograd on the dense model, arithmetic on the masks. Real gloo processes, no mocks;
float64 where equality is meant.

    pytest                 # all, eight to nine minutes on two cores
    pytest -k masks        # what needs no processes

Needs all other files; it is the last to be read, in their order: masks, model, data, engine, command line.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import weakref
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import timedelta
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import data
import masks
import model as models
import train
from data import Images, Text, python_text
from masks import Unit, assign, holders_per_unit, spectral_gap
from model import (
    GROUPS,
    SIZES,
    GPTConfig,
    ResNetConfig,
    ViTConfig,
    build,
    estimate_statistics,
    initial_value,
    units_of,
)
from sdp import SDP, Bucket, Part, Route, bucket_of

HERE = Path(__file__).parent
SMALL = GPTConfig(vocabulary=50, layers=4, width=16, heads=4, hidden=32, context=8)
SMALL_VIT = ViTConfig(layers=4, width=16, heads=4, hidden=32, classes=5, image=16, patch=4)
SMALL_RESNET = ResNetConfig(width=8, classes=5, image=16)
CONFIGS = {
    "gpt": SMALL,
    "vit": SMALL_VIT,
    "resnet": SMALL_RESNET,
    "resnet-group-norm": ResNetConfig(width=8, norm="group", classes=5, image=16),
}
each_model = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
fsdp_on_cpu = hasattr(torch.cpu.Stream, "record_event")  # not in torch 2.6
needs_fsdp = pytest.mark.skipif(not fsdp_on_cpu, reason="FSDP on a CPU needs a newer torch")
engines = [pytest.param(kind, marks=needs_fsdp if kind == "fsdp" else ()) for kind in ("sdp", "ddp", "fsdp")]
SCHEMES = [(mode, kind) for mode in ("backward", "forward") for kind in ("block", "neuron")]


# ---- real processes: four that stay, each test makes its own group of some of them


@pytest.fixture(scope="session")
def in_processes(tmp_path_factory):
    """in_processes(n, function, *args): the function's results on ranks 0 to n - 1 of a gloo group."""
    pool = ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn"))

    def run(n, function, *args):
        meeting = tmp_path_factory.mktemp("group") / "store"
        futures = [pool.submit(member, meeting, rank, n, function, args) for rank in range(n)]
        errors = [future.exception() for future in futures if future.exception()]
        for error in sorted(errors, key=lambda error: not isinstance(error, AssertionError)):
            raise error  # what failed, rather than who then waited for it in vain
        return [future.result() for future in futures]

    yield run
    pool.shutdown()


def member(meeting, rank, n, function, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=n, timeout=timedelta(seconds=60)
    )
    try:
        result = function(*args)
        train.leave()
        return result
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


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


def make_mask(kind, workers, coverage=0.5, config=SMALL):
    with torch.device("meta"):
        units = units_of(build(config), kind)
    return units, assign(units, workers, holders_per_unit(coverage, workers))


def make_engine(mode, kind, workers, coverage=0.5, config=SMALL, dtype=torch.float64, optimizer=adamw):
    units, mask = make_mask(kind, workers, coverage, config)
    return SDP(
        build=lambda trained, frozen: build(config, trained, frozen),
        initial_value=lambda model, name: initial_value(model, name, seed=0),
        optimizer=optimizer,
        units=units,
        mask=mask,
        mode=mode,
        dtype=dtype,
    )


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
    with engine.whole() as model:
        return {name: parameter.clone() for name, parameter in model.named_parameters()}


def owned(engine, of_bucket, config=SMALL):
    """{name: the whole parameter's values, or gradients}, put together from the slices of all owners."""
    found = {}
    for bucket_name, bucket in engine.buckets.items():
        slices = [None] * engine.processes
        dist.all_gather_object(slices, of_bucket(bucket))
        flat = torch.cat(slices)
        for name, parameter in dense_model(config).named_parameters():
            if bucket_of(name) == bucket_name:
                found[name], flat = flat[: parameter.numel()].view(parameter.shape), flat[parameter.numel() :]
        assert not len(flat)
    return found


def columns_of(name, units):
    """The mask columns of a parameter's units, or none if it is shared."""
    return [u for u, unit in enumerate(units) if name.startswith(unit.layer + ".")]


def rows_of(name, parameter, units, row):
    """bool, like the parameter's first dimension: what belongs to the units in `row` of a mask; shared:
    all."""
    columns = columns_of(name, units)
    if not columns:
        return torch.ones(len(parameter), dtype=torch.bool)
    return torch.from_numpy(row[columns]).repeat_interleave(len(parameter) // len(columns))


def mean_over_trainers(gradients, units, mask):
    """gradients: a dense {name: gradient} of each worker. The design's g_u, written down as it stands
    there."""
    mean = {}
    for name, like in gradients[0].items():
        total, trainers = torch.zeros_like(like), torch.zeros(len(like), dtype=like.dtype)
        for gradient, row in zip(gradients, mask):
            rows = rows_of(name, like, units, row)
            total[rows] += gradient[name][rows]
            trainers += rows
        mean[name] = total / trainers.view(-1, *[1] * (like.dim() - 1))
    return mean


def subnetwork_gradients(model, x, y, units, row, kind):
    """Loss and gradients of the dense model in which the units that are missing from `row` contribute zero,
    and the others, at neuron level, are scaled up by all units / present units, if no norm follows."""
    parameters = dict(model.named_parameters())
    changed = {}
    for name, parameter in parameters.items():
        if name.endswith((".o", ".down", ".conv2", ".branch.1.weight", ".branch.1.bias")):
            columns = columns_of(name, units)
            rescaled = kind == "neuron" and name.endswith((".o", ".down"))
            scale = len(columns) / row[columns].sum() if rescaled else 1.0
            present = rows_of(name, parameter, units, row) * scale
            changed[name] = parameter * present.view(-1, *[1] * (parameter.dim() - 1))
    loss = functional_call(model, parameters | changed, (x, y))
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return loss, dict(zip(parameters, gradients))


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)


# ---- masks


@pytest.mark.parametrize(
    "workers, coverage, holders", [(1, 0.5, 1), (5, 0.5, 3), (8, 0.4, 3), (8, 0.0625, 1)]
)
def test_masks_number_of_holders(workers, coverage, holders):
    assert holders_per_unit(coverage, workers) == holders


@pytest.mark.parametrize("coverage", [0, -0.5, 1.1, float("nan"), 0.06])
def test_masks_refuse_coverage(coverage):
    with pytest.raises(ValueError, match="--coverage"):
        holders_per_unit(coverage, 8)


def test_masks_smallest_coverage_works_as_printed():
    for workers in range(1, 200):
        with pytest.raises(ValueError, match="smallest") as caught:
            holders_per_unit(1e-6, workers)
        assert holders_per_unit(float(str(caught.value).split()[-1]), workers) == 1


def test_masks_cover_balance_and_connect():
    """80 random cases: every column sums to p; loads of equal units differ by at most one, within each kind;
    the worker graph is connected wherever p >= 2 and edges can suffice; the same seed gives the same mask."""
    rng = np.random.default_rng(0)
    connected = 0
    for _ in range(80):
        workers, kinds = int(rng.integers(1, 17)), int(rng.integers(1, 4))
        units = [
            Unit(f"layer{k}", f"layer{k}", 3 + k) for k in range(kinds) for _ in range(rng.integers(1, 20))
        ]
        smallest = min(sum(u.kind == unit.kind for u in units) for unit in units)
        holders = int(rng.integers(-(-workers // smallest), workers + 1))
        seed = int(rng.integers(1000))
        mask = assign(units, workers, holders, seed)
        assert mask.shape == (workers, len(units)) and mask.dtype == bool
        assert (mask.sum(axis=0) == holders).all()
        for kind in {unit.kind for unit in units}:
            load = mask[:, [unit.kind == kind for unit in units]].sum(axis=1)
            assert load.min() >= 1 and load.max() - load.min() <= 1
        if holders >= 2 and len(units) * (holders - 1) >= workers - 1:
            assert spectral_gap(mask) > 0, (workers, units, holders, seed)
            connected += 1
        assert (assign(units, workers, holders, seed) == mask).all()
    assert connected > 50


def test_masks_in_a_circle():
    """Cyclic: as even, with neighbours as holders, and where units are many the gap of a circulant graph."""
    rng = np.random.default_rng(0)
    for _ in range(80):
        workers, kinds = int(rng.integers(1, 17)), int(rng.integers(1, 4))
        sizes = rng.integers(1, 20, kinds)
        units = [Unit(f"layer{k}", f"layer{k}", 3) for k in range(kinds) for _ in range(sizes[k])]
        holders = int(rng.integers(min(workers, -(-workers // min(sizes))), workers + 1))
        mask = assign(units, workers, holders, int(rng.integers(1000)), "cyclic")
        assert (mask.sum(axis=0) == holders).all()
        for kind in range(kinds):
            load = mask[:, [unit.kind == f"layer{kind}" for unit in units]].sum(axis=1)
            assert load.min() >= 1 and load.max() - load.min() <= 1
        for column in mask.T:  # at most one run, also around the end
            assert (column & ~np.roll(column, 1)).sum() == (holders < workers)
    units = [Unit(str(u), "unit", 1) for u in range(16)]
    share = np.abs(np.exp(2j * np.pi * np.arange(4) / 16).sum() / 4) ** 2  # 4 neighbours of 16
    assert spectral_gap(assign(units, 16, 4, way="cyclic")) == pytest.approx(1 - share)
    assert spectral_gap(assign(units, 16, 4)) > 3 * (1 - share)


def test_masks_of_a_run():
    """New ones every so many steps, that cover as the first do; at last backward; by the step alone."""
    units = [Unit(f"blocks.{u}", "blocks", 1) for u in range(6)]
    at = masks.plan(lambda k: assign(units, 8, 4, draw=k), "forward", steps=30, resample=4, finish=0.3)
    again = masks.plan(lambda k: assign(units, 8, 4, draw=k), "forward", steps=30, resample=4, finish=0.3)
    found = [at(step) for step in range(1, 31)]
    for step in rng_steps():
        assert (again(step)[0] == found[step - 1][0]).all() and again(step)[1] == found[step - 1][1]
    assert [mode for _, mode in found] == ["forward"] * 21 + ["backward"] * 9
    changes = [s for s, (a, b) in enumerate(zip(found, found[1:]), start=2) if a is not b]
    assert changes == [5, 9, 13, 17, 21, 22, 25, 29]
    for mask, _ in found:
        assert (mask.sum(axis=0) == 4).all() and (mask.sum(axis=1) == 3).all() and spectral_gap(mask) > 0
    assert len({mask.tobytes() for mask, _ in found}) == 8
    static = masks.plan(lambda k: k, "backward", steps=10)
    assert {static(step) for step in range(1, 11)} == {(0, "backward")}


def rng_steps():
    """The steps of a run of 30, in any order."""
    return np.random.default_rng(0).permutation(np.arange(1, 31)).tolist()


def test_masks_sweep(monkeypatch, capsys):
    run_main(monkeypatch, "masks", "--sweep", "--count", "16")
    first, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert len(rows) == 10 and first[-3:] == ["C", "=", "1"] and all(row[-1] == "1.000" for row in rows)
    gaps = {(int(row[0]), row[1]): row[2:] for row in rows}
    assert gaps[16, "cyclic"][1] == "0.179" and float(gaps[16, "random"][1]) > 0.5  # C = 1/4


def test_masks_connect_when_only_a_path_can():
    units = [Unit(str(u), "unit", 1) for u in range(63)]
    mask = assign(units, workers=64, holders=2)  # 63 units of 2 holders: a tree, and balanced means a path
    assert spectral_gap(mask) > 0 and (mask.sum(axis=0) == 2).all()
    assert sorted(mask.sum(axis=1)) == [1, 1] + [2] * 62


def test_masks_join_what_is_apart():
    """A hundred pairs of workers that share their two units with nobody else: swaps connect them."""
    mask = np.kron(np.eye(100, dtype=bool), np.ones((2, 2), bool))  # [200 workers, 200 units]
    masks.mix(mask, [Unit(str(u), "unit", 1) for u in range(200)], np.random.default_rng(0))
    assert not masks.components(mask).any()
    assert (mask.sum(axis=0) == 2).all() and (mask.sum(axis=1) == 2).all()


@pytest.mark.parametrize("seed", range(4))
def test_masks_balance_cost_where_blocks_differ(seed):
    """The blocks of a ResNet-18: each to the least loaded would balance, and split the workers into two
    cliques."""
    width = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    units = [
        Unit(f"blocks.{i}", "block", 9 * b * (a + b) + 4 * b)
        for i, (a, b) in enumerate(zip(width, width[1:]))
    ]
    mask = assign(units, workers=8, holders=4, seed=seed)
    load = mask @ np.array([unit.cost for unit in units])
    assert (mask.sum(axis=0) == 4).all() and mask.any(axis=1).all()
    assert load.max() / load.mean() < 1.15 and spectral_gap(mask) > 0.3


def test_masks_of_a_resnet_balance_parameters_and_show_flops():
    with torch.device("meta"):
        whole = build(ResNetConfig())
        units = units_of(whole, "block")
    assert [unit.flops for unit in units[:3]] == [2 * 32 * 32 * 64 * 64 * 9 * 2] * 2 + [
        2 * 16 * 16 * 9 * (64 * 128 + 128 * 128)
    ]
    assert [u.cost for u in units[:3]] == [73984, 73984, 9 * (64 * 128 + 128 * 128) + 4 * 128]
    mask = assign(units, workers=8, holders=4)
    load, flops = (mask @ np.array([getattr(u, what) for u in units]) for what in ("cost", "flops"))
    assert load.max() / load.mean() <= 1.15 and spectral_gap(mask) >= 0.3
    shown = masks.describe(mask, units, 0.5)
    assert f"{load.max() / load.mean():.3f} times in parameters" in shown
    assert f"{flops.max() / flops.mean():.3f} times in FLOPs" in shown


def test_masks_kept_blocks():
    stages = (0, 2, 4, 6)
    assert masks.kept_blocks("none", 8, stages) == set()
    assert masks.kept_blocks("ends", 6) == {0, 5}
    assert masks.kept_blocks("strided", 8, stages) == {0, 2, 4, 6}
    assert masks.kept_blocks("1,3", 6) == {1, 3}
    for keep, blocks in (("strided", 6), ("6", 6), ("-1", 6), ("a", 6), ("0,", 6), ("ends", 2)):
        with pytest.raises(ValueError, match="--keep"):
            masks.kept_blocks(keep, blocks)
    with torch.device("meta"):
        units = {kind: units_of(build(ResNetConfig()), kind, {0, 2, 4, 6}) for kind in ("block", "neuron")}
    assert [unit.layer for unit in units["block"]] == [f"blocks.{i}.branch" for i in (1, 3, 5, 7)]
    assert {unit.layer for unit in units["neuron"]} == {f"blocks.{i}.branch.0" for i in (1, 3, 5, 7)}


def test_masks_spectral_gap():
    assert spectral_gap(np.ones((5, 7), bool)) == 1
    cliques = np.zeros((4, 6), bool)
    cliques[:2, :3] = cliques[2:, 3:] = True
    assert spectral_gap(cliques) == 0
    mask = make_mask("neuron", 6)[1]
    walk = (mask / mask.sum(axis=1, keepdims=True)) @ (mask / mask.sum(axis=0)).T  # worker -> unit -> worker
    second = np.sort(np.abs(np.linalg.eigvals(walk)))[-2]
    assert spectral_gap(mask) == pytest.approx(1 - second, abs=1e-8)


def test_masks_command_shows_a_picture():
    command = [sys.executable, "masks.py", "--workers", "8", "--count", "12", "--coverage", "0.4"]
    shown = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout
    rows = [line for line in shown.splitlines() if line.startswith("unit ")]
    assert len(rows) == 12 and all(row.count("█") == 3 and row.count("·") == 5 for row in rows)
    assert "asked 0.4, given 0.375 (3 of 8" in shown and "spectral gap: 0." in shown


def test_masks_picture_fits_its_columns():
    for workers, kind in product((1, 4, 8, 64, 500), ("block", "neuron")):
        units, mask = make_mask(kind, workers, coverage=0.7, config=GPTConfig())
        assert max(map(len, masks.picture(mask, units).splitlines())) <= 120


# ---- model and data


def test_model_parts_add_up():
    """Trained units beside frozen ones, and absent units: both against the dense layer's rows."""
    torch.manual_seed(0)
    dense = dense_model().blocks["1"].mlp
    with torch.no_grad():
        split = type(dense)(SMALL, GROUPS, 5, GROUPS - 5).double()
        few = type(dense)(SMALL, GROUPS, 5).double()
        rows = 5 * SMALL.hidden // GROUPS
        for name in ("gate", "up", "down"):
            getattr(split, name).copy_(getattr(dense, name)[:rows])
            getattr(split.frozen, name).copy_(getattr(dense, name)[rows:])
            getattr(few, name).copy_(getattr(dense, name)[:rows])
    x = torch.randn(2, 3, SMALL.width, dtype=torch.float64)
    torch.testing.assert_close(split(x), dense(x))
    torch.testing.assert_close(few(x), few.compute(x) * GROUPS / 5)
    assert [name for name, p in split.named_parameters() if p.requires_grad] == ["gate", "up", "down"]


def test_model_attention_is_causal_and_sees_positions():
    model = dense_model()
    x, _ = batch(0)
    changed = x.clone()
    changed[:, -1] = (changed[:, -1] + 1) % SMALL.vocabulary
    assert torch.equal(model(x)[:, :-1], model(changed)[:, :-1])
    same = torch.full((1, 4), 3)
    same[0, 0] = 5
    swapped = same[:, [1, 0, 2, 3]]
    assert not torch.allclose(model(same)[0, -1], model(swapped)[0, -1])


@pytest.mark.parametrize(
    "config, params",
    [
        (ResNetConfig(), 11_173_962),
        (ResNetConfig(classes=1000, image=224), 11_689_512),
        (ViTConfig(**SIZES["vit"]["tiny"], classes=1000, image=224), 5_690_496),  # ViT-Ti/16: 5.7 M
        (ViTConfig(**SIZES["vit"]["small"], classes=1000, image=224), 21_997_824),  # ViT-S/16: 22.1 M
        (ViTConfig(**SIZES["vit"]["cifar"]), 1_000_448),
        (GPTConfig(**SIZES["gpt"]["tiny"]), 1_050_240),
        (GPTConfig(**SIZES["gpt"]["10m"], vocabulary=32_000), 35_197_824),
        (GPTConfig(**SIZES["gpt"]["134m"], vocabulary=32_000), 134_105_856),
        (GPTConfig(**SIZES["gpt"]["500m"], vocabulary=32_000), 507_306_240),
        (GPTConfig(**SIZES["gpt"]["1b"], vocabulary=32_000), 1_027_680_256),
    ],
)
def test_model_has_as_many_parameters_as_in_the_literature(config, params):
    with torch.device("meta"):
        assert sum(p.numel() for p in build(config).parameters()) == params


def test_model_attention_of_images_looks_both_ways():
    block, x = dense_model(SMALL_VIT).blocks["0"], torch.randn(1, 5, 16, dtype=torch.float64)
    changed = x.clone()
    changed[:, -1] += 1
    assert not torch.allclose(block(x, None)[:, 0], block(changed, None)[:, 0])


def test_model_of_images_takes_the_mean_over_patches():
    """Without positions it does not matter where a patch is."""
    dense, (x, _) = dense_model(SMALL_VIT), batch(0, config=SMALL_VIT)
    moved = x.roll((4, 8), dims=(2, 3))  # by whole patches
    assert not torch.allclose(dense(x), dense(moved))
    with torch.no_grad():
        dense.embedding.positions.zero_()
    torch.testing.assert_close(dense(x), dense(moved))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_model_cross_entropy_in_chunks(monkeypatch, smoothing):
    """Loss and gradients are those of all logits at once, which are never there at once."""
    monkeypatch.setattr(models, "LOGITS", 4 * 50)  # four rows of logits at a time, of ten
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 50, (2, 5))
    with train.measured(lambda: [weight]) as cost:
        loss = models.cross_entropy_of(x, weight, targets, smoothing)
        found = torch.autograd.grad(loss, (x, weight))
    assert cost["activation_bytes"] < 8 * 10 * 50
    logits = (x @ weight.T).flatten(0, 1)
    dense = torch.nn.functional.cross_entropy(logits, targets.flatten(), label_smoothing=smoothing)
    expected = torch.autograd.grad(dense, (x, weight))
    torch.testing.assert_close((loss, *found), (dense, *expected), rtol=1e-12, atol=1e-12)


@each_model
def test_model_checkpointed_activations(config):
    """Each block keeps its input alone, and loss and gradients stay as they are."""
    found = []
    for flag in (False, True):
        dense = dense_model(dataclasses.replace(config, checkpoint_activations=flag))
        with train.measured(dense.parameters) as cost:
            loss = dense(*batch(0, config=config))
            found.append((loss, *torch.autograd.grad(loss, list(dense.parameters()))))
        found[-1] = (cost["activation_bytes"], found[-1])
    assert found[1][0] < 0.5 * found[0][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("image", [32, 96])
def test_model_resnet_is_the_standard_one(image):
    """Against ResNet-18 as it is usually written, in layers of torch, with the same weights."""
    nn, config = torch.nn, ResNetConfig(width=8, classes=5, image=image)

    class Standard(nn.Module):
        def __init__(self, a, b):
            super().__init__()
            s = 1 if a == b else 2
            self.conv1, self.bn1 = nn.Conv2d(a, b, 3, s, 1, bias=False), nn.BatchNorm2d(b)
            self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
            self.down = nn.Sequential(nn.Conv2d(a, b, 1, s, bias=False), nn.BatchNorm2d(b))
            self.down = self.down if s == 2 else nn.Identity()

        def forward(self, x):
            h = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            return (h + self.down(x)).relu()

    large = [nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    small = [nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    widths = [8, 8, 8, 16, 16, 32, 32, 64, 64]
    blocks = [Standard(a, b) for a, b in zip(widths, widths[1:])]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)]
    standard = nn.Sequential(*(small if image == 32 else large), *blocks, *pool).double()
    dense = dense_model(config)
    block = ["branch.0.conv1", "branch.0.norm.weight", "branch.0.norm.bias", "branch.0.conv2"]
    block += ["branch.1.weight", "branch.1.bias"]
    down = ["shortcut.0.weight", "shortcut.1.weight", "shortcut.1.bias"]
    names = [f"blocks.{i}.{name}" for i in range(8) for name in block + (down if i in (2, 4, 6) else [])]
    names = ["stem.conv.weight", "stem.norm.weight", "stem.norm.bias", *names, "head.weight", "head.bias"]
    assert set(names) == set(dict(dense.named_parameters()))
    ours = [dense.get_parameter(name) for name in names]
    ours = [p.transpose(0, 1) if name.endswith("conv2") else p for name, p in zip(names, ours)]
    with torch.no_grad():
        for a, b in zip(standard.parameters(), ours, strict=True):
            a.copy_(b)
    x = torch.randn(3, 3, image, image, dtype=torch.float64)
    torch.testing.assert_close(dense(x), standard(x))


def statistics_of_everything(n_batches):
    """Estimated with the batches shared out, and by one process alone over all of them."""
    config, rank, n = SMALL_RESNET, dist.get_rank(), dist.get_world_size()
    batches = [batch(step, config=config)[0] for step in range(n_batches)]
    shared = dense_model(config)
    estimate_statistics(shared, batches[rank::n])
    x = torch.cat([torch.nn.functional.conv2d(x, shared.stem.conv.weight, padding=1) for x in batches])
    expected = x.transpose(0, 1).flatten(1)
    torch.testing.assert_close(shared.stem.norm.running_mean, expected.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shared.stem.norm.running_var, expected.var(1, False), rtol=1e-5, atol=1e-6)
    assert not shared.training
    return shared.state_dict()


def statistics_of_a_constant():
    """A channel that never changes has variance 0, not less; and with bfloat16 statistics stay float32."""
    model = dense_model(SMALL_RESNET, torch.bfloat16)
    with torch.no_grad():
        model.stem.conv.weight[:2] = 0
    x = batch(0, config=SMALL_RESNET)[0]
    estimate_statistics(model, [x, x + 50])
    assert model.stem.norm.running_var[:2].eq(0).all() and model.stem.norm.running_var.dtype == torch.float32
    assert model(x).isfinite().all()


def statistics_of_constants():
    """Of channels that never change: mean of squares less square of the mean can come out below zero."""
    constants = torch.linspace(0.1, 10, 200, dtype=torch.float64).view(1, 200, 1, 1)
    norm = torch.nn.Sequential(models.BatchNorm(200)).double()
    estimate_statistics(norm, [constants.expand(3, 200, 2, 2)] * 7)
    assert norm[0].running_var.min() == 0 and norm[0].running_var.max() < 1e-12


def test_batch_norm_statistics_of_a_constant(in_processes):
    in_processes(1, statistics_of_constants)
    in_processes(1, statistics_of_a_constant)


def test_batch_norm_statistics_do_not_depend_on_processes(in_processes):
    of_one, of_three = (in_processes(n, statistics_of_everything, 5)[0] for n in (1, 3))
    assert_close(of_one, of_three, 1e-12)
    assert sum("running" in name for name in of_one) == 2 * 20
    saved = build(SMALL_RESNET)
    saved.double().load_state_dict(of_one, strict=True)
    assert torch.equal(saved.stem.norm.running_var, of_one["stem.norm.running_var"])


def test_data_batches_depend_on_seed_and_step_alone():
    text = python_text(context=16, tests=3)
    (train_tokens,), (held_out,) = text.train, text.held_out
    assert 5e6 < len(train_tokens) and 2e5 < len(held_out) < 0.2 * len(train_tokens)
    x, y = text.batch(seed=1, step=2, size=8)
    assert x.shape == y.shape == (8, 16) and torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x, python_text(context=16).batch(1, 2, 8)[0])
    assert torch.equal(x[2:4], text.batch(1, 2, 8, slice(2, 4))[0])
    assert not torch.equal(x, text.batch(1, 3, 8)[0]) and not torch.equal(x, text.batch(2, 2, 8)[0])
    last = Text([np.arange(17, dtype=np.uint8)], [np.arange(17, dtype=np.uint8)], 256, context=16, tests=3)
    assert torch.equal(last.batch(0, 1, 3)[1][:, -1], torch.full((3,), 16))
    assert torch.equal(last.validation(slice(None))[0][:, 0], torch.zeros(3, dtype=torch.int64))


def test_data_split_does_not_depend_on_where_the_folder_lies(tmp_path):
    for here in (tmp_path / "a", tmp_path / "b"):
        for number in range(100):
            (here / f"pack{number % 3}").mkdir(parents=True, exist_ok=True)
            (here / f"pack{number % 3}" / f"{number}.py").write_text(f"print({number})")
        (here / "tests").mkdir()
        (here / "tests" / "left_out.py").write_text("never read")
    a, b = (python_text(tmp_path / name, context=8) for name in "ab")
    assert a.fingerprint() == b.fingerprint() and len(a.held_out[0]) > 0
    assert b"never read" not in a.train[0].tobytes() + a.held_out[0].tobytes()


def shard(path, tokens, magic=20240520, version=1, number=None):
    """A file of tokens as llm.c writes them."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if number is None else number
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


@pytest.fixture
def shards(tmp_path):
    """A folder with three shards."""
    folder, rng = tmp_path / "fineweb", np.random.default_rng(0)
    folder.mkdir()
    for name, number in (("train_000001", 1000), ("train_000002", 500), ("val_000000", 300)):
        shard(folder / f"fineweb_{name}.bin", rng.integers(0, 50257, number))
    return folder


def test_data_windows_lie_in_one_shard(shards):
    text = data.load("fineweb", shards, context=99)
    assert text.shape == {"vocabulary": 50304, "context": 99} and text.rows == 1500 // 99
    assert all(isinstance(tokens, np.memmap) for tokens in text.train)
    read = [np.fromfile(p, "<u2")[512:] for p in sorted(shards.glob("*train*"))]
    possible = {tokens[i : i + 99].tobytes() for tokens in read for i in range(len(tokens) - 99)}
    x, y = text.batch(0, 1, 30_000)
    assert {row.tobytes() for row in x.numpy().astype("<u2")} == possible  # all of 901 + 401, and no others
    assert torch.equal(x[:, 1:], y[:, :-1])
    before = text.fingerprint()
    assert data.load("fineweb", shards, context=99).fingerprint() == before
    shard(shards / "fineweb_train_000002.bin", [1] * 500)
    assert data.load("fineweb", shards, context=99).fingerprint() != before


@pytest.mark.parametrize(
    "damage, says",
    [
        ({"magic": 20240801}, "20240801"),
        ({"version": 2}, "no shard"),
        ({"number": 400}, "400 tokens"),
        ({"number": 2**31 - 1}, "2,147,483,647 tokens"),
        ({"number": -500}, "-500 tokens"),
        ({"tokens": [50257] * 500}, "token 50257"),
        ({"tokens": []}, "0 tokens"),
        (b"", "no shard"),
        (b"short", "no shard"),
        (None, "no *_train_*.bin"),
    ],
)
def test_data_bad_shards_end_with_one_line(monkeypatch, capsys, shards, damage, says):
    for path in shards.glob("*train*"):
        path.unlink()
    path = shards / "fineweb_train_000001.bin"
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    elif damage:
        shard(path, **({"tokens": [1] * 500} | damage))
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, "--data", "fineweb", "--data-dir", str(shards), "--context", "32")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and says in line and "data.py fineweb" in line


def test_data_fineweb_downloads_and_goes_on(tmp_path, monkeypatch, capsys, shards, ranges):
    """A part that was left is completed; what is there is not loaded again; a bad one gets no name."""
    here, names = tmp_path / "here", sorted(path.name for path in shards.iterdir())
    here.mkdir()
    (here / f"{names[0]}.part").write_bytes((shards / names[0]).read_bytes()[:700])
    flags = ["fineweb", "--shards", "2", "--data-dir", str(here), "--data-url", ranges.url]
    monkeypatch.setattr(sys, "argv", ["data.py", *flags])
    data.main()
    assert "1,500 tokens to train on, 300 held out" in capsys.readouterr().out
    assert [(path, begin) for path, begin in ranges.asked if begin] == [(f"/{names[0]}", "bytes=700-")]
    assert all((here / name).read_bytes() == (shards / name).read_bytes() for name in names)
    data.main()
    assert len(ranges.asked) == 3 and len(list(here.iterdir())) == 3
    shard(shards / "fineweb_train_000003.bin", [1, 60000])
    monkeypatch.setattr(sys, "argv", ["data.py", *flags[:2], "3", *flags[3:]])
    for _ in range(2):  # the second time all bytes of the part are there already
        with pytest.raises(SystemExit) as stop:
            data.main()
        last = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and "train_000003.bin.part: has a token 60000" in last
    assert not (here / "fineweb_train_000003.bin").exists()


@pytest.fixture
def ranges(shards):
    """A server of the shards that can begin in the middle of a file: its url, and what it was asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Range"]))
            content = (shards / self.path[1:]).read_bytes()
            begin = int((self.headers["Range"] or "bytes=0-")[6:-1])
            self.send_response(416 if begin >= len(content) else 206 if begin else 200)
            self.send_header("Content-Length", str(len(content[begin:])))
            self.end_headers()
            self.wfile.write(content[begin:])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield argparse.Namespace(url=f"http://localhost:{server.server_port}", asked=asked)
        server.shutdown()


CIFAR = HERE.parent / "shared" / "data"  # real images, which a user's checkout does not have
IMAGENET = CIFAR / "imagenet-sample"
needs_images = pytest.mark.skipif(not CIFAR.exists(), reason="the sample images in ../shared/data are absent")


def some_images(number=20, size=8, crop=data.shifted):
    rng = np.random.default_rng(3)
    images, labels = rng.integers(0, 256, (number, 3, size, size), dtype=np.uint8), rng.integers(0, 5, number)
    return Images(images, labels, images, labels, 5, size, (127.5,) * 3, (1.0,) * 3, crop)


@pytest.mark.parametrize("crop", [data.shifted, data.resized])
def test_data_images_depend_on_seed_and_step_alone(crop):
    images = some_images(crop=crop)
    x, y = images.batch(0, 2, 16)
    assert x.shape == (16, 3, 8, 8) and y.shape == (16,)
    for rows in (slice(0, 4), slice(4, 16)):
        assert all(map(torch.equal, images.batch(0, 2, 16, rows), (x[rows], y[rows])))
    assert not torch.equal(x, images.batch(1, 2, 16)[0]) and not torch.equal(x, images.batch(0, 3, 16)[0])


def test_data_epochs_go_through_all_images():
    images = some_images()
    images.labels = np.arange(20)
    seen = torch.cat([images.batch(0, step, 16)[1] for step in range(1, 6)])  # 80 = 4 epochs
    first, second = seen[:20], seen[20:40]
    assert all(torch.equal(epoch.sort().values, torch.arange(20)) for epoch in seen.split(20))
    assert not torch.equal(first, second)
    assert images.batch(0, 0, 50)[1].shape == (50,)  # step 0, for batch norm


def test_data_crops_by_hand():
    """Moved by whole pixels, mirrored, outside the mean colour."""
    images = some_images()
    original = torch.from_numpy(images.train[:1]).float() - 127.5
    boxes = np.array([[0, 0, 1, 1], [0, 0, -1, 1], [0.25, -0.5, 1, 1]])
    x = images._cut(images.train, np.zeros(3, int), boxes, "cpu")
    expected = torch.zeros(1, 3, 8, 8)
    expected[:, :, 2:, :7] = original[:, :, :6, 1:]  # a quarter of 1 is one of 8 pixels; half, two
    torch.testing.assert_close(x, torch.cat([original, original.flip(3), expected]), rtol=0, atol=1e-2)
    torch.testing.assert_close(images.validation(slice(0, 1))[0], original, rtol=0, atol=1e-2)
    images.size = 4  # of 8: the centre
    torch.testing.assert_close(images.validation(slice(0, 1))[0], original[:, :, 2:6, 2:6], rtol=0, atol=1e-2)
    boxes = data.shifted(np.random.default_rng(0), 1000, 32, 32)
    assert set(np.unique(boxes[:, :2] * 16)) == set(range(-4, 5)) and (boxes[:, 2:] == 1).all()
    boxes = data.resized(np.random.default_rng(0), 1000, 256, 224)
    assert (abs(boxes[:, :2]) + boxes[:, 2:] <= 1 + 1e-9).all() and boxes[:, 2:].min() > 0.4


@needs_images
def test_data_cifar_of_the_sample():
    images = data.load("cifar10", CIFAR)
    assert (images.rows, images.tests, images.shape) == (10_000, 2_000, {"classes": 10, "image": 32})
    assert data.load("cifar10", CIFAR / "cifar-10-batches-py").fingerprint() == images.fingerprint()
    x, _ = images.validation(slice(0, 500))
    assert x.mean().abs() < 0.2 and 0.8 < x.std() < 1.2


def official(images, labels, key="labels", module="numpy.core.multiarray"):
    """A pickle as the official files are: of Python 2, with numpy's old module name."""
    array = b"c" + module.encode() + b"\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    dtype = b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
    raw = images.tobytes()
    state = b"(I1\n(" + b"".join(b"I%d\n" % n for n in images.shape) + b"t" + dtype
    state += b"I00\nT" + len(raw).to_bytes(4, "little") + raw + b"tb"
    return (
        b"(dS'data'\n"
        + array
        + state
        + b"sS'"
        + key.encode()
        + b"'\n(l"
        + b"".join(b"I%d\na" % n for n in labels)
        + b"s."
    )


def small_archive(folder, name="cifar10", extra=(), **changes):
    """An archive of three images a file, and its MD5 in the table of archives."""
    source, folder = data.CIFAR[name], Path(folder)
    rng = np.random.default_rng(0)
    with tarfile.open(folder / source.archive, "w:gz") as tar:
        for file in (*source.train, source.test):
            content = official(rng.integers(0, 256, (3, 3072), dtype=np.uint8), [0, 1, 2], source.label)
            content = changes.get(file, content)
            info = tarfile.TarInfo(f"{source.folder}/{file}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in extra:
            tar.addfile(info)
    md5 = hashlib.md5((folder / source.archive).read_bytes()).hexdigest()
    return source._replace(md5=md5)


@pytest.fixture
def web(tmp_path):
    """A folder, and the address at which a server on this machine offers it."""
    (tmp_path / "web").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "web")
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "web", f"http://localhost:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_data_downloads_checks_and_unpacks(tmp_path, monkeypatch, web, name):
    folder, url = web
    link = tarfile.TarInfo("cifar-10-batches-py/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    source = small_archive(folder, name, extra=[link, tarfile.TarInfo("../outside")])
    monkeypatch.setitem(data.CIFAR, name, source)
    images = data.cifar(name, tmp_path / "here", url + source.archive)
    assert images.rows == 3 * len(source.train) and images.tests == 3 and images.train.dtype == np.uint8
    assert sorted(os.listdir(tmp_path / "here")) == sorted([source.folder, source.archive])
    assert sorted(os.listdir(tmp_path / "here" / source.folder)) == sorted([*source.train, source.test])
    assert not (tmp_path / "outside").exists()
    (folder / source.archive).unlink()
    assert data.cifar(name, tmp_path / "here").rows == images.rows  # and once it is there, without a network


def test_data_others_wait_for_the_download(tmp_path, monkeypatch, web):
    folder, url = web
    source = small_archive(folder)
    monkeypatch.setitem(data.CIFAR, "cifar10", source)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(data.cifar, "cifar10", tmp_path / "here", "http://localhost:1/never-asked")
        time.sleep(0.2)
        assert not waiting.done()
        monkeypatch.setenv("LOCAL_RANK", "0")
        assert (
            data.cifar("cifar10", tmp_path / "here", url + source.archive).rows
            == waiting.result(30).rows
            == 15
        )


def bad_cifar(folder, monkeypatch, url, damage):
    source = small_archive(folder / "web")
    monkeypatch.setitem(data.CIFAR, "cifar10", source)
    archive, here = folder / "web" / source.archive, folder / "here"
    if damage == "no network":
        return "http://localhost:1/x", ("could not be downloaded", "--data-url", source.folder)
    if damage == "not found":
        return url + "elsewhere", ("could not be downloaded", "404")
    if damage == "a port of letters":
        return "http://localhost:xx/c", ("could not be downloaded", "--data-url")
    if damage == "not an address":
        return "mirror", ("mirror", "could not be downloaded")
    if damage == "truncated":
        archive.write_bytes(archive.read_bytes()[:-1000])
        return url + source.archive, ("truncated", source.md5, "--data-url")
    if damage == "corrupt":  # the right sum of wrong bytes
        archive.write_bytes(archive.read_bytes()[:-1000])
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        monkeypatch.setitem(data.CIFAR, "cifar10", source._replace(md5=md5))
        return url + source.archive, ("cannot be unpacked",)
    if damage == "a link":
        with tarfile.open(archive, "w:gz") as tar:
            for file in (*source.train, source.test):
                link = tarfile.TarInfo(f"{source.folder}/{file}")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(link)
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        monkeypatch.setitem(data.CIFAR, "cifar10", source._replace(md5=md5))
        return url + source.archive, ("cannot be unpacked",)
    here = here / source.folder
    here.mkdir(parents=True)
    if damage == "wrong folder":
        return None, ("data_batch_1", "No such file")
    images = np.zeros((3, 3072), np.uint8)
    content, says = {
        "image size": (official(images[:, :192], [0, 1, 2]), "(3, 192)"),
        "labels": (official(images, [0, 1, 10]), "labels from 0 to 10"),
        "too few labels": (official(images, [0, 1]), "for 2 labels"),
        "no images": (official(images[:0], []), "for 0 labels"),
        "half a file": (official(images, [0, 1, 2])[:5000], "data_batch_1"),
        "empty file": (b"", "data_batch_1"),
        "text": (b"hello", "data_batch_1"),
        "another pickle": (pickle.dumps([1, 2]), "data_batch_1"),
        "a call": (b"cos\nsystem\n(S'touch /tmp/sdp-was-here'\ntR.", "os.system"),
    }[damage]
    for file in (*source.train, source.test):
        (here / file).write_bytes(content)
    return None, ("data_batch_1", says, "load it again")


@pytest.mark.parametrize(
    "damage",
    "no network,not found,not an address,a port of letters,truncated,corrupt,a link,wrong folder,image size,"
    "labels,too few labels,no images,half a file,empty file,text,another pickle,a call".split(","),
)
def test_data_bad_cifar_ends_with_one_line(tmp_path, monkeypatch, capsys, web, damage):
    url, says = bad_cifar(tmp_path, monkeypatch, web[1], damage)
    flags = ["cifar10", "--data-dir", str(tmp_path / "here"), *(["--data-url", url] if url else [])]
    monkeypatch.setattr(sys, "argv", ["data.py", *flags])
    with pytest.raises(SystemExit) as stop:
        data.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and all(word in last for word in says), last
    assert not Path("/tmp/sdp-was-here").exists() and not list(tmp_path.glob("here/part*"))


@needs_images
def test_data_imagenet_of_the_sample(tmp_path, monkeypatch, capsys):
    pytest.importorskip("PIL", reason="Pillow is not installed")
    src = tmp_path / "src"
    shutil.copytree(IMAGENET, src)
    classes = sorted(os.listdir(src / "train"))
    (src / "train" / classes[1] / "broken.JPEG").write_bytes(b"not an image")
    data.make_imagenet(src, tmp_path / "out", size=64)
    said = capsys.readouterr()
    assert "broken.JPEG" in said.out + said.err and "24 images of 24 classes, 1 broken" in said.out
    images = data.load("imagenet", tmp_path / "out")
    assert isinstance(images.train, np.memmap) and images.train.shape == (24, 3, 73, 73)
    assert images.shape == {"classes": 24, "image": 64} and images.labels.tolist() == list(range(24))
    x, y = images.batch(0, 1, 4)
    assert x.shape == (4, 3, 64, 64) and images.validation(slice(None))[0].shape == (24, 3, 64, 64)
    assert len(list((tmp_path / "out").iterdir())) == 5  # two arrays a split, and what they are
    from PIL import Image

    (path,) = (src / "val" / classes[5]).iterdir()
    with Image.open(path) as image:
        colour = np.asarray(image.convert("RGB").resize((1, 1), Image.Resampling.BOX)).reshape(3)
    assert np.abs(images.test[5].mean((1, 2)) - colour).max() < 25  # that image, its channels in order


def bad_imagenet(folder, damage):
    src, out = folder / "src", folder / "out"
    for split in ("train", "val"):
        for name in ("a", "b"):
            (src / split / name).mkdir(parents=True)
            (src / split / name / "x.jpg").write_bytes(b"not an image")
    if damage == "no val":
        shutil.rmtree(src / "val")
        return ("--src", "no folder val")
    if damage == "an empty class folder":
        (src / "train" / "b" / "x.jpg").unlink()
        return ("--src", "class folder b", "no images")
    if damage == "another class":
        (src / "val" / "b").rename(src / "val" / "c")
        return ("val has the class c",)
    if damage == "only broken images":
        return ("class folder a", "only broken images")
    out.write_text("a file")
    return ("exists",)


@pytest.mark.parametrize(
    "damage", ["no val", "an empty class folder", "another class", "only broken images", "no folder"]
)
def test_data_bad_imagenet_ends_with_one_line(tmp_path, monkeypatch, capsys, damage):
    pytest.importorskip("PIL", reason="Pillow is not installed")
    says = bad_imagenet(tmp_path, damage)
    flags = ["imagenet", "--src", str(tmp_path / "src"), "--out", str(tmp_path / "out"), "--size", "16"]
    monkeypatch.setattr(sys, "argv", ["data.py", *flags])
    with pytest.raises(SystemExit) as stop:
        data.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and all(word in last for word in says), last
    with pytest.raises(ValueError, match="no complete arrays"):
        data.load("imagenet", tmp_path / "out")


def test_data_imagenet_needs_pillow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ValueError, match="Pillow"):
        data.make_imagenet(tmp_path, tmp_path / "out", 16)


# ---- the engine


def worked_example():
    """The example in the README's section on the files."""
    parameters = {"blocks.0.norm.weight": torch.zeros(3), "blocks.0.mlp.w": torch.zeros(2, 4)}
    mask = np.array([[True, False], [False, True]])
    bucket = Bucket(parameters, {"blocks.0.mlp": [0, 1]}, parameters.get, torch.float32, "cpu")
    route = Route(bucket, bucket.has(mask))
    inside = list(range(*bucket.inside.indices(3)))
    tables = [list(table) for table in (bucket.edges, bucket.unit, bucket.cuts, inside, bucket.inner)]
    return *tables, route.by_owner, route.by_worker, route.runs


def test_the_worked_example(in_processes):
    rank0, _ = in_processes(2, worked_example)
    assert rank0 == (
        [0, 3, 7, 11],
        [-1, 0, 1],
        [0, 6, 11],
        [0, 1],
        [0, 3, 6],
        [6, 1],
        [6, 3],
        [(0, 6), (0, 3)],
    )


def none_and_ddp(config, optimizer):
    """20 steps of both on the same batches, gradient clipping active."""
    rank, n = dist.get_rank(), dist.get_world_size()
    engine = make_engine("none", "block", n, config=config, optimizer=optimizer)
    ddp = DistributedDataParallel(dense_model(config), gradient_as_bucket_view=True)
    matrices = [p for p in ddp.parameters() if p.dim() > 1]
    vectors = [p for p in ddp.parameters() if p.dim() == 1]
    optimizer = optimizer([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
    rows, clipped = 8 // n, 0
    for step in range(20):
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
    assert clipped > 5
    values = whole_values(engine)
    assert_close(values, dict(ddp.module.named_parameters()), 1e-10)
    moved = (values["head.weight"] - dense_model(config).head.weight).abs().max()
    assert moved > 0.01


@pytest.mark.parametrize("n", [1, 2, 4])
def test_mask_none_equals_ddp(in_processes, n):
    in_processes(n, none_and_ddp, SMALL, adamw)


@pytest.mark.parametrize("model, optimizer", [("vit", adamw), ("resnet", sgd), ("resnet-group-norm", adamw)])
def test_mask_none_equals_ddp_on_images(in_processes, model, optimizer):
    in_processes(4, none_and_ddp, CONFIGS[model], optimizer)


class Gathered(TorchDispatchMode):
    """Counts the bytes that all-gathers bring together."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if "allgather" in str(function):
            self.bytes += arguments[0].nbytes
        return function(*arguments, **(options or {}))


def make_any(kind, config, dtype):
    if kind == "sdp":
        return make_engine("none", "block", dist.get_world_size(), config=config, dtype=dtype)
    first = functools.partial(initial_value, seed=0)
    return train.Dense(kind, lambda: build(config), first, adamw, dtype, torch.device("cpu"))


def steps_of(kind, passes, config):
    """Five steps of an engine on two processes, its batches in parts, against the dense model on one."""
    rank, n, dense = dist.get_rank(), dist.get_world_size(), dense_model(config)
    engine = make_any(kind, config, torch.float64)
    groups = [[p for p in dense.parameters() if (p.dim() == 1) == vectors] for vectors in (False, True)]
    optimizer = adamw([{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}])
    for step in range(5):
        x, y = batch(step, config=config)
        args = argparse.Namespace(micro_batches=passes, grad_clip=0.5, workers=n, seed=0)
        mine = slice(rank * len(x) // n, (rank + 1) * len(x) // n)
        with Gathered() as gathered:
            norm, loss, _ = train.update(engine, {rank: (x[mine], y[mine])}, args, step, 1e-2)
        dense_loss = dense(x, y)
        dense_loss.backward()
        dense_norm = torch.nn.utils.clip_grad_norm_(dense.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert abs(loss - dense_loss.item()) < 1e-10 and abs(norm - dense_norm.item()) < 1e-10
    assert_close(whole_values(engine), dict(dense.named_parameters()), 1e-10)
    return gathered.bytes, train.worker_costs(engine, rank, 5)


@pytest.mark.parametrize("passes", [1, 4])
@pytest.mark.parametrize("kind", engines)
def test_engines_and_micro_batches_equal_the_dense_model(in_processes, kind, passes):
    (gathered, costs), _ = in_processes(2, steps_of, kind, passes, SMALL)
    params = sum(p.numel() for p in build(SMALL).parameters())
    if kind == "ddp":
        assert (costs["weight_bytes"], costs["grad_bytes"], costs["optimizer_bytes"]) == (8 * params,) * 2 + (
            16 * params,
        )
    if kind == "fsdp":
        assert costs["pull_bytes"] == pytest.approx(gathered / 2, rel=1e-6)  # each sends its half
        assert costs["grad_bytes"] == pytest.approx(4 * params + (8 * params if passes > 1 else 0), rel=0.1)
        assert costs["optimizer_bytes"] == pytest.approx(8 * params, rel=0.1)
        assert 4 * params < costs["weight_bytes"] < 8 * params


def norms_and_losses(kind, dtype):
    """Of four small steps."""
    engine, rank = make_any(kind, SMALL, dtype), dist.get_rank()
    if kind == "ddp":  # the optimizer begins with what was not rounded
        masters, exact = (
            dict(sum((pairs for pairs, _ in engine.layers), [])),
            dense_model(dtype=torch.float32),
        )
        for name, parameter in engine.model.named_parameters():
            assert torch.equal(masters[parameter], exact.get_parameter(name))
    args = argparse.Namespace(micro_batches=1, grad_clip=0.5, workers=2, seed=0)
    return [train.update(engine, {rank: batch(0, rank, rows=4)}, args, 1, 1e-3)[:2] for _ in range(4)]


@pytest.mark.parametrize("kind", engines)
def test_engines_learn_alike_in_bfloat16(in_processes, kind):
    found = np.array(in_processes(2, norms_and_losses, kind, torch.bfloat16)[0])
    exact = np.array(in_processes(2, norms_and_losses, "sdp", torch.float32)[0])
    np.testing.assert_allclose(found[:, 1], exact[:, 1], rtol=3e-3)
    np.testing.assert_allclose(found[0], exact[0], rtol=5e-3)


def what_engines_leave():
    """Engines and whole models that nobody uses any more are freed, after training too."""

    def alive():
        gc.collect()
        return sum(isinstance(found, (Bucket, Part)) for found in gc.get_objects()), tensors()

    def tensors():
        return sum(isinstance(found, torch.Tensor) and found.numel() > 100 for found in gc.get_objects())

    before = alive()
    engine = make_engine("backward", "neuron", 2)
    with engine.turn(dist.get_rank()) as worker:
        worker(*batch(0)).backward()
    engine.step(1e-2)
    used = alive()
    whole_values(engine)
    assert alive() == used
    watch = [weakref.ref(part.values) for worker in engine.workers.values() for part in worker.parts]
    del engine, worker
    assert alive() == before and not any(ref() is not None for ref in watch)


def test_engines_are_freed(in_processes):
    in_processes(2, what_engines_leave)


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


def test_only_the_last_pass_communicates(in_processes):
    in_processes(2, only_the_last_pass_communicates)


def buffers_of_a_step(mode, kind, dtype):
    """The most that the tensors given to collectives ever take together, parameters aside, in layers."""
    engine = make_engine(mode, kind, 4, config=GPTConfig(layers=3), dtype=dtype)
    (worker,) = engine.workers
    own = {part.values.untyped_storage()._cdata for part in engine.workers[worker].parts}
    layer = max(int(bucket.edges[-1]) for bucket in engine.buckets.values()) * dtype.itemsize
    alive, most, exchange = {}, 0, dist.all_to_all_single

    def watched(received, send, *more, **options):
        nonlocal most
        for tensor in (received, send):
            storage = tensor.untyped_storage()
            if storage._cdata not in own and storage.nbytes():
                alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, alive.pop, storage._cdata, None)
        for _ in range(100):  # gloo's thread lets go of what has been sent a moment later
            if sum(alive.values()) <= 2 * layer:
                break
            time.sleep(0.01)
        most = max(most, sum(alive.values()))
        return exchange(received, send, *more, **options)

    dist.all_to_all_single = watched
    try:
        for _ in range(2):
            with engine.turn(worker) as model:
                model(*(t[:, :32] for t in batch(0, worker, config=GPTConfig()))).backward()
            engine.step(1e-3)
    finally:
        dist.all_to_all_single = exchange
    return most / layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode, kind", [("none", "block"), *SCHEMES])
def test_buffers_take_two_layers_at_most(in_processes, mode, kind, dtype):
    of_ranks = in_processes(4, buffers_of_a_step, mode, kind, dtype)
    assert 0.25 < max(of_ranks) <= 2


def plan_for_1024():
    """What each process works out at the start, for one layer of 10,000 units."""
    units = [Unit("blocks.0.w", "w", 4)] * 10_000
    began = time.perf_counter()
    mask = assign(units, 1024, 64)
    gap = spectral_gap(mask)
    like = {"blocks.0.w.a": torch.empty(10_000, 4, device="meta")}
    values = torch.zeros(10_000, 4)
    bucket = Bucket(like, masks.columns(units), lambda name: values, torch.float32, "cpu")
    route = Route(bucket, bucket.has(mask))
    seconds = time.perf_counter() - began
    assert (mask.sum(axis=0) == 64).all() and gap > 0.8 and sum(route.by_owner) == 4 * mask[5].sum()
    return seconds


def test_plans_for_1024_workers():
    """Masks, splits and spectral gap in less than 500 MB, on a process group without processes; how long it
    takes is said (pytest -s)."""
    fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=5, world_size=1024)
    try:
        seconds = plan_for_1024()
        tracemalloc.start()
        plan_for_1024()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        dist.destroy_process_group()
    print(f"{seconds:.2f} s, {peak / 1e6:.0f} MB")
    assert peak < 500e6


def gradients_that_arrive(mode, kind, same_batch, config, changed=False):
    """One step of each worker; what the owners hold against the mean of the trainers' dense gradients."""
    engine, (units, mask) = make_engine(mode, kind, 4, config=config), make_mask(kind, 4, config=config)
    if changed:  # to this mode and mask, from others
        engine = make_engine("backward" if mode == "forward" else "forward", kind, 4, 0.75, config)
        for worker in engine.workers:
            with engine.turn(worker) as model:
                model(*batch(1, worker, config=config)).backward()
        engine.step(lr=0.0)
        mask = assign(units, 4, 2, draw=3)
        engine.change(mask, mode)
    dense, expected = dense_model(config), []
    for worker in range(4):
        x, y = batch(0, worker=0 if same_batch else worker, config=config)
        row = mask[worker] if mode == "forward" else np.ones(len(units), bool)
        expected.append(subnetwork_gradients(dense, x, y, units, row, kind)[1])
    for worker in engine.workers:
        with engine.turn(worker) as model:
            model(*batch(0, worker=0 if same_batch else worker, config=config)).backward()
            assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        assert all(p.grad is None for p in model.parameters())  # freed once they were sent
    engine.average()
    found = owned(engine, lambda bucket: bucket.mean, config)
    assert_close(found, mean_over_trainers(expected, units, mask), 1e-12)
    if mode == "backward" and same_batch:
        assert_close(found, expected[0], 1e-12)  # unbiased: the dense gradient itself


@pytest.mark.parametrize("same_batch", [True, False])
@pytest.mark.parametrize("mode, kind", SCHEMES)
@each_model
def test_owners_get_the_mean_of_the_holders_gradients(in_processes, mode, kind, same_batch, config):
    if config != SMALL and (same_batch or (mode, kind) not in (("backward", "block"), ("forward", "neuron"))):
        pytest.skip("these two schemes suffice for images")
    in_processes(4, gradients_that_arrive, mode, kind, same_batch, config)
    if config == SMALL:
        in_processes(2, gradients_that_arrive, mode, kind, same_batch, config)


@pytest.mark.parametrize("mode, kind", SCHEMES)
def test_after_a_change_of_masks_the_same_holds(in_processes, mode, kind):
    for n in (4, 2):
        in_processes(n, gradients_that_arrive, mode, kind, False, SMALL, True)


def bytes_alive():
    found = (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor))
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in found}.values())


def changes_of_masks(number):
    """The bytes of all tensors after ten changes and after so many, with a step after each; without the
    garbage collector."""
    engine, (units, _) = make_engine("forward", "block", 4), make_mask("block", 4)
    gc.collect()
    gc.disable()
    alive, old = [], []
    try:
        for change in range(1, number + 1):
            mask = assign(units, 4, 2, draw=change)
            assert (mask.sum(axis=0) == 2).all()
            old += [weakref.ref(worker) for worker in engine.workers.values()]
            engine.change(mask, "backward" if change % 3 == 0 else "forward")
            for worker in engine.workers:
                with engine.turn(worker) as model:
                    model(*batch(change, worker)).backward()
            norm, *_ = engine.step(lr=1e-3)
            assert np.isfinite(norm)
            if change in (10, number):
                alive.append(bytes_alive())
    finally:
        gc.enable()
    assert not any(worker() for worker in old)
    return alive


def test_changes_of_masks_leave_nothing_behind(in_processes):
    for n, number in ((1, 200), (4, 40)):
        for after_ten, after_all in in_processes(n, changes_of_masks, number):
            assert after_all <= 1.01 * after_ten  # all workers hold equally much


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def alignment(mode, kind):
    """What the engine finds, against the dense model; and that it changes nothing."""
    engine, (units, mask) = make_engine(mode, kind, 4), make_mask(kind, 4)
    dense, own, whole = dense_model(), [], []
    for worker in range(4):
        x, y = batch(0, worker)
        row = mask[worker] if mode == "forward" else np.ones(len(units), bool)
        own.append(subnetwork_gradients(dense, x, y, units, row, kind)[1])
        whole.append(subnetwork_gradients(dense, x, y, units, np.ones(len(units), bool), kind)[1])
    before = whole_values(engine)
    found = engine.align(lambda worker, model: model(*batch(0, worker)).backward())
    assert_close(whole_values(engine), before, 0)
    assert not engine.traffic and not any(bucket.mean.any() for bucket in engine.buckets.values())
    assert list(found["workers"]) == list(found["owners"]) == [*engine.buckets, "all"]
    averaged = mean_over_trainers(own, units, mask)
    for layer in found["owners"]:
        names = [name for name in own[0] if layer in (bucket_of(name), "all")]
        expected = cosine(
            torch.cat([averaged[n].flatten() for n in names]),
            torch.cat([sum(each[n] for each in whole).flatten() for n in names]),
        )
        assert found["owners"][layer] == pytest.approx(expected, abs=1e-12)
        for worker, of_worker in enumerate(found["workers"][layer]):
            rows = {n: rows_of(n, own[0][n], units, mask[worker]) for n in names}
            a, b = (torch.cat([each[worker][n][rows[n]].flatten() for n in names]) for each in (own, whole))
            assert len(a) == 0 if of_worker is None else of_worker == pytest.approx(cosine(a, b), abs=1e-12)
            assert mode == "forward" or of_worker in (None, pytest.approx(1, abs=1e-12))
    return found


@pytest.mark.parametrize("mode, kind", SCHEMES)
def test_alignment_of_gradients(in_processes, mode, kind):
    """In backward masking each worker's gradient is that of the whole model; in forward masking it is not."""
    found = in_processes(4, alignment, mode, kind) + in_processes(2, alignment, mode, kind)
    assert mode == "backward" or max(found[0]["workers"]["all"]) < 0.99
    for other in found:
        for of in ("workers", "owners"):
            for layer in found[0][of]:
                assert other[of][layer] == pytest.approx(found[0][of][layer], abs=1e-12)


def forward_masked_worker(kind, config):
    """A worker's own loss and gradients, and what it has allocated, against the dense model."""
    engine, (units, mask) = make_engine("forward", kind, 4, config=config), make_mask(kind, 4, config=config)
    (worker,) = engine.workers
    row, dense = mask[worker], dense_model(config)
    x, y = batch(3, worker, config=config)
    expected_loss, expected = subnetwork_gradients(dense, x, y, units, row, kind)
    held = {name: rows_of(name, gradient, units, row) for name, gradient in expected.items()}
    with engine.turn(worker) as model:
        loss = model(x, y)
        local = dict(model.named_parameters())
        found = dict(zip(local, torch.autograd.grad(loss, list(local.values()))))
    assert abs(loss.item() - expected_loss.item()) < 1e-12
    assert_close(found, {n: g[held[n]] for n, g in expected.items() if held[n].any()}, 1e-12)
    assert all(expected[n][~held[n]].abs().sum() == 0 for n in expected)  # the test's own zeros
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == 8 * sum(
        rows.sum() * dense.get_parameter(n)[0].numel() for n, rows in held.items()
    )
    assert sum(p.numel() for p in local.values()) < 0.8 * sum(p.numel() for p in dense.parameters())
    return sorted(local)


@pytest.mark.parametrize("kind", ["block", "neuron"])
@each_model
def test_forward_masking_is_a_smaller_model(in_processes, kind, config):
    names = in_processes(4, forward_masked_worker, kind, config)
    assert (len(set(map(tuple, names))) > 1) == (
        kind == "block"
    )  # blocks: other workers have other parameters


def pulled_values(mode, kind, dtype):
    """After a pull over buffers full of NaN, each worker's parameters are the owners' values to the last
    bit."""
    engine, (units, mask) = make_engine(mode, kind, 4, dtype=dtype), make_mask(kind, 4)
    masters = owned(engine, lambda bucket: bucket.master)
    (worker,) = engine.workers
    assert all(part.values.untyped_storage().nbytes() == 0 for part in engine.workers[worker].parts)
    for part in engine.workers[worker].parts:
        part.values.untyped_storage().resize_(part.values.nbytes)  # as large as `begin` will make it
        part.values.fill_(torch.nan)
    engine.workers[worker].begin()
    engine.workers[worker].fetch(len(engine.workers[worker].parts))
    read = 0
    for name, parameter in engine.workers[worker].model.named_parameters():
        master = masters[name.replace(".frozen.", ".")]
        row = mask[worker] if parameter.requires_grad else ~mask[worker]
        expected = master[rows_of(name, master, units, row)].to(dtype)
        assert parameter.dtype == dtype and torch.equal(parameter, expected), name
        read += parameter.numel()
    engine.workers[worker].end(free=False)
    total = sum(master.numel() for master in masters.values())
    assert read == total if mode == "backward" else read < total
    assert all(m.dtype == torch.promote_types(dtype, torch.float32) for m in masters.values())
    everything = {name: value.to(dtype) for name, value in masters.items()}
    assert_close(whole_values(engine), everything, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode, kind", SCHEMES)
def test_readers_agree_to_the_last_bit(in_processes, mode, kind, dtype):
    in_processes(4, pulled_values, mode, kind, dtype)


def train_four_workers(mode, kind, config, steps=5):
    engine = make_engine(mode, kind, 4, config=config)
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


@pytest.mark.parametrize("mode, kind", [("none", "block"), *SCHEMES])
@each_model
def test_processes_do_not_matter(in_processes, mode, kind, config):
    """Four workers on 1, 2 and 4 processes; and the initial model is the dense one whatever they hold."""
    if config != SMALL and (mode, kind) not in (("backward", "block"), ("forward", "neuron")):
        pytest.skip("these two schemes suffice for images")
    numbers = (1, 2, 4) if config == SMALL else (1, 4)
    runs = [result for n in numbers for result in in_processes(n, train_four_workers, mode, kind, config)]
    for first, last in runs:
        assert_close(first, dict(dense_model(config).named_parameters()), 0)
        assert_close(last, runs[0][1], 1e-10)
    assert (runs[0][1]["head.weight"] - runs[0][0]["head.weight"]).abs().max() > 0.01


def cost_of_a_step(mode, kind, coverage, dtype):
    """Bytes that this process sends in a step, and what stays on it."""
    config = GPTConfig(context=8)
    engine = make_engine(mode, kind, 4, coverage, config, dtype)
    (worker,) = engine.workers
    with engine.turn(worker) as model:
        model(*batch(0, worker, config=config)).backward()
    engine.step(lr=1e-2)
    moments = sum(t.nbytes for s in engine.optimizer.state.values() for t in s.values() if t.dim() > 0)
    # what is here of what the worker has: counted element by element
    units, mask = make_mask(kind, 4, coverage, config)
    dense, parts = build(config), {"trains": 0, "reads": 0, "trains_here": 0, "reads_by_others": 0}
    trains, reads = masks.roles(mode, mask)
    for bucket in engine.buckets:
        named = [(n, p) for n, p in dense.named_parameters() if bucket_of(n) == bucket]
        size = sum(p.numel() for _, p in named)
        cut = -(-size // 4)

        def elements(mask, w, named=named):
            return torch.cat(
                [rows_of(n, p, units, mask[w]).repeat_interleave(p[0].numel()) for n, p in named]
            )

        here = slice(worker * cut, (worker + 1) * cut)
        parts["trains"] += elements(trains, worker).sum().item()
        parts["trains_here"] += elements(trains, worker)[here].sum().item()
        parts["reads_by_others"] += sum(
            elements(reads, w)[here].sum().item() for w in range(4) if w != worker
        )
    assert engine.traffic["push"] == dtype.itemsize * (parts["trains"] - parts["trains_here"])
    assert engine.traffic["pull"] == dtype.itemsize * parts["reads_by_others"]
    return (
        engine.traffic["push"],
        engine.traffic["pull"],
        moments,
        train.worker_costs(engine, worker, steps=1),
    )


@pytest.mark.parametrize("coverage, dtype", [(0.5, torch.float32), (0.75, torch.bfloat16)])
@pytest.mark.parametrize("mode, kind", [("none", "block"), *SCHEMES])
def test_traffic_and_memory_follow_the_law(in_processes, mode, kind, coverage, dtype):
    """The README's tables: pushed and pulled are H = S + C (1 - S) of an all-reduce's halves, S the shared
    share; weights H, gradients one layer's and the owner's mean, optimizer 12 / N bytes per parameter."""
    of_ranks = in_processes(4, cost_of_a_step, mode, kind, coverage, dtype)
    units, _ = make_mask(kind, 4, coverage, GPTConfig())
    params = sum(p.numel() for p in build(GPTConfig()).parameters())
    maskable = sum(unit.cost for unit in units)
    half = (1 - 1 / 4) * params * dtype.itemsize
    law = 1 - maskable / params + coverage * maskable / params
    push, pull = (np.mean([rank[i] for rank in of_ranks]) for i in (0, 1))
    # where slices are cut inside a layer's parameters, a worker's own share of its own slice varies a little
    tolerance = 0.04 if kind == "neuron" else 1e-4
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


def validation_loss(mode, kind):
    """train.evaluate with masks on, against the dense model on all held-out windows at once."""
    engine = make_engine(mode, kind, 4)
    numbers = np.random.default_rng(5).integers(0, SMALL.vocabulary, 999)
    text = Text([numbers], [numbers[::-1].copy()], SMALL.vocabulary, SMALL.context, tests=25)
    x, y = text.validation(slice(None))
    logits = dense_model()(x)
    args = argparse.Namespace(seed=0, bn_batches=1, batch_size=8)
    loss, accuracy = train.evaluate(engine, text, args, torch.device("cpu"))
    assert abs(loss - torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item()) < 1e-12
    assert accuracy == pytest.approx((logits.argmax(-1) == y).double().mean().item())


@pytest.mark.parametrize("n", [1, 2, 4])
def test_validation_is_of_the_whole_model(in_processes, n):
    for mode, kind in SCHEMES:
        in_processes(n, validation_loss, mode, kind)


def validation_of_images(mode, kind, config):
    """The same for images: the whole model's statistics from five fixed batches, whoever computes them."""
    engine = make_engine(mode, kind, 4, config=config)
    images = some_images(size=config.image)
    args = argparse.Namespace(seed=0, bn_batches=5, batch_size=8)
    dense = dense_model(config)
    x, _ = images.batch(0, 0, 5 * train.BN_BATCH)
    if dist.get_world_size() == 1:
        estimate_statistics(dense, x.split(train.BN_BATCH))
        x, y = images.validation(slice(None))
        loss, accuracy = train.evaluate(engine, images, args, torch.device("cpu"))
        assert abs(loss - torch.nn.functional.cross_entropy(dense(x), y).item()) < 1e-9
        assert accuracy == pytest.approx((dense(x).argmax(-1) == y).double().mean().item())
        return loss, accuracy
    return train.evaluate(engine, images, args, torch.device("cpu"))


@pytest.mark.parametrize("model", ["vit", "resnet"])
def test_validation_of_images_does_not_depend_on_processes(in_processes, model):
    for mode, kind in (("backward", "block"), ("forward", "neuron")):
        calls = [(n, validation_of_images, mode, kind, CONFIGS[model]) for n in (1, 2, 4)]
        found = [result for call in calls for result in in_processes(*call)]
        for result in found:
            assert result == pytest.approx(found[0], abs=1e-9)


def statistics_left_and_estimated(steps):
    """Accuracy of a forward-masked ResNet on real images, (with running means of what the workers' own batch
    norms saw in training, averaged over who has them; with statistics estimated by the whole model)."""
    torch.set_num_threads(1)
    config = ResNetConfig(width=16)
    images = data.load("cifar10", CIFAR)
    optimizer = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    engine = make_engine("forward", "block", 4, config=config, dtype=torch.float32, optimizer=optimizer)
    seen = {}  # {(worker, norm): running mean and variance}

    def note(key, module, inputs):
        now = torch.stack(torch.var_mean(inputs[0], dim=(0, 2, 3))).detach()
        seen[key] = now if key not in seen else 0.9 * seen[key] + 0.1 * now  # as torch's batch norm

    for worker in engine.workers:
        for name, module in engine.workers[worker].model.named_modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.register_forward_pre_hook(functools.partial(note, (worker, name)))
    for step in range(1, steps + 1):
        for worker in engine.workers:
            with engine.turn(worker) as model:
                model(*images.batch(0, step, 64, slice(16 * worker, 16 * worker + 16))).backward()
        engine.step(lr=0.05 * min(1, step / 20))
    everyone = [None] * engine.processes
    dist.all_gather_object(everyone, seen)
    seen = {key: value for one in everyone for key, value in one.items()}
    args = argparse.Namespace(seed=0, bn_batches=16, batch_size=500)
    with engine.whole() as model:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                of_holders = [value for (_, norm), value in seen.items() if norm == name]
                module.running_var, module.running_mean = torch.stack(of_holders).mean(0)
        model.eval()
        x, y = images.validation(slice(None))
        with torch.no_grad():
            left = (model(x).argmax(-1) == y).float().mean().item()
    return left, train.evaluate(engine, images, args, torch.device("cpu"))[1]


@pytest.mark.skipif("STEPS" not in os.environ, reason="takes minutes: STEPS=100 pytest -s -k needs_stat")
@needs_images
def test_batch_norm_needs_statistics_of_the_whole_model(in_processes):
    steps = int(os.environ["STEPS"])
    left, estimated = in_processes(2, statistics_left_and_estimated, steps)[0]
    print(f"after {steps} steps: accuracy {left:.3f} as training left them, {estimated:.3f} estimated anew")
    assert estimated > left + 0.05


def learn(mode, dtype):
    engine = make_engine(mode, "neuron", 4, dtype=dtype)
    losses = []
    for _ in range(30):
        total = torch.zeros(())
        for worker in engine.workers:
            with engine.turn(worker) as model:
                loss = model(*batch(0, worker))
                loss.backward()
            total += loss.detach()
        losses.append(engine.step(1e-2, 1.0, total)[1] / 4)
    return losses


@pytest.mark.parametrize("mode", ["none", "backward", "forward"])
def test_bfloat16_learns_like_float32(in_processes, mode):
    """bfloat16 weights, gradients and traffic over a float32 master: much the same curve."""
    (exact, _), (rounded, _) = (in_processes(2, learn, mode, d) for d in (torch.float32, torch.bfloat16))
    assert exact[-1] < 0.3 * exact[0]
    np.testing.assert_allclose(rounded, exact, atol=0.25)


# ---- the command line

TINY = "--layers 2 --width 32 --hidden 32 --context 32 --batch-size 8 --eval-batches 2".split()


def clean_environment(**more):
    """This process's environment without what a launcher may have left in it."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in launcher} | more


def torchrun(n, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    command += ["train.py", *arguments]
    return subprocess.run(
        command, cwd=HERE, capture_output=True, text=True, timeout=120, env=clean_environment()
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


PER_WORKER = {"worker", "held_params", "weight_bytes", "grad_bytes", "optimizer_bytes", "activation_bytes"}
PER_WORKER |= {"peak_bytes", "flops", "push_bytes", "pull_bytes"}


@pytest.mark.parametrize("mask, kind", [("none", "block"), ("backward", "neuron"), ("forward", "block")])
def test_train_under_torchrun(tmp_path, mask, kind):
    """The default model for a few steps: files, costs against the dense column, no warnings of our making."""
    flags = ["--mask", mask, "--units", kind, "--workers", "4", "--steps", "4", "--eval-every", "2"]
    done = torchrun(2, *flags, "--eval-batches", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "mean / dense" in done.stdout and "blocks.0" in done.stdout
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert [entry["tokens"] for entry in log] == [2048, 4096, 6144, 8192]
    assert [entry["step"] for entry in log if "val_loss" in entry] == [2, 4]
    assert all({"loss", "lr", "grad_norm", "step_ms"} <= entry.keys() for entry in log)
    assert log[-1]["loss"] < log[0]["loss"] < 7
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["final_val_loss"] == log[-1]["val_loss"]
    assert (summary["workers"], summary["processes"], summary["steps"]) == (4, 2, 4)
    assert summary["config"]["units"] == kind and summary["config"]["seed"] == 0
    coverage = 1 if mask == "none" else 0.5
    assert (summary["coverage"], summary["holders_per_unit"]) == (coverage, 4 * coverage)
    assert summary["spectral_gap"] > 0 and (summary["spectral_gap"] == 1) == (mask == "none")
    assert [worker["worker"] for worker in summary["per_worker"]] == [0, 1, 2, 3]
    dense, params, shared = (summary[key] for key in ("dense", "params", "shared_params"))
    held = (shared + 0.5 * (params - shared)) / params  # H of the README; with --mask none all is shared
    sent = {
        key: np.mean([w[key] for w in summary["per_worker"]]) / dense[key]
        for key in ("push_bytes", "pull_bytes")
    }
    assert sent["push_bytes"] == pytest.approx(held, rel=0.04)
    assert sent["pull_bytes"] == pytest.approx(held if mask == "forward" else 1, rel=0.04)
    assert params == dense["held_params"] == sum(p.numel() for p in build(GPTConfig()).parameters())
    assert dense["optimizer_bytes"] == 8 * params and dense["push_bytes"] == dense["pull_bytes"] == 2 * params
    tokens, matrices = (
        4 * 128,
        params - 13 * 128 - 256 * 128,
    )  # without norms and the embedding, which is a look-up
    attention = 4 * 128 * 128 * 128 * 4 * 6  # two products of T x T x width, for 4 sequences in 6 layers
    assert dense["flops"] == 6 * tokens * matrices + 3.5 * attention  # backward: twice, and 2.5 times
    for worker in summary["per_worker"]:
        assert worker.keys() == dense.keys() == PER_WORKER
        assert worker["peak_bytes"] is None
        flops, saved = (worker[key] / dense[key] for key in ("flops", "activation_bytes"))
        if mask == "none":
            assert flops == saved == 1 and worker["held_params"] == summary["shared_params"] == params
        else:
            assert flops < {"backward": 0.88, "forward": 0.6}[mask] and saved < 0.95
            assert worker["held_params"] == pytest.approx((params + summary["shared_params"]) / 2, rel=1e-3)


@pytest.fixture
def small_cifar(tmp_path):
    """The flag that names a folder with 15 images to train on, and 3 to test."""
    source = small_archive(tmp_path)
    data.unpack(source, tmp_path / source.archive, tmp_path / source.folder)
    return ["--data-dir", str(tmp_path)]


@pytest.mark.parametrize(
    "model, kind, mask",
    [("resnet18", "block", "forward"), ("vit", "neuron", "backward")],
)
def test_train_on_images_under_torchrun(tmp_path, small_cifar, model, kind, mask):
    width = {"resnet18": "8", "vit": "32"}[model]
    flags = ["--model", model, "--width", width, "--units", kind, "--mask", mask, "--workers", "4"]
    flags += ["--epochs", "2", "--batch-size", "8", "--label-smoothing", "0.1", "--bn-batches", "3"]
    done = torchrun(2, *flags, *small_cifar, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "nats per image" in done.stderr + done.stdout
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [entry["images"] for entry in log] == [8, 16, 24, 32]  # 2 epochs of 15 images are 3.75 batches
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["final_val_accuracy"] == log[-1]["val_accuracy"]
    assert summary["final_val_accuracy"] * 3 == pytest.approx(round(summary["final_val_accuracy"] * 3))
    dense, sgd = summary["dense"], model == "resnet18"
    assert dense["optimizer_bytes"] == (4 if sgd else 8) * summary["params"]
    for worker in summary["per_worker"]:
        flops, saved = (worker[key] / dense[key] for key in ("flops", "activation_bytes"))
        assert worker["optimizer_bytes"] == pytest.approx(
            summary["params"] * (8 if sgd else 12) / 2, rel=0.01
        )
        if mask == "none":
            assert flops == saved == 1
        else:
            assert flops < 1 and worker["held_params"] < 0.75 * summary["params"]
            # what a convolution without weight gradient need not keep, the relu before it does
            assert saved < 1 or (saved == 1 and (model, mask) == ("resnet18", "backward"))


def test_train_with_kept_blocks(monkeypatch, capsys, tmp_path, small_cifar):
    flags = ["--model", "resnet18", "--width", "8", "--mask", "forward", "--keep", "strided", "--steps", "1"]
    in_process(
        monkeypatch, *flags, "--batch-size", "8", "--out", str(tmp_path / "out"), *small_cifar, tiny=[]
    )
    assert "blocks 0, 2, 4, 6" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    whole = build(ResNetConfig(width=8))
    held = sum(p.numel() for i in (1, 3, 5, 7) for p in whole.blocks[str(i)].branch.parameters())
    assert summary["shared_params"] == summary["params"] - held


def test_train_on_two_machines(tmp_path):
    """Two torchrun agents that meet over a c10d rendezvous; here both are on this host."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"localhost:{port}",
        "--rdzv-id",
        "sdp",
        "train.py",
    ]
    command += [*TINY, "--steps", "2", "--out", str(tmp_path)]
    options = {
        "cwd": HERE,
        "env": clean_environment(),
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
    }
    agents = [subprocess.Popen(command, text=True, **options) for _ in range(2)]
    said = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert sum("mean / dense" in text for text in said) == 1  # rank 0 speaks, on one of them
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["workers"], summary["processes"]) == (2, 2)


def test_train_alone_plays_four_workers(tmp_path):
    command = [sys.executable, "train.py", "--mask", "forward", *TINY, "--steps", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=clean_environment())
    assert done.returncode == 0, done.stderr
    assert "plays 4 workers" in done.stdout and "Warning" not in done.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["workers"] == 4


def in_process(monkeypatch, *arguments, tiny=TINY):
    """main() in this process, as python train.py would run it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(
        "OMP_NUM_THREADS", str(max(2, torch.get_num_threads()))
    )  # leave the threads as they are
    train.main([*tiny, *arguments])


def test_train_one_worker_says_that_it_holds_everything(monkeypatch, capsys):
    in_process(monkeypatch, "--workers", "1", "--steps", "1")
    assert "one worker holds everything" in capsys.readouterr().out


def test_train_same_data_and_result_for_other_workers(monkeypatch, tmp_path):
    """--mask none on 1 and 4 workers: the same losses, so the same initial model and the same batches."""
    logs = []
    for workers in ("1", "4"):
        out = tmp_path / workers
        flags = [
            "--mask",
            "none",
            "--workers",
            workers,
            "--steps",
            "3",
            "--dtype",
            "float64",
            "--out",
            str(out),
        ]
        in_process(monkeypatch, *flags)
        logs.append([json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()])
    assert logs[0] == pytest.approx(logs[1], abs=1e-10)


def test_measured_counts_by_hand():
    x, w1, w2 = (
        torch.randn(8, 4),
        torch.randn(4, 16, requires_grad=True),
        torch.randn(16, 3, requires_grad=True),
    )
    with train.measured(lambda: [w1, w2]) as cost:
        ((x @ w1).relu() @ w2).sum().backward()
    assert cost["activation_bytes"] == 4 * (
        8 * 4 + 8 * 16
    )  # x, and once what relu and the second product save
    assert cost["flops"] == 2 * 8 * (2 * 4 * 16 + 3 * 16 * 3)  # x itself needs no gradient


def test_train_compiled(monkeypatch, tmp_path):
    """Compiled blocks, with units that differ, learn as the others do; before any traffic."""
    pytest.importorskip("torch._inductor")
    losses, counters = [], torch._dynamo.utils.counters
    for flags in ([], ["--compile"]):
        counters.clear()
        out = ["--out", str(tmp_path / str(len(losses)))]
        in_process(monkeypatch, "--mask", "backward", "--units", "neuron", "--steps", "3", *flags, *out)
        log = (tmp_path / str(len(losses)) / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in log])
    assert (
        counters["stats"]["unique_graphs"] >= 2
    )  # with masks, and the whole model: also after the first step
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("engine", engines[1:])
def test_train_with_other_engines(tmp_path, small_cifar, engine):
    flags = ["--engine", engine, "--model", "resnet18", "--width", "8", "--steps", "2", "--batch-size", "8"]
    flags += ["--checkpoint-activations", "--micro-batches", "2", "--bn-batches", "2"]
    done = torchrun(2, *flags, *small_cifar, "--out", str(tmp_path / "out"))
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    dense = summary["dense"]
    for worker in summary["per_worker"]:
        assert worker.keys() == dense.keys() == PER_WORKER
        assert worker["flops"] == dense["flops"]
        assert worker["activation_bytes"] == dense["activation_bytes"]


@needs_fsdp
def test_bench(tmp_path):
    flags = [*TINY, "--bench", "--steps", "2", "--units", "neuron"]
    done = torchrun(2, *flags, "--out", str(tmp_path))
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert list(found) == ["ddp", "fsdp", "sdp-none", "sdp-backward", "sdp-forward"]
    keys = {"step_ms", "step_ms_spread", "tokens_per_s", "static_bytes", "activation_bytes", "peak_bytes"}
    keys |= {"sent_bytes", "flops", "vs_ddp"}
    assert all(figures.keys() == keys for figures in found.values())
    for name, figures in found.items():
        assert figures["vs_ddp"] == pytest.approx(figures["step_ms"] / found["ddp"]["step_ms"])
        assert figures["tokens_per_s"] == pytest.approx(8 * 32 / figures["step_ms"] * 1e3)
        assert name in done.stdout
    flops, sent, activations = (
        {n: f[k] / found["ddp"][k] for n, f in found.items()}
        for k in ("flops", "sent_bytes", "activation_bytes")
    )
    assert flops["fsdp"] == flops["sdp-none"] == activations["fsdp"] == activations["sdp-none"] == 1
    assert 1 < sent["fsdp"] < 1.5 and sent["sdp-none"] == pytest.approx(1, rel=0.02)
    assert flops["sdp-forward"] < flops["sdp-backward"] < 1 and activations["sdp-forward"] < 0.95
    assert "--overwrite" in torchrun(2, *flags, "--out", str(tmp_path)).stderr


def test_learning_rate():
    _, args, _ = train.parse(["--steps", "100", "--warmup", "10", "--lr", "1"])
    rates = [train.learning_rate(step, args) for step in range(1, 101)]
    assert rates[0] == 0.1 and rates[9] == 1.0 == max(rates) and rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[9:], rates[10:]))
    _, args, _ = train.parse(["--steps", "1", "--warmup", "0", "--lr", "1"])
    assert train.learning_rate(1, args) > 0


def test_sgd_has_nesterov_momentum():
    _, args, _ = train.parse(["--model", "resnet18", "--lr", "0.1", "--weight-decay", "0"])
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = train.make_optimizer(args)([{"params": [parameter]}])
    for _ in range(2):
        parameter.grad = torch.ones(1)
        optimizer.step()
    assert parameter.item() == pytest.approx(1 - 0.1 * ((1 + 0.9) + (1 + 0.9 * 1.9)))


BAD = [  # flags, processes, what the one line must say
    ("--coverage 0", 1, ("--coverage 0", "at most 1")),
    ("--coverage 1.5", 1, ("--coverage 1.5", "at most 1")),
    ("--coverage nan", 1, ("--coverage nan", "at most 1")),
    ("--coverage 2 --mask none", 1, ("--coverage 2", "at most 1")),
    ("--coverage half", 1, ("--coverage", "half")),
    ("--coverage 0.1", 1, ("--coverage 0.1", "0.125")),
    ("--coverage 0.3 --layers 2", 1, ("--coverage", "0.375")),
    ("--coverage 0.1 --workers 8 --units neuron", 1, ("--coverage", "blocks.0.attention", "0.1875")),
    ("--batch-size 10", 1, ("--batch-size 10", "4 workers", "8 or 12")),
    ("--batch-size 3", 1, ("--batch-size 3", "such as 4")),
    ("--batch-size 0", 1, ("--batch-size", "at least 1")),
    ("--workers 3", 2, ("--workers 3", "2 processes")),
    ("--workers 0", 1, ("--workers", "at least 1")),
    ("--workers two", 1, ("--workers", "whole number")),
    ("--width 30", 1, ("--width 30", "multiple of 8", "--heads")),
    ("--hidden 40", 1, ("--hidden 40", "multiple of 16")),
    ("--mask sideways", 1, ("--mask", "sideways", "forward")),
    ("--units brick", 1, ("--units", "brick", "neuron")),
    ("--model resnet", 1, ("--model", "gpt")),
    ("--dtype int8", 1, ("--dtype", "bfloat16")),
    ("--data novels", 1, ("--data", "python")),
    ("--data-dir /nowhere", 1, ("--data-dir /nowhere", "standard library")),
    ("--context 10000000", 1, ("--context 10000000", "below")),
    ("--steps -1", 1, ("--steps", "at least 1")),
    ("--lr nan", 1, ("--lr", "at least 0")),
    ("--lr -1", 1, ("--lr", "at least 0")),
    ("--seed -1", 1, ("--seed", "at least 0")),
    ("--grad-clip -1", 1, ("--grad-clip", "at least 0")),
    ("--warmup x", 1, ("--warmup", "whole number")),
    ("--cov 0.5", 1, ("--cov",)),
    ("--data cifar10 --data-dir /nowhere", 1, ("--data cifar10", "--model gpt")),  # before a download
    ("--model vit --patch 5 --data-dir /nowhere", 1, ("--patch 5",)),
    ("--size huge", 1, ("--size huge", "gpt has tiny, 10m, 134m, 500m, 1b")),
    ("--model vit --size 10m --data-dir HERE", 1, ("--size 10m", "vit has cifar, tiny, small")),
    ("--model resnet18 --size tiny --data-dir HERE", 1, ("--size tiny", "resnet18 has none", "--width")),
    ("--model resnet18 --width 12 --data-dir HERE", 1, ("--width 12", "multiple of 8")),
    ("--model resnet18 --heads 4 --data-dir HERE", 1, ("--heads 4", "not for --model resnet18")),
    ("--model vit --patch 5 --data-dir HERE", 1, ("--patch 5", "divide the 32")),
    ("--model vit --context 64 --data-dir HERE", 1, ("--context 64", "not for --model vit")),
    ("--model vit --data python", 1, ("--data python", "--model vit")),
    ("--data cifar10 --data-dir HERE", 1, ("--data cifar10", "--model gpt")),
    ("--norm batch", 1, ("--norm batch", "not for --model gpt")),
    ("--norm layer", 1, ("--norm", "group")),
    ("--keep strided", 1, ("--keep strided", "none, ends, or numbers from 0 to 5")),
    ("--keep 6", 1, ("--keep 6", "0 to 5")),
    ("--keep 0,1,2,3,4,5", 1, ("--keep", "nothing to mask")),
    ("--steps 3 --epochs 1", 1, ("--epochs 1", "--steps")),
    ("--epochs 0", 1, ("--epochs", "at least 0.001")),
    ("--label-smoothing 2", 1, ("--label-smoothing 2", "at most 1")),
    ("--optimizer adam", 1, ("--optimizer", "adamw")),
    ("--engine ddp --mask forward", 1, ("--mask forward", "--engine sdp")),
    ("--engine ddp --workers 4", 1, ("--workers 4", "--engine ddp", "torchrun")),
    ("--engine zero", 1, ("--engine", "fsdp")),
    ("--bench --workers 4", 1, ("--workers 4", "--bench", "torchrun")),
    ("--bench --engine ddp", 1, ("--engine ddp", "--bench")),
    ("--assign greedy", 1, ("--assign", "cyclic")),
    ("--resample -1", 1, ("--resample", "at least 0")),
    ("--resample 5 --mask none", 1, ("--resample 5", "--mask none")),
    ("--resample 5 --compile", 1, ("--resample 5", "--compile")),
    ("--resample 5 --bench", 1, ("--resample 5", "not for --bench")),
    ("--finish 0.3", 1, ("--finish 0.3", "--mask forward")),
    ("--finish 1.5 --mask forward", 1, ("--finish 1.5", "at most 1")),
    ("--drop-path 1", 1, ("--drop-path 1", "below 1")),
    ("--log-alignment 10 --engine ddp", 1, ("--log-alignment 10", "--engine sdp")),
    ("--match-flops --engine ddp", 1, ("--match-flops", "--engine sdp")),
    ("--micro-batches 3", 1, ("--batch-size 16", "3 --micro-batches", "such as 12 or 24")),
    ("--device tpu", 1, ("--device", "mps")),
    *([] if torch.cuda.is_available() else [("--device cuda", 1, ("--device cuda", "not on this machine"))]),
    ("--data fineweb --data-dir /nowhere", 1, ("--data-dir /nowhere", "data.py fineweb --shards")),
    ("--model vit --data fineweb --data-dir HERE", 1, ("no *_train_*.bin",)),
    ("--bn-batches 0", 1, ("--bn-batches", "at least 1")),
    ("--weight-decay -0.1", 1, ("--weight-decay", "at least 0")),
    ("--eval-every often", 1, ("--eval-every", "whole number")),
    ("--eval-batches 0", 1, ("--eval-batches", "at least 1")),
    ("--save-every -1", 1, ("--save-every", "at least 0")),
    ("--timeout 0", 1, ("--timeout", "at least 1")),
    ("--heads 3", 1, ("--width 128", "multiple of 6")),
    ("--layers 1.5", 1, ("--layers", "whole number")),
    ("--model vit --data cifar10 --data-dir /dev/null/x --data-url no", 1, ("--data-dir /dev/null/x",)),
    ("--overwrite=yes", 1, ("--overwrite", "yes")),
    ("anything", 1, ("anything",)),
    ("--model resnet18 --data imagenet --data-dir /nowhere", 1, ("--data-dir /nowhere", "data.py imagenet")),
    ("--out /dev/null/x", 1, ("--out /dev/null/x", "cannot be written")),
]


@pytest.mark.parametrize("flags, processes, says", BAD, ids=[bad[0] for bad in BAD])
def test_bad_flags_end_with_one_line(monkeypatch, capsys, small_cifar, flags, processes, says):
    flags = flags.replace("HERE", small_cifar[1])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(SystemExit) as stop:
        train.main(flags.split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in says), line


def test_out_is_not_overwritten_unasked(monkeypatch, capsys, tmp_path):
    in_process(monkeypatch, "--steps", "1", "--out", str(tmp_path))
    before = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, "--steps", "1", "--out", str(tmp_path))
    assert stop.value.code == 2 and "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "log.jsonl").read_bytes() == before
    if not torch.cuda.is_available():  # what is found wrong later does not cost the old run
        with pytest.raises(SystemExit):
            in_process(monkeypatch, "--steps", "1", "--out", str(tmp_path), "--overwrite", "--device", "cuda")
        assert (tmp_path / "ckpt.pt").exists() and (tmp_path / "log.jsonl").read_bytes() == before
    in_process(monkeypatch, "--steps", "2", "--out", str(tmp_path), "--overwrite")
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_flags_that_differ_between_processes():
    """Two processes started by hand, as on two machines: rank 0 names the flag."""
    ranks, port = [], free_port()
    for rank, lr in enumerate(("0.1", "0.2")):
        environment = clean_environment(
            RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        command = [sys.executable, "train.py", *TINY, "--steps", "1", "--lr", lr]
        ranks.append(subprocess.Popen(command, cwd=HERE, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        _, said = ranks[0].communicate(timeout=60)
        assert ranks[0].returncode == 2
        assert "--lr: 0.1 on rank 0, but 0.2 on rank 1" in said and "Traceback" not in said
        assert ranks[1].poll() is None  # waits to be ended
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()


# ---- checkpoints


def read_log(out):
    """The steps of a run, without their times."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "step_ms"} for entry in entries]


def assert_same_checkpoint(found, expected):
    """Bit for bit, by name, but for the flags."""
    found, expected = (torch.load(path, weights_only=True) for path in (found, expected))
    assert found["progress"] == expected["progress"] and found["config"] == expected["config"]
    assert found["model"].keys() == expected["model"].keys()
    assert found["optimizer"].keys() == expected["optimizer"].keys()
    for name, tensor in expected["model"].items():
        assert torch.equal(found["model"][name], tensor), name
    for name, state in expected["optimizer"].items():
        assert state and found["optimizer"][name].keys() == state.keys()
        assert all(torch.equal(found["optimizer"][name][key], state[key]) for key in state), name


CHANGING = "--mask forward --resample 2 --finish 0.34 --drop-path 0.2 --log-alignment 4".split()


@pytest.mark.parametrize(
    "model, dtype, more",
    [("gpt", "float32", []), ("gpt", "bfloat16", CHANGING), ("resnet18", "float32", CHANGING)],
    ids=["gpt", "gpt-bfloat16-changing", "resnet18-changing"],
)
def test_resume_is_bit_for_bit(monkeypatch, tmp_path, small_cifar, model, dtype, more):
    """From the checkpoint before the last, with a line in the log that was never finished."""
    images = f"--model resnet18 --width 8 --batch-size 8 --bn-batches 1 --data-dir {small_cifar[1]}".split()
    flags = ["--mask", "backward", "--units", "neuron", "--dtype", dtype, "--steps", "6", *more]
    flags += ["--save-every", "2", "--eval-every", "3", "--out"]
    at_once, later, options = tmp_path / "a", tmp_path / "b", {"tiny": images if model != "gpt" else TINY}
    in_process(monkeypatch, *flags, str(at_once), **options)
    shutil.copytree(at_once, later)
    (later / "ckpt.pt").unlink()
    with (later / "log.jsonl").open("a") as log:
        log.write('{"step": 7, "lo\n\0\0')  # as after a power cut
    in_process(monkeypatch, *flags, str(later), "--resume", **options)
    assert torch.load(later / "ckpt.prev.pt", weights_only=True)["progress"]["step"] == 4
    assert_same_checkpoint(later / "ckpt.pt", at_once / "ckpt.pt")
    assert [entry["step"] for entry in read_log(later)] == [1, 2, 3, 4, 5, 6]
    assert read_log(later) == read_log(at_once)
    summaries = [json.loads((out / "summary.json").read_text()) for out in (at_once, later)]
    phases = [summary.pop("phases") for summary in summaries]
    for key in ("final_val_loss", *(["per_worker"] if not more else [])):
        assert summaries[0][key] == summaries[1][key]
    assert [(phase["mask"], phase["steps"]) for phase in phases[1]] == [("backward", 2)]
    if more:  # the last phase alone is trained after it was resumed
        assert [(phase["mask"], phase["steps"]) for phase in phases[0]] == [("forward", 4), ("backward", 2)]
        assert phases[0][1]["per_worker"] == phases[1][0]["per_worker"]


def state_on_file(kind, mode, units, path, save):
    """Save what an engine has after three steps; or load it into another one, which must then have it too,
    and go on."""
    n = dist.get_world_size()
    engine = make_engine(mode, units, 4) if kind == "sdp" else make_any(kind, SMALL, torch.float64)
    steps = range(3) if save else range(3, 5)
    if not save:
        engine.load(*torch.load(path, mmap=True, weights_only=True))
        state = engine.state()
        if dist.get_rank() == 0:
            expected = torch.load(path, weights_only=True)
            assert_close(state[0], expected[0], 0)
            assert state[1].keys() == expected[1].keys()
            for name, of in expected[1].items():
                assert of.keys() == {"exp_avg", "exp_avg_sq", "step"}
                assert_close(state[1][name], of, 0)
    for step in steps:
        for worker in engine.workers:
            with engine.turn(worker) as model:
                x, y = (
                    batch(step, worker)
                    if len(engine.workers) * n == 4
                    else (t[worker::n] for t in batch(step))
                )
                model(x, y).backward()
        engine.step(1e-2, 1.0)
    if save:
        state = engine.state()
        assert dist.get_rank() == 0 or state == ({}, {})
        if dist.get_rank() == 0:
            torch.save(state, path)
    return whole_values(engine)


def test_resume_on_other_processes_and_masks(in_processes, tmp_path):
    path = tmp_path / "state"
    in_processes(4, state_on_file, "sdp", "backward", "block", path, True)
    results = [
        in_processes(n, state_on_file, kind, mode, units, path, False)[0]
        for n, kind, mode, units in (
            (1, "sdp", "none", "block"), (4, "sdp", "none", "neuron"), (2, "ddp", None, None),
            *([(2, "fsdp", None, None)] if fsdp_on_cpu else []),
        )
    ]  # fmt: skip
    for result in results:  # all are data parallelism, and see the same rows
        assert_close(result, results[0], 1e-10)
    for n, mode, units in ((1, "forward", "neuron"), (4, "forward", "block"), (2, "backward", "neuron")):
        in_processes(n, state_on_file, "sdp", mode, units, path, False)


def gathered():
    engine = make_engine("backward", "neuron", 3)
    sizes = [int(bucket.edges[-1]) for bucket in engine.buckets.values()]
    return engine.state()[0], whole_values(engine), sizes


def test_state_of_buckets_that_no_equal_slices_fill(in_processes):
    state, whole, sizes = in_processes(3, gathered)[0]
    assert any(size % 3 for size in sizes)
    assert_close(state, whole, 0)


def test_resume_begins_where_there_is_nothing(monkeypatch, capsys, tmp_path):
    flags = ["--size", "tiny", "--steps", "2", "--out", str(tmp_path / "run")]
    in_process(monkeypatch, *flags, "--resume")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert {path.name for path in before} == {"ckpt.pt", "log.jsonl", "summary.json"}
    capsys.readouterr()
    in_process(monkeypatch, *flags, "--resume")  # nothing is left to be done, and nothing changes
    assert "nothing to train" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # as of a process that torchrun has started again
    in_process(monkeypatch, "--steps", "3", "--dtype", "float64", "--out", str(tmp_path / "run"))
    assert "after step 2" in capsys.readouterr().out
    assert [entry["step"] for entry in read_log(tmp_path / "run")] == [1, 2, 3]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A small run of the GPT, with a checkpoint of step 2 and one of step 3."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch, "--steps", "3", "--save-every", "2", "--out", str(out))
    return out


@pytest.mark.parametrize("model", ["gpt", "vit", "resnet18"])
def test_checkpoint_holds_the_whole_model(monkeypatch, capsys, tmp_path, trained, small_cifar, model):
    """Exported, and read by the dense model alone, it has the loss that was logged; so has --eval-only."""
    out, flags = trained, []
    if model != "gpt":
        out, flags = tmp_path, f"--model {model} --bn-batches 1 --data-dir {small_cifar[1]}".split()
        flags += {"vit": "--layers 2 --width 32 --hidden 32".split(), "resnet18": ["--width", "8"]}[model]
        in_process(monkeypatch, *flags, "--batch-size", "8", "--steps", "2", "--out", str(out), tiny=())
    summary = json.loads((out / "summary.json").read_text())
    run_main(monkeypatch, "model", "export", out / "ckpt.pt", tmp_path / "weights")
    fields = {field: value for field, value in summary["model"].items()}
    dense = build(models.CONFIGS[model](**fields))
    dense.load_state_dict(torch.load(tmp_path / "weights", weights_only=True), strict=True)
    flags = summary["config"]
    tests = flags["eval_batches"] * flags["batch_size"]
    x, y = data.load(flags["data"], flags["data_dir"], None, 32, tests).validation(slice(None))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(dense.eval()(x).flatten(0, -2), y.flatten()).item()
    assert loss == pytest.approx(summary["final_val_loss"], abs=1e-5)
    capsys.readouterr()
    few = f"--eval-only --eval-batches 2 --batch-size 8 --bn-batches 1 --resume {out / 'ckpt.pt'}"
    in_process(monkeypatch, *few.split(), tiny=())
    assert f"val_loss {summary['final_val_loss']:.4f}" in capsys.readouterr().out


def run_main(monkeypatch, program, *arguments):
    """A command's main() in this process."""
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *map(str, arguments)])
    {"model": models, "masks": masks, "data": data}[program].main()


def test_model_samples_what_is_likely(monkeypatch, capsys, trained):
    run_main(monkeypatch, "model", "sample", trained / "ckpt.pt", "--prompt", "import", "--tokens", 40)
    first = capsys.readouterr().out
    run_main(monkeypatch, "model", "sample", trained / "ckpt.pt", "--prompt", "import", "--tokens", 40)
    assert first == capsys.readouterr().out and first.startswith("import")
    dense = models.load_model(trained / "ckpt.pt")
    tokens = list(b"import")
    for found in models.sample(dense, tokens, 40, temperature=0, seed=0):
        likely = dense(torch.tensor([tokens])[:, -32:]).argmax(-1)[0, -1].item()  # 32: TINY's --context
        assert found == likely
        tokens.append(likely)


def test_model_exports_a_llama(monkeypatch, tmp_path, trained):
    transformers = pytest.importorskip("transformers")
    run_main(monkeypatch, "model", "export-hf", trained / "ckpt.pt", tmp_path / "llama")
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama").double()
    dense = models.load_model(trained / "ckpt.pt").double()
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 32)))
    with torch.no_grad():
        torch.testing.assert_close(llama(x).logits, dense(x), rtol=1e-5, atol=1e-5)  # rotations in float32


# ---- runs whose masks change, and what a run counts


def test_train_counts_what_was_computed_and_sent(tmp_path):
    """`flops` and `sent_bytes` of the log add up to the summary's means; a finish has phases of its own."""
    flags = [*TINY, "--mask", "forward", "--finish", "0.25", "--workers", "4", "--steps", "8"]
    flags += ["--log-alignment", "3"]  # which moves much, and is not counted
    done = torchrun(2, *flags, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    log, summary = read_log(tmp_path), json.loads((tmp_path / "summary.json").read_text())
    first, last = summary["phases"]
    assert [(phase["mask"], phase["steps"]) for phase in (first, last)] == [("forward", 6), ("backward", 2)]
    of_step = {"flops": {}, "sent_bytes": {}}
    for phase in (first, last):
        each = phase["per_worker"]
        of_step["flops"][phase["mask"]] = np.mean([of["flops"] for of in each])
        of_step["sent_bytes"][phase["mask"]] = np.mean([of["push_bytes"] + of["pull_bytes"] for of in each])
    for key, of_mode in of_step.items():
        steps = [log[0][key], *(b[key] - a[key] for a, b in zip(log, log[1:]))]
        assert steps == pytest.approx([of_mode["forward"]] * 6 + [of_mode["backward"]] * 2, abs=2)
    for worker, before, after in zip(summary["per_worker"], first["per_worker"], last["per_worker"]):
        assert (
            before["weight_bytes"]
            == 4 * before["held_params"]
            < after["weight_bytes"]
            == 4 * summary["params"]
        )
        assert worker["flops"] == pytest.approx((6 * before["flops"] + 2 * after["flops"]) / 8, abs=1)
        assert (
            worker["weight_bytes"] == after["weight_bytes"] and worker["held_params"] == after["held_params"]
        )


def test_train_matches_the_flops_of_dense_training(monkeypatch, capsys, tmp_path):
    for name, more in (("static", []), ("finish", ["--finish", "0.5"])):
        flags = "--mask forward --steps 6 --warmup 1 --match-flops".split()
        in_process(monkeypatch, *flags, *more, "--out", str(tmp_path / name))
        said = capsys.readouterr().out
        log, summary = read_log(tmp_path / name), json.loads((tmp_path / name / "summary.json").read_text())
        assert log[-1]["step"] == summary["steps"] > 6
        assert f"{summary['steps']} steps, which cost a worker the FLOPs of 6 dense ones" in said
        assert abs(log[-1]["flops"] - 6 * summary["dense"]["flops"]) <= summary["dense"]["flops"] / 2
        assert log[-1]["lr"] == pytest.approx(3e-4)  # the schedule is as long as the run


def test_train_is_not_changed_by_looking_on(monkeypatch, tmp_path):
    """--log-alignment: the same model, bit for bit, the same log but for its key, at steps K, 2K, ..."""
    flags = (
        "--mask backward --units neuron --micro-batches 2 --drop-path 0.2 --steps 5 --save-every 0".split()
    )
    for name, more in (("without", []), ("with", ["--log-alignment", "2"])):
        in_process(monkeypatch, *flags, *more, "--out", str(tmp_path / name))
    assert_same_checkpoint(tmp_path / "with" / "ckpt.pt", tmp_path / "without" / "ckpt.pt")
    log = read_log(tmp_path / "with")
    found = {entry["step"]: entry.pop("alignment") for entry in log if "alignment" in entry}
    assert log == read_log(tmp_path / "without") and list(found) == [2, 4]
    summary = json.loads((tmp_path / "with" / "summary.json").read_text())["alignment"]
    assert summary["owners"]["all"] == pytest.approx(np.mean([of["owners"]["all"] for of in found.values()]))
    assert summary["workers"]["head"] == pytest.approx(
        np.mean([of["workers"]["head"] for of in found.values()])
    )
    assert 0 < summary["owners"]["all"] < 1


def test_drop_path():
    y = torch.randn(1000, 3, 2)
    assert models.drop_path(y, 0.25, training=False) is y and models.drop_path(y, 0.0, training=True) is y
    found = models.drop_path(y, 0.25, training=True)
    dropped = (found == 0).all(dim=(1, 2))
    torch.testing.assert_close(found[~dropped], y[~dropped] / 0.75)
    assert 200 < dropped.sum() < 300  # 250 on average


def losses_with_drop_path():
    engine = make_engine("backward", "block", 4, config=dataclasses.replace(SMALL, drop_path=0.5))
    args = argparse.Namespace(micro_batches=1, grad_clip=0.0, workers=4, seed=0)
    batches = [{worker: batch(step, worker) for worker in engine.workers} for step in range(2)]
    return [train.update(engine, of, args, step, 1e-2)[:2] for step, of in enumerate(batches)]


def test_drop_path_does_not_depend_on_processes(in_processes):
    one, four = (in_processes(n, losses_with_drop_path)[0] for n in (1, 4))
    np.testing.assert_allclose(one, four, rtol=1e-10)


@pytest.mark.parametrize("rescale, scale", [(True, 2), (False, 1)])
def test_rescaling_of_branches(rescale, scale):
    """A branch with half of its units adds twice what these give, or with --no-rescale just that."""
    config = dataclasses.replace(SMALL, rescale=rescale)
    branches = ("blocks.0.attention", "blocks.0.mlp")
    units = units_of(build(config), "neuron", ())
    half = {layer: len(numbers) // 2 for layer, numbers in masks.columns(units).items()}
    model = build(config, half, {})
    assert [model.get_submodule(name).scale for name in branches] == [scale, scale]


@pytest.mark.parametrize("removed", [True, False])
def test_resume_takes_the_older_checkpoint(monkeypatch, capsys, tmp_path, trained, removed):
    """Where ckpt.pt is damaged, or was and is removed: after resuming both that are left can be read."""
    shutil.copytree(trained, tmp_path / "run")
    out = tmp_path / "run"
    before = (out / "ckpt.prev.pt").read_bytes()
    if removed:
        (out / "ckpt.pt").unlink()
    else:
        (out / "ckpt.pt").write_bytes(b"damaged")
    file = [] if removed else [str(out / "ckpt.prev.pt")]
    in_process(monkeypatch, "--steps", "4", "--save-every", "0", "--out", str(out), "--resume", *file)
    assert "after step 2" in capsys.readouterr().out
    assert [
        models.read_checkpoint(out / name)["progress"]["step"] for name in (train.LAST, train.BEFORE)
    ] == [4, 2]
    assert (out / "ckpt.prev.pt").read_bytes() == before


def test_resume_counts_on(monkeypatch, capsys, tmp_path, trained):
    """Tokens are those that were seen, whatever the batch; ten steps in a row may be of two runs."""
    rows = ["--batch-size", "16", "--steps", "5", "--resume", str(trained / "ckpt.pt")]
    in_process(monkeypatch, *rows, "--out", str(tmp_path / "more"))
    assert [entry["tokens"] for entry in read_log(tmp_path / "more")] == [
        3 * 8 * 32 + n * 16 * 32 for n in (1, 2)
    ]
    wild = "--lr 1e30 --grad-clip 0 --warmup 0 --save-every 1 --eval-every 0".split()
    out = ["--out", str(tmp_path / "wild")]
    in_process(monkeypatch, *wild, *out, "--steps", "8")  # the last seven of these are skipped
    capsys.readouterr()
    with pytest.raises(SystemExit):
        in_process(monkeypatch, *wild, *out, "--steps", "50", "--resume")
    assert "10 steps in a row, up to step 11" in capsys.readouterr().err
    assert read_log(tmp_path / "wild")[-1]["skipped"] == 10


def test_export_that_fails_leaves_nothing(monkeypatch, capsys, tmp_path, trained):
    def fail(*_):
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    for command, path in (("export", "weights"), ("export-hf", "llama")):
        with pytest.raises(SystemExit) as stop:
            run_main(monkeypatch, "model", command, trained / "ckpt.pt", tmp_path / "new" / path)
        assert stop.value.code == 2 and "no space left" in capsys.readouterr().err.splitlines()[-1]
        assert not any(each.is_file() and each.name != "config.json" for each in tmp_path.rglob("*"))


# ---- bad checkpoints


class Evil:
    """What would write a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "executed")


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def repacked(path, change, compression=zipfile.ZIP_STORED):
    """A checkpoint's bytes with a changed pickle in it, and the right checksums."""
    result = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(result, "w", compression) as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, change(content) if entry.filename.endswith("data.pkl") else content)
    return result.getvalue()


def foreign(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


BAD_CHECKPOINTS = {
    "truncated": lambda good, _: good[: len(good) // 2],
    "empty": lambda *_: b"",
    "text": lambda *_: b"step,loss\n1,2\n",
    "a byte": lambda good, _: flipped(good, len(good) // 2),
    "its first byte": lambda good, _: flipped(good, 0),
    "weights alone": lambda *_: foreign({"w": torch.zeros(3)}),
    "no dictionary": lambda *_: foreign([1, 2]),
    "a step before the first": lambda good, _: foreign(
        torch.load(io.BytesIO(good)) | {"progress": models.START | {"step": -1}}
    ),
    "no progress": lambda good, _: foreign(torch.load(io.BytesIO(good)) | {"progress": {"step": 1}}),
    "no data": lambda good, _: foreign(torch.load(io.BytesIO(good)) | {"flags": {"model": "gpt"}}),
    "half an optimizer": lambda good, _: foreign(
        torch.load(io.BytesIO(good)) | {"optimizer": {"head.weight": {"step": torch.tensor(1.0)}}}
    ),
    "moments of no shape": lambda good, _: foreign(
        torch.load(io.BytesIO(good))
        | {"optimizer": {n: {"exp_avg": torch.zeros(())} for n in torch.load(io.BytesIO(good))["optimizer"]}}
    ),
    "a later format": lambda good, _: foreign(torch.load(io.BytesIO(good)) | {"format": 2}),
    "another shape": lambda good, _: foreign(
        torch.load(io.BytesIO(good)) | {"model": {"head.weight": torch.zeros(2, 2)}}
    ),
    "a class": lambda _, path: foreign(Evil(path)),
    "a class among the rest": lambda good, path: foreign(torch.load(io.BytesIO(good)) | {"step": Evil(path)}),
}


@pytest.mark.parametrize("damage", [*BAD_CHECKPOINTS, "compressed", "missing"])
def test_bad_checkpoints_end_with_one_line(monkeypatch, capsys, tmp_path, trained, damage):
    path, good = tmp_path / "ckpt.pt", (trained / "ckpt.pt").read_bytes()
    if damage == "compressed":
        path.write_bytes(repacked(trained / "ckpt.pt", bytes, zipfile.ZIP_DEFLATED))
    elif damage != "missing":
        path.write_bytes(BAD_CHECKPOINTS[damage](good, tmp_path / "evil"))
    for command in ("train", "model"):
        with pytest.raises(SystemExit) as stop:
            if command == "train":
                in_process(monkeypatch, "--resume", str(path))
            else:
                run_main(monkeypatch, "model", "export", path, tmp_path / "out")
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(path) in line and len(line) < 400, line
    assert not (tmp_path / "evil").exists() and not (tmp_path / "out").exists()


BAD_RESUMES = [  # flags, what the one line must say
    ("--resume CKPT --width 64", ("--width 64", "32")),
    ("--resume CKPT --size 10m", ("--size 10m", "checkpoint")),
    ("--resume CKPT --context 64", ("--context 64", "32")),
    ("--resume CKPT --model vit", ("--model vit", "gpt")),
    ("--resume CKPT --data fineweb", ("--data fineweb", "python")),
    ("--resume CKPT --optimizer sgd", ("--optimizer sgd", "another optimizer")),
    ("--resume CKPT --steps 2", ("--steps 2", "has 3 already")),
    ("--resume CKPT --bench", ("--resume", "--bench")),
    ("--resume CKPT --eval-only --bench", ("--eval-only", "--bench")),
    ("--resume CKPT --steps 5 --out RUN/other", ("--out", "--overwrite")),
    ("--resume", ("--resume", "--out")),
    ("--eval-only", ("--eval-only", "--resume FILE")),
    ("--eval-only --resume --out EMPTY", ("--eval-only", "--resume FILE")),
]


@pytest.mark.parametrize("flags, says", BAD_RESUMES, ids=[bad[0] for bad in BAD_RESUMES])
def test_bad_resumes_end_with_one_line(monkeypatch, capsys, tmp_path, trained, flags, says):
    shutil.copytree(trained, tmp_path / "other")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    flags = flags.replace("CKPT", str(trained / "ckpt.pt")).replace("RUN", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, *flags.replace("EMPTY", str(tmp_path / "empty")).split(), tiny=())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in says), line
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}


def mutations(good, number, rng):
    """Copies of a file's bytes with what happens to files: cut off, bytes changed, blocks lost or doubled."""
    for _ in range(number):
        content, (a, b) = bytearray(good), np.sort(rng.integers(0, len(good), 2))
        match rng.integers(5):
            case 0:
                content = content[:a]
            case 1:
                content[a : a + 4] = rng.bytes(4)
            case 2:
                del content[a:b]
            case 3:
                content[a:a] = content[a:b]
            case 4:  # where headers and pickles have their numbers and names
                for place in rng.integers(0, min(len(good), 300), 3):
                    content[place] = rng.integers(256)
        yield bytes(content)


def read_mutated(folder, shard, batch_file, checkpoint, number):
    """How often each reader accepted a mutated file, and by how many bytes the memory grew meanwhile."""
    rng, path, accepted = np.random.default_rng(0), Path(folder) / "mutated", Counter()
    pickle_in = zipfile.ZipFile(checkpoint).read(
        next(n for n in zipfile.ZipFile(checkpoint).namelist() if n.endswith("data.pkl"))
    )
    packed = (repacked(checkpoint, lambda _, new=new: new) for new in mutations(pickle_in, number, rng))
    read_cifar = functools.partial(data.read_cifar, source=data.CIFAR["cifar10"])
    of_shard, of_cifar, of_checkpoint = (
        mutations(Path(file).read_bytes(), number, rng) for file in (shard, batch_file, checkpoint)
    )
    readers = [(data.read_shard, of_shard), (read_cifar, of_cifar)]
    readers += [(models.read_checkpoint, of_checkpoint), (models.read_checkpoint, packed)]
    models.read_checkpoint(checkpoint)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    huge_memo = b"\x80\x02}r" + (2**28).to_bytes(4, "little") + b"."
    for which, (read, contents) in enumerate(readers):
        for content in (huge_memo, *contents):
            path.write_bytes(content)
            try:
                read(path)
                accepted[which] += 1
            except ValueError as error:
                assert "\n" not in str(error) and str(path) in str(error), error
    return accepted, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_readers_survive_mutated_files(tmp_path, trained, small_cifar):
    """200 files for each reader, in a process of its own: a ValueError in one line or the content, in little
    memory, and no hang."""
    shard(tmp_path / "x_train_000001.bin", np.arange(3000) % 50257)
    files = [
        tmp_path / "x_train_000001.bin",
        Path(small_cifar[1], data.CIFAR["cifar10"].folder, "data_batch_1"),
        trained / "ckpt.pt",
    ]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        accepted, grown = pool.submit(read_mutated, str(tmp_path), *map(str, files), 200).result(timeout=300)
    assert accepted[2] < 30, "damaged archives were read"
    assert grown < 50e6


# ---- faults, with real processes

TRIALS = range(20 if "SLOW" in os.environ else 3)
RUN = [*TINY, "--mask", "forward", "--steps", "200", "--save-every", "20", "--eval-every", "50"]


class Launched:
    """torchrun, or python alone where n is 0, in the background, with its workers."""

    def __init__(self, tmp_path, n, *flags, torchrun_flags=(), program="train.py"):
        self.mark, self.said = f"{tmp_path}-{time.time()}", tmp_path / f"said-{time.time()}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
        command = [*command, *torchrun_flags] if n else [sys.executable]
        with self.said.open("w") as said:
            options = {"cwd": HERE, "env": clean_environment(MARK=self.mark), "stdout": said, "stderr": said}
            self.process = subprocess.Popen([*command, program, *flags], **options)

    def workers(self):
        """{rank: process id} of those that run now."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                pairs = dict(pair.split("=", 1) for pair in entry.read_text().split("\0") if "=" in pair)
                if pairs.get("MARK") == self.mark and "RANK" in pairs:
                    found[int(pairs["RANK"])] = int(entry.parent.name)
        return found

    def signal(self, rank, number):
        with contextlib.suppress(ProcessLookupError, KeyError):
            os.kill(self.workers()[rank], number)

    def wait_for(self, condition, seconds=90):
        end = time.time() + seconds
        while not condition():
            assert time.time() < end and self.process.poll() is None, self.text()
            time.sleep(0.002)

    def text(self):
        return self.said.read_text()

    def finish(self, seconds=120):
        """The exit code, when all is over; in any case nothing is left running."""
        try:
            code = self.process.wait(seconds)
            assert not self.workers(), "workers were left running"
            return code
        finally:
            self.process.kill()
            for process in self.workers().values():
                os.kill(process, signal.SIGKILL)


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="looks for processes in /proc"
)


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    run = Launched(out, 2, *RUN, "--out", str(out / "run"))
    assert run.finish() == 0, run.text()
    return out / "run"


@needs_proc
@pytest.mark.parametrize("trial", TRIALS)
def test_fault_a_worker_is_killed(tmp_path, undisturbed, trial):
    """At a random moment, before the first step or after; torchrun starts all of them again."""
    rng, out = np.random.default_rng([trial, 1]), tmp_path / "run"
    run = Launched(tmp_path, 2, *RUN, "--out", str(out), torchrun_flags=["--max-restarts", "3"])
    step, rank = int(rng.integers(-20, 200)), int(rng.integers(2))
    run.wait_for(lambda: len(run.workers()) == 2)
    if step < 0:
        time.sleep(rng.uniform(0, 4))
    else:
        run.wait_for(lambda: lines(out / "log.jsonl") >= step)
        time.sleep(rng.uniform(0, 0.02))
    run.signal(rank, signal.SIGKILL)
    assert run.finish() == 0, run.text()
    assert_same_checkpoint(out / "ckpt.pt", undisturbed / "ckpt.pt")
    assert read_log(out) == read_log(undisturbed)
    summaries = [json.loads((each / "summary.json").read_text()) for each in (out, undisturbed)]
    assert summaries[0]["final_val_loss"] == summaries[1]["final_val_loss"]


@needs_proc
@pytest.mark.parametrize("trial", TRIALS)
def test_fault_all_are_killed_while_a_checkpoint_is_written(tmp_path, trial):
    rng, out = np.random.default_rng([trial, 2]), tmp_path / "run"
    flags = [*TINY, "--workers", "1", "--steps", "10000", "--save-every", "1", "--eval-every", "0"]
    run = Launched(tmp_path, 0, *flags, "--width", "512", "--out", str(out))
    wait_until = rng.integers(1, 6)
    run.wait_for(lambda: lines(out / "log.jsonl") > wait_until and (out / "ckpt.pt.part").exists())
    time.sleep(rng.uniform(0, 0.06))
    run.process.kill()
    run.process.wait()
    left = [out / name for name in ("ckpt.pt", "ckpt.prev.pt") if (out / name).exists()]
    assert left
    steps = [models.read_checkpoint(path)["progress"]["step"] for path in left]  # neither is ever broken
    logged = lines(out / "log.jsonl")
    assert steps == list(range(steps[0], steps[0] - len(steps), -1)) and logged - 2 <= steps[0] <= logged
    args = argparse.Namespace(resume="", out=str(out))
    assert train.checkpoint_to_resume(args) == left[0]


@needs_proc
def test_fault_a_worker_stalls(tmp_path):
    """The others end after --timeout, with a line that names it."""
    run = Launched(tmp_path, 2, *TINY, "--steps", "100000", "--timeout", "3")
    try:
        run.wait_for(lambda: "3/100000" in run.text().replace("\r", "\n"))
        run.signal(1, signal.SIGSTOP)
        run.wait_for(lambda: "rank 1 has not answered in step" in run.text(), seconds=30)
    finally:
        run.signal(1, signal.SIGKILL)
        code = run.finish()
    assert code == 1 and run.text().count("has not answered") == 1
    assert 'train.py", line' not in run.text().split("Root Cause")[0]


@needs_proc
@pytest.mark.parametrize("whom", ["a worker", "torchrun"])
def test_fault_preemption(tmp_path, undisturbed, whom):
    """SIGINT to one worker, or SIGTERM to torchrun, which passes it on: all stop after one step."""
    out = tmp_path / "run"
    run = Launched(tmp_path, 2, *RUN, "--out", str(out))
    run.wait_for(lambda: lines(out / "log.jsonl") >= 30)
    if whom == "torchrun":
        run.process.terminate()
    else:
        run.signal(1, signal.SIGINT)
    assert run.finish() == (1 if whom == "torchrun" else 0), run.text()  # torchrun's own code
    assert "stopped by a signal after step" in run.text()
    last = read_log(out)[-1]["step"]
    assert 30 <= last < 200 and torch.load(out / "ckpt.pt", weights_only=True)["progress"]["step"] == last
    assert not (out / "summary.json").exists()
    if whom == "a worker":
        run = Launched(tmp_path, 2, *RUN, "--out", str(out), "--resume")
        assert run.finish() == 0, run.text()
        assert_same_checkpoint(out / "ckpt.pt", undisturbed / "ckpt.pt")
        assert read_log(out) == read_log(undisturbed)


def test_fault_the_disk_is_full(monkeypatch, capsys, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        with pytest.raises(SystemExit) as stop:
            in_process(monkeypatch, "--steps", "9", "--save-every", "3", "--width", "64", "--out", str(small))
        assert stop.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "step 6 could not be saved" in line and "MB are free" in line
        assert models.read_checkpoint(small / "ckpt.pt")["progress"]["step"] == 3
        assert sorted(path.name for path in small.iterdir()) == ["ckpt.pt", "log.jsonl"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def a_step_that_is_not_finite(kind, bad):
    """Rank 1's loss is infinite in the second of three steps: nobody applies it, and the third is as if it
    had not been."""

    def train_with(losses):
        engine = make_any(kind, SMALL, torch.float64)
        for step, scale in losses:
            rank = dist.get_rank()
            args = argparse.Namespace(micro_batches=1, grad_clip=1.0, workers=2, seed=0)
            made = (
                engine.model.register_forward_hook
                if kind != "sdp"
                else engine.workers[rank].model.register_forward_hook
            )
            hook = made(lambda module, inputs, loss: loss * (scale if rank == 1 else 1))
            norm, loss, _ = train.update(engine, {rank: batch(step, rank)}, args, step, 1e-2)
            hook.remove()
            assert np.isfinite(norm + loss) == (scale == 1)
        return engine.state()

    found, expected = train_with([(0, 1), (1, bad), (2, 1)]), train_with([(0, 1), (2, 1)])
    if dist.get_rank() == 0:
        assert_close(found[0], expected[0], 0)
        for name, of in expected[1].items():
            assert_close(found[1][name], of, 0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("kind", engines)
def test_fault_a_step_that_is_not_finite(in_processes, kind, bad):
    in_processes(2, a_step_that_is_not_finite, kind, bad)


def test_fault_ten_such_steps_end_the_run(monkeypatch, capsys, tmp_path):
    flags = "--steps 50 --lr 1e30 --grad-clip 0 --warmup 0 --save-every 1 --eval-every 5".split()
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, *flags, "--out", str(tmp_path))
    assert stop.value.code == 2 and "10 steps in a row" in capsys.readouterr().err.splitlines()[-1]
    log = read_log(tmp_path)
    assert [entry.get("skipped") for entry in log] == [None, *range(1, 11)]
    assert log[-1]["loss"] is None and "NaN" not in (tmp_path / "log.jsonl").read_text()
    saved = models.read_checkpoint(tmp_path / "ckpt.pt")
    assert saved["progress"]["step"] == 10 and saved["progress"]["skipped"] == 9
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_fault_the_network(monkeypatch, capsys):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for port, interface, says in (
            (taken.getsockname()[1], "lo", "MASTER_PORT"),
            (free_port(), "no0", "GLOO_SOCKET_IFNAME"),
        ):
            monkeypatch.setenv("MASTER_PORT", str(port))
            monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
            args = train.parse([*TINY, "--timeout", "5"])[1]
            monkeypatch.setenv("RANK", "0")
            monkeypatch.setenv("WORLD_SIZE", "1")
            with pytest.raises(SystemExit) as stop:
                train.start(args, train.make_parser())
            (line,) = capsys.readouterr().err.splitlines()
            assert stop.value.code == 2 and says in line and "set" in line, line


def what_differs(name):
    said = []
    facts = {"--lr": 0.1, "torch's version": "2.13.0", "the data's checksum": 1, "--out": None}
    if dist.get_rank() == 1:
        facts[name] = 7
    try:
        train.agree(facts)
    except train.Stop as stop:
        said.append(str(stop))
    return said


@pytest.mark.parametrize("name", ["--lr", "torch's version", "the data's checksum"])
def test_fault_machines_that_differ(in_processes, name):
    for said in in_processes(2, what_differs, name):
        assert len(said) == 1 and name in said[0] and "7 on rank 1" in said[0]


@pytest.mark.parametrize("late", [None, 0, 2])
def test_fault_restarts_do_not_find_the_past(late):
    """Three processes that meet at a store in which those of an earlier start have left their words."""
    store = dist.HashStore()

    def arrive(rank, start):
        time.sleep(0.2 if start and rank == late else 0)
        part = train.without_the_past(store, rank, 3)
        part.set(f"start of {rank}", str(start))
        return [int(part.get(f"start of {each}")) for each in range(3)]

    for start in range(3):
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(arrive, range(3), [start] * 3)) == [[start] * 3] * 3


# ---- bad input, all programs

BAD_COMMANDS = [  # what the one line must say
    ("masks.py --workers 0", ("--workers", "at least 1")),
    ("masks.py --workers x", ("--workers", "whole number")),
    ("masks.py --count 0", ("--count", "at least 1")),
    ("masks.py --coverage 2", ("--coverage 2", "at most 1")),
    ("masks.py --coverage 0.01", ("--coverage 0.01", "0.0625")),
    ("masks.py --seed -1", ("--seed", "at least 0")),
    ("masks.py --assign best", ("--assign", "cyclic")),
    ("masks.py --layers 3", ("--layers",)),
    ("masks.py --workers 8 --count 2 --coverage 0.125", ("--coverage", "fewer --workers")),
    ("data.py", ("cifar10", "fineweb")),
    ("data.py mnist", ("mnist", "cifar10")),
    ("data.py cifar10 --data-dir DIR --data-url nonsense", ("nonsense", "--data-url")),
    ("data.py cifar10 --data-dir /dev/null/x --data-url nonsense", ("--data-dir /dev/null/x",)),
    ("data.py cifar100 --size 32", ("--size",)),
    ("data.py imagenet", ("--src",)),
    ("data.py imagenet --src /nowhere --out DIR", ("--src /nowhere", "train")),
    ("data.py imagenet --src DIR --size 3", ("--size", "at least 16")),
    ("data.py imagenet --src DIR --size big", ("--size", "big")),
    ("data.py fineweb --shards 0", ("--shards", "at least 1")),
    ("data.py fineweb --shards 104", ("--shards 104", "103")),
    ("data.py fineweb --data-dir /dev/null/x", ("--data-dir /dev/null/x",)),
    ("data.py fineweb --data-dir DIR --data-url nonsense", ("nonsense", "try again")),
    ("model.py", ("command",)),
    ("model.py distil CKPT", ("distil", "sample")),
    ("model.py sample /nowhere", ("/nowhere", "no such file")),
    ("model.py sample CKPT --prompt", ("--prompt",)),
    ("model.py sample CKPT --prompt=", ("--prompt", "empty")),
    ("model.py sample CKPT --tokens 0", ("--tokens", "at least 1")),
    ("model.py sample CKPT --temperature nan", ("--temperature", "at least 0")),
    ("model.py sample CKPT --seed x", ("--seed", "whole number")),
    ("model.py export CKPT CKPT", ("ckpt.pt", "another name")),
    ("model.py export CKPT /dev/null/x/y", ("/dev/null/x/y", "cannot be written")),
    ("model.py export-hf CKPT /dev/null/x", ("/dev/null/x", "cannot be written")),
    ("model.py export CKPT", ("file",)),
]


@pytest.mark.parametrize("command, says", BAD_COMMANDS, ids=[bad[0] for bad in BAD_COMMANDS])
def test_bad_commands_end_with_one_line(monkeypatch, capsys, tmp_path, trained, command, says):
    before = (trained / "ckpt.pt").read_bytes()
    program, *arguments = (
        command.replace("CKPT", str(trained / "ckpt.pt")).replace("DIR", str(tmp_path)).split()
    )
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, program.removesuffix(".py"), *arguments)
    assert stop.value.code == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "B/s" not in each]
    assert all(word in line for word in says), line
    assert not list(tmp_path.iterdir()) and (trained / "ckpt.pt").read_bytes() == before


def test_every_flag_of_train_is_tried():
    """Each flag that takes a value has a row among the bad ones."""
    flags = {
        flag for action in train.make_parser()._actions for flag in action.option_strings if action.nargs != 0
    }
    tried = " ".join(row[0] for row in [*BAD, *BAD_RESUMES]).split()
    assert flags - set(tried) - {"-h", "--help"} == set()


COMMANDS = [  # processes under torchrun, or 0 for python alone; what follows; what is said
    (0, "masks.py --coverage 0", "--coverage 0"),
    (0, "masks.py --workers none", "--workers"),
    (0, "masks.py --seed", "--seed"),
    (0, "train.py --resume /nowhere", "/nowhere"),
    (0, "data.py fineweb --shards 104", "--shards 104"),
    (0, "model.py sample /nowhere", "/nowhere"),
    (0, "masks.py --count 0", "--count"),
    (2, "train.py --workers 3", "--workers 3"),
]  # fmt: skip


@needs_proc
@pytest.mark.parametrize("n, command, says", COMMANDS, ids=[f"{row[0]} {row[1]}" for row in COMMANDS])
def test_bad_input_to_real_commands(tmp_path, n, command, says):
    """One line, soon, and nothing is left running."""
    run = Launched(tmp_path, n, *command.split()[1:], program=command.split()[0])
    assert run.finish(seconds=30) == (1 if n else 2)  # torchrun's own code
    ours = run.text().split("Setting OMP_NUM_THREADS")[-1]  # torchrun warns about that first
    ours = [line for line in ours.split("torch/distributed/elastic")[0].splitlines() if "error: " in line]
    assert len(ours) == 1 and says in ours[0]
    if n == 0:
        assert len(run.text().splitlines()) == 1
    assert not any('.py", line' in line and str(HERE) in line for line in run.text().splitlines())


def plans(seed, number):
    """How many of so many random plans could be made: each deals out exactly, evenly, and in the same way
    again, or is refused in a line."""
    rng, made = np.random.default_rng([seed, 9]), 0
    for trial in range(number):
        workers, kinds = int(rng.integers(1, 17)), int(rng.integers(1, 4))
        costs = rng.integers(1, 1000, kinds).tolist()  # units of a kind cost the same
        layers = range(rng.integers(kinds, 25))
        units = [Unit(f"blocks.{u}", f"kind {u % kinds}", costs[u % kinds]) for u in layers]
        coverage, deal = float(rng.uniform(0.01, 1)), int(rng.integers(1000))
        try:
            holders = holders_per_unit(coverage, workers)
            mask = assign(units, workers, holders, deal)
        except ValueError as error:
            assert "--coverage" in str(error) and "\n" not in str(error)
            continue
        made += 1
        assert holders == int(coverage * workers + 0.5)
        assert mask.shape == (workers, len(units)) and (mask.sum(axis=0) == holders).all()
        for kind in range(kinds):
            held = mask[:, kind::kinds].sum(axis=1)
            assert held.max() - held.min() <= 1 and held.min() > 0
        if trial % 5 == 0:
            assert (mask == assign(units, workers, holders, deal)).all()
    return made


def test_masks_of_any_kind():
    """500 random plans."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert sum(pool.map(plans, range(2), [250] * 2)) > 250
