"""Tests of stall.py, and by arithmetic: with even masks and N / p exchanges under way no worker waits."""

from argparse import Namespace

import numpy as np
import pytest

from masks import Unit, assign, roles
from scripts import stall
from sdp import Layout

pytest_plugins = ["support.testing", "support.processes"]


def turn(trains, reads, pulls_at_once, pushes_at_once):
    """When the last worker ends its turn, if exchanges take no time. trains, reads: bool [workers, layers]. A
    layer takes 1 forward, 1 for the gradient of its input, and 1 for those of its weights."""
    workers, layers = trains.shape
    now, began = np.zeros(workers), np.zeros((layers, workers))  # began: the pull of a layer, by worker
    for layer in range(layers):
        now = np.maximum(now, began[layer].max())  # a pull ends when the last worker has begun it
        if layer + pulls_at_once < layers:
            began[layer + pulls_at_once] = now
        now = now + reads[:, layer]
    ends, uncounted = [], np.zeros(workers)  # of the pushes; what a worker computes before its next own push
    for layer in reversed(range(layers)):
        uncounted += 1.0 * reads[:, layer] + trains[:, layer]
        now = now + uncounted * trains[:, layer]  # who lacks a layer pushes at once
        uncounted *= ~trains[:, layer]
        if len(ends) >= pushes_at_once:
            now = np.maximum(now, ends[-pushes_at_once])
        ends.append(now.max())
    return (now + uncounted).max()


@pytest.mark.parametrize("workers, holders", [(4, 2), (8, 4), (8, 2), (4, 1)])
@pytest.mark.parametrize("layers", [12, 24])
def test_nobody_waits(workers, holders, layers):
    """A turn takes as long as the worker with most computes; with one exchange at a time it takes longer."""
    units = [Unit(f"blocks.{number}", "blocks", cost=1) for number in range(layers)]
    mask = assign(units, workers, holders)
    for mode, share in (("backward", (2 + holders / workers) / 3), ("forward", holders / workers)):
        trains, reads = roles(mode, mask)
        own = (2 * reads.sum(axis=1) + trains.sum(axis=1)).max()
        assert own == pytest.approx(3 * layers * share)  # of dense: all workers have equally much
        at_once = [Layout.exchanges_at_once(None, has) for has in (reads, trains)]
        assert turn(trains, reads, *at_once) <= (1 if 2 * holders == workers else 1.1) * own
        if mode == "backward" or 2 * holders < workers:
            assert turn(trains, reads, 1, 1) >= 1.15 * own


def few_blocks():
    args = Namespace(workers=2, layers=2, coverage=0.5, milliseconds=1, steps=1)
    return [(mode, level, own) for mode, level, own, ratios in stall.measure(args) if min(ratios) > 0]


def test_stall(in_processes):
    """Own computing, in parts of dense, is by the formulas of the README; times decide nothing here."""
    for found in in_processes(2, few_blocks):
        assert [scheme[:2] for scheme in found] == stall.SCHEMES
        backward, _, forward, _ = (own for *_, own in found)
        assert backward == pytest.approx(2.5 / 3, abs=0.01) and forward == pytest.approx(0.5, abs=0.01)
