"""Train a model with Subnetwork Data Parallelism, and show what each worker saved.

    torchrun --standalone --nproc-per-node 4 train.py --mask backward     # 4 workers; on a CPU too, over gloo
    torchrun --standalone --nproc-per-node 2 train.py --mask forward --units neuron --workers 8
    python train.py --mask forward                                        # one process plays four workers
    torchrun --standalone --nproc-per-node 2 train.py --model resnet18 --width 16 --workers 8
    torchrun --standalone --nproc-per-node 4 train.py --bench --size 10m  # beside torch's DDP and FSDP
    torchrun --standalone --nproc-per-node 4 --max-restarts 3 train.py --out runs/a --resume --save-every 100

Needs masks.py, model.py, sdp.py and data.py, which are best read first.
"""

import gc
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from datetime import timedelta
from functools import cache, lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from statistics import mean, median, quantiles

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

import masks
from data import Images, load, shape_of
from masks import Parser, at_least
from model import (
    CONFIGS,
    FORMAT,
    LOGITS,
    SIZES,
    START,
    build,
    cross_entropy,
    estimate_statistics,
    example,
    initial_value,
    read_checkpoint,
    save_file,
    units_of,
)
from sdp import SDP, add_up, bucket_of

PATIENCE = 10  # steps in a row whose loss or gradient is infinite or NaN, before a run gives up
BN_BATCH = 64  # images that are normalised together where statistics are estimated
LAST, BEFORE = "ckpt.pt", "ckpt.prev.pt"  # the files in --out
OF_MODEL = ("layers", "width", "heads", "hidden", "patch", "norm", "context")  # flags
OF_TRAINING = ("label_smoothing", "checkpoint_activations", "drop_path", "rescale")  # not of the shape
DEFAULTS = {  # where a model has others than the flags say
    "vit": {"data": "cifar10", "batch_size": 128, "lr": 1e-3, "weight_decay": 0.05},
    "resnet18": {"data": "cifar10", "batch_size": 128, "optimizer": "sgd", "lr": 0.05, "weight_decay": 5e-4,
                 "grad_clip": 0.0},
}  # fmt: skip


class Stop(Exception):
    """What ends a run on all processes, in one line."""


# ---- flags


def make_parser():
    parser = Parser(description="Train a model with Subnetwork Data Parallelism.", allow_abbrev=False)
    for flag, kind, default, meaning in (
        ("--mask", masks.MODES, "backward", "none: data parallelism; backward: whole forward pass,"
         " gradients for held units; forward: only held units exist"),
        ("--engine", ("sdp", "ddp", "fsdp"), "sdp", "ddp, fsdp: the dense model by torch's"
         " DistributedDataParallel or fully_shard, to compare with"),
        ("--units", ("block", "neuron"), "block", "what a mask switches: residual blocks; or attention heads"
         " and groups of hidden neurons, groups of the channels between convolutions"),
        ("--coverage", float, 0.5, "share C of the N workers that hold a unit: floor(C N + 1/2)"),
        ("--assign", masks.WAYS, "random", "how units are dealt out: random, with a search for masks that mix"
         " the workers well, or cyclic, in a circle, where few share much"),
        ("--resample", at_least(0), 0, "steps between new masks, 0 = the same ones all along"),
        ("--finish", at_least(0, float), 0.0, "last fraction of the steps of a forward-masked run that use"
         " backward masking, with the same masks"),
        ("--keep", str, "none", "blocks that all workers hold: none, ends (the first and the last), strided"
         " (of a ResNet: the first of each stage), or numbers such as 0,5"),
        ("--workers", at_least(1), None, "workers N, a multiple of the processes, which play them in turn"
         " (default: as many as processes; 4 for one process with a mask)"),
        ("--model", tuple(CONFIGS), "gpt", "a LLaMA-style language model, a vision transformer, or a"
         " ResNet-18; the last two have defaults of their own, see DEFAULTS in train.py"),
        ("--size", str, None, "preset of the model's shape, by default the first that fits the data: "
         + "; ".join(f"{model}: {', '.join(sizes)}" for model, sizes in SIZES.items() if sizes)),
        ("--layers", at_least(1), None, "transformer blocks (default: as --size says)"),
        ("--width", at_least(1), None, "features of the residual stream (default: as --size says); of a"
         " ResNet: channels of the first stage (default: 64)"),
        ("--heads", at_least(1), None, "attention heads of a block (default: as --size says)"),
        ("--hidden", at_least(1), None, "hidden neurons of a block's MLP (default: as --size says)"),
        ("--patch", at_least(1), None, "pixels of a patch's side in a vit (default: as --size says)"),
        ("--norm", ("batch", "group"), None, "of a ResNet (default: batch)"),
        ("--context", at_least(1), None, "tokens of a sequence (default: 128; of fineweb 1024)"),
        ("--data", ("python", "fineweb", "cifar10", "cifar100", "imagenet"), "python", "python: the bytes of"
         " the standard library's .py files"),
        ("--data-dir", str, None, "where the data lies, or is put (default: datasets; of fineweb and imagenet"
         " a folder in it); with --data python another folder of .py files"),
        ("--data-url", str, None, "where else to get the archive of cifar10 or cifar100, such as a mirror"),
        ("--steps", at_least(1), None, "updates (default: 300; of --bench 20)"),
        ("--epochs", at_least(0.001, float), None, "passes over the data, in place of --steps"),
        ("--batch-size", at_least(1), 16, "sequences or images of a step, over all workers"),
        ("--micro-batches", at_least(1), 1, "parts into which a worker's rows are cut, one after"
         " another; only the last one communicates"),
        ("--optimizer", ("adamw", "sgd"), "adamw", "sgd: with a Nesterov momentum of 0.9"),
        ("--lr", at_least(0, float), 3e-3, "peak learning rate"),
        ("--warmup", at_least(0), 20, "steps of linear warm-up, before a cosine down to a tenth of --lr"),
        ("--weight-decay", at_least(0, float), 0.1, "of matrices; norms and biases have none"),
        ("--grad-clip", at_least(0, float), 1.0, "largest norm of the averaged gradient, 0 = no clipping"),
        ("--label-smoothing", at_least(0, float), 0.0, "of the training loss: share of the target that is"
         " spread over all classes"),
        ("--drop-path", at_least(0, float), 0.0, "stochastic depth: chance of a sequence or image to skip a"
         " branch in training"),
        ("--eval-every", at_least(0), 100, "steps between validations, 0 = only after the last"),
        ("--eval-batches", at_least(1), 20, "batches of a validation on text; images: the whole test set"),
        ("--bn-batches", at_least(1), 16, f"batches of {BN_BATCH} training images, from which a validation"
         " estimates the statistics of batch norm anew"),
        ("--dtype", ("float32", "bfloat16", "float64"), None, "of weights, gradients and traffic; owners"
         " keep at least float32 (default: bfloat16 on GPUs that have it, else float32)"),
        ("--device", ("auto", "cpu", "cuda", "mps"), "auto", "auto: cuda where there is one, else mps for a"
         " process alone, else cpu"),
        ("--seed", at_least(0), 0, "of initial values, batches and masks"),
        ("--out", str, None, "folder for log.jsonl, summary.json and checkpoints; without it nothing is"
         " written"),
        ("--log-alignment", at_least(0), 0, "steps between comparisons of the workers' gradients with the"
         " whole model's, 0 = never; in these steps each process needs the whole model"),
        ("--save-every", at_least(0), 500, "steps between checkpoints, 0 = only after the last"),
        ("--timeout", at_least(1), 600, "seconds that processes wait for one that does not answer"),
    ):  # fmt: skip
        limits = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        text = meaning if default is None else f"{meaning} (default: {default})"
        parser.add_argument(flag, default=default, help=text, **limits)
    for flag, text in (
        ("--checkpoint-activations", "keep only the input of each block, and compute the rest again"),
        ("--compile", "torch.compile each block"),
        ("--bench", "no training: time SDP in all modes beside DDP and FSDP, into bench.json in --out; all of"
         " them must fit into memory at once"),
        ("--eval-only", "no training: validate the model of --resume"),
        ("--match-flops", "raise the number of steps until a worker has computed as much as one of the dense"
         " model would in --steps"),
        ("--overwrite", "replace the run that is in --out"),
    ):  # fmt: skip
        parser.add_argument(flag, action="store_true", help=text)
    text = "of neuron units: a branch that has only some is not multiplied by units / held units"
    parser.add_argument("--no-rescale", dest="rescale", action="store_false", help=text)
    text = "go on from a checkpoint; without a file, from the one in --out, if it is there already"
    parser.add_argument("--resume", nargs="?", const="", metavar="CHECKPOINT", help=text)
    return parser


def parse(argv=None):
    """(parser, args, the checkpoint to go on from or None), with the defaults that suit --model, or those
    that the checkpoint was trained with."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        path = checkpoint_to_resume(args)
        here = path and args.out and path.resolve().parent == Path(args.out).resolve()
        saved = read_checkpoint(path) | {"path": path, "of_out": here} if path else None
    except (ValueError, OSError) as error:
        parser.error(f"--resume: {error}")
    dense = {"mask": "none"} if args.engine != "sdp" or args.eval_only else {}
    learnt = {flag: saved["flags"][flag] for flag in ("model", "data", "data_dir")} if saved else {}
    parser.set_defaults(**DEFAULTS.get(learnt.get("model", args.model), {}) | dense | learnt)
    return parser, parser.parse_args(argv), saved


def checkpoint_to_resume(args):
    """The file, or None: with --resume alone, or after a restart by torchrun, what is in --out, if there is
    something. Raises ValueError where there can be none."""
    if args.resume == "" and not args.out:
        raise ValueError("without a file, needs the --out that has one")
    if args.out and (args.resume == "" or (restarted() and not args.bench)):
        for path in (Path(args.out, LAST), Path(args.out, BEFORE)):
            if path.exists():
                return path
    return Path(args.resume) if args.resume else None


def restarted():
    """Has torchrun started this process again, after one had failed?"""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def make_config(args, shape, saved=None):
    """The config of --model for data of that shape, such as {"classes": 10, "image": 32}: the preset of
    --size, or what a checkpoint has, then whatever flags were given. Raises ValueError where one does not fit
    the model or contradicts the checkpoint."""
    known, sizes = {field.name for field in fields(CONFIGS[args.model])}, SIZES[args.model]
    if not shape.keys() <= known:
        raise ValueError(f"--data {args.data}: is not for --model {args.model}; choose another of the two")
    if args.size and args.size not in sizes:
        there_are = f"has {', '.join(sizes)}" if sizes else "has none, but a --width"
        raise ValueError(f"--size {args.size}: --model {args.model} {there_are}")
    before = {key: v for key, v in vars(saved["config"]).items() if key not in OF_TRAINING} if saved else {}
    fitting = [size for size in sizes if size != "cifar" or shape["image"] <= 64]
    chosen = before | shape if saved else sizes.get(args.size or next(iter(fitting), None), {}) | shape
    asked = {"--data-dir" if args.data_dir else "--data": shape, "--size": sizes.get(args.size, {})}
    asked |= {
        f"--{flag}": {flag: getattr(args, flag)} for flag in OF_MODEL if getattr(args, flag) is not None
    }
    said = {}  # {field: who has asked for its value}
    for flag, values in asked.items():
        for field, value in values.items():
            said[field] = f"{flag} {getattr(args, flag[2:].replace('-', '_'))}"
            if field not in known:
                raise ValueError(f"{said[field]}: is not for --model {args.model}")
            chosen[field] = value
    for field, was in before.items():
        if (value := chosen[field]) != was:
            raise ValueError(
                f"{said[field]}: the checkpoint {saved['path']} has a {field} of {was}, not {value}; "
                "leave the flag out"
            )
    return CONFIGS[args.model](**chosen, **{flag: getattr(args, flag) for flag in OF_TRAINING})


def check(args, processes, parser, saved=None):
    """Complete and check the flags; the first wrong one ends the program. saved: the checkpoint to go on
    from. Returns what they lead to: (the whole model on the meta device, data, kept blocks, units, a function
    draw(k) -> the k-th mask)."""
    fail = parser.error
    for flag in ("model", "data") if saved else ():
        if (value := getattr(args, flag)) != (was := saved["flags"][flag]):
            fail(f"--{flag} {value}: the checkpoint {saved['path']} was trained with {was}; leave it out")
    keys = {"adamw": {"exp_avg", "exp_avg_sq", "step"}, "sgd": {"momentum_buffer"}}[args.optimizer]
    if saved and not args.eval_only and not all(of.keys() == keys for of in saved["optimizer"].values()):
        fail(f"--optimizer {args.optimizer}: {saved['path']} has the state of another optimizer")
    if args.eval_only and (not saved or args.bench):
        fail("--eval-only: needs a checkpoint, --resume FILE" + ", and no --bench" * args.bench)
    if args.bench and args.resume is not None:
        fail("--resume: not together with --bench, which trains nothing")
    if args.engine != "sdp" and args.mask != "none":
        fail(f"--mask {args.mask}: is for --engine sdp; --engine {args.engine} trains the dense model")
    if args.bench and args.engine != "sdp":
        fail(f"--engine {args.engine}: not together with --bench, which runs all of them")
    for flag in ("resample", "finish", "log_alignment", "match_flops"):
        if (value := getattr(args, flag)) and (args.bench or args.engine != "sdp"):
            said = f"--{flag.replace('_', '-')}{'' if value is True else f' {value:g}'}"
            fail(f"{said}: is for training with --engine sdp" + ", not for --bench" * args.bench)
    if args.resample and (args.mask == "none" or args.compile):
        why = "--compile would compile at each change" if args.compile else "--mask none has no masks"
        fail(f"--resample {args.resample}: {why}; leave one of them out")
    if args.finish and (args.mask != "forward" or args.finish > 1):
        fail(f"--finish {args.finish:g}: must be at most 1, such as 0.3, and is for --mask forward")
    if args.drop_path >= 1:
        fail(f"--drop-path {args.drop_path:g}: must be below 1, such as 0.1")
    alone, unasked = processes == 1 and args.mask != "none" and not args.bench, args.workers is None
    args.workers = args.workers or (4 if alone else processes)
    if args.workers % processes:
        fail(f"--workers {args.workers}: must be a multiple of the {processes} processes")
    if args.workers > processes and (args.bench or args.engine != "sdp"):
        there = "--bench" if args.bench else f"--engine {args.engine}"
        fail(f"--workers {args.workers}: {there} needs as many processes; start them by torchrun")
    parts = args.workers * args.micro_batches
    if args.batch_size % parts:
        lower = args.batch_size // parts * parts
        each = f" times {args.micro_batches} --micro-batches" if args.micro_batches > 1 else ""
        fail(
            f"--batch-size {args.batch_size}: must be a multiple of the {args.workers} workers{each}, "
            f"such as {' or '.join(str(n) for n in (lower, lower + parts) if n)}"
        )
    if args.steps and args.epochs:
        fail(f"--epochs {args.epochs:g}: not together with --steps; choose one")
    if args.label_smoothing > 1:
        fail(f"--label-smoothing {args.label_smoothing:g}: must be at most 1, such as 0.1")
    try:
        masks.check_coverage(args.coverage)  # also where it decides nothing
        context = args.context or (saved and getattr(saved["config"], "context", None))
        text = {"context": context, "tests": args.eval_batches * args.batch_size}
        load_data = cache(lambda: load(args.data, args.data_dir, args.data_url, **text))
        shape = shape_of(args.data) or load_data().shape  # a download comes after all flags are checked
        config = make_config(args, shape, saved)
        with torch.device("meta"):
            whole = build(config)
            kept = masks.kept_blocks(args.keep, len(whole.blocks), whole.first_of_stage)
            units = units_of(whole, args.units, kept)
        masked, full = args.mask != "none" or args.bench, np.ones((args.workers, len(units)), dtype=bool)
        holders = masks.holders_per_unit(args.coverage, args.workers) if masked else args.workers
        deal = partial(masks.assign, units, args.workers, holders, args.seed, args.assign)
        draw = lru_cache(1)(deal if masked else lambda number: full)
        draw(draw=0) if masked else None
        writes = args.out and os.environ.get("RANK", "0") == "0" and not args.eval_only
        goes_on = args.resume == "" or restarted() or (saved and saved["of_out"])
        if writes:
            names = ("bench.json",) if args.bench else ("log.jsonl", "summary.json", LAST, BEFORE)
            prepare_out(Path(args.out), names, args.overwrite or goes_on)
        data = load_data()
    except (ValueError, OSError) as error:
        fail(str(error))
    updates = 20 if args.bench else 300
    updates = math.ceil(args.epochs * data.rows / args.batch_size) if args.epochs else updates
    args.steps = args.steps or updates
    if alone and unasked:
        print(f"one process and no --workers: it plays {args.workers} workers, one after another")
    elif alone and args.workers == 1:
        print("--workers 1: one worker holds everything, whatever the mask")
    return whole, data, kept, units, draw


def prepare_out(out, names, overwrite):
    """Make the folder. Raises ValueError where it has those files already, or cannot be written."""
    try:
        if not overwrite and any((out / name).exists() for name in names):
            raise ValueError(
                f"--out {out}: has a run already; choose another folder, or replace it by --overwrite"
            )
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(
            f"--out {out}: cannot be written ({error.strerror}); choose a folder that can"
        ) from None


def usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def start(args, parser):
    """Join the process group that torchrun describes, or make a group of one. Completes --device and --dtype.
    Returns (this process's device, the store that all processes can write to and read).

    NCCL where each local process has a GPU to itself. Otherwise gloo, because NCCL refuses to share a GPU.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    dense = args.bench or args.engine != "sdp"
    mps = int(os.environ.get("WORLD_SIZE", "1")) == 1 and not dense and args.dtype != "float64"
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available() and mps, "cpu": True}
    if args.device == "auto":
        args.device = next(name for name in there if there[name])
    if not there[args.device]:
        reason = "is not on this machine" if mps or args.device == "cuda" else "is for SDP in one process"
        parser.error(f"--device {args.device}: {reason}; --device auto takes what there is")
    device, options = torch.device(args.device), {"backend": "gloo"}
    if args.device == "cuda":
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
        if local_processes <= torch.cuda.device_count():
            options = {"backend": "nccl", "device_id": device}
        elif dense:  # gloo has been silently wrong with asynchronous work on CUDA tensors, see sdp.py
            parser.error(
                f"--device cuda: {local_processes} processes on {torch.cuda.device_count()} GPU(s) can run "
                "SDP, but not DDP and FSDP; start at most as many processes as there are GPUs"
            )
        elif local == 0:
            print(f"{local_processes} processes share {torch.cuda.device_count()} GPU(s), over gloo")
    if (args.bench or args.engine == "fsdp") and args.device == "cpu":
        if not hasattr(torch.cpu.Stream, "record_event"):
            there = "--bench" if args.bench else "--engine fsdp"
            parser.error(f"{there}: FSDP on a CPU needs a newer torch than {torch.__version__}, such as 2.13")
    fine = args.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    args.dtype = args.dtype or ("bfloat16" if fine else "float32")
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun sets 1, however many cores there are
        torch.set_num_threads(max(1, usable_cores() // local_processes))
    if dist.is_initialized():  # in a notebook, by a run that was interrupted
        dist.destroy_process_group()
    store, rank, processes = dist.HashStore(), 0, 1
    try:
        if "RANK" in os.environ:
            store, rank, processes = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
            store = without_the_past(store, rank, processes)
        patience = timedelta(seconds=args.timeout)
        dist.init_process_group(store=store, rank=rank, world_size=processes, timeout=patience, **options)
    except (RuntimeError, ValueError) as error:
        reason, port = str(error).splitlines()[0], os.environ.get("MASTER_PORT")
        remedy = (
            f"port {port} is in use: set another MASTER_PORT, or torchrun's --master-port"
            if "EADDRINUSE" in reason or "address already in use" in reason
            else "where gloo has chosen a wrong network interface, or cannot resolve this host's name, set "
            "GLOO_SOCKET_IFNAME: on one machine to lo (Linux) or lo0 (macOS)"
        )
        parser.error(f"the processes cannot reach each other ({reason}); {remedy}")
    store.set(last_sign(rank), "0")
    return device, store


def without_the_past(store, rank, processes):
    """A part of the store that is new. torchrun's stays the same when it starts its processes again, and one
    that is quick would find the addresses of those that are gone. So each shows that it is there now, by a
    random word; rank 0 lists the words until all have found theirs; and its own names the new part."""
    word = uuid.uuid4().hex
    store.set(f"word of rank {rank}", word)
    while True:
        if rank == 0:
            words = [store.get(f"word of rank {each}").decode() for each in range(processes)]
            store.set("words", " ".join(words))
        words = store.get("words").decode().split()
        if word in words:
            store.set(f"rank {rank} follows", words[0])
            if rank > 0 or all(
                store.get(f"rank {each} follows").decode() == word for each in range(processes)
            ):
                return dist.PrefixStore(words[0], store)
        time.sleep(0.02)


def leave(together=True):
    """End the process group. Destroying it holds Python's lock, which gloo's threads need for a moment after
    the last traffic, to free its tensors: without the pause torch 2.6 sometimes hangs here."""
    if together:
        dist.barrier()
    time.sleep(0.1)
    dist.destroy_process_group()


def agree(facts):
    """Raises Stop where a fact, {name: value}, is not the same on all processes: later that would
    hang."""
    of_all = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, facts)
    for rank, others in enumerate(of_all):
        for name, value in of_all[0].items():
            if others[name] != value:
                raise Stop(
                    f"{name}: {value!r} on rank 0, but {others[name]!r} on rank {rank}; must be the same"
                )


# ---- what SDP is compared with


def local(tensor):
    """What this process has of a tensor that FSDP may have sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Dense:
    """The whole model on every process by torch's DistributedDataParallel ("ddp") or FSDP2 ("fsdp"), to be
    used like sdp.SDP, each process being one worker. Optimizers work on float32 at least, layer by layer."""

    def __init__(self, kind, build, initial_value, optimizer, dtype, device):
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self.kind, self.build, self.device, self.dtype = kind, build, device, dtype
        self.workers, self.whole_bytes, self.grad_bytes = {self.rank: None}, 0, 0
        self.traffic = Counter()
        wide = torch.promote_types(dtype, torch.float32)
        with torch.device("meta"):
            self.model = build()
        names = [name for name, _ in self.model.named_parameters()]
        kept_as = wide if kind == "fsdp" else dtype
        values = {name: initial_value(self.model, name).to(device, wide) for name in names}
        self.model.load_state_dict({n: value.to(kept_as) for n, value in values.items()}, assign=True)
        if kind == "ddp":
            self.wrapped = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        else:
            mesh = dist.init_device_mesh(device.type, (self.processes,))
            for module in (*self.model.blocks.values(), self.model):
                fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
                module.register_forward_pre_hook(lambda *_: self._look())
            self.wrapped = self.model
        self.wrapped.register_forward_pre_hook(lambda *_: self._pass())
        layers = defaultdict(lambda: ([], []))
        for name, parameter in self.model.named_parameters():
            master = parameter if parameter.dtype == wide else torch.nn.Parameter(values[name])
            layers[bucket_of(name)][parameter.dim() == 1].append((parameter, master))
        self.layers = []  # [([(parameter, its master copy or itself)], optimizer)]
        for matrices, others in layers.values():
            groups = (
                {"params": [m for _, m in matrices]},
                {"params": [m for _, m in others], "weight_decay": 0},
            )
            self.layers.append((matrices + others, optimizer([g for g in groups if g["params"]])))

    def _look(self):
        """Before a layer computes, in the first step: how much of the model is not sharded now?"""
        if self.grad_bytes:
            return
        whole = (p.nbytes for p in self.model.parameters() if not isinstance(p, DTensor))
        self.whole_bytes = max(self.whole_bytes, sum(whole))

    def _pass(self):
        self.passes -= 1  # only the last of them communicates
        if self.kind == "ddp":
            self.wrapped.require_backward_grad_sync = self.passes == 0
        else:
            self.model.set_requires_gradient_sync(self.passes == 0)

    def rehearse(self, run):
        """run(model), for which others have to wait only if it is FSDP's."""
        self.passes = self.of_step = 1
        run(self.model)
        self.model.zero_grad()

    @contextmanager
    def turn(self, worker, passes=1):
        self.passes = self.of_step = passes
        yield self.wrapped

    @contextmanager
    def whole(self):
        with torch.device("meta"):
            model = self.build()
        values = {name: full(p.detach()).to(self.dtype) for name, p in self.model.named_parameters()}
        model.load_state_dict(values, assign=True)
        yield model.eval().requires_grad_(False)

    def step(self, lr, clip=0.0, *numbers):
        gradients = [local(p.grad) for p in self.model.parameters()]
        wide = torch.promote_types(self.dtype, torch.float32)
        squares = torch.stack(torch._foreach_norm(gradients, 2, dtype=wide)).square().sum().item()
        squares /= 1 if self.kind == "fsdp" else self.processes  # which have the same gradients
        squares, *sums = add_up([squares, *numbers])
        norm = squares**0.5
        factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        self.grad_bytes = sum(g.nbytes for g in gradients)
        for pairs, optimizer in self.layers if np.isfinite([norm, *sums]).all() else ():
            for parameter, master in pairs:
                master.grad = parameter.grad.to(master.dtype)
            if factor < 1:
                torch._foreach_mul_([local(master.grad) for _, master in pairs], factor)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            for parameter, master in pairs:
                if master is not parameter:
                    parameter.data.copy_(master)
                master.grad = parameter.grad = None
        self.model.zero_grad()  # of a step that was left out
        self._count_traffic()
        return norm, *sums

    def _count_traffic(self):
        """As it is by construction: a ring; or in each pass an all-gather of each block forward and backward,
        and of the rest once, and a reduce-scatter in the last pass."""
        sizes = {name: p.numel() for name, p in self.model.named_parameters()}
        half = ring_half(sum(sizes.values()), self.processes, self.dtype)
        again = sum(n for name, n in sizes.items() if name.startswith("blocks."))
        gathered = half + ring_half(again, self.processes, self.dtype)
        self.traffic.update(push=half, pull=gathered * self.of_step if self.kind == "fsdp" else half)

    def state(self):
        model, moments, names = {}, {}, {p: name for name, p in self.model.named_parameters()}
        for pairs, optimizer in self.layers:
            for parameter, master in pairs:
                whole = full(master.detach()).cpu()
                of = {key: full(tensor.detach()).cpu() for key, tensor in optimizer.state[master].items()}
                if self.rank == 0:
                    model[names[parameter]], moments[names[parameter]] = whole, of
        return model, moments

    @torch.no_grad()
    def load(self, model, moments):
        def like(whole, master):
            dtype = master.dtype if whole.dim() > 0 else None  # else it is a number of steps
            whole = whole.to(self.device, dtype, copy=True)
            sharded = isinstance(master, DTensor) and whole.dim() > 0
            return distribute_tensor(whole, master.device_mesh, master.placements) if sharded else whole

        names = {p: name for name, p in self.model.named_parameters()}
        for pairs, optimizer in self.layers:
            for parameter, master in pairs:
                name = names[parameter]
                master.copy_(like(model[name], master))
                parameter.data.copy_(master)
                optimizer.state[master] = {key: like(of, master) for key, of in moments.get(name, {}).items()}

    def costs(self):
        """As `worker_costs`. FSDP's gradients are counted without those on their way, but between passes all
        of them are there."""
        params, sharded = sum(p.numel() for p in self.model.parameters()), self.kind == "fsdp"
        kept = params * self.dtype.itemsize if sharded and self.of_step > 1 else 0
        pairs = [pair for pairs, _ in self.layers for pair in pairs]
        masters = [local(master) for parameter, master in pairs if master is not parameter]
        states = [s for _, optimizer in self.layers for s in optimizer.state.values()]
        moments = [local(t) for state in states for t in state.values() if t.dim() > 0]
        weights = sum(local(parameter).nbytes for parameter, _ in pairs)
        return {
            "worker": self.rank,
            "held_params": params,
            "weight_bytes": weights + self.whole_bytes,
            "grad_bytes": self.grad_bytes + kept,
            "optimizer_bytes": sum(t.nbytes for t in (*moments, *masters)),
        }


# ---- measuring


def ring_half(params, processes, dtype):
    """The bytes that each process sends in a ring all-gather or reduce-scatter; twice this, an all-reduce."""
    return round((1 - 1 / processes) * params * dtype.itemsize)


def peak_bytes(device):
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


@contextmanager
def measured(parameters):
    """`with measured(parameters) as cost:` around one forward and backward pass: afterwards cost["flops"] as
    torch counts them, and cost["activation_bytes"], what autograd saved for the backward pass: each storage
    once, parameters excluded. parameters: a function that returns them (FSDP makes them anew)."""
    cost, seen = {}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        own = (local(p).untyped_storage()._cdata for p in parameters())
        if storage._cdata not in seen and storage._cdata not in own:  # data_ptr() is 0 for all fake tensors
            seen[storage._cdata] = storage.nbytes()
        return tensor.detach()  # returning the tensor itself would make a reference cycle

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    cpu_attention = {  # FlopCounterMode counts 0 for these two
        kernel: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v),
    }
    with (
        torch.compiler.set_stance("force_eager"),  # who compiles gives up for good where others look on
        FlopCounterMode(display=False, custom_mapping=cpu_attention) as counter,
        saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        yield cost
    cost |= {"flops": counter.get_total_flops(), "activation_bytes": sum(seen.values())}


def dense_worker(config, rows, micro_batches, processes, optimizer, dtype, device):
    """What one worker of dense data parallelism (torch's DDP) costs: FLOPs and activations of the dense model
    on fake tensors, which need no memory; the rest follows from the number of parameters."""
    with torch.device("meta"):
        model = build(config)
    with FakeTensorMode(), torch.device(device):
        values = {name: torch.empty(p.shape, dtype=dtype) for name, p in model.named_parameters()}
        model.load_state_dict(values, assign=True)
        with measured(model.parameters) as cost:
            model(*example(config, rows // micro_batches)).backward()
    params = sum(p.numel() for p in model.parameters())
    half = ring_half(params, processes, dtype)
    master = 4 if dtype.itemsize < 4 else 0  # a second, float32 copy of the weights in mixed precision
    moments = {"adamw": 2, "sgd": 1}[optimizer]
    return {
        "worker": None,
        "held_params": params,
        "weight_bytes": params * dtype.itemsize,
        "grad_bytes": params * dtype.itemsize,
        "optimizer_bytes": params * (master + moments * max(4, dtype.itemsize)),
        "activation_bytes": cost["activation_bytes"],
        "peak_bytes": None,
        "flops": cost["flops"] * micro_batches,
        "push_bytes": half,
        "pull_bytes": half,
    }


def worker_costs(engine, worker, steps):
    """What a worker took, from its live tensors and the real collectives, in the keys of summary.json.

    Gradients: the worker's own at their most, those on their way included, and the owned slices of the mean.
    Optimizer: the owned slices of the master copy, and what the optimizer keeps for each of their elements. A
    process's traffic is divided evenly among the workers that it played.
    """
    turns = steps * len(engine.workers)
    traffic = {f"{kind}_bytes": round(engine.traffic[kind] / turns) for kind in ("push", "pull")}
    traffic["peak_bytes"] = peak_bytes(engine.device)
    if isinstance(engine, Dense):
        return engine.costs() | traffic
    parts, buckets = engine.workers[worker].parts, engine.buckets.values()
    moments = [t for state in engine.optimizer.state.values() for t in state.values() if t.dim() > 0]
    return traffic | {
        "worker": worker,
        "held_params": sum(p.numel() for part in parts for p in part.trained),
        "weight_bytes": sum(part.values.nbytes for part in parts),
        "grad_bytes": engine.workers[worker].grad_bytes + sum(bucket.mean.nbytes for bucket in buckets),
        "optimizer_bytes": sum(t.nbytes for t in (*moments, *(bucket.master for bucket in buckets))),
    }


def gather_costs(engine, costs, steps):
    """[`worker_costs` and `measure` of each worker], of all processes, for so many steps."""
    own = [worker_costs(engine, worker, steps) | costs[worker] for worker in engine.workers]
    of_all = [None] * engine.processes
    dist.all_gather_object(of_all, own)
    return sorted(chain(*of_all), key=lambda costs: costs["worker"])


def over_phases(phases):
    """One row a worker from the phases of a run: memory at its highest, the rest per step in the mean."""
    rows, steps = [], sum(phase["steps"] for phase in phases)
    for of_worker in zip(*(phase["per_worker"] for phase in phases)):
        rows.append({})
        for key, value in of_worker[0].items():
            values = [of_phase[key] for of_phase in of_worker]
            if key in ("flops", "push_bytes", "pull_bytes"):
                value = round(sum(v * phase["steps"] for v, phase in zip(values, phases)) / steps)
            elif value is not None:
                value = max(values)
            rows[-1][key] = value
    return rows


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


# ---- what outlasts a run


def open_log(out, saved):
    """log.jsonl to append to: empty, or with the steps that the checkpoint has, and none after them."""
    path, lines = out / "log.jsonl", []
    if saved and saved["of_out"] and path.exists():
        for line in path.read_text(errors="replace").splitlines(keepends=True):
            try:
                last = saved["progress"]["step"]
                lines += [line] * (line.endswith("\n") and json.loads(line)["step"] <= last)
            except ValueError:
                break  # what a power cut may leave
    part = out / "log.jsonl.part"
    part.write_text("".join(lines))
    part.replace(path)
    return path.open("a")


@contextmanager
def noticed(*signals):
    """`with noticed(SIGTERM) as came:` a list to which they are added, in place of ending the program."""
    came = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in signals}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_sign(rank):
    """Where in the store the step is that a process is in."""
    return f"step of rank {rank}"


def name_the_silent(store):
    """End this process, after a collective has failed, with a line that names who let the others wait. All
    write their steps to the store; who has noticed the failure adds a half: so the oldest is the culprit's.
    """
    rank, processes = dist.get_rank(), dist.get_world_size()
    try:
        store.set_timeout(timedelta(seconds=10))
        store.set(last_sign(rank), str(float(store.get(last_sign(rank))) + 0.5))
        time.sleep(2)  # until the others have noticed it too
        steps = [float(store.get(last_sign(each))) for each in range(processes)]
    except RuntimeError:  # rank 0 has it, where there is no torchrun
        print("train.py: error: rank 0 has not answered", file=sys.stderr, flush=True)
        sys.exit(1)
    silent = [each for each, step in enumerate(steps) if step == min(steps) and step % 1 == 0]
    if rank == steps.index(max(steps)):
        who = f"rank {', '.join(map(str, silent))}" if silent else "a process"
        print(
            f"train.py: error: {who} has not answered in step {min(steps):.0f}: it has ended, was stopped, "
            "or needed longer than --timeout; --resume goes on from the last checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    else:
        time.sleep(1)  # torchrun ends all when the first one leaves
    sys.exit(1)


# ---- the run


def number(x):
    """For JSON, which has no infinity and no NaN."""
    return x if math.isfinite(x) else None


def learning_rate(step, args):
    """Linear warm-up, then a cosine from --lr to a tenth of it at the last step; steps count from 1."""
    if step <= args.warmup:
        return args.lr * step / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


def make_optimizer(args):
    """optimizer(groups), for the pieces that a process owns."""
    if args.optimizer == "sgd":
        sgd = {"momentum": 0.9, "nesterov": True}
        return lambda groups: torch.optim.SGD(groups, args.lr, weight_decay=args.weight_decay, **sgd)
    adamw = {"betas": (0.9, 0.95), "fused": True}
    return lambda groups: torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, **adamw)


@contextmanager
def whole_model(engine, data, args, device):
    """`with whole_model(...) as model:` the whole model on every process, with statistics of batch norm."""
    training = args.bn_batches * BN_BATCH  # always the same images, cut and mirrored in the same way
    some = (slice(i, i + BN_BATCH) for i in range(0, training, BN_BATCH))
    some = islice(some, engine.rank, None, engine.processes)
    with engine.whole() as model:
        estimate_statistics(model, (data.batch(args.seed, 0, training, rows, device)[0] for rows in some))
        yield model


@torch.no_grad()
def evaluate(engine, data, args, device):
    """(loss, accuracy) of the whole model on the validation data: nats per token or image, and the share of
    them for which the true one has the highest logit. Each process takes its share of the rows."""
    totals = np.zeros(3)  # losses, right answers, answers
    own = range(engine.rank, data.tests, engine.processes)
    answers = 1 if isinstance(data, Images) else data.context  # of a row
    rows = min(args.batch_size // engine.processes, LOGITS // (answers * next(iter(data.shape.values()))))
    rows = max(1, rows)
    with whole_model(engine, data, args, device) as model:
        for i in range(0, len(own), rows):
            x, y = data.validation(own[i : i + rows], device)
            logits = model(x)  # (rows, classes) or (rows, context, vocabulary)
            loss, right = cross_entropy(logits, y).item() * y.numel(), (logits.argmax(-1) == y).sum().item()
            totals += loss, right, y.numel()
    loss, right, answers = add_up(totals.tolist())
    return loss / answers, right / answers


def load_batches(data, engine, args, step, device):
    """{worker: (x, y)} for this process's workers, rows that depend on the step and the worker alone."""
    rows, found = args.batch_size // args.workers, {}
    for worker in range(engine.rank, args.workers, engine.processes):
        own = slice(worker * rows, (worker + 1) * rows)
        found[worker] = data.batch(args.seed, step, args.batch_size, own, device)
    return found


def rehearsal(engine, config, args, device, run):
    """run(model, a batch of zeros, as large as one pass's) for each worker, with nothing to wait for."""
    rows = args.batch_size // args.workers // args.micro_batches
    engine.rehearse(lambda model: run(model, *(tensor.to(device) for tensor in example(config, rows))))


def measure(engine, config, args, device):
    """{worker: what `measured` finds in a step}, in a rehearsal: to look on changes the last bits."""
    found = []

    def run(model, x, y):
        with measured(model.parameters) as cost:
            model(x, y).backward()
        found.append(cost | {"flops": cost["flops"] * args.micro_batches})

    rehearsal(engine, config, args, device, run)
    return dict(zip(engine.workers, found))


def measure_modes(engine, mask, mode, config, args, device):
    """({mode: what `measure` finds} for the modes that a run has, {mode: FLOPs of a step, the mean over the
    workers}). `mode` is the one that the engine is in, and stays in."""
    costs = {}
    for each in [args.mask] + ["backward"] * (args.finish > 0):
        if args.finish:
            engine.change(mask, each)
        costs[each] = measure(engine, config, args, device)
    if args.finish:
        engine.change(mask, mode)
    totals = add_up([sum(of["flops"] for of in of_mode.values()) for of_mode in costs.values()])
    return costs, {each: round(total / args.workers) for each, total in zip(costs, totals)}


def compile_now(engine, config, args, device):
    """With --compile: each worker has graphs of its own, and others would wait for it in the first pull."""
    if args.compile:
        try:
            rehearsal(engine, config, args, device, lambda model, x, y: model(x, y).backward())
        except Exception as error:  # there can be anything wrong with a compiler
            reason = " ".join(str(error).split())[:200]
            raise Stop(f"--compile: does not work here ({reason}); leave it out") from None
        dist.barrier()


def play(batches, args, step, worker, model):
    """The backward passes of a worker in a step; batches: {worker: (x, y)}. Returns the mean loss."""
    torch.manual_seed(zlib.crc32(f"{args.seed} {step} {worker}".encode()))  # of --drop-path
    losses = []
    for x, y in zip(*(tensor.chunk(args.micro_batches) for tensor in batches[worker])):
        loss = model(x, y)  # x: (rows, context) or (rows, 3, image, image)
        (loss / args.micro_batches).backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean().item()


def update(engine, batches, args, step, lr, *numbers):
    """One step on {worker: (x, y)}. Returns (norm of the gradient, mean loss, numbers summed over the
    processes; of these the first is what the process has sent in this step, in bytes)."""
    loss_sum, before = 0.0, engine.traffic.total()
    for worker in engine.workers:
        with engine.turn(worker, args.micro_batches) as model:
            loss_sum += play(batches, args, step, worker, model)
    sent = engine.traffic.total() - before
    norm, loss_sum, *sums = engine.step(lr, args.grad_clip, loss_sum, sent, *numbers)
    return norm, loss_sum / args.workers, *sums


def train(engine, at, costs, flops, config, data, args, device, log, store, save, came, progress):
    """The loop, from where `progress` is, a dict like START that goes on with it. at(step) -> (mask, mode);
    costs, flops: from `measure_modes`. Writes each step to `log`, a file or None, and to the store; calls
    save(). A signal that `came` to any process stops all of them. Raises Stop after PATIENCE skipped steps in
    a row. Returns what `summarise` needs: (phases, alignments, median step time in ms, (loss, accuracy) of
    `evaluate`)."""
    what, each = ("images", "image") if isinstance(data, Images) else ("tokens", "token")
    milliseconds, phases, alignments, found, done = [], [], [], None, progress["step"]

    def end_phase(mode):
        steps = progress["step"] - done - sum(phase["steps"] for phase in phases)
        phase = {"mask": mode, "steps": steps, "step_ms_median": median(milliseconds[-steps:])}
        phases.append(phase | {"per_worker": gather_costs(engine, costs[mode], steps)})
        engine.traffic.clear()

    with (
        ThreadPoolExecutor(1) as loader,
        tqdm(
            range(done + 1, args.steps + 1), initial=done, total=args.steps, disable=engine.rank != 0,
            unit="step", mininterval=0.5,
        ) as bar,
    ):  # fmt: skip
        coming, now = loader.submit(load_batches, data, engine, args, done + 1, device), at(done + 1)
        for step in bar:
            store.set(last_sign(engine.rank), str(step))
            if (after := at(step)) is not now:
                if after[1] != now[1]:
                    end_phase(now[1])
                now = after
                engine.change(*now)
                compile_now(engine, config, args, device)
            began = time.perf_counter()
            batches = coming.result()
            coming = loader.submit(load_batches, data, engine, args, min(step + 1, args.steps), device)
            alignment = {}
            if args.log_alignment and step % args.log_alignment == 0:
                alignment = engine.align(partial(play, batches, args, step), args.micro_batches)
                alignments.append(alignment)
                began = time.perf_counter()
            lr = learning_rate(step, args)
            norm, loss, sent, stop = update(engine, batches, args, step, lr, len(came))
            seconds = time.perf_counter() - began

            fine, of_batch = math.isfinite(norm + loss), batches[engine.rank][1].numel() * args.workers
            progress["step"], progress["seen"] = step, progress["seen"] + of_batch
            progress["skipped"] += not fine
            progress["in_a_row"] = 0 if fine else progress["in_a_row"] + 1
            progress["flops"] += flops[now[1]]
            progress["sent_bytes"] += round(sent / args.workers)
            milliseconds.append(1e3 * seconds)
            entry = {"step": step, "loss": number(loss), "lr": lr, "grad_norm": number(norm)}
            entry |= {"step_ms": milliseconds[-1], what: progress["seen"]}
            entry |= {key: progress[key] for key in ("flops", "sent_bytes")}
            entry |= {} if fine else {"loss": None, "grad_norm": None, "skipped": progress["skipped"]}
            entry |= {"alignment": alignment} if alignment else {}
            speed = f"{of_batch / seconds:,.0f} {what}/s"
            bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}, {speed}", refresh=False)
            if step == args.steps or (args.eval_every and step % args.eval_every == 0):
                found = evaluate(engine, data, args, device)
                entry |= {"val_loss": number(found[0]), "val_accuracy": found[1]}
                if engine.rank == 0:
                    bar.write(
                        f"step {step}: val_loss {found[0]:.4f} nats per {each}, accuracy {found[1]:.4f}"
                    )
            if log:
                print(json.dumps(entry), file=log, flush=True)
            if progress["in_a_row"] == PATIENCE:
                raise Stop(
                    f"loss or gradient were infinite or NaN in {PATIENCE} steps in a row, up to step {step}, "
                    "and none of them was applied; --lr may be too high"
                )
            if stop:
                break
            if args.save_every and step % args.save_every == 0 and step < args.steps:
                save()  # the last one is saved when all else is done
    end_phase(now[1])
    return phases, alignments, median(milliseconds), found


def bench(engines, config, data, args, device):
    """Time the engines, {name: function that makes it}, in turns, so that drift hits all alike, on batches
    that are in memory already. Returns {name: figures}: of a step the median and quartiles, of the slowest
    process; bytes and FLOPs of the fullest worker, from two steps before, in which each engine is alone."""
    found = {}
    for name, make in engines.items():
        engine = make()
        compile_now(engine, config, args, device)
        costs = measure(engine, config, args, device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        batches = [load_batches(data, engine, args, step, device) for step in (1, 2)]
        for step, batch in enumerate(batches):
            update(engine, batch, args, step, args.lr)
        of_all = gather_costs(engine, costs, 2)
        found[name] = {key: max(of[key] for of in of_all) for key in of_all[0] if of_all[0][key] is not None}
        del engine
        gc.collect()
    made = {name: make() for name, make in engines.items()}
    for engine in made.values():
        compile_now(engine, config, args, device)
    batches, seconds = batches * (args.steps // 2 + 2), {name: [] for name in made}
    for step in tqdm(range(3 + args.steps), disable=dist.get_rank() != 0, unit="round"):
        for name in sorted(made, key=lambda name: (list(made).index(name) + step) % len(made)):
            dist.barrier()
            began = time.perf_counter()
            update(made[name], batches[step], args, step, args.lr)
            if device.type == "cuda":
                torch.cuda.synchronize()
            dist.barrier()  # until the slowest is there
            seconds[name] += [time.perf_counter() - began] if step >= 3 else []
    of_step = args.batch_size * (1 if isinstance(data, Images) else data.context)
    results = {}
    for name, times in seconds.items():
        cost, middle = found[name], median(times)
        results[name] = {
            "step_ms": 1e3 * middle,
            "step_ms_spread": [1e3 * q for q in quantiles(times)[::2]] if len(times) > 1 else None,
            ("images" if isinstance(data, Images) else "tokens") + "_per_s": of_step / middle,
            "static_bytes": cost["weight_bytes"] + cost["grad_bytes"] + cost["optimizer_bytes"],
            "activation_bytes": cost["activation_bytes"],
            "peak_bytes": cost.get("peak_bytes"),
            "sent_bytes": cost["push_bytes"] + cost["pull_bytes"],
            "flops": cost["flops"],
            "vs_ddp": middle / median(seconds["ddp"]),
        }
    return results


def bench_table(found):
    """What `bench` found, as text."""
    columns = (
        ("step_ms", "ms a step", 1), ("vs_ddp", "of DDP", 1), ("static_bytes", "static, MB", 1e6),
        ("activation_bytes", "activ., MB", 1e6), ("sent_bytes", "sent, MB", 1e6), ("flops", "GFLOP", 1e9),
    )  # fmt: skip
    lines = [f"{'':<14}" + "".join(f"{title:>12}" for _, title, _ in columns)]
    for name, of in found.items():
        lines.append(f"{name:<14}" + "".join(f"{of[key] / unit:>12.2f}" for key, _, unit in columns))
    return "\n".join(lines)


def main(argv=None):
    parser, args, saved = parse(argv)
    processes = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    plan = check(args, processes, parser, saved)
    device, store = start(args, parser)
    try:
        run(args, saved, *plan, device, store)
    except (Stop, OSError) as error:
        leave(together=False)  # or C++ may abort when threads of it are left at the end
        parser.error(str(error))
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        name_the_silent(store)


def run(args, saved, whole, data, kept, units, draw, device, store):
    """What the flags ask for, in all processes together."""
    processes, dtype, config = dist.get_world_size(), getattr(torch, args.dtype), whole.config
    fingerprint, progress = data.fingerprint(), dict(saved["progress"] if saved else START)
    at = masks.plan(draw, args.mask, args.steps, args.resample, args.finish)
    done, (mask, mode) = progress["step"], at(progress["step"] + 1)
    local = {"out", "data_dir", "data_url", "resume"}  # rank 0's alone, and wherever the same files are
    facts = {f"--{k.replace('_', '-')}": v for k, v in vars(args).items() if k not in local}
    facts |= {"the data's checksum": fingerprint, "torch's version": torch.__version__}
    facts |= {"the checkpoint's checksum": saved and saved["checksum"], "an --out": bool(args.out)}
    agree(facts | {"the masks' checksum (numpy)": zlib.crc32(mask.tobytes())})
    out = Path(args.out) if args.out and dist.get_rank() == 0 else None
    of_out = saved and saved["of_out"]
    if out and of_out and saved["path"].name == BEFORE and not args.eval_only:
        saved["path"].replace(out / LAST)  # which is damaged, and would soon be kept in place of this one
    elif out and not (of_out or args.bench or args.eval_only):
        for name in (LAST, BEFORE):  # soon: a restart by torchrun would take them for its own
            (out / name).unlink(missing_ok=True)

    def make(kind, mask=None, mode=None):
        optimizer, first = make_optimizer(args), partial(initial_value, seed=args.seed)
        if kind == "sdp":
            return SDP(make_model, first, optimizer, units, mask, mode, dtype, device)
        return Dense(kind, make_model, first, optimizer, dtype, device)

    def make_model(trained=None, frozen=None):
        model = build(config, trained, frozen)
        for block in model.blocks.values() if args.compile else ():
            torch._dynamo.config.cache_size_limit = 256  # graphs of one function: blocks hold different units
            block.forward = torch.compile(block.forward)  # not the module, whose hooks move parameters
        return model

    params = sum(p.numel() for p in whole.parameters())
    shared = params - sum(unit.cost for unit, held in zip(units, mask.T) if not held.all())
    shared_blocks = f", with blocks {', '.join(map(str, sorted(kept)))}" if kept else ""
    what = "images" if isinstance(data, Images) else f"sequences of {data.context} tokens"
    if dist.get_rank() == 0:
        print(masks.describe(mask, units, asked=1 if mask.all() else args.coverage))
        print(
            f"{params:,} parameters, {shared:,} of them ({shared / params:.1%}) shared by all workers"
            f"{shared_blocks}\n"
            f"{args.workers} workers on {processes} process(es), {dist.get_backend()} on {device.type}; "
            f"a step is {args.batch_size} {what}\n"
            "loss: the mean over the workers, each on its own rows of the batch"
            f"{' and subnetwork' if args.mask == 'forward' else ''}; val_loss: of the whole model"
            + "\n--log-alignment: in these steps every process needs the whole model"
            * bool(args.log_alignment),
            flush=True,
        )

    if args.bench:
        modes = {f"sdp-{mode}": partial(make, "sdp", mask, mode) for mode in masks.MODES}
        modes["sdp-none"] = partial(make, "sdp", np.ones_like(mask), "none")
        engines = {engine: partial(make, engine) for engine in ("ddp", "fsdp")} | modes
        found = bench(engines, config, data.to(device), args, device)
        if dist.get_rank() == 0:
            print(bench_table(found))
        leave()
        if out:
            (out / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
        return
    engine, data = make(args.engine, mask, mode), data.to(device)
    if saved:
        engine.load(saved.pop("model"), saved.pop("optimizer"))  # and let go of the file
        if engine.rank == 0:
            other = "" if fingerprint == saved["fingerprint"] else "; the data is not what it was trained on"
            print(f"after step {done} of {saved['path']}{other}", flush=True)
    if not args.eval_only:
        costs, flops = measure_modes(engine, mask, mode, config, args, device)
        rows, kind = args.batch_size // args.workers, (args.optimizer, dtype, device)
        dense = dense_worker(config, rows, args.micro_batches, processes, *kind)
        if args.match_flops:
            of_step = (1 - args.finish) * flops[args.mask] + args.finish * flops.get("backward", 0)
            args.steps, asked = round(args.steps * dense["flops"] / of_step), args.steps
            at = masks.plan(draw, args.mask, args.steps, args.resample, args.finish)
            if engine.rank == 0:
                print(
                    f"--match-flops: {args.steps} steps, which cost a worker the FLOPs of {asked} dense ones"
                )
        if done > args.steps:
            raise Stop(f"--steps {args.steps}: {saved['path']} has {done} already; choose more")
    if args.eval_only or (saved and done == args.steps):
        loss, accuracy = evaluate(engine, data, args, device)
        leave()
        if engine.rank == 0:
            print(f"step {done}: val_loss {loss:.4f}, accuracy {accuracy:.4f}; there was nothing to train")
        return

    def save():
        """Write a checkpoint, if there is an --out; all processes take part."""
        if not args.out:
            return
        model, optimizer = engine.state()
        if getattr(config, "norm", None) == "batch":
            with whole_model(engine, data, args, device) as trained:
                model |= {name: buffer.cpu() for name, buffer in trained.named_buffers()}
        problem = [None]
        if out:
            shape = {field: value for field, value in vars(config).items() if field not in OF_TRAINING}
            content = {"format": FORMAT, "progress": progress, "fingerprint": fingerprint, "config": shape}
            try:
                os.fsync(log.fileno())
                content |= {"flags": vars(args), "model": model, "optimizer": optimizer}
                save_file(content, out / LAST, before=out / BEFORE)
            except (OSError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:200]
                free = f"{shutil.disk_usage(out).free / 1e6:,.0f} MB are free there"
                problem = [f"--out {out}: step {progress['step']} could not be saved, {free} ({reason})"]
        dist.broadcast_object_list(problem)
        if problem[0]:
            raise Stop(problem[0])

    compile_now(engine, config, args, device)
    if out:
        (out / "summary.json").unlink(missing_ok=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with (
        noticed(signal.SIGINT, signal.SIGTERM) as came,
        open_log(out, saved) if out else nullcontext() as log,
    ):
        found = train(engine, at, costs, flops, config, data, args, device, log, store, save, came, progress)
        if progress["step"] == args.steps and engine.rank == 0:
            figures = {"params": params, "shared_params": shared, "skipped_steps": progress["skipped"]}
            summary = summarise(engine, args, config, mask, figures, dense, *found)
            if out:
                (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        save()
        leave()
    if engine.rank == 0 and progress["step"] < args.steps:
        print(f"stopped by a signal after step {progress['step']}" + "; --resume goes on" * bool(out))


def mean_alignment(alignments):
    """What `SDP.align` has found in several steps, in the mean over these and the workers."""

    def middle(values):
        values = [value for value in values if value is not None]
        return mean(values) if values else None

    return {
        "workers": {
            n: middle(chain(*(a["workers"][n] for a in alignments))) for n in alignments[0]["workers"]
        },
        "owners": {n: middle(a["owners"][n] for a in alignments) for n in alignments[0]["owners"]},
    }


def summarise(engine, args, config, mask, figures, dense, phases, alignments, step_ms, found):
    """Print the table, and return what belongs into summary.json. dense: from `dense_worker`; the rest: from
    `train`."""
    per_worker = over_phases(phases)
    print(table(per_worker, dense))
    if len(phases) > 1:
        print("memory: where it is higher, before --finish or in it; the rest: the mean over the steps")
    alignment = mean_alignment(alignments) if alignments else None
    if alignment:
        of_all = ", ".join(f"{of} {alignment[of]['all']:.4f}" for of in ("workers", "owners"))
        print(f"cosine similarity to the whole model's gradients: {of_all}")
    if args.workers > engine.processes:
        print(
            f"A process plays {args.workers // engine.processes} workers, one after another: its master, "
            "optimizer and mean gradient serve them all; what is pushed and pulled is for one."
        )
    return {
        "config": vars(args),
        "model": asdict(config),
        "workers": args.workers,
        "processes": engine.processes,
        "holders_per_unit": int(mask[:, 0].sum()),
        "coverage": float(mask[:, 0].mean()),
        "spectral_gap": masks.spectral_gap(mask),
        "steps": args.steps,
        **figures,
        "final_val_loss": number(found[0]),
        "final_val_accuracy": found[1],
        "step_ms_median": step_ms,
        "per_worker": per_worker,
        "phases": phases,
        "alignment": alignment,
        "dense": dense,
    }


if __name__ == "__main__":
    main()
