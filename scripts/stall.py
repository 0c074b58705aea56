"""Do workers wait for each other? Measured with blocks that sleep: python -m scripts.stall

A block that sleeps needs no core, and stands for a GPU that computes. So a few cores show who waits for
whom; real computing would hide it, since a worker that waits lends its core to the others. A block takes
equal times for its forward pass, for the gradient of its input, and for those of its weights, in
proportion to what a worker has of it.
"""

import os
import tempfile
import time
from functools import partial
from statistics import median

import numpy as np
import torch
import torch.distributed as dist

from masks import assign, holders_per_unit
from model import GPTConfig, build, example, initial_value, units_of
from sdp import SDP, Layout
from support.launch import at_least, make_parser

SCHEMES = [(mode, level) for mode in ("backward", "forward") for level in ("block", "neuron")]
FLAGS = (
    ("--workers", at_least(2), 4, "workers, each a process"),
    ("--layers", at_least(1), 12, "transformer blocks"),
    ("--coverage", at_least(0, float), 0.5, "share of the workers that hold a unit"),
    ("--milliseconds", at_least(1), 30, "that a whole block sleeps for each third of a pass"),
    ("--steps", at_least(1), 3, "steps of each scheme, after one to warm up"),
)


class OneAtATime(Layout):
    """The engine with one pull and one push under way."""

    def exchanges_at_once(self, has):
        return 1


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(context, x, forward_seconds, backward_seconds):
        context.seconds = backward_seconds
        time.sleep(forward_seconds)
        return x.view_as(x)

    @staticmethod
    def backward(context, gradient):
        time.sleep(context.seconds)
        return gradient, None, None


def seconds_of(block, whole, unit):
    """(forward, backward) seconds of a worker's part of a block."""
    params = sum(p.numel() for p in block.parameters())
    trained = sum(p.numel() for p in block.parameters() if p.requires_grad)
    return params / whole * unit, (params + trained) / whole * unit


def build_asleep(config, unit, units):
    """As model.build, with blocks that sleep."""
    model = build(config, units)
    with torch.device("meta"):
        whole = sum(p.numel() for p in build(config).blocks["0"].parameters())
    for block in model.blocks.values():
        seconds = seconds_of(block, whole, unit)
        block.register_forward_hook(lambda block, x, y, seconds=seconds: Sleep.apply(y, *seconds))
        block.seconds = sum(seconds)
    return model


def turn_seconds(engine, config, steps):
    """(median duration of a turn, own computing of the worker that computes most), in seconds."""
    durations, (worker,) = [], engine.workers
    for _ in range(1 + steps):
        dist.barrier()
        began = time.perf_counter()
        with engine.turn(worker) as model:
            model(*example(config, rows=1)).backward()
        durations.append(time.perf_counter() - began)
        engine.step(1e-3)
    own = torch.tensor(sum(block.seconds for block in model.blocks.values()))
    longest = torch.tensor(median(durations[1:]))
    for number in (own, longest):
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return longest.item(), own.item()


def measure(args):
    """Yields (mode, level, own computing / dense, [turn / own computing of each way]) on each process."""
    config = GPTConfig(layers=args.layers, width=32, heads=4, hidden=64, context=8)
    sleeping = partial(build_asleep, config, args.milliseconds / 1e3)
    dense = 3 * args.layers * args.milliseconds / 1e3
    first, holders = partial(initial_value, seed=0), holders_per_unit(args.coverage, args.workers)
    for mode, level in SCHEMES:
        with torch.device("meta"):
            units = units_of(build(config), level)
        even = assign(units, args.workers, holders)
        ways = [(even, Layout()), (even, OneAtATime())]
        if level == "block":  # heads and neurons are even within each layer anyway
            uneven = even[:, np.random.default_rng(0).permutation(len(units))]
            ways.append((uneven, OneAtATime()))
        ratios = []
        for mask, layout in ways:
            engine = SDP(sleeping, first, torch.optim.AdamW, units, mask, mode, layout=layout)
            turn, own = turn_seconds(engine, config, args.steps)
            ratios.append(turn / own)
        yield mode, level, own / dense, ratios


def run(rank, args, meeting):
    """What each process does."""
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, args.workers)
    dist.init_process_group("gloo", rank=rank, world_size=args.workers, store=store)
    for mode, level, own, ratios in measure(args):
        if rank == 0:
            numbers = "".join(f"{ratio:>14.2f}" for ratio in ratios)
            print(f"{mode:<10}{level:<8}{own:>14.2f}{numbers}", flush=True)
    dist.destroy_process_group()


def main(argv=None):
    args = make_parser(__doc__.splitlines()[0], FLAGS).parse_args(argv)
    print("A turn, in parts of what the worker that holds most computes itself: with N / p exchanges under")
    print("way, as in the engine; with one; with one and units dealt without regard to the depth")
    print(f"{'':<18}{'own / dense':>14}{'N / p':>14}{'one':>14}{'one, uneven':>14}")
    with tempfile.TemporaryDirectory() as folder:
        arguments = args, os.path.join(folder, "store")
        torch.multiprocessing.spawn(run, arguments, nprocs=args.workers)


if __name__ == "__main__":
    main()
