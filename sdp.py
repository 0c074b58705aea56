"""The engine of Subnetwork Data Parallelism: owners, pull, push, step.

Every parameter has one *owner* among the processes, chosen without looking at the masks: a *bucket* (one
layer's parameters end to end) is cut into as many equal slices as there are processes, and process r owns
slice r: its master copy and its optimizer state. A step is

    pull    owners send each value to the workers that read it
    forward / backward on each worker's own rows of the batch
    push    workers send each gradient to its owner, who sums over the workers that train it
    step    owners divide by the number of those workers, clip, and update their slices

Pull and push are one all_to_all of a bucket each (two pulls in backward masking: what is trained, what is
frozen). No activation moves. A process plays one worker, or several one after another:

    engine = SDP(build, initial_value, optimizer, units, mask, mode)
    for worker in engine.workers:
        with engine.turn(worker) as model:
            model(x, y).backward()
    engine.step(lr)

Needs an initialised torch.distributed. Read next: data.py, then train.py.
"""

from collections import Counter, defaultdict
from contextlib import contextmanager
from functools import partial
from itertools import accumulate

import numpy as np
import torch
import torch.distributed as dist

from masks import count, roles


def bucket_of(name):
    """The bucket of a parameter: "blocks.3" for "blocks.3.mlp.up", "embedding" for "embedding.weight"."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "blocks" else 1])


class Bucket:
    """One layer of the whole model, flattened, and the slice of it that this process owns.

    The parameters lie end to end. One that is cut into units is a row of equal chunks, one per unit; any
    other is one chunk. Chunk c is [edges[c], edges[c + 1]) and of unit[c]; -1 means that all workers have it.
    """

    def __init__(self, parameters, columns, trains, initial_value, dtype, device):
        """parameters: {name: tensor on the meta device}; columns: {layer: its columns of a mask};
        initial_value(name) is asked for parameters that reach into the slice, one after another."""
        chunk_units, sizes = [], []
        for name, parameter in parameters.items():
            prefixes = accumulate(name.split("."), "{}.{}".format)
            units = next((columns[prefix] for prefix in prefixes if prefix in columns), [-1])
            chunk_units += units
            sizes += [parameter.numel() // len(units)] * len(units)
        self.unit, self.edges = np.array(chunk_units), np.cumsum([0, *sizes])
        rank, processes, size = dist.get_rank(), dist.get_world_size(), int(self.edges[-1])
        self.cuts = np.minimum(np.arange(processes + 1) * -(-size // processes), size)  # [processes + 1]
        start, stop = self.cuts[rank : rank + 2].tolist()
        # the chunks that reach into the slice, and their edges counted from its start
        first, last = np.searchsorted(self.edges, start, side="right") - 1, np.searchsorted(self.edges, stop)
        self.inside = slice(first, last)
        self.inner = np.clip(self.edges[first : last + 1], start, stop) - start

        self.master = torch.empty(stop - start, dtype=dtype, device=device)
        self.mean = torch.zeros_like(self.master)  # the gradient: a sum while it comes in, then the mean
        self.trainers = torch.from_numpy(self.has(trains).sum(axis=0)[self.inside]).to(device)
        self.lengths = torch.from_numpy(np.diff(self.inner)).to(device)
        self.pieces, begin = {}, 0  # {name: what is owned of the parameter}, for the optimizer
        for name, parameter in parameters.items():
            a, b = max(begin, start), min(begin + parameter.numel(), stop)
            if a < b:
                self.master[a - start : b - start] = initial_value(name).flatten()[a - begin : b - begin]
                self.pieces[name] = torch.nn.Parameter(self.master[a - start : b - start])
                self.pieces[name].grad = self.mean[a - start : b - start]
            begin += parameter.numel()

    def has(self, mask, shared=True):
        """bool [workers, chunks]: who has which chunk under a mask, bool [workers, units]."""
        return np.column_stack([mask, np.full(len(mask), shared)])[:, self.unit]  # -1 is the last column


class Part:
    """What a worker has of a bucket and trains, or has and only reads, and its way from and to the owners.

    Slices are cut in the order of the chunks. So what arrives in a pull, source rank by source rank, is all
    that the worker has in the bucket's order: parameters are views of it. A push is the same the other way.
    """

    def __init__(self, bucket, has, module, names, trained, traffic, dtype):
        """has: bool [processes, chunks], for the worker of each process; names: this worker's parameters in
        `module`, which are on the meta device and become real; traffic: a Counter of the bytes sent."""
        self.bucket, self.trained, self.traffic, self.rank = bucket, trained, traffic, dist.get_rank()
        before = np.append(0, np.cumsum(has[self.rank] * np.diff(bucket.edges)))  # had before each edge
        self.by_owner = np.diff(np.interp(bucket.cuts, bucket.edges, before)).astype(int).tolist()
        inside = has[:, bucket.inside].astype(np.int8)  # [processes, chunks in the slice]
        self.by_worker = (inside @ np.diff(bucket.inner)).tolist()
        rise = np.diff(inside, axis=1, prepend=0, append=0)  # a run of chunks begins at 1 and ends before -1
        begins, ends = (bucket.inner[np.nonzero(rise == sign)[1]].tolist() for sign in (1, -1))
        self.runs = [(a, b) for a, b in zip(begins, ends) if a < b]  # in the slice, worker by worker

        shapes = [module.get_parameter(name).shape for name in names]
        sizes = [shape.numel() for shape in shapes]
        self.values = torch.empty(sum(sizes), dtype=dtype, device=bucket.master.device)
        self.parameters = []
        for name, shape, view in zip(names, shapes, self.values.split(sizes)):
            self.parameters.append(torch.nn.Parameter(view.view(shape), requires_grad=trained))
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, self.parameters[-1])
        self.missing = 0  # gradients still to come in this backward pass

    def pull(self):
        """Start to fill the parameters with the owners' values; returns a function that waits for it."""
        runs = [self.bucket.master[a:b] for a, b in self.runs]
        send = torch.cat(runs).to(self.values.dtype) if runs else self.values.new_empty(0)
        return self._exchange("pull", self.values, send, self.by_owner, self.by_worker)

    def push(self):
        """Start to send the gradients to their owners, and free them. Returns a function that waits and adds
        up what has come, in rank order and in the owners' precision: so each run gives the same sum."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        send = torch.cat([g.flatten() for g in gradients]) if gradients else self.values.new_empty(0)
        for parameter in self.parameters:
            parameter.grad = None
        received = send.new_empty(sum(self.by_worker))
        wait = self._exchange("push", received, send, self.by_worker, self.by_owner)

        def finish():
            wait()
            for (a, b), run in zip(self.runs, received.split([b - a for a, b in self.runs])):
                self.bucket.mean[a:b] += run

        return finish

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

    Workers have different parts, and some have nothing of a bucket, but all take part in every collective in
    one order: pulls from the first bucket to the last, each finished just before its layer runs; pushes from
    the last to the first, each sent as soon as its gradients are complete.
    """

    def __init__(self, model, buckets, trains, reads, traffic, dtype):
        """model: on the meta device. trains, reads: bool [processes, units], of the workers that play now."""
        self.model, self.parts, self.grad_bytes = model, [], 0
        names, modules = defaultdict(list), dict(model.named_modules())
        for name, parameter in model.named_parameters():
            names[bucket_of(name), parameter.requires_grad].append(name)
        for name, bucket in buckets.items():
            for trained, mask in ((True, trains), (False, reads & ~trains)):
                has = bucket.has(mask, shared=trained)
                if has.any():  # for some worker: so all ranks make the same parts
                    self.parts.append(Part(bucket, has, model, names[name, trained], trained, traffic, dtype))
            if name in modules:
                needed = len(self.parts)
                modules[name].register_forward_pre_hook(lambda *_, needed=needed: self.fetch(needed))
        for part in self.parts:
            for parameter in part.parameters if part.trained else ():
                parameter.register_post_accumulate_grad_hook(lambda _, part=part: self._gradient_came(part))

    def begin(self):
        """Allocate the parameters, if they were freed, and start to pull them."""
        for part in self.parts:
            part.values.untyped_storage().resize_(part.values.nbytes)
            part.missing = len(part.parameters)
        self.fetched, self.coming = 0, self.parts[0].pull()
        self.unsent, self.finish_push = [part for part in self.parts if part.trained], lambda: None

    def fetch(self, needed):
        """Wait until so many parts are there, with the pull of the next one under way."""
        while self.fetched < needed:
            finish_pull, self.fetched = self.coming, self.fetched + 1
            if self.fetched < len(self.parts):
                self.coming = self.parts[self.fetched].pull()
            finish_pull()

    def _gradient_came(self, part):
        part.missing -= 1
        while self.unsent and self.unsent[-1].missing == 0:  # also parts of which this worker has nothing
            self._push()

    def _push(self):
        alive = sum(p.grad.nbytes for part in self.unsent for p in part.parameters if p.grad is not None)
        self.grad_bytes = max(self.grad_bytes, alive)  # only ever a maximum just before a push
        self.finish_push()  # of the bucket before: one push is under way at a time
        self.finish_push = self.unsent.pop().push()

    def end(self, free):
        """Push what has not left yet, wait for the last of it, and free the parameters if that is wanted."""
        while self.unsent:
            self._push()
        self.finish_push()
        for part in self.parts if free else ():
            part.values.untyped_storage().resize_(0)


class SDP:
    """Trains one model with len(mask) workers on the processes of the default group.

    build: build(trained, frozen) -> module, from {layer: number of units} for both, as model.GPT takes them.
    initial_value: initial_value(whole model, parameter's name) -> float tensor on the CPU.
    optimizer: optimizer(groups) -> an elementwise torch.optim.Optimizer; it is given pieces of parameters,
        those of norms and biases in a group without weight decay.
    units, mask, mode: see masks.py; mask is bool [workers, units]. Process r plays the workers r, r + P, ...
    dtype: of weights, gradients, and what is sent. Owners keep at least float32.
    """

    def __init__(self, build, initial_value, optimizer, units, mask, mode, dtype=torch.float32, device="cpu"):
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self.build, self.units, self.dtype, self.device = build, units, dtype, torch.device(device)
        self.traffic = Counter()  # bytes sent to other processes in all turns, for "pull" and "push"
        trains, reads = roles(mode, mask)

        everything = np.ones(len(units), bool)
        whole = self._module(everything, everything)
        layers, columns = defaultdict(dict), defaultdict(list)
        for name, parameter in whole.named_parameters():
            layers[bucket_of(name)][name] = parameter
        for column, unit in enumerate(units):
            columns[unit.layer].append(column)
        first, master = partial(initial_value, whole), torch.promote_types(dtype, torch.float32)
        self.buckets = {n: Bucket(p, columns, trains, first, master, device) for n, p in layers.items()}
        groups = [{"params": []}, {"params": [], "weight_decay": 0.0}]
        for bucket in self.buckets.values():
            for name, piece in bucket.pieces.items():
                groups[whole.get_parameter(name).dim() == 1]["params"].append(piece)
        self.optimizer = optimizer(groups)
        firsts = range(0, len(mask), self.processes)
        rounds = [slice(first, first + self.processes) for first in firsts]  # the workers that play together
        self.workers = {r.start + self.rank: self._worker(trains[r], reads[r], self.traffic) for r in rounds}

    def _module(self, trains, reads):
        with torch.device("meta"):
            return self.build(count(self.units, trains), count(self.units, reads & ~trains))

    def _worker(self, trains, reads, traffic):
        model = self._module(trains[self.rank], reads[self.rank])
        return Worker(model, self.buckets, trains, reads, traffic, self.dtype)

    @contextmanager
    def turn(self, worker):
        """`with engine.turn(worker) as model:` plays a worker: its module, with fresh values, for one forward
        and backward pass. All processes take the turns of their workers in order."""
        self.workers[worker].begin()
        yield self.workers[worker].model
        self.workers[worker].end(free=len(self.workers) > 1)  # the next worker needs the room

    @contextmanager
    def whole(self):
        """`with engine.whole() as model:` gives every process the whole model for a while, to evaluate it."""
        everything = np.ones((self.processes, len(self.units)), bool)
        reader = self._worker(everything, everything, traffic=Counter())
        reader.begin()
        reader.fetch(len(reader.parts))
        yield reader.model.eval().requires_grad_(False)

    def average(self):
        """Turn the owners' sums into means over the workers that train each parameter."""
        for bucket in self.buckets.values():
            bucket.mean /= torch.repeat_interleave(bucket.trainers, bucket.lengths)

    def step(self, lr, clip=0.0, loss=0.0):
        """Average, clip to the norm `clip` (0: do not), update with the learning rate `lr`. Returns, as
        floats, (the norm of the whole model's averaged gradient, `loss` summed over the processes)."""
        self.average()
        squares = sum(bucket.mean.dot(bucket.mean).double() for bucket in self.buckets.values())
        totals = torch.stack([squares, torch.as_tensor(loss, device=squares.device).double()])
        dist.all_reduce(totals)
        norm, loss = totals[0].sqrt().item(), totals[1].item()
        for bucket in self.buckets.values() if clip else ():
            bucket.mean *= min(1.0, clip / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for bucket in self.buckets.values():
            bucket.mean.zero_()
        return norm, loss
