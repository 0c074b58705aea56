"""Train a model with Subnetwork Data Parallelism, and show what each worker saved.

    torchrun --standalone --nproc-per-node 4 train.py --mask backward     # 4 workers; on a CPU too, over gloo
    torchrun --standalone --nproc-per-node 2 train.py --mask forward --units neuron --workers 8
    python train.py --mask forward                                        # one process plays four workers

Needs masks.py, model.py, sdp.py and data.py, which are best read first.
"""

import json
import math
import os
import tempfile
import time
import zlib
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from itertools import chain
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

from data import python_text
from masks import MODES, Parser, assign, at_least, check_coverage, describe, holders_per_unit, spectral_gap
from model import GPT, GROUPS, GPTConfig, initial_value, units_of
from sdp import SDP

# ---- flags


def make_parser():
    parser = Parser(description="Train a model with Subnetwork Data Parallelism.", allow_abbrev=False)
    for flag, kind, default, meaning in (
        ("--mask", MODES, "backward", "none: data parallelism; backward: whole forward pass, gradients for"
         " held units; forward: only held units exist"),
        ("--units", ("block", "neuron"), "block", "what a mask switches: residual blocks, or attention heads"
         f" and groups of hidden neurons, {GROUPS} a layer"),
        ("--coverage", float, 0.5, "share C of the N workers that hold a unit: floor(C N + 1/2)"),
        ("--workers", at_least(1), None, "workers N, a multiple of the processes, which play them in turn"
         " (default: as many as processes; 4 for one process with a mask)"),
        ("--model", ("gpt",), "gpt", "a LLaMA-style language model"),
        ("--layers", at_least(1), 6, "transformer blocks"),
        ("--width", at_least(1), 128, "features of the residual stream"),
        ("--heads", at_least(1), 4, "attention heads of a block"),
        ("--hidden", at_least(1), 256, "hidden neurons of a block's MLP"),
        ("--context", at_least(1), 128, "tokens of a sequence"),
        ("--data", ("python",), "python", "the bytes of the standard library's .py files"),
        ("--data-dir", str, None, "another folder of .py files for --data python"),
        ("--steps", at_least(1), 300, "updates"),
        ("--batch-size", at_least(1), 16, "sequences of a step, over all workers"),
        ("--lr", at_least(0, float), 3e-3, "peak learning rate of AdamW"),
        ("--warmup", at_least(0), 20, "steps of linear warm-up, before a cosine down to a tenth of --lr"),
        ("--weight-decay", at_least(0, float), 0.1, "of matrices, as in AdamW; norms have none"),
        ("--grad-clip", at_least(0, float), 1.0, "largest norm of the averaged gradient, 0 = no clipping"),
        ("--eval-every", at_least(0), 100, "steps between validations, 0 = only after the last"),
        ("--eval-batches", at_least(1), 20, "batches of a validation, which is of the whole model"),
        ("--dtype", ("float32", "bfloat16", "float64"), "float32", "of weights, gradients and traffic; owners"
         " keep at least float32"),
        ("--seed", at_least(0), 0, "of initial values, batches and masks"),
        ("--out", str, None, "folder for log.jsonl and summary.json; without it nothing is written"),
    ):  # fmt: skip
        limits = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        text = meaning if default is None else f"{meaning} (default: {default})"
        parser.add_argument(flag, default=default, help=text, **limits)
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is in --out")
    return parser


def check(args, processes, parser):
    """Complete and check the flags; the first wrong one ends the program. Returns what they lead to:
    (the whole model on the meta device, text, units, mask)."""
    fail = parser.error
    alone, unasked = processes == 1 and args.mask != "none", args.workers is None
    args.workers = args.workers or (4 if alone else processes)
    if args.workers % processes:
        fail(f"--workers {args.workers}: must be a multiple of the {processes} processes")
    if args.batch_size % args.workers:
        lower = args.batch_size // args.workers * args.workers
        fail(
            f"--batch-size {args.batch_size}: must be a multiple of the {args.workers} workers, "
            f"such as {' or '.join(str(n) for n in (lower, lower + args.workers) if n)}"
        )
    if args.width % (2 * args.heads):
        fail(
            f"--width {args.width}: must be a multiple of {2 * args.heads}, "
            f"so that each of the {args.heads} --heads has an even number of features"
        )
    if args.hidden % GROUPS:
        fail(f"--hidden {args.hidden}: must be a multiple of {GROUPS}, the number of groups of neurons")
    try:
        text = python_text(args.data_dir)
    except (ValueError, OSError) as error:
        fail(f"--data-dir {args.data_dir or '(the standard library)'}: {error}")
    try:
        tokens = min(len(text.train), len(text.held_out))
        if tokens <= args.context:
            raise ValueError(f"--context {args.context}: must be below {tokens}, the tokens that there are")
        config = GPTConfig(text.vocabulary, args.layers, args.width, args.heads, args.hidden, args.context)
        with torch.device("meta"):
            whole = GPT(config)
        units = units_of(whole, args.units)
        mask = np.ones((args.workers, len(units)), dtype=bool)
        check_coverage(args.coverage)  # also where it decides nothing
        if args.mask != "none":
            mask = assign(units, args.workers, holders_per_unit(args.coverage, args.workers), args.seed)
    except ValueError as error:
        fail(str(error))
    if args.out and os.environ.get("RANK", "0") == "0":
        out = Path(args.out)
        try:
            if not args.overwrite and ((out / "log.jsonl").exists() or (out / "summary.json").exists()):
                fail(f"--out {out}: has a run already; choose another folder, or replace it by --overwrite")
            out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=out).close()
        except OSError as error:
            fail(f"--out {out}: cannot be written ({error.strerror}); choose a folder that can")
    if alone and unasked:
        print(f"one process and no --workers: it plays {args.workers} workers, one after another")
    elif alone and args.workers == 1:
        print("--workers 1: one worker holds everything, whatever the mask")
    return whole, text, units, mask


def usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def start(parser):
    """Join the process group that torchrun describes, or make a group of one. Returns this process's device.

    NCCL where each local process has a GPU to itself. Otherwise gloo, because NCCL refuses to share a GPU.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device, options = torch.device("cpu"), {"backend": "gloo"}
    if torch.cuda.is_available():
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
        if local_processes <= torch.cuda.device_count():
            options = {"backend": "nccl", "device_id": device}
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun sets 1, however many cores there are
        torch.set_num_threads(max(1, usable_cores() // local_processes))
    if "RANK" not in os.environ:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if dist.is_initialized():  # in a notebook, by a run that was interrupted
        dist.destroy_process_group()
    try:
        dist.init_process_group(timeout=timedelta(minutes=10), **options)
    except (RuntimeError, ValueError) as error:
        parser.error(
            f"the processes cannot reach each other ({str(error).splitlines()[0]}); where gloo has chosen a "
            "wrong network interface, set GLOO_SOCKET_IFNAME: on one machine to lo (Linux) or lo0 (macOS)"
        )
    return device


def leave():
    """End the process group, all together. Destroying it holds Python's lock, which gloo's threads need for a
    moment after the last traffic, to free its tensors: without the pause torch 2.6 sometimes hangs here."""
    dist.barrier()
    time.sleep(0.1)
    dist.destroy_process_group()


def agree(facts, parser):
    """End the program where a fact, {name: value}, is not the same on all processes: later that would
    hang."""
    of_all = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, facts)
    for rank, others in enumerate(of_all):
        for name, value in of_all[0].items():
            if others[name] != value:
                parser.error(
                    f"{name}: {value!r} on rank 0, but {others[name]!r} on rank {rank}; must be the same"
                )


# ---- measuring


@contextmanager
def measured(parameters):
    """`with measured(parameters) as cost:` around one forward and backward pass: afterwards cost["flops"] as
    torch counts them, and cost["activation_bytes"], what autograd saved for the backward pass: each storage
    once, parameters excluded."""
    cost, seen = {}, {}
    own = {p.untyped_storage()._cdata for p in parameters}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:  # data_ptr() would be 0 for all fake tensors
            seen[storage._cdata] = storage.nbytes()
        return tensor.detach()  # returning the tensor itself would make a reference cycle

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    cpu_attention = {  # FlopCounterMode counts 0 for these two
        kernel: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v),
    }
    with (
        FlopCounterMode(display=False, custom_mapping=cpu_attention) as counter,
        saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        yield cost
    cost |= {"flops": counter.get_total_flops(), "activation_bytes": sum(seen.values())}


def dense_worker(whole, rows, processes, dtype, device):
    """What one worker of dense data parallelism (torch's DDP with AdamW) costs: FLOPs and activations of the
    dense model on fake tensors, which need no memory; the rest follows from the number of parameters."""
    with FakeTensorMode(), torch.device(device):
        fake = {n: torch.empty(p.shape, dtype=dtype, requires_grad=True) for n, p in whole.named_parameters()}
        tokens, targets = (torch.zeros(rows, whole.config.context, dtype=torch.int64) for _ in range(2))
        with measured(fake.values()) as cost:
            functional_call(whole, fake, (tokens, targets)).backward()
    params = sum(p.numel() for p in whole.parameters())
    half = round((1 - 1 / processes) * params * dtype.itemsize)  # of a ring all-reduce: what it sends, twice
    master = 4 if dtype.itemsize < 4 else 0  # a second, float32 copy of the weights in mixed precision
    return {
        "worker": None,
        "held_params": params,
        "weight_bytes": params * dtype.itemsize,
        "grad_bytes": params * dtype.itemsize,
        "optimizer_bytes": params * (master + 2 * max(4, dtype.itemsize)),
        "activation_bytes": cost["activation_bytes"],
        "peak_bytes": None,
        "flops": cost["flops"],
        "push_bytes": half,
        "pull_bytes": half,
    }


def worker_costs(engine, worker, steps):
    """What a worker took, from its live tensors and the real collectives, in the keys of summary.json.

    Gradients: the worker's own at their most, those on their way included, and the owned slices of the mean.
    Optimizer: the owned slices of the master copy, and what the optimizer keeps for each of their elements. A
    process's traffic is divided evenly among the workers that it played.
    """
    parts, buckets = engine.workers[worker].parts, engine.buckets.values()
    moments = [t for state in engine.optimizer.state.values() for t in state.values() if t.dim() > 0]
    turns = steps * len(engine.workers)
    return {
        "worker": worker,
        "held_params": sum(p.numel() for part in parts for p in part.trained),
        "weight_bytes": sum(part.values.nbytes for part in parts),
        "grad_bytes": engine.workers[worker].grad_bytes + sum(bucket.mean.nbytes for bucket in buckets),
        "optimizer_bytes": sum(t.nbytes for t in (*moments, *(bucket.master for bucket in buckets))),
        "peak_bytes": torch.cuda.max_memory_allocated() if engine.device.type == "cuda" else None,
        "push_bytes": round(engine.traffic["push"] / turns),
        "pull_bytes": round(engine.traffic["pull"] / turns),
    }


def table(per_worker, dense):
    """What was measured, as text: the mean over the workers and the largest, beside a dense worker."""
    lines = [f"{'per worker':<28}{'mean':>14}{'largest':>14}{'dense DDP':>14}{'mean / dense':>14}"]
    for key, title in (
        ("weight_bytes", "weights, MB"),
        ("grad_bytes", "gradients, MB"),
        ("optimizer_bytes", "master + optimizer, MB"),
        ("activation_bytes", "activations saved, MB"),
        ("push_bytes", "pushed per step, MB"),
        ("pull_bytes", "pulled per step, MB"),
        ("flops", "GFLOP per step"),
    ):
        values, unit = [worker[key] for worker in per_worker], 1e9 if key == "flops" else 1e6
        numbers = [number / unit for number in (mean(values), max(values), dense[key])]
        ratio = f"{numbers[0] / numbers[2]:.3f}" if dense[key] else "-"
        lines.append(f"{title:<28}" + "".join(f"{number:>14.3f}" for number in numbers) + f"{ratio:>14}")
    return "\n".join(lines)


# ---- the run


def learning_rate(step, args):
    """Linear warm-up, then a cosine from --lr to a tenth of it at the last step; steps count from 1."""
    if step <= args.warmup:
        return args.lr * step / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


def evaluate(engine, text, args, device):
    """Validation loss of the whole model, in nats per token: each process takes its share of the
    sequences."""
    tokens, targets = text.validation(args.eval_batches * args.batch_size, args.context)
    share = slice(engine.rank, None, engine.processes)
    total = torch.zeros((), dtype=torch.float64)
    with engine.whole() as model:
        rows = args.batch_size // engine.processes
        for x, y in zip(tokens[share].split(rows), targets[share].split(rows)):
            total += len(x) * model(x.to(device), y.to(device)).double().cpu()
    total = total.to(device)
    dist.all_reduce(total)
    return total.item() / len(tokens)


def train(engine, text, args, device, log):
    """The loop. Writes each step to `log`, a file or None. Returns ({worker: what `measured` found in the
    first step}, median step time in ms, final validation loss)."""
    rows = args.batch_size // args.workers
    costs, milliseconds, val_loss = {}, [], None
    bar = tqdm(range(1, args.steps + 1), disable=engine.rank != 0, unit="step", mininterval=0.5)
    for step in bar:
        began = time.perf_counter()
        tokens, targets = text.batch(args.seed, step, args.batch_size, args.context)
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for worker in engine.workers:
            x, y = (t[worker * rows : (worker + 1) * rows].clone().to(device) for t in (tokens, targets))
            meter = measured(engine.workers[worker].model.parameters()) if step == 1 else nullcontext(None)
            with engine.turn(worker) as model, meter as cost:
                loss = model(x, y)  # x, y: (rows, context)
                loss.backward()
            loss_sum += loss.detach()
            if step == 1:
                costs[worker] = cost
        lr = learning_rate(step, args)
        norm, loss_sum = engine.step(lr, args.grad_clip, loss_sum)
        seconds = time.perf_counter() - began

        loss, speed = loss_sum / args.workers, tokens.numel() / seconds
        entry = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm}
        entry |= {"step_ms": 1e3 * seconds, "tokens": step * tokens.numel()}
        milliseconds.append(entry["step_ms"])
        bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}, {speed:,.0f} tokens/s", refresh=False)
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            entry["val_loss"] = val_loss = evaluate(engine, text, args, device)
            if engine.rank == 0:
                bar.write(f"step {step}: val_loss {val_loss:.4f} nats per byte")
        if log:
            print(json.dumps(entry), file=log, flush=True)
    return costs, median(milliseconds), val_loss


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    processes = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    whole, text, units, mask = check(args, processes, parser)
    device, dtype = start(parser), getattr(torch, args.dtype)
    local = {"out", "data_dir"}  # rank 0's alone, and whatever folder has the same data
    facts = {f"--{k.replace('_', '-')}": v for k, v in vars(args).items() if k not in local}
    facts |= {"the data's checksum": text.fingerprint(), "torch's version": torch.__version__}
    agree(facts | {"the masks' checksum (numpy)": zlib.crc32(mask.tobytes())}, parser)

    engine = SDP(
        build=lambda trained, frozen: GPT(whole.config, trained, frozen),
        initial_value=lambda model, name: initial_value(model, name, args.seed),
        optimizer=lambda groups: torch.optim.AdamW(
            groups, lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True
        ),
        units=units,
        mask=mask,
        mode=args.mask,
        dtype=dtype,
        device=device,
    )
    params = sum(p.numel() for p in whole.parameters())
    shared = params - sum(unit.cost for unit, held in zip(units, mask.T) if not held.all())
    if engine.rank == 0:
        print(describe(mask, units, asked=1 if args.mask == "none" else args.coverage))
        print(
            f"{params:,} parameters, {shared:,} of them ({shared / params:.1%}) shared by all workers\n"
            f"{args.workers} workers on {processes} process(es), {dist.get_backend()} on {device.type}; "
            f"a step is {args.batch_size} sequences of {args.context} tokens\n"
            "loss: the mean over the workers, each on its own sequences"
            f"{' and subnetwork' if args.mask == 'forward' else ''}; val_loss: of the whole model",
            flush=True,
        )

    out = Path(args.out) if args.out and engine.rank == 0 else None
    if out:
        (out / "summary.json").unlink(missing_ok=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with (out / "log.jsonl").open("w") if out else nullcontext() as log:
        costs, step_ms, val_loss = train(engine, text, args, device, log)

    own = [worker_costs(engine, worker, args.steps) | costs[worker] for worker in engine.workers]
    of_all = [None] * processes
    dist.all_gather_object(of_all, own)
    leave()
    if engine.rank == 0:
        per_worker = sorted(chain(*of_all), key=lambda costs: costs["worker"])
        dense = dense_worker(whole, args.batch_size // args.workers, processes, dtype, device)
        print(table(per_worker, dense))
        if args.workers > processes:
            print(
                f"A process plays {args.workers // processes} workers, one after another: its master, "
                "optimizer and mean gradient serve them all; what is pushed and pulled is for one."
            )
        summary = {
            "config": vars(args),
            "workers": args.workers,
            "processes": processes,
            "holders_per_unit": int(mask[:, 0].sum()),
            "coverage": float(mask[:, 0].mean()),
            "spectral_gap": spectral_gap(mask),
            "steps": args.steps,
            "params": params,
            "shared_params": shared,
            "final_val_loss": val_loss,
            "step_ms_median": step_ms,
            "per_worker": per_worker,
            "dense": dense,
        }
        if out:
            (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
