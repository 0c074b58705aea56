"""Validate the model of a checkpoint as in training: python -m scripts.evaluate runs/a/ckpt.pt

With --coverage 0.25,0.5,1 it validates random subnetworks, ten of each coverage. Processes of torchrun
share the work."""

import numpy as np
import torch
import torch.distributed as dist

from masks import UserError
from model import BatchNorm
from scripts.cut import check_coverage, choose, cut, units_to_cut
from scripts.export import model_of
from support import checkpoint, launch
from support.evaluation import calibration_images, estimate_statistics, evaluate
from train import FLAGS, load, make_config

DRAWS = 10  # random parts of a coverage: those of the seeds from 0 on


def coverages(text):
    """An argparse type: coverages, such as 0.25,0.5,1. Raises UserError."""
    return [check_coverage(number) for number in text.split(",")]


def print_parts(model, units, coverage, data, args, device):
    """Print a line about random parts of a whole model on the CPU. All processes take part. A part has
    batch norm statistics of its own, from the same images as the whole model's."""
    draws, params = [], sum(p.numel() for p in model.parameters())
    for seed in range(1 if coverage == 1 else DRAWS):  # coverage 1: always the whole model
        part = cut(model, units, choose(units, coverage, seed)).to(device)
        estimate_statistics(part, calibration_images(data, args.seed, device))
        share = sum(p.numel() for p in part.parameters()) / params
        draws.append((*evaluate(part, data, args.batch_size, device), share))
    losses, accuracies, shares = np.transpose(draws)  # (draws) each
    if dist.get_rank() == 0:
        spread = f"lowest {losses.min():.4f}, highest {losses.max():.4f} of {len(draws)}"
        line = f"coverage {coverage:g}: val_loss {losses.mean():.4f} nats per {data.item} ({spread})"
        line += f", accuracy {accuracies.mean():.4f}, {shares.mean():.1%} of the parameters"
        print(line, flush=True)


def main(argv=None):
    own = ("--data-dir", "--eval-batches", "--batch-size", "--units", "--keep")  # the rest is saved
    flags = [(flag, accepts, None, meaning) for flag, accepts, _, meaning in FLAGS if flag in own]
    flags.append(("--coverage", coverages, None, "validate random subnetworks with these shares of units"))
    flags.append(("checkpoint", str, None, "a checkpoint of train.py"))
    parser = launch.make_parser(__doc__, flags)
    with parser.answering(UserError):
        given = parser.parse_args(argv)
        saved = checkpoint.read_checkpoint(given.checkpoint)
        units = units_to_cut(given, saved)
        defaults = {flag.lstrip("-").replace("-", "_"): default for flag, _, default, _ in FLAGS}
        parser.set_defaults(**defaults | saved["flags"] | saved["progress"])  # older ones lack some flags
        args = parser.parse_args(argv)
        data = load(args.data, args.data_dir, args.context, args.eval_batches * args.batch_size)
        make_config(args, data, saved)  # raises where the data does not fit
        model = model_of(saved)
        device, _ = launch.start("auto", args.timeout)
    for parameter in model.parameters():
        parameter.data = parameter.to(getattr(torch, args.dtype))  # as in training
    data = data.to(device)
    for coverage in given.coverage or ():
        print_parts(model, units, coverage, data, args, device)
    if not given.coverage:  # the whole model, with the batch norm statistics that it has
        for norm in (module for module in model.modules() if isinstance(module, BatchNorm)):
            norm.to(torch.promote_types(norm.weight.dtype, torch.float32))
        loss, accuracy = evaluate(model.to(device), data, args.batch_size, device)
        if dist.get_rank() == 0:
            print(f"step {args.step}: val_loss {loss:.4f} nats per {data.item}, accuracy {accuracy:.4f}")
    launch.shut_down()


if __name__ == "__main__":
    main()
