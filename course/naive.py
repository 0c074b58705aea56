"""Subnetwork Data Parallelism (https://arxiv.org/abs/2507.09029), saving nothing. Read this first.

    python -m course.naive --mask forward --units neuron  # a minute on a CPU

N workers train one model. A worker holds some of its units (blocks, or heads and groups of neurons),
and all that is in no unit. In backward masking, it drops gradients of what it does not hold. In forward
masking, what it does not hold contributes nothing. Gradients are averaged over the holders, for one AdamW.

Here each worker has a whole model, times 0 where it holds nothing. FLOPs are saved by model.py (layers of
held units), memory and communication by sdp.py (owners; pull and push), clusters by support/machines.py.
"""

import argparse

import torch

import data
from masks import MODES, assign
from model import GPTConfig, build, initial_value, units_of


def held_values(model, units, row):
    """{name: 1 where a worker holds a parameter's values, else 0}. row: bool [units], its row of the mask."""
    held = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    for name, values in held.items():
        bits = [bit for bit, unit in zip(row, units) if name.startswith(unit.layer + ".")]
        for number, bit in enumerate(bits):  # a layer's units divide its first dimension
            values.chunk(len(bits))[number].fill_(bit)
    return held


def loss_and_gradients(model, x, y, mode, held):
    """A worker's loss, a scalar, and {name: gradient}. x, y: its rows of the batch."""
    weights = used = dict(model.named_parameters())
    if mode == "forward":
        used = {name: weight * held[name] for name, weight in weights.items()}
        for name in used:
            if name.endswith((".o", ".down")) and held[name].any():  # the last matrix of a branch
                used[name] = used[name] / held[name].mean()  # makes up for absent units, as in dropout
    loss = torch.func.functional_call(model, used, (x, y))
    gradients = torch.autograd.grad(loss, list(weights.values()))
    return loss.detach(), dict(zip(weights, gradients))


def mean_over_holders(gradients, held):
    """{name: mean gradient}, value by value. gradients, held: a {name: tensor} of each worker."""
    mean = {}
    for name in held[0]:
        kept = [g[name] * h[name] for g, h in zip(gradients, held)]  # what is not held is dropped
        mean[name] = sum(kept) / sum(h[name] for h in held)
    return mean


def main(arguments=None, workers=4, steps=1000):
    parser = argparse.ArgumentParser()
    parser.add_argument("--mask", choices=MODES, default="forward")
    parser.add_argument("--units", choices=("block", "neuron"), default="neuron")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # so small a model is fastest with one
    text = data.load("python", context=64, tests=160)
    model = build(GPTConfig(layers=4, width=64, heads=4, hidden=128, context=64))
    model.load_state_dict({name: initial_value(model, name, seed=0) for name in model.state_dict()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    units = units_of(model, args.units)
    mask = assign(units, workers, holders=workers if args.mask == "none" else workers // 2)
    held = [held_values(model, units, row) for row in mask]
    for step in range(1, steps + 1):
        losses, gradients = [None] * workers, [None] * workers
        for w in range(workers):
            x, y = text.batch(seed=0, step=step, size=16, which=slice(w, None, workers))
            losses[w], gradients[w] = loss_and_gradients(model, x, y, args.mask, held[w])
        for name, gradient in mean_over_holders(gradients, held).items():
            model.get_parameter(name).grad = gradient
        optimizer.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step}: loss {sum(losses) / workers:.3f}, val_loss {model(*text.validation()):.3f}")


if __name__ == "__main__":
    main()
