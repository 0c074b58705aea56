"""What an engine takes and leaves behind: memory, buffers, kernels, and the times that it waits.

SLOW=1 in the environment tries more changes of masks, and plans for 1024 workers.
"""

import gc
import os
import time
import tracemalloc
import weakref
from argparse import Namespace
from collections import Counter
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import masks
import train
from masks import Unit, assign, spectral_gap
from model import GPTConfig, build, units_of
from sdp import SDP, Bucket, Layout, Part
from support import report
from support.presets import SIZES
from support.processes import slow
from test_sdp import SCHEMES, batch, make_engine, make_mask, whole_values

pytest_plugins = ["support.testing", "support.processes"]


def what_engines_leave():
    """Engines and whole models that nobody uses any more are freed, after training too."""

    def alive():
        gc.collect()
        return sum(isinstance(found, (Bucket, Part)) for found in gc.get_objects()), tensors()

    def tensors():
        return sum(isinstance(found, torch.Tensor) and found.numel() > 100 for found in gc.get_objects())

    before = alive()
    engine = make_engine("backward", "neuron", 2)
    with engine.turn(dist.get_rank()) as worker:
        worker(*batch(0)).backward()
    engine.step(1e-2)
    used = alive()
    whole_values(engine)
    assert alive() == used
    watch = [weakref.ref(part.values) for worker in engine.workers.values() for part in worker.parts]
    del engine, worker
    assert alive() == before and not any(ref() is not None for ref in watch)


def test_engines_are_freed(in_processes):
    in_processes(2, what_engines_leave)


class Waits(TorchDispatchMode):
    """Counts where the CPU asks a tensor for its value, and so waits for the device."""

    number = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.number += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(options or {}))


def waits_of_a_step():
    engine, args = make_engine("backward", "block", 4), Namespace(micro_batches=2, grad_clip=0.0, workers=4)
    args.seed, step, refuse = 0, engine.step, Waits()

    def stop_counting(*arguments):
        before.append(refuse.number)
        return step(*arguments)

    before, engine.step = [], stop_counting
    with refuse:
        train.update(engine, {worker: batch(0, worker) for worker in engine.workers}, args, 1, 1e-2)
        torch.ones(()).item()  # this one is counted
    return before[0], refuse.number


def test_nothing_waits_for_the_device_before_the_step(in_processes):
    for before, after in in_processes(2, waits_of_a_step):
        assert before == 0 and after > 0


def buffers_of_a_step(mode, level, dtype, machines=1, coverage=0.5):
    """The most that the tensors given to collectives ever take together, parameters aside, in layers."""
    engine = make_engine(mode, level, 4, coverage, GPTConfig(layers=4), dtype, machines=machines)
    (worker,) = engine.workers
    own = {part.values.untyped_storage()._cdata for part in engine.workers[worker].parts}
    layer = max(int(bucket.chunk_edges[-1]) for bucket in engine.buckets.values()) * dtype.itemsize
    alive, most, exchange = {}, 0, dist.all_to_all_single

    def watched(received, send, *more, **options):
        nonlocal most
        for tensor in (received, send):
            storage = tensor.untyped_storage()
            if storage._cdata not in own and storage.nbytes():
                alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, alive.pop, storage._cdata, None)
        for _ in range(100):  # gloo's thread lets go of what has been sent a moment later
            if sum(alive.values()) <= (2 if machines == 1 else 4) * layer:
                break
            time.sleep(0.01)
        most = max(most, sum(alive.values()))
        return exchange(received, send, *more, **options)

    dist.all_to_all_single = watched
    try:
        for _ in range(2):
            with engine.turn(worker) as model:
                model(*(t[:, :32] for t in batch(0, worker, config=GPTConfig()))).backward()
            engine.step(1e-3)
    finally:
        dist.all_to_all_single = exchange
    return most / layer


@pytest.mark.parametrize("mode, level", [("none", "block"), *SCHEMES])
def test_buffers_take_two_layers_at_most(in_processes, mode, level):
    dtype = torch.bfloat16 if level == "block" else torch.float32
    assert 0.25 < max(in_processes(4, buffers_of_a_step, mode, level, dtype)) <= 2
    if (mode, level) == ("forward", "block"):  # four exchanges under way, each of a quarter of a layer
        assert 0.25 < max(in_processes(4, buffers_of_a_step, mode, level, dtype, 1, 0.25)) <= 2


def plan_for_1024():
    """What each process works out at the start, for one layer of 10,000 units."""
    units = [Unit("blocks.0.w", "w", 4)] * 10_000
    began = time.perf_counter()
    mask = assign(units, 1024, 64)
    gap = spectral_gap(mask)
    like = {"blocks.0.w.a": torch.empty(10_000, 4, device="meta")}
    values = torch.zeros(10_000, 4)
    layout = Layout()
    bucket = Bucket(like, masks.columns(units), lambda name: values, torch.float32, "cpu", layout)
    has = bucket.has(mask)
    route, _ = layout.routes(bucket, has, ~has, Counter()).both
    seconds = time.perf_counter() - began
    assert (mask.sum(axis=0) == 64).all() and gap > 0.8 and sum(route.from_owners) == 4 * mask[5].sum()
    return seconds


@slow
def test_plans_for_1024_workers():
    """Masks, splits and spectral gap in less than 500 MB, on a process group without processes."""
    fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=5, world_size=1024)
    tracemalloc.start()
    try:
        seconds = plan_for_1024()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        dist.destroy_process_group()
    print(f"{seconds:.2f} s, {peak / 1e6:.0f} MB")
    assert peak < 500e6


def bytes_alive():
    """Of all tensors, a moment later: gloo's thread has then let go of what was sent."""
    time.sleep(0.3)
    found = (each.untyped_storage() for each in gc.get_objects() if issubclass(type(each), torch.Tensor))
    return sum({storage._cdata: storage.nbytes() for storage in found}.values())


def changes_of_masks(number):
    """The bytes of all tensors after ten changes and after so many, without the garbage collector."""
    engine, (units, _) = make_engine("forward", "block", 4), make_mask("block", 4)
    gc.collect()
    gc.disable()
    old = []
    try:
        for change in range(1, number + 1):
            mask = assign(units, 4, 2, mask_number=change)
            old += [weakref.ref(worker) for worker in engine.workers.values()]
            engine.change(mask, "backward" if change % 3 == 0 else "forward")
            for worker in engine.workers:
                with engine.turn(worker) as model:
                    model(*batch(change, worker)).backward()
            engine.step(lr=1e-3)
            if change == 10:
                after_ten = bytes_alive()
        assert not any(worker() for worker in old)
        after_all = [bytes_alive()]
        while after_all[-1] > 1.01 * after_ten and len(after_all) < 20:  # gloo can be late
            after_all.append(bytes_alive())
    finally:
        gc.enable()
    return after_ten, after_all[-1]


def test_changes_of_masks_leave_nothing_behind(in_processes):
    for n, number in ((1, 200 if "SLOW" in os.environ else 17), (4, 17)):
        for after_ten, after_all in in_processes(n, changes_of_masks, number):
            assert after_all <= 1.01 * after_ten  # all workers hold equally much


class Kernels(TorchDispatchMode):
    """Counts what would be launched on a GPU: not what only makes views, or memory without values."""

    FREE = "view slice split empty detach alias device".split()

    def __init__(self):
        super().__init__()
        self.number = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        self.number[name] += not any(free in name for free in self.FREE)
        return function(*arguments, **(options or {}))


def kernels_of_a_turn(dtype):
    """(those of the pulls, those of the pushes, runs of all routes, layers) of a GPT of 134m among eight."""
    config = GPTConfig(**SIZES["gpt"]["134m"])
    with torch.device("meta"):
        units = units_of(build(config), "neuron")
    mask, adamw = assign(units, 8, 4), partial(torch.optim.AdamW, lr=1e-3)
    arrived = torch.futures.Future()
    arrived.set_result(None)
    with (
        report.fake_process_group(3, 8),
        FakeTensorMode(),
        mock.patch.object(dist, "all_to_all_single", lambda *_, **__: arrived),
    ):
        empty = lambda model, name: torch.empty(model.get_parameter(name).shape)  # noqa: E731
        engine = SDP(partial(build, config), empty, adamw, units, mask, "forward", dtype)
        (worker,) = engine.workers.values()
        with Kernels() as pulls:
            worker.begin()
            worker.wait_for(worker.parts[-1])
        for parameter in worker.model.parameters():
            parameter.grad = torch.empty_like(parameter)
        with Kernels() as pushes:
            worker.end(free=False)
    runs = sum(len(part.routes.both[0].runs) for part in worker.parts)
    return pulls.number, pushes.number, runs, len(worker.parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_kernels(alone, dtype):
    """A layer is pulled by a conversion and a copy, however many runs there are; a push adds run by run."""
    pulls, pushes, runs, layers = kernels_of_a_turn(dtype)
    assert runs > 20 * layers  # so a kernel a run would show
    assert pulls.total() <= 2 * layers and pulls["cat"] == layers
    assert pushes["add_"] == runs and pushes.total() <= runs + 2 * layers
