"""Who holds what: the masks of Subnetwork Data Parallelism (https://arxiv.org/abs/2507.09029).

A *unit* is the smallest thing that a mask switches: a residual block, an attention head, a group of hidden
neurons. A mask is a boolean array [workers, units]. Every unit has the same number of *holders* among the
workers, and all workers hold about the same amount.

    python masks.py --workers 8 --count 12 --coverage 0.375

Needs only numpy. Read next: model.py, whose layers can be built from any of their units.
"""

import argparse
import math
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

MODES = ("none", "backward", "forward")  # what --mask can be
EVEN_ENOUGH = 1.1  # the fullest worker may hold this many times the mean


class UserError(Exception):
    """A problem that the user can solve: one line with the flag or file, and what would work."""


class Unit(NamedTuple):
    """What a mask switches as one. All units of a layer have the same shape and cost."""

    layer: str  # the module whose parameters are cut into units, such as "blocks.3" or "blocks.3.mlp"
    kind: str  # units of one kind are dealt out evenly among the workers
    cost: int  # parameters
    flops: int = 0  # of a forward pass over one row of a batch


def holders_per_unit(coverage, workers):
    """p = floor(C N + 1/2), the number of workers that hold each unit, for a coverage C in (0, 1]. Not
    round(), which rounds halves to even: round(0.5) is 0. Raises UserError where p would be 0."""
    if not 0 < coverage <= 1:
        raise UserError(f"--coverage {coverage:g}: must be above 0 and at most 1, such as 0.5")
    holders = math.floor(coverage * workers + 0.5)
    if holders == 0:
        raise UserError(f"--coverage {coverage:g}: no holders below {smallest_coverage(1, workers):g}")
    return holders


def smallest_coverage(holders, workers):
    """The lowest coverage with p = `holders`, rounded up to six digits so that it works as printed."""
    return math.ceil((holders - 0.5) / workers * 1e6) / 1e6


def schedule(step, mode, steps, resample=0, finish=0.0):
    """(mask_number, mode) of a step, counted from 1. They follow from the step alone, so a run can resume.
    Masks change every `resample` steps (0: never). The last fraction `finish` of `steps` is backward."""
    mask_number = (step - 1) // resample if resample else 0
    finishing = step > steps - round(finish * steps)
    return mask_number, ("backward" if finishing else mode)


def assign(units, workers, holders, seed=0, mask_number=0, capacity=None):
    """Deal the units out: a mask, bool [workers, units], the same on every machine for the same arguments.
    Every column sums to `holders`. Rows follow the capacity, whole numbers (default: all equal), within one
    unit of each kind of equal costs. The graph of the workers that share a unit is connected where it can be:
    with holders >= 2 and len(units) * (holders - 1) >= workers - 1. Only mask 0 is searched for a wide gap:
    where masks change, workers mix anyway. Raises UserError where a worker would hold none of a kind."""
    capacity = np.array(capacity or [1] * workers)
    kind, fewest = min(Counter(unit.kind for unit in units).items(), key=lambda item: item[1])
    if holders * capacity.max() > capacity.sum():
        raise UserError(f"--capacity: no number may exceed 1/{holders} of the sum; or lower --coverage")
    if fewest * holders * capacity.min() < capacity.sum() and capacity.min() < capacity.max():
        raise UserError(f"--capacity: the smallest worker would have no unit ({kind}); make it larger")
    if fewest * holders < workers:
        enough = smallest_coverage(math.ceil(workers / fewest), workers)
        raise UserError(f"--coverage: too few units ({kind}) for {workers} workers; use {enough:g} or more")
    rng = np.random.default_rng([seed, workers, holders, mask_number])
    tries = min(1000, 1_000_000 // workers**2) if mask_number == 0 else 0  # one gap takes cubic time
    attempts = []
    for _ in range(4):  # where units of a kind differ in cost, one search can end with an uneven load
        mask = deal(units, capacity, holders, rng)
        if 1 < holders < workers:
            mix(mask, units, capacity, rng, tries)
        attempts.append(mask)
        if imbalance(mask @ costs(units) / capacity) <= EVEN_ENOUGH:
            break
    return min(attempts, key=lambda mask: imbalance(mask @ costs(units) / capacity))


def deal(units, capacity, holders, rng):
    """One random deal, bool [workers, units]. Units come in random order, the costly ones first. Each goes
    to the `holders` workers furthest below their share of its kind, or of all; ties go by chance."""
    mask = np.zeros((len(capacity), len(units)), dtype=bool)
    loads = {unit.kind: np.zeros(len(capacity)) for unit in units}
    shares = {unit.kind: np.zeros(len(capacity)) for unit in units}  # of what has been dealt
    for u in sorted(rng.permutation(len(units)), key=lambda u: -units[u].cost):
        kind, cost = units[u].kind, units[u].cost
        shares[kind] += cost * holders * capacity / capacity.sum()
        above_in_kind, above = loads[kind] - shares[kind], sum(loads.values()) - sum(shares.values())
        order = np.lexsort((rng.random(len(capacity)), above, above_in_kind))  # the last key counts first
        mask[order[:holders], u] = True
        loads[kind][order[:holders]] += cost
    return mask


def mix(mask, units, capacity, rng, tries):
    """Exchange units between random pairs of workers, in place, and undo what makes the mask worse. Make
    `tries` attempts at a wide gap and an even load, and more until workers are connected, if possible."""
    workers, holders = len(mask), mask[:, 0].sum()
    connectable = len(units) * (holders - 1) >= workers - 1  # a unit adds at most holders - 1 edges

    def quality():
        groups = number_of_groups(mask)
        excess = max(0, imbalance(mask @ costs(units) / capacity) - EVEN_ENOUGH)
        return -groups, (spectral_gap(mask) - 4 * excess if groups == 1 else 0)

    best = quality()
    while tries > 0 or (connectable and best[0] < -1):
        tries -= 1
        i, j = rng.choice(workers, 2, replace=False)
        flipped = exchange(mask, units, i, j, rng)
        if flipped is not None:
            new = quality()
            if new < best:
                mask[flipped] ^= True  # undo it
            best = max(best, new)


def exchange(mask, units, i, j, rng):
    """Worker i gives worker j a unit and takes another of its kind, in place. Where units of the kind
    differ in cost, it sometimes takes nothing. Columns keep their sums. Returns the index of the flipped
    entries, or None where the units drawn do not allow it."""
    given = rng.choice(np.flatnonzero(mask[i]))
    of_kind = np.array([unit.kind == units[given].kind for unit in units])
    offers = np.flatnonzero(mask[j] & ~mask[i] & of_kind)
    if mask[j, given] or not len(offers):
        return None
    moved = [given, rng.choice(offers)]
    if len(set(costs(units)[of_kind])) > 1 and rng.random() < 0.3 and mask[i, of_kind].sum() > 1:
        moved = [given]
    flipped = np.ix_([i, j], moved)
    mask[flipped] ^= True
    return flipped


def spread(mask, units):
    """The mask with equal columns far apart, if all are alike: layers in a row use a link both ways."""
    if len({(unit.kind, unit.cost) for unit in units}) > 1:
        return mask
    repeats = [(mask[:, :u] == mask[:, [u]]).all(axis=0).sum() for u in range(len(units))]
    return mask[:, np.argsort(repeats, kind="stable")]


def costs(units):
    return np.array([unit.cost for unit in units])


def imbalance(load):
    """The load of the fullest worker divided by the mean. load: [workers], in parameters or FLOPs."""
    return load.max() / load.mean()


def number_of_groups(mask):
    """How many groups of workers there are that share no unit with each other."""
    reach = np.arange(len(mask))  # the lowest-numbered worker that each worker reaches over shared units
    while True:
        by_unit = np.where(mask, reach[:, None], len(mask)).min(axis=0)  # [units]
        further = np.where(mask, by_unit, len(mask)).min(axis=1)  # [workers]
        if (further == reach).all():
            return len(np.unique(reach))
        reach = further


def spectral_gap(mask):
    """How well the workers mix: 1 - |second largest eigenvalue| of the worker graph's random walk.
    The walk goes from a worker to a random unit that it holds, then to a random holder of that unit. Its
    [N, N] transition matrix T = D_w^-1 M D_u^-1 M^T is similar to A A^T with A = D_w^-1/2 M D_u^-1/2. So
    its eigenvalues are real and in [0, 1]. Full masks give 1, and groups that share no unit give 0."""
    if len(mask) == 1:
        return 1.0
    of_worker, of_unit = mask.sum(axis=1), mask.sum(axis=0)
    a = mask / np.sqrt(of_worker[:, None] * of_unit)  # [workers, units]
    eigenvalues = np.linalg.eigvalsh(a @ a.T)  # ascending
    return abs(round(float(1 - eigenvalues[-2]), 9))  # without rounding noise, and no -0.0


def roles(mode, mask):
    """The one table behind all schemes: (trains, reads), each bool [workers, units]. A worker reads a unit
    that it needs in its forward pass, and trains a unit whose gradient it computes."""
    everything = np.ones_like(mask)
    return {
        "none": (everything, everything),  # plain data parallelism
        "backward": (mask, everything),  # a whole forward pass, gradients of held units
        "forward": (mask, mask),  # units that are not held do not exist here
    }[mode]


def columns(units):
    """{layer: the numbers of its units, which are columns of a mask}, in the order of the layers."""
    numbers = defaultdict(list)
    for number, unit in enumerate(units):
        numbers[unit.layer].append(number)
    return numbers


def picture(mask, units, machines=1, width=120):
    """The mask as text, at most `width` wide: a row for each layer, a column for each worker. A square is
    a unit, full where it is held. Where squares do not fit, numbers of held units take their place."""
    layers = columns(units)
    squares_fit = len(mask) * max(len(numbers) for numbers in layers.values()) <= width - 40
    table = {"worker": range(len(mask))}
    if machines > 1:
        table["machine"] = [worker * machines // len(mask) for worker in table["worker"]]
    for layer, numbers in layers.items():
        squares = ["".join(row) for row in np.where(mask[:, numbers], "█", "·")]
        table[layer] = squares if squares_fit else mask[:, numbers].sum(axis=1)
    table["units"] = mask.sum(axis=1)
    table["parameters"] = mask @ costs(units)
    margin = max(len(title) for title in table) + 2
    cell = max(len(str(entry)) for row in table.values() for entry in row) + 1
    lines = []
    for title, row in table.items():
        line = title.ljust(margin) + "".join(str(entry).ljust(cell) for entry in row)
        lines.append(line.rstrip() if len(line) <= width else f"{line[: width - 4]} ...")
    return "\n".join(lines)


def describe(mask, units, asked, machines=1):
    """The picture, the coverage that was asked and given, how even the load is, and the spectral gap."""
    holders = " or ".join(str(number) for number in np.unique(mask.sum(axis=0)))
    given = f"{mask.mean():g} ({holders} of {len(mask)} workers hold each unit)"
    params, flops = mask @ costs(units), mask @ np.array([unit.flops for unit in units])  # each [workers]
    load = f"load: the fullest worker has the mean {imbalance(params):.3f} times in parameters"
    if flops.any():
        load += f", {imbalance(flops):.3f} times in FLOPs"
    groups = number_of_groups(mask)
    apart = f"{groups} groups of workers share no unit: --resample, --keep or a larger --coverage helps"
    together = "all workers are connected" if groups == 1 else apart
    gap = f"spectral gap: {spectral_gap(mask):.3f} ({together}; full masks give 1)"
    return "\n".join([picture(mask, units, machines), f"coverage: asked {asked:g}, given {given}", load, gap])


def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False)  # an error is one line
    parser.description = "Show who holds what, without training."
    parser.add_argument("--workers", type=int, default=8, help="workers N (default: 8)")
    parser.add_argument("--count", type=int, default=12, help="units of equal cost (default: 12)")
    parser.add_argument("--coverage", type=float, default=0.375, help="share C that holds a unit (0.375)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the deal (default: 0)")
    args = parser.parse_args()
    if args.workers < 1 or args.count < 1 or args.seed < 0:
        parser.error("--workers, --count and --seed: must be at least 1, 1 and 0")
    units = [Unit(f"unit {u}", "unit", cost=1) for u in range(args.count)]
    try:
        mask = assign(units, args.workers, holders_per_unit(args.coverage, args.workers), args.seed)
    except UserError as error:
        parser.error(str(error))
    print(describe(mask, units, args.coverage))


if __name__ == "__main__":
    main()
