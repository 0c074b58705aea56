"""Who holds what: the masks of Subnetwork Data Parallelism (arXiv 2507.09029), and a picture of them.

A *unit* is the smallest thing that a mask switches: a residual block, an attention head, a group of hidden
neurons. A mask is a boolean array [workers, units]; each unit has exactly `holders` holders among the
workers, and the workers hold equally much. Nothing here knows about torch. At the end stands the parser of
command lines, which all commands of this project use.

    python masks.py --workers 8 --count 12 --coverage 0.375
    python masks.py --sweep                     # how well workers mix, over N, C and ways of assigning

Needs only numpy. Read next: model.py, whose layers can be built from any subset of their units.
"""

import argparse
import math
import os
import sys
import time
from collections import Counter, defaultdict
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np

MODES = ("none", "backward", "forward")  # what --mask can be
WAYS = ("random", "cyclic")  # what --assign can be


class Unit(NamedTuple):
    """What a mask switches as one. The units of one layer are interchangeable: equal shapes, equal costs."""

    layer: str  # the module whose parameters are cut into units, such as "blocks.3" or "blocks.3.mlp"
    kind: str  # units of one kind are dealt out evenly among the workers
    cost: int  # parameters
    flops: int = 0  # of a forward pass of one row of a batch


def check_coverage(coverage):
    """Raises ValueError where a coverage is not in (0, 1]."""
    if not 0 < coverage <= 1:
        raise ValueError(f"--coverage {coverage:g}: must be above 0 and at most 1, such as 0.5")


def holders_per_unit(coverage, workers):
    """p = floor(C N + 1/2), the number of workers that hold each unit, for a coverage C in (0, 1].

    Not round(): Python rounds halves to even, so round(0.5) is 0. Raises ValueError where p would be 0.
    """
    check_coverage(coverage)
    holders = math.floor(coverage * workers + 0.5)
    if holders == 0:
        smallest = math.ceil(500_000 / workers) / 1_000_000  # 1/(2N), rounded up so that it works as printed
        raise ValueError(
            f"--coverage {coverage:g}: with {workers} workers no worker would hold a unit; "
            f"the smallest that works is {smallest:g}"
        )
    return holders


def assign(units, workers, holders, seed=0, way="random", draw=0):
    """Deal the units out: a mask, bool [workers, units], the same on every machine for the same arguments.
    Another `draw` is another mask, found without a search for a large spectral gap: where masks keep
    changing, workers mix anyway.

    Every column sums to `holders`. Within a kind whose units cost the same, the number of units that a worker
    holds differs by at most one. With "random" the worker graph, in which workers are joined by the units
    that they share, is connected wherever holders >= 2 and there are units enough: len(units) * (holders - 1)
    >= workers - 1. Raises ValueError where some worker would hold no unit of a kind.
    """
    kind, fewest = min(Counter(unit.kind for unit in units).items(), key=lambda item: item[1])
    if fewest * holders < workers:
        enough = math.ceil((math.ceil(workers / fewest) - 0.5) / workers * 1e6) / 1e6
        raise ValueError(
            f"--coverage: {fewest} units ({kind}) with {holders} of {workers} workers holding each leave a "
            f"worker without any; a coverage of at least {enough:g} works, or fewer --workers"
        )
    rng = np.random.default_rng([seed, workers, holders] + [draw] * (draw > 0))
    if way == "cyclic":
        return cycle(units, workers, holders, rng)
    best, costs = None, {(unit.kind, unit.cost) for unit in units}
    uneven = len(costs) > len({unit.kind for unit in units})
    for _ in range(4 if uneven else 1):  # where units of a kind differ, a search can end with an uneven load
        mask = deal(units, workers, holders, rng)
        mask = mask if holders == workers else mix(mask, units, rng, widen=draw == 0)
        load = mask @ np.array([unit.cost for unit in units])
        if best is None or load.max() < best[0]:
            best = load.max(), mask
        if load.max() <= 1.1 * load.mean() or holders == workers:
            break
    return best[1]


def cycle(units, workers, holders, rng):
    """A mask in which a unit's holders stand side by side in a circle of the workers, evenly along it, and
    the units of a kind follow one another in random order: few workers share much with few others."""
    mask = np.zeros((workers, len(units)), dtype=bool)
    for kind in dict.fromkeys(unit.kind for unit in units):
        of_kind = rng.permutation([u for u, unit in enumerate(units) if unit.kind == kind])
        first = np.arange(len(of_kind)) * workers // len(of_kind)  # of each unit's holders
        mask[(first + np.arange(holders)[:, None]) % workers, of_kind] = True
    return mask


def plan(draw, mode, steps, resample=0, finish=0.0):
    """The masks of a run and what they do: a function at(step) -> (mask, mode), for steps counted from 1.

    draw(k) -> the k-th mask, from 0. Every `resample` steps comes the next one (0: never); and the last
    fraction `finish` of the steps is in backward mode with whatever the mask is. That a step's mask depends
    on nothing but its number is what lets a run resume.
    """
    of_finish = round(finish * steps)
    now = lru_cache(2)(lambda number, mode: (draw(number), mode))  # the same object while nothing changes

    def at(step):
        number = (step - 1) // resample if resample else 0
        return now(number, "backward" if step > steps - of_finish else mode)

    return at


def deal(units, workers, holders, rng):
    """One random deal, bool [workers, units]: units in random order, the costly first, each to the `holders`
    workers that have the least of its kind, then the least of everything; the rest is chance."""
    mask = np.zeros((workers, len(units)), dtype=bool)
    load = np.zeros(workers)
    load_of_kind = {unit.kind: np.zeros(workers) for unit in units}
    for u in sorted(rng.permutation(len(units)), key=lambda u: -units[u].cost):
        of_kind = load_of_kind[units[u].kind]
        by_chance = np.argsort(rng.random(workers))
        load_both = of_kind + 1j * load  # complex numbers are sorted by real, then by imaginary parts
        chosen = by_chance[np.argsort(load_both[by_chance], kind="stable")][:holders]
        mask[chosen, u] = True
        load[chosen] += units[u].cost
        of_kind[chosen] += units[u].cost
    return mask


def mix(mask, units, rng, widen=True):
    """Let pairs of workers swap units of a kind wherever that is no step back, in place: first until the
    worker graph is connected, if it can be; then, if asked to, to widen the spectral gap and to even the
    load. The sums of columns stay as they are, and those of rows too, within each kind whose units cost the
    same; where they differ (the stages of a ResNet) a worker may also give a unit away and take none."""
    workers, holders = len(mask), mask[:, 0].sum()
    cost, kind = np.array([unit.cost for unit in units]), np.array([unit.kind for unit in units])
    uneven = {k for k in dict.fromkeys(kind) if len(set(cost[kind == k])) > 1}

    def judge():
        reach, load = components(mask), mask @ cost
        groups = len(np.unique(reach))
        excess = max(0, load.max() / load.mean() - 1.1)  # a tenth above the mean is free, more is dear
        return (-groups, spectral_gap(mask) - 4 * excess if groups == 1 and widen else 0), reach

    # few where workers are many: there the gap takes long, and is large
    tries = min(1000, 1_000_000 // workers**2) if widen else 0
    widen = tries > 0
    best, reach = judge()
    can_connect = len(units) * (holders - 1) >= workers - 1  # each unit is holders - 1 edges of a tree
    while tries > 0 or (can_connect and best[0] < -1):
        tries -= 1
        i, j = rng.choice(workers, 2, replace=False)
        if can_connect and best[0] < -1 and reach[i] == reach[j]:
            continue
        u = rng.choice(np.flatnonzero(mask[i]))
        offers = np.flatnonzero(mask[j] & ~mask[i] & (kind == kind[u]))
        if mask[j, u] or not len(offers):
            continue
        swap = [u, rng.choice(offers)]
        if kind[u] in uneven and rng.random() < 0.3 and (kind[mask[i]] == kind[u]).sum() > 1:
            swap = [u]  # i gives it away and takes nothing
        mask[np.ix_([i, j], swap)] ^= True
        after = judge()
        if after[0] >= best:
            best, reach = after
        else:
            mask[np.ix_([i, j], swap)] ^= True
    return mask


def components(mask):
    """int [workers]: the smallest number of a worker that can be reached over shared units."""
    reach = np.arange(len(mask))
    while True:
        by_unit = np.where(mask, reach[:, None], len(mask)).min(axis=0)  # [units]
        further = np.where(mask, by_unit, len(mask)).min(axis=1)  # [workers]
        if (further == reach).all():
            return reach
        reach = further


def spectral_gap(mask):
    """How well the workers are mixed: 1 - |second largest eigenvalue| of the worker graph's random walk.

    From a worker choose a unit that it holds uniformly, then a holder of that unit uniformly. The [N, N]
    transition matrix T = D_w^-1 M D_u^-1 M^T is similar to the symmetric A A^T with A = D_w^-1/2 M D_u^-1/2,
    so its eigenvalues are real and in [0, 1]. Full masks give 1, workers in groups that share no unit give 0.
    """
    if len(mask) == 1:
        return 1.0
    of_worker, of_unit = mask.sum(axis=1), mask.sum(axis=0)
    if not (of_worker.all() and of_unit.all()):
        raise ValueError(
            "the spectral gap needs masks in which every worker holds a unit and every unit is held"
        )
    a = mask / np.sqrt(of_worker[:, None] * of_unit)  # [workers, units]
    eigenvalues = np.linalg.eigvalsh(a @ a.T)  # ascending
    return round(float(1 - eigenvalues[-2]), 9) + 0.0  # rounding noise aside, and no -0.0


def roles(mode, mask):
    """The one table behind all schemes: (trains, reads), each bool [workers, units].

    `reads`: the worker needs the unit in its forward pass; `trains`: it computes the unit's gradient.
    """
    everything = np.ones_like(mask)
    return {
        "none": (everything, everything),  # plain data parallelism
        "backward": (mask, everything),  # whole forward pass, gradients for what is held
        "forward": (mask, mask),  # what is not held does not exist here
    }[mode]


def columns(units):
    """{layer: the numbers of its units}, in the order of the layers; these are columns of a mask."""
    of_layer = defaultdict(list)
    for number, unit in enumerate(units):
        of_layer[unit.layer].append(number)
    return of_layer


def count(units, row):
    """{layer: how many of its units are set in `row`}, for a row of a mask, bool [units]."""
    return {layer: int(row[numbers].sum()) for layer, numbers in columns(units).items()}


def kept_blocks(keep, blocks, first_of_stage=()):
    """The numbers of the blocks that every worker holds, so that they are shared and not units: of `blocks`
    blocks none, both ends, the first of each stage of a ResNet (strided), or those listed, such as "0,5".
    Raises ValueError where the model has no such blocks, or would have no others."""
    named = {"none": (), "ends": (0, blocks - 1), "strided": first_of_stage}
    try:
        kept = set(named[keep] if keep in named else map(int, keep.split(",")))
    except ValueError:
        kept = {-1}
    if not kept <= set(range(blocks)) or (keep == "strided" and not kept):
        raise ValueError(
            f"--keep {keep}: must be none, ends, {'strided, ' * bool(first_of_stage)}"
            f"or numbers from 0 to {blocks - 1} with commas between them"
        )
    if len(kept) == blocks:
        raise ValueError(f"--keep {keep}: keeps all {blocks} blocks, and leaves nothing to mask")
    return kept


def picture(mask, units, width=120):
    """The mask as text: workers across, layers down, a full square for each unit of the layer that is held.

    Where the squares do not fit into the width, the number of units held stands in their place.
    """
    held = {layer: mask[:, numbers] for layer, numbers in columns(units).items()}  # bool [workers, its units]
    sums = {"units": mask.sum(axis=1), "parameters": mask @ np.array([unit.cost for unit in units])}
    squares = {
        layer: ["".join("█" if h else "·" for h in row) for row in rows] for layer, rows in held.items()
    }
    numbers = {layer: rows.sum(axis=1) for layer, rows in held.items()}
    margin = max(map(len, (*held, *sums))) + 2
    for body in (squares, numbers):
        table = {"worker": range(len(mask)), **body, **sums}
        cell = max(len(f"{c}") for cells in table.values() for c in cells) + 1
        if margin + cell * len(mask) <= width:
            break
    fit = min(len(mask), (width - margin) // cell)
    lines = [
        f"{title:{margin}}" + "".join(f"{c!s:{cell}}" for c in cells[:fit]) for title, cells in table.items()
    ]
    return "\n".join(map(str.rstrip, lines)) + (
        f"\n... and {len(mask) - fit} more workers" * (fit < len(mask))
    )


def describe(mask, units, asked):
    """The picture, then the coverage that was asked and given, how even the load is, and the spectral gap."""
    workers, holders = len(mask), int(mask[:, 0].sum())
    load = {
        "parameters": mask @ np.array([unit.cost for unit in units]),
        "FLOPs": mask @ np.array([unit.flops for unit in units]),
    }
    most = ", ".join(f"{of.max() / of.mean():.3f} times in {what}" for what, of in load.items() if of.any())
    groups = len(np.unique(components(mask)))
    together = "all workers are connected" if groups == 1 else f"{groups} groups of workers share no unit"
    return (
        f"{picture(mask, units)}\n"
        f"coverage: asked {asked:g}, given {holders / workers:g}"
        f" ({holders} of {workers} workers hold each unit)\n"
        f"load: the fullest worker has the mean {most}\n"
        f"spectral gap: {spectral_gap(mask):.3f} ({together}; full masks give 1)"
    )


def sweep(units, seed):
    """The spectral gap against coverage, for several N and both ways of assigning, as text; "-" where some
    worker would hold nothing."""
    coverages = [eighths / 8 for eighths in range(1, 9)]
    lines = [f"{'workers':<10}{'assign':<10}" + "".join(f"{f'C = {c:g}':>11}" for c in coverages)]
    for workers, way in product((2, 4, 8, 16, 32), WAYS):
        cells = []
        for coverage in coverages:
            try:
                mask = assign(units, workers, holders_per_unit(coverage, workers), seed, way)
                cells.append(f"{spectral_gap(mask):.3f}")
            except ValueError:
                cells.append("-")
        lines.append(f"{workers:<10}{way:<10}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    """argparse, with bad input answered by one line on stderr and exit code 2.

    Under torchrun the first process of each machine speaks and exits. The others wait for torchrun to end
    them: if one of them left first, torchrun would end the first before it has spoken.
    """

    def error(self, message):
        if int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))) > 0:
            time.sleep(60)  # who is still here then is alone with its error
        print(f"{self.prog}: error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)


def at_least(least, kind=int):
    """An argparse type: a finite number of that kind that is not below `least`."""

    def parse(text):
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not least <= number < math.inf:  # also where it is nan
            whole = "whole " if kind is int else "finite "
            raise argparse.ArgumentTypeError(f"{text!r}: must be a {whole}number of at least {least}")
        return number

    return parse


def main():
    parser = Parser(description="Show who holds what, without training.", allow_abbrev=False)
    parser.add_argument("--workers", type=at_least(1), default=8, help="workers, N")
    parser.add_argument("--count", type=at_least(1), default=12, help="units of equal cost")
    parser.add_argument(
        "--coverage", type=float, default=0.375, help="share of the workers that hold a unit, C"
    )
    parser.add_argument("--assign", choices=WAYS, default="random", help="how units are dealt out")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the deal")
    parser.add_argument("--sweep", action="store_true", help="the spectral gap of --count units over N and C")
    args = parser.parse_args()
    units = [Unit(f"unit {u}", "unit", 1) for u in range(args.count)]
    if args.sweep:
        print(sweep(units, args.seed))
        return
    try:
        holders = holders_per_unit(args.coverage, args.workers)
        mask = assign(units, args.workers, holders, args.seed, args.assign)
    except ValueError as error:
        parser.error(str(error))
    print(describe(mask, units, args.coverage))


if __name__ == "__main__":
    main()
