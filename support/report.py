"""What a run tells: who holds what, what it will cost, its log, what it saved, and a sample of its text."""

import json
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import masks
from masks import UserError
from model import example
from support import checkpoint, costs, launch
from support.evaluation import continue_text, whole

SAMPLE = 200  # bytes


def announce(plan, mask, device):
    """Print who holds what, what a step is, and from where the run resumes."""
    args = plan.args
    print_mask(plan, mask)
    count = dist.get_world_size()
    processes = f"{count} process{'es' if count > 1 else ''}, {dist.get_backend()} on {device.type}"
    rows = f"sequences of {plan.data.context} tokens" if plan.data.item == "token" else "images"
    print(f"{args.workers} workers on {processes}; a step is {args.batch_size} {rows}")
    own = "rows of the batch and subnetwork" if args.mask == "forward" else "rows of the batch"
    print(f"loss: the mean over the workers, each on its own {own}; val_loss: of the whole model", flush=True)
    if plan.saved:
        changed = "; the data has changed" if plan.fingerprint != plan.saved["fingerprint"] else ""
        print(f"resuming after step {plan.progress['step']} of {plan.saved['path']}{changed}", flush=True)
    if plan.progress["step"] == args.steps:
        print("nothing to train: all --steps are done; a larger --steps continues")


def print_mask(plan, mask):
    args, (params, shared) = plan.args, plan.count_params(mask)
    coverage = 1 if args.mask == "none" else args.coverage
    print(masks.describe(mask, plan.units, coverage, args.machines or 1))
    blocks = f", with blocks {', '.join(map(str, sorted(plan.shared_blocks)))}" if plan.shared_blocks else ""
    print(f"{params:,} parameters, {shared:,} of them ({shared / params:.1%}) shared by all workers{blocks}")


def forecast(plan, make_engine):
    """Print what a worker will take at most in a step, beside torch's FSDP and DDP, without taking it: where
    torchrun has started several processes on as many, else on one for each worker. make_engine(mask, mode,
    device, machines=) makes the engine. Returns (largest costs, those of DDP), see `costs.gather_costs`."""
    args, mask = plan.args, plan.draw_mask(0)
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    args.dtype = args.dtype or launch.default_dtype(torch.device("cuda" if on_gpu else "cpu"))
    plan.saved = None  # values do not matter
    processes = args.workers if launch.world_size() == 1 else launch.world_size()
    loads = mask @ masks.costs(plan.units), mask.sum(axis=1) * args.rows, args.capacity or args.rows
    fullest = sorted({int(np.argmax(load)) for load in loads})  # one worker, unless they are unequal
    mode = "backward" if args.finish else args.mask  # what takes most

    def play(mask, mode):
        played = [play_without_memory(plan, mask, mode, each, processes, make_engine) for each in fullest]
        return {key: max(row[key] for row, _ in played) for key in played[0][0]}, played[0][1]

    (largest, engine), (unmasked, _) = play(mask, mode), play(np.ones_like(mask), "none")
    dense = costs.dense_worker(args, plan.whole.config, engine)
    print_mask(plan, mask)
    print(f"{args.workers} workers on {processes} processes; {args.batch_size} rows a step; {args.dtype}")
    print(costs.compare(largest, unmasked, dense, processes))
    if args.finish:
        print("costs are those of a step in --finish, which needs most")
    return largest, dense


def play_without_memory(plan, mask, mode, worker, processes, make_engine):
    """(what a worker takes in a step, in the keys of `gather_costs`; its engine). It plays the step on
    tensors that have shapes and no memory, among processes that are not there."""
    args, passes = plan.args, plan.args.micro_batches
    rows = args.batch_size // sum(args.rows) * args.rows[worker] // passes
    machines = args.machines or launch.count_machines()
    machines = machines if processes % machines == 0 else 1  # as in a run, where they are unequal
    arrived = torch.futures.Future()  # the answer to every exchange
    arrived.set_result(None)
    with (
        fake_process_group(worker * processes // args.workers, processes),
        FakeTensorMode(),
        mock.patch.object(dist, "all_to_all_single", lambda *_, **__: arrived),
    ):
        engine = make_engine(mask, mode, torch.device("cpu"), machines=machines)
        with engine.turn(worker, passes) as model:
            for _ in range(passes):
                with costs.measured(passes) as cost:
                    model(*example(plan.whole.config, rows)).backward()
        engine.optimizer.step()  # for its state
        memory = {number: costs.memory(engine, number, passes) for number in engine.workers}
        row = memory[worker] | cost
        row["grad_bytes"] = max(each["grad_bytes"] for each in memory.values())  # buffers differ
        row |= {f"{kind}_bytes": engine.traffic[kind] for kind in ("push", "pull", "between_machines")}
    return row, engine


@contextmanager
def fake_process_group(rank, processes):
    """`with fake_process_group(...):` this is one of many processes, and no other one is there."""
    if dist.is_initialized():  # in a notebook, by a run that was interrupted
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def open_records(args, saved):
    """`with open_records(...) as record:` record(entry) writes a step's entry, on rank 0, to log.jsonl of
    --out, and to --wandb. Raises UserError where Weights & Biases cannot be used."""
    with ExitStack() as stack:
        log, tracker = None, None
        if args.out and dist.get_rank() == 0:
            log = stack.enter_context(checkpoint.open_log(Path(args.out), saved))
        if args.wandb and dist.get_rank() == 0:
            import wandb

            try:
                tracker = wandb.init(project=args.wandb, config=vars(args), dir=args.out)
            except wandb.Error as error:
                raise UserError(f"--wandb {args.wandb}: {' '.join(str(error).split())}") from error
            stack.enter_context(tracker)

        def record(entry):
            if log:
                print(json.dumps(entry), file=log, flush=True)
            if tracker:
                tracker.log(entry, step=entry["step"])

        yield record


def print_results(plan, engine, mask, phases, metrics):
    """Print the table of costs and a sample, and write summary.json. All processes take part."""
    args = plan.args
    if engine.rank == 0:
        summary = summarise(plan, engine, mask, phases, metrics)
        if args.out:
            Path(args.out, "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    if getattr(plan.whole.config, "vocabulary", None) == 256:  # a GPT of bytes
        with whole(engine) as model, torch.compiler.set_stance("force_eager"):
            if engine.rank == 0:
                text = bytes(continue_text(model, b"\n", SAMPLE, seed=args.seed)).decode(errors="replace")
                print(f"a sample of {SAMPLE} bytes:\n{text}", flush=True)


def summarise(plan, engine, mask, phases, metrics):
    """Print the table, and return what belongs into summary.json."""
    args, (params, shared) = plan.args, plan.count_params(mask)
    summary = {
        "config": vars(args), "model": asdict(plan.whole.config), "steps": args.steps, "params": params,
        "workers": args.workers, "processes": engine.processes, "machines": args.machines,
        "holders_per_unit": int(mask[:, 0].sum()), "coverage": float(mask[:, 0].mean()),
        "spectral_gap": masks.spectral_gap(mask), "shared_params": shared,
        "skipped_steps": plan.progress["skipped"],
    } | {f"final_{name}": value for name, value in metrics.items()}  # fmt: skip
    return summary | costs.summarise(args, plan.whole.config, engine, phases)
