"""What a worker costs: bytes, FLOPs and activations, measured, beside a dense worker, as a table."""

from contextlib import contextmanager
from itertools import chain

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from model import build, example
from support import launch
from support.evaluation import whole_worker
from support.peers import add_up

kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
MEMORY = ("weight_bytes", "grad_bytes", "optimizer_bytes", "activation_bytes")  # of a row of costs
SENT = ("push_bytes", "pull_bytes")
ATTENTION_ON_CPU = {  # FlopCounterMode counts 0 for these two
    kernel: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    backward_kernel: lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v),
}


@contextmanager
def measured(passes=1):
    """`with measured() as cost:` around a forward and backward pass: cost has "flops", of `passes`, and
    "activation_bytes": what autograd saved for the backward pass, each storage once, but no parameters."""
    cost, sizes = {}, {}  # sizes: {storage: bytes}

    def pack(tensor):
        source = tensor if tensor._base is None else tensor._base  # of a view
        if not isinstance(source, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()  # data_ptr() is 0 for all fake tensors
        return tensor.detach()  # returning the tensor itself would make a reference cycle

    with (
        torch.compiler.set_stance("force_eager"),  # torch.compile gives up for good on what a mode sees
        FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter,
        saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        yield cost
    cost["flops"] = passes * counter.get_total_flops()
    cost["activation_bytes"] = sum(sizes.values())


def play_without_memory(module, config, rows, passes, engine):
    """What `measured` finds in a step of a module on the meta device: it gets fake tensors, which have shapes
    and no memory. rows: of a pass; engine: whose dtype and device the module would have."""
    with FakeTensorMode(), torch.device(engine.device):
        values = {name: torch.empty(p.shape, dtype=engine.dtype) for name, p in module.named_parameters()}
        module.load_state_dict(values, assign=True)
        with measured(passes) as cost:
            module(*example(config, rows)).backward()
    return cost


def dry_run(args, config, engine):
    """{own worker: what `measured` finds in a step}. To measure a real step would change its rounding."""
    found, passes = {}, args.micro_batches
    for worker in engine.workers:
        rows = args.batch_size // sum(args.rows) // passes * args.rows[worker]
        found[worker] = play_without_memory(engine.make_module(worker), config, rows, passes, engine)
    return found


def memory(engine, worker, passes):
    """What a worker takes of live tensors in a step, in bytes. "optimizer_bytes" include the master copy."""
    worker, buckets = engine.workers[worker], engine.buckets.values()
    state = engine.optimizer.state.values()
    moments = sum(t.nbytes for of_piece in state for t in of_piece.values() if t.dim() > 0)
    return {
        "held_params": sum(p.numel() for part in worker.parts for p in part.trained),
        "weight_bytes": sum(part.values.nbytes for part in worker.parts),
        "grad_bytes": gradient_bytes(worker, passes) + sum(bucket.mean.nbytes for bucket in buckets),
        "optimizer_bytes": moments + sum(bucket.master.nbytes for bucket in buckets),
    }


def gradient_bytes(worker, passes):
    """A worker's gradients at their most: those of the layer that it is about to push, and the buffers of
    the pushes under way. With several passes, all gradients that have not left yet."""
    parts, at_a_push = worker.parts[::-1], []  # in the order of the pushes
    for number in range(len(parts)):
        complete = parts[number:] if passes > 1 else parts[number : number + 1]
        under_way = parts[max(0, number - worker.pushes_at_once) : number]
        gradients = sum(p.nbytes for part in complete for p in part.trained)
        at_a_push.append(gradients + sum(p.routes.push_buffer * p.values.itemsize for p in under_way))
    return max(at_a_push)


class Phase:
    """The steps of one mode, and what they cost. All processes begin and end it together."""

    def __init__(self, plan, engine, mode):
        self.plan, self.engine, self.mode, self.milliseconds = plan, engine, mode, []
        self.costs = dry_run(plan.args, plan.whole.config, engine)
        (flops,) = add_up([sum(cost["flops"] for cost in self.costs.values())])
        self.flops = round(flops / plan.args.workers)  # the same for all masks, where workers have equal rows
        if engine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # what was there before the first step does not count

    def end(self):
        """The phase's entry in summary.json. After --resample all is of the last mask."""
        if self.plan.args.resample:
            self.costs = dry_run(self.plan.args, self.plan.whole.config, self.engine)
        steps, middle = len(self.milliseconds), float(np.median(self.milliseconds))
        per_worker = gather_costs(self.engine, self.costs, steps, self.plan.args.micro_batches)
        self.engine.traffic.clear()
        return {"mask": self.mode, "steps": steps, "step_ms_median": middle, "per_worker": per_worker}


def ring_half(params, processes, dtype):
    """The bytes that a process sends in a ring all-gather or reduce-scatter; twice this, an all-reduce."""
    return round((1 - 1 / processes) * params * dtype.itemsize)


def dense_worker(args, config, engine):
    """What one worker of dense data parallelism (torch's DDP) costs, in the keys of `gather_costs`. The
    model is run on fake tensors, which need no memory. The engine's masks do not matter. With --rows its
    share of a batch need not be a whole number of rows: then costs are multiplied."""
    share = args.batch_size / args.workers / args.micro_batches
    rows = max(1, int(share))
    with torch.device("meta"):
        model = build(config)
    cost = play_without_memory(model, config, rows, args.micro_batches, engine)
    params, width = sum(p.numel() for p in model.parameters()), engine.dtype.itemsize
    moments = {"adamw": 2, "sgd": 1}[args.optimizer] * max(4, width)
    master = 4 if width < 4 else 0  # a second, float32 copy of the weights in mixed precision
    row = {"worker": None, "held_params": params, "peak_bytes": None, "between_machines_bytes": 0}
    row |= {key: round(value * share / rows) for key, value in cost.items()}
    row["weight_bytes"] = row["grad_bytes"] = params * width
    row["optimizer_bytes"] = params * (master + moments)
    row["push_bytes"] = row["pull_bytes"] = ring_half(params, engine.processes, engine.dtype)
    machines = engine.layout.machines
    if machines > 1:  # each has one process that sends to the next machine of the ring
        row["between_machines_bytes"] = round(2 * row["push_bytes"] * machines / engine.processes)
    return row


def unmasked_worker(engine, mean, dense, passes):
    """What a worker would cost with `--mask none`, in the mean: as in DDP, but gradients and optimizer are
    sharded, and between machines each value crosses once. mean: of the workers; dense: of DDP."""
    worker = whole_worker(engine, is_trained=True)
    owned, width = dense["held_params"] / engine.processes, engine.dtype.itemsize
    row = dense | {"optimizer_bytes": round(mean["optimizer_bytes"])}  # owners do not depend on masks
    row["grad_bytes"] = round(gradient_bytes(worker, passes) + owned * max(4, width))
    row["between_machines_bytes"] = round(2 * owned * (engine.layout.machines - 1) * width)
    return row


def gather_costs(engine, costs, steps, passes, memory=memory):
    """A list of dictionaries, one a worker, in the keys of summary.json. costs: from `dry_run`. Memory is
    of live tensors, traffic, per step, of the real collectives, shared evenly by a process's workers."""
    own = []
    for worker in engine.workers:
        row = {"worker": worker} | memory(engine, worker, passes) | costs[worker]
        for kind in ("push", "pull", "between_machines"):
            row[f"{kind}_bytes"] = round(engine.traffic[kind] / steps / len(engine.workers))
        row["peak_bytes"] = torch.cuda.max_memory_allocated() if engine.device.type == "cuda" else None
        own.append(row)
    return sorted(chain(*launch.gather(own)), key=lambda row: row["worker"])


def over_phases(phases):
    """One row a worker from the phases of a run: memory at its highest, the rest per step in the mean."""
    steps, rows = [phase["steps"] for phase in phases], []
    for of_worker in zip(*(phase["per_worker"] for phase in phases)):
        rows.append(dict(of_worker[0]))
        for key, value in of_worker[0].items():
            values = [row[key] for row in of_worker]
            if key in ("flops", *SENT, "between_machines_bytes"):
                rows[-1][key] = round(np.average(values, weights=steps))
            elif value is not None:
                rows[-1][key] = max(values)
    return rows


def summarise(args, config, engine, phases):
    """Print the table of what was measured. Returns it for summary.json."""
    per_worker, dense = over_phases(phases), dense_worker(args, config, engine)
    numeric = [key for key, value in per_worker[0].items() if value is not None]
    mean = {key: np.mean([row[key] for row in per_worker]) for key in numeric}
    largest = {key: max(row[key] for row in per_worker) for key in numeric}
    unmasked = unmasked_worker(engine, mean, dense, args.micro_batches)
    print(table(("mean", "largest", "mask none", "DDP"), (mean, largest, unmasked, dense)))
    if args.capacity:
        held = ("weight_bytes", "grad_bytes", "optimizer_bytes")
        memory = ", ".join(f"{sum(row[key] for key in held) / 1e6:.3f}" for row in per_worker)
        print(f"weights, gradients, master + optimizer of each worker, MB: {memory}")
    if len(phases) > 1:
        print("memory is that of the phase that needs most, before --finish or in it; the rest is the mean")
    turns = args.workers // engine.processes
    if turns > 1:
        print(f"a process plays {turns} workers, which share its master, optimizer and mean gradient")
    print(savings(mean, unmasked, turns))
    summary = {"step_ms_median": phases[-1]["step_ms_median"], "per_worker": per_worker}
    return summary | {"phases": phases, "unmasked": unmasked, "dense": dense}


def savings(mean, unmasked, turns):
    """What the masks leave, in a line. That optimizer and gradients are sharded is no merit of theirs."""
    shares = []
    for keys, what in ((MEMORY, "memory"), (["flops"], "FLOPs"), (SENT, "bytes sent")):
        of_all = sum(unmasked[key] for key in keys)
        if of_all and (what == "FLOPs" or turns == 1):
            shares.append(f"{100 * sum(mean[key] for key in keys) / of_all:.0f} % of the {what}")
    note = "; --steps 0 tells memory and bytes sent" if turns > 1 else ""
    return f"compared with --mask none: {', '.join(shares)}{note}"


def compare(largest, unmasked, dense, processes):
    """The table of what a worker will take at most, beside dense ones of torch's FSDP (ZeRO-3, without the
    layers that it gathers), of `--mask none` and of DDP. All are in the keys of `gather_costs`."""
    fsdp = dense | {key: dense[key] / processes for key in MEMORY if key != "activation_bytes"}
    fsdp["pull_bytes"] = 2 * dense["pull_bytes"]  # weights are gathered once in each direction
    rows = largest, fsdp, unmasked, dense
    rows = [row | {"memory_bytes": sum(row[key] for key in MEMORY)} for row in rows]
    return table(("largest", "FSDP", "mask none", "DDP"), rows)


def table(titles, rows):
    """Four rows of costs as the columns of a text, and two ratios, of the first to the last two."""
    ratios = f"{titles[0]} / none", f"{titles[0]} / DDP"
    lines = [f"{'per worker':<24}" + "".join(f"{title:>11}" for title in titles)]
    lines[0] += "".join(f"{title:>16}" for title in ratios)
    for key, title, unit in (
        ("weight_bytes", "weights, MB", 1e6),
        ("grad_bytes", "gradients, MB", 1e6),
        ("optimizer_bytes", "master + optimizer, MB", 1e6),
        ("activation_bytes", "activations saved, MB", 1e6),
        ("memory_bytes", "all of these, MB", 1e6),
        ("push_bytes", "pushed per step, MB", 1e6),
        ("pull_bytes", "pulled per step, MB", 1e6),
        ("between_machines_bytes", "to other machines, MB", 1e6),
        ("flops", "GFLOP per step", 1e9),
    ):
        values = [row.get(key, 0) / unit for row in rows]
        if values[-1] or key in SENT:  # nothing goes to other machines, or no row has the sum of its memory
            line = f"{title:<24}" + "".join(f"{value:>11.3f}" for value in values)
            quotients = (f"{values[0] / value:.3f}" if value else "-" for value in values[2:])
            lines.append(line + "".join(f"{quotient:>16}" for quotient in quotients))
    return "\n".join(lines)
