"""The engine: owners, pull, push, step. course/naive.py is the same, saving nothing.

Each value has one *owner*, a process, whatever the masks. A step is

    pull    owners send each value to the workers that read it
    forward / backward on each worker's own rows of the batch
    push    workers send each gradient to its owner, who adds up
    step    owners divide by the number of workers that train it, clip, and update

No activation moves. Pull and push are an all_to_all a layer. Its sizes can be 0: so any mask does with
one group of processes. An *exchange* is a generator: its first next() starts an all_to_all, and running
it to its end waits for that. A whole program, on one process:

    from functools import partial
    import torch, torch.distributed as dist
    from masks import assign
    from model import GPTConfig, build, example, initial_value, units_of
    from sdp import SDP

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    config = GPTConfig(layers=2)
    units = units_of(build(config), "block")
    mask = assign(units, workers=2, holders=1)  # bool [workers, units]
    first, adamw = partial(initial_value, seed=0), torch.optim.AdamW
    engine = SDP(partial(build, config), first, adamw, units, mask, "backward")
    for worker in engine.workers:  # one after the other
        with engine.turn(worker) as model:
            model(*example(config, rows=4)).backward()
    (norm,) = engine.step(lr=1e-3)

A *bucket* is a block's parameters end to end, or those of the embedding or the head. A *chunk* is a
unit's share of a parameter, or a parameter without units; a *run* is chunks side by side. A *slice* is
what a process owns of a bucket, a *piece* of a parameter. A *part* is what a worker has of a bucket; a
*route* leads to it. Below, a norm has 3 values, and a matrix 4 for each of 2 units. Worker r holds unit
r, and reads no more:

    value           0  1  2  3  4  5  6  7  8  9 10    chunk_edges    0 3 7 11
    unit           -1 -1 -1  0  0  0  0  1  1  1  1    unit_of_chunk  -1 0 1    (-1: all workers have it)
    owner           0  0  0  0  0  0  1  1  1  1  1    slice_edges    0 6 11
    worker 0 has    x  x  x  x  x  x  x                my_edges       0 3 6 6   of process 0
    worker 1 has    x  x  x              x  x  x  x                   0 0 1 5   of process 1
    process 0: from_owners 6 1, to_workers 6 3, runs (0, 6) (0, 3)
    process 1: from_owners 3 4, to_workers 1 4, runs (0, 1) (1, 5)
"""

import math
import weakref
from collections import Counter, deque
from contextlib import contextmanager
from functools import partial
from itertools import pairwise, zip_longest

import numpy as np
import torch
import torch.distributed as dist

from masks import columns, roles
from support.chunks import by_bucket, chunks_of, count_units, owned_parts, runs, runs_of_equal
from support.peers import add_up, exchange


class Bucket:
    """A layer of the whole model, flattened, and the slice that this process owns."""

    def __init__(self, parameters, units_of_layer, initial_value, dtype, device, layout):
        """parameters: {name: tensor on the meta device}; units_of_layer: {layer: its columns of a mask};
        initial_value(name): a parameter's values; dtype: of what workers have."""
        unit_of_chunk, sizes = chunks_of(parameters, units_of_layer)
        self.dtype, self.unit_of_chunk = dtype, np.array(unit_of_chunk)
        self.chunk_edges = np.cumsum([0, *sizes])
        self.slice_edges = layout.slice_edges(sum(sizes))
        start, stop = self.slice_edges[layout.my_slice : layout.my_slice + 2].tolist()
        self.my_edges = self.chunk_edges.clip(start, stop) - start  # of chunks, in the slice
        wide = torch.promote_types(dtype, torch.float32)
        self.mean = torch.zeros(stop - start, dtype=wide, device=device)  # of gradients; first their sum
        self.master = torch.empty_like(self.mean)
        self.trainers = []  # [(begin, end, number of workers that train it)] in the slice
        self.pieces = {}  # {name: (where in the flattened parameter, the owned values)}
        for name, where, here in owned_parts(parameters, start, stop):
            self.master[here] = initial_value(name).flatten()[where]
            piece = torch.nn.Parameter(self.master[here])  # an alias, for the optimizer
            piece.grad = self.mean[here]  # also an alias: a push adds to it
            self.pieces[name] = where, piece

    def has(self, mask):
        """Who has which chunk, bool [workers, chunks]; mask: bool [workers, units]."""
        return np.pad(mask, [(0, 0), (0, 1)], constant_values=True)[:, self.unit_of_chunk]  # last: unit -1

    def count_trainers(self, trains, weights):
        """What to divide sums by: the weights of the workers that train."""
        self.trainers = runs_of_equal(np.array(weights) @ self.has(trains), self.my_edges)


class Route:
    """The way of some chunks from their owners to the workers that want them. What comes from the first
    owner, then from the second, and so on, is in the bucket's order: nothing is sorted."""

    def __init__(self, wants, chunk_edges, slice_edges, my_edges, traffic, group=None):
        """wants[r]: the chunks that the worker of process r needs; traffic: a Counter of bytes sent."""
        me, slices = dist.get_rank(group), pairwise(slice_edges.tolist())
        self.from_owners = [int(wants[me] @ np.diff(chunk_edges.clip(a, b))) for a, b in slices]
        self.to_workers = (wants @ np.diff(my_edges)).tolist()
        self.runs = runs(wants, my_edges)  # of what is sent, worker by worker
        self.exchange = partial(exchange, traffic=traffic, group=group)
        self.is_used = wants.any()  # the same everywhere: all processes skip an empty route

    def pull(self, owned, values):
        """Fill `values`, flat and in the parameters' dtype, from what all processes own."""
        owned = owned.to(values.dtype)  # once: torch.cat would convert run by run
        pieces = [owned[a:b] for a, b in self.runs]
        send = torch.cat(pieces) if pieces else owned[:0]
        yield from self.exchange("pull", values, send, self.from_owners, self.to_workers)

    def push(self, gradients, total):
        """Add flat gradients to the owners' `total`, in rank order: so always alike."""
        received = gradients.new_empty(sum(self.to_workers))
        yield from self.exchange("push", received, gradients, self.to_workers, self.from_owners)
        for (a, b), gradient in zip(self.runs, received.split([b - a for a, b in self.runs])):
            total[a:b].add_(gradient)


class Routes:
    """Of a bucket: one of trained values, which workers have first, one of frozen ones."""

    def __init__(self, bucket, trained, frozen, traffic):
        edges = bucket.chunk_edges, bucket.slice_edges, bucket.my_edges
        self.both = [Route(wants, *edges, traffic) for wants in (trained, frozen)]
        self.push_buffer = sum(self.both[0].to_workers)  # elements

    def pull(self, owned, values):
        parts = values.split([sum(route.from_owners) for route in self.both])
        pulls = [route.pull(owned, part) for route, part in zip(self.both, parts) if route.is_used]
        yield from zip_longest(*pulls)  # starts both, then waits for both

    def push(self, gradients, total):
        if self.both[0].is_used:
            yield from self.both[0].push(gradients, total)


class Layout:
    """Who owns what: process r slice r. And how it gets there: by one all_to_all."""

    def __init__(self):
        self.my_slice, self.machines = dist.get_rank(), 1

    def slice_edges(self, size):
        """int64 [slices + 1], for `size` values: equal slices; the last may be shorter."""
        processes = dist.get_world_size()
        return (np.arange(processes + 1) * math.ceil(size / processes)).clip(max=size)

    def routes(self, bucket, trained, frozen, traffic):
        return Routes(bucket, trained, frozen, traffic)

    def exchanges_at_once(self, has):
        """N / p, for bool [workers, units]. A worker has one of every N / p layers, and is never further
        ahead of others. With fewer exchanges under way it would wait for them."""
        return math.ceil(has.size / max(1, has.sum()))

    def finish_oldest(self, under_way):
        """Wait for the first of a deque of exchanges, and remove it."""
        for _ in under_way.popleft():
            pass


class Part:
    """What a worker has of a bucket: views of the flat `values`, trained ones first."""

    def __init__(self, bucket, routes, model, parameters):
        """parameters: {name: parameter of `model`}, so far on the meta device."""
        self.bucket, self.routes = bucket, routes
        self.is_here, self.missing = False, 0  # missing: gradients that are to come
        in_order = sorted(parameters.items(), key=lambda item: not item[1].requires_grad)
        sizes, self.trained = [like.numel() for _, like in in_order], []
        self.values = torch.empty(sum(sizes), dtype=bucket.dtype, device=bucket.master.device)
        for (name, like), view in zip(in_order, self.values.split(sizes)):
            parameter = torch.nn.Parameter(view.view(like.shape), requires_grad=like.requires_grad)
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, parameter)
            if parameter.requires_grad:
                self.trained.append(parameter)
        self.resize(0)  # until the first turn

    def resize(self, nbytes):
        """Allocate the parameters, or with 0 free them. The tensor objects stay."""
        storage = self.values.untyped_storage()
        if storage.nbytes() != nbytes:  # resize_ copies even to the same size
            storage.resize_(nbytes)

    def pull(self):
        yield from self.routes.pull(self.bucket.master, self.values)
        self.is_here = True

    def push(self):
        """Send the gradients, and free them. The memory of the weights is the buffer."""
        gradients = self.values.data[: sum(p.numel() for p in self.trained)]  # .data: unseen by autograd
        if self.trained:
            each = (torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained)
            torch.cat([gradient.flatten() for gradient in each], out=gradients)
        for parameter in self.trained:
            parameter.grad = None
        yield from self.routes.push(gradients, self.bucket.mean)


class Worker:
    """A worker's module, and the order of its exchanges: pulls first to last, each finished just before
    its layer runs; pushes last to first. All workers take part in each."""

    def __init__(self, model, buckets, trains, reads, layout, traffic):
        """model: on the meta device. trains, reads: bool [processes, units], in this turn."""
        self.model, self.layout, self.parts = model, layout, []
        self.pulls_at_once, self.pushes_at_once = map(layout.exchanges_at_once, (reads, trains))
        self.unpulled, self.unpushed = deque(), []  # parts, first to last
        self.pulling, self.pushing = deque(), deque()  # exchanges under way, oldest first
        modules, parameters = dict(model.named_modules()), by_bucket(model)
        for name, bucket in buckets.items():
            trained, frozen = bucket.has(trains), bucket.has(reads) & ~bucket.has(trains)
            part = Part(bucket, layout.routes(bucket, trained, frozen, traffic), model, parameters[name])
            self.parts.append(part)
            # weak: autograd holds the hooks, which would keep the weights alive
            me, weak_part = weakref.proxy(self), weakref.proxy(part)
            if name in modules:
                modules[name].register_forward_pre_hook(partial(Worker.wait_for, me, weak_part))
            for parameter in part.trained:
                hook = partial(Worker._count_gradient, me, weak_part)
                parameter.register_post_accumulate_grad_hook(hook)

    def begin(self, passes=1):
        """Allocate the parameters, and start to pull them for so many passes."""
        self.unpulled, self.unpushed = deque(self.parts), list(self.parts)
        self.pulling, self.pushing = deque(), deque()
        self.model.zero_grad()  # an interrupted turn may have left some
        for part in self.parts:
            part.resize(part.values.nbytes)
            part.is_here, part.missing = False, passes * len(part.trained)
        self._start_pulls()

    def _start_pulls(self):
        while self.unpulled and len(self.pulling) < self.pulls_at_once:
            self.pulling.append(self.unpulled.popleft().pull())
            next(self.pulling[-1], None)  # starts it; None: nobody reads this part

    def wait_for(self, part, *_):
        """Wait until a part is there, while the next ones are on their way."""
        while not part.is_here:
            self.layout.finish_oldest(self.pulling)
            self._start_pulls()

    def _count_gradient(self, part, parameter):
        part.missing -= 1
        if part.missing < 0:
            raise RuntimeError("more backward passes than turn(worker, passes) was told of")
        while self.unpushed and self.unpushed[-1].missing == 0:  # so is a part that it does not train
            self._start_push()

    def _start_push(self):
        if len(self.pushing) == self.pushes_at_once:
            self.layout.finish_oldest(self.pushing)
        self.pushing.append(self.unpushed.pop().push())
        next(self.pushing[-1], None)

    def end(self, free):
        """Push what has not left yet, wait for it, and free the parameters if asked to."""
        self.wait_for(self.parts[-1])  # where no pass was made
        while self.unpushed:
            self._start_push()
        while self.pushing:
            self.layout.finish_oldest(self.pushing)
        for part in self.parts if free else ():
            part.resize(0)


class SDP:
    """One model, trained by len(mask) workers. K of them take turns on a process: r K to r K + K - 1 on r.
    build(units): as model.build. initial_value(whole model, name): float values on the CPU.
    optimizer(groups): an elementwise torch.optim.Optimizer. units, mask, mode: see masks.py. dtype: of
    weights, gradients and traffic; owners keep at least float32. weights: the factor
    of each worker's loss; their mean is 1."""

    def __init__(
        self, build, initial_value, optimizer, units, mask, mode,
        dtype=torch.float32, device="cpu", layout=None, weights=None,
    ):  # fmt: skip
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self.build, self.units, self.dtype, self.device = build, units, dtype, torch.device(device)
        self.layout, self.weights = layout or Layout(), weights or [1.0] * len(mask)
        self.traffic = Counter()  # bytes sent: {"pull": ..., "push": ...}
        with torch.device("meta"):
            whole = build({})
        self.buckets, first = {}, partial(initial_value, whole)
        for name, parameters in by_bucket(whole).items():
            self.buckets[name] = Bucket(parameters, columns(units), first, dtype, device, self.layout)
        pieces = [item for bucket in self.buckets.values() for item in bucket.pieces.items()]
        matrices = [piece for name, (_, piece) in pieces if whole.get_parameter(name).dim() > 1]
        vectors = [piece for name, (_, piece) in pieces if whole.get_parameter(name).dim() == 1]
        self.optimizer = optimizer([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
        self.change(mask, mode)

    def change(self, mask, mode):
        """Train under this mask and mode. Nothing moves: the next pull serves new holders."""
        self.trains, self.reads = roles(mode, mask)
        for bucket in self.buckets.values():
            bucket.count_trainers(self.trains, self.weights)
        self.workers, self.played = {}, set()  # first let go of the old ones
        turns = len(mask) // self.processes
        for turn in range(turns):
            number = self.rank * turns + turn
            trains, reads = self.trains[turn::turns], self.reads[turn::turns]  # in this turn
            model = self.make_module(number)
            worker = Worker(model, self.buckets, trains, reads, self.layout, self.traffic)
            self.workers[number] = worker

    def make_module(self, worker):
        """A worker's module, on the meta device."""
        with torch.device("meta"):
            return self.build(count_units(self.units, self.trains[worker], self.reads[worker]))

    @contextmanager
    def turn(self, worker, passes=1):
        """`with engine.turn(worker) as model:` gives its module, with fresh values. The last of so many
        passes sends the gradients, which add up. All processes take their turns in order."""
        self.workers[worker].begin(passes)
        try:
            yield self.workers[worker].model
            self.workers[worker].end(free=len(self.workers) > 1)  # the next worker needs the room
        except BaseException:  # also Ctrl-C in a notebook: half a turn must not count
            self.discard()
            raise
        self.played.add(worker)

    def discard(self):
        """Forget what this process has gathered. All workers, also of others, play again."""
        self.played = set()
        for bucket in self.buckets.values():
            bucket.mean.zero_()

    def average(self):
        """Turn the owners' sums into means over the workers that train."""
        for bucket in self.buckets.values():
            for begin, end, trainers in bucket.trainers:
                bucket.mean[begin:end] /= trainers

    def step(self, lr, clip=0.0, *numbers):
        """Average, clip to the norm `clip` (0: do not), and update; but not where the norm or one of the
        numbers, such as the loss, is not finite. Returns floats: the norm of the averaged gradient, and each
        number's sum over the processes. Raises RuntimeError where a turn is missing."""
        if self.played != set(self.workers):
            raise RuntimeError("step: workers have not finished their turns; all play again")
        self.average()
        squares = torch.stack([bucket.mean.dot(bucket.mean) for bucket in self.buckets.values()])
        squares, *sums = add_up([squares.double().sum(), *numbers])  # the CPU waits here first
        norm = squares**0.5
        if np.isfinite([norm, *sums]).all():
            for bucket in self.buckets.values() if clip else ():
                bucket.mean *= min(1.0, clip / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.discard()
        return norm, *sums
