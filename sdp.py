"""The engine of Subnetwork Data Parallelism: owners, pull, push, step.

Every parameter has one *owner*, whatever the masks. A *bucket*, one layer's parameters end to end, is cut
into slices: each process keeps the master copy and the optimizer state of one. A step is

    pull    owners send each value to the workers that read it
    forward / backward on each worker's own rows of the batch
    push    workers send each gradient to its owner, who sums over the workers that train it
    step    owners divide by the number of those workers, clip, and update their slices

Pull and push are one all_to_all of a bucket each, or two *hops* where there are several machines: across
and inside. No activation moves. A process plays its workers in turn:

    engine = SDP(build, initial_value, optimizer, units, mask, mode)
    for worker in engine.workers:
        with engine.turn(worker) as model:
            model(x, y).backward()
    engine.step(lr)

Needs an initialised torch.distributed. Read next: data.py, then train.py.
"""

import math
import weakref
from collections import Counter, defaultdict
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist

from masks import columns, roles


class PeerLost(RuntimeError):
    """Another process has ended, has stalled, or cannot be reached."""


@contextmanager
def peers():
    """`with peers():` around a collective that other processes have to take part in. Raises PeerLost."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(str(error)) from error


def add_up(numbers):
    """A list of floats, each summed over the processes. NCCL wants them on the GPU, gloo on the CPU."""
    totals = torch.tensor(numbers, dtype=torch.float64)
    totals = totals.cuda() if dist.get_backend() == "nccl" else totals
    with peers():
        dist.all_reduce(totals)
    return totals.tolist()


def bucket_of(name):
    """The bucket of a parameter: "blocks.3" for "blocks.3.mlp.up", "embedding" for "embedding.weight"."""
    return ".".join(name.split(".")[: 2 if name.startswith("blocks.") else 1])


def by_bucket(model):
    """{bucket: {name: parameter}}, in the model's order."""
    buckets = defaultdict(dict)
    for name, parameter in model.named_parameters():
        buckets[bucket_of(name)][name] = parameter
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


class Layout:
    """Machines with equally many processes, in the order of the ranks. Where both are several, a process is
    in two groups: `across`, those at the same place of all machines, and `inside`, those of its machine.
    Slices are numbered place by place: so what a process receives from the places of its machine, one after
    another, is in the bucket's order."""

    def __init__(self, machines=1, timeout=None, capacity=None):
        """timeout: of the groups, a timedelta; capacity: a whole number of each worker (default: equal)."""
        rank, processes = dist.get_rank(), dist.get_world_size()
        slices = ranks = np.arange(processes).reshape(machines, -1)  # [machines, places]
        self.machines, (self.machine, self.place) = machines, divmod(rank, processes // machines)
        self.two_levels = 1 < machines < processes
        if self.two_levels:
            self.inside, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout)
            self.across, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout)
            slices = ranks.T
        self.my_slice = slices.flatten().tolist().index(rank)
        of_processes = np.reshape(capacity or [1] * processes, (processes, -1)).sum(axis=1)
        self.capacity = of_processes[slices.flatten()]  # [slices]


class Bucket:
    """One layer of the whole model, flattened, and the slice of it that this process owns. Chunk c lies from
    chunk_edges[c] to chunk_edges[c + 1] and is of unit_of_chunk[c]. Slice s lies from
    slice_edges[s] to slice_edges[s + 1]. my_edges are the chunks' edges counted from the start of the owned
    slice; what lies outside of it has no length there."""

    def __init__(self, parameters, units_of_layer, initial_value, dtype, device, layout):
        """parameters: {name: tensor on the meta device}; units_of_layer: {layer: its columns of a mask};
        initial_value(name) is asked for parameters that reach into the slice, one after another."""
        unit_of_chunk, sizes = chunks_of(parameters, units_of_layer)
        self.unit_of_chunk, self.chunk_edges = np.array(unit_of_chunk), np.cumsum([0, *sizes])
        shares = np.cumsum([0, *layout.capacity])
        self.slice_edges = (shares * math.ceil(sum(sizes) / shares[-1])).clip(max=sum(sizes))
        start, stop = self.slice_edges[layout.my_slice : layout.my_slice + 2].tolist()
        self.my_edges = self.chunk_edges.clip(start, stop) - start
        wide = torch.promote_types(dtype, torch.float32)
        self.master = torch.empty(stop - start, dtype=wide, device=device)
        self.mean = torch.zeros_like(self.master)  # the gradient: a sum while it comes in, then the mean
        self.trainers = []  # [(begin, end, by how many workers what lies between is trained)] in the slice
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.pieces = {}  # {name: (the owned part of the flattened parameter as a slice, that part itself)}
        begin = 0
        for name, parameter in parameters.items():
            a, b = max(begin, start), min(begin + parameter.numel(), stop)
            if a < b:
                where = slice(a - begin, b - begin)
                self.master[a - start : b - start] = initial_value(name).flatten()[where]
                piece = torch.nn.Parameter(self.master[a - start : b - start])
                piece.grad = self.mean[a - start : b - start]
                self.pieces[name] = where, piece
            begin += parameter.numel()

    def has(self, mask):
        """bool [workers, chunks]: who has which chunk under a mask, bool [workers, units]."""
        return np.column_stack([mask, np.full(len(mask), True)])[:, self.unit_of_chunk]  # -1: the last column

    def count_trainers(self, trains, weights):
        """What to divide sums by: the weights, [workers], of who trains; trains: bool [workers, units]."""
        trainers = np.array(weights) @ self.has(trains)  # [chunks]
        self.trainers = []
        for number in np.unique(trainers).tolist():
            self.trainers += [(a, b, number) for a, b in runs(trainers[None] == number, self.my_edges)]


class Hop:
    """One all_to_all of a bucket, from who has values to who wants them; a push goes the other way. Each
    member of a group has what lies between two `cuts`, in the order of the chunks: so what a member gets from
    the first, then from the second, and so on, is in the bucket's order, and nothing needs to be sorted."""

    def __init__(self, group, me, crosses, edges, cuts, source_edges, wants):
        """me: this process's number in the group; crosses: are the others on other machines? edges: of the
        chunks; source_edges: of the chunks in what this member has; wants: bool [members, chunks]."""
        self.group, self.me, self.crosses = group, me, crosses
        self.layers = 2 if crosses and group else 1  # of computing, while it is under way
        # how many elements this member gets from each other one, and each other one from it
        self.received = [int(wants[me] @ np.diff(edges.clip(a, b))) for a, b in pairwise(cuts.tolist())]
        self.sent = (wants @ np.diff(source_edges)).tolist()
        self.runs = runs(wants, source_edges)  # what is sent, one member after another
        self.edges = np.cumsum([0, *wants[me] * np.diff(edges)])  # of the chunks, in what this member gets


def hops_of(bucket, has, layout):
    """From the owners to the workers that play now; has: bool [processes, chunks], what each of them has. In
    two levels a value crosses once to each machine where anybody has it."""
    machines, place, edges, cuts = layout.machines, layout.place, bucket.chunk_edges, bucket.slice_edges
    if not layout.two_levels:
        return [Hop(None, dist.get_rank(), machines > 1, edges, cuts, bucket.my_edges, has)]
    by_machine = has.reshape(machines, -1, has.shape[1])  # [machines, places, chunks]
    group, cuts_here = layout.across, cuts[place * machines : (place + 1) * machines + 1]  # of this place
    edges_here, wants = edges.clip(cuts_here[0], cuts_here[-1]), by_machine.any(axis=1)
    across = Hop(group, layout.machine, True, edges_here, cuts_here, bucket.my_edges, wants)
    wants = by_machine[layout.machine]
    return [across, Hop(layout.inside, place, False, edges, cuts[::machines], across.edges, wants)]


class Part:
    """What a worker has of a bucket: parameters, views of the flat `values`, the trained ones first."""

    def __init__(self, bucket, trains, reads, model, parameters, traffic, dtype, layout):
        """trains, reads: bool [processes, chunks]; parameters: {name: parameter of `model`}, on the meta
        device until now; traffic: a Counter of the bytes sent."""
        self.bucket, self.traffic = bucket, traffic
        self.pull_hops, self.push_hops = hops_of(bucket, reads, layout), hops_of(bucket, trains, layout)
        self.missing = 0  # gradients that are still to come in this turn
        me, edges = [dist.get_rank()], self.pull_hops[-1].edges
        trained, frozen = (runs(has[me], edges) for has in (trains, reads & ~trains))
        self.order = trained + frozen if trained and frozen else None  # a pull brings them mixed up
        meta = sorted(parameters.items(), key=lambda item: not item[1].requires_grad)
        sizes = [like.numel() for _, like in meta]
        self.values = torch.empty(sum(sizes), dtype=dtype, device=bucket.master.device)
        self.trained = []
        for (name, like), view in zip(meta, self.values.split(sizes)):
            parameter = torch.nn.Parameter(view.view(like.shape), requires_grad=like.requires_grad)
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, parameter)
            if parameter.requires_grad:
                self.trained.append(parameter)
        self.resize(0)  # until the first turn

    def resize(self, nbytes):
        """Allocate the parameters, or with 0 free them; the tensors stay."""
        self.values.untyped_storage().resize_(nbytes)

    def pull(self):
        """Fill the parameters with the owners' values: a generator, which stops while a hop is under way."""
        values = self.bucket.master
        for hop in self.pull_hops:
            send = self.values.new_empty(sum(hop.sent))
            torch.cat([values[:0], *(values[a:b] for a, b in hop.runs)], out=send)
            straight = hop is self.pull_hops[-1] and not self.order
            values = self.values if straight else self.values.new_empty(sum(hop.received))
            yield from self._exchange("pull", hop, values, send, hop.received, hop.sent)
        if self.order:
            torch.cat([values[a:b] for a, b in self.order], out=self.values)

    def push(self):
        """Send the gradients to their owners, and free them: a generator, which stops while a hop is under
        way. They leave from the memory of the weights, which nothing needs any more. Each hop adds up in rank
        order and in the owners' precision, so that each run gives the same sum."""
        gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained)
        total = self.values.data[: sum(p.numel() for p in self.trained)]  # .data: autograd need not know
        torch.cat([total[:0], *(gradient.flatten() for gradient in gradients)], out=total)
        for parameter in self.trained:
            parameter.grad = None
        for hop in reversed(self.push_hops):
            send = total.to(self.values.dtype)
            received = send.new_empty(sum(hop.sent))
            yield from self._exchange("push", hop, received, send, hop.sent, hop.received)
            mean = self.bucket.mean
            total = mean if hop is self.push_hops[0] else mean.new_zeros(sum(self.push_hops[0].received))
            for (a, b), gradient in zip(hop.runs, received.split([b - a for a, b in hop.runs])):
                total[a:b] += gradient

    def _exchange(self, kind, hop, received, send, received_splits, send_splits):
        """One all_to_all, under way while this generator stops at the size of its buffer, in bytes. gloo has
        been silently wrong with CUDA tensors (https://github.com/pytorch/pytorch/pull/170812): they go
        through CPU buffers."""
        sent = (sum(send_splits) - send_splits[hop.me]) * send.element_size()
        self.traffic.update({kind: sent, "between_machines": sent * hop.crosses})
        through_cpu = send.is_cuda and dist.get_backend() == "gloo"
        to = torch.empty_like(received, device="cpu") if through_cpu else received
        send = send.cpu() if through_cpu else send
        work = dist.all_to_all_single(to, send, received_splits, send_splits, group=hop.group, async_op=True)
        for _ in range(hop.layers):
            yield received.nbytes
        with peers():
            work.wait()
        if through_cpu:
            received.copy_(to)


def advance(under_way, *more):
    """Let what is under way go on, oldest first, and start `more`. As it is called once a layer, a hop across
    has the time of two. Returns what has not ended, as [(exchange, bytes of its buffer)]; so is under_way."""
    exchanges = [exchange for exchange, _ in under_way] + list(more)
    buffers = [(exchange, next(exchange, None)) for exchange in exchanges]
    return [(exchange, nbytes) for exchange, nbytes in buffers if nbytes is not None]


class Worker:
    """The module of one worker, and the order in which it pulls and pushes. All workers take part in every
    collective, also who has nothing of a bucket, in one order: pulls first bucket to last, each finished just
    before its layer runs; pushes last to first, each sent when its gradients are complete."""

    def __init__(self, model, buckets, trains, reads, traffic, dtype, layout):
        """model: on the meta device. trains, reads: bool [processes, units], of the workers that play now."""
        self.model, self.parts, self.dry = model, [], False
        self.fetched, self.unsent = 0, []  # how many parts are there, and those that wait for gradients
        self.pulling, self.pushing, self.grad_bytes = [], [], 0  # see `advance`; of gradients at their most
        modules, parameters = dict(model.named_modules()), by_bucket(model)
        for number, (name, bucket) in enumerate(buckets.items(), start=1):
            has = bucket.has(trains), bucket.has(reads)
            part = Part(bucket, *has, model, parameters[name], traffic, dtype, layout)
            self.parts.append(part)
            if name in modules:
                modules[name].register_forward_pre_hook(partial(Worker.fetch, weakref.proxy(self), number))
            for parameter in part.trained:
                # weak: autograd hides its references from the garbage collector, and nothing would be freed
                hook = partial(Worker._count_gradient, weakref.proxy(self), weakref.proxy(part))
                parameter.register_post_accumulate_grad_hook(hook)
        self.ahead = sum(hop.layers for hop in self.parts[0].pull_hops)  # from the start of a pull to its end

    def begin(self, passes=1, dry=False):
        """Allocate the parameters, and start to pull them for so many passes; if dry, let them be zeros."""
        for part in self.parts:
            part.resize(part.values.nbytes)
            part.missing = passes * len(part.trained)
            if dry:
                part.values.zero_()
        self.dry, self.unsent = dry, [] if dry else list(self.parts)
        self.fetched = -self.ahead
        self.fetch(0)

    def fetch(self, needed, *_):
        """Wait until so many parts are there, while the next ones are on their way."""
        while self.fetched < needed and not self.dry:
            coming = self.parts[self.fetched + self.ahead :][:1]
            self.pulling = advance(self.pulling, *(part.pull() for part in coming))
            self.fetched += 1

    def _count_gradient(self, part, parameter):
        if self.dry:
            parameter.grad = None
            return
        part.missing -= 1
        if part.missing < 0:
            raise RuntimeError("more backward passes than turn(worker, passes) was told of")
        while self.unsent and self.unsent[-1].missing == 0:  # also parts of which this worker has nothing
            self._push()

    def _push(self):
        alive = sum(p.grad.nbytes for part in self.unsent for p in part.trained if p.grad is not None)
        self.grad_bytes = max(self.grad_bytes, alive + sum(nbytes for _, nbytes in self.pushing))
        self.pushing = advance(self.pushing, self.unsent.pop().push())

    def end(self, free):
        """Push what has not left yet, wait for the last of it, and free the parameters if asked to."""
        while self.unsent:
            self._push()
        while self.pushing:
            self.pushing = advance(self.pushing)
        for part in self.parts if free else ():
            part.resize(0)


class SDP:
    """Trains one model with len(mask) workers, as many on each process: with K, process r plays r K to
    r K + K - 1. build(units): as model.build. initial_value(whole model, name of a parameter): float tensor
    on the CPU. optimizer(groups): an elementwise torch.optim.Optimizer. units, mask, mode: see masks.py.
    dtype: of weights, gradients and traffic; owners keep at least float32. layout: a Layout. weights: a list,
    by what the caller multiplies each worker's loss; their mean is 1."""

    def __init__(self, build, initial_value, optimizer, units, mask, mode, dtype, device, layout, weights):
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self.build, self.units, self.dtype, self.device = build, units, dtype, torch.device(device)
        self.layout, self.weights, self.traffic = layout, weights, Counter()  # of bytes, see Part._exchange
        with torch.device("meta"):
            whole = build({})
        more = columns(units), partial(initial_value, whole), dtype, device, layout
        self.buckets = {name: Bucket(parameters, *more) for name, parameters in by_bucket(whole).items()}
        pieces = {n: piece for bucket in self.buckets.values() for n, (_, piece) in bucket.pieces.items()}
        matrices = [piece for name, piece in pieces.items() if whole.get_parameter(name).dim() > 1]
        vectors = [piece for name, piece in pieces.items() if whole.get_parameter(name).dim() == 1]
        self.optimizer = optimizer([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
        self.workers, self.trains = {}, None
        self.change(mask, mode)

    def change(self, mask, mode):
        """From the next step on, train under this mask and mode, by as many workers. Nothing has to move:
        owners keep what they own, and the next pull brings it to the new holders."""
        self.trains, reads = roles(mode, mask)
        for bucket in self.buckets.values():
            bucket.count_trainers(self.trains, self.weights)
        self.workers, turns = {}, len(mask) // self.processes  # first let go of the old ones
        for turn in range(turns):
            trained, read = self.trains[turn::turns], reads[turn::turns]  # of those that play together
            mine, frozen = trained[self.rank], (read & ~trained)[self.rank]  # bool [units] each
            layers = columns(self.units).items()
            with torch.device("meta"):
                model = self.build({layer: (int(mine[n].sum()), int(frozen[n].sum())) for layer, n in layers})
            worker = Worker(model, self.buckets, trained, read, self.traffic, self.dtype, self.layout)
            self.workers[self.rank * turns + turn] = worker

    @contextmanager
    def turn(self, worker, passes=1, dry=False):
        """`with engine.turn(worker) as model:` plays a worker: its module, with fresh values, for so many
        passes. Gradients add up, and the last pass sends them. All processes take their turns in order. If
        dry, it has zeros, and nothing is sent."""
        self.workers[worker].begin(passes, dry)
        yield self.workers[worker].model
        self.workers[worker].end(free=dry or len(self.workers) > 1)  # the next worker needs the room

    @contextmanager
    def whole(self):
        """`with engine.whole() as model:` gives every process the whole model for a while, to evaluate it."""
        everything = np.ones((self.processes, len(self.units)), bool)
        with torch.device("meta"):
            model = self.build({}).requires_grad_(False)
        reader = Worker(model, self.buckets, everything, everything, Counter(), self.dtype, self.layout)
        reader.begin()
        reader.fetch(len(reader.parts))
        yield model.eval()

    def average(self):
        """Turn the owners' sums into means over the workers that train each parameter."""
        for bucket in self.buckets.values():
            for begin, end, trainers in bucket.trainers:
                bucket.mean[begin:end] /= trainers

    def step(self, lr, clip=0.0, *numbers):
        """Average, clip to the norm `clip` (0: do not), and update; but leave all as it was where the norm
        or a number, such as the loss, is infinite or NaN. Returns, as floats, the norm of the whole model's
        averaged gradient, and each number's sum over the processes."""
        self.average()
        squares = torch.stack([bucket.mean.dot(bucket.mean) for bucket in self.buckets.values()])
        squares, *sums = add_up([squares.cpu().double().sum().item(), *numbers])
        norm = squares**0.5
        if np.isfinite([norm, *sums]).all():
            for bucket in self.buckets.values() if clip else ():
                bucket.mean *= min(1.0, clip / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # these are the owners' sums
        return norm, *sums

    def memory(self, worker):
        """What a worker takes of live tensors, in bytes. Gradients: its own at their most, with those on
        their way, and the owned slices of the mean; "optimizer_bytes" include the master copy."""
        worker, buckets = self.workers[worker], self.buckets.values()
        moments = [t for state in self.optimizer.state.values() for t in state.values() if t.dim() > 0]
        return {
            "held_params": sum(p.numel() for part in worker.parts for p in part.trained),
            "weight_bytes": sum(part.values.nbytes for part in worker.parts),
            "grad_bytes": worker.grad_bytes + sum(bucket.mean.nbytes for bucket in buckets),
            "optimizer_bytes": sum(t.nbytes for t in (*moments, *(bucket.master for bucket in buckets))),
        }
