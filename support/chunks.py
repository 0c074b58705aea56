"""Where units lie in a layer's parameters: buckets, chunks and runs, see sdp.py. Needs masks.py."""

from collections import defaultdict

import numpy as np

from masks import columns


def by_bucket(model):
    """{bucket: {name: parameter}}: "blocks.3.mlp.up" is in "blocks.3", "embedding.weight" in "embedding"."""
    buckets = defaultdict(dict)
    for name, parameter in model.named_parameters():
        words = name.split(".")
        buckets[".".join(words[: 2 if words[0] == "blocks" else 1])][name] = parameter
    return buckets


def chunks_of(parameters, units_of_layer):
    """A bucket's chunks, as two lists: their units, and their sizes. A parameter that is cut into units is a
    row of equal chunks, one a unit. Any other is one chunk of unit -1, which all workers have."""
    unit_of_chunk, sizes = [], []
    for name, parameter in parameters.items():
        layers = [layer for layer in units_of_layer if name.startswith(f"{layer}.")]
        units = units_of_layer[layers[0]] if layers else [-1]
        unit_of_chunk += units
        sizes += [parameter.numel() // len(units)] * len(units)
    return unit_of_chunk, sizes


def runs(has, edges):
    """[(begin, end)] of the runs of chunks that are set in each row of `has`, bool [rows, chunks], one row
    after another. Chunk c lies from edges[c] to edges[c + 1]. Empty runs are left out."""
    change = np.diff(has.astype(np.int8), axis=1, prepend=0, append=0)  # 1 where a run begins, -1 after it
    begins, ends = edges[np.nonzero(change == 1)[1]], edges[np.nonzero(change == -1)[1]]
    return list(zip(begins[begins < ends].tolist(), ends[begins < ends].tolist()))


def runs_of_equal(numbers, edges):
    """[(begin, end, number)] of the runs of chunks that have equal numbers, [chunks]; edges as of `runs`."""
    found = []
    for number in np.unique(numbers).tolist():
        found += [(begin, end, number) for begin, end in runs(numbers[None] == number, edges)]
    return found


def owned_parts(parameters, start, stop):
    """Yields what an owner of a bucket's values from `start` to `stop` has of each parameter: (name, where it
    lies in the flattened parameter, where it lies in the owned values)."""
    begin = 0
    for name, parameter in parameters.items():
        a, b = max(begin, start), min(begin + parameter.numel(), stop)
        if a < b:
            yield name, slice(a - begin, b - begin), slice(a - start, b - start)
        begin += parameter.numel()


def count_units(units, trains, reads):
    """{layer: numbers of (trained, frozen) units} of a worker, as model.build takes it. trains, reads: bool
    [units]."""
    counts = {}
    for layer, numbers in columns(units).items():
        trained = int(trains[numbers].sum())
        counts[layer] = trained, int(reads[numbers].sum()) - trained
    return counts
