"""Cut a subnetwork out of a trained network: a random share of its units, with their parameters. Training
with changing masks trains every such part, as in LayerDrop (https://arxiv.org/abs/1909.11556)."""

import math
from contextlib import suppress

import numpy as np
import torch

from masks import UserError, columns
from model import build, units_of
from support.presets import shared_blocks


def check_coverage(coverage):
    """A coverage, a number or its text, as a float in (0, 1]. Raises UserError where it is no such."""
    with suppress(ValueError):
        if 0 < float(coverage) <= 1:
            return float(coverage)
    raise UserError(f"--coverage {coverage}: must be above 0 and at most 1, such as 0.5")


def units_to_cut(args, saved):
    """The units of a checkpoint's model that --units and --keep name; without --coverage []. By default
    those that it was trained with, or, without masks, all heads and groups. Raises UserError."""
    if args.coverage is None and (args.units or args.keep):
        raise UserError("--units, --keep: need --coverage; add it, such as --coverage 0.5")
    if args.coverage is None:
        return []
    masked = saved["flags"]["mask"] != "none"
    trained_with = saved["flags"] if masked else {"units": "neuron", "keep": "none"}
    with torch.device("meta"):
        whole = build(saved["config"])
        shared = shared_blocks(args.keep or trained_with["keep"], whole)
        return units_of(whole, args.units or trained_with["units"], shared)


def choose(units, coverage, seed):
    """A random part of the units, bool [units]: of a kind's n units floor(C n + 1/2), and at least one."""
    rng, held = np.random.default_rng(seed), np.zeros(len(units), dtype=bool)
    for kind in dict.fromkeys(unit.kind for unit in units):  # in their order, unlike a set
        numbers = [u for u, unit in enumerate(units) if unit.kind == kind]
        count = max(1, math.floor(coverage * len(numbers) + 0.5))
        held[rng.choice(numbers, count, replace=False)] = True
    return held


def cut(model, units, held):
    """The subnetwork of a whole model that has only the units set in `held`, bool [units], ready to be
    evaluated. What is not cut shares memory with the whole model. Batch norms have no statistics: the
    whole model's do not fit, see support.evaluation.estimate_statistics."""
    layers = columns(units)
    with torch.device("meta"):
        part = build(model.config, {layer: (int(held[own].sum()), 0) for layer, own in layers.items()})
    values = {name: model.get_parameter(name).detach() for name, _ in part.named_parameters()}
    for layer, own in layers.items():
        for name in (name for name in values if name.startswith(f"{layer}.")):
            by_unit = values[name].unflatten(0, (len(own), -1))  # (units, rows of a unit, ...)
            values[name] = by_unit[torch.from_numpy(held[own])].flatten(0, 1)
    part.load_state_dict(values, assign=True)
    return part.eval().requires_grad_(False)
