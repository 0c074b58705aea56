"""Clusters: several machines, and workers of unequal size."""

import numpy as np


def spread(mask, units):
    """The mask with equal columns far apart, if all units are alike. Layers in a row then use a link
    both ways."""
    if len({(unit.kind, unit.cost) for unit in units}) > 1:
        return mask
    repeats = [(mask[:, :u] == mask[:, [u]]).all(axis=0).sum() for u in range(len(units))]
    return mask[:, np.argsort(repeats, kind="stable")]
