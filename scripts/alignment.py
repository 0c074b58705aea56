"""Train like train.py, and compare gradients with the whole model's: python -m scripts.alignment"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import train
from masks import UserError, assign
from support import evaluation
from support.chunks import by_bucket
from support.launch import at_least, make_parser, rank
from support.peers import add_up


def cyclic(units, workers, holders, seed=0, mask_number=0):
    """As masks.assign, but the holders of a unit are neighbours in a circle: few workers share much."""
    rng = np.random.default_rng([seed, workers, holders, mask_number])
    mask = np.zeros((workers, len(units)), dtype=bool)
    for kind in sorted({unit.kind for unit in units}):
        of_kind = rng.permutation([number for number, unit in enumerate(units) if unit.kind == kind])
        if len(of_kind) * holders < workers:
            raise UserError(f"--coverage: a worker would hold no unit of {kind}; use a larger one")
        first = np.arange(len(of_kind)) * workers // len(of_kind)  # of each unit's holders
        mask[(first + np.arange(holders)[:, None]) % workers, of_kind] = True
    return mask


def flatten(parameters, bucket):
    """Their gradients end to end, in the owners' precision."""
    return torch.cat([bucket.mean[:0], *(p.grad.flatten().to(bucket.mean) for p in parameters)])


def compare(engine, batches, args, step):
    """Cosines: {"workers": {layer: [of each, on what it trains]}, "owners": {layer: of their mean}}."""
    buckets, traffic = list(engine.buckets.values()), engine.traffic.copy()
    dots = np.zeros((len(engine.trains) + 1, len(buckets) + 1, 3))  # the last of the owners, of all
    sums = [0] * len(buckets)  # of the whole model's gradients
    with evaluation.whole(engine) as whole:
        whole.requires_grad_(True).train()
        parameters = [list(named.values()) for named in by_bucket(whole).values()]
        for number, worker in engine.workers.items():
            whole.zero_grad()
            train.play(batches, args, step, number, whole, engine.weights[number])
            with engine.turn(number, args.micro_batches + 1) as model:  # sends nothing before the end
                train.play(batches, args, step, number, model, engine.weights[number])
                for layer, (bucket, part) in enumerate(zip(buckets, worker.parts)):
                    gradient = flatten(parameters[layer], bucket)
                    sums[layer] += gradient
                    held = np.repeat(bucket.has(engine.trains)[number], np.diff(bucket.chunk_edges))
                    a, b = flatten(part.trained, bucket), gradient[torch.from_numpy(held)]
                    dots[number, layer] = torch.stack([a @ a, b @ b, a @ b]).cpu()
    engine.average()
    for layer, bucket in enumerate(buckets):
        dist.all_reduce(sums[layer])
        start, stop = bucket.slice_edges[engine.layout.my_slice :][:2]
        a, b = bucket.mean, sums[layer][start:stop]
        dots[-1, layer] = torch.stack([a @ a, b @ b, a @ b]).cpu()
    engine.discard()  # these sums are no step
    engine.traffic &= traffic  # the lower counts, those from before
    dots[:, -1] = dots.sum(axis=1)
    of_all = np.reshape(add_up(dots.ravel().tolist()), (-1, 3))
    cosines = [ab / (aa * bb) ** 0.5 if aa * bb > 0 else None for aa, bb, ab in of_all.tolist()]
    *workers, owners = np.reshape(cosines, dots.shape[:2]).tolist()
    layers = [*engine.buckets, "all"]
    return {"workers": dict(zip(layers, zip(*workers))), "owners": dict(zip(layers, owners))}


def main(argv=None):
    flags = [("--every", at_least(1), 100, "steps between comparisons")]
    flags += [("--cyclic", bool, False, "only neighbours in a circle of workers share units")]
    parser = make_parser(f"{__doc__} It takes all flags of train.py, and these:", flags)
    own, rest = parser.parse_known_args(argv)
    args, found = train.make_parser().parse_args(rest), []

    def before_step(step, engine, batches):
        if step % own.every:
            return {}
        found.append(compare(engine, batches, args, step))
        return {"alignment": found[-1]}

    train.main(rest, assign=cyclic if own.cyclic else assign, before_step=before_step)
    if found and rank() == 0:
        means = {}  # over the steps and the workers; None becomes NaN
        for of, by_layer in found[0].items():
            values = {layer: np.array([each[of][layer] for each in found], float) for layer in by_layer}
            means[of] = {layer: np.nanmean(cosines) for layer, cosines in values.items()}
        of_all = ", ".join(f"{of} {by_layer['all']:.4f}" for of, by_layer in means.items())
        print(f"cosine similarity to the whole model's gradients: {of_all}")
        if args.out:
            Path(args.out, "alignment.json").write_text(json.dumps(means, indent=1) + "\n")


if __name__ == "__main__":
    main()
