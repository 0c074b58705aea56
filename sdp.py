"""The engine of Subnetwork Data Parallelism: owners, pull, push, step.

Every parameter has one *owner*, whatever the masks: a *bucket* (one layer's parameters end to end) is cut
into equal slices, and process r keeps the master copy and the optimizer state of slice r. A step is

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
from itertools import accumulate, chain

import numpy as np
import torch
import torch.distributed as dist

from masks import columns, count, roles


def bucket_of(name):
    """The bucket of a parameter: "blocks.3" for "blocks.3.mlp.up", "embedding" for "embedding.weight"."""
    return ".".join(name.split(".")[: 2 if name.startswith("blocks.") else 1])


def add_up(numbers):
    """A list of floats, each summed over the processes. NCCL wants them on the GPU, gloo on the CPU."""
    totals = torch.tensor(numbers, dtype=torch.float64)
    totals = totals.cuda() if dist.get_backend() == "nccl" else totals
    dist.all_reduce(totals)
    return totals.tolist()


class Bucket:
    """One layer of the whole model, flattened, and the slice of it that this process owns.

    The parameters lie end to end. One that is cut into units is a row of equal chunks, one per unit; any
    other is one chunk. Chunk c is [edges[c], edges[c + 1]) and of unit[c]; -1 means that all workers have it.
    """

    def __init__(self, parameters, units_of_layer, initial_value, dtype, device):
        """parameters: {name: tensor on the meta device}; units_of_layer: {layer: its columns of a mask};
        initial_value(name) is asked for parameters that reach into the slice, one after another."""
        chunk_units, sizes = [], []
        for name, parameter in parameters.items():
            prefixes = accumulate(name.split("."), "{}.{}".format)
            units = next((units_of_layer[prefix] for prefix in prefixes if prefix in units_of_layer), [-1])
            chunk_units += units
            sizes += [parameter.numel() // len(units)] * len(units)
        self.unit, self.edges = np.array(chunk_units), np.cumsum([0, *sizes])
        rank, processes, size = dist.get_rank(), dist.get_world_size(), int(self.edges[-1])
        self.cuts = np.minimum(np.arange(processes + 1) * -(-size // processes), size)  # [processes + 1]
        start, stop = self.cuts[rank : rank + 2].tolist()
        # the chunks that reach into the slice, and their edges counted from its start
        first, last = np.searchsorted(self.edges, start, side="right") - 1, np.searchsorted(self.edges, stop)
        self.inside, self.inner = slice(first, last), self.edges[first : last + 1].clip(start, stop) - start
        self.master = torch.empty(
            stop - start, dtype=torch.promote_types(dtype, torch.float32), device=device
        )
        self.mean = torch.zeros_like(self.master)  # the gradient: a sum while it comes in, then the mean
        self.shapes, self.pieces, begin = {n: p.shape for n, p in parameters.items()}, {}, 0
        # {name: (where in the parameter, flattened, what is owned of it begins and ends, that itself)}
        for name, parameter in parameters.items():
            a, b = max(begin, start), min(begin + parameter.numel(), stop)
            if a < b:
                self.master[a - start : b - start] = initial_value(name).flatten()[a - begin : b - begin]
                piece = torch.nn.Parameter(self.master[a - start : b - start])
                piece.grad = self.mean[a - start : b - start]
                self.pieces[name] = slice(a - begin, b - begin), piece
            begin += parameter.numel()

    def has(self, mask):
        """bool [workers, chunks]: who has which chunk under a mask, bool [workers, units]."""
        return np.column_stack([mask, np.full(len(mask), True)])[:, self.unit]  # -1 is the last column

    def count_trainers(self, trains):
        """Find out by how many the sum of the gradients is to be divided; trains: bool [workers, units]."""
        trainers = self.has(trains).sum(axis=0)[self.inside]
        changes = [0, *np.flatnonzero(np.diff(trainers)) + 1, len(trainers)] if len(trainers) else [0]
        ends = self.inner[changes].tolist()  # [(begin, end, how many train what is in between)] of the slice
        self.trainers = list(zip(ends, ends[1:], trainers[changes[:-1]].tolist()))

    def gather(self, own):
        """{name: tensor of the parameter's shape}, in rank 0's CPU memory, of what each process has for its
        slice, such as its master; empty on the others."""
        most, rank = int(self.cuts[1]), dist.get_rank()
        own = torch.nn.functional.pad(own.detach(), (0, most - len(own)))  # only the last ones are shorter
        own = own.cpu() if dist.get_backend() == "gloo" else own
        slices = [torch.empty_like(own) for _ in self.cuts[1:]] if rank == 0 else None
        dist.gather(own, slices)
        if rank > 0:
            return {}
        whole = torch.cat([each.cpu() for each in slices])[: self.edges[-1]]
        sizes = [shape.numel() for shape in self.shapes.values()]
        return {n: flat.view(shape) for (n, shape), flat in zip(self.shapes.items(), whole.split(sizes))}


def runs(has, edges):
    """[(begin, end)] of the runs of chunks that are set, row by row of `has`, bool [rows, chunks]."""
    rise = np.diff(has.astype(np.int8), axis=1, prepend=0, append=0)  # 1 where a run begins, -1 after its end
    begins, ends = (edges[np.nonzero(rise == sign)[1]].tolist() for sign in (1, -1))
    return [(begin, end) for begin, end in zip(begins, ends) if begin < end]


class Route:
    """What moves between a bucket's owners and the workers that play now; has: bool [processes, chunks].

    Slices are cut in the order of the chunks: so what a worker has of slice 0, then of slice 1, and so on, is
    all that it has in the bucket's order. Nothing needs sorting, in either direction.
    """

    def __init__(self, bucket, has):
        self.before = np.append(0, np.cumsum(has[dist.get_rank()] * np.diff(bucket.edges)))
        self.by_owner = np.diff(np.interp(bucket.cuts, bucket.edges, self.before)).astype(int).tolist()
        self.by_worker = (has[:, bucket.inside] @ np.diff(bucket.inner)).tolist()  # of this process's slice
        self.runs = runs(has[:, bucket.inside], bucket.inner)  # in the slice, worker by worker


def products(a, b):
    """The dot products a a, b b and a b of two vectors, as floats."""
    a, b = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in (a, b))
    return [a.dot(a).item(), b.dot(b).item(), a.dot(b).item()]


def cosines(of_buckets):
    """[cosine similarity in each bucket, and of all together], from `products`; None where one is zero."""
    all_of_them = [*of_buckets, np.sum(of_buckets, axis=0)]
    return [ab / (aa * bb) ** 0.5 if aa * bb > 0 else None for aa, bb, ab in all_of_them]


class Part:
    """What a worker has of a bucket: parameters, views of the flat `values`, the trained ones first."""

    def __init__(self, bucket, trains, reads, model, parameters, traffic, dtype):
        """trains, reads: bool [processes, chunks]; parameters: {name: parameter of `model`}, on the meta
        device until now; traffic: a Counter of the bytes sent."""
        self.bucket, self.traffic, self.rank, self.watched = bucket, traffic, dist.get_rank(), False
        self.reads, self.trains = Route(bucket, reads), Route(bucket, trains)
        trained, frozen = (runs(has[[self.rank]], self.reads.before) for has in (trains, reads & ~trains))
        self.order = trained + frozen if trained and frozen else None  # a pull brings them mixed up
        meta = sorted(parameters.items(), key=lambda item: not item[1].requires_grad)
        sizes = [like.numel() for _, like in meta]
        self.values = torch.empty(sum(sizes), dtype=dtype, device=bucket.master.device)
        self.trained = []
        for (name, like), view in zip(meta, self.values.split(sizes)):
            parameter = torch.nn.Parameter(view.view(like.shape), requires_grad=like.requires_grad)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, parameter)
            self.trained += [parameter] if parameter.requires_grad else []
        self.values.untyped_storage().resize_(0)  # until the first turn

    def pull(self):
        """Start to fill the parameters with the owners' values. Returns a function that waits for it."""
        slices = (self.bucket.master[a:b] for a, b in self.reads.runs)
        send = self.values.new_empty(sum(self.reads.by_worker))
        torch.cat([self.bucket.master[:0], *slices], out=send)
        received = torch.empty_like(self.values) if self.order else self.values
        wait = self._exchange("pull", received, send, self.reads.by_owner, self.reads.by_worker)

        def finish():
            wait()
            if self.order:
                torch.cat([received[a:b] for a, b in self.order], out=self.values)

        return finish

    def push(self):
        """Start to send the gradients, and free them: they leave from the place of the weights, which nothing
        needs any more. Returns a function that waits, and adds up what has come to this owner in rank order
        and in its own precision: so each run gives the same sum."""
        gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained)
        send = self.values.data[: sum(p.numel() for p in self.trained)]  # .data: autograd need not know
        torch.cat([send[:0], *(gradient.flatten() for gradient in gradients)], out=send)
        for parameter in self.trained:
            parameter.grad = None
        if self.watched:
            self.sent = send.clone()
        received = send.new_empty(sum(self.trains.by_worker))
        wait = self._exchange("push", received, send, self.trains.by_worker, self.trains.by_owner)

        def finish():
            wait()
            for (a, b), sent in zip(self.trains.runs, received.split([b - a for a, b in self.trains.runs])):
                self.bucket.mean[a:b] += sent

        return finish, received.nbytes

    def _exchange(self, kind, received, send, received_splits, send_splits):
        """One all_to_all. gloo takes CUDA tensors, but has been silently wrong with asynchronous work on them
        (https://github.com/pytorch/pytorch/pull/170812): there we go through CPU buffers, and block."""
        self.traffic[kind] += (sum(send_splits) - send_splits[self.rank]) * send.element_size()
        if send.device.type != "cpu" and dist.get_backend() == "gloo":
            on_cpu = torch.empty(received.shape, dtype=received.dtype)
            dist.all_to_all_single(on_cpu, send.cpu(), received_splits, send_splits)
            return lambda: received.copy_(on_cpu)
        return dist.all_to_all_single(received, send, received_splits, send_splits, async_op=True).wait


class Worker:
    """The module of one worker, and the order in which it pulls and pushes.

    All take part in every collective, also who has nothing of a bucket, in one order: pulls first bucket to
    last, each finished just before its layer runs; pushes last to first, each sent when its gradients are in.
    """

    def __init__(self, model, buckets, trains, reads, traffic, dtype):
        """model: on the meta device. trains, reads: bool [processes, units], of the workers that play now."""
        self.model, self.parts, self.grad_bytes = model, [], 0
        everything, modules = dict(model.named_parameters()), dict(model.named_modules())
        for number, (name, bucket) in enumerate(buckets.items(), start=1):
            own = {n: p for n, p in everything.items() if bucket_of(n) == name}
            part = Part(bucket, bucket.has(trains), bucket.has(reads), model, own, traffic, dtype)
            self.parts.append(part)
            if name in modules:
                modules[name].register_forward_pre_hook(partial(Worker.fetch, weakref.proxy(self), number))
            for parameter in part.trained:
                # not by a reference: autograd hides it from the garbage collector, and nothing would be freed
                hook = partial(Worker._gradient_came, weakref.proxy(self), weakref.proxy(part))
                parameter.register_post_accumulate_grad_hook(hook)

    def begin(self, passes=1):
        """Allocate the parameters, if they are not, and start to pull them for so many backward passes."""
        for part in self.parts:
            part.values.untyped_storage().resize_(part.values.nbytes)
            part.missing = passes * len(part.trained)  # gradients still to come
        self.fetched, self.coming = 0, self.parts[0].pull()
        self.unsent, self.finish_push, self.under_way = list(self.parts), lambda: None, 0

    def rehearse(self, run):
        """run(model) on zeros, without any traffic: what is compiled at the first call is compiled then."""
        for part in self.parts:
            part.values.untyped_storage().resize_(part.values.nbytes)
            part.values.zero_()
            part.missing = np.inf
        self.fetched, self.unsent, self.finish_push = len(self.parts), [], lambda: None
        run(self.model)
        for part in self.parts:
            part.values.untyped_storage().resize_(0)

    def fetch(self, needed, *_):
        """Wait until so many parts are there, and start to pull the next one."""
        while self.fetched < needed:
            self.coming()
            self.coming = None  # frees its buffers
            self.fetched += 1
            if self.fetched < len(self.parts):
                self.coming = self.parts[self.fetched].pull()

    def _gradient_came(self, part, parameter):
        part.missing -= 1
        if part.missing == np.inf:  # a rehearsal
            parameter.grad = None
        if part.missing < 0:
            raise RuntimeError("more backward passes than turn(worker, passes) was told of")
        while self.unsent and self.unsent[-1].missing == 0:  # also parts of which this worker has nothing
            self._push()

    def _push(self):
        alive = sum(p.grad.nbytes for part in self.unsent for p in part.trained if p.grad is not None)
        part = self.unsent.pop()
        self.grad_bytes = max(self.grad_bytes, alive + self.under_way)
        self.finish_push()
        self.finish_push = None  # frees its buffers
        self.finish_push, self.under_way = part.push()

    def watch(self, play, passes):
        """A turn of play(model). Returns copies of what is pushed, a flat tensor for each part."""
        for part in self.parts:
            part.watched = True
        self.begin(passes)
        play(self.model)
        self.end(free=True)
        for part in self.parts:
            part.watched = False
        return [vars(part).pop("sent") for part in self.parts]

    def end(self, free):
        """Push what has not left yet, wait for the last of it, and free the parameters if asked to."""
        while self.unsent:
            self._push()
        self.finish_push()
        self.finish_push = None
        for part in self.parts if free else ():
            part.values.untyped_storage().resize_(0)


class SDP:
    """Trains one model with len(mask) workers on the processes of the default group.

    build: build(trained, frozen) -> module, both {layer: number of units}, as model.build takes them.
    initial_value: initial_value(whole model, parameter's name) -> float tensor on the CPU.
    optimizer: optimizer(groups) -> an elementwise torch.optim.Optimizer, on pieces of parameters.
    units, mask, mode: see masks.py; mask is bool [workers, units]. Process r plays the workers r, r + P, ...
    dtype: of weights, gradients, and what is sent. Owners keep at least float32.
    """

    def __init__(self, build, initial_value, optimizer, units, mask, mode, dtype=torch.float32, device="cpu"):
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self.build, self.units, self.dtype, self.device = build, units, dtype, torch.device(device)
        self.traffic = Counter()  # bytes sent to other processes in all turns, for "pull" and "push"
        with torch.device("meta"):
            whole = build({}, {})
        layers = defaultdict(dict)
        for name, parameter in whole.named_parameters():
            layers[bucket_of(name)][name] = parameter
        numbers, values = columns(units), partial(initial_value, whole)
        self.buckets = {n: Bucket(p, numbers, values, dtype, device) for n, p in layers.items()}
        groups = [{"params": []}, {"params": [], "weight_decay": 0.0}]  # matrices; norms and biases
        for bucket in self.buckets.values():
            for name, (_, piece) in bucket.pieces.items():
                groups[whole.get_parameter(name).dim() == 1]["params"].append(piece)
        self.optimizer = optimizer(groups)
        self.change(mask, mode)

    def change(self, mask, mode):
        """From the next step on, train under this mask and mode, by as many workers. Nothing has to move:
        owners keep what they own, and the next pull brings it to the new holders."""
        trains, reads = self.trains, _ = roles(mode, mask)
        for bucket in self.buckets.values():
            bucket.count_trainers(trains)
        self.workers = {}  # first let go of the old ones
        rounds = [slice(i, i + self.processes) for i in range(0, len(mask), self.processes)]
        self.workers = {r.start + self.rank: self._worker(trains[r], reads[r], self.traffic) for r in rounds}

    def _worker(self, trains, reads, traffic):
        trained, frozen = (count(self.units, mask[self.rank]) for mask in (trains, reads & ~trains))
        with torch.device("meta"):
            model = self.build(trained, frozen)
        return Worker(model, self.buckets, trains, reads, traffic, self.dtype)

    @contextmanager
    def turn(self, worker, passes=1):
        """`with engine.turn(worker) as model:` plays a worker: its module, with fresh values, for so many
        forward and backward passes; their gradients add up, and the last pass sends them. All processes take
        the turns of their workers in order."""
        self.workers[worker].begin(passes)
        yield self.workers[worker].model
        self.workers[worker].end(free=len(self.workers) > 1)  # the next worker needs the room

    def rehearse(self, run):
        """run(model) for each worker of this process, which nobody has to wait for."""
        for worker in self.workers.values():
            worker.rehearse(run)

    @contextmanager
    def whole(self):
        """`with engine.whole() as model:` gives every process the whole model for a while, to evaluate it."""
        everything = np.ones((self.processes, len(self.units)), bool)
        reader = self._worker(everything, everything, traffic=Counter())
        reader.begin(passes=0)
        reader.fetch(len(reader.parts))
        yield reader.model.eval().requires_grad_(False)

    def state(self):
        """The whole model and the state of its optimizer, in rank 0's CPU memory: ({name: tensor}, {name:
        {key: tensor}}), at the owners' precision; empty on the others. Gathered bucket by bucket."""
        model, optimizer, state = {}, defaultdict(dict), self.optimizer.state
        keys = [[key for key, of in next(iter(state.values()), {}).items() if of.dim() > 0]]
        dist.broadcast_object_list(keys)  # from rank 0, which owns something of every bucket
        for bucket in self.buckets.values():
            model |= bucket.gather(bucket.master)
            pieces = [state[piece] for _, piece in bucket.pieces.values() if keys[0]]
            for key in keys[0]:
                own = torch.cat([bucket.master[:0], *(of[key].detach() for of in pieces)])
                for name, tensor in bucket.gather(own).items():
                    numbers = {k: of.detach().cpu() for k, of in pieces[0].items() if of.dim() == 0}
                    optimizer[name] |= {key: tensor} | numbers  # of steps, which all have in common
        return model, dict(optimizer)

    def load(self, model, optimizer):
        """Go on from what `state` gave, on any processes. Each takes its slices from the whole tensors,
        which may be memory-mapped."""
        for bucket in self.buckets.values():
            for name, (where, piece) in bucket.pieces.items():
                with torch.no_grad():
                    piece.copy_(model[name].flatten()[where])
                self.optimizer.state[piece] = {
                    key: of.flatten()[where].to(piece, copy=True)
                    if of.dim()
                    else of.to(piece.device, copy=True)
                    for key, of in optimizer.get(name, {}).items()
                }

    def align(self, play, passes=1):
        """How close the gradients of a step come to the whole model's, by cosine similarity, in [-1, 1]:
        {"workers": {layer: [of each worker, None where it has no gradient]}, "owners": {layer: number}}, and
        the same for "all" layers. workers: their gradients beside those of the whole model on the same rows,
        over the coordinates that they train. owners: the averaged gradient beside the whole model's mean.

        play(worker, model) makes the backward passes of a step, the same each time. Leaves all as it was, but
        takes the whole model and its gradients, and a copy of its workers' gradients, on each process.
        """
        everything = np.ones((self.processes, len(self.units)), bool)
        whole, traffic = self._worker(everything, everything, Counter()), self.traffic.copy()
        sent = {
            number: worker.watch(partial(play, number), passes) for number, worker in self.workers.items()
        }
        self.average()
        means = [bucket.mean.clone() for bucket in self.buckets.values()]
        self.optimizer.zero_grad(set_to_none=False)
        self.traffic.clear()
        self.traffic.update(traffic)
        found = {}  # {worker: [dot products of a bucket, as of `products`]}
        for number in self.workers:
            found[number] = []
            for bucket, own, all_of_it in zip(
                self.buckets.values(), sent[number], whole.watch(partial(play, number), passes)
            ):
                trained = runs(bucket.has(self.trains)[[number]], bucket.edges)
                found[number].append(
                    products(own, torch.cat([all_of_it[:0], *(all_of_it[a:b] for a, b in trained)]))
                )
        of_owners = [products(mean, bucket.mean) for mean, bucket in zip(means, self.buckets.values())]
        self.optimizer.zero_grad(set_to_none=False)
        of_all = [None] * self.processes
        dist.all_gather_object(of_all, (found, of_owners))
        by_worker = dict(sorted(chain(*(of_workers.items() for of_workers, _ in of_all))))
        owners = np.sum([of for _, of in of_all], axis=0)
        of_each = [cosines(of) for of in by_worker.values()]
        names = [*self.buckets, "all"]
        return {
            "workers": {name: [each[i] for each in of_each] for i, name in enumerate(names)},
            "owners": dict(zip(names, cosines(owners))),
        }

    def average(self):
        """Turn the owners' sums into means over the workers that train each parameter."""
        for bucket in self.buckets.values():
            for begin, end, trainers in bucket.trainers:
                bucket.mean[begin:end] /= trainers

    def step(self, lr, clip=0.0, *numbers):
        """Average, clip to the norm `clip` (0: do not), update with the learning rate `lr`; but where the
        norm or one of the numbers, such as the loss, is infinite or NaN, leave everything as it was. Returns,
        as floats, [the norm of the whole model's averaged gradient, each number's sum over the processes]."""
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
