"""The engine of Subnetwork Data Parallelism: owners, pull, push, step.

Every parameter has one *owner*, whatever the masks. A *bucket*, one layer's parameters end to end, is cut
into equal slices: process r keeps the master copy and the optimizer state of slice r. A step is

    pull    owners send each value to the workers that read it
    forward / backward on each worker's own rows of the batch
    push    workers send each gradient to its owner, who sums over the workers that train it
    step    owners divide by the number of those workers, clip, and update their slices

Pull and push are one all_to_all of a bucket each. No activation moves. A process plays its workers in turn:

    engine = SDP(build, initial_value, optimizer, units, mask, mode)
    for worker in engine.workers:
        with engine.turn(worker) as model:
            model(x, y).backward()
    engine.step(lr)

Needs an initialised torch.distributed. Read next: data.py, then train.py.
"""

import weakref
from collections import Counter, defaultdict
from contextlib import contextmanager
from functools import partial

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


class Bucket:
    """One layer of the whole model, flattened, and the slice of it that this process owns. Chunk c lies from
    chunk_edges[c] to chunk_edges[c + 1] and is of unit_of_chunk[c]. Process r owns what lies from
    slice_edges[r] to slice_edges[r + 1]. my_edges are the chunks' edges counted from the start of this
    process's slice; what lies outside of it has no length there."""

    def __init__(self, parameters, units_of_layer, initial_value, dtype, device):
        """parameters: {name: tensor on the meta device}; units_of_layer: {layer: its columns of a mask};
        initial_value(name) is asked for parameters that reach into the slice, one after another."""
        unit_of_chunk, sizes = chunks_of(parameters, units_of_layer)
        self.unit_of_chunk, self.chunk_edges = np.array(unit_of_chunk), np.cumsum([0, *sizes])
        rank, processes, size = dist.get_rank(), dist.get_world_size(), sum(sizes)
        self.slice_edges = np.minimum(np.arange(processes + 1) * -(-size // processes), size)
        start, stop = self.slice_edges[rank : rank + 2].tolist()
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

    def count_trainers(self, trains):
        """Find out by how many the sum of the gradients is to be divided; trains: bool [workers, units]."""
        trainers = self.has(trains).sum(axis=0)  # [chunks]
        self.trainers = []
        for number in np.unique(trainers).tolist():
            self.trainers += [(a, b, number) for a, b in runs(trainers[None] == number, self.my_edges)]


class Route:
    """What moves between a bucket's owners and the workers that play now; has: bool [processes, chunks].
    Slices are cut in the order of the chunks: so what a worker has of slice 0, then of slice 1, and so on,
    is all that it has in the bucket's order. Nothing needs sorting, in either direction."""

    def __init__(self, bucket, has):
        mine, edges, cuts = has[dist.get_rank()], bucket.chunk_edges, bucket.slice_edges.tolist()
        # how many elements this worker has of each owner's slice, and each worker of this owner's slice
        self.by_owner = [int(mine @ np.diff(edges.clip(a, b))) for a, b in zip(cuts, cuts[1:])]
        self.by_worker = (has @ np.diff(bucket.my_edges)).tolist()
        self.runs = runs(has, bucket.my_edges)  # in this owner's slice, worker by worker
        self.own_edges = np.cumsum([0, *mine * np.diff(edges)])  # of the chunks, in what this worker has


class Part:
    """What a worker has of a bucket: parameters, views of the flat `values`, the trained ones first."""

    def __init__(self, bucket, trains, reads, model, parameters, traffic, dtype):
        """trains, reads: bool [processes, chunks]; parameters: {name: parameter of `model`}, on the meta
        device until now; traffic: a Counter of the bytes sent."""
        self.bucket, self.traffic, self.rank = bucket, traffic, dist.get_rank()
        self.pull_route, self.push_route = Route(bucket, reads), Route(bucket, trains)
        self.missing = 0  # gradients that are still to come in this turn
        me = [self.rank]
        trained, frozen = (runs(has[me], self.pull_route.own_edges) for has in (trains, reads & ~trains))
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
        """Fill the parameters with the owners' values: a generator, which stops while they are under way."""
        slices = (self.bucket.master[a:b] for a, b in self.pull_route.runs)
        send = self.values.new_empty(sum(self.pull_route.by_worker))
        torch.cat([self.bucket.master[:0], *slices], out=send)
        received = torch.empty_like(self.values) if self.order else self.values
        yield from self._exchange("pull", received, send, self.pull_route.by_owner, self.pull_route.by_worker)
        if self.order:
            torch.cat([received[a:b] for a, b in self.order], out=self.values)

    def push(self):
        """Send the gradients to their owners, and free them: a generator, which stops while they are under
        way. They leave from the memory of the weights, which nothing needs any more. Owners add up in rank
        order and in their own precision, so that each run gives the same sum."""
        gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained)
        send = self.values.data[: sum(p.numel() for p in self.trained)]  # .data: autograd need not know
        torch.cat([send[:0], *(gradient.flatten() for gradient in gradients)], out=send)
        for parameter in self.trained:
            parameter.grad = None
        received = send.new_empty(sum(self.push_route.by_worker))
        yield from self._exchange("push", received, send, self.push_route.by_worker, self.push_route.by_owner)
        sizes = [b - a for a, b in self.push_route.runs]
        for (a, b), gradient in zip(self.push_route.runs, received.split(sizes)):
            self.bucket.mean[a:b] += gradient

    def _exchange(self, kind, received, send, received_splits, send_splits):
        """One all_to_all, under way while this generator stops at the size of its buffer, in bytes. gloo has
        been silently wrong with CUDA tensors (https://github.com/pytorch/pytorch/pull/170812): they go
        through CPU buffers."""
        self.traffic[kind] += (sum(send_splits) - send_splits[self.rank]) * send.element_size()
        through_cpu = send.is_cuda and dist.get_backend() == "gloo"
        to = torch.empty_like(received, device="cpu") if through_cpu else received
        send = send.cpu() if through_cpu else send
        work = dist.all_to_all_single(to, send, received_splits, send_splits, async_op=True)
        yield received.nbytes
        with peers():
            work.wait()
        if through_cpu:
            received.copy_(to)


def wait_for(exchange):
    """Wait for a pull or push that is under way, and end it: this frees its buffers."""
    for _ in exchange:
        pass


class Worker:
    """The module of one worker, and the order in which it pulls and pushes. All workers take part in every
    collective, also who has nothing of a bucket, in one order: pulls first bucket to last, each finished just
    before its layer runs; pushes last to first, each sent when its gradients are complete."""

    def __init__(self, model, buckets, trains, reads, traffic, dtype):
        """model: on the meta device. trains, reads: bool [processes, units], of the workers that play now."""
        self.model, self.parts, self.dry = model, [], False
        self.fetched, self.pulling = 0, ()  # parts that are there, and the pull that is under way
        self.unsent, self.pushing = [], ()  # parts that wait for gradients, and the push that is under way
        self.push_bytes = 0  # of the push under way
        self.grad_bytes = 0  # of all gradients, at their most
        modules, parameters = dict(model.named_modules()), by_bucket(model)
        for number, (name, bucket) in enumerate(buckets.items(), start=1):
            has = bucket.has(trains), bucket.has(reads)
            part = Part(bucket, *has, model, parameters[name], traffic, dtype)
            self.parts.append(part)
            if name in modules:
                modules[name].register_forward_pre_hook(partial(Worker.fetch, weakref.proxy(self), number))
            for parameter in part.trained:
                # weak: autograd hides its references from the garbage collector, and nothing would be freed
                hook = partial(Worker._count_gradient, weakref.proxy(self), weakref.proxy(part))
                parameter.register_post_accumulate_grad_hook(hook)

    def begin(self, passes=1):
        """Allocate the parameters, if they are not, and start to pull them for so many backward passes."""
        for part in self.parts:
            part.resize(part.values.nbytes)
            part.missing = passes * len(part.trained)
        self.fetched, self.unsent = 0, list(self.parts)
        self._start_pull()

    def _start_pull(self):
        if self.fetched < len(self.parts):
            self.pulling = self.parts[self.fetched].pull()
            next(self.pulling)

    def fetch(self, needed, *_):
        """Wait until so many parts are there, and start to pull the next one."""
        while self.fetched < needed and not self.dry:
            wait_for(self.pulling)
            self.fetched += 1
            self._start_pull()

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
        self.grad_bytes = max(self.grad_bytes, alive + self.push_bytes)
        wait_for(self.pushing)
        self.pushing = self.unsent.pop().push()
        self.push_bytes = next(self.pushing)

    def end(self, free):
        """Push what has not left yet, wait for the last of it, and free the parameters if asked to."""
        while self.unsent:
            self._push()
        wait_for(self.pushing)
        self.push_bytes = 0
        for part in self.parts if free else ():
            part.resize(0)

    @contextmanager
    def dry_run(self):
        """`with worker.dry_run() as model:` the module full of zeros, for which nothing moves."""
        for part in self.parts:
            part.resize(part.values.nbytes)
            part.values.zero_()
        self.dry = True
        yield self.model
        self.dry = False
        for part in self.parts:
            part.resize(0)


class SDP:
    """Trains one model with len(mask) workers on the processes of the default group. Process r plays the
    workers r, r + P, ... build(units): as model.build. initial_value(whole model, name of a parameter):
    float tensor on the CPU. optimizer(groups): an elementwise torch.optim.Optimizer. units, mask, mode: see
    masks.py. dtype: of weights, gradients and traffic; owners keep at least float32."""

    def __init__(self, build, initial_value, optimizer, units, mask, mode, dtype=torch.float32, device="cpu"):
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self.build, self.units, self.dtype, self.device = build, units, dtype, torch.device(device)
        self.traffic = Counter()  # bytes sent to other processes in all turns, for "pull" and "push"
        with torch.device("meta"):
            whole = build({})
        numbers, values = columns(units), partial(initial_value, whole)
        self.buckets = {n: Bucket(p, numbers, values, dtype, device) for n, p in by_bucket(whole).items()}
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
            bucket.count_trainers(self.trains)
        self.workers = {}  # first let go of the old ones
        for first in range(0, len(mask), self.processes):  # of the workers that play at the same time
            trained, read = (role[first : first + self.processes] for role in (self.trains, reads))
            mine, frozen = trained[self.rank], (read & ~trained)[self.rank]  # bool [units] each
            layers = columns(self.units).items()
            with torch.device("meta"):
                model = self.build({layer: (int(mine[n].sum()), int(frozen[n].sum())) for layer, n in layers})
            worker = Worker(model, self.buckets, trained, read, self.traffic, self.dtype)
            self.workers[first + self.rank] = worker

    @contextmanager
    def turn(self, worker, passes=1):
        """`with engine.turn(worker) as model:` plays a worker: its module, with fresh values, for so many
        passes. Gradients add up, and the last pass sends them. All processes take their turns in order."""
        self.workers[worker].begin(passes)
        yield self.workers[worker].model
        self.workers[worker].end(free=len(self.workers) > 1)  # the next worker needs the room

    @contextmanager
    def whole(self):
        """`with engine.whole() as model:` gives every process the whole model for a while, to evaluate it."""
        everything = np.ones((self.processes, len(self.units)), bool)
        with torch.device("meta"):
            model = self.build({}).requires_grad_(False)
        reader = Worker(model, self.buckets, everything, everything, Counter(), self.dtype)
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
        """What a worker takes of live tensors, in bytes. Gradients are its own at their most, with those on
        their way, and the owned slices of the mean; "optimizer_bytes" include the master copy."""
        worker, buckets = self.workers[worker], self.buckets.values()
        moments = [t for state in self.optimizer.state.values() for t in state.values() if t.dim() > 0]
        return {
            "held_params": sum(p.numel() for part in worker.parts for p in part.trained),
            "weight_bytes": sum(part.values.nbytes for part in worker.parts),
            "grad_bytes": worker.grad_bytes + sum(bucket.mean.nbytes for bucket in buckets),
            "optimizer_bytes": sum(t.nbytes for t in (*moments, *(bucket.master for bucket in buckets))),
        }
