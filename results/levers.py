"""Levers that could make forward masking win, one run each: python -m results.levers NAME...

Writes results/levers/NAME-SEED.json of each, and prints a line. Some levers are functions, not flags.
"""

import sys
from functools import partial
from pathlib import Path

import torch

import masks
import train
from results.experiments import Run, versions, write_texts
from scripts.plot import read_out
from sdp import SDP

SEED, STEPS, EVERY = 0, 500, 10
COMMON = (
    f"--width 64 --heads 4 --hidden 128 --batch-size 32 --steps {STEPS} --seed {SEED} --eval-every 100 "
    "--eval-batches 25 --save-every 0 --data text --data-dir datasets/levers/tune.txt"
)
MASKED = f"--mask forward --units neuron --resample {EVERY}"


def in_turn(units, workers, _, seed=0, mask_number=0, *, coverages):
    """As masks.assign, with one coverage after another, each for an equal part of the run. train.py measures
    what a step costs at the first mask, so what it reports is the cost of the first coverage."""
    phase = min(mask_number * EVERY * len(coverages) // STEPS, len(coverages) - 1)
    holders = masks.holders_per_unit(coverages[phase], workers)
    return masks.assign(units, workers, holders, seed, mask_number)


class DoubleRate(SDP):
    """Units that not all workers train learn with twice the rate of the others."""

    def step(self, lr, clip=0.0, *numbers):
        before = {name: bucket.master.clone() for name, bucket in self.buckets.items()}
        result = super().step(lr, clip, *numbers)
        for name, bucket in self.buckets.items():
            for begin, end, trainers in bucket.trainers:
                if trainers < len(self.trains):
                    bucket.master[begin:end].lerp_(before[name][begin:end], -1)  # once more the same way
        return result


EIGHT = f"{MASKED} --layers 6 --workers 8"
GROW = partial(in_turn, coverages=(0.25, 0.5, 0.75))
SHRINK = partial(in_turn, coverages=(0.75, 0.5, 0.25))
LEVERS = {  # {name: (flags, more arguments of train.main)}
    "small": ("--mask none --layers 3 --workers 8", {}),
    "W4": (f"{MASKED} --layers 6 --workers 4", {}),
    "W8": (EIGHT, {}),
    "W16": (f"{MASKED} --layers 6 --workers 16", {}),
    "W32": (f"{MASKED} --layers 6 --workers 32", {}),
    "W32-resample1": (f"{MASKED} --layers 6 --workers 32 --resample 1", {}),
    "W8-grow": (EIGHT, {"assign": GROW}),
    "W8-shrink": (EIGHT, {"assign": SHRINK}),
    "W8-lr2": (EIGHT, {"engine": DoubleRate}),
    "W8-lr6e-3": (f"{EIGHT} --lr 6e-3", {}),
    "deep": (f"{MASKED} --layers 12 --workers 8 --coverage 0.25", {}),
    "wide": (f"{MASKED} --layers 3 --workers 8 --coverage 0.25 --width 128 --hidden 256", {}),
    "ends": ("--mask forward --keep ends --coverage 0.25 --resample 10 --layers 6 --workers 8", {}),
}


def main():
    torch.set_num_threads(1)
    write_texts(Path("datasets/levers"), "")
    for name in sys.argv[1:]:
        flags, more = LEVERS[name]
        result, out = Path("results/levers", f"{name}-{SEED}.json"), Path("runs/levers", f"{name}-{SEED}")
        run = Run(f"{COMMON} {flags}".split(), result, out)
        if run.read() is None:
            train.main([*run.flags, "--out", str(out), "--overwrite"], **more)
            about = {"arm": name, "seed": SEED, "flags": run.flags, "versions": versions()}
            run.write(about | read_out(out))
        print(f"{name}: {run.read()['curve'][-1]['val_loss']:.3f} nats per byte")


if __name__ == "__main__":
    main()
