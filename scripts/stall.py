"""Do workers wait for each other? Measured with blocks that sleep: python -m scripts.stall

A block that sleeps needs no core, as if a GPU computed. Real computing would hide who waits for whom: a
worker that waits lends its core to the others. A block takes equal times for its forward pass, for the
gradient of its input, and for those of its weights, in proportion to what a worker has of it."""

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
    ("--milliseconds", at_least(1), 30, "that a whole block sleeps for each third of a step"),
    ("--steps", at_least(1), 3, "steps of each scheme, after one to warm up"),
)


class OneAtATime(Layout):
    """With one pull and one push under way."""

    def exchanges_at_once(self, has):
        return 1


def sleep(forward_seconds, backward_seconds, block, inputs, y):
    """A forward hook: a pause now, and another one before the block's backward pass."""
    time.sleep(forward_seconds)
    y.register_hook(lambda gradient: time.sleep(backward_seconds))


def build_asleep(config, third, units):
    """As model.build, with blocks that sleep so many seconds for each third of a step."""
    model, whole = build(config, units), build(config).blocks["0"]
    of_a_weight = third / sum(p.numel() for p in whole.parameters())
    model.seconds = 0.0
    for block in model.blocks.values():
        forward = of_a_weight * sum(p.numel() for p in block.parameters())
        weights = of_a_weight * sum(p.numel() for p in block.parameters() if p.requires_grad)
        block.register_forward_hook(partial(sleep, forward, forward + weights))
        model.seconds += 2 * forward + weights
    return model


def time_turns(engine, config, steps):
    """(median duration of a turn, own computing of the worker that computes most), in seconds."""
    durations, (worker,) = [], engine.workers
    for _ in range(1 + steps):
        dist.barrier()
        began = time.perf_counter()
        with engine.turn(worker) as model:
            model(*example(config, rows=1)).backward()
        durations.append(time.perf_counter() - began)
        engine.step(1e-3)
    most = torch.tensor([median(durations[1:]), model.seconds])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.tolist()


def measure(args):
    """Yields (mode, level, own computing / dense, [turn / own computing of each way]) on each process."""
    config = GPTConfig(layers=args.layers, width=32, heads=4, hidden=64, context=8)
    third, holders = args.milliseconds / 1e3, holders_per_unit(args.coverage, args.workers)
    common = partial(build_asleep, config, third), partial(initial_value, seed=0), torch.optim.AdamW
    for mode, level in SCHEMES:
        units = units_of(build(config), level)
        mask, ratios = assign(units, args.workers, holders), []
        ways = [(mask, Layout()), (mask, OneAtATime())]
        if level == "block":  # heads and neurons are even within each layer anyway
            uneven = mask[:, np.random.default_rng(0).permutation(len(units))]
            ways.append((uneven, OneAtATime()))
        for dealt, layout in ways:
            engine = SDP(*common, units, dealt, mode, layout=layout)
            turn, own = time_turns(engine, config, args.steps)
            ratios.append(turn / own)
        yield mode, level, own / (3 * third * args.layers), ratios


def run(rank, args, meeting):
    """What each process does."""
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, args.workers)
    dist.init_process_group("gloo", rank=rank, world_size=args.workers, store=store)
    for mode, level, own, ratios in measure(args):
        if rank == 0:
            numbers = "".join(f"{number:>14.2f}" for number in (own, *ratios))
            print(f"{mode:<10}{level:<8}{numbers}", flush=True)
    dist.destroy_process_group()


def main(argv=None):
    args = make_parser(__doc__.splitlines()[0], FLAGS).parse_args(argv)
    print("A turn, in parts of what the worker that holds most computes itself: with N / p exchanges under")
    print("way, as in the engine; with one; with one and units dealt without regard to the depth")
    print(f"{'':<18}{'own / dense':>14}{'N / p':>14}{'one':>14}{'one, uneven':>14}")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (args, f"{folder}/store"), nprocs=args.workers)


if __name__ == "__main__":
    main()
