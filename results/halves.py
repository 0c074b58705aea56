"""Halves of trained GPTs: python -m results.halves ckpt.pt...

The checkpoints are those of `python -m results.experiments new`, which also writes the text.
Heads and groups of neurons are chosen by chance, or by what the loss would change without a unit: |gradient
times weight|, as in https://arxiv.org/abs/1906.10771. Both are then trained for 100 steps more.
"""

import copy
import sys

import numpy as np
import torch

from data import load
from masks import columns
from model import units_of
from scripts.cut import choose, cut
from scripts.export import load_model


@torch.no_grad()
def validate(model, data):
    return np.mean([model(x, y).item() for x, y in zip(*(t.split(8) for t in data.validation()))])


def importance(model, units, data):
    """Of each unit, the sum over 50 batches of |the sum of gradient times weight|: float [units]."""
    model, total = copy.deepcopy(model).requires_grad_(True), np.zeros(len(units))
    for step in range(1, 51):
        model.zero_grad()
        model(*data.batch(seed=7, step=step, size=8)).backward()
        for layer, own in columns(units).items():
            for name, p in model.named_parameters():
                if name.startswith(f"{layer}."):
                    by_unit = (p.grad * p.data).unflatten(0, (len(own), -1))  # (units, rows of a unit, ...)
                    total[own] += by_unit.flatten(1).sum(1).abs().numpy()
    return total


def most_important(units, scores):
    held = np.zeros(len(units), dtype=bool)
    for own in columns(units).values():
        best = np.argsort(-scores[own])[: len(own) // 2]
        held[np.array(own)[best]] = True
    return held


def train_more(part, data, steps=100, lr=3e-3):
    part = copy.deepcopy(part).requires_grad_(True)
    optimizer = torch.optim.AdamW(part.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = lr * (1 - (step - 1) / steps)
        part(*data.batch(seed=8, step=step, size=8)).backward()
        torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return part


def main():
    torch.set_num_threads(1)
    data = load("text", "datasets/new/report.txt", 128, 160)
    for path in sys.argv[1:]:
        model = load_model(path)
        units = units_of(model, "neuron")
        by_chance = [cut(model, units, choose(units, 0.5, seed)) for seed in range(10)]
        chosen = cut(model, units, most_important(units, importance(model, units, data)))
        losses = [validate(model, data), np.mean([validate(part, data) for part in by_chance])]
        losses.append(validate(chosen, data))
        losses += [validate(train_more(part, data), data) for part in (by_chance[0], chosen)]
        print(path, "whole, by chance, chosen, both trained:", np.round(losses, 3))


if __name__ == "__main__":
    main()
