"""Who holds what: the masks of Subnetwork Data Parallelism (https://arxiv.org/abs/2507.09029).

A *unit* is what a mask switches as one: a residual block, an attention head, a group of neurons. A mask
is a boolean array [workers, units]. Every unit has the same number of *holders* among the workers.

    python masks.py --workers 8 --count 12 --coverage 0.375

Needs only numpy. Read next: model.py, whose layers can be built from any of their units.
"""

import argparse
import math
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

MODES = ("none", "backward", "forward")  # what --mask can be


class UserError(Exception):
    """A problem that the user can solve: the flag or file, and what would work."""


class Unit(NamedTuple):
    """What a mask switches as one. All units of a layer have the same shape and cost."""

    layer: str  # what is cut into units, as "blocks.3" or "blocks.3.mlp"
    kind: str  # units of one kind are dealt out evenly among the workers
    cost: int  # parameters
    flops: int = 0  # of a forward pass over one row of a batch


def holders_per_unit(coverage, workers):
    """p = floor(C N + 1/2), for a coverage C in (0, 1]. Not round(): it rounds 0.5 to 0."""
    if not 0 < coverage <= 1:
        raise UserError(f"--coverage {coverage:g}: must be above 0 and at most 1, such as 0.5")
    holders = math.floor(coverage * workers + 0.5)
    if holders == 0:
        raise UserError(f"--coverage {coverage:g}: no holders; at least {smallest_coverage(1, workers):g}")
    return holders


def smallest_coverage(holders, workers):
    """The lowest coverage with p = `holders`. Rounded up, so it works as printed."""
    return math.ceil((holders - 0.5) / workers * 1e6) / 1e6


def schedule(step, mode, steps, resample=0, finish=0.0):
    """(mask_number, mode) of a step, counted from 1: by the step alone, so a run can resume. Masks
    change every `resample` steps (0: never). The last fraction `finish` of a run is backward."""
    mask_number = (step - 1) // resample if resample else 0
    return mask_number, ("backward" if step > steps - round(finish * steps) else mode)


def roles(mode, mask):
    """The table behind all modes: (trains, reads), each bool [workers, units]. A worker reads what its
    forward pass needs, and trains what it computes gradients for."""
    everything = np.ones_like(mask)
    return {
        "none": (everything, everything),  # plain data parallelism
        "backward": (mask, everything),  # a whole forward pass, gradients of held units
        "forward": (mask, mask),  # units that are not held do not exist here
    }[mode]


def assign(units, workers, holders, seed=0, mask_number=0, capacity=None):
    """The best of many deals, the same on every machine. Columns sum to `holders`. A worker's number of
    units of a kind follows its capacity, within one. Raises UserError where it would be 0."""
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
    most = 500 if mask_number == 0 else 20  # the first mask may be the only one
    tries = min(most, 24_000 // len(units), 1_000_000 // workers**2)  # a gap takes cubic time
    best, best_quality = None, ()
    for _ in range(max(1, tries)):
        mask = deal(units, capacity, holders, rng)
        gap, load = spectral_gap(mask), mask @ costs(units) / capacity
        quality = (gap > 0, gap - imbalance(load))  # connected; then well mixed and even
        if quality > best_quality:
            best, best_quality = mask, quality
    return best


def deal(units, capacity, holders, rng):
    """Deal in the order of the layers. Each unit goes to the workers with fewest of its kind so far,
    then with fewest parameters, relative to capacity. At equal capacity no worker is ever more than one
    unit of a kind ahead: the load is even along the depth, and nobody waits long."""
    share = holders * capacity / capacity.sum()  # of each unit, [workers]
    # Without noise, the two blocks of each stage of a ResNet go to the same two groups of workers.
    noise = rng.random() * costs(units).max()
    mask = np.zeros((len(capacity), len(units)), dtype=bool)
    held, dealt = defaultdict(int), Counter()  # units of a kind: of each worker, and of all
    parameters = np.zeros(len(capacity))
    for u, unit in enumerate(units):
        dealt[unit.kind] += 1
        ahead = held[unit.kind] - dealt[unit.kind] * share
        load = (parameters + noise * rng.random(len(capacity))) / share
        order = np.lexsort((load, ahead))  # by `ahead`, then by `load`
        mask[order[:holders], u] = True
        held[unit.kind] += mask[:, u]
        parameters += unit.cost * mask[:, u]
    return mask


def costs(units):
    return np.array([unit.cost for unit in units])


def imbalance(load):
    return load.max() / load.mean()  # of the fullest worker, in parts of the mean


def spectral_gaps(mask):
    """1 - λ of a random walk from a worker to a unit that it holds, then to a holder of it, ascending.
    Its matrix T = D_w^-1 M D_u^-1 M^T is similar to A A^T with A = D_w^-1/2 M D_u^-1/2."""
    a = mask / np.sqrt(mask.sum(axis=1, keepdims=True) * mask.sum(axis=0))  # [workers, units]
    return abs(np.round(1 - np.linalg.eigvalsh(a @ a.T)[::-1], 9))  # no -0.0


def spectral_gap(mask):
    """How well the workers mix: full masks give 1, and groups that share no unit give 0."""
    return float(spectral_gaps(mask)[1]) if len(mask) > 1 else 1.0


def number_of_groups(mask):
    """How many groups of workers share no unit with each other: each has a λ of 1."""
    return int((spectral_gaps(mask) == 0).sum())


def columns(units):
    """{layer: the numbers of its units, which are columns of a mask}, in order."""
    numbers = defaultdict(list)
    for number, unit in enumerate(units):
        numbers[unit.layer].append(number)
    return numbers


def picture(mask, units, machines=1, width=120):
    """A row for each layer, a column for each worker, and a square for each unit, or their number."""
    layers = columns(units)
    squares_fit = len(mask) * max(len(numbers) for numbers in layers.values()) <= width - 40
    table = {"worker": range(len(mask))}
    if machines > 1:
        table["machine"] = np.arange(len(mask)) * machines // len(mask)
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


def describe(mask, units, requested, machines=1):
    """The picture, the coverage, how even the load is, and how well workers mix."""
    holders = " or ".join(str(number) for number in np.unique(mask.sum(axis=0)))
    params = imbalance(mask @ costs(units))
    flops = imbalance(mask @ np.array([unit.flops for unit in units]))
    groups, mixing = number_of_groups(mask), "all workers are connected"
    if groups > 1:
        mixing = f"{groups} groups of workers share no unit: --resample, --keep or a larger --coverage helps"
    text = picture(mask, units, machines)
    text += f"\ncoverage: requested {requested:g}, actual {mask.mean():g}"
    text += f" ({holders} of {len(mask)} workers hold each unit)"
    text += f"\nload: the fullest worker has {params:.3f} times the mean in parameters, {flops:.3f} in FLOPs"
    return text + f"\nspectral gap: {spectral_gap(mask):.3f} ({mixing}; full masks give 1)"


def main():
    parser = argparse.ArgumentParser(description="Show a mask.", usage=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=8, help="workers N (default: 8)")
    parser.add_argument("--count", type=int, default=12, help="units (default: 12)")
    parser.add_argument("--coverage", type=float, default=0.375, help="share C of holders (0.375)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the deal (default: 0)")
    args = parser.parse_args()
    if args.workers < 1 or args.count < 1 or args.seed < 0:
        parser.error("--workers, --count and --seed: must be at least 1, 1 and 0")
    units = [Unit(f"unit {u}", "unit", cost=1, flops=1) for u in range(args.count)]
    try:
        mask = assign(units, args.workers, holders_per_unit(args.coverage, args.workers), args.seed)
    except UserError as error:
        parser.error(str(error))
    print(describe(mask, units, args.coverage))


if __name__ == "__main__":
    main()
