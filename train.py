"""Train a model with Subnetwork Data Parallelism, and show what each worker saved.

    torchrun --standalone --nproc-per-node 4 train.py --mask backward     # 4 workers
    torchrun --standalone --nproc-per-node 2 train.py --mask forward --units neuron --workers 8
    python train.py --mask forward    # one process plays four workers

Needs masks.py, model.py, sdp.py, data.py, best read first, and support/. Start at `main`, at the end.
"""

import math
import signal
import sys
import zlib
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import masks
from data import KINDS, load, load_batches
from masks import UserError
from model import CONFIGS, build, initial_value, units_of
from sdp import SDP
from support import checkpoint, launch, report
from support.evaluation import evaluate, whole_model
from support.journal import Journal
from support.launch import at_least, whole_numbers
from support.machines import make_layout, spread
from support.peers import PeerLost
from support.presets import preset, shared_blocks

SHAPE = ("layers", "width", "heads", "hidden", "patch", "norm", "context")  # flags and fields of a config
OF_TRAINING = ("drop_path", "dropout", "checkpoint_activations")  # likewise, but no shape
OF_CHECKPOINT = ("model", "size", *SHAPE, "data", "optimizer")  # flags that --resume may not change

FLAGS = (  # name, type or choices, default, meaning
    ("--mask", masks.MODES, "backward", "backward: gradients only of held units; forward: only they exist"),
    ("--units", ("block", "neuron"), "block", "blocks; or heads, groups of neurons and channels"),
    ("--coverage", float, 0.5, "share C of the N workers that hold a unit"),
    ("--workers", at_least(1), None, "N, a multiple of the processes (default: as many; of one: 4)"),
    ("--resample", at_least(0), 0, "steps between new masks, 0 = never"),
    ("--finish", at_least(0, float), 0.0, "last part of a forward-masked run that is backward-masked"),
    ("--keep", str, "none", "blocks that all hold: none, ends, strided (ResNet), or 0,5"),
    ("--assign", ("worker", "machine"), "worker", "machine: its workers hold the same units"),
    ("--machines", at_least(1), None, "for --assign machine: how many (default: torchrun's)"),
    ("--capacity", whole_numbers, None, "of each worker, as 3,1,1,1: its share of all units"),
    ("--rows", whole_numbers, None, "each worker's share of a batch, as 2,1,1,1 (default: equal)"),
    ("--model", tuple(CONFIGS), "gpt", "vit, resnet18 have other defaults: DEFAULTS in train.py"),
    ("--size", str, None, "preset of the shape below, as 10m, 134m, 1b (default: the first that fits)"),
    ("--layers", at_least(1), None, "transformer blocks"),
    ("--width", at_least(1), None, "residual stream; of a ResNet the first stage"),
    ("--heads", at_least(1), None, "attention heads of a block"),
    ("--hidden", at_least(1), None, "hidden neurons of a block"),
    ("--patch", at_least(1), None, "pixels of a patch's side in a vit"),
    ("--norm", ("batch", "group"), None, "of a ResNet (default: batch)"),
    ("--context", at_least(1), None, "tokens of a sequence (default: 128; of fineweb 1024)"),
    ("--drop-path", at_least(0, float), 0.0, "chance of a row to skip a branch: stochastic depth"),
    ("--dropout", at_least(0, float), 0.0, "chance of a number to be 0, as in nanoGPT"),
    ("--checkpoint-activations", bool, False, "keep each block's input only, and compute the rest again"),
    ("--data", KINDS, "python", "Python's own library; any text; or what scripts.prepare made"),
    ("--data-dir", str, None, "folder (default: in datasets); of text also a file"),
    ("--steps", at_least(0), None, "updates (default: 300); 0: only predict memory and traffic"),
    ("--epochs", at_least(0.001, float), None, "passes over the data, in place of --steps"),
    ("--batch-size", at_least(1), 16, "sequences or images of a step, over all workers"),
    ("--micro-batches", at_least(1), 1, "parts of a worker's rows; only the last communicates"),
    ("--optimizer", ("adamw", "sgd"), "adamw", "sgd: with a Nesterov momentum of 0.9"),
    ("--lr", at_least(0, float), 3e-3, "peak learning rate"),
    ("--warmup", at_least(0), 20, "steps of linear warm-up; then a cosine to a tenth of --lr"),
    ("--weight-decay", at_least(0, float), 0.1, "of matrices; norms and biases have none"),
    ("--grad-clip", at_least(0, float), 1.0, "largest norm of the averaged gradient, 0 = no clipping"),
    ("--eval-every", at_least(0), 100, "steps between validations, 0 = only after the last"),
    ("--eval-batches", at_least(1), 20, "batches of a validation on text; of images all"),
    ("--dtype", ("float32", "bfloat16", "float64"), None, "of all but owners (default: bfloat16 on GPUs)"),
    ("--device", ("auto", "cpu", "cuda"), "auto", "auto: cuda where there is one, else cpu"),
    ("--compile", bool, False, "torch.compile each block"),
    ("--seed", at_least(0), 0, "of initial values, batches and masks"),
    ("--out", str, None, "folder for log.jsonl, summary.json and checkpoints"),
    ("--wandb", str, None, "project of Weights & Biases that gets what log.jsonl has"),
    ("--overwrite", bool, False, "replace the run that is in --out"),
    ("--resume", None, None, "continue from this file, or from what is in --out"),
    ("--save-every", at_least(0), 500, "steps between checkpoints, 0 = only after the last"),
    ("--timeout", at_least(1), 600, "seconds to wait for a process that does not answer"),
)  # fmt: skip
DEFAULTS = {  # where a model has others
    "vit": {"data": "cifar10", "batch_size": 128, "lr": 1e-3, "weight_decay": 0.05},
    "resnet18": {"data": "cifar10", "batch_size": 128, "optimizer": "sgd", "lr": 0.05, "weight_decay": 5e-4,
                 "grad_clip": 0.0},
}  # fmt: skip
TITLES = {  # of the groups that begin with these flags
    "--mask": "method",
    "--assign": "clusters",
    "--model": "model",
    "--data": "data",
    "--steps": "optimisation",
    "--dtype": "run",
}
make_parser = partial(launch.make_parser, "Train a model with Subnetwork Data Parallelism.", FLAGS, TITLES)


def parse(argv, parser):
    """(args, the checkpoint to go on from or None), with the defaults of --model or of the checkpoint. Bad
    flags end the program."""
    args = parser.parse_args(argv)
    try:
        saved = checkpoint.read_to_resume(args.resume, args.out)
    except UserError as error:
        parser.error(str(error))
    flags = saved["flags"] if saved else {}
    parser.set_defaults(**DEFAULTS.get(flags.get("model", args.model), {}))
    parser.set_defaults(**{flag: flags[flag] for flag in (*OF_CHECKPOINT, "data_dir") if flag in flags})
    return parser.parse_args(argv), saved


def check_flags(args, saved):
    """Complete --workers, --machines, --rows. Raises UserError where flags contradict."""
    for flag in OF_CHECKPOINT if saved else ():
        value, before = getattr(args, flag), saved["flags"][flag]
        if value != before:
            why = f"{saved['path']} was trained with {before or 'its default'}"
            raise UserError(f"--{flag} {value}: {why}; leave it out")
    processes = launch.world_size()
    args.workers = args.workers or (4 if processes == 1 and args.mask != "none" else processes)
    args.rows = args.rows or [1] * args.workers
    parts = sum(args.rows) * args.micro_batches
    possible = (args.batch_size // parts + 1) * parts
    one_each = f"needs {args.workers} numbers, one for each worker"
    by_machine = args.assign == "machine"
    args.machines = args.machines or (launch.count_machines() if by_machine else None)
    for wrong, flag, remedy in (
        (by_machine and args.machines == 1, "assign", "needs several machines; --machines 2 plays two"),
        (by_machine and args.capacity, "capacity", "is not for --assign machine"),
        (len(args.rows) != args.workers, "rows", one_each),
        (len(args.capacity or args.rows) != args.workers, "capacity", one_each),
        (args.resample and args.mask == "none", "resample", "is not for --mask none, without masks"),
        (args.resample and args.compile, "resample", "not with --compile, which would compile each mask"),
        (args.finish and args.mask != "forward", "finish", "is for --mask forward"),
        (args.finish > 1, "finish", "must be at most 1, such as 0.3"),
        (args.drop_path >= 1, "drop_path", "must be below 1, such as 0.1"),
        (args.dropout >= 1, "dropout", "must be below 1, such as 0.1"),
        (args.wandb and not find_spec("wandb"), "wandb", "needs its package; pip install wandb"),
        (args.steps is not None and args.epochs, "epochs", "not together with --steps; choose one"),
        (args.workers % processes, "workers", f"must be a multiple of the {processes} processes"),
        (by_machine and args.workers % args.machines, "machines", f"must divide the {args.workers} workers"),
        (args.batch_size % parts, "batch_size", f"must be a multiple of {parts}, the {args.workers} workers"
         f" (or the sum of --rows) times {args.micro_batches} --micro-batches, such as {possible}"),
    ):  # fmt: skip
        if wrong:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: {remedy}")


def make_config(args, data, saved):
    """The config of the model: what the checkpoint has; or the preset of --size, then the flags
    that were given. Raises UserError where the model does not fit the flags or the data."""
    known = {field.name for field in fields(CONFIGS[args.model])}
    given = {flag: getattr(args, flag) for flag in SHAPE if getattr(args, flag) is not None}
    for name in (data.shape | given).keys() - known:
        flag = name if name in given else "data"
        raise UserError(f"--{flag} {getattr(args, flag)}: is not for --model {args.model}")
    shape = preset(args.model, args.size, data.shape) | data.shape | given
    config = saved["config"] if saved else CONFIGS[args.model](**shape)
    for field, value in data.shape.items():
        if getattr(config, field) != value:
            raise UserError(f"--data-dir {args.data_dir}: has {field} {value}, unlike what was trained on")
    return replace(config, **{flag: getattr(args, flag) for flag in OF_TRAINING})


@dataclass
class Plan:
    """What a run works with. It is made before the processes talk to each other."""

    args: Namespace
    saved: dict | None  # the checkpoint to go on from
    data: object  # Text or Images
    fingerprint: int  # of the data
    whole: torch.nn.Module  # the whole model, on the meta device
    shared_blocks: set  # the numbers of the blocks that all workers hold
    units: list
    draw_mask: object  # draw_mask(mask_number) -> bool [workers, units]
    progress: dict  # see checkpoint.START

    def setting(self, step):
        """(number of the mask, mode) of a step."""
        return masks.schedule(step, self.args.mask, self.args.steps, self.args.resample, self.args.finish)

    def count_params(self, mask):
        """(parameters of the whole model, those of them that all workers hold)."""
        params = sum(p.numel() for p in self.whole.parameters())
        return params, params - sum(u.cost for u, held in zip(self.units, mask.T) if not held.all())


def make_plan(args, saved, assign):
    """Check the flags against each other, the data and the model. Raises UserError."""
    check_flags(args, saved)
    data = load(args.data, args.data_dir, args.context, tests=args.eval_batches * args.batch_size)
    with torch.device("meta"):
        whole = build(make_config(args, data, saved))
        shared = shared_blocks(args.keep, whole)
        units = units_of(whole, args.units, shared)
    groups = args.machines if args.assign == "machine" else args.workers  # whose workers hold the same
    holders = masks.holders_per_unit(args.coverage, groups)  # also where it decides nothing
    by_capacity = {"capacity": args.capacity} if args.capacity else {}

    def draw_mask(mask_number):
        if args.mask == "none":
            return np.ones((args.workers, len(units)), dtype=bool)
        mask = assign(units, groups, holders, args.seed, mask_number, **by_capacity)
        if np.shape(mask) != (groups, len(units)) or not (mask.any(axis=0).all() and mask.any(axis=1).all()):
            raise ValueError("assign: must return [workers, units], where all units and workers have some")
        if groups < args.workers:
            mask = spread(mask, units).repeat(args.workers // groups, axis=0)
        return mask

    args.steps = 300 if args.steps is None else args.steps
    if args.epochs:
        args.steps = math.ceil(args.epochs * data.epoch_size / args.batch_size)
    progress = dict(saved["progress"] if saved else checkpoint.START)
    if progress["step"] > args.steps > 0:
        raise UserError(f"--steps {args.steps}: {saved['path']} has {progress['step']} already; choose more")
    return Plan(args, saved, data, data.fingerprint(), whole, shared, units, draw_mask, progress)


def make_engine(plan, mask, mode, device, engine_class, machines=1):
    """The engine for a plan, with the values of its checkpoint, if there is one."""
    args = plan.args
    weights = [rows * args.workers / sum(args.rows) for rows in args.rows]
    layout = make_layout(machines, timedelta(seconds=args.timeout), args.capacity)

    def build_units(units):
        model = build(plan.whole.config, units)
        if args.compile:
            torch._dynamo.config.cache_size_limit = 256  # as blocks hold different units
            for block in model.blocks.values():
                block.forward = launch.compiled(block.forward)  # not the module, whose hooks move values
        return model

    first, optimizer = partial(initial_value, seed=args.seed), partial(make_optimizer, args)
    options = {"dtype": getattr(torch, args.dtype), "device": device}
    options |= {"layout": layout, "weights": weights}
    engine = engine_class(build_units, first, optimizer, plan.units, mask, mode, **options)
    if plan.saved:
        values = plan.saved.pop("model"), plan.saved.pop("optimizer")  # and let go of the file
        checkpoint.load_state(engine, *values)
    return engine


def make_optimizer(args, groups):
    common = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, **common)
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True, **common)


def learning_rate(step, args):
    """Linear warm-up, then a cosine from --lr to a tenth of it. Steps count from 1."""
    if step <= args.warmup:
        return args.lr * step / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


def play(batches, args, step, worker, model, weight):
    """A worker's passes in a step, on its rows. Returns its mean loss times weight, float64."""
    torch.manual_seed(zlib.crc32(f"{args.seed} {step} {worker}".encode()))  # for dropout and DropPath
    losses = []
    for x, y in zip(*(tensor.chunk(args.micro_batches) for tensor in batches[worker])):
        loss = weight * model(x, y)  # x: (rows, context) or (rows, 3, image, image)
        (loss / args.micro_batches).backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean().double()


def update(engine, batches, args, step, lr, *numbers):
    """One step on {worker: (x, y)}. Returns (norm, mean loss, bytes sent by all, sums of numbers)."""
    loss_sum, traffic_before = 0.0, engine.traffic.copy()
    for worker in engine.workers:
        with engine.turn(worker, args.micro_batches) as model:
            loss_sum += play(batches, args, step, worker, model, engine.weights[worker])
    sent = sum(engine.traffic[way] - traffic_before[way] for way in ("pull", "push"))
    norm, loss_sum, *sums = engine.step(lr, args.grad_clip, loss_sum, sent, *numbers)
    return norm, loss_sum / args.workers, *sums


def train(plan, engine, journal, caught, before_step=None):
    """The loop, from plan.progress on. A signal to any process stops all."""
    args, data, first_step = plan.args, plan.data, plan.progress["step"] + 1
    with ThreadPoolExecutor(1) as loader, journal.bar:
        coming = loader.submit(load_batches, data, engine, args, first_step)
        for step in journal.bar:
            batches = coming.result()  # loading reads engine.workers, which may change now
            if step > first_step and plan.setting(step) != plan.setting(step - 1):
                mask_number, mode = plan.setting(step)
                with journal.change(mode):
                    engine.change(plan.draw_mask(mask_number), mode)
            coming = loader.submit(load_batches, data, engine, args, min(step + 1, args.steps))
            noted = before_step and before_step(step, engine, batches)
            lr = learning_rate(step, args)
            journal.begin(step)
            norm, loss, sent, stop = update(engine, batches, args, step, lr, len(caught))
            entry = journal.end(step, norm, loss, lr, sent) | (noted or {})
            if step == args.steps or is_due(step, args.eval_every):
                ending = f", {journal.status(loss)}, {journal.time_left()} left"
                journal.metrics = validate(plan, engine, step, ending)
                entry |= journal.metrics
            journal.write(entry, loss)
            if stop:
                break
            if step < args.steps and is_due(step, args.save_every):
                save(plan, engine)
    journal.end_phase()


def is_due(step, every):
    """Is it time for what happens every so many steps? 0: never."""
    return every > 0 and step % every == 0


def validate(plan, engine, step, ending=""):
    """Returns {"val_loss": nats per item, or None, "val_accuracy": share} of the whole model."""
    with whole_model(engine, plan.data, plan.args.seed) as model:
        loss, accuracy = evaluate(model, plan.data, plan.args.batch_size, engine.device)
    if engine.rank == 0:
        line = f"step {step}: val_loss {loss:.4f} nats per {plan.data.item}, accuracy {accuracy:.4f}{ending}"
        tqdm.write(line)
        sys.stdout.flush()  # also where it is no terminal
    return {"val_loss": loss if math.isfinite(loss) else None, "val_accuracy": accuracy}


def save(plan, engine):
    """Write a checkpoint, if there is an --out. All take part; raises UserError on all."""
    args, config, buffers = plan.args, plan.whole.config, {}
    if not args.out:
        return
    if getattr(config, "norm", None) == "batch":
        with whole_model(engine, plan.data, args.seed) as trained:
            buffers = {name: buffer.cpu() for name, buffer in trained.named_buffers()}
    shape = {field: value for field, value in asdict(config).items() if field not in OF_TRAINING}
    known = {"progress": plan.progress, "fingerprint": plan.fingerprint, "config": shape, "flags": vars(args)}
    checkpoint.save(engine, known, buffers, Path(args.out))


def check_agreement(plan, mask):
    """Raises UserError where processes differ in what must be the same."""
    own = ("out", "data_dir", "resume")  # paths may differ
    facts = {f"--{flag}": value for flag, value in vars(plan.args).items() if flag not in own}
    facts["an --out"] = bool(plan.args.out)
    facts["torch's version"] = torch.__version__
    facts["the data's checksum"] = plan.fingerprint
    facts["the masks' checksum"] = zlib.crc32(mask.tobytes())
    facts["the checkpoint's checksum"] = plan.saved and plan.saved["checksum"]
    launch.check_same_everywhere(facts)


def run(plan, mask, mode, device, store, engine_class, before_step):
    """What the flags ask for, in all processes together."""
    args, is_first = plan.args, dist.get_rank() == 0
    args.dtype = args.dtype or launch.default_dtype(device)
    check_agreement(plan, mask)
    machines = launch.machines_alike(needed=args.assign == "machine")
    args.machines = args.machines or machines
    engine = make_engine(plan, mask, mode, device, engine_class, machines)
    if is_first:
        report.announce(plan, mask, device)
    plan.data = plan.data.to(device)
    if plan.progress["step"] == args.steps:
        validate(plan, engine, args.steps)
        return launch.shut_down()
    if args.out and is_first:
        checkpoint.clear_folder(Path(args.out), plan.saved)  # only now, when all processes agree
    with (
        launch.catch_signals(signal.SIGINT, signal.SIGTERM) as caught,
        report.open_records(args, plan.saved) as record,
    ):
        journal = Journal(plan, engine, store, record)
        train(plan, engine, journal, caught, before_step)
        is_finished = plan.progress["step"] == args.steps
        save(plan, engine)  # before anything else can fail
        if is_finished:
            report.print_results(plan, engine, mask, journal.phases, journal.metrics)
        launch.shut_down()
    if is_first and not is_finished:
        remedy = "; --resume continues" if args.out else ""
        print(f"stopped by a signal after step {plan.progress['step']}{remedy}")


def main(argv=None, *, assign=masks.assign, engine=SDP, before_step=None):
    """The command. argv: its flags. assign: as masks.assign; engine: a class as sdp.SDP; before_step(step,
    engine, {worker: (x, y)}) returns a dictionary for the step's line in log.jsonl, or None."""
    parser = make_parser()
    args, saved = parse(argv, parser)
    try:
        plan = make_plan(args, saved, assign)
        if args.steps == 0:
            make = partial(make_engine, plan, engine_class=engine)
            return report.forecast(plan, make) if launch.rank() == 0 else None
        mask_number, mode = plan.setting(plan.progress["step"] + 1)
        mask = plan.draw_mask(mask_number)
        if args.out and launch.rank() == 0:
            checkpoint.prepare_folder(args, saved)
        device, store = launch.start(args.device, args.timeout)
    except UserError as error:
        parser.error(str(error))
    try:
        run(plan, mask, mode, device, store, engine, before_step)
    except UserError as error:
        launch.shut_down(together=False)  # otherwise a thread of C++ that is left may abort
        parser.error(str(error))
    except PeerLost:
        launch.name_the_silent(store)


if __name__ == "__main__":
    main()
