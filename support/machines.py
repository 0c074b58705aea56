"""Clusters: several machines, and workers of unequal size. sdp.py does not know this file.

Bandwidth is short between machines. So the exchange takes two hops: `across`, among the processes at the same
place of all machines, and `inside`, among those of a machine. A value crosses once to each machine with a
reader, and gradients are summed inside before they cross."""

import math
from functools import partial
from itertools import zip_longest

import numpy as np
import torch.distributed as dist

from sdp import Layout, Route


def make_layout(machines=1, timeout=None, capacity=None):
    """The layout of so many machines with equally many processes, in the order of the ranks. timeout: of
    groups, a timedelta; capacity: a whole number of each worker, its share of the owned values."""
    if machines == 1 and not capacity:
        return Layout()
    processes = dist.get_world_size()
    of_processes = np.reshape(capacity or [1] * processes, (processes, -1)).sum(axis=1)
    return (TwoLevels if 1 < machines < processes else OneLevel)(machines, timeout, of_processes)


def count_as_crossing(route):
    """Count a route's bytes as those between machines, too."""
    route.exchange = partial(route.exchange, also="between_machines")


class OneLevel(Layout):
    """Unequal workers, or machines with one process each. Slices follow the capacity of their owners."""

    def __init__(self, machines, timeout, capacity):
        """capacity: [processes]."""
        super().__init__()
        self.machines, self.capacity = machines, capacity

    def slice_edges(self, size):
        shares = np.cumsum([0, *self.capacity])
        return (shares * math.ceil(size / shares[-1])).clip(max=size)

    def routes(self, bucket, trained, frozen, traffic):
        routes = super().routes(bucket, trained, frozen, traffic)
        for route in routes.both if self.machines > 1 else ():
            count_as_crossing(route)
        return routes


class TwoLevels(OneLevel):
    """Several machines with several processes. Slices are numbered place by place: so what a process receives
    from the places of its machine, one after another, is in the bucket's order."""

    def __init__(self, machines, timeout, capacity):
        ranks = np.arange(len(capacity)).reshape(machines, -1)  # [machines, places]
        rank_of_slice = ranks.T.flatten()
        super().__init__(machines, timeout, capacity[rank_of_slice])
        self.machine, self.place = divmod(self.my_slice, ranks.shape[1])
        self.my_slice = self.place * machines + self.machine
        # new groups do not take the time-out of the default group
        self.inside, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout)
        self.across, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout)

    def routes(self, bucket, trained, frozen, traffic):
        return TwoHops(self, bucket, trained, frozen, traffic)

    def exchanges_at_once(self, has):
        """Two more, so that a hop across, the slow one, has the time of two layers."""
        return super().exchanges_at_once(has) + 2

    def finish_oldest(self, under_way):
        """Wait for the oldest exchange, and let the next one begin its second hop."""
        super().finish_oldest(under_way)
        if under_way:
            next(under_way[0], None)


class TwoHops:
    """The routes of a bucket: a pull goes across machines and then inside them, a push the other way."""

    def __init__(self, layout, bucket, trained, frozen, traffic):
        """trained, frozen: bool [processes, chunks]."""
        self.layout, self.bucket, self.traffic = layout, bucket, traffic
        self.across, crossed_edges = self.hop_across(trained | frozen)
        self.inside = [self.hop_inside(wants, crossed_edges) for wants in (trained, frozen)]
        self.push_across, crossed_edges = self.hop_across(trained)
        self.push_inside = self.hop_inside(trained, crossed_edges)
        buffers = sum(self.push_across.to_workers), sum(self.push_inside.to_workers)
        self.push_buffer = max(buffers)  # elements

    def hop_across(self, wants):
        """(A route to the machines where somebody wants a chunk; the chunks' edges in what has crossed.)"""
        layout, place = self.layout, self.layout.place
        of_machine = wants.reshape(layout.machines, -1, wants.shape[1]).any(axis=1)  # [machines, chunks]
        cuts = self.bucket.slice_edges[place * layout.machines : (place + 1) * layout.machines + 1]
        edges = self.bucket.chunk_edges.clip(cuts[0], cuts[-1])  # of the chunks, in the slices of this place
        route = Route(of_machine, edges, cuts, self.bucket.my_edges, self.traffic, layout.across)
        count_as_crossing(route)
        return route, np.cumsum([0, *of_machine[layout.machine] * np.diff(edges)])

    def hop_inside(self, wants, crossed_edges):
        """The route from what has crossed to the workers of this machine."""
        layout, bucket = self.layout, self.bucket
        of_machine = wants.reshape(layout.machines, -1, wants.shape[1])[layout.machine]  # [places, chunks]
        cuts = bucket.slice_edges[:: layout.machines]  # of the places
        return Route(of_machine, bucket.chunk_edges, cuts, crossed_edges, self.traffic, layout.inside)

    def pull(self, owned, values):
        crossed = values.new_empty(sum(self.across.from_owners))
        if self.across.is_used:
            yield from self.across.pull(owned, crossed)
        parts = values.split([sum(route.from_owners) for route in self.inside])
        hops = [route.pull(crossed, part) for route, part in zip(self.inside, parts) if route.is_used]
        yield from zip_longest(*hops)  # all of a machine skip an empty one

    def push(self, gradients, total):
        """Gradients are summed inside in the owners' precision, and cross in that of the traffic."""
        if self.push_across.is_used:
            of_machine = total.new_zeros(sum(self.push_across.from_owners))
            yield from self.push_inside.push(gradients, of_machine)
            yield from self.push_across.push(of_machine.to(gradients.dtype), total)


def spread(mask, units):
    """The mask with equal columns far apart, if all are alike: layers in a row use a link both ways."""
    if len({(unit.kind, unit.cost) for unit in units}) > 1:
        return mask
    repeats = [(mask[:, :u] == mask[:, [u]]).all(axis=0).sum() for u in range(len(units))]
    return mask[:, np.argsort(repeats, kind="stable")]
