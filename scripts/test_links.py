"""The formulas of links.py against counts value by value, in dealt masks and in rings; and what it prints."""

from functools import cache

import numpy as np
import pytest

from masks import Unit, assign, holders_per_unit, roles
from scripts import links
from scripts.links import SCHEMES, computing_seconds, held_share, sent_by_machine
from support.presets import SIZES
from support.processes import HERE

LAYOUTS = [(2, 2), (2, 4), (4, 2)]  # (machines, GPUs of each)
SHARED = 5  # as many units' worth of values are shared
UNITS = [Unit("unit", "unit", cost=1)] * 12
TINY = "--machines 2 --gpus 4 --size tiny --vocabulary 256".split()


@cache
def dealt(workers, coverage):
    """Many masks. Mask 0 is left out, since the search for its gap takes long."""
    return [assign(UNITS, workers, holders_per_unit(coverage, workers), mask_number=n) for n in range(1, 61)]


def count(mode, mask, machines, two_levels):
    """Bytes that a machine sends, the mean over machines: each unit is a value of two bytes a slice."""
    workers, values = len(mask), 0
    for role in roles(mode, mask):  # who trains, then who reads
        holders = np.column_stack([role, np.ones((workers, SHARED), bool)]).reshape(
            machines, -1, len(UNITS) + SHARED
        )
        copies = holders.any(axis=1) if two_levels else holders.sum(axis=1)  # [machines, units]
        for owned in range(workers):  # slices, one a process
            owner = owned % machines if two_levels else owned * machines // workers  # its machine
            values += copies.sum() - copies[owner].sum()
    return 2 * values / machines


def predicted(scheme, coverage, machines, gpus):
    units = len(UNITS) + SHARED
    return sent_by_machine(scheme, 2 * units * machines * gpus, SHARED / units, coverage, machines, gpus)


@pytest.mark.parametrize("coverage", [0.25, 0.5, 0.6, 1])
@pytest.mark.parametrize("machines, gpus", LAYOUTS)
@pytest.mark.parametrize("mode", ["none", "backward", "forward"])
def test_what_sdp_sends(mode, machines, gpus, coverage):
    """Flat and by machine to the byte, for each mask; in two levels the mean over masks."""
    masks, among_machines = dealt(machines * gpus, coverage), holders_per_unit(coverage, machines)
    for mask in masks[:2]:
        found = count(mode, mask, machines, two_levels=False)
        assert found == pytest.approx(predicted(f"{mode} flat", coverage, machines, gpus))
    found = np.mean([count(mode, mask, machines, two_levels=True) for mask in masks])
    assert found == pytest.approx(predicted(f"{mode} two levels", coverage, machines, gpus), rel=0.02)
    if mode != "none":
        mask = assign(UNITS, machines, among_machines, mask_number=1).repeat(gpus, axis=0)
        found = count(mode, mask, machines, two_levels=True)
        assert found == pytest.approx(predicted(f"{mode} by machine", coverage, machines, gpus))


@pytest.mark.parametrize("workers, together", [(4, 2), (8, 2), (8, 4), (8, 8), (8, 1)])
def test_held_by_any(workers, together):
    """Workers from 0 on are as good as any others, since a deal has no order among them."""
    for coverage in (0.25, 0.5):
        found = np.mean([mask[:together].any(axis=0).mean() for mask in dealt(workers, coverage)])
        assert held_share(0, coverage, workers, together) == pytest.approx(found, rel=0.05)
        assert held_share(0.3, coverage, workers, together) == pytest.approx(0.3 + 0.7 * found, rel=0.05)
    assert held_share(0, 0.3, 20) == pytest.approx(6 / 20)
    assert held_share(0, 0.3, 4096, 8) == pytest.approx(1 - 0.7**8, rel=1e-3)  # the limit for large N


def ring(places, values, rounds):
    """Bytes that a machine sends where `values` of two bytes go round a ring so many times, less one step
    each time. places: the machine of each member."""
    crossing = 0
    for _ in range(rounds * (len(places) - 1)):
        for member, machine in enumerate(places):
            crossing += (machine != places[(member + 1) % len(places)]) * values / len(places)
    return 2 * crossing / (max(places) + 1)


@pytest.mark.parametrize("machines, gpus", [*LAYOUTS, (4, 1), (16, 8)])
def test_what_rings_send(machines, gpus):
    """Of the dense baselines, step by step."""
    of_sizes, places = (2e6, 0.1, 0.5, machines, gpus), np.repeat(range(machines), gpus).tolist()
    assert sent_by_machine("DDP", *of_sizes) == pytest.approx(ring(places, 1e6, rounds=2))
    assert sent_by_machine("FSDP2", *of_sizes) == pytest.approx(ring(places, 1e6, rounds=3))
    of_one = ring(list(range(machines)), 1e6 / gpus, rounds=2)  # a GPU's shard, once on each machine
    assert sent_by_machine("HSDP", *of_sizes) == pytest.approx(gpus * of_one)
    assert sent_by_machine("none two levels", *of_sizes) == sent_by_machine("HSDP", *of_sizes)


def test_many_machines():
    """A GPU of HSDP sends 1/G of what a process of one DDP ring does; a machine sends as much in both."""
    of_sizes = 2e6, 0.1, 0.5, 4096, 8
    of_process = 2 * 2e6 * (4096 * 8 - 1) / (4096 * 8)
    assert sent_by_machine("HSDP", *of_sizes) / 8 == pytest.approx(of_process / 8, rel=1e-3)
    assert sent_by_machine("HSDP", *of_sizes) == pytest.approx(sent_by_machine("DDP", *of_sizes), rel=1e-3)
    for mode in ("backward", "forward"):  # one GPU a machine: all exchanges are the same
        exchanges = [f"{mode} {each}" for each in ("flat", "two levels", "by machine")]
        assert np.ptp([sent_by_machine(each, 2e6, 0.1, 0.5, 16, 1) for each in exchanges]) < 1e-6


# ---- what it prints


def test_table(capsys):
    """Of the tiny GPT on bytes, where 5 of 8 workers, or 1 of 2 machines, hold a block."""
    links.main([*TINY, *"--coverage 0.625 --gbit 25,400 --tokens 1000 --tflops 100".split()])
    first, titles, *lines = capsys.readouterr().out.splitlines()
    rows, shape = lines[: len(SCHEMES)], SIZES["gpt"]["tiny"]
    width = shape["width"]
    shared = 2 * 256 * width + width  # embedding, head and its norm
    params = shared + shape["layers"] * (4 * width**2 + 3 * width * shape["hidden"] + 2 * width)
    of_worker, by_machine = ((shared + share * (params - shared)) / params for share in (5 / 8, 1 / 2))
    assert first.startswith(f"P = {params:,}, S = {shared / params:.3f}, H = {of_worker:.3f} (by machine")
    assert first.endswith(f" {by_machine:.3f}), U = 1.000")  # 5 workers do not fit on the other machine
    assert titles.split()[0] == "scheme" and titles.count("ratio") == 2
    assert [row[:20].strip() for row in rows] == SCHEMES
    for scheme, row in zip(SCHEMES, rows):
        sent = sent_by_machine(scheme, 2 * params, shared / params, 0.625, 2, 4)
        held = by_machine if "by machine" in scheme else of_worker
        computing = 6 * params * 1000 / 1e14
        computing *= {"forward": held, "backward": (2 + held) / 3}.get(scheme.split()[0], 1)
        expected = [sent / 1e6, sent / 4e6, computing]
        for rate in (25e9, 400e9):
            expected += [8 * sent / rate, 8 * sent / rate / computing]
        assert [float(cell) for cell in row[20:].split()] == pytest.approx(expected, rel=0.01)
        assert computing_seconds(scheme, params, held, 1000, 100) == pytest.approx(computing)
    notes = " ".join(lines[len(SCHEMES) :])
    assert "formulas, not measurements" in notes and "do not overlap" in notes
    assert "1,000 tokens, at 100 TFLOP/s" in notes


def test_the_table_of_the_defaults_stands_in_the_results(capsys):
    links.main([])
    lines = capsys.readouterr().out.splitlines()[: 2 + len(SCHEMES)]
    assert "\n".join(lines) in (HERE / "results" / "log.md").read_text()


# ---- bad input


def error_of(capsys, *arguments):
    """The one line with which the command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        links.main(arguments)
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert stop.value.code == 2 and ": error: " in line and not out
    return line


BAD = ["--machines 1", "--machines x", "--gpus 0", "--size 7b", "--vocabulary 0", "--coverage 0"]
BAD += ["--coverage 1.5", "--coverage nan", "--coverage 0.2", "--gbit 0", "--gbit 25,,100", "--gbit fast"]
BAD += ["--tflops 0", "--tflops inf", "--tokens 0", "--mask none"]


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags_end_with_one_line(capsys, flags):
    """A coverage of 0.2 gives a unit no machine of 2."""
    assert flags.split()[0] in error_of(capsys, *TINY, *flags.split())
