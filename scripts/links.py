"""Compute what machines send each other in a step, and how long it takes: python -m scripts.links"""

from math import comb

import torch

from masks import UserError, holders_per_unit
from model import GPTConfig, build, units_of
from support.launch import at_least, make_parser, whole_numbers
from support.presets import SIZES

SCHEMES = ["DDP", "FSDP2", "HSDP", "none flat", "none two levels"]
SCHEMES += [f"{m} {e}" for m in ("backward", "forward") for e in ("flat", "two levels", "by machine")]
NOTES = """These are formulas, not measurements. Communication and computing do not overlap.
ratio: seconds of communication / seconds of computing. Above 1 the network is the bottleneck.
computing: 6 P FLOPs for each of a GPU's {tokens:,} tokens, at {tflops:g} TFLOP/s; times H in forward masking,
times (2 + H) / 3 in backward masking. Values are sent in bfloat16. Inside a machine this takes no time.
link: a GPU's own network card, with 1/G of the machine's rate and bytes. DDP and FSDP2 use G rings.
none, backward, forward: SDP with this --mask. flat: one all_to_all. two levels: one exchange between
machines, one inside each.
by machine: two levels, and all workers of a machine hold the same blocks."""
FLAGS = (
    ("--machines", at_least(2), 64, "number of machines, M"),
    ("--gpus", at_least(1), 8, "GPUs of each machine, G; each is a worker: N = M G"),
    ("--size", tuple(SIZES["gpt"]), "1b", "preset of the GPT's shape, see support/presets.py"),
    ("--vocabulary", at_least(1), 50304, "size of the vocabulary: 50304 for FineWeb, 256 for bytes"),
    ("--coverage", float, 0.5, "share C of the workers, or of the machines, that hold a block"),
    ("--gbit", whole_numbers, "25,100,400", "network rates of a machine, in each direction, in Gbit/s"),
    ("--tflops", at_least(0.001, float), 400.0, "TFLOP/s that a GPU achieves"),
    ("--tokens", at_least(1), 16384, "tokens of each GPU in a step"),
)


def held_share(shared, coverage, workers, together=1):
    """S + (1 - S) u, the share of P that one of N workers holds, H, or any of G `together`, U; shared: S. A
    unit's p holders, drawn by chance, miss all G with probability 1 - u = binom(N - G, p) / binom(N, p)."""
    holders = holders_per_unit(coverage, workers)
    return shared + (1 - shared) * (1 - comb(workers - together, holders) / comb(workers, holders))


def sent_by_machine(scheme, params_bytes, shared, coverage, machines, gpus):
    """Bytes that each of 2 or more machines sends to others in a step, the mean over them and over masks.
    scheme: of SCHEMES; params_bytes: P, as sent; shared: S. DDP and FSDP2 go 2 and 3 times round a ring of N,
    which leaves a machine once. HSDP: each GPU all-reduces P / G in a ring of M. SDP: an owner sends a value
    to readers on other machines, N - G of N, in two levels to machines, M - 1 of M; gradients come back."""
    ring, across = (params_bytes * (members - 1) / members for members in (machines * gpus, machines))
    if scheme in ("DDP", "FSDP2", "HSDP"):
        return {"DDP": 2 * ring, "FSDP2": 3 * ring, "HSDP": 2 * across}[scheme]
    mode, exchange = scheme.split(" ", 1)
    copies = {"flat": gpus, "two levels": 1, "by machine": 1}[exchange]
    groups = machines if exchange == "by machine" else machines * gpus
    share = held_share(shared, coverage, groups, gpus if exchange == "two levels" else 1)
    return copies * {"none": 2, "backward": 1 + share, "forward": 2 * share}[mode] * across


def computing_seconds(scheme, params, held, tokens, tflops):
    """Of a GPU's step, at 6 FLOPs a parameter and token: a third each for the forward pass, input gradients
    and weight gradients. held: H, which shrinks the last in backward masking, and all in forward masking."""
    share = {"forward": held, "backward": (2 + held) / 3}.get(scheme.split()[0], 1)
    return 6 * params * tokens * share / (tflops * 1e12)


def table(args):
    """Yields the lines to print. Raises UserError."""
    with torch.device("meta"):
        whole = build(GPTConfig(**SIZES["gpt"][args.size], vocabulary=args.vocabulary))
    params, workers = sum(parameter.numel() for parameter in whole.parameters()), args.machines * args.gpus
    shared = 1 - sum(unit.cost for unit in units_of(whole, "block")) / params
    held, by_machine = (held_share(shared, args.coverage, groups) for groups in (workers, args.machines))
    union = held_share(shared, args.coverage, workers, args.gpus)
    yield f"P = {params:,}, S = {shared:.3f}, H = {held:.3f} (by machine {by_machine:.3f}), U = {union:.3f}"
    titles = f"{'scheme':<20}{'MB a machine':>13}{'MB a link':>11}{'computing, s':>14}"
    yield titles + "".join(f"{rate:>5} Gbit/s, s  ratio" for rate in args.gbit)
    for scheme in SCHEMES:
        sent = sent_by_machine(scheme, 2 * params, shared, args.coverage, args.machines, args.gpus)
        own = by_machine if scheme.endswith("by machine") else held
        computing = computing_seconds(scheme, params, own, args.tokens, args.tflops)
        line = f"{scheme:<20}{sent / 1e6:>13,.3f}{sent / args.gpus / 1e6:>11,.3f}{computing:>14.3g}"
        for rate in args.gbit:
            seconds = sent * 8 / (rate * 1e9)
            line += f"{seconds:>15.3g}{seconds / computing:>7.2f}"
        yield line


def main(argv=None):
    parser = make_parser(__doc__, FLAGS)
    args = parser.parse_args(argv)
    with parser.answering(UserError):
        print(*table(args), NOTES.format(**vars(args)), sep="\n")


if __name__ == "__main__":
    main()
